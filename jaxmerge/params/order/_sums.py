"""Several sums over the entries of models at once: on one CPU device one loop that reads each model once."""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxmerge.params.order._devices import fastest


def sums(terms: list[Array], axes: tuple[int, ...]) -> list[Array]:
    """The sum of each term (all of one shape) over the axes, which stay with length 1."""

    def apart(*terms):
        return [jnp.sum(term, axis=axes, keepdims=True) for term in terms]

    def together(*terms):  # along the last axis in the loop, and over the others pairwise: no long chain of additions
        add = lambda a, b: [p + q for p, q in zip(a, b, strict=True)]
        lines = lax.optimization_barrier(lax.reduce(list(terms), [np.float32(0)] * len(terms), add, axes[-1:]))
        return apart(*(jnp.expand_dims(line, axes[-1]) for line in lines))

    return list((fastest(together, apart) if axes and len(terms) > 1 else apart)(*terms))
