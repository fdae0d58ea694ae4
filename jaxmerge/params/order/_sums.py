"""Several sums over the entries of models at once: on one CPU device one loop that reads each model once."""

import functools

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxmerge.params.order._devices import fastest

CHAINS = 8
"""Sums that one loop adds up side by side: an addition waits for the one before it."""


def sums(terms: list[Array], axes: tuple[int, ...]) -> list[Array]:
    """The sum of each term (all of one shape) over the axes, which stay with length 1."""

    def apart(*terms):
        return [jnp.sum(term, axis=axes, keepdims=True) for term in terms]

    def together(*terms):  # along the last axis in the loop, and over the others pairwise: no long chain of additions
        add = lambda a, b: [p + q for p, q in zip(a, b, strict=True)]
        inner, many = axes[-1], 2 if 2 * len(terms) <= CHAINS and terms[0].shape[axes[-1]] % 2 == 0 else 1
        parts = [part for term in terms for part in jnp.split(term, many, axis=inner)]
        lines = lax.optimization_barrier(lax.reduce(parts, [np.float32(0)] * len(parts), add, (inner,)))
        whole = [functools.reduce(jnp.add, lines[i : i + many]) for i in range(0, len(lines), many)]
        return apart(*(jnp.expand_dims(line, inner) for line in whole))

    return list((fastest(together, apart) if axes and len(terms) > 1 else apart)(*terms))
