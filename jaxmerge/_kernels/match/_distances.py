"""Euclidean distances between the tokens of a row, and rows moved such that no distance between them loses what it need not."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from jaxmerge import _segments as segments


class Distances(NamedTuple):
    """|x_i - x_j| = scale * sqrt(squared[i, j]); inf where either row is not finite, 0 on the diagonal of the others."""

    squared: Float[Array, "n n"]
    scale: Float[Array, ""]


@jax.jit
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


class Moved(NamedTuple):
    """x_i - x_j = scale * (rows_i - rows_j) for all rows that are sound, which is finite; the others are 0."""

    rows: Float[Array, "n d"]
    sound: Bool[Array, "n"]
    scale: Float[Array, ""]


def moved(x: Float[Array, "n d"]) -> Moved:
    """Tokens near the origin, in their own dtype and without a rounding: what a kernel multiplies.

    A feature whose values all lie within a factor of two of their mean, as rounded to the dtype, is shifted by it: such a
    difference is exact (Sterbenz's lemma). Any other is at most three times as large as it is wide, so that its square
    cancels no more than 9 times that width's. Scales are powers of two. So bfloat16 stays bfloat16, whose products are exact.
    """
    dtype, info = x.dtype, jnp.finfo(x.dtype)
    x = x.astype(jnp.float32)
    sound = jnp.isfinite(x).all(axis=-1, keepdims=True)
    count, some = jnp.maximum(jnp.sum(sound), 1).astype(x.dtype), sound.any()
    low = jnp.where(some, jnp.min(jnp.where(sound, x, jnp.inf), axis=0, keepdims=True), 0)
    high = jnp.where(some, jnp.max(jnp.where(sound, x, -jnp.inf), axis=0, keepdims=True), 0)
    mean = jnp.sum(jnp.where(sound, x, 0) / count, axis=0, keepdims=True)
    mean = lax.reduce_precision(mean, info.nexp, info.nmant)  # a cast there and back may be left out
    near = lambda end: (jnp.abs(end) >= jnp.abs(mean) / 2) & (jnp.abs(end) / 2 <= jnp.abs(mean)) & (end * jnp.sign(mean) >= 0)
    mean = jnp.where(near(low) & near(high), mean, 0)
    power, inverse = _power(jnp.max(jnp.maximum(high - mean, mean - low)))
    return Moved((jnp.where(sound, x - mean, 0) * inverse).astype(dtype), sound[:, 0], power)


def _unit_box(x: Float[Array, "n d"]) -> tuple[Float[Array, "n d"], Float[Array, ""]]:
    """x over its largest entry, and that entry."""
    peak = jnp.max(jnp.abs(x), initial=0)
    peak = jnp.where(peak > 0, peak, 1)
    return x / peak, peak


def _power(peak: Float[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The power of two at a number or below it, and its inverse; 1 for 0."""
    _, exponent = jnp.frexp(jnp.where(peak > 0, peak, 1))
    exponent = jnp.clip(exponent - 1, -126, 126)
    return jnp.ldexp(jnp.ones_like(peak), exponent), jnp.ldexp(jnp.ones_like(peak), -exponent)
