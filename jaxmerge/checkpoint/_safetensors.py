"""Reading safetensors: headers that have been checked in full, tensors by byte ranges.

A file is 8 bytes (the length of the header), the header (JSON: name -> dtype, shape, where it begins and ends), then the
tensors, row-major and little-endian, without holes. A model on the Hub is one file, or several with an index of which name is
where.
"""

import concurrent.futures
import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from jaxmerge.checkpoint import _remote
from jaxmerge.checkpoint._remote import Place
from jaxmerge.checkpoint._source import Extent, Format, Index, Leaf, digest, place

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(t)
    for name, t in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "F8_E4M3": jnp.float8_e4m3fn,
        "F8_E4M3FNUZ": jnp.float8_e4m3fnuz,
        "F8_E5M2": jnp.float8_e5m2,
        "F8_E5M2FNUZ": jnp.float8_e5m2fnuz,
        "F8_E8M0": jnp.float8_e8m0fnu,
        "U16": np.uint16,
        "I16": np.int16,
        "F16": np.float16,
        "BF16": jnp.bfloat16,
        "U32": np.uint32,
        "I32": np.int32,
        "F32": np.float32,
        "U64": np.uint64,
        "I64": np.int64,
        "F64": np.float64,
        "C64": np.complex64,
    }.items()
}
BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
"""Dtypes that numpy has not, packed; these, and those that are not known yet, are bytes here (`Leaf.stored`)."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
POINTER = b"version https://git-lfs"
LONGEST_HEADER = 100_000_000
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")


class Header(NamedTuple):
    """What one file says: its tensors, in the order of their bytes, and its metadata."""

    leaves: dict[str, Leaf]
    extents: dict[str, Extent]
    metadata: dict[str, str]
    stamp: tuple[int, int]


def read_header(path: Place) -> Header:
    """Read a file's header and check it against the file.

    Raises:
      ValueError: what is wrong with it: cut short, not safetensors, tensors that overlap, leave holes or have wrong sizes.
    """
    size, changed = _remote.stat(path)
    if size < 8:
        few = f"it has {size} bytes, fewer than the 8 that say how long the header is"
        raise ValueError(f"{path} is not a safetensors file: {few}; fetch it again.")
    length = int.from_bytes(_remote.read(path, 0, 8), "little")
    if length > LONGEST_HEADER or length < 2:
        raise ValueError(f"{path} {_instead(_remote.read(path, 0, min(size, 64)), length)}")
    if 8 + length > size:
        raise ValueError(f"{path} is cut short: its header ends at byte {8 + length}, the file at {size}; fetch it again.")

    def unique(pairs):
        twice = sorted({k for k, _ in pairs if [n for n, _ in pairs].count(k) > 1}) if len(pairs) != len(dict(pairs)) else []
        if twice:
            raise ValueError(f"the name {twice[0]!r} occurs twice")
        return dict(pairs)

    try:
        header = json.loads(_remote.read(path, 8, length).decode("utf-8"), object_pairs_hook=unique)
        if not isinstance(header, dict):
            raise ValueError("it is not an object")
    except ValueError as e:
        raise ValueError(f"{path} has a header that cannot be read: {e}; the file is damaged, fetch it again.") from e
    metadata = header.pop("__metadata__", {})
    begin, leaves, extents = 8 + length, {}, {}
    for name, entry in header.items():
        leaves[name], (start, stop) = _entry(path, name, entry)
        extents[name] = Extent(str(path), begin + start, stop - start)
    ordered = sorted(extents, key=lambda n: (extents[n].offset, extents[n].bytes))
    end, before = begin, "the header"
    for name in ordered:
        e = extents[name]
        if e.offset != end:
            kind = "overlap" if e.offset < end else f"leave {e.offset - end} bytes between them"
            raise ValueError(f"{path} is damaged: {before} and {name} {kind}; fetch it again.")
        end, before = e.offset + e.bytes, name
    if end > size:
        raise ValueError(f"{path} is cut short: its tensors end at byte {end}, the file at {size}; fetch it again.")
    if end < size:
        raise ValueError(f"{path} is damaged: its tensors end at byte {end}, the file at {size}; fetch it again.")
    return Header({n: leaves[n] for n in ordered}, extents, {str(k): str(v) for k, v in metadata.items()}, (size, changed))


def _instead(begins: bytes, length: int) -> str:
    """What a file is that is no safetensors, and what helps."""
    if begins.startswith(POINTER):
        return "is a pointer of Git LFS and not the file itself; run git lfs pull there, or fetch it with hf download."
    if begins.lstrip()[:1] == b"<":
        return "is a web page and not a safetensors file; look at the address it came from, and fetch it again."
    return f"is not a safetensors file, or is damaged: its header would have {length} bytes; fetch it again."


def _entry(path: Place, name: str, entry: Any) -> tuple[Leaf, tuple[int, int]]:
    """One tensor's description, checked for itself."""
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if not all(isinstance(n, int) and n >= 0 for n in (*shape, start, stop)) or stop < start:
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{path} is damaged: {name} is described as {str(entry)[:200]}.") from None
    need = -(-math.prod(shape) * BITS[dtype] // 8) if dtype in BITS else None
    if dtype in DTYPES:
        leaf = Leaf(shape, DTYPES[dtype])
        need = leaf.bytes
    else:
        leaf = Leaf((stop - start,), np.dtype(np.uint8), stored=(str(dtype), shape))
    if need not in (None, stop - start):
        raise ValueError(f"{path} is damaged: {name}, {dtype} {list(shape)}, needs {need} bytes and has {stop - start}.")
    return leaf, (start, stop)


class Safetensors:
    """A model in safetensors: a `Source`."""

    format: Format = "safetensors"

    def __init__(self, path: Place, headers: Mapping[str, Header]):
        """From the headers of its files by file name, whose tensors all have different names."""
        self.path, self.name = path, path.name
        self.leaves = {n: leaf for header in headers.values() for n, leaf in header.leaves.items()}
        self.metadata = {k: v for header in headers.values() for k, v in header.metadata.items()}
        self._extents = {n: e for header in headers.values() for n, e in header.extents.items()}
        self.files = tuple(str(path if path.name == file else path / file) for file in headers)
        self._stamps = {file: header.stamp for file, header in headers.items()}

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        leaf, extent = self.leaves[name], self._extents[name]
        if leaf.dtype is None or leaf.size == 0:
            return np.zeros(leaf.shape, leaf.dtype)[index]
        bounds = [s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=False)]
        bounds += [(0, n) for n in leaf.shape[len(bounds) :]]
        axis = next((i for i, (start, stop) in enumerate(bounds) if stop - start != 1), max(len(bounds) - 1, 0))
        rest = tuple(slice(*b) for b in bounds[axis + 1 :])
        if [s.stop - s.start for s in rest] != list(leaf.shape[axis + 1 :]) and not _remote.is_remote(extent.file):
            whole = np.memmap(extent.file, leaf.dtype, "r", extent.offset, leaf.shape)  # the rows' parts, and not the rows
            return np.array(whole[index])
        strides = [math.prod(leaf.shape[i + 1 :]) * leaf.dtype.itemsize for i in range(len(leaf.shape))]  # one run of rows
        begin = sum(start * stride for (start, _), stride in zip(bounds[: axis + 1], strides, strict=False))
        rows = [stop - start for start, stop in bounds[: axis + 1]]
        size = math.prod(rows) * (strides[axis] if strides else leaf.dtype.itemsize)
        data = np.frombuffer(_remote.read(extent.file, extent.offset + begin, size), leaf.dtype)
        block = data.reshape((*rows, *leaf.shape[axis + 1 :]))
        return block[(*(slice(None),) * len(rows), *rest)] if rest else block

    def load(self, shardings: Mapping[str, Sharding]) -> dict[str, Any]:
        return place({n: self.leaves[n] for n in shardings}, shardings, self.read)

    def extent(self, name: str) -> Extent | None:
        extent = self._extents[name]
        return None if _remote.is_remote(extent.file) else extent

    def granule(self, name: str) -> int | None:
        return 1 if self.leaves[name].shape else None

    def identity(self) -> str:
        tensors = [
            (n, e.file, e.offset, str(leaf.dtype), leaf.shape, *(leaf.stored or ()))
            for n, e in self._extents.items()
            for leaf in [self.leaves[n]]
        ]
        return digest(str(self.path), self._stamps, sorted(tensors))


