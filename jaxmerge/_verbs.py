"""The commands that take files: plan and merge a recipe, verify a merge, inspect a checkpoint, extract an adapter.

jaxmerge plan recipe.yml --coefficients weight
jaxmerge merge recipe.yml merged/ --memory 2GB
jaxmerge verify merged/
jaxmerge inspect checkpoint [other]
jaxmerge extract model base adapter/ --rank 32 --error 0.1
"""

import dataclasses
import itertools
import pathlib
import sys
import types
from collections.abc import Collection, Sequence
from typing import Annotated, Any, Literal

RECIPES = (".yml", ".yaml")


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
    """Print the value of every parameter at every tensor whose name this regular expression is found in; "." for all. t is how
    far along its layers a tensor lies, from 0 to 1: embeddings, heads and what else is in no layer have t=0, and so the first
    value of a gradient."""


@dataclasses.dataclass(frozen=True)
class Merge(Options):
    """Merge as a recipe says: mergekit's YAML, or ours."""

    overwrite: bool = False
    """Replace the output of an earlier merge."""
    resume: bool = True
    """Go on where the same merge was cut off."""
    parts: pathlib.Path | None = None
    """Where the results of documents go that others refer to; None: beside the output, with .parts after its name."""


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Show a checkpoint's tensors; or compare two."""

    leaves: str | None = None
    """List the tensors whose names this regular expression is found in; "." for all."""
    by_layer: bool = False
    """Of two checkpoints: read them, and print the norm of their difference layer by layer."""


@dataclasses.dataclass(frozen=True)
class Verify:
    """Compare a merge with its receipt: files and parents by their hashes, a sample of the tensors by merging them again."""

    leaves: int = 8
    """Of how many tensors, drawn at random, a part is computed again."""
    seed: int = 0
    """Another seed, another sample."""
    parts: pathlib.Path | None = None
    """Where the results lie that it was merged from; None: beside it, with .parts after its name."""


@dataclasses.dataclass(frozen=True)
class Extract:
    """Take what a model learned out of it as an adapter (LoRA): of each matrix the nearest update of low rank."""

    rank: int = 32
    """The most that a matrix keeps."""
    error: float = 0.0
    """A matrix keeps no more than it needs to lose at most this share of its change; 0: all of the rank."""
    include: str = ""
    """Take matrices whose names this regular expression is found in."""
    exclude: str = "embed|lm_head|head$"
    """And not those that this one is found in."""


VERBS: dict[str, tuple[type, dict[str, str], int]] = {  # options, what is named and what it is, how many are needed
    "plan": (Plan, {"recipe": "A YAML file."}, 1),
    "merge": (Merge, {"recipe": "A YAML file.", "out": "Where the merged checkpoint appears."}, 2),
    "inspect": (Inspect, {"checkpoint": "What to show.", "other": "What to compare it with."}, 1),
    "verify": (Verify, {"out": "What a merge has left."}, 1),
    "extract": (
        Extract,
        {"model": "What was trained.", "base": "What it was trained from.", "out": "Where the adapter appears."},
        3,
    ),
}


def takes(argv: Sequence[str]) -> bool:
    """Whether a command line is one of these rather than `plan METHOD` or `merge METHOD`."""
    if not argv or argv[0] not in VERBS:
        return False
    named = next((a for a in argv[1:] if not a.startswith("-")), "")
    if argv[0] not in ("plan", "merge") or named.endswith(RECIPES):
        return True
    from jaxmerge._methods import METHODS

    path = pathlib.Path(named)
    asks = named not in METHODS and not {"-h", "--help"}.isdisjoint(argv)
    return asks or (path.exists() and not path.is_dir())  # a pipe is a recipe too


def near(word: str, known: Collection[str]) -> str:
    """The end of a sentence about a word that is unknown: what may have been meant."""
    import difflib

    close = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {close[0]!r}?" if close else "."


