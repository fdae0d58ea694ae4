"""Entries where they lie, and how a program sees them without a copy.

XLA takes memory as it is where it begins at a multiple of LINE. What comes past the page cache lies where it lay in its page of
the file, which is anywhere. So a program is given memory from the LINE before on, a LINE longer than what it looks at, and how
far into it that begins: a number at run time, at which its loops read.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

LINE = 64
"""Bytes."""


class Run(NamedTuple):
    """Entries that lie in a row on the host: `size` of them from the `lead`-th of `memory` on.

    `memory` is flat, begins at a multiple of LINE, and goes on for a LINE behind them.
    """

    memory: np.ndarray
    lead: int
    size: int

    @property
    def entries(self) -> np.ndarray:
        """As an array, flat."""
        return self.memory[self.lead : self.lead + self.size]

    @property
    def nbytes(self) -> int:
        return self.size * self.memory.itemsize

    def part(self, start: int, stop: int) -> "Run":
        """Entries [start, stop) of these."""
        return Run(self.memory, self.lead + start, stop - start)

    def window(self, shape: tuple[int, ...]) -> "Window":
        """These entries for a program, in this shape."""
        line = LINE // self.memory.itemsize
        lead = self.lead % line
        start = self.lead - lead
        return Window(self.memory[start : start + self.size + line], np.uint32(lead), shape)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("memory", "lead"), meta_fields=("shape",))
@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """A run of entries as the argument of a program: in `memory`, from the `lead`-th on, of a shape that it is compiled for."""

    memory: Any
    lead: Any
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return self.memory.dtype

    def bits(self) -> Array:
        """The entries as unsigned integers; to be fused into who reads them."""
        words = lax.bitcast_convert_type(self.memory, f"uint{8 * self.dtype.itemsize}")
        line = LINE // self.dtype.itemsize
        return lax.dynamic_slice(words, (self.lead,), (words.size - line,)).reshape(self.shape)

    def open(self) -> Array:
        """The entries. Integers are cut out: of numbers that a processor does not compute with, XLA makes others first."""
        return lax.bitcast_convert_type(self.bits(), self.dtype)


def opened(x: Any) -> Array:
    """What a window shows, or the array itself."""
    return x.open() if isinstance(x, Window) else jnp.asarray(x)


def copied(entries: np.ndarray, size: int) -> Run:
    """Entries in memory of their own, filled up with zeros to so many."""
    memory = np.zeros(size + LINE // entries.itemsize, entries.dtype)
    memory[: entries.size] = entries
    return Run(memory, 0, size)


def windows(runs: Sequence[Run], start: int, stop: int, shape: tuple[int, ...]) -> list[Window]:
    """Entries [start, stop) of each run for a program, filled up with zeros to that shape."""
    size, parts = math.prod(shape), [run.part(start, stop) for run in runs]
    return [(part if part.size == size else copied(part.entries, size)).window(shape) for part in parts]
