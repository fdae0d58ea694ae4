"""What a merge has in memory at its most, and of what that is made up; one process of it, on a host.

rooms       units that are read, prepared and worked on, of every input: `rooms_bytes` of their sizes
work        what is computed of a block in float32, once for each input; of a leaf that is seen whole twice, and the result
decoded     of inputs that are no runs of bytes what is read, and what comes of it until it is in its room: as measured
written     what is on its way to the disk
runtime     Python, JAX and its compiled programs, whatever is merged: as measured, on Linux and its CPU
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxmerge.checkpoint import _direct
from jaxmerge.checkpoint._behind import ROOMS, room_bytes
from jaxmerge.checkpoint._feed import Unit, rooms_bytes
from jaxmerge.checkpoint._source import Source

RUNTIME, OF_ORBAX, OF_WHOLE = 220_000_000, 30_000_000, 120_000_000
"""Bytes: of every merge (20 MB more where its programs are made anew, 20 MB less where they come from the disk); of Orbax and
tensorstore beside it; of programs that see a leaf whole."""


class Peak(NamedTuple):
    """Bytes of buffers and arrays, by what they are for."""

    rooms: int
    work: int
    decoded: int
    written: int

    @property
    def total(self) -> int:
        return sum(self)


def rooms(units: Iterable[Unit], inputs: Sequence[Source], merged: frozenset[str], limit: int) -> int:
    """Bytes of the rooms that `read_ahead` makes for these units.

    Args:
      units: of a merge.
      inputs: what is read; of leaves that are not merged the first alone.
      merged: the others.
      limit: what the rooms may take, if they are more than one.
    """
    sizes = []
    for unit in units:
        there = [s.leaves[unit.name] for s in (inputs if unit.name in merged else inputs[:1]) if unit.name in s.leaves]
        entries = [unit.size if leaf.shape == there[0].shape else leaf.size for leaf in there]
        bytes_ = [n * (leaf.bytes // max(leaf.size, 1)) for n, leaf in zip(entries, there, strict=True)]
        sizes.append(_direct.pages(max(bytes_) + 2 * _direct.PAGE) * len(there))
    return min(rooms_bytes(sizes, limit), sum(sizes))


def of_block(block: int, look: int, inputs: int, largest: int) -> int:
    """Bytes that are computed of blocks of so many entries, and of what is looked at together, of leaves up to the largest."""
    return 4 * inputs * (min(block, largest) + min(look, largest))


def decoded(held: int) -> int:
    """Bytes beside the rooms, of inputs that are no runs of bytes and have so many in a unit: they come side by side, and what
    is in its room is let go."""
    return held + held // 4


def written(out_bytes: int, group: int | None, width: int) -> int:
    """Bytes on their way to the disk: of safetensors the rooms for entries of that width; of Orbax one `group` of blocks is
    under way while the next is made."""
    return min(ROOMS * room_bytes(width) if group is None else 2 * group, out_bytes)


def runtime(*, orbax: bool, whole: bool) -> int:
    """Bytes of what is there whatever is merged."""
    return RUNTIME + OF_ORBAX * orbax + OF_WHOLE * whole