def main(argv: Sequence[str]) -> int:
    """Run one of them; 0 when done, 1 when a merge is not what it says, 2 when the user must change something."""
    verb = argv[0]
    kind, names, needed = VERBS[verb]
    named = argv[1:]
    if needed <= len(named) <= len(names) and not any(word.startswith("-") for word in named):
        plain = dict(itertools.zip_longest(names, named))  # nothing to parse: tyro takes a tenth of a second to begin
        return _run(verb, types.SimpleNamespace(**plain), kind())
    import tyro

    fields: list[Any] = []
    for k, (name, what) in enumerate(names.items()):
        told = tyro.conf.arg(metavar=name.upper(), help=what)
        if k < needed:
            fields.append((name, Annotated[str, tyro.conf.Positional, told]))
        else:
            fields.append((name, Annotated[str | None, tyro.conf.Positional, told], dataclasses.field(default=None)))
    command = dataclasses.make_dataclass("Command", [*fields, ("options", kind, dataclasses.field(default_factory=kind))])
    try:
        parsed = tyro.cli(
            command,
            prog=f"jaxmerge {verb}",
            description=kind.__doc__,
            args=list(argv[1:]),
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        )
    except SystemExit as e:  # --help, or an argument that tyro has explained
        return e.code if isinstance(e.code, int) else 2
    return _run(verb, parsed, parsed.options)


def _run(verb: str, files: Any, options: Any) -> int:
    try:
        does = {"plan": _plan, "merge": _merge, "inspect": _inspect, "verify": _verify, "extract": _extract}[verb]
        return does(files, options) or 0
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as e:
        print(f"jaxmerge: error: {e}", file=sys.stderr)
        return 2


def _engine(options: Options) -> dict[str, Any]:
    return {f.name: getattr(options, f.name) for f in dataclasses.fields(Options)}


# --- plan and merge --------------------------------------------------------------------------------------------------


def _plan(files: Any, options: Plan) -> None:
    from rich.console import Console

    from jaxmerge import recipe

    console = Console()
    plans = recipe.plan(pathlib.Path(files.recipe), **_engine(options))
    for plan in plans:
        _show(console, plan)
        if options.coefficients is not None:
            _coefficients(plan, options.coefficients)
    else_ = "else " if any(plan.headers.notes for plan in plans) else ""
    console.print(f"nothing {else_}speaks against this recipe")


def _show(console: Any, plan: Any) -> None:
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
        f"peak memory about {show_size(headers.peak_bytes)}, and some 300 MB for the runtime"
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
        print(row.name, f"t={row.t:g}", *values)


def _merge(files: Any, options: Merge) -> None:
    carry_out(pathlib.Path(files.recipe), files.out, options, parts=options.parts)


def carry_out(text: Any, out: str, options: Any, **more: Any) -> None:
    """Merge as a recipe (a path, or its text) says, with a bar that moves and a table at the end."""
    from rich.console import Console
    from rich.table import Table

    from jaxmerge import recipe
    from jaxmerge._progress import bar
    from jaxmerge.checkpoint._budget import show_size

    with bar("planning") as show:
        done = recipe.merge(
            text,
            out,
            overwrite=options.overwrite,
            resume=options.resume,
            on_progress=lambda name, p: show(p, f"{name}: "),
            **_engine(options),
            **more,
        )
    table = Table("document", "tensors", "read", "written", "seconds", "GB/s", "peak memory", title=str(out))
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
            f"{moved / report.seconds / 1e9:.2f}",
            show_size(report.peak_bytes),
        )
    console.print(table)
    for plan, report in done:
        for note in plan.notes:
            console.print(f"note: {note.text}", markup=False)
        for name, counts in report.nonfinite.items():
            console.print(f"not finite: {name}: {sum(counts)} values", markup=False)


# --- inspect ---------------------------------------------------------------------------------------------------------


def _inspect(files: Any, options: Inspect) -> None:
    from rich.console import Console
    from rich.table import Table

    from jaxmerge import checkpoint
    from jaxmerge.checkpoint._budget import show_size
    from jaxmerge.recipe import stacks

    console = Console()
    sources = [checkpoint.open(path) for path in (files.checkpoint, files.other) if path is not None]
    table = Table("", "format", "tensors", "parameters", "bytes", "dtypes", "layers")
    for source in sources:
        leaves = [leaf for leaf in source.leaves.values() if leaf.dtype is not None]
        kinds: dict[str, int] = {}
        for leaf in leaves:
            kinds[str(leaf.dtype)] = kinds.get(str(leaf.dtype), 0) + leaf.bytes
        layers = ", ".join(f"{stack.rstrip('./_')} {n}" for stack, n in stacks(source.leaves).items())
        table.add_row(
            source.name,
            source.format,
            str(len(leaves)),
            f"{sum(leaf.size for leaf in leaves):,}",
            show_size(sum(leaf.bytes for leaf in leaves)),
            ", ".join(f"{kind} ({show_size(n)})" for kind, n in sorted(kinds.items())),
            layers,
        )
    console.print(table)
    if options.leaves is not None:
        _leaves(sources[0], options.leaves)
    if len(sources) > 1:
        _compare(console, *sources, by_layer=options.by_layer)


