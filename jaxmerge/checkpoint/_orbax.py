"""Orbax: headers, and leaves of which only the blocks are read that are asked for."""

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding
from jax.tree_util import DictKey, SequenceKey

from jaxmerge.checkpoint import _hub, _remote
from jaxmerge.checkpoint._remote import Place, Url, is_remote, on_web
from jaxmerge.checkpoint._sharding import from_json
from jaxmerge.checkpoint._source import Extent, Format, Index, Leaf, digest, place
from jaxmerge.params._transform import leaf_name

KEYS = (DictKey, SequenceKey)
EMPTY = ("None", "Dict", "List", "Tuple", "NamedTuple", "Unknown")
"""What a tree holds that is no leaf: nothing, or a container of nothing, such as optax's empty states."""
KEPT = 1 << 26
"""Bytes of what was read over the network that are kept: OCDBT's tree, which is asked for with every block."""
PLAIN = ("scalar", "string")
"""Leaves that are Python's: numbers, written as arrays, and words."""


class Orbax:
    """An Orbax checkpoint: a `Source`. Its own files say what it holds, tensorstore reads its arrays, wherever they lie."""

    format: Format = "orbax"

    def __init__(self, path: Place):
        """Read the headers."""
        import tensorstore as ts

        self.path, self._base = path, base_of(path)
        commit = _hub.at(path)
        at_top = commit is not None and not commit.inside
        item = path == self._base and not at_top and (path.parent / "_CHECKPOINT_METADATA").exists()
        self.name = f"{path.parent.name}/{path.name}" if item else path.name
        self.metadata: dict[str, str] = {}
        self.files = _files(path, self._base)
        described = json.loads((self._base / "_METADATA").read_text())
        context = ts.Context({"cache_pool": {"total_bytes_limit": KEPT if on_web(path) else 0}})
        entries = [e for e in described["tree_metadata"].values() if kind_of(e) not in EMPTY]
        self._entries = {leaf_name(key_path(e)): e for e in sorted(entries, key=array_keys)}
        opened = {
            name: ts.open(spec_of(self._base, described, array_keys(e)), open=True, read=True, context=context)
            for name, e in self._entries.items()
            if kind_of(e) != "string"
        }
        self._arrays = {name: self._came(future) for name, future in opened.items()}
        saved = from_json((self._base / "_sharding").read_text()) if (self._base / "_sharding").exists() else {}
        self.leaves = {}
        for name, e in self._entries.items():
            if kind_of(e) in PLAIN:
                self.leaves[name] = Leaf((), None, path=key_path(e))
            else:
                a = self._arrays[name]
                sharding = saved.get(".".join(array_keys(e)))
                self.leaves[name] = Leaf(tuple(a.shape), np.dtype(a.dtype.numpy_dtype), sharding, key_path(e))

    def read(self, name: str, index: Index = ()) -> Any:
        if self.leaves[name].dtype is not None:
            return np.asarray(self._came(self._arrays[name][index].read()))
        if name in self._arrays:
            return self._came(self._arrays[name].read()).item()
        return json.loads((self._base / "_strings.json").read_text())[".".join(array_keys(self._entries[name]))]

    def load(self, shardings: Mapping[str, Sharding]) -> dict[str, Any]:
        arrays = {n: s for n, s in shardings.items() if self.leaves[n].dtype is not None}
        blocks: dict[tuple[str, str], Any] = {}  # all of them are under way before the first is waited for
        for n, sharding in arrays.items():
            for index in sharding.addressable_devices_indices_map(self.leaves[n].shape).values():
                if (n, str(index)) not in blocks:
                    blocks[n, str(index)] = self._arrays[n][index or ()].read()
        read = lambda n, index: np.asarray(self._came(blocks[n, str(index)]))
        others = {n: self.read(n) for n in shardings if n not in arrays}
        return place({n: self.leaves[n] for n in arrays}, arrays, read) | others

    def _came(self, future: Any) -> Any:
        """What came of it.

        Raises:
          OSError: a file on the Hub cannot be read.
        """
        error = future.exception()
        if error is None:
            return future.result()
        if on_web(self._base):
            from jaxmerge.checkpoint import _relay

            if why := _relay.failure(f"{self._base}/"):
                raise OSError(why) from error
        raise error

    def extent(self, name: str) -> Extent | None:
        return None

    def granule(self, name: str) -> int | None:
        if not self.leaves[name].shape:
            return None
        rows: Any = self._arrays[name].chunk_layout.read_chunk.shape
        return int(rows[0])

    def identity(self) -> str:
        where, manifest = self._base / "_METADATA", self._base / "manifest.ocdbt"
        stamp = manifest.read_bytes().hex() if manifest.exists() else _remote.stat(where)[1]
        return digest(str(self.path), where.read_text(), stamp)


