"""Orbax: headers, some leaves in, some leaves out from the devices that hold them, an output that appears whole."""

import contextlib
import functools
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Sharding
from orbax.checkpoint import v1 as ocp

from jaxmerge.checkpoint._journal import check_free
from jaxmerge.checkpoint._remote import Place, is_remote
from jaxmerge.checkpoint._source import Extent, Format, Index, Leaf, digest
from jaxmerge.params._transform import leaf_name

PathLike = Any
KEYS = (jax.tree_util.DictKey, jax.tree_util.SequenceKey)


class Orbax:
    """An Orbax checkpoint: a `Source`."""

    format: Format = "orbax"

    def __init__(self, path: epath.Path, tree: Any):
        """From the tree of Orbax's descriptions."""
        self.path: Place = path
        self._path = path
        self.name, self._tree = path.name, tree
        self.metadata: dict[str, str] = {}
        self.files = _files(path)
        self.leaves = {leaf_name(p): _leaf(p, meta) for p, meta in jax.tree_util.tree_flatten_with_path(tree)[0]}

    def read(self, name: str, index: Index = ()) -> Any:
        leaf = self.leaves[name]
        if leaf.dtype is None:
            return self.load({name: _here()})[name]
        return np.asarray(self._arrays[name][index].read().result())

    def load(self, shardings: Mapping[str, Sharding]) -> dict[str, Any]:
        def target(key_path, meta):
            name = leaf_name(key_path)
            if name not in shardings:
                return ocp.PLACEHOLDER
            leaf = self.leaves[name]
            if leaf.dtype is None:
                return meta
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[name])

        loaded = ocp.load(self._path, jax.tree_util.tree_map_with_path(target, self._tree))
        flat, _ = jax.tree_util.tree_flatten_with_path(loaded)
        return {name: leaf for path, leaf in flat if (name := leaf_name(path)) in shardings}

    def extent(self, name: str) -> Extent | None:
        return None

    def granule(self, name: str) -> int | None:
        if not self.leaves[name].shape:
            return None
        return int(self._arrays[name].chunk_layout.read_chunk.shape[0])

    @functools.cached_property
    def _arrays(self) -> dict[str, Any]:
        """Every array as tensorstore sees it: slices of it can be read."""
        import tensorstore as ts

        base = base_of(self.path)
        described = json.loads((base / "_METADATA").read_text())
        context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        opened = {}
        for entry in described["tree_metadata"].values():
            if entry["value_metadata"].get("value_type") not in ("string", "None"):
                keys = array_keys(entry)
                opened["/".join(keys)] = ts.open(spec_of(base, described, keys), open=True, read=True, context=context)
        return {name: future.result() for name, future in opened.items()}

    def identity(self) -> str:
        where = base_of(self.path) / "_METADATA"
        return digest(str(self.path), where.read_text(), int(where.stat().mtime))


def open_checkpoint(path: PathLike) -> Orbax:
    """Read a checkpoint's headers.

    Raises:
      FileNotFoundError: nothing is there. ValueError: what is there is not an Orbax checkpoint.
    """
    path = epath.Path(path)
    path = path if is_remote(path) else path.absolute()
    try:
        if not path.exists():
            raise FileNotFoundError(f"no checkpoint at {path}.")
    except ImportError as e:  # of what Orbax reads buckets with
        raise ValueError(f"{path}: Orbax reads it with a package that is not here: {e} (pip).") from e
    try:
        return Orbax(path, ocp.metadata(path).metadata)
    except Exception as e:  # Orbax raises many kinds
        reason = (str(e).splitlines() or [type(e).__name__])[0][:200]
        raise ValueError(f"{path} is not an Orbax checkpoint that can be read: {reason}") from e


def _leaf(path: tuple, meta: Any) -> Leaf:
    if not (hasattr(meta, "shape") and hasattr(meta, "dtype")):
        return Leaf((), None, path=path)
    sharding = None
    with contextlib.suppress(Exception):  # saved on devices that are not here
        sharding = getattr(meta, "sharding", None)
    return Leaf(tuple(meta.shape), np.dtype(meta.dtype), sharding if isinstance(sharding, Sharding) else None, path)


def _files(path: epath.Path) -> tuple[str, ...]:
    """All files of a local checkpoint; of a remote one those that name the others."""
    if is_remote(path):
        names = ("_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt")
        return tuple(str(p) for d in dict.fromkeys((path, base_of(path))) for n in names if (p := d / n).exists())
    return tuple(sorted(str(p) for p in pathlib.Path(path).rglob("*") if p.is_file()))


