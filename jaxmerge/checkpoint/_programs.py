"""What is compiled: a few programs for flat blocks of fixed sizes, whatever the shapes of the leaves.

Leaves of one structure of settings share them: what differs by leaf (coefficients, thresholds, the place of a block in the leaf
and in memory) is a runtime value. A leaf that must be seen whole has a program of its own shape.
"""

import concurrent.futures
import functools
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxmerge.checkpoint._windows import Window, copied, opened
from jaxmerge.params._deferred import Entries, defer, last
from jaxmerge.params._stack import reduced, rounded
from jaxmerge.params._transform import Step, left, models
from jaxmerge.params.order._host import RUN
from jaxmerge.params.order._quantile import magnitude_bits

SIZES = (1 << 21, 1 << 18, 1 << 12)
"""Entries of a block. All but the last piece of a leaf fill theirs."""

ANY_ORDER = {"xla_cpu_enable_fast_math": True} | {
    f"xla_cpu_fast_math_honor_{what}": True for what in ("nans", "infs", "division", "functions")
}
"""Of what is called fast math, that terms of a sum are added in any order: in vectors, while they are made."""


def pieces(size: int, sizes: Sequence[int] = SIZES, page: int = 1, lead: int = 0) -> Iterator[tuple[int, int, int]]:
    """(start, stop, size of the program) of the blocks that make up so many entries.

    The first is the `lead`-th of a page of the output: what a block has of a page that it does not fill is the next one's.
    """
    start = 0
    while start < size:
        fits = next((s for s in sizes if s <= size - start), sizes[-1])
        stop = min(start + fits, size)
        over = (lead + stop) % page
        if stop < size and over < stop - start:
            stop -= over
        yield start, stop, fits
        start = stop


@functools.lru_cache(maxsize=64)
def merger(steps: tuple[Step, ...], has_base: bool, cast: Any, out: Any, parents: int | None = None) -> Any:
    """(settings, origin, inputs) -> the merged block, the plans, of each input whether it has NaN or inf.

    The first so many inputs are `parents`, what follows is data that comes with them; None: there is none.
    """

    def merge(settings: Any, origin: Array, windows: Sequence[Window]) -> tuple:
        zero, x = stacked(windows[:parents], has_base, cast)
        settings = placed(settings, origin)
        if parents is not None:
            settings = with_data(settings, windows[parents:])
        plans = []
        for step, s in zip(steps, settings, strict=True):
            plans.append(step.match(s, x))
            x = left(step, plans[-1], x)
        x = reduced(last(x))
        plans = plans if parents is None else with_data(plans, None)
        return rounded(x if zero is None else zero + x, out), plans, _strange(windows)

    return jax.jit(merge)


@functools.lru_cache(maxsize=64)
def placer(*merged: Any) -> Any:
    """(room, at, settings, origin, inputs) -> the room, which is donated, with the bits of the block that `merger` makes of the
    rest from the at-th entry on; the plans, and of each input whether it has NaN or inf.

    One loop, in one thread: nothing is written but the room.
    """
    merge = merger(*merged)

    def place(room: Array, at: Array, settings: Any, origin: Array, windows: Sequence[Window]) -> tuple:
        block, *found = merge(settings, origin, windows)
        return lax.dynamic_update_slice(room, lax.bitcast_convert_type(block.reshape(-1), room.dtype), (at,)), *found

    return jax.jit(place, donate_argnums=0)


