"""`jaxmerge plan METHOD` and `jaxmerge merge METHOD`: checkpoints merged by a method and its options.

jaxmerge merge ties --base ckpt/base --models ckpt/math ckpt/code --out ckpt/merged --density 0.2
jaxmerge plan  ties --base ckpt/base --models ckpt/math ckpt/code
"""

import dataclasses
import os
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from jaxmerge import params
from jaxmerge._commands.words import memory, speed, told
from jaxmerge._methods import METHODS, NEED_NO_BASE
from jaxmerge.checkpoint._budget import show_size


@dataclasses.dataclass(frozen=True)
class Inputs:
    models: tuple[str, ...]
    """Checkpoints to merge: Orbax directories, safetensors files or directories of them; local, https:// (safetensors),
    gs://, s3://; or names on the Hub, org/name or org/name@revision."""
    base: str | None = None
    """The checkpoint that they were trained from."""
    statistics: tuple[str, ...] = ()
    """For fisher and regmean: one checkpoint for each model, of its Fisher information or its Gram matrices by leaf."""
    dequantize: bool = False
    """Read quantised checkpoints as the numbers that their codes stand for: float8 with a factor for each block
    (DeepSeek-V3), int8 or float8 with one for each row (compressed-tensors). The output is not quantised."""
    format: Literal["orbax", "safetensors"] | None = None
    """Of the output; None: as the base (or the first model) is stored."""
    mesh: str = ""
    """For Orbax: devices to work on, such as data=2,fsdp=4: leaves are split over fsdp, replicated over other axes. Default:
    all devices on fsdp. "saved": as the base was saved."""
    memory: str | None = None
    """What buffers and arrays may take, such as 2GB."""
    dtype: str | None = None
    """Cast inputs to it first, such as bfloat16; arithmetic is float32 all the same."""
    out_dtype: str | None = None
    """Of the output; None: --dtype, or what each leaf of the base has."""
    max_shard_bytes: str = "5GB"
    """Safetensors files larger than this are split."""
    on_devices: bool | None = None
    """Merge into Orbax leaf by leaf on the mesh, or by ranges in the host's memory; None: on accelerators."""


@dataclasses.dataclass(frozen=True)
class InputsAndOutput(Inputs):
    out: str = dataclasses.field(kw_only=True)
    """Where the merged checkpoint appears."""
    overwrite: bool = False
    """Replace the output of an earlier merge."""
    integers: Literal["agree", "base"] = "agree"
    """Leaves that are not floating point must agree, or are taken from the base."""
    nonfinite: Literal["refuse", "allow"] = "refuse"
    """Refuse models with NaN or inf, or merge them all the same."""
    resume: bool = True
    """Go on where the same merge was cut off, of the Hub's models at the commits that it read."""


VERBS = {"plan": Inputs, "merge": InputsAndOutput}


def main(argv: Sequence[str]) -> int:
    """Run `VERB METHOD ...`; 0 when done, 2 when the user must change something."""
    import tyro

    verb, method = argv[:2]
    titled = Annotated[METHODS[method], tyro.conf.arg(name=method)]
    command = dataclasses.make_dataclass("Command", [("files", VERBS[verb]), ("options", titled)])
    try:
        parsed = tyro.cli(
            command,
            prog=f"jaxmerge {verb} {method}",
            description=METHODS[method].__doc__,
            args=list(argv[2:]),
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        )
    except SystemExit as e:  # --help, or an argument that tyro has explained
        return e.code if isinstance(e.code, int) else 2
    from jaxmerge.checkpoint import MergeError

    try:
        tx = _transform(method, parsed)
        if verb == "plan":
            _plan(tx, parsed.files)
        else:
            recipe: dict[str, Any] = {"method": method, "options": dataclasses.asdict(parsed.options)}
            recipe |= {field: getattr(parsed.files, field) for field in ("base", "models", "statistics", "dequantize")}
            _merge(tx, parsed.files, recipe, shlex.join(["jaxmerge", *argv]))
    except BrokenPipeError:
        raise
    except (MergeError, OSError, _UserError) as e:
        print(f"jaxmerge: error: {told(e)}", file=sys.stderr)
        return 2
    return 0


class _UserError(Exception):
    """Something that the user can change."""


