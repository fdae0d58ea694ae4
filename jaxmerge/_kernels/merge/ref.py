"""The spec of `merge` and `unmerge` in plain XLA: one linear map and its transpose."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxmerge import _segments as segments


def merge(
    ids: Int[Array, "B n"], x: Float[Array, "B n d"], weight: Float[Array, "B n"] | None = None, *, m: int, mean: bool
) -> tuple[Float[Array, "B m d"], Float[Array, "B m"]]:
    """y_s = sum w_i x_i over the positions i of segment s, over its mass sum w_i where `mean`; and the mass, float32.

    Accumulated in float32, returned in x's dtype. Ids outside [0, m) are dropped, whatever x holds there; a segment without
    mass is 0.
    """
    inside = (ids >= 0) & (ids < m)
    w = jnp.where(inside, 1.0 if weight is None else weight, 0.0).astype(jnp.float32)
    mass = segments.sums(ids, m, w)
    empty = mass == 0
    if not mean:
        return segments.sums(ids, m, x, None if weight is None else w).astype(x.dtype), mass
    filled = jnp.where(inside & ~segments.take(jnp.where(inside, ids, 0), empty), ids, -1)
    y = segments.sums(filled, m, x, None if weight is None else w, 1 / jnp.where(empty, 1, mass))
    return y.astype(x.dtype), mass


def unmerge(
    ids: Int[Array, "B n"],
    y: Float[Array, "B m d"],
    before: Float[Array, "B m"] | None = None,
    after: Float[Array, "B n"] | None = None,
) -> Float[Array, "B n d"]:
    """x_i = after_i before_s y_s, where s is the segment of position i; 0 where it has none. The products are in float32."""
    inside = (ids >= 0) & (ids < y.shape[1])
    x = segments.times(segments.take(jnp.where(inside, ids, 0), segments.times(y, before)), after)
    return segments.fill(~inside, x.astype(y.dtype), 0)