class Ahead:
    """Runs programs for blocks; after one's first, those for blocks of other sizes are made ready while files are read."""

    def __init__(self, sizes: Iterable[int]):
        """`sizes` are those of all flat blocks to come, in the order in which they are wanted."""
        self._sizes = tuple(sizes)
        self._begun: set[Any] = set()
        self._under_way: dict[Any, concurrent.futures.Future] = {}
        self._lock = threading.Lock()

    def run(self, look: Any, *args: Any) -> Any:
        """What it makes of its arguments, windows the last; a program that is just being made ready is waited for."""
        *front, seen = args
        if (made := self._under_way.get((look, seen[0].shape))) is not None:
            concurrent.futures.wait([made])
        found = look(*args)
        with self._lock:
            begin = look not in self._begun and len(seen[0].shape) == 1
            self._begun.add(look)
        if begin:
            self._make_ready(look, front, seen)
        return found

    def _make_ready(self, look: Any, front: Sequence[Any], seen: Sequence[Window]) -> None:
        def try_on_zeros(size: int) -> None:
            donated = lambda x: isinstance(x, Array) and x.is_deleted()
            here = [jnp.zeros(x.shape, x.dtype) if donated(x) else x for x in front]
            look(*here, [copied(np.zeros(0, w.dtype), size).window((size,)) for w in seen])

        thread = concurrent.futures.ThreadPoolExecutor(1, "jaxmerge-ahead")
        for size in self._sizes:
            if (size,) != seen[0].shape:
                self._under_way[look, (size,)] = thread.submit(try_on_zeros, size)
        thread.shutdown(wait=False)


@functools.lru_cache(maxsize=64)
def patterns(steps: tuple[Step, ...], has_base: bool, cast: Any) -> Any:
    """(settings, origin, inputs) -> the magnitudes of what these steps leave of a block, as integers (K, n)."""

    def look(settings: Any, origin: Array, windows: Sequence[Window]) -> Array:
        return magnitude_bits(last(after(steps, placed(settings, origin), stacked(windows, has_base, cast)[1])))

    return jax.jit(look)


@functools.lru_cache(maxsize=64)
def tally(steps: tuple[Step, ...], has_base: bool, cast: Any) -> Any:
    """(patterns (c, n K), settings, origin, inputs, how many entries count) -> of what these steps leave of a flat block, how
    many magnitudes are above each pattern (c, n K), and how many of each run are it (c, n K, runs).

    One loop over the inputs as they are: nothing is written but a word for each run, half of it for either count.
    """

    def look(patterns: Array, settings: Any, origin: Array, windows: Sequence[Window], size: Array) -> tuple[Array, Array]:
        signed = lambda bits: lax.bitcast_convert_type(bits, jnp.int32)  # magnitudes have no sign; compared in one operation
        left = models(last(after(steps, placed(settings, origin), stacked(windows, has_base, cast)[1])))
        bits = [signed(magnitude_bits(x)).reshape(-1, RUN) for x in left]
        counts = lambda t, u: (u > t).astype(jnp.uint32) + ((u == t).astype(jnp.uint32) << 16)
        words = [counts(t, bits[j % len(bits)]) for row in signed(patterns) for j, t in enumerate(row)]
        if words[0].size == RUN:  # zeros may fill it up
            words = [jnp.where(jnp.arange(RUN) < size, word, 0) for word in words]
        add = lambda a, b: [p + q for p, q in zip(a, b, strict=True)]
        found = jnp.stack(lax.reduce(words, [np.uint32(0)] * len(words), add, (1,))).reshape(*patterns.shape, -1)
        return jnp.sum(found & 0xFFFF, axis=-1, dtype=jnp.uint32), found >> 16

    return jax.jit(look)


@functools.lru_cache(maxsize=64)
def adder(steps: tuple[Step, ...], f: Any, has_base: bool, cast: Any) -> Any:
    """(settings of f, settings, origin, inputs) -> f, a sum or a maximum, of what these steps leave of a block."""

    def look(mine: Any, settings: Any, origin: Array, windows: Sequence[Window]) -> Array:
        return f(placed(mine, origin), after(steps, placed(settings, origin), stacked(windows, has_base, cast)[1]))

    return jax.jit(look, compiler_options=ANY_ORDER if jax.default_backend() == "cpu" else None)


@functools.lru_cache(maxsize=64)
def surveyor(steps: tuple[Step, ...], read: Any, has_base: bool, cast: Any) -> Any:
    """(query, settings, origin, inputs) -> counts of what these steps leave of a block."""

    def look(query: Any, settings: Any, origin: Array, windows: Sequence[Window]) -> Array:
        return read(query, last(after(steps, placed(settings, origin), stacked(windows, has_base, cast)[1])))

    return jax.jit(look)


