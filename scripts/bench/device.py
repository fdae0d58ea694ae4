"""Time on an accelerator: what one call takes when many run one after the other, and what the chip can do at that moment.

On a GPU the time of a kernel is what CUPTI says its launches took on the chip, as in a CUDA graph; where the host is to be
counted too (`wall=True`, whole models), and on other chips, it is the clock's.
"""

import concurrent.futures
import contextlib
import fcntl
import functools
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

COLD = 250e6
"""Bytes of distinct arguments: several times the caches of today's chips."""
TURN = "JAXMERGE_TURN"
"""The environment variable that names the file by which processes take turns."""


class Ceilings(NamedTuple):
    """Bytes a second of a large copy, read and written, and operations a second of a large bfloat16 product."""

    bandwidth: float
    rate: float


def ceilings() -> Ceilings:
    """Measured on random numbers: products of zeros are faster."""
    copy = seconds(lambda x: x * 1.0000001, [jax.ShapeDtypeStruct((1 << 28,), jnp.float32)])
    square = jax.ShapeDtypeStruct((8192, 8192), jnp.bfloat16)
    return Ceilings(2 * 2**30 / copy, 2 * 8192**3 / seconds(jnp.dot, [square, square]))


class Program:
    """Many calls of f in one program, each on its own arguments: no launch waits for the host, none is in cache.

    Args:
      shapes: of the arguments; None where one is left out.
      draw: from a generator and a shape to an argument; normal numbers where it is left out.
      copies: of the call, if not as many as fill the caches several times.
    """

    def __init__(
        self, f: Callable[..., Any], shapes: Sequence[Any], *, draw: Callable[..., Any] | None = None, copies: int | None = None
    ):
        self.draw, self.given = draw or normal, [s for s in shapes if s is not None]
        size = sum(int(np.prod(s.shape)) * jnp.dtype(s.dtype).itemsize for s in self.given)
        self.copies = copies or int(min(16, max(2, COLD // max(size, 1))))

        @jax.jit
        def one(*some):
            some = iter(some)
            return f(*(None if s is None else next(some) for s in shapes))

        sets = [tuple(self.given)] * self.copies
        self.lowered = jax.jit(lambda *sets: [one(*some) for some in sets]).lower(*sets)

    @functools.cached_property
    def compiled(self) -> Any:
        with turn(fcntl.LOCK_SH):
            return self.lowered.compile()

    def seconds(self, *, least: float = 0.1, wall: bool = False) -> float:
        """Of one call.

        Args:
          least: seconds that each of three measurements takes; the median is returned.
          wall: by the clock, even where the chip's own time can be had.
        """
        run, rng = self.compiled, np.random.default_rng(0)
        with turn(fcntl.LOCK_EX):
            sets = [tuple(self.draw(rng, s) for s in self.given) for _ in range(self.copies)]

            def clock(times: int) -> float:
                start = time.perf_counter()
                for _ in range(times):
                    out = run(*sets)
                jax.block_until_ready(out)
                return (time.perf_counter() - start) / times

            if jax.default_backend() == "gpu" and not wall:
                from jax.experimental.mosaic.gpu import profiler

                _, milliseconds = profiler.measure(run, iterations=5)(*sets)
                return float(np.median(np.array(milliseconds))) / 1e3 / self.copies
            clock(2)
            times = max(2, int(least / clock(1)))
            return float(np.median([clock(times) for _ in range(3)])) / self.copies


def compile_all(programs: Iterable[Program]) -> None:
    """All of them at once: a compiler leaves Python alone. What fails here fails again, and says why, when it is timed."""

    def one(program: Program) -> None:
        with contextlib.suppress(Exception):
            _ = program.compiled

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, programs))


def seconds(f: Callable[..., Any], shapes: Sequence[Any], *, draw: Callable[..., Any] | None = None) -> float:
    """Of one call of f: see `Program`."""
    return Program(f, shapes, draw=draw).seconds()


@contextlib.contextmanager
def turn(how: int) -> Iterator[None]:
    """Processes that share one device compile side by side and time one after the other, if TURN names a file to lock."""
    path = os.environ.get(TURN)
    with open(path, "a") if path else contextlib.nullcontext() as file:
        if file:
            fcntl.flock(file, how)
        yield


def first_line(e: Exception) -> str:
    """What went wrong, in a line."""
    return (str(e).splitlines() or [type(e).__name__])[0]


def write(path: pathlib.Path, found: Any) -> None:
    """JSON, whole at any moment: whoever is cut off keeps what was found before."""
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(found, indent=2, default=str))
    aside.replace(path)


def normal(rng: np.random.Generator, shape: Any) -> jax.Array:
    """Standard normal numbers; small positive integers where the dtype is whole or the array a vector of float32."""
    key = jax.random.key(int(rng.integers(1 << 30)))
    if not jnp.issubdtype(shape.dtype, jnp.floating):
        return jax.random.randint(key, shape.shape, 0, 2).astype(shape.dtype)
    if len(shape.shape) == 2 and shape.dtype == jnp.float32:
        return jax.random.randint(key, shape.shape, 1, 5).astype(shape.dtype)
    return jax.random.normal(key, shape.shape, jnp.float32).astype(shape.dtype)
