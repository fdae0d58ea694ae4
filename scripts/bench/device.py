"""Time on an accelerator: what one call takes when many run one after the other, and what the chip can do at that moment.

On a GPU the time of a kernel is what CUPTI says its launches took on the chip, as in a CUDA graph; where the host is to be
counted too (`wall=True`, whole models), and on other chips, it is the clock's.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

COLD = 250e6
"""Bytes of distinct arguments: several times the caches of today's chips."""


class Ceilings(NamedTuple):
    """Bytes a second of a large copy, read and written, and operations a second of a large bfloat16 product."""

    bandwidth: float
    rate: float


def ceilings() -> Ceilings:
    """Measured on random numbers: products of zeros are faster."""
    copy = seconds(lambda x: x * 1.0000001, [jax.ShapeDtypeStruct((1 << 28,), jnp.float32)])
    square = jax.ShapeDtypeStruct((8192, 8192), jnp.bfloat16)
    return Ceilings(2 * 2**30 / copy, 2 * 8192**3 / seconds(jnp.dot, [square, square]))


def seconds(
    f: Callable[..., Any],
    shapes: Sequence[Any],
    *,
    draw: Callable[..., Any] | None = None,
    least: float = 0.1,
    wall: bool = False,
) -> float:
    """Of one call of f among many in one program, each on its own arguments: no launch waits for the host, none is in cache.

    Args:
      shapes: of the arguments; None where one is left out.
      draw: from a generator and a shape to an argument; normal numbers where it is left out.
      least: seconds that each of three measurements takes; the median is returned.
      wall: by the clock, even where the chip's own time can be had.
    """
    draw, rng = draw or normal, np.random.default_rng(0)
    given = [s for s in shapes if s is not None]
    size = sum(int(np.prod(s.shape)) * jnp.dtype(s.dtype).itemsize for s in given)
    copies = int(min(16, max(2, COLD // max(size, 1))))

    @jax.jit
    def one(*some):
        some = iter(some)
        return f(*(None if s is None else next(some) for s in shapes))

    sets = [tuple(draw(rng, s) for s in given) for _ in range(copies)]
    run = jax.jit(lambda *sets: [one(*some) for some in sets]).lower(*sets).compile()

    def clock(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            out = run(*sets)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / times

    if jax.default_backend() == "gpu" and not wall:
        from jax.experimental.mosaic.gpu import profiler

        _, milliseconds = profiler.measure(run, iterations=5)(*sets)
        return float(np.median(np.array(milliseconds))) / 1e3 / copies
    clock(2)
    times = max(2, int(least / clock(1)))
    return float(np.median([clock(times) for _ in range(3)])) / copies


def normal(rng: np.random.Generator, shape: Any) -> jax.Array:
    """Standard normal numbers; small positive integers where the dtype is whole or the array a vector of float32."""
    key = jax.random.key(int(rng.integers(1 << 30)))
    if not jnp.issubdtype(shape.dtype, jnp.floating):
        return jax.random.randint(key, shape.shape, 0, 2).astype(shape.dtype)
    if len(shape.shape) == 2 and shape.dtype == jnp.float32:
        return jax.random.randint(key, shape.shape, 1, 5).astype(shape.dtype)
    return jax.random.normal(key, shape.shape, jnp.float32).astype(shape.dtype)
