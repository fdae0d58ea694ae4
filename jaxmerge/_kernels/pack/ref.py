"""The spec of `pack` in plain XLA."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxmerge import _segments as segments


def pack(
    keep: Bool[Array, "B n"], x: Float[Array, "B n d"], *, capacity: int
) -> tuple[Float[Array, "B c d"], Int[Array, "B c"], Int[Array, "B"]]:
    """The kept rows of x, to the left in their order; the position of each, int32, n in an empty slot; how many are kept.

    Rows beyond the capacity are lost, and counted. Empty slots are 0.
    """
    ids = slots(keep)
    positions = segments.firsts(ids, capacity)
    empty = positions == keep.shape[1]
    packed = segments.fill(empty, segments.take(jnp.where(empty, 0, positions), x), 0)
    return packed, positions, keep.sum(axis=1, dtype=jnp.int32)


def slots(keep: Bool[Array, "B n"]) -> Int[Array, "B n"]:
    """Where each kept row goes; -1 for the others."""
    return jnp.where(keep, jnp.cumsum(keep, axis=1, dtype=jnp.int32) - 1, -1)
