"""Reading ahead and writing behind: units of leaves into rooms that are used again and again, results in order to disk."""

import concurrent.futures
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from jaxmerge.checkpoint import _direct
from jaxmerge.checkpoint._source import Source

LANES = 4
"""Inputs that are read at once."""
ROOMS = 4
"""Units in memory at once, at most: one is read, two are prepared, one is worked on."""
PREPARERS = 2
"""Units that are prepared at once."""
FLUSH = 1 << 22
"""Bytes that are written at once."""


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
    prepare: Callable[[Unit, list[np.ndarray]], None] | None = None,
) -> Iterator[tuple[Unit, list[np.ndarray]]]:
    """Each unit with its entries of every input, flat; the arrays are good until the next one is asked for.

    Args:
      units: in the order in which they are wanted.
      inputs: the checkpoints.
      reader: what reads files.
      limit: bytes that all rooms together may take, if they are more than one.
      alone: leaves of which only the first input is wanted.
      prepare: what is to be done with a unit while those before are worked on; in threads of its own.
    """
    if not units:
        return
    width = {u.name: max(s.leaves[u.name].dtype.itemsize for s in inputs if u.name in s.leaves) for u in units}  # type: ignore[union-attr]
    free = _Rooms(len(inputs), ROOMS, limit)
    ready: queue.Queue = queue.Queue()

    def fill(source: Source, unit: Unit, room: np.ndarray) -> np.ndarray:
        dtype, extent = source.leaves[unit.name].dtype, source.extent(unit.name)
        if extent is None or dtype is None:
            return flat_range(source, unit)
        width = dtype.itemsize
        data = reader.read(extent.file, extent.offset + unit.start * width, unit.size * width, room)
        return data.view(dtype)

    def reading() -> None:
        try:
            for unit in units:
                room = free.take(unit.size * width[unit.name] + 2 * _direct.PAGE)
                if room is None:
                    return
                several = inputs[:1] if unit.name in alone else inputs
                arrays = list(lanes.map(lambda pair, unit=unit: fill(pair[0], unit, pair[1]), zip(several, room, strict=False)))
                prepared = None if prepare is None else preparers.submit(prepare, unit, arrays)
                ready.put((unit, arrays, room, prepared))
        except BaseException as e:
            ready.put(e)

    with (
        concurrent.futures.ThreadPoolExecutor(min(LANES, len(inputs)), "jaxmerge-lane") as lanes,
        concurrent.futures.ThreadPoolExecutor(PREPARERS, "jaxmerge-prepare") as preparers,
    ):
        thread = threading.Thread(target=reading, name="jaxmerge-read", daemon=True)
        thread.start()
        try:
            for _ in units:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                unit, arrays, room, prepared = item
                if prepared is not None:
                    prepared.result()
                yield unit, arrays
                del item, arrays, prepared
                free.give(room)
        finally:
            free.close()
            thread.join()


class _Rooms:
    """Memory for units, taken when it is first needed and used again; a larger unit takes the place of smaller ones."""

    def __init__(self, inputs: int, most: int, limit: int):
        self._inputs, self._most, self._limit = inputs, most, limit
        self._free: list[list[np.ndarray]] = []
        self._sizes: list[int] = []
        self._closed = False
        self._changed = threading.Condition()

    def take(self, size: int) -> list[np.ndarray] | None:
        """A buffer of at least so many bytes for each input; None when closed."""
        with self._changed:
            while not self._closed:
                fits = [room for room in self._free if room[0].size >= size]
                if fits:
                    room = min(fits, key=lambda room: room[0].size)
                    self._free = [other for other in self._free if other is not room]
                    return room
                while self._free and not self._fits(size):
                    self._sizes.remove(self._free.pop()[0].size)
                if not self._sizes or self._fits(size):
                    room = [_direct.buffer(size) for _ in range(self._inputs)]
                    self._sizes.append(room[0].size)
                    return room
                self._changed.wait()
            return None

    def give(self, room: list[np.ndarray]) -> None:
        with self._changed:
            self._free.append(room)
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _fits(self, size: int) -> bool:
        return len(self._sizes) < self._most and (sum(self._sizes) + size) * self._inputs <= self._limit


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


@runtime_checkable
class Sink(Protocol):
    """What takes an output's bytes."""

    buffered: set[str]

    def write(self, file: str, offset: int, data: np.ndarray) -> None: ...

    def mark(self, note: Callable[[], None]) -> None: ...

    def close(self) -> None: ...

    def abandon(self) -> None: ...


class WriteBehind:
    """Bytes, in order, to a few files; a thread writes while the next are computed."""

    def __init__(self, rooms: int = 4):
        self._free: queue.Queue = queue.Queue()
        for _ in range(rooms):
            self._free.put(_direct.buffer(FLUSH + _direct.PAGE))
        self._full: queue.Queue = queue.Queue()
        self._files: dict[str, _direct.Writer] = {}
        self._file, self._at, self._begin = "", 0, 0
        self._room: np.ndarray | None = None
        self._error: BaseException | None = None
        self.buffered: set[str] = set()
        self.written = 0
        self._thread = threading.Thread(target=self._work, name="jaxmerge-write", daemon=True)
        self._thread.start()

    def write(self, file: str, offset: int, data: np.ndarray) -> None:
        """Write bytes, soon."""
        if (file, offset) != (self._file, self._at):
            self._flush()
            self._file, self._at = file, offset
        done = 0
        while done < data.size:
            if self._room is None:
                self._room, self._begin = self._take(), self._at
            lead = self._begin % _direct.PAGE
            used = lead + self._at - self._begin
            n = min(data.size - done, FLUSH - used)
            self._room[used : used + n] = data[done : done + n]
            done, self._at = done + n, self._at + n
            if used + n == FLUSH:
                self._flush()

    def mark(self, note: Any) -> None:
        """Call `note` when all that came before is on disk."""
        self._flush()
        self._full.put(note)
        self._check()

    def close(self) -> None:
        """Wait until everything is on disk.

        Raises:
          OSError: it could not be written.
        """
        self._flush()
        self._full.put(None)
        self._thread.join()
        self._check()

    def abandon(self) -> None:
        """Leave off, whatever is under way."""
        self._error = self._error or RuntimeError("abandoned")
        self._full.put(None)
        self._thread.join()

    def _take(self) -> np.ndarray:
        room = self._free.get()
        self._check()
        return room

    def _flush(self) -> None:
        if self._room is not None:
            lead = self._begin % _direct.PAGE
            self._full.put((self._file, self._begin, self._room, lead, lead + self._at - self._begin))
            self._room = None

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (item := self._full.get()) is not None:
            try:
                if self._error is None:
                    self._do(item)
            except BaseException as e:
                self._error = e
            if isinstance(item, tuple):
                self._free.put(item[2])
        for file, writer in self._files.items():
            if writer.buffered:
                self.buffered.add(file)
            writer.close()

    def _do(self, item: Any) -> None:
        if not isinstance(item, tuple):
            for writer in self._files.values():
                writer.sync()
            item()
            return
        file, offset, room, start, stop = item
        if file not in self._files:
            self._files[file] = _direct.Writer(file)
        self._files[file].write(room[start:stop], offset)
        self.written += stop - start