def _transform(method: str, parsed: Any) -> params.MergeTransform:
    if parsed.files.base is None and not isinstance(parsed.options, NEED_NO_BASE):
        raise _UserError(f"{method} works on task vectors: name the checkpoint the models were trained from with --base.")
    try:
        return parsed.options.transform()
    except ValueError as e:
        raise _UserError(str(e)) from e


def _arguments(files: Inputs) -> dict[str, Any]:
    """How `plan` and `merge` are to do it."""
    from jaxmerge import checkpoint

    kind = files.format or checkpoint.open(files.base or files.models[0]).format
    return {
        "format": kind,
        "statistics": files.statistics,
        "sharding": _sharding(files.mesh) if kind == "orbax" or files.mesh else None,
        "memory": files.memory,
        "dtype": files.dtype,
        "out_dtype": files.out_dtype,
        "max_shard_bytes": files.max_shard_bytes,
        "on_devices": files.on_devices,
    }


def _parents(files: Inputs) -> tuple[Any, list[Any]]:
    """The base and the models, as they are named; quantised ones as numbers, if that is asked for.

    Raises:
      _UserError: one is quantised in a way that cannot be read.
    """
    if not files.dequantize:
        return files.base, list(files.models)
    from jaxmerge.recipe._dequantize import as_numbers

    try:
        return None if files.base is None else as_numbers(files.base), [as_numbers(model) for model in files.models]
    except ValueError as e:
        raise _UserError(str(e)) from e


def _sharding(mesh: str) -> Any:
    """The rule that a --mesh flag means; None for "saved"."""
    from jaxmerge.checkpoint._sharding import of_mesh

    try:
        return of_mesh(mesh, "--mesh")
    except ValueError as e:
        raise _UserError(str(e)) from None


