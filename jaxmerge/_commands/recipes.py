"""`jaxmerge plan RECIPE` and `jaxmerge merge RECIPE OUT`.

jaxmerge plan recipe.yml --coefficients weight
jaxmerge merge recipe.yml merged/ --memory 2GB
"""

import dataclasses
import pathlib
import sys
from typing import Any, Literal

from jaxmerge._commands.words import memory, speed


@dataclasses.dataclass(frozen=True)
class Options:
    format: Literal["orbax", "safetensors"] | None = None
    """Of the output; None: as the base (or the first model) is stored."""
    memory: str | None = None
    """What buffers and arrays may take, such as 2GB."""
    out_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the output, in place of what the recipe says."""
    max_shard_bytes: str = "5GB"
    """Safetensors files larger than this are split."""
    sharding: str | None = None
    """For Orbax: devices to work on, such as data=2,fsdp=4: leaves are split over fsdp, replicated over other axes."""
    on_devices: bool | None = None
    """Merge into Orbax leaf by leaf on those devices, or by ranges in the host's memory; None: on accelerators."""


@dataclasses.dataclass(frozen=True)
class Plan(Options):
    """Find every mistake in a recipe, and what it would do, from headers alone."""

    coefficients: str | None = None
    """Print the value of every parameter at every tensor whose name this regular expression is found in; "." for all. at= is
    how far along its layers a tensor lies, from 0 to 1: embeddings, heads and what else is in no layer are at 0, and so have
    the first value of a gradient."""


@dataclasses.dataclass(frozen=True)
class Merge(Options):
    """Merge as a recipe says: mergekit's YAML, or ours."""

    overwrite: bool = False
    """Replace the output of an earlier merge."""
    resume: bool = True
    """Go on where the same merge was cut off, of the Hub's models at the commits that it read."""
    parts: pathlib.Path | None = None
    """Where the results of documents go that others refer to; None: beside the output, with .parts after its name."""


def engine(options: Options) -> dict[str, Any]:
    """Flags as arguments of `recipe.plan`.

    Raises:
      ValueError: one of them is wrong; it is called as it was written.
    """
    from jaxmerge.recipe._run import check_options

    found = {f.name: getattr(options, f.name) for f in dataclasses.fields(Options)}
    check_options(found, lambda key: f"--{key.replace('_', '-')}")
    return found


def plan(files: Any, options: Plan) -> None:
    from rich.console import Console

    from jaxmerge import recipe

    console = Console()
    plans = recipe.plan(recipe_of(files.recipe), **engine(options))
    for plan in plans:
        show(console, plan)
        if options.coefficients is not None:
            _coefficients(plan, options.coefficients)
    else_ = "else " if any(plan.headers.notes for plan in plans) else ""
    console.print(f"nothing {else_}speaks against this recipe")


def show(console: Any, plan: Any) -> None:
    from rich.table import Table

    from jaxmerge.checkpoint._budget import show_size

    headers = plan.headers
    title = f"{plan.recipe.name or 'the recipe'}: {plan.recipe.method_name}"
    table = Table("", "tensors", "bytes", "dtypes", title=title)
    for source in headers.inputs:
        leaves = [leaf for leaf in source.leaves.values() if leaf.dtype is not None]
        dtypes = ", ".join(sorted({str(leaf.dtype) for leaf in leaves}))
        table.add_row(source.name, str(len(leaves)), show_size(sum(leaf.bytes for leaf in leaves)), dtypes)
    dtypes = ", ".join(sorted({str(leaf.dtype) for leaf in headers.out.values() if leaf.dtype is not None}))
    table.add_row(f"output, {headers.format}", str(len(headers.out)), show_size(headers.bytes_written), dtypes)
    console.print(table)
    console.print(
        f"passes over the files: {headers.passes}; reads {show_size(headers.bytes_read)}, "
        f"writes {show_size(headers.bytes_written)}; "
        f"{memory(headers)}"
    )
    if plan.vocabulary:
        table = Table("rows of the vocabulary", *next(iter(plan.vocabulary.values())))
        for model, kinds in plan.vocabulary.items():
            table.add_row(model, *(f"{n:,}" for n in kinds.values()))
        console.print(table)
    for note in plan.notes:
        where = f"{note.mark.line}:{note.mark.column}: " if note.mark else ""
        console.print(f"note: {where}{note.text}", markup=False)


def _coefficients(plan: Any, pattern: str) -> None:
    """One line a tensor, to be read and to be searched."""
    from jaxmerge.recipe._names import regex

    fits = regex("--coefficients", pattern)
    number = lambda v: f"{v:g}" if isinstance(v, float) else str(v)
    rows = [row for row in plan.rows if fits.search(row.name)]
    if not rows:
        print(f"# no tensor's name has {pattern!r} in it, such as {plan.rows[0].name if plan.rows else 'none'}")
    said = None
    for row in rows:
        base = None if row.base is None else row.inputs[row.base][0]
        whose = f"[{', '.join(str(model) for model, _ in row.experts)}]" + (f", base {base}" if base else "")
        if whose != said:
            print(f"# a value each of {whose}")
            said = whose
        values = [
            f"{n}={'[' + ', '.join(map(number, v)) + ']' if isinstance(v, list) else number(v)}" for n, v in row.values.items()
        ]
        print(row.name, f"at={row.t:g}", *values)


def recipe_of(path: str) -> Any:
    """A recipe's path; of "-", what standard input says."""
    return f"{sys.stdin.read()}\n" if path == "-" else pathlib.Path(path)


def merge(files: Any, options: Merge) -> None:
    carry_out(recipe_of(files.recipe), files.out, options, parts=options.parts)


def carry_out(text: Any, out: str, options: Any, **more: Any) -> None:
    """Merge as a recipe (a path, or its text) says, with a bar that moves and a table at the end."""
    from rich.console import Console
    from rich.table import Table

    from jaxmerge import recipe
    from jaxmerge._commands.progress import bar
    from jaxmerge.checkpoint._budget import show_size

    with bar("planning") as show:
        done = recipe.merge(
            text,
            out,
            overwrite=options.overwrite,
            resume=options.resume,
            on_progress=lambda name, p: show(p, f"{name}: "),
            **engine(options),
            **more,
        )
    table = Table("document", "tensors", "read", "written", "seconds", "speed", "peak memory", title=str(out))
    console = Console()
    for plan, report in done:
        headers = report.headers
        moved = headers.bytes_read + headers.bytes_written
        table.add_row(
            plan.recipe.name or plan.recipe.method_name,
            str(len(headers.out)),
            show_size(headers.bytes_read),
            show_size(headers.bytes_written),
            f"{report.seconds:.1f}",
            speed(moved, report.seconds),
            show_size(report.peak_bytes),
        )
    console.print(table)
    for plan, report in done:
        for note in plan.notes:
            console.print(f"note: {note.text}", markup=False)
        for name, counts in report.nonfinite.items():
            console.print(f"not finite: {name}: {sum(counts)} values", markup=False)
