"""Sums that travel as integers: a float32 number at its exponent; such numbers add up exactly, in any order."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import ArrayLike, Float, UInt32

EXPONENTS = 256
LINE = 1024
"""Entries that are added up in float32 before the rest: a long chain of additions loses what is small."""


def square_sums(x: Float[Array, "k *shape"]) -> UInt32[Array, "k 256"]:
    """The sum of squares of each x[k], as whole numbers of 24 bits in the column of their exponent.

    Law:
      Columns of up to 256 blocks add up without overflow, to what their sums add up to.

    Example:
      >>> import jax.numpy as jnp
      >>> counts = square_sums(jnp.array([[3.0, 4.0], [0.0, 1e-3]]))
      >>> as_floats(counts + counts).round(9).tolist()
      [50.0, 2e-06]
    """
    lines = jnp.square(x).reshape(len(x), -1)
    if lines.shape[1] % LINE == 0:
        lines = lax.optimization_barrier(jnp.sum(lines.reshape(len(x), -1, LINE), axis=2))
    bits = lax.bitcast_convert_type(jnp.sum(lines, axis=1), jnp.uint32)
    exponent, fraction = bits >> 23, bits & 0x7FFFFF
    whole = jnp.where(exponent > 0, fraction | 0x800000, fraction)
    return jnp.where(jnp.arange(EXPONENTS)[None] == exponent[:, None], whole[:, None], 0).astype(jnp.uint32)


def as_floats(counts: ArrayLike) -> np.ndarray:
    """What such columns come to, float64; inf where one of the numbers was none."""
    counts = np.asarray(counts)
    weights = [math.ldexp(1.0, max(e, 1) - 150) for e in range(EXPONENTS - 1)]
    sums = counts[:, :-1].astype(np.float64) @ np.array(weights)
    return np.where(counts[:, -1] > 0, np.inf, sums)
