"""Two checkpoints, layer by layer."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxmerge.checkpoint import Source
from jaxmerge.recipe._names import place

BLOCK = 1 << 24
"""Entries that are in memory at once."""


class Difference(NamedTuple):
    """How far apart two checkpoints are in one layer: the first one's norm, that of the difference, entries that differ, of how
    many."""

    norm: float
    apart: float
    changed: int
    size: int


def differences(a: Source, b: Source) -> dict[str, Difference]:
    """The norm of the difference of two checkpoints, by layer and by what is in no layer; tensors of one shape in both count.

    Args:
      a, b: checkpoints; they are read block by block.
    """
    found: dict[str, list[float]] = {}
    for name, leaf in a.leaves.items():
        other = b.leaves.get(name)
        numbers = leaf.dtype is not None and leaf.dtype.kind not in "SUO"
        if other is None or other.shape != leaf.shape or other.dtype is None or not numbers:
            continue
        at = place(name)
        key = name if at.stack is None else f"{at.stack}{at.layer}"
        sums = found.setdefault(key, [0.0, 0.0, 0, 0])
        for index in blocks(leaf.shape):
            x, y = (np.asarray(s.read(name, index), np.float32) for s in (a, b))
            sums[0] += float(np.sum(np.square(x, dtype=np.float64)))
            sums[1] += float(np.sum(np.square(x - y, dtype=np.float64)))
            sums[2] += int(np.count_nonzero(x != y))
            sums[3] += x.size
    return {k: Difference(v[0] ** 0.5, v[1] ** 0.5, int(v[2]), int(v[3])) for k, v in found.items()}


def blocks(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """A tensor in pieces of whole rows."""
    if not shape:
        yield ()
        return
    rows = max(BLOCK // max(int(np.prod(shape[1:], dtype=np.int64)), 1), 1)
    for start in range(0, shape[0], rows):
        yield (slice(start, min(start + rows, shape[0])), *(slice(0, n) for n in shape[1:]))
