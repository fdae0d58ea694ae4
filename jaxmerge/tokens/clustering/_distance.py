"""Euclidean distances between the tokens of a row, and the few smallest numbers of each row, without a sort."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxmerge import _segments as segments
from jaxmerge._kernels.match.ref import smallest as smallest


class Distances(NamedTuple):
    """|x_i - x_j| = scale * sqrt(squared[i, j]); inf where either row is not finite, 0 on the diagonal of the others."""

    squared: Float[Array, "n n"]
    scale: Float[Array, ""]


def distances(x: Float[Array, "n d"]) -> Distances:
    """All squared distances, in float32, as |a|² + |b|² - 2 a·b of the centred tokens.

    Centred, because the cancellation grows with the distance from the origin; in units of the largest entry, so that no
    square overflows or vanishes. |a|² is read off the diagonal of the product: then twins are at distance 0 exactly.
    """
    x = x.astype(segments.accumulator(x.dtype))
    sound = jnp.isfinite(x).all(axis=-1)
    x, far = _unit_box(jnp.where(sound[:, None], x, 0))
    mean = jnp.sum(x, axis=0) / jnp.maximum(jnp.sum(sound), 1).astype(x.dtype)
    x, near = _unit_box(jnp.where(sound[:, None], x - mean[None, :], 0))
    product = segments.matmul(x, x.T)
    length = jnp.diagonal(product)
    squared = jnp.maximum(length[:, None] + length[None, :] - 2 * product, 0)
    return Distances(jnp.where(sound[:, None] & sound[None, :], squared, jnp.inf), far * near)


def _unit_box(x: Float[Array, "n d"]) -> tuple[Float[Array, "n d"], Float[Array, ""]]:
    """x over its largest entry, and that entry."""
    peak = jnp.max(jnp.abs(x), initial=0)
    peak = jnp.where(peak > 0, peak, 1)
    return x / peak, peak