def placed(settings: Any, origin: Array) -> Any:
    """Settings of a block that begins at `origin`."""
    if isinstance(settings, dict):
        return {k: origin if k == "origin" else placed(v, origin) for k, v in settings.items()}
    return type(settings)(placed(v, origin) for v in settings) if isinstance(settings, list | tuple) else settings


def with_data(settings: Any, data: Sequence[Window | Array] | None) -> Any:
    """Settings, or plans, with data (float32) in the place for it; None takes it out."""
    if isinstance(settings, dict):
        wide = None if data is None else [opened(d).astype(jnp.float32) for d in data]
        return {k: wide if k == "data" else with_data(v, data) for k, v in settings.items()}
    return type(settings)(with_data(v, data) for v in settings) if isinstance(settings, list | tuple) else settings


def strange(found: Any, arrays: Sequence[np.ndarray]) -> list[int]:
    """How many entries of each input are NaN or inf; counted only where some are."""
    return [
        int(np.count_nonzero(~np.isfinite(a.astype(np.float32)))) if some else 0
        for some, a in zip(np.asarray(found).tolist(), arrays, strict=True)
    ]


def unfinite(array: np.ndarray) -> int:
    """How many entries are NaN or inf, of what is copied; of eight bits and fewer all are codes."""
    dtype = array.dtype
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize not in (2, 4):
        return 0
    integer = np.dtype(f"uint{8 * dtype.itemsize}").type
    return int(np.count_nonzero((array.view(integer) & integer(_mask(dtype))) > integer(_limit(dtype))))


def after(steps: Sequence[Step], settings: Sequence[Any], x: Entries) -> Entries:
    """What these steps leave."""
    for step, s in zip(steps, settings, strict=True):
        x = left(step, step.match(s, x), x)
    return x


def stacked(inputs: Sequence[Window | Array], has_base: bool, cast: Any) -> tuple[Array | None, Entries]:
    """The base (or None) and the models less the base, float32, deferred: it starts from the inputs as they are."""
    wide = lambda x: (opened(x) if cast is None else opened(x).astype(cast)).astype(jnp.float32)
    if not has_base:
        return None, defer(lambda models: jnp.stack([wide(m) for m in models]), list(inputs))
    zero, *models = inputs
    return wide(zero), defer(lambda zero, models: jnp.stack([wide(m) - wide(zero) for m in models]), zero, models)


def _strange(windows: Sequence[Window]) -> Array:
    """Of each input, whether its largest magnitude is beyond the finite; as integers, one loop for those that are alike."""
    found: list[Any] = [None] * len(windows)
    for dtype, shape in dict.fromkeys((w.dtype, w.shape) for w in windows):
        mine = [i for i, w in enumerate(windows) if (w.dtype, w.shape) == (dtype, shape)]
        integer = np.dtype(f"uint{8 * dtype.itemsize}")
        mask = integer.type(_mask(dtype))
        bits = [windows[i].bits() & mask for i in mine]
        step = lambda a, b: [jnp.maximum(p, q) for p, q in zip(a, b, strict=True)]
        axes = tuple(range(bits[0].ndim))
        for i, m in zip(mine, lax.reduce(bits, [integer.type(0)] * len(bits), step, axes), strict=True):
            found[i] = m > integer.type(_limit(dtype))
    return jnp.stack(found)


def _mask(dtype: Any) -> int:
    """All bits but the sign's."""
    signed = bool(jnp.finfo(dtype).min < 0)
    return (1 << (8 * int(dtype.itemsize) - signed)) - 1


@functools.cache
def _limit(dtype: np.dtype) -> int:
    """The magnitude of the largest number that is finite."""
    return int(np.array(jnp.finfo(dtype).max, dtype).view(f"uint{8 * dtype.itemsize}"))
