"""What attention on Hopper and its gradient share: sizes of tiles, and arguments made ready for the copy engine."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

TILE = 64
"""Queries of a thread, keys of a tile."""
STAGES = 16
"""Tiles of keys, and as many of values, that a ring holds at most: a kernel can have 32 barriers of a kind."""
LOG2E = math.log2(math.e)
LEAST = -1e38
"""What a masked key is worth: finite, so that a query that sees no key is the mean of all values, as in the reference."""


def operands(
    q: Float[Array, "B t *three h f"], k: Float[Array, "B s g f"] | None, v: Float[Array, "B s g f"] | None, length: int | None
) -> tuple[tuple[Array, Array, Array], tuple[int, int, int], int, int, int]:
    """Queries, keys and values as (B, rows, heads, f), heads before the first of each, and how many queries, keys and heads of
    keys there are. From a product that holds all three they are read where they lie."""
    B, n, *_, h, f = q.shape
    if k is None or v is None:
        q, n = whole(q.reshape(B, n, 3 * h, f)), n if length is None else length
        return (q, q, q), (0, h, 2 * h), n, n, h
    return (whole(q), whole(k), whole(v)), (0, 0, 0), n, k.shape[1], k.shape[2]


def whole(x: Float[Array, "B n h f"]) -> Float[Array, "B eights h f"]:
    """x with rows in eights, as they are laid out on chip: a copy, unless it is so already."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, 0)))


def base_two(bias: Float[Array, "B s"] | None, s: int) -> Float[Array, "_ tiles"] | None:
    """The bias of s keys to base 2, for whole tiles: no weight behind the last key."""
    behind = ((0, 0), (0, -s % TILE))
    if bias is None:  # a constant: nothing to compute
        return jnp.asarray(np.pad(np.zeros((1, s), np.float32), behind, constant_values=-np.inf)) if s % TILE else None
    return jnp.pad(jnp.maximum(bias[:, :s].astype(jnp.float32) * LOG2E, LEAST), behind, constant_values=-jnp.inf)


def from_largest(bias: Float[Array, "_ tiles"] | None) -> tuple[Float[Array, "_ tiles"] | None, Float[Array, "_"] | None]:
    """The bias counted from its largest down, which changes no weight, and 0 for rows where all keys are masked, else 1.

    So the logarithm of what all keys weigh is a number that holds its digits; in a row where all are masked scores count for
    nothing, as beside `LEAST` they would.
    """
    if bias is None:
        return None, None
    largest = jnp.max(bias, axis=1)
    return bias - largest[:, None], (largest > LEAST).astype(jnp.float32)