def open_checkpoint(path: Place) -> Orbax:
    """Read a checkpoint's headers.

    Raises:
      ValueError: what is there is not an Orbax checkpoint.
    """
    try:
        return Orbax(path)
    except (OSError, ValueError, KeyError, TypeError) as e:
        if on_web(path) and isinstance(e, OSError) and not isinstance(e, FileNotFoundError):
            raise  # it was not read
        reason = (str(e).splitlines() or [type(e).__name__])[0][:200]
        raise ValueError(f"{path} is not an Orbax checkpoint that can be read: {reason}") from e


def _files(path: Place, base: Place) -> tuple[str, ...]:
    """All files of a local checkpoint; of a remote one those that name the others."""
    if is_remote(path):
        names = ("_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt")
        return tuple(str(p) for d in dict.fromkeys((path, base)) for n in names if (p := d / n).exists())
    return tuple(sorted(str(p) for p in pathlib.Path(path).rglob("*") if p.is_file()))


def base_of(path: Any) -> Any:
    """The directory of the arrays: that of the tree's description, at the top (older layouts) or one below.

    Raises:
      ValueError: there is none, or there are several.
    """
    if (path / "_METADATA").exists():
        return path
    names = path.names() if isinstance(path, Url) else sorted(p.name for p in path.iterdir())
    inner = [path / name for name in names if (path / name / "_METADATA").exists()]
    if len(inner) == 1:
        return inner[0]
    if inner:
        raise ValueError(f"it holds {len(inner)} trees of arrays; name one of {', '.join(p.name for p in inner)} in it.")
    steps = sorted((n for n in names if (path / n / "_CHECKPOINT_METADATA").exists()), key=lambda n: (len(n), n))
    shown = ", ".join(steps if len(steps) < 8 else [*steps[:3], "...", *steps[-3:]])
    raise ValueError(f"it holds those of several steps; name one of them: {shown}." if steps else "it has no _METADATA.")


def array_keys(entry: dict[str, Any]) -> list[str]:
    return [str(k["key"]) for k in entry["key_metadata"]]


def key_path(entry: dict[str, Any]) -> tuple:
    """The keys of a leaf in its tree."""
    key = lambda k: SequenceKey(int(k["key"])) if k["key_type"] == 1 else DictKey(k["key"])
    return tuple(map(key, entry["key_metadata"]))


def kind_of(entry: dict[str, Any]) -> str:
    return entry["value_metadata"].get("value_type", "")


def spec_of(base: Any, described: dict[str, Any], keys: list[str]) -> dict[str, Any]:
    """Where tensorstore finds an array."""
    at, driver = ".".join(keys), "zarr3" if described.get("use_zarr3", False) else "zarr"
    if described.get("use_ocdbt", True):
        store = {"driver": "ocdbt", "base": _remote.folder(f"{base}/"), "path": f"{at}/"}
    else:
        store = _remote.folder(f"{base}/{at}/")
    return {"driver": driver, "kvstore": store, "recheck_cached_data": False}


def groups(leaves: Mapping[str, Leaf]) -> list[list[str]]:
    """Leaf names in sorted order, those of one list or tuple together: Orbax writes a sequence in one call."""
    found: dict[str, list[str]] = {}
    for name in sorted(leaves):
        path = leaves[name].path or ()
        cut = next((i for i, key in enumerate(path) if isinstance(key, SequenceKey)), None)
        found.setdefault(name if cut is None else f"sequence {leaf_name(path[:cut])}", []).append(name)
    return list(found.values())


def key_path_of(name: str, leaf: Leaf) -> tuple:
    """A leaf's keys in its tree; those that the "/" in its name part where there is none."""
    return leaf.path or tuple(DictKey(part) for part in name.split("/"))


def tree_of(values: Mapping[str, Any], leaves: Mapping[str, Leaf]) -> Any:
    """The tree that holds these values: along the leaves' key paths, or along the "/" in their names."""
    root: dict = {}
    for name in sorted(values):
        path = key_path_of(name, leaves[name])
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = values[name]

    def built(node):
        if not isinstance(node, dict) or not all(isinstance(k, KEYS) for k in node):
            return node
        if node and all(isinstance(k, SequenceKey) for k in node):
            return [built(node[k]) for k in sorted(node, key=lambda k: k.idx)]
        return {k.key: built(v) for k, v in node.items()}

    return built(root)


def same(values: Iterable[Any]) -> bool:
    """Whether leaves that are not floating point are equal, without gathering them."""
    first, *rest = values
    if isinstance(first, jax.Array):
        return all(bool((first == other).all()) for other in rest)
    return all(np.array_equal(first, other) for other in rest)
