"""Reading ahead: units of leaves into rooms that are used again and again."""

import collections
import concurrent.futures
import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxmerge.checkpoint import _direct
from jaxmerge.checkpoint._source import Source
from jaxmerge.checkpoint._windows import Run

LANES = 4
"""Inputs that are read at once."""
ROOMS = 4
"""Units in memory at once, at most: one is read, two are prepared, one is worked on."""
AHEAD = 1 << 27
"""Bytes of rooms that suffice for reading ahead, if they hold two units."""
BESIDE = 1 << 26
"""Bytes of rooms beside the largest unit: what is small is read while that one is waited for, or worked on."""
PREPARERS = 2
"""Units that are prepared at once."""


class Unit(NamedTuple):
    """Entries [start, stop) of a leaf, flat: what is in memory together of every input."""

    name: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


def read_ahead(
    units: Sequence[Unit],
    inputs: Sequence[Source],
    reader: _direct.Reader,
    *,
    limit: int,
    alone: frozenset[str] = frozenset(),
    prepare: Callable[[Unit, list[Run]], None] | None = None,
) -> Iterator[tuple[Unit, list[Run]]]:
    """Each unit with its entries of every input, flat; they are good until the next one is asked for, or none is any more.

    Args:
      units: in the order in which they are wanted.
      inputs: the checkpoints; one that lacks a leaf gives nothing of it, one that has it in another shape gives it whole.
      reader: what reads files.
      limit: bytes that all rooms together may take, if they are more than one.
      alone: leaves of which only the first input is wanted.
      prepare: what is to be done with a unit while those before are worked on; in threads of its own.
    """
    several = {u.name: [s for s in (inputs[:1] if u.name in alone else inputs) if u.name in s.leaves] for u in units}

    def part_of(source: Source, unit: Unit) -> Unit:
        leaf = source.leaves[unit.name]
        return unit if leaf.shape == several[unit.name][0].leaves[unit.name].shape else Unit(unit.name, 0, leaf.size)

    def room_bytes(unit: Unit) -> int:
        sizes = [part_of(s, unit).size * s.leaves[unit.name].dtype.itemsize for s in several[unit.name]]  # type: ignore[union-attr]
        return _direct.pages(max(sizes, default=0) + 2 * _direct.PAGE)

    each = [room_bytes(unit) for unit in units]
    together = [n * len(several[unit.name]) for n, unit in zip(each, units, strict=True)]
    rooms = _Rooms(rooms_bytes(together, limit), ROOMS)
    todo, under_way = collections.deque(zip(units, each, together, strict=True)), collections.deque()

    def fill(source: Source, unit: Unit, room: np.ndarray) -> Run:
        unit, dtype, extent = part_of(source, unit), source.leaves[unit.name].dtype, source.extent(unit.name)
        assert dtype is not None
        memory, width, begin = room.view(dtype), dtype.itemsize, 0
        if extent is None:
            memory[: unit.size] = flat_range(source, unit)
        else:
            begin = reader.read(extent.file, extent.offset + unit.start * width, unit.size * width, room, width=width)
        return Run(memory, begin // width, unit.size)

    def ready(unit: Unit, reads: list[concurrent.futures.Future]) -> list[Run]:
        runs = [read.result() for read in reads]
        if prepare is not None:
            prepare(unit, runs)
        return runs

    with (
        contextlib.closing(rooms),
        Threads(min(LANES, len(inputs)), "jaxmerge-lane") as lanes,
        Threads(PREPARERS, "jaxmerge-prepare") as preparers,
    ):
        for _ in units:
            while todo and (part := rooms.take(todo[0][2])) is not None:
                unit, size, _ = todo.popleft()
                pairs = zip(several[unit.name], rooms.split(part, size), strict=True)
                reads = [lanes.submit(fill, source, unit, room) for source, room in pairs]
                runs = functools.partial(ready, unit, reads)
                under_way.append((unit, part, runs if prepare is None else preparers.submit(runs).result))
            unit, part, runs = under_way.popleft()
            yield unit, runs()
            rooms.give(part)


def rooms_bytes(sizes: Sequence[int], limit: int) -> int:
    """What rooms for units of these sizes take together: as little as keeps the disk busy, for memory is dear to touch first.

    The largest leaves of a model are few: what is typical is the size up to which units have half of all bytes.
    """
    ordered = np.sort(np.array([0, *sizes], np.int64))
    largest, typical = int(ordered[-1]), int(ordered[np.searchsorted(2 * np.cumsum(ordered), ordered.sum())])
    most = max(min(ROOMS * typical, max(AHEAD, 2 * typical)), min(largest + min(BESIDE, typical), int(ordered.sum())))
    return max(min(most, limit), largest)


class Threads(concurrent.futures.ThreadPoolExecutor):
    """Threads of which nothing is wanted any more once the block is left."""

    def __exit__(self, *_: object) -> None:
        self.shutdown(cancel_futures=True)


class _Rooms:
    """One stretch of memory that is lent in parts: the lowest that are free, so that no more is touched than is needed."""

    def __init__(self, size: int, most: int):
        self._memory, self._most = _direct.buffer(size), most
        self._lent: list[slice] = []

    def take(self, size: int) -> slice | None:
        """Where so many bytes are free; None as long as there are none, or as many parts are lent as may be."""
        if len(self._lent) == self._most:
            return None
        start = 0
        for lent in self._lent:
            if lent.start - start >= size:
                break
            start = lent.stop
        if start + size > self._memory.size:
            return None
        part = slice(start, start + size)
        self._lent = sorted([*self._lent, part], key=lambda lent: lent.start)
        return part

    def give(self, part: slice) -> None:
        self._lent.remove(part)

    def close(self) -> None:
        """Let the memory go: there may be other rooms next."""
        _direct.let_go(self._memory)

    def split(self, part: slice, size: int) -> list[np.ndarray]:
        """The memory of a part, so many bytes a piece."""
        return [self._memory[start : start + size] for start in range(part.start, part.stop, size)]


def flat_range(source: Source, unit: Unit) -> np.ndarray:
    """A unit's entries from a source that is not a local file: rows of the axis along which it goes, cut to size."""
    leaf = source.leaves[unit.name]
    inner, start, stop = leaf.size, unit.start, unit.stop
    index: list[slice] = []
    for n in leaf.shape:
        inner //= n
        first, last = start // inner, -(-stop // inner)
        index.append(slice(first, last))
        start, stop = start - first * inner, stop - first * inner
        if last - first > 1:
            break
    block = source.read(unit.name, () if unit.size == leaf.size else tuple(index))
    return np.ascontiguousarray(block).reshape(-1)[start:stop]
