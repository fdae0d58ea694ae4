"""Several sums over the entries of models at once: on one CPU device one loop that reads each model once."""

import functools
import math

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxmerge.params.order._devices import fastest

CHAINS = 8
"""Sums that one loop adds up side by side: an addition waits for the one before it."""
LINE = 1 << 12
"""Entries that one addition after the other adds up."""


def sums(terms: list[Array], axes: tuple[int, ...]) -> list[Array]:
    """The sum of each term (all of one shape) over the axes, which stay with length 1."""

    def apart(*terms):
        return [jnp.sum(term, axis=axes, keepdims=True) for term in terms]

    def together(*terms):  # in the loop along lines of the last axis, else pairwise: no long chain of additions
        add, inner, shape = lambda a, b: [p + q for p, q in zip(a, b, strict=True)], axes[-1], terms[0].shape
        many = 2 if 2 * len(terms) <= CHAINS and shape[inner] % 2 == 0 else 1
        size = shape[inner] // many
        line = math.gcd(size, LINE) if size > LINE else size
        lines = (*shape[:inner], -1, line if line > LINE >> 6 else size, *shape[inner + 1 :])
        parts = [part.reshape(lines) for term in terms for part in jnp.split(term, many, axis=inner)]
        found = lax.optimization_barrier(lax.reduce(parts, [np.float32(0)] * len(parts), add, (inner + 1,)))
        return apart(*(functools.reduce(jnp.add, found[i : i + many]) for i in range(0, len(found), many)))

    return list((fastest(together, apart) if axes and len(terms) > 1 else apart)(*terms))
