"""How the leaves of an output are cut into what is in memory together."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxmerge.checkpoint import _programs as programs
from jaxmerge.checkpoint._budget import available, parse_size, show_size
from jaxmerge.checkpoint._feed import Unit
from jaxmerge.checkpoint._peak import Peak, decoded, of_block, rooms, written
from jaxmerge.checkpoint._source import Leaf, Source
from jaxmerge.checkpoint._stream import LOOK, parts_of, row_of, split
from jaxmerge.params._transform import Step
from jaxmerge.params.order._quantile import row_size

BLOCKS = 2
"""Blocks of a unit of a leaf that streams through: they are computed side by side. The same on all hosts, as all units are."""
HOLD = 1 << 30
GROUP = 1 << 26
"""Bytes of blocks that become one file, at most."""


class Span(NamedTuple):
    """What is stored together of an array: so many rows along an axis, with all that follows; before it, one index."""

    axis: int
    rows: int

    def entries(self, shape: tuple[int, ...]) -> int:
        """How many that is: one run of the flat array."""
        return self.rows * math.prod(shape[self.axis + 1 :])


class Ways(NamedTuple):
    """See `CheckpointPlan`; `again` are leaves that are too large to be held while their thresholds are found.

    `spans` are those of an output in blocks, which no unit cuts through; `group` bytes of them are written at once.
    """

    units: tuple[tuple[Unit, ...], ...]
    entire: frozenset[str]
    room_bytes: int
    spans: dict[str, Span]
    group: int
    again: tuple[str, ...]
    peak: Peak
    problems: tuple[str, ...]


def by_ranges(
    *,
    inputs: Sequence[Source],
    floating: Sequence[str],
    steps: Sequence[Step],
    settings: Sequence[dict[str, Any]],
    memory: int | str | None,
    shards: Mapping[str, tuple[int, ...]] | None = None,
) -> Ways:
    """Blocks for leaves that are merged entry by entry; a unit for each leaf that is held; problems where one does not fit.

    Args:
      shards: into how many parts each axis of a leaf is split on devices, of an output in blocks; None: files of plain bytes.
    """
    problems = []
    hold = HOLD if memory is None else parse_size(memory, "memory")
    most = max(available() // 2, HOLD) if memory is None else hold
    leaves = inputs[0].leaves
    width = max((leaf.dtype.itemsize for s in inputs for leaf in s.leaves.values() if leaf.dtype is not None), default=1)
    copies = 4 * len(inputs) * width + 4 * len(inputs) * 4  # rooms, and what is computed of one block
    block = next((s for s in programs.SIZES if s * copies <= hold), programs.SIZES[-1])
    blocks = BLOCKS if shards is None and BLOCKS * block * copies <= hold else 1
    merged = frozenset(floating)
    blockwise = all(step.blocks for step in steps)
    largest = block * blocks * len(inputs) * width
    work = of_block(block, LOOK, len(inputs), max((leaves[n].size for n in merged), default=0))
    encoded = 0  # of inputs that are no runs of bytes: what is read, and what comes of it, until it is where it belongs
    units: list[tuple[Unit, ...]] = []
    entire, again = set(), []
    spans: dict[str, Span] = {}

    def cut(name: str, leaf: Leaf, most: int, together: int = 1) -> tuple[Unit, ...]:
        row = row_of(steps, leaf.shape) if name in merged else 1
        most = max(most // max(row, 1), 1) * row
        if shards is None:
            return tuple(parts_of(name, leaf.shape, most))
        spans[name] = span(leaf.shape, most, shards.get(name, ()), together)
        row = math.prod(leaf.shape[spans[name].axis :])
        return tuple(split(Unit(name, 0, leaf.size), spans[name].entries(leaf.shape), row))

    for name, leaf in leaves.items():
        if leaf.dtype is None:
            continue
        whole = Unit(name, 0, leaf.size)
        there = [s.leaves[name] for s in inputs if name in s.leaves]
        held = sum(o.bytes for o in there)
        parts = cut(name, leaf, block * blocks)
        if name not in merged or not leaf.size:
            units += [(part,) for part in parts]
            continue
        local = all(s.extent(name) is not None for s in inputs if name in s.leaves)
        large = 4 * held > 3 * hold
        rows = None if local or not large else _rows_together(inputs, name)
        mine = zip(steps, settings, strict=False)
        look = any(step.resolve is not None and name in s and step.open(s[name]) for step, s in mine)
        if not blockwise:
            entire.add(name)
            apart = sum(o.size for o in there if o.shape != leaf.shape)  # data of another shape: Gram matrices
            need = held + 4 * leaf.size * (2 * len(inputs) + 1) + 8 * apart
            if need > most:
                problems.append(
                    f"  {name}: this method must see a tensor whole: {show_size(need)} of memory for {list(leaf.shape)}, "
                    f"{show_size(most)} allowed; raise memory= (--memory), or choose a method that does not"
                )
            units.append((whole,))
            work = max(work, need - held)
        elif (local and not look) or (large and (local or rows)):
            if rows is not None:
                parts = cut(name, leaf, max(block // max(rows, 1), 1) * rows, rows)
                together = max(part.size for part in parts) * held // leaf.size
                if memory is not None and together > hold:
                    problems.append(
                        f"  {name}: {rows * leaf.shape[0] // leaf.size} of its {leaf.shape[0]} rows are stored as one: "
                        f"{show_size(together)} of memory of all inputs, {show_size(hold)} allowed; raise memory= (--memory)"
                    )
                largest, encoded = max(largest, together), max(encoded, together)
            units += [parts] if look else [(part,) for part in parts]
            if look:
                again.append(name)
            continue
        else:
            if memory is not None and held > hold:
                problems.append(
                    f"  {name}: it is stored so that only the whole of it can be read: {show_size(held)} of memory for "
                    f"{list(leaf.shape)} of all inputs, {show_size(hold)} allowed; raise memory= (--memory)"
                )
            units.append((whole,))
            encoded = max(encoded, 0 if local else held)
        largest = max(largest, held)
    together = min(GROUP, hold // 8)
    out = written(sum(leaf.bytes for leaf in leaves.values()), None if shards is None else together, width)
    limit = hold if memory is None else max(hold - work - decoded(encoded) - out, largest)
    room = rooms((unit for group in units for unit in group), inputs, merged, limit)
    peak = Peak(room, work, decoded(encoded), out)
    return Ways(tuple(units), frozenset(entire), limit, spans, together, tuple(again), peak, tuple(problems))


def span(shape: tuple[int, ...], most: int, shards: Sequence[int] = (), together: int = 1) -> Span:
    """The largest blocks of at most so many entries; where it costs little, a device's part is a whole number of them.

    Args:
      shape: of the array.
      most: entries.
      shards: into how many parts each axis is split on devices.
      together: entries, whole rows of the first axis, of which a block is a multiple; 1: any.
    """
    if not shape:
        return Span(0, 1)
    after = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    axis = 0 if together > 1 and after[0] < 1 << 32 else next(i for i, inner in enumerate(after) if inner <= most)
    n, inner = shape[axis], after[axis]
    if row_size(shape) < n * inner:  # entries of a block are counted from the beginning of a row of `coordinates`
        return Span(axis, 1)
    rows = min(max(most // max(inner, 1), 1), max(n, 1))
    per = n // (shards[axis] if axis < len(shards) else 1)
    if together > 1:
        rows = max(rows * inner // together, 1) * together // inner
    elif 0 < per <= rows:
        rows -= rows % per
    elif per:
        even = max(d for i in range(1, math.isqrt(per) + 1) if per % i == 0 for d in (i, per // i) if d <= rows)
        rows = even if 2 * even > rows else rows
    return Span(axis, rows)


def _rows_together(inputs: Sequence[Source], name: str) -> int | None:
    """Entries of the rows that all inputs can read without the rest of the leaf; None where one cannot."""
    found = [s.granule(name) for s in inputs if name in s.leaves]
    leaf = inputs[0].leaves[name]
    if None in found or not leaf.size:
        return None
    rows = max(n for n in found if n is not None)
    return rows * (leaf.size // leaf.shape[0]) if rows < leaf.shape[0] else None
