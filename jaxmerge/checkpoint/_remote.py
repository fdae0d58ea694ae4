"""Files that are not on this machine: https:// and http:// by ranges; gs://, s3:// and file:// through tensorstore."""

import functools
import os
from typing import Any

from etils import epath

from jaxmerge.checkpoint import _http, _hub

WEB = ("http://", "https://")
STORES = ("gs://", "s3://", "file://")
SAFETENSORS = ("model.safetensors.index.json", "model.safetensors", "adapter_model.safetensors")
"""What is looked for where a folder cannot be listed."""


def is_remote(path: Any) -> bool:
    """Whether a path is not on this machine's file systems."""
    return "://" in str(path)


def on_web(path: Any) -> bool:
    return str(path).startswith(WEB)


class Url:
    """A remote file or folder, as far as readers use it like a path. One that ends in .safetensors or .json is a file."""

    def __init__(self, url: Any):
        self._url = str(url).rstrip("/")

    def __str__(self) -> str:
        return self._url

    __repr__ = __fspath__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Url) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(self._url)

    def __truediv__(self, name: str) -> "Url":
        return Url(f"{self._url}/{name}")

    @property
    def name(self) -> str:
        commit = _hub.at(self)
        if commit and not commit.inside:
            return commit.model.rpartition("/")[2]
        return self._url.rpartition("/")[2].partition("?")[0]

    @property
    def parent(self) -> "Url":
        return Url(self._url.rpartition("/")[0])

    def is_dir(self) -> bool:
        commit = _hub.at(self)
        return bool(commit and not commit.inside) or not self.name.endswith((".safetensors", ".json"))

    def exists(self) -> bool:
        """Whether a file is there."""
        if commit := _hub.at(self):
            return commit.inside in _hub.listing(*commit[:3])
        if on_web(self):
            return _http.exists(self._url)
        directory, name = self._url.rsplit("/", 1)
        return _store(directory + "/").read(name, byte_range=slice(0, 0)).result().state == "value"

    def read_bytes(self) -> bytes:
        if on_web(self):
            return _http.whole(self._url)
        directory, name = self._url.rsplit("/", 1)
        found = _store(directory + "/").read(name).result()
        if found.state != "value":
            raise FileNotFoundError(f"there is nothing at {self}.")
        return found.value

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def all_names(self) -> list[str]:
        """All that lies in a folder of a bucket, and in the folders in it."""
        return sorted(str(k, "utf-8") for k in _store(self._url + "/").list().result())

    def names(self) -> list[str]:
        """What lies in a folder; of one on the web, which cannot be listed, those files that a model may have."""
        if commit := _hub.at(self):
            within = f"{commit.inside}/" if commit.inside else ""
            inside = [n.removeprefix(within) for n in _hub.listing(*commit[:3]) if n.startswith(within)]
            return sorted({n.split("/")[0] for n in inside})
        if not on_web(self):
            return sorted({key.split("/")[0] for key in self.all_names()})
        return [n for n in SAFETENSORS if (self / n).exists()]


def stat(path: Any) -> tuple[int, int]:
    """A file's size, and when it last changed, in nanoseconds, or another number that changes with it (0: none is known)."""
    if on_web(path):
        return _http.file(str(path))[:2]
    if is_remote(path):
        return _size(str(path)), 0
    s = os.stat(path)
    return s.st_size, s.st_mtime_ns


def read(path: Any, offset: int, length: int) -> bytes:
    """So many bytes from the offset on.

    Raises:
      OSError: fewer are there.
    """
    if on_web(path):
        data = _http.read(str(path), offset, length)
    elif is_remote(path):
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


def _size(url: str) -> int:
    """A file's size, of a store that only says whether a range is there: a search, sixteen questions at a time."""
    directory, _, name = url.rpartition("/")
    if not Url(url).exists():
        raise FileNotFoundError(f"there is nothing at {url}.")
    ask = lambda size: _store(directory + "/").read(name, byte_range=slice(size - 1, size))
    low, high, sizes = 0, 1 << 50, [1 << k for k in range(50)]
    while high - low > 1:
        asked = [(size, ask(size)) for size in sizes]
        there = [size for size, answer in asked if answer.exception() is None]
        low = max([low, *there])
        high = min([high, *(size for size in sizes if size > low)])
        sizes = list(range(low + 1, high, max((high - low) // 16, 1)))
    return low


@functools.lru_cache(maxsize=64)
def _store(directory: str) -> Any:
    import tensorstore as ts

    return ts.KvStore.open(folder(directory)).result()


def folder(path: str) -> dict[str, str]:
    """How tensorstore is told of a folder. s3:// is at AWS_ENDPOINT_URL, if that is set, as it is for AWS's own programs."""
    kind, there, rest = path.partition("://")
    if on_web(path):
        from jaxmerge.checkpoint import _relay

        return {"driver": "http", "base_url": _relay.folder(path)}
    if not there or kind == "file":
        return {"driver": "file", "path": rest if there else path}
    bucket, _, inside = rest.partition("/")
    if kind == "gs":
        return {"driver": "gcs", "bucket": bucket, "path": inside}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    where = {"endpoint": endpoint, "aws_region": region} if endpoint else {}
    return {"driver": "s3", "bucket": bucket, "path": inside, **where}


Place = epath.Path | Url
"""Where a checkpoint lies."""
