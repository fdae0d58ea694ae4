"""A source: one checkpoint, lazily (`open`). Views of sources are sources again.

renamed(source, names)         {name here: name there}
subset(source, names)          some of the leaves
derived(source, leaves)        leaves computed from others: vocabularies aligned, adapters added, layers stacked
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Sharding

from jaxmerge.checkpoint._remote import Place

Format = Literal["orbax", "safetensors"]
Index = tuple[slice, ...]
"""A block of a leaf: one slice per dimension, without steps; () is the whole leaf."""


class Leaf(NamedTuple):
    """What a checkpoint's headers say of one leaf.

    Attributes:
      shape, dtype: of an array; (), None for anything else.
      sharding: as saved, if those devices exist here; else None.
      path: its key path in a tree; None where names are flat.
      stored: of an array whose dtype numpy has not: what the file calls it, and its shape; the leaf is its bytes, as uint8.
    """

    shape: tuple[int, ...]
    dtype: np.dtype | None
    sharding: Sharding | None = None
    path: tuple | None = None
    stored: tuple[str, tuple[int, ...]] | None = None

    @property
    def size(self) -> int:
        """How many entries."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return 0 if self.dtype is None else self.size * self.dtype.itemsize


class Extent(NamedTuple):
    """Where a leaf's bytes lie, row-major and little-endian: so many from `offset` on in a local file."""

    file: str
    offset: int
    bytes: int


@runtime_checkable
class Source(Protocol):
    """One checkpoint, lazily: headers at hand, values on demand.

    Attributes:
      name: what messages call it.
      path: where it lies; of a view, where what it looks at lies.
      format: how it is stored.
      leaves: {name: Leaf}.
      metadata: what the checkpoint says of itself.
      files: whose contents the leaves are.
    """

    name: str
    path: Place
    format: Format
    leaves: dict[str, Leaf]
    metadata: dict[str, str]
    files: tuple[str, ...]

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """A block of a leaf, on the host; only its bytes are read where the format allows."""
        ...

    def load(self, shardings: Mapping[str, Sharding]) -> dict[str, Any]:
        """Some leaves on their shardings; every process reads what its devices hold."""
        ...

    def extent(self, name: str) -> Extent | None:
        """Where the leaf lies in a local file, if it is one run of bytes there."""
        ...

    def granule(self, name: str) -> int | None:
        """How many rows (of the first axis) are read together at least; None: only the whole leaf."""
        ...

    def identity(self) -> str:
        """A digest of where each leaf comes from and of what the headers say; of files also size and time of change."""
        ...


def renamed(source: Source, names: Mapping[str, str]) -> Source:
    """A source under other names; leaves that are not named are left out.

    Args:
      source: a checkpoint.
      names: {name here: name there}; several names here may mean one leaf there.

    Raises:
      KeyError: a name that is not there.
    """
    missing = sorted({there for there in names.values() if there not in source.leaves})
    if missing:
        raise KeyError(f"{source.name} has no leaf {missing[:5]}{' and more' if len(missing) > 5 else ''}.")
    same = {here for here, there in names.items() if here == there}
    leaves = {h: source.leaves[t] if h in same else source.leaves[t]._replace(path=None) for h, t in names.items()}
    return _View(source, leaves, {here: (source, there) for here, there in names.items()}, {})


def subset(source: Source, names: Iterable[str] | Callable[[str], bool]) -> Source:
    """Some leaves of a source: those named, or those of which the function is true."""
    chosen = [n for n in source.leaves if names(n)] if callable(names) else list(names)
    return renamed(source, {n: n for n in chosen})


class Derived(NamedTuple):
    """A leaf that is computed from others.

    Attributes:
      leaf: its shape and dtype.
      inputs: (source, name) of each leaf it is computed from.
      function: their arrays -> its array, on the host; pure.
      note: what the function does, for receipts and to know a merge again; must differ where the function does.
    """

    leaf: Leaf
    inputs: tuple[tuple[Source, str], ...]
    function: Callable[..., np.ndarray]
    note: str


def derived(source: Source, leaves: Mapping[str, Derived]) -> Source:
    """A source with leaves added or replaced by computed ones. Such a leaf is computed whole: it counts against memory.

    Args:
      source: a checkpoint.
      leaves: {name: Derived}.
    """
    all_leaves = source.leaves | {n: d.leaf for n, d in leaves.items()}
    return _View(source, all_leaves, {n: (source, n) for n in source.leaves if n not in leaves}, dict(leaves))


class _View:
    """Leaves of one source under names of their own, and computed ones."""

    def __init__(self, source: Source, leaves: dict, where: dict[str, tuple[Source, str]], computed: dict[str, Derived]):
        self.name, self.path, self.metadata = source.name, source.path, source.metadata
        self.format: Format = source.format
        self.leaves, self._source, self._where, self._computed = leaves, source, where, computed
        others = (f for d in computed.values() for s, _ in d.inputs for f in s.files)
        self.files = tuple(dict.fromkeys((*source.files, *others)))

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        if name not in self._computed:
            source, there = self._where[name]
            return source.read(there, index)
        d = self._computed[name]
        value = np.asarray(d.function(*(source.read(there) for source, there in d.inputs)))
        if value.shape != d.leaf.shape or value.dtype != d.leaf.dtype:
            raise ValueError(
                f"{self.name}: {name} ({d.note}) came out as {value.dtype} {value.shape}, declared as "
                f"{d.leaf.dtype} {d.leaf.shape}."
            )
        return value[index]

    def load(self, shardings: Mapping[str, Sharding]) -> dict[str, Any]:
        there: dict[str, Sharding] = {}
        names = [n for n in shardings if n not in self._computed]
        for n in names:
            there.setdefault(self._where[n][1], shardings[n])
        found = self._source.load(there) if there else {}
        out = {}
        for n in names:
            value = found[self._where[n][1]]
            out[n] = jax.device_put(value, shardings[n]) if shardings[n] != there[self._where[n][1]] else value
        computed = [n for n in shardings if n in self._computed]
        return out | place({n: self.leaves[n] for n in computed}, {n: shardings[n] for n in computed}, self.read)

    def extent(self, name: str) -> Extent | None:
        if name in self._computed:
            return None
        source, there = self._where[name]
        return source.extent(there)

    def granule(self, name: str) -> int | None:
        if name in self._computed:
            return None
        source, there = self._where[name]
        return source.granule(there)

    def identity(self) -> str:
        names = sorted((here, there) for here, (_, there) in self._where.items())
        notes = [
            (n, d.note, list(d.leaf.shape), str(d.leaf.dtype), [(s.identity(), there) for s, there in d.inputs])
            for n, d in sorted(self._computed.items())
        ]
        return hashlib.sha256(json.dumps([self._source.identity(), names, notes]).encode()).hexdigest()


def place(leaves: Mapping[str, Leaf], shardings: Mapping[str, Sharding], read: Callable[[str, Index], np.ndarray]) -> dict:
    """Leaves on their shardings, block by block of what this process holds."""
    return {
        n: jax.make_array_from_callback(leaf.shape, shardings[n], lambda index, n=n: read(n, index or ()))
        for n, leaf in leaves.items()
    }


def digest(*parts: Any) -> str:
    """A digest of what can be written as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
