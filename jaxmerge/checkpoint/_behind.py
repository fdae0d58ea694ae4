"""Writing behind: results into memory from which they go to the disk as they are, while the next are computed.

XLA lets a program write into memory that is there, if it is XLA's own and donated to it. So the rooms are arrays, seen from
outside as bytes. What is written lies in a room as in its page of the file, and goes past the page cache.
"""

import collections
import concurrent.futures
import contextlib
import ctypes
import os
import queue
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxmerge.checkpoint import _direct, _programs as programs
from jaxmerge.checkpoint._feed import Threads
from jaxmerge.checkpoint._journal import boot
from jaxmerge.checkpoint._source import Extent

SIDE_BY_SIDE = min(os.cpu_count() or 1, 8)
"""Blocks that are computed at once: each by one thread."""
ROOMS = SIDE_BY_SIDE + 2
"""Of which one is written, and one begun."""
SYNC = 30
"""Seconds after which all is put on the disk: it takes as long as to write it, and little less if it is done more often."""


class Lost(OSError):
    """What the kernel had taken over did not reach the disk."""


@runtime_checkable
class Sink(Protocol):
    """What takes an output's bytes."""

    buffered: set[str]

    def write(self, file: str, offset: int, data: np.ndarray) -> None: ...

    def mark(self, note: Callable[[bool], None]) -> None: ...

    def close(self) -> None: ...

    def abandon(self) -> None: ...


