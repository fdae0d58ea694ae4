"""How the leaves of a safetensors output are cut into what is in memory together."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxmerge.checkpoint import _programs as programs
from jaxmerge.checkpoint._budget import available, parse_size, show_size
from jaxmerge.checkpoint._feed import FLUSH, ROOMS, Unit
from jaxmerge.checkpoint._layout import Layout, layout
from jaxmerge.checkpoint._source import Leaf, Source
from jaxmerge.checkpoint._stream import LOOK, parts_of, split
from jaxmerge.params._transform import Step

HOLD = 1 << 30


class Ways(NamedTuple):
    """See `CheckpointPlan`; `again` are leaves that are too large to be held while their thresholds are found."""

    units: tuple[tuple[Unit, ...], ...]
    entire: frozenset[str]
    room_bytes: int
    layout: Layout | None
    again: tuple[str, ...]
    peak: int
    problems: tuple[str, ...]


def by_ranges(
    *,
    inputs: Sequence[Source],
    out: Mapping[str, Leaf],
    floating: Sequence[str],
    steps: Sequence[Step],
    settings: Sequence[dict[str, Any]],
    memory: int | str | None,
    max_shard_bytes: int,
) -> Ways:
    """Blocks for leaves that are merged entry by entry; a unit for each leaf that is held; problems where one does not fit."""
    problems = []
    hold = HOLD if memory is None else parse_size(memory, "memory")
    most = max(available() // 2, HOLD) if memory is None else hold
    leaves = inputs[0].leaves
    width = max((leaf.dtype.itemsize for s in inputs for leaf in s.leaves.values() if leaf.dtype is not None), default=1)
    copies = 4 * len(inputs) * width + 4 * len(inputs) * 4  # rooms, and what is computed of one block
    block = next((s for s in programs.SIZES if s * copies <= hold), programs.SIZES[-1])
    merged = frozenset(floating)
    blockwise = all(step.blocks for step in steps)
    largest, work = block * len(inputs) * width, 4 * len(inputs) * (block + LOOK)
    units: list[tuple[Unit, ...]] = []
    entire, again = set(), []
    for name, leaf in leaves.items():
        whole = Unit(name, 0, leaf.size)
        there = [s.leaves[name] for s in inputs if name in s.leaves]
        held = sum(o.bytes for o in there)
        if name not in merged:
            units += [(part,) for part in parts_of(name, leaf.shape, block)]
            continue
        local = all(s.extent(name) is not None for s in inputs if name in s.leaves)
        large = 4 * held > 3 * hold
        rows = None if local or not large else _rows_together(inputs, name)
        most_entries = block if rows is None else max(block // max(rows, 1), 1) * rows
        mine = zip(steps, settings, strict=False)
        look = any(step.resolve is not None and name in s and step.open(s[name]) for step, s in mine)
        if not blockwise:
            entire.add(name)
            need = held + 4 * leaf.size * (2 * len(inputs) + 1)
            if need > most:
                problems.append(
                    f"  {name}: this method must see a tensor whole: {show_size(need)} of memory for {list(leaf.shape)}, "
                    f"{show_size(most)} allowed; raise memory= (--memory), or choose a method that does not"
                )
            units.append((whole,))
            work = max(work, need - held)
        elif (local and not look) or (large and (local or rows)):
            parts = tuple(parts_of(name, leaf.shape, most_entries))
            units += [parts] if look else [(part,) for part in parts]
            if look:
                again.append(name)
            continue
        else:
            units.append((whole,))
        largest = max(largest, held)
    try:
        files = layout(out, {}, max_shard_bytes)
    except ValueError as e:
        files = None
        problems.append(f"  {e}")
    limit = hold if memory is None else max(hold - work, largest)
    peak = min(ROOMS * largest, limit) + work + 4 * FLUSH
    return Ways(tuple(units), frozenset(entire), limit, files, tuple(again), peak, tuple(problems))


def in_rows(
    inputs: Sequence[Source], floating: Sequence[str], steps: Sequence[Step], budget: int
) -> dict[str, tuple[Unit, ...]]:
    """Leaves of an Orbax output that do not fit into so many bytes, in parts of whole rows; on one process.

    Where a leaf cannot be read by rows, or a step must see it whole, it is merged whole all the same.
    """
    if jax.process_count() > 1 or not all(step.blocks for step in steps):
        return {}
    found = {}
    for name in floating:
        leaf = inputs[0].leaves[name]
        if leaf.bytes * (len(inputs) + 1) > budget and (together := _rows_together(inputs, name)):
            per_entry = 4 * (len(inputs) + 1) * max(s.leaves[name].dtype.itemsize for s in inputs)  # type: ignore[union-attr]
            most = max(budget // per_entry // together, 1) * together
            found[name] = tuple(split(Unit(name, 0, leaf.size), most))
    return found


def _rows_together(inputs: Sequence[Source], name: str) -> int | None:
    """Entries of the rows that all inputs can read without the rest of the leaf; None where one cannot."""
    found = [s.granule(name) for s in inputs if name in s.leaves]
    leaf = inputs[0].leaves[name]
    if None in found or not leaf.size:
        return None
    rows = max(n for n in found if n is not None)
    return rows * (leaf.size // leaf.shape[0]) if rows < leaf.shape[0] else None