def _here() -> Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def base_of(path: PathLike) -> PathLike:
    """The directory of the arrays: that of the tree's description, at the top (older layouts) or one below."""
    if (path / "_METADATA").exists():
        return path
    inner = [p.parent for p in path.glob("*/_METADATA")]
    if len(inner) != 1:
        raise ValueError(f"{path} holds {len(inner)} trees of arrays; name the directory of one.")
    return inner[0]


def array_keys(entry: dict[str, Any]) -> list[str]:
    return [str(k["key"]) for k in entry["key_metadata"]]


def spec_of(base: PathLike, described: dict[str, Any], keys: list[str]) -> dict[str, Any]:
    """Where tensorstore finds an array."""
    root = str(base) if is_remote(base) else f"file://{base}"
    at = ".".join(keys)
    ocdbt = described.get("use_ocdbt", True)
    store = {"driver": "ocdbt", "base": f"{root}/", "path": f"{at}/"} if ocdbt else f"{root}/{at}/"
    driver = "zarr3" if described.get("use_zarr3", False) else "zarr"
    return {"driver": driver, "kvstore": store, "recheck_cached_data": False}


def groups(leaves: Mapping[str, Leaf]) -> list[list[str]]:
    """Leaf names in sorted order, those of one list or tuple together: Orbax writes a sequence in one call."""
    found: dict[str, list[str]] = {}
    for name in sorted(leaves):
        path = leaves[name].path or ()
        cut = next((i for i, key in enumerate(path) if isinstance(key, jax.tree_util.SequenceKey)), None)
        found.setdefault(name if cut is None else f"sequence {leaf_name(path[:cut])}", []).append(name)
    return list(found.values())


class Writer:
    """An output of whole leaves from devices, into a bucket: written aside by Orbax, renamed at the end. It begins anew."""

    lines: tuple[dict[str, Any], ...] = ()

    def __init__(self, out: PathLike, leaves: Mapping[str, Leaf], *, overwrite: bool):
        self.out, self.leaves = epath.Path(out).absolute(), leaves
        self.aside = self.out.parent / f"{self.out.name}.merging"
        check_free(self.out, overwrite=overwrite)
        self.discard()
        self._once(lambda: self.out.parent.mkdir(parents=True, exist_ok=True))

    def write(self, leaves: dict[str, Any]) -> None:
        """Add some leaves, whole groups."""
        ocp.partial.save(self.aside, tree_of(leaves, self.leaves))

    def note(self, line: Mapping[str, Any]) -> None:
        """Nothing is remembered."""

    def finalize(self) -> dict[str, str]:
        """Everything is there: {name in the output: where it lies now}, of the files that name the others."""
        ocp.partial.finalize(self.aside)
        return {f.removeprefix(f"{self.aside}/"): f for f in _files(self.aside)}

    def finish(self, beside: Mapping[str, str | bytes]) -> None:
        """Write what goes beside the arrays, and make the output appear."""

        def swap():
            for name, content in beside.items():
                (self.aside / name).write_bytes(content.encode() if isinstance(content, str) else content)
            old = self.out.parent / f"{self.out.name}.replaced"
            if self.out.exists():
                if old.exists():  # killed between two renames, some other time
                    old.rmtree()
                self.out.rename(old)
            self.aside.rename(self.out)
            if old.exists():
                old.rmtree()

        self._once(swap)

    def discard(self, error: BaseException | None = None) -> None:
        """Remove what a merge that failed, or was killed, left aside; after an error without waiting for the others."""

        def remove():
            if self.out.parent.exists():
                for path in (self.aside, *self.out.parent.glob(f"{self.aside.name}.*")):
                    if path.exists():
                        path.rmtree()

        self._once(remove, wait=error is None)

    def _once(self, action, wait: bool = True) -> None:
        """Do something on one process while the others wait."""
        if jax.process_index() == 0:
            action()
        if wait and jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(f"jaxmerge: {self.out.name}")


def tree_of(values: Mapping[str, Any], leaves: Mapping[str, Leaf]) -> Any:
    """The tree that holds these values: along the leaves' key paths, or along the "/" in their names."""
    root: dict = {}
    for name in sorted(values):
        path = leaves[name].path or tuple(jax.tree_util.DictKey(part) for part in name.split("/"))
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = values[name]

    def built(node):
        if not isinstance(node, dict) or not all(isinstance(k, KEYS) for k in node):
            return node
        if node and all(isinstance(k, jax.tree_util.SequenceKey) for k in node):
            return [built(node[k]) for k in sorted(node, key=lambda k: k.idx)]
        return {k.key: built(v) for k, v in node.items()}

    return built(root)


def same(values: Iterable[Any]) -> bool:
    """Whether leaves that are not floating point are equal, without gathering them."""
    first, *rest = values
    if isinstance(first, jax.Array):
        return all(bool((first == other).all()) for other in rest)
    return all(np.array_equal(first, other) for other in rest)