class WriteBehind:
    """Bytes to a few files; a thread writes them while the next are computed, another says what is done.

    Attributes:
      fills: whether programs can `fill` its rooms.
      buffered: files that could not be written past the page cache.
    """

    def __init__(self):
        self.fills = _on_host()
        self._free: dict[int, queue.Queue[_Room]] = collections.defaultdict(queue.Queue)  # by width
        self._made: collections.Counter[int] = collections.Counter()
        self._writer, self._keeper = Threads(1, "jaxmerge-write"), Threads(1, "jaxmerge-keep")
        self._files: dict[str, _direct.Writer] = {}
        self._file, self._at = "", 0  # where what comes next goes
        self._room: _Room | None = None
        self._begin, self._end = 0, 0  # what is in it: whole bytes from one to the other
        self._last: concurrent.futures.Future | None = None
        self._error: Exception | None = None
        self._synced = time.monotonic()
        self.buffered: set[str] = set()

    def write(self, file: str, offset: int, data: np.ndarray) -> None:
        """Write bytes, soon."""
        self._go_to(file, offset)
        while data.size:
            room = self._with_room_for(1)
            n = min(data.size, room.last - self._end)
            room.memory()[self._end : self._end + n] = data[:n]
            self._have(n)
            data = data[n:]

    def fill(self, where: Extent, made: int, dtype: np.dtype, program: Callable[[Array, Any], Any]) -> list[Any]:
        """Write, soon, what a program computes; it may be under way yet when this returns.

        Args:
          where: begins at a multiple of what an entry takes.
          made: bytes that the program makes, if more than are wanted; those that are wanted come first.
          dtype: of its entries.
          program: (room, entry at which to begin) -> the room, which was donated, and what else it finds: that is returned.
        """
        self._go_to(where.file, where.offset)
        room = self._with_room_for(made, dtype.itemsize)
        room.array, *found = program(room.array, np.int32(self._end // dtype.itemsize))
        self._have(where.bytes)
        return found

    def mark(self, note: Callable[[bool], None]) -> None:
        """Call `note` when all that came before is written: with whether it is on the disk, not only with the kernel."""
        self._flush()
        self._keeper.submit(self._keep, self._last, note)
        self._check()

    def close(self) -> None:
        """Wait until everything is noted, and on the disk.

        Raises:
          OSError: it could not be written. Lost: what was noted did not reach the disk.
        """
        self._flush()
        self._leave(cancel=False)
        self._check()

    def abandon(self) -> None:
        """Leave off, whatever is under way."""
        self._leave(cancel=True)

    def _leave(self, *, cancel: bool) -> None:
        for threads in (self._writer, self._keeper):
            threads.shutdown(cancel_futures=cancel)
        with self._noting_errors():
            if not cancel:
                self._sync()
        for file, writer in self._files.items():
            if writer.buffered:
                self.buffered.add(file)
            writer.close()
        self._files.clear()

    def _go_to(self, file: str, offset: int) -> None:
        if (file, offset) != (self._file, self._at):
            self._flush()
            self._file, self._at = file, offset

    def _have(self, size: int) -> None:
        self._at, self._end = self._at + size, self._end + size

    def _with_room_for(self, size: int, width: int | None = None) -> "_Room":
        """The room that is begun; or another, of that width (None: whichever there is), if it has too little left."""
        room = self._room
        if room is not None and width in (None, room.width) and room.last - self._end >= size:
            return room
        rest = self._flush(but=self._at % _direct.PAGE)
        self._room = room = self._take(width or next(iter(self._free), 2))
        self._begin = room.first + (self._at - rest.size) % _direct.PAGE
        self._end = self._begin + rest.size
        if rest.size:
            room.memory()[self._begin : self._end] = rest
        return room

    def _take(self, width: int) -> "_Room":
        free = self._free[width]
        if free.empty() and self._made[width] < ROOMS:
            self._made[width] += 1
            return _Room(width, self.fills)
        room = free.get()
        self._check()
        return room

    def _flush(self, but: int = 0) -> np.ndarray:
        """Have the room written that is begun, but for so many bytes at its end; those."""
        room, size = self._room, self._end - self._begin
        if room is None:
            return np.zeros(0, np.uint8)
        rest = room.memory()[self._end - min(but, size) : self._end].copy() if but else np.zeros(0, np.uint8)
        if self._file not in self._files:
            self._files[self._file] = _direct.Writer(self._file)
        part = slice(self._begin, self._end - rest.size)
        self._last = self._writer.submit(self._put, self._files[self._file], self._at - size, room, part)
        self._room = None
        return rest

    def _put(self, writer: _direct.Writer, offset: int, room: "_Room", part: slice) -> None:
        with self._noting_errors():
            writer.write(room.memory()[part], offset)
        self._free[room.width].put(room)

    def _keep(self, last: concurrent.futures.Future | None, note: Callable[[bool], None]) -> None:
        """What was written last, and all before it, noted; not where one failed, or was not begun."""
        with self._noting_errors():
            if last is not None:
                last.result()
            self._check()
            due = time.monotonic() - self._synced > SYNC or boot() is None
            if due:
                self._sync()
            note(due)

    def _sync(self) -> None:
        try:
            for writer in list(self._files.values()):
                writer.sync()
        except OSError as e:
            raise Lost(e.errno, f"what was written did not reach the disk: {e.strerror}") from e
        self._synced = time.monotonic()

    @contextlib.contextmanager
    def _noting_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as e:
            self._error = self._error or e

    def _check(self) -> None:
        if self._error is not None:
            raise self._error


class _Room:
    """Memory that a block fits into, wherever in a page it begins, behind a rest of one.

    Attributes:
      array: what programs write into; None where they cannot.
      first, last: the bytes of it that are used: from the beginning of a large page on.
    """

    def __init__(self, width: int, fills: bool):
        self.width, size = width, room_bytes(width)
        self.array: Any = None
        self.first = 0
        if fills:
            self.array = lax.broadcast(np.dtype(f"uint{8 * width}").type(0), ((_direct.HUGE + size) // width,))
            address = self.array.unsafe_buffer_pointer()
            _direct.into_large_pages(address, self.array.nbytes)
            self.first = -address % _direct.HUGE
        else:
            self._host = _direct.buffer(size)
        self.last = self.first + size

    def memory(self) -> np.ndarray:
        """Its bytes, once those are there that are being computed."""
        if self.array is None:
            return self._host
        address = self.array.block_until_ready().unsafe_buffer_pointer()  # the same, where what is donated is used
        return np.ctypeslib.as_array((ctypes.c_uint8 * self.array.nbytes).from_address(address))


def room_bytes(width: int) -> int:
    """Bytes of a room for entries of so many."""
    return programs.SIZES[0] * width + 2 * _direct.PAGE


def _on_host() -> bool:
    """Whether programs run where the files are: on one CPU device."""
    devices = jnp.asarray(np.zeros(0, np.uint8)).devices()
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"
