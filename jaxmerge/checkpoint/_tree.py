"""An Orbax output that is written by ranges: Orbax describes the tree, blocks go where its arrays lie, any time, in any order.

out.merging/
  state/                what Orbax wrote of a tree of a few zeros: key paths, dtypes, shardings; its arrays have their shapes
  state/ocdbt.process_0 the blocks of a process; they become part of the whole when all are there, as Orbax's own do
"""

import json
import math
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Sharding
from orbax.checkpoint import v1 as ocp

from jaxmerge.checkpoint import _processes
from jaxmerge.checkpoint._budget import show_size
from jaxmerge.checkpoint._journal import Workplace
from jaxmerge.checkpoint._orbax import array_keys, base_of, spec_of, tree_of
from jaxmerge.checkpoint._remote import folder
from jaxmerge.checkpoint._sharding import shards_of
from jaxmerge.checkpoint._source import Extent, Leaf, Source
from jaxmerge.checkpoint._units import Span


class Tree(NamedTuple):
    """An output in Orbax; what `Layout` is for safetensors.

    Attributes:
      leaves: what it holds.
      shardings: as it is described; a device's part is a whole number of chunks along the axes that are split.
      spans: the blocks that each array is written in.
      reference: where leaves come from that are no arrays.
      group: bytes of blocks that are written at once, into one file.
    """

    leaves: dict[str, Leaf]
    shardings: dict[str, Sharding]
    spans: dict[str, Span]
    reference: Source
    group: int

    def identity(self) -> Any:
        """What tells one output from another."""
        return {n: [leaf.shape, str(leaf.dtype), *self.spans[n], self.chunk(n)] for n, leaf in self._arrays().items()}

    def beside(self) -> dict[str, str]:
        """Files that go with it."""
        return {}

    def prepare(self, directory: pathlib.Path) -> None:
        """Write everything but the values; on all processes.

        Raises:
          OSError: there is not nearly enough room: half of it, if nothing could be compressed.
        """
        size, free = sum(leaf.bytes for leaf in self.leaves.values()), shutil.disk_usage(directory).free
        if free < size // 2:
            raise OSError(28, f"no room for {directory} of up to {show_size(size)}: {show_size(free)} are free")
        new = directory / "new"
        others = {n: self.shardings[n] for n, leaf in self.leaves.items() if leaf.dtype is None}
        values = {n: stand_in(leaf, self.shardings[n]) for n, leaf in self._arrays().items()}
        ocp.save(epath.Path(new), tree_of(values | (self.reference.load(others) if others else {}), self.leaves))
        _processes.wait("tree described")
        if jax.process_index() == 0:
            self._give_shapes(base_of(new))
            for path in new.iterdir():
                path.rename(directory / path.name)
            new.rmdir()
        _processes.wait("tree prepared")

    def sink(self, directory: pathlib.Path) -> tuple["Blocks", dict[str, Extent]]:
        """Where this process writes, and where each leaf lies there."""
        where = {n: Extent(n, 0, leaf.bytes) for n, leaf in self._arrays().items()}
        return Blocks(base_of(directory), self._arrays(), self.spans, self.group), where

    def finish(self, directory: pathlib.Path) -> list[str]:
        """Make the blocks of all processes part of the whole; the files that hold it. On the first process."""
        import tensorstore as ts

        base, context, now = base_of(directory), ts.Context(), ts.Transaction(atomic=True)
        store = lambda at: ts.KvStore.open({"driver": "ocdbt", "base": folder(f"{at}/")}, context=context).result()
        whole = store(base).with_transaction(now)
        copies = [store(part).experimental_copy_range_to(whole) for part in sorted(base.glob("ocdbt.process_*"))]
        for copy in copies:
            copy.result()
        now.commit_async().result()
        names = [p.relative_to(directory) for p in directory.rglob("*") if p.is_file()]
        return sorted(str(n) for n in names if len(n.parts) > 1 or n.name == "_CHECKPOINT_METADATA")

    def _arrays(self) -> dict[str, Leaf]:
        return {n: leaf for n, leaf in self.leaves.items() if leaf.dtype is not None}

    def chunk(self, name: str) -> list[int]:
        """What is stored under one key: a block, split where devices split it."""
        shape, (axis, rows) = self.leaves[name].shape, self.spans[name]
        parts = shards_of(self.shardings[name], len(shape))
        after = [n // p if i > axis and n % p == 0 else n for i, (n, p) in enumerate(zip(shape, parts, strict=True))]
        return [max(n, 1) for n in [1] * min(axis, len(shape)) + [rows] * bool(shape) + after[axis + 1 :]]

    def _give_shapes(self, base: pathlib.Path) -> None:
        """Put arrays without values, of the leaves' own shapes, in the place of the zeros."""
        import tensorstore as ts

        described = json.loads((base / "_METADATA").read_text())
        by_name = {"/".join(array_keys(e)): e for e in described["tree_metadata"].values()}
        chunks = {n: self.chunk(n) for n in self._arrays()}
        context, now = ts.Context(), ts.Transaction(atomic=True)  # one store: its arrays change in one go
        made = []
        for name, chunk in chunks.items():
            spec = spec_of(base, described, array_keys(by_name[name]))
            leaf = self.leaves[name]
            metadata = ts.open(spec, open=True, context=context).result().spec().to_json()["metadata"]
            metadata |= {"shape": list(leaf.shape), "data_type": str(leaf.dtype)}  # 64 bits are 32 on JAX's devices
            metadata["chunk_grid"]["configuration"]["chunk_shape"] = chunk
            for codec in metadata["codecs"]:
                if codec["name"] == "sharding_indexed":
                    codec["configuration"]["chunk_shape"] = chunk
            by_name[name]["value_metadata"]["write_shape"] = chunk
            spec |= {"metadata": metadata}
            made.append(ts.open(spec, create=True, delete_existing=True, transaction=now, context=context))
        for array in made:
            array.result()
        now.commit_async().result()
        (base / "_METADATA").write_text(json.dumps(described))
        by_path = {".".join(array_keys(entry)): chunks[name] for name, entry in by_name.items() if name in chunks}
        for file in (base / "array_metadatas").glob("*"):
            arrays = json.loads(file.read_text())
            for one in (entry["array_metadata"] for entry in arrays["array_metadatas"]):
                one |= {"write_shape": by_path[one["param_name"]], "chunk_shape": by_path[one["param_name"]]}
            file.write_text(json.dumps(arrays))
        for part in base.glob("ocdbt.process_*"):
            shutil.rmtree(part)


class Blocks:
    """Bytes of arrays, in flat order, to tensorstore, block by block; a group of them is on its way while the next is made."""

    def __init__(self, base: pathlib.Path, leaves: Mapping[str, Leaf], spans: Mapping[str, Span], group: int):
        self._base, self._leaves, self._spans, self._group = base, leaves, spans, group
        self._described = json.loads((base / "_METADATA").read_text())
        self._keys = {"/".join(keys): keys for e in self._described["tree_metadata"].values() if (keys := array_keys(e))}
        self._context: Any = None
        self._own = base / f"ocdbt.process_{jax.process_index()}"
        self._made: Any = None
        self._under_way: Any = None
        self._notes: list[Callable[[bool], None]] = []
        self._size = 0
        self._name, self._at, self._begin = "", 0, 0
        self._room: np.ndarray | None = None
        self._array: Any = None
        self.buffered: set[str] = set()

    def write(self, file: str, offset: int, data: np.ndarray) -> None:
        """Write bytes of a leaf, soon; blocks are whole when what comes next lies elsewhere."""
        if file != self._name:
            self._flush()
            self._name, self._array = file, self._open(file)
        if offset != self._at:
            self._flush()
            self._at = offset
        done = 0
        while done < data.size:
            if self._room is None:
                self._room, self._begin = np.empty(self._left(self._at), np.uint8), self._at
            used = self._at - self._begin
            n = min(data.size - done, self._room.size - used)
            self._room[used : used + n] = data[done : done + n]
            done, self._at = done + n, self._at + n
            if used + n == self._room.size:
                self._flush()

    def put(self, name: str, array: Any) -> None:
        """Write a whole leaf, soon: of an array on devices the shards that are here, each once; else all of it."""
        target = self._open(name)
        here = array.addressable_shards if isinstance(array, jax.Array) else ()
        parts = [(shard.index, shard.data) for shard in here if shard.replica_id == 0]
        for index, values in parts if isinstance(array, jax.Array) else [((), array)]:
            self._add(target[index], np.asarray(values))

    def mark(self, note: Callable[[bool], None]) -> None:
        """Call `note` when all that came before is on disk: while what comes next is made."""
        self._flush()
        if self._made is not None:
            self._send()
        self._notes.append(note)

    def close(self) -> None:
        """Wait until everything is on disk."""
        self._flush()
        self._send()
        self._wait()

    def abandon(self) -> None:
        """Leave off, when what is under way is there or has failed."""
        self._room, self._array = None, None
        if self._made is not None:
            self._made.abort()
        if self._under_way is not None:
            self._under_way.exception()
        self._under_way, self._made = None, None

    def _left(self, at: int) -> int:
        """Bytes from here to the end of a block."""
        leaf, span = self._leaves[self._name], self._spans[self._name]
        width = leaf.bytes // leaf.size
        block, row = span.entries(leaf.shape) * width, math.prod(leaf.shape[span.axis :]) * width
        within = at % row
        return min((within // block + 1) * block, row) - within

    def _flush(self) -> None:
        if self._room is None:
            return
        leaf, (axis, _) = self._leaves[self._name], self._spans[self._name]
        values = self._room[: self._at - self._begin].view(np.dtype(leaf.dtype))
        first, inner = self._begin // values.itemsize, math.prod(leaf.shape[axis + 1 :])
        rows = values.size // inner
        index: tuple[Any, ...] = ()
        if leaf.shape:
            *lead, row = np.unravel_index(first // inner, leaf.shape[: axis + 1])
            index = (*map(int, lead), slice(int(row), int(row) + rows))
        shape = (rows, *leaf.shape[axis + 1 :]) if leaf.shape else ()
        self._room = None
        self._add(self._array[index], values.reshape(shape))

    def _add(self, target: Any, values: np.ndarray) -> None:
        """Hand over a block; it waits for the others of its group."""
        import tensorstore as ts

        if self._under_way is not None and self._under_way.done():
            self._wait()
        if self._made is None:
            self._made = ts.Transaction(atomic=True)  # else every block may become a file
        target.with_transaction(self._made).write(values).copy.result()
        self._size += values.nbytes
        if self._size >= self._group:
            self._send()

    def _send(self) -> None:
        """What is made goes to the disk together."""
        self._wait()
        if self._made is not None:
            self._under_way = self._made.commit_async()
        self._made, self._size = None, 0

    def _wait(self) -> None:
        """Until what is under way is on disk, and noted."""
        error = None if self._under_way is None else self._under_way.exception()
        self._under_way = None
        if error is not None:
            raise OSError(f"{self._own} cannot be written: {str(error).splitlines()[0]}") from error
        notes, self._notes = self._notes, []
        for note in notes:
            note(True)

    def _open(self, name: str) -> Any:
        """The array in this process's own store, which has its blocks only: it is described in the whole."""
        import tensorstore as ts

        keys = self._keys[name]
        if self._context is None:  # one for all: writes of many arrays become one commit
            self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        whole = ts.open(spec_of(self._base, self._described, keys), open=True, context=self._context).result()
        spec = spec_of(self._own, self._described, keys) | {"metadata": whole.spec().to_json()["metadata"]}
        spec["store_data_equal_to_fill_value"] = True  # Orbax takes a block that is not there for damage
        return ts.open(spec, open=True, assume_metadata=True, context=self._context).result()


class Leafwise:
    """An output in a local directory whose leaves come whole, from devices; `_bucket.Bucket` in a bucket. It goes on.

    Attributes:
      lines: what an earlier run of the same merge has noted.
    """

    def __init__(self, out: Any, tree: Tree, identity: str, *, overwrite: bool, resume: bool, about: Mapping[str, Any]):
        self._tree = tree
        self._place = Workplace(pathlib.Path(out).absolute(), rank=jax.process_index(), overwrite=overwrite)
        try:
            prepare = lambda: tree.prepare(self._place.directory)
            self.lines = self._place.begin(identity, prepare, resume=resume, about=about)
        except BaseException:
            self._place.leave(keep=False)
            raise
        self._noted = bool(self.lines)
        self._blocks = tree.sink(self._place.directory)[0]

    def write(self, leaves: Mapping[str, Any]) -> None:
        """Add some leaves, and wait until they are on disk."""
        for name, array in leaves.items():
            if isinstance(array, jax.Array) or (jax.process_index() == 0 and self._tree.leaves[name].dtype is not None):
                self._blocks.put(name, array)
        self._blocks.close()

    def note(self, line: Mapping[str, Any]) -> None:
        """Remember what is done."""
        self._place.note(line)
        self._noted = True

    def finalize(self) -> dict[str, pathlib.Path]:
        """Everything is there: {name in the output: where it lies now}."""
        _processes.wait("leaves written")
        here = self._place.directory
        names = _processes.everyone([] if jax.process_index() else self._tree.finish(here))[0]
        return {name: here / name for name in names}

    def finish(self, beside: Mapping[str, str | bytes]) -> None:
        """Write what goes beside the arrays, and make the output appear."""
        self._place.finish(beside)

    def discard(self, error: BaseException) -> None:
        """Leave off: what is done stays, to go on from; not where going on would end in the same error."""
        self._blocks.abandon()
        self._place.leave(keep=self._noted and not isinstance(error, ValueError))


def stand_in(leaf: Leaf, sharding: Sharding) -> jax.Array:
    """As many zeros as the sharding has shards: what Orbax is given to describe a leaf."""
    return jax.device_put(np.zeros(shards_of(sharding, len(leaf.shape)), leaf.dtype), sharding)