def open_file(path: Place) -> Safetensors:
    """One file."""
    return Safetensors(path, {path.name: read_header(path)})


def open_directory(path: Place, found: list[str]) -> Safetensors:
    """A directory as on the Hub: files and, where there are several, an index.

    Args:
      path: the directory.
      found: the names in it.
    """
    index = [n for n in found if n.endswith(".safetensors.index.json")]
    if len(index) > 1:
        raise ValueError(f"{path} has several indices, {index}; name one model's directory, or its one file.")
    if index:
        return open_indexed(path, index[0], found)
    files = [n for n in found if n.endswith(".safetensors")]
    if "model.safetensors" in files:
        files = ["model.safetensors"]
    for stem, total in {(m[1], int(m[3])) for n in files if (m := SHARD.fullmatch(n))}:
        missing = [s for i in range(1, total + 1) if (s := f"{stem}-{i:05d}-of-{total:05d}.safetensors") not in files]
        if missing:
            raise ValueError(f"{path} lacks {len(missing)} of its {total} files: {', '.join(missing[:5])}; fetch them.")
    headers = _headers(path, files)
    _no_name_twice(path, headers)
    return Safetensors(path, headers)


def open_indexed(path: Place, index: str, found: list[str], *, named: bool = False) -> Safetensors:
    """A directory's files as an index names them.

    Args:
      path: the directory.
      index: the index's name in it.
      found: the names in it.
      named: whether the index itself was asked for, so that a file of the whole model beside it is not meant.
    """
    try:
        where = json.loads((path / index).read_text())["weight_map"]
        files = sorted(set(where.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path / index} cannot be read as an index ({type(e).__name__}: {e}); fetch it again.") from e
    whole = index.removesuffix(".index.json")
    if whole in found and whole not in files and not named:
        which = f"it has {whole}, and {index} of {len(files)} other files"
        raise ValueError(f"{path} holds two models: {which}; name the one that is meant, {path / whole} or {path / index}.")
    missing = [n for n in files if n not in found and not (_remote.on_web(path) and (path / n).exists())]
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} of the {len(files)} files that its index names: {', '.join(missing[:5])}; fetch them."
        )
    headers = _headers(path, files)
    _no_name_twice(path, headers)
    held = {name: file for file, header in headers.items() for name in header.leaves}
    wrong = [f"{n} is not in {where[n]}" for n in sorted(where) if held.get(n) != where[n]]
    wrong += [f"{n}, in {held[n]}, is not in the index" for n in sorted(held.keys() - where.keys())]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{path / index} and the files disagree: {'; '.join(wrong[:5])}{more}; fetch both again.")
    return Safetensors(path, headers)


