"""A leaf block of rows by block of rows: on one CPU device, what is made on the way stays in the cache, and what comes out is
written down once, however many look at it."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxmerge.params._deferred import Entries, entries, last
from jaxmerge.params._transform import each
from jaxmerge.params.order._devices import fastest

BLOCK = 1 << 15
"""Entries of one model in a block, about."""


def by_rows(x: Entries, first: Callable[[Array, Array], Any], *then: Callable[[Any], Any]) -> Array:
    """then(first(x, 0)), an array (*shape) in which a row, of all axes but the last, follows from that row of x (K, *shape).

    Args:
      first: (x, the flat index of its first entry) -> what the next function takes.
      then: further functions, the last of which makes an array of the shape of one model. Each begins when what it takes is
        written down: what it reads by index is not made anew each time.
    """

    def whole(x):
        return functools.reduce(lambda made, f: f(made), then, first(entries(x), jnp.uint32(0)))

    def blocks(x):
        rows, *inner = x.shape[1:]
        size = math.prod(inner)
        most = max(rows * size // BLOCK, 1)
        many = next(n for n in range(min(most, rows), 0, -1) if rows % n == 0)

        def block(i):
            here, i = lax.optimization_barrier((x, i))  # or XLA would make all of x before the loop

            def begin(x):
                part = each(lambda one: lax.dynamic_slice_in_dim(one, i * (rows // many), rows // many), last(x))
                return first(part, i.astype(jnp.uint32) * np.uint32(rows // many * size))

            return functools.reduce(lambda made, f: _written(f, made, i), (begin, *then), here)

        made = lax.map(block, jnp.arange(many))
        return made.reshape(rows, *made.shape[2:])

    split = x.ndim > 2 and math.prod(x.shape[1:]) < 1 << 32  # a vector is one row
    return fastest(blocks, whole)(x) if split else whole(x)


def _written(f: Callable[[Any], Any], x: Any, i: Array) -> Any:
    """f(x), in memory: XLA keeps what a branch makes apart from what reads it, and cannot know that i is never negative."""
    nothing = lambda x: jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), jax.eval_shape(f, x))
    return lax.cond(i >= 0, f, nothing, x)