def _plan(tx: params.MergeTransform, files: Inputs) -> None:
    from rich.console import Console
    from rich.table import Table

    plan = _checked(tx, files)
    table = Table("", "leaves", "parameters", "bytes", "dtypes", title="what the headers say")
    for checkpoint in plan.inputs:
        headers = [h for h in checkpoint.leaves.values() if h.dtype is not None]
        parameters = sum(h.bytes // h.dtype.itemsize for h in headers)
        dtypes = ", ".join(sorted({str(h.dtype) for h in headers}))
        table.add_row(
            checkpoint.name,
            str(len(checkpoint.leaves)),
            f"{parameters:,}",
            show_size(sum(h.bytes for h in headers)),
            dtypes,
        )
    console = Console()
    console.print(table)
    console.print(
        f"output: {plan.format}, {len(plan.batches or plan.units)} batches; passes over the files: {plan.passes}; reads "
        f"{show_size(plan.bytes_read)}, writes {show_size(plan.bytes_written)}; "
        f"{memory(plan)}"
    )
    looks = ", ".join(f"{statistic} ({scope})" for statistic, scope in params.needs(tx))
    console.print(f"looks at: {looks or 'every entry for itself'}")
    plan.check()
    _note(console, plan)
    console.print(f"nothing {'else ' if plan.notes else ''}speaks against this merge")


def _merge(tx: params.MergeTransform, files: InputsAndOutput, recipe: Any, command: str) -> None:
    from rich.console import Console

    from jaxmerge import checkpoint
    from jaxmerge._commands.progress import bar
    from jaxmerge.recipe._card import card_of_method, companions

    files = _as_begun(files, recipe)
    plan = _checked(tx, files)
    plan.check()
    try:
        beside = companions(plan.reference, plan.out, dequantized=files.dequantize)
    except ValueError as e:
        raise _UserError(str(e)) from e
    named = (files.base, *files.models) if files.base is not None else files.models
    beside["README.md"] = card_of_method(
        recipe["method"],
        recipe["options"],
        [*zip(named, plan.parents, strict=True)],
        based=files.base is not None,
        statistics=files.statistics,
        command=command,
        title=os.path.basename(os.path.abspath(files.out)),
    )
    _note(Console(), plan)
    with bar("merging") as show:
        report = checkpoint.merge(
            tx,
            *_parents(files),
            files.out,
            integers=files.integers,
            nonfinite=files.nonfinite,
            overwrite=files.overwrite,
            resume=files.resume,
            recipe=recipe,
            beside=beside,
            on_progress=show,
            **_arguments(files),
        )
    _summary(Console(), report, files)


def _as_begun(files: InputsAndOutput, recipe: Any) -> InputsAndOutput:
    """Names on the Hub at the commits at which the same merge read them that was cut off, as its journal says."""
    from jaxmerge.checkpoint._journal import begun
    from jaxmerge.checkpoint._merge import as_begun
    from jaxmerge.checkpoint._remote import Url, is_remote

    if not files.resume:
        return files
    inputs = begun(Url(files.out) if is_remote(files.out) else files.out, recipe=recipe)
    base, *others = as_begun((files.base, *files.models, *files.statistics), inputs, files.out)
    models, statistics = others[: len(files.models)], others[len(files.models) :]
    return dataclasses.replace(files, base=base, models=tuple(models), statistics=tuple(statistics))


def _note(console: Any, plan: Any) -> None:
    from jaxmerge.checkpoint import _hub

    for note in (*plan.notes, *_hub.said(file for source in plan.inputs for file in source.files)):
        console.print(f"note: {note}", markup=False)


def _checked(tx: params.MergeTransform, files: Inputs) -> Any:
    from jaxmerge import checkpoint
    from jaxmerge.recipe._adapters import is_adapter

    for path in (files.base, *files.models):
        if path and "+" in path and not os.path.exists(path) and os.path.exists(path.partition("+")[0]):
            raise _UserError(
                f"{path} means a model with an adapter, which a recipe reads; write one, with models: [{{model: ...}}]."
            )
    try:
        plan = checkpoint.plan(tx, *_parents(files), **_arguments(files))
    except ValueError as e:
        raise _UserError(str(e)) from e
    if adapters := [source.name for source in plan.models if is_adapter(source)]:
        raise _UserError(
            f"{', '.join(adapters)}: of adapters (LoRA) the products are merged, not one factor with another; a recipe does "
            "that, with models: [{model: ...}, {model: ...}]."
        )
    return plan


def _summary(console: Any, report: Any, files: InputsAndOutput) -> None:
    """What was merged, how fast, and what the plan found for each model."""
    from rich.table import Table

    plan = report.headers
    moved = plan.bytes_read + plan.bytes_written
    table = Table("leaves", "read", "written", "seconds", "speed", "peak memory", title=str(files.out))
    table.add_row(
        str(len(plan.out)),
        show_size(plan.bytes_read),
        show_size(plan.bytes_written),
        f"{report.seconds:.1f}",
        speed(moved, report.seconds),
        show_size(report.peak_bytes),
    )
    console.print(table)
    if report.resumed:
        console.print(f"went on from {show_size(report.resumed)} that an earlier run had written")
    if report.buffered:
        console.print(f"through the page cache, as direct I/O was refused: {', '.join(report.buffered)}")
    found = _masks(report)
    if found:
        table = Table("model", "kept", "threshold")
        for path, kept, threshold in zip(files.models, *found, strict=True):
            table.add_row(pathlib.Path(path).name, kept, threshold)
        console.print(table)
    for name, counts in report.nonfinite.items():
        console.print(f"not finite: {name}: {sum(counts)} values")


def _masks(report: Any) -> tuple[list[str], list[str]] | None:
    """Per model: the share kept, and the threshold (or its range over the leaves)."""
    import numpy as np

    sizes = {n: int(np.prod(h.shape, dtype=object)) for n, h in report.headers.reference.leaves.items()}
    for plans in report.plan:
        masks = {n: p.get("mask", p) for n, p in plans.items() if isinstance(p, dict)}
        if masks and all("kept" in m for m in masks.values()):
            words = np.stack([m["kept"] for m in masks.values()]).astype(np.float64)
            share = (words[:, 0] * 2.0**32 + words[:, 1]).sum(axis=0) / sum(sizes[n] for n in masks)
            thresholds = np.stack([m["threshold"] for m in masks.values()])[
                :, -words.shape[-1] :
            ]  # a band has an upper one too
            low, high = thresholds.min(axis=0), thresholds.max(axis=0)
            shown = [f"{a:.3g}" if a == b else f"{a:.3g} to {b:.3g}" for a, b in zip(low, high, strict=True)]
            return [f"{100 * s:.2f} %" for s in share], shown
        if masks and all("key" in m for m in masks.values()):
            density = next(iter(masks.values()))["density"]
            return [f"{100 * d:.0f} % at random" for d in density], ["-"] * len(density)
    return None
