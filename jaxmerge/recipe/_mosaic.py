"""A source put together from leaves of several."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import Sharding

from jaxmerge.checkpoint import Leaf, Source
from jaxmerge.checkpoint._source import Extent, Format, Index


class Mosaic:
    """A source whose leaves come from several, each under a name of its own.

    Args:
      name: what messages call it.
      like: whose path, format and metadata it has.
      parts: {name here: (source, name there)}.
    """

    def __init__(self, name: str, like: Source, parts: Mapping[str, tuple[Source, str]]):
        self.name, self.path, self.metadata = name, like.path, like.metadata
        self.format: Format = like.format
        self.parts = dict(parts)
        self.files: tuple[str, ...] = tuple(dict.fromkeys(f for source, _ in self.parts.values() for f in source.files))
        self.leaves: dict[str, Leaf] = {}
        for here, (source, there) in self.parts.items():
            leaf = source.leaves[there]
            self.leaves[here] = leaf if here == there else leaf._replace(path=None)

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        source, there = self.parts[name]
        return source.read(there, index)

    def load(self, shardings: Mapping[str, Sharding]) -> dict[str, Any]:
        found, wanted = {}, dict(shardings)
        while wanted:  # in each round one source, and each of its leaves once
            source = self.parts[next(iter(wanted))][0]
            names: dict[str, str] = {}
            for here in wanted:
                if self.parts[here][0] is source:
                    names.setdefault(self.parts[here][1], here)
            loaded = source.load({there: wanted[here] for there, here in names.items()})
            found |= {here: loaded[there] for there, here in names.items()}
            wanted = {here: s for here, s in wanted.items() if here not in found}
        return found

    def extent(self, name: str) -> Extent | None:
        source, there = self.parts[name]
        return source.extent(there)

    def granule(self, name: str) -> int | None:
        source, there = self.parts[name]
        return source.granule(there)

    def identity(self) -> str:
        known: dict[int, str] = {}
        for source, _ in self.parts.values():
            if id(source) not in known:
                known[id(source)] = source.identity()
        named = [(here, known[id(source)], there) for here, (source, there) in sorted(self.parts.items())]
        return hashlib.sha256(json.dumps(named).encode()).hexdigest()
