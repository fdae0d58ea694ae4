"""Ranges of bytes of a file, local or remote: gs:// and s3:// through tensorstore."""

import functools
import os
from typing import Any

from etils import epath


def is_remote(path: Any) -> bool:
    """Whether a path is not on this machine's file systems."""
    return "://" in str(path)


def stat(path: Any) -> tuple[int, int]:
    """A file's size, and when it last changed, in nanoseconds (0 where that is not known)."""
    if is_remote(path):
        return int(epath.Path(path).stat().length), 0
    s = os.stat(path)
    return s.st_size, s.st_mtime_ns


def read(path: Any, offset: int, length: int) -> bytes:
    """So many bytes from the offset on.

    Raises:
      OSError: fewer are there.
    """
    if is_remote(path):
        directory, _, name = str(path).rpartition("/")
        data = _bytes(directory + "/", name, offset, length)
    else:
        with open(path, "rb", buffering=0) as f:
            parts, left = [], length
            while left:
                part = os.pread(f.fileno(), min(left, 1 << 30), offset + length - left)
                if not part:
                    break
                parts.append(part)
                left -= len(part)
            data = parts[0] if len(parts) == 1 else b"".join(parts)
    if len(data) != length:
        raise OSError(f"{path}: asked for {length} bytes from {offset} on, got {len(data)}; the file was cut short.")
    return data


def _bytes(directory: str, name: str, offset: int, length: int) -> bytes:
    try:
        return _store(directory).read(name, byte_range=slice(offset, offset + length)).result().value
    except ValueError as e:  # the range is not there
        raise OSError(f"{directory}{name}: asked for {length} bytes from {offset} on, got an error: {e}") from e


@functools.lru_cache(maxsize=64)
def _store(directory: str) -> Any:
    import tensorstore as ts

    return ts.KvStore.open(directory if "://" in directory else f"file://{directory}").result()