def _leaves(source: Any, pattern: str) -> None:
    from jaxmerge.recipe._names import regex

    fits = regex("--leaves", pattern)
    for name, leaf in source.leaves.items():
        if fits.search(name):
            dtype, shape = leaf.stored or (leaf.dtype or "not an array", leaf.shape)
            print(name, dtype, list(shape))


def _compare(console: Any, a: Any, b: Any, *, by_layer: bool) -> None:
    """What is only in one, what differs in shape and dtype; and the norms of differences, block by block."""
    from rich.table import Table

    from jaxmerge.recipe import differences

    only = {a.name: sorted(a.leaves.keys() - b.leaves.keys()), b.name: sorted(b.leaves.keys() - a.leaves.keys())}
    for name, leaves in only.items():
        for leaf in leaves:
            print(f"only in {name}: {leaf}")
    both = [n for n in a.leaves if n in b.leaves]
    for n in both:
        if a.leaves[n].shape != b.leaves[n].shape or a.leaves[n].dtype != b.leaves[n].dtype:
            x, y = a.leaves[n], b.leaves[n]
            print(f"differs: {n}: {x.dtype} {list(x.shape)} against {y.dtype} {list(y.shape)}")
    if not by_layer:
        return
    table = Table("layer", "norm", "norm of the difference", "ratio", "entries that differ")
    for layer, (norm, apart, changed, size) in differences(a, b).items():
        ratio = f"{apart / norm:.3g}" if norm else "-"
        table.add_row(layer, f"{norm:.4g}", f"{apart:.4g}", ratio, f"{100 * changed / max(size, 1):.3g} %")
    console.print(table)


def _extract(files: Any, options: Extract) -> None:
    from rich.console import Console

    from jaxmerge import checkpoint, recipe
    from jaxmerge.recipe._extract import write

    if pathlib.Path(files.out).exists():
        raise FileExistsError(f"{files.out} exists; choose another place.")
    model, base = checkpoint.open(files.model), checkpoint.open(files.base)
    tensors, beside, found = recipe.extract(model, base, **dataclasses.asdict(options))
    write(files.out, tensors, beside)
    ranks, console = found.ranks.values(), Console()
    console.print(
        f"{files.out}: {len(ranks)} matrices, of rank {min(ranks, default=0)} to {max(ranks, default=0)}", markup=False
    )
    if found.errors:
        worst = max(found.errors, key=found.errors.__getitem__)
        console.print(f"at most {100 * found.errors[worst]:.3g} % of a change is lost, that of {worst}", markup=False)
    for name, norm in found.left.items():
        console.print(f"left behind: {name}, which changed by {norm:.3g}", markup=False)


# --- verify ----------------------------------------------------------------------------------------------------------


def _made_by(recipe: Any, out: str) -> Any:
    """The transform of a merge by METHOD, from its receipt.

    Raises:
      ValueError: it was made in another way.
    """
    from jaxmerge._methods import METHODS

    if not isinstance(recipe, dict) or recipe.get("method") not in METHODS:
        raise ValueError(f"{out} was not made by `jaxmerge merge`; use checkpoint.verify with its transform.")
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in recipe["options"].items()}
    return METHODS[recipe["method"]](**options).transform()


def _numbers(out: str, asked: dict[str, Any]) -> dict[str, Any]:
    """The parents of a merge by METHOD, where they were read as numbers; else as its receipt names them."""
    from jaxmerge import checkpoint
    from jaxmerge._by_method import DEQUANTIZE, as_numbers

    if not asked.get(DEQUANTIZE):
        return {}
    receipt = checkpoint.receipt(out)
    base = receipt["base"] and as_numbers(receipt["base"]["path"])
    return {"base": base, "models": [as_numbers(m["path"]) for m in receipt["models"]]}


def _verify(files: Any, options: Verify) -> int:
    from jaxmerge import checkpoint, recipe

    sample: dict[str, Any] = {"leaves": options.leaves, "seed": options.seed}
    asked = checkpoint.receipt(files.out)["recipe"]
    if isinstance(asked, str):
        found = recipe.verify(files.out, parts=options.parts, **sample)
    else:
        found = checkpoint.verify(files.out, _made_by(asked, files.out), **_numbers(files.out, asked), **sample)
    for note in found.notes:
        print(f"note: {note}")
    for problem in found.problems:
        print(f"not as the receipt says: {problem}")
    if not found.problems:
        print(f"{files.out} is what its receipt says; computed again, bit for bit: {', '.join(found.leaves)}")
    return 1 if found.problems else 0
