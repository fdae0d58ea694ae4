"""What density peaks need of a kernel, by its sweeps over the rows: no n x n matrix stands in memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxmerge import _segments as segments
from jaxmerge._kernels.match._distances import moved
from jaxmerge._kernels.match.ref import log_density
from jaxmerge._rank import ranks


def by_sweeps(
    nearest_k: Callable[..., Array], nearest_ahead: Callable[..., tuple[Array, Array, Array]]
) -> Callable[..., Array]:
    """`ref.peaks` by two sweeps: one for the densities, one for what is denser.

    The second finds who is nearest; how near is then computed of the two rows alone, where nothing cancels: 0 for twins.
    """

    def peaks(
        x: Float[Array, "B n k"],
        ok: Bool[Array, "B n"] | None = None,
        near: Int[Array, "B"] | None = None,
        *,
        count: int,
    ) -> Float[Array, "B n"]:
        """`ref.peaks`."""
        x, ok, scale = _moved(x, ok)
        nearest = jnp.where(ok[..., None], nearest_k(x, x, count=count, b_ok=ok), jnp.inf)
        log_rho = log_density(nearest, near, scale, x.shape[-1])
        place = ranks(log_rho)
        least, at, most = nearest_ahead(x, x, place, place, ok)
        apart = jnp.sum(jnp.square(x.astype(jnp.float32) - segments.take(at, x).astype(jnp.float32)), axis=-1)
        farthest = jnp.max(jnp.where(ok, most, 0), axis=-1, keepdims=True)
        delta = jnp.where(ok & (least < jnp.inf), jnp.minimum(apart, farthest), farthest)
        return log_rho + 0.5 * jnp.log(delta)

    return peaks


def closest(module: Any, most: int, x: Float[Array, "B n k"], chosen: Bool[Array, "B n"]) -> Int[Array, "B n"]:
    """The position of the chosen row that is nearest to each row, by one sweep over the chosen, which are `most` or fewer."""
    x, sound, _ = _moved(x, None)
    n, open_ = x.shape[1], chosen & sound
    at = segments.firsts(jnp.where(open_, jnp.cumsum(open_, axis=-1, dtype=jnp.int32) - 1, -1), most)
    least, index, _ = module.nearest_ahead(x, segments.take(jnp.minimum(at, n - 1), x), None, None, at < n)
    far = jnp.argmax(chosen, axis=-1, keepdims=True).astype(jnp.int32)  # what is not finite is far from all alike
    return jnp.where(sound & (least < jnp.inf), segments.take(index, at), far)


def _moved(x: Array, ok: Array | None) -> tuple[Array, Array, Array]:
    """Rows that can be swept, those that are finite and allowed, and the scale."""
    x, sound, scale = jax.vmap(moved)(x)
    return x, sound if ok is None else ok & sound, scale
