"""`jaxmerge inspect CHECKPOINT [OTHER]`: what it holds, and what sets two apart."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Show a checkpoint's tensors; or compare two."""

    leaves: str | None = None
    """List the tensors whose names this regular expression is found in; "." for all."""
    by_layer: bool = False
    """Of two checkpoints: read them, and print the norm of their difference layer by layer."""


def inspect(files: Any, options: Inspect) -> None:
    from rich.console import Console
    from rich.table import Table

    from jaxmerge import checkpoint
    from jaxmerge.checkpoint._budget import show_size
    from jaxmerge.recipe import stacks

    console = Console()
    sources = [checkpoint.open(path) for path in (files.checkpoint, files.other) if path is not None]
    columns = []
    for source in sources:
        leaves = [leaf for leaf in source.leaves.values() if leaf.dtype is not None]
        kinds: dict[str, int] = {}
        for leaf in leaves:
            kinds[str(leaf.dtype)] = kinds.get(str(leaf.dtype), 0) + leaf.bytes
        layers = ", ".join(f"{stack.rstrip('./_')} {n}" for stack, n in stacks(source.leaves).items())
        columns.append((
            source.format,
            str(len(leaves)),
            f"{sum(leaf.size for leaf in leaves):,}",
            show_size(sum(leaf.bytes for leaf in leaves)),
            ", ".join(f"{kind} ({show_size(n)})" for kind, n in sorted(kinds.items())),
            layers,
        ))  # fmt: skip
    table = Table("", *(source.name for source in sources))
    for name, *cells in zip(("format", "tensors", "parameters", "bytes", "dtypes", "layers"), *columns, strict=True):
        table.add_row(name, *cells)
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
