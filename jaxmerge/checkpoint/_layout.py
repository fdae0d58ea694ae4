"""How an output in safetensors lies on disk: which leaf in which file, and where in it."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from jaxmerge.checkpoint._behind import WriteBehind
from jaxmerge.checkpoint._budget import show_size
from jaxmerge.checkpoint._safetensors import NAMES, header_bytes
from jaxmerge.checkpoint._source import Extent, Leaf


class Layout(NamedTuple):
    """Files to be.

    Attributes:
      heads: {file: the bytes it begins with}.
      sizes: {file: its size}.
      extents: {leaf: where it will lie}, in the order of the bytes, file by file.
      index: its name and text, where there are several files.
    """

    heads: dict[str, bytes]
    sizes: dict[str, int]
    extents: dict[str, Extent]
    index: tuple[str, str] | None

    def identity(self) -> Any:
        """What tells one output from another."""
        return self

    def beside(self) -> dict[str, str]:
        """Files that go with it."""
        return dict([self.index]) if self.index else {}

    def prepare(self, directory: pathlib.Path) -> None:
        """Make the files, with their heads and sizes, on the first process; the disk's room for them is taken now, where it can
        be.

        Raises:
          OSError: there is not enough room, or no permission.
        """
        if jax.process_index() != 0:
            return
        for file, size in self.sizes.items():
            fd = os.open(directory / file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                try:
                    os.posix_fallocate(fd, 0, size)
                except OSError as e:
                    if e.errno not in (22, 95):  # not on this file system
                        raise OSError(e.errno, f"no room for {directory}/{file} of {show_size(size)}: {e.strerror}") from e
                    os.ftruncate(fd, size)
                os.pwrite(fd, self.heads[file], 0)
            finally:
                os.close(fd)
        for file, text in self.beside().items():
            (directory / file).write_text(text)

    def sink(self, directory: pathlib.Path) -> tuple[WriteBehind, dict[str, Extent]]:
        """What writes, and where each leaf lies."""
        return WriteBehind(), {n: Extent(str(directory / e.file), e.offset, e.bytes) for n, e in self.extents.items()}

    def finish(self, directory: pathlib.Path) -> list[str]:
        """The files that hold it."""
        return list(self.sizes)


def layout(leaves: Mapping[str, Leaf], max_shard_bytes: int, stem: str) -> Layout:
    """Fill files with leaves, in their order, to at most so many bytes each (a larger leaf has a file to itself).

    Raises:
      ValueError: a leaf that safetensors cannot hold.
    """
    alien = [f"{n} ({leaf.dtype or 'not an array'})" for n, leaf in leaves.items() if leaf.dtype not in NAMES]
    if alien:
        raise ValueError(f"safetensors cannot hold {', '.join(alien[:5])}; leave them out (subset), or write Orbax.")
    groups: list[dict[str, Leaf]] = [{}]
    room = max_shard_bytes
    for name, leaf in leaves.items():
        if groups[-1] and leaf.bytes > room:
            groups.append({})
            room = max_shard_bytes
        groups[-1][name] = leaf
        room -= leaf.bytes
    total = len(groups)
    files = (
        [f"{stem}-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)] if total > 1 else [f"{stem}.safetensors"]
    )
    heads, sizes, extents = {}, {}, {}
    for file, group in zip(files, groups, strict=True):
        heads[file], begins = header_bytes(group, {"format": "pt"})
        extents |= {n: Extent(file, begins[n], leaf.bytes) for n, leaf in group.items()}
        sizes[file] = len(heads[file]) + sum(leaf.bytes for leaf in group.values())
    index = None
    if total > 1:
        size = sum(leaf.bytes for leaf in leaves.values())
        where = {n: extents[n].file for n in sorted(extents)}
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": where}, indent=2) + "\n"
        index = f"{stem}.safetensors.index.json", text
    return Layout(heads, sizes, extents, index)
