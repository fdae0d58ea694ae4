"""The only file that knows Orbax: headers, some leaves in, some leaves out, an output that appears whole."""

import contextlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Sharding
from orbax.checkpoint import v1 as ocp

from jaxmerge.params._transform import leaf_name

PathLike = Any


class Header(NamedTuple):
    """What a checkpoint says of one leaf.

    Attributes:
      path: its key path.
      shape, dtype: of an array; (), None for anything else.
      sharding: as saved, if those devices exist here; else None.
      meta: Orbax's own description.
    """

    path: tuple
    shape: tuple[int, ...]
    dtype: np.dtype | None
    sharding: Sharding | None
    meta: Any

    @property
    def bytes(self) -> int:
        return 0 if self.dtype is None else int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize


class Checkpoint(NamedTuple):
    """A checkpoint that has been looked at, not read: its tree of descriptions, and a header per leaf name."""

    path: epath.Path
    tree: Any
    leaves: dict[str, Header]


def open_checkpoint(path: PathLike) -> Checkpoint:
    """Read a checkpoint's headers.

    Raises:
      FileNotFoundError: nothing is there. ValueError: what is there is not an Orbax checkpoint.
    """
    path = epath.Path(path).absolute()
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}.")
    try:
        tree = ocp.metadata(path).metadata
    except Exception as e:  # Orbax raises many kinds
        reason = (str(e).splitlines() or [type(e).__name__])[0][:200]
        raise ValueError(f"{path} is not an Orbax checkpoint that can be read: {reason}") from e
    leaves = {}
    for key_path, meta in jax.tree_util.tree_flatten_with_path(tree)[0]:
        is_array = hasattr(meta, "shape") and hasattr(meta, "dtype")
        sharding = None
        if is_array:
            with contextlib.suppress(Exception):  # saved on devices that are not here
                sharding = getattr(meta, "sharding", None)
        header = Header(
            key_path,
            tuple(meta.shape) if is_array else (),
            np.dtype(meta.dtype) if is_array else None,
            sharding if isinstance(sharding, Sharding) else None,
            meta,
        )
        leaves[leaf_name(key_path)] = header
    return Checkpoint(path, tree, leaves)


def read(checkpoint: Checkpoint, shardings: dict[str, Sharding]) -> dict[str, Any]:
    """Read some leaves, arrays straight onto their shardings: each process reads what its devices hold."""

    def target(key_path, meta):
        name = leaf_name(key_path)
        if name not in shardings:
            return ocp.PLACEHOLDER
        header = checkpoint.leaves[name]
        if header.dtype is None:
            return meta
        return jax.ShapeDtypeStruct(header.shape, header.dtype, sharding=shardings[name])

    loaded = ocp.load(checkpoint.path, jax.tree_util.tree_map_with_path(target, checkpoint.tree))
    flat, _ = jax.tree_util.tree_flatten_with_path(loaded)
    return {name: leaf for path, leaf in flat if (name := leaf_name(path)) in shardings}


def groups(checkpoint: Checkpoint) -> list[list[str]]:
    """Leaf names in sorted order, those of one list or tuple together: Orbax writes a sequence in one call."""
    found: dict[str, list[str]] = {}
    for name in sorted(checkpoint.leaves):
        path = checkpoint.leaves[name].path
        cut = next((i for i, key in enumerate(path) if isinstance(key, jax.tree_util.SequenceKey)), None)
        found.setdefault(name if cut is None else f"sequence {leaf_name(path[:cut])}", []).append(name)
    return list(found.values())


class Writer:
    """An output that appears whole or not at all: written aside, renamed at the end."""

    def __init__(self, out: PathLike, like: Checkpoint, *, overwrite: bool):
        self.out, self.like = epath.Path(out).absolute(), like
        self.aside = self.out.parent / f"{self.out.name}.merging"
        if self.out.exists() and not overwrite:
            raise FileExistsError(f"{self.out} exists; choose another place, or pass overwrite (--overwrite).")
        self.discard()
        self._once(lambda: self.out.parent.mkdir(parents=True, exist_ok=True))

    def write(self, leaves: dict[str, Any]) -> None:
        """Add some leaves, whole groups."""
        ocp.partial.save(self.aside, _prune(self.like.tree, leaves))

    def finish(self) -> None:
        """Make the output appear."""
        ocp.partial.finalize(self.aside)

        def swap():
            old = self.out.parent / f"{self.out.name}.replaced"
            if self.out.exists():
                if old.exists():  # killed between two renames, some other time
                    old.rmtree()
                self.out.rename(old)
            self.aside.rename(self.out)
            if old.exists():
                old.rmtree()

        self._once(swap)

    def discard(self, *, wait: bool = True) -> None:
        """Remove what a merge that failed, or was killed, left aside."""

        def remove():
            if self.out.parent.exists():
                for path in (self.aside, *self.out.parent.glob(f"{self.aside.name}.*")):
                    if path.exists():
                        path.rmtree()

        self._once(remove, wait)

    def _once(self, action, wait: bool = True) -> None:
        """Do something on one process while the others wait."""
        if jax.process_index() == 0:
            action()
        if wait and jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(f"jaxmerge: {self.out.name}")


def _prune(tree: Any, leaves: dict[str, Any]) -> Any:
    """The part of a tree that holds these leaves."""
    nothing = object()

    def walk(node, path):
        if isinstance(node, dict):
            kept = {k: walk(v, (*path, jax.tree_util.DictKey(k))) for k, v in node.items()}
            kept = {k: v for k, v in kept.items() if v is not nothing}
            return kept if kept else nothing
        if isinstance(node, (list, tuple)):
            kept = [walk(v, (*path, jax.tree_util.SequenceKey(i))) for i, v in enumerate(node)]
            return nothing if all(v is nothing for v in kept) else kept
        return leaves.get(leaf_name(path), nothing)

    return walk(tree, ())


def same(values: Iterable[Any]) -> bool:
    """Whether leaves that are not floating point are equal, without gathering them."""
    first, *rest = values
    if isinstance(first, jax.Array):
        return all(bool((first == other).all()) for other in rest)
    return all(np.array_equal(first, other) for other in rest)