def _headers(path: Place, files: list[str]) -> dict[str, Header]:
    """Of all files; those that are far away at the same time."""
    with concurrent.futures.ThreadPoolExecutor(8 if _remote.is_remote(path) else 1) as threads:
        return dict(zip(files, threads.map(lambda n: read_header(path / n), files), strict=True))


def _no_name_twice(path: Place, headers: Mapping[str, Header]) -> None:
    held: dict[str, str] = {}
    for file, header in headers.items():
        for name in header.leaves:
            if name in held:
                raise ValueError(f"{path}: {name} is in two files, {held[name]} and {file}; remove one, or name a file.")
            held[name] = file


def header_bytes(tensors: Mapping[str, Leaf], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The head of a file that holds these tensors in this order, and where in the file each begins.

    The head is padded so that the tensors begin at a multiple of 4096: ranges are then written to the disk as they are.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset, begins = 0, {}
    for name, leaf in tensors.items():
        dtype, shape = leaf.stored or (NAMES[np.dtype(leaf.dtype)], leaf.shape)
        entries[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + leaf.bytes],
        }
        begins[name] = offset
        offset += leaf.bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % os.sysconf("SC_PAGESIZE"))
    return len(text).to_bytes(8, "little") + text, {n: 8 + len(text) + b for n, b in begins.items()}
