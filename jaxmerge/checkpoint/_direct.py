"""Bytes between files and memory that is there already, past the page cache where the file system lets us.

Where memory is handed out lazily (virtual machines) the page cache is slower than the disk: every page that passes through it
is found and filled first. Direct I/O moves whole blocks into aligned buffers; what is not aligned (the ends of a tensor) is cut
to size in memory on reading, and goes through the page cache on writing. tmpfs and some network file systems refuse direct I/O:
there everything takes the other way, 1 MiB at a time.
"""

import contextlib
import ctypes
import mmap
import os
import threading

import numpy as np

PAGE = mmap.PAGESIZE
STEP = 1 << 20
HUGE = 1 << 21
"""A large page; direct I/O moves them faster than small ones."""


def buffer(size: int) -> np.ndarray:
    """So many bytes, rounded up to pages, that begin at a page; in large pages as far as they fill such."""
    size = pages(max(size, 1))
    room = mmap.mmap(-1, pages(size, HUGE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # a whole number of them begins at one
    if size >= HUGE:
        with contextlib.suppress(AttributeError, OSError):
            room.madvise(mmap.MADV_HUGEPAGE, 0, size - size % HUGE)
    return np.frombuffer(room, np.uint8, size)


def let_go(room: np.ndarray) -> None:
    """Give a buffer's memory back, whoever refers to it yet (JAX does for a while); what was in it is lost."""
    with contextlib.suppress(AttributeError):
        room.base.obj.madvise(mmap.MADV_DONTNEED)  # type: ignore[union-attr]


def into_large_pages(address: int, size: int) -> None:
    """Have memory of which nothing is wanted yet in large pages, as far as it fills such, when it is written to."""
    begin, end = pages(address, HUGE), (address + size) // HUGE * HUGE
    with contextlib.suppress(AttributeError, OSError):
        advise = ctypes.CDLL(None).madvise
        for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTNEED):
            advise(ctypes.c_void_p(begin), ctypes.c_size_t(max(end - begin, 0)), advice)


class Reader:
    """Ranges of files into memory; safe to use from several threads."""

    def __init__(self):
        self._files: dict[str, tuple[int, bool]] = {}
        self._lock = threading.Lock()
        self.buffered: set[str] = set()

    def read(self, file: str, offset: int, size: int, room: np.ndarray, *, width: int) -> int:
        """Fill a part of `room` (a `buffer` of at least `size` and two pages); where that begins: at a multiple of `width`.

        Raises:
          OSError: the file is shorter than that.
        """
        fd, direct = self._open(file)
        if direct:
            begin = offset - offset % PAGE
            try:
                got = _fill(fd, room[: pages(offset + size) - begin], begin)
            except OSError:  # refused for this range
                self._refuse(file)
            else:
                lead = offset - begin
                _check(got - lead, size, file, offset)
                shift = lead % width
                if shift:
                    ctypes.memmove(room.ctypes.data + lead - shift, room.ctypes.data + lead, size)
                return lead - shift
        fd, _ = self._open(file)
        _check(sum(_fill(fd, room[at : min(at + STEP, size)], offset + at) for at in range(0, size, STEP)), size, file, offset)
        return 0

    def _open(self, file: str) -> tuple[int, bool]:
        with self._lock:
            if file not in self._files:
                self._files[file] = _open(file, os.O_RDONLY)
                if not self._files[file][1]:
                    self.buffered.add(file)
            return self._files[file]

    def _refuse(self, file: str) -> None:
        with self._lock:
            fd, direct = self._files[file]
            if direct:
                self._files[file] = (os.open(file, os.O_RDONLY), False)
                self.buffered.add(file)
                os.close(fd)

    def close(self) -> None:
        for fd, _ in self._files.values():
            os.close(fd)
        self._files.clear()


class Writer:
    """Ranges of memory into one file, which is there and has its size; whole pages go past the page cache."""

    def __init__(self, file: str):
        self._fd = os.open(file, os.O_WRONLY)
        self._direct, works = _open(file, os.O_WRONLY)
        self.buffered = not works

    def write(self, data: np.ndarray, offset: int) -> None:
        """Write bytes at an offset; fast where both begin and end at pages."""
        head = min(-offset % PAGE, data.size)
        tail = (offset + data.size) % PAGE if data.size > head else 0
        middle = data[head : data.size - tail]
        if self.buffered or middle.ctypes.data % PAGE:
            head, middle, tail = data.size, data[:0], 0
        self._plain(data[:head], offset)
        if middle.size:
            try:
                _empty(self._direct, middle, offset + head)
            except OSError as e:
                if e.errno != 22:
                    raise
                self.buffered = True
                self._plain(middle, offset + head)
        self._plain(data[data.size - tail :], offset + data.size - tail)

    def _plain(self, data: np.ndarray, offset: int) -> None:
        for at in range(0, data.size, STEP):
            _empty(self._fd, data[at : at + STEP], offset + at)

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def close(self) -> None:
        os.close(self._fd)
        os.close(self._direct)


def _open(file: str, mode: int) -> tuple[int, bool]:
    try:
        return os.open(file, mode | os.O_DIRECT), True
    except (OSError, AttributeError):
        return os.open(file, mode), False


def _fill(fd: int, room: np.ndarray, offset: int) -> int:
    done = 0
    while done < room.size:
        got = os.preadv(fd, [room[done:]], offset + done)  # type: ignore[arg-type]
        done += got
        if got == 0 or got % PAGE:  # the end of the file
            break
    return done


def _empty(fd: int, data: np.ndarray, offset: int) -> None:
    done = 0
    while done < data.size:
        done += os.pwrite(fd, data[done:], offset + done)  # type: ignore[arg-type]


def _check(got: int, size: int, file: str, offset: int) -> None:
    if got < size:
        raise OSError(f"{file} is cut short: asked for {size} bytes from {offset} on, got {max(got, 0)}.")


def pages(n: int, page: int = PAGE) -> int:
    """So many bytes, rounded up to whole pages."""
    return -(-n // page) * page
