"""An Orbax output in a bucket, by tensorstore alone: leaves go where they stay, what makes a checkpoint of them comes last.

out.merging/0/000001            what the first process has noted: one object for each line
out/state/ocdbt.process_<id>_0/ the arrays of the first process, under the time when the merge began
out/state/manifest.ocdbt, d/    the whole, which refers to them
out/state/_METADATA, ...        and last out/_CHECKPOINT_METADATA: without these nobody takes it for a checkpoint
"""

import contextlib
import json
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jaxmerge.checkpoint import _processes, _sharding
from jaxmerge.checkpoint._journal import check_free
from jaxmerge.checkpoint._orbax import key_path_of
from jaxmerge.checkpoint._remote import Url, folder
from jaxmerge.checkpoint._source import Leaf
from jaxmerge.checkpoint._tree import Tree

ITEM = "state"
HANDLER = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"
LOOKED_FOR = ("_CHECKPOINT_METADATA", f"{ITEM}/_METADATA", f"{ITEM}/manifest.ocdbt")


class Bucket:
    """Where leaves go that come whole, from devices: what `_tree.Leafwise` is in a local directory. It goes on, too.

    Attributes:
      lines: what an earlier run of the same merge has noted.
    """

    def __init__(self, out: Any, tree: Tree, identity: str, *, overwrite: bool, resume: bool, about: Mapping[str, Any]):
        import tensorstore as ts

        self._out, self._tree, self._rank = Url(out), tree, jax.process_index()
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        self._files = ts.KvStore.open(folder(f"{self._out}/"), context=self._context).result()
        self._journal = ts.KvStore.open(folder(f"{self._out}.merging/"), context=self._context).result()
        lines = self._lines() if resume else []
        known = all(_processes.everyone(bool(lines) and lines[0].get("merge") == identity))
        if not (known and any(_processes.everyone(any("replaces" in line for line in lines)))):
            check_free(self._out, overwrite=overwrite)
        if not known:
            if self._rank == 0:
                left = [n for n in self._out.all_names() if "/ocdbt.process_" in n]
                self._remove(self._journal, _done(self._journal.list()))
                self._remove(self._files, left if len(left) == len(self._out.all_names()) else ())
            [own, *_] = _processes.everyone(f"{time.time_ns():x}")
            lines = [{"merge": identity, "own": own, **about}]
            self._noted = 0
            self.note(lines[0])
        self._mine = f"{ITEM}/ocdbt.process_{lines[0]['own']}_"
        self._noted, self.lines = len(lines), lines[1:]

    def write(self, leaves: Mapping[str, Any]) -> None:
        """Add some leaves, and wait until they are there."""
        import tensorstore as ts

        now = ts.Transaction(atomic=True)  # else every block may become an object
        for name, array in leaves.items():
            parts = [((), array)] if self._rank == 0 and not isinstance(array, str) else []
            if isinstance(array, jax.Array):
                parts = [(shard.index, shard.data) for shard in array.addressable_shards if shard.replica_id == 0]
            for index, values in parts:
                values = np.asarray(values)
                _done(self._open(name, values.dtype, now)[index].write(values).copy)
        _done(now.commit_async())

    def note(self, line: Mapping[str, Any]) -> None:
        """Remember what is done."""
        _done(self._journal.write(f"{self._rank}/{self._noted:06d}", json.dumps(line)))
        self._noted += 1

    def finalize(self) -> dict[str, str]:
        """Everything is there: {name in the output: where it lies now}, of the files that name the others."""
        _processes.wait("leaves written")
        if self._rank == 0:
            if not any("replaces" in line for line in self.lines):
                self.lines = [*self.lines, {"replaces": [n for n in self._out.all_names() if not n.startswith(self._mine)]}]
                self.note(self.lines[-1])
            self._remove(self._files, (*LOOKED_FOR, *(n for n in self._out.all_names() if n.startswith(f"{ITEM}/d/"))))
            self._unite()
            for name, content in self._described().items():
                _done(self._files.write(f"{ITEM}/{name}", json.dumps(content)))
        _processes.wait("described")
        return {name: f"{self._out}/{name}" for name in LOOKED_FOR[1:]}

    def finish(self, beside: Mapping[str, str | bytes]) -> None:
        """Write what goes beside the arrays, make a checkpoint of it, and remove what an earlier merge has left."""
        if self._rank == 0:
            for name, content in beside.items():
                _done(self._files.write(name, content))
            now = time.time_ns()
            told = {"item_handlers": {ITEM: HANDLER}, "metrics": {}, "performance_metrics": {}, "custom_metadata": {}}
            told |= {"init_timestamp_nsecs": now, "commit_timestamp_nsecs": now}
            _done(self._files.write(LOOKED_FOR[0], json.dumps(told)))
            [old] = [line["replaces"] for line in self.lines if "replaces" in line]
            again = {*LOOKED_FOR, *beside, *(f"{ITEM}/{name}" for name in self._described())}
            self._remove(self._files, sorted({*old} - again))
            self._remove(self._journal, sorted(_done(self._journal.list()), reverse=True))
        _processes.wait("output there")

    def discard(self, error: BaseException) -> None:
        """Leave off: what is done stays, to go on from; not where going on would end in the same error."""
        if self._rank == 0 and (self._noted < 2 or isinstance(error, ValueError)):
            with contextlib.suppress(OSError):
                self._remove(self._files, [n for n in self._out.all_names() if n.startswith(self._mine)])
                self._remove(self._journal, _done(self._journal.list()))

    def _lines(self) -> list[dict[str, Any]]:
        names = sorted(n for n in _done(self._journal.list()) if n.startswith(b"%d/" % self._rank))
        return [json.loads(_done(self._journal.read(n)).value) for n in names]

    def _remove(self, store: Any, names: Iterable[Any]) -> None:
        for name in names:
            _done(store.write(name, None))

    def _open(self, name: str, dtype: np.dtype, now: Any) -> Any:
        """An array in this process's own store, where the first one's say what it is."""
        import tensorstore as ts

        shape, chunk = self._tree.leaves[name].shape, self._tree.chunk(name)
        metadata = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(shape),
            "data_type": dtype.name,
            "fill_value": False if dtype.kind == "b" else 0,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            "chunk_key_encoding": {"name": "default"},
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "zstd", "configuration": {"level": 1}},
            ],
        }
        base = folder(f"{self._out}/{self._mine}{self._rank}/")
        store = {"driver": "ocdbt", "base": base, "path": f"{'.'.join(_keys(name, self._tree.leaves[name]))}/"}
        spec = {"driver": "zarr3", "kvstore": store, "metadata": metadata, "store_data_equal_to_fill_value": True}
        how: Any = {"create": True} if self._rank == 0 else {"assume_metadata": True}
        return _done(ts.open(spec, open=True, transaction=now, context=self._context, **how))

    def _unite(self) -> None:
        """Make the arrays of all processes one store."""
        import tensorstore as ts

        now = ts.Transaction(atomic=True)
        store = lambda at: ts.KvStore.open({"driver": "ocdbt", "base": folder(f"{self._out}/{at}/")}, context=self._context)
        whole = _done(store(ITEM)).with_transaction(now)
        parts = sorted({n.rpartition("/d/")[0] for n in self._out.all_names() if n.startswith(self._mine) and "/d/" in n})
        for copy in [_done(store(part)).experimental_copy_range_to(whole) for part in parts]:
            _done(copy)
        _done(now.commit_async())

    def _described(self) -> dict[str, Any]:
        """The files by which Orbax knows a tree, as JSON."""
        entries, shardings, written, words = {}, {}, [], {}
        for name, leaf in self._tree.leaves.items():
            keys = _keys(name, leaf)
            at, kind = ".".join(keys), {"value_type": "jax.Array", "write_shape": self._tree.chunk(name)}
            if leaf.dtype is None:
                value = self._tree.reference.read(name)
                kind = {"value_type": "string" if isinstance(value, str) else "scalar"}
                words |= {at: value} if isinstance(value, str) else {}
            else:
                shapes = dict.fromkeys(("write_shape", "chunk_shape"), self._tree.chunk(name))
                written.append({"array_metadata": {"param_name": at, **shapes, "ext_metadata": None}})
                shardings[at] = self._tree.shardings[name]
            kinds = [1 if hasattr(key, "idx") else 2 for key in key_path_of(name, leaf)]
            path = [{"key": key, "key_type": k} for key, k in zip(keys, kinds, strict=True)]
            entries[str(tuple(keys))] = {"key_metadata": path, "value_metadata": kind | {"skip_deserialize": False}}
        about = {"use_ocdbt": True, "use_zarr3": True, "store_array_data_equal_to_fill_value": True, "custom_metadata": None}
        return {
            "_sharding": _sharding.to_json(shardings),
            "array_metadatas/process_0": {"array_metadatas": written},
            "_strings.json": words,
            "_METADATA": {"tree_metadata": entries} | about,
        }


def _done(future: Any) -> Any:
    """What came of it.

    Raises:
      OSError: it failed.
    """
    error = future.exception()
    if error is not None:
        raise OSError(str(error).splitlines()[0][:300]) from error
    return future.result()


def _keys(name: str, leaf: Leaf) -> list[str]:
    return [str(getattr(key, "idx", getattr(key, "key", key))) for key in key_path_of(name, leaf)]
