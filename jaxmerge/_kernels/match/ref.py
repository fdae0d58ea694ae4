"""The spec of `match` in plain XLA."""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from jaxmerge import _segments as segments
from jaxmerge._kernels.match._distances import distances
from jaxmerge._rank import ranks

AT_ONCE = 256
"""Queries whose scores stand in memory at the same time: few enough for a cache, many enough for the matrix unit."""

Kernel = Literal["shifted", "paper", "gaussian"]


def match(
    a: Float[Array, "B n k"],
    b: Float[Array, "B m k"],
    *,
    a_ok: Bool[Array, "#B n"] | None = None,
    b_ok: Bool[Array, "#B m"] | None = None,
    window: int | None = None,
) -> tuple[Float[Array, "B n"], Int[Array, "B n"]]:
    """The largest cosine of each query with an allowed key, float32, and the first key that has it, int32.

    Query i may look at key j where a_ok[i], b_ok[j] and |i - j| <= window; one that may look at none has -inf, 0. A row
    without a direction (zero, inf, NaN) has similarity 0 to every other.
    """
    n, m = a.shape[1], b.shape[1]
    mask = None
    if a_ok is not None or b_ok is not None or window is not None:
        mask = jnp.ones((1, n, m), bool)
        mask = mask if a_ok is None else mask & a_ok[:, :, None]
        mask = mask if b_ok is None else mask & b_ok[:, None, :]
        if window is not None:
            mask &= (jnp.abs(jnp.arange(n)[:, None] - jnp.arange(m)[None, :]) <= window)[None]
        mask = jnp.broadcast_to(mask, (a.shape[0], n, m))
    similarity, index = jax.vmap(search, (0, 0, None if mask is None else 0))(unit(a), unit(b), mask)
    return similarity, jnp.where(similarity > -jnp.inf, index, 0)


def energy(
    a: Float[Array, "B n k"], b: Float[Array, "B m k"], *, margin: float, kernel: Kernel = "shifted", alpha: float = 1.0
) -> Float[Array, "B n"]:
    """sum_j f(cos(a_i, b_j)), float32, with PiToMe's f: see `tokens.energy`."""
    return resemblance(cosine(a, b), margin, kernel, alpha).sum(axis=-1)


def nearest_k(
    a: Float[Array, "B n k"], b: Float[Array, "B m k"], *, count: int, b_ok: Bool[Array, "#B m"] | None = None
) -> Float[Array, "B n count"]:
    """The `count` smallest squared distances of each query to an allowed key, in order, float32; inf where there are fewer.

    |a_i|² + |b_j|² - 2 a_i·b_j, at least 0: centre the rows first, because the cancellation grows with their length.
    """
    squared = _squared(a, b)
    squared = squared if b_ok is None else jnp.where(b_ok[:, None, :], squared, jnp.inf)
    return smallest(squared, count)


def nearest_ahead(
    a: Float[Array, "B n k"],
    b: Float[Array, "B m k"],
    a_place: Int[Array, "B n"] | None = None,
    b_place: Int[Array, "B m"] | None = None,
    b_ok: Bool[Array, "B m"] | None = None,
) -> tuple[Float[Array, "B n"], Int[Array, "B n"], Float[Array, "B n"]]:
    """Of each query the least squared distance to an allowed key ahead of it, inf where there is none; the first key that has
    it, or else 0; and the largest squared distance to any allowed key, -inf where there is none. Rows must be finite.

    Key j is ahead of query i where b_place[j] < a_place[i], places being below 2^24; all are where no places are given.
    """
    squared = _squared(a, b)
    allowed = jnp.ones((1, 1, b.shape[1]), bool) if b_ok is None else b_ok[:, None, :]
    farthest = jnp.max(jnp.where(allowed, squared, -jnp.inf), axis=-1)
    if a_place is not None and b_place is not None:
        allowed = allowed & (b_place[:, None, :] < a_place[:, :, None])
    squared = jnp.where(allowed, squared, jnp.inf)
    return jnp.min(squared, axis=-1), jnp.argmin(squared, axis=-1).astype(jnp.int32), farthest


def peaks(
    x: Float[Array, "B n k"], ok: Bool[Array, "B n"] | None = None, near: Int[Array, "B"] | None = None, *, count: int
) -> Float[Array, "B n"]:
    """log(rho delta) of each allowed row, up to one constant for all of them: see `tokens.density_centers`.

    Densities look at the `near` nearest rows, at most `count`, which is also what None means. -inf for the second of twins.
    """
    return jax.vmap(partial(peak_scores, count=count))(x, ok, near)


@partial(jax.jit, static_argnames="count")
def peak_scores(x: Float[Array, "n k"], ok: Bool[Array, "n"] | None, near: Int[Array, ""] | None, *, count: int) -> Array:
    """`peaks` of one row of the batch, by all its distances."""
    squared, scale = distances(x)
    squared = squared if ok is None else jnp.where(ok[None, :] & ok[:, None], squared, jnp.inf)
    log_rho = log_density(smallest(squared, count), near, scale, x.shape[-1])
    place = ranks(log_rho)
    denser = place[None, :] < place[:, None]
    farthest = jnp.max(jnp.where(jnp.isfinite(squared), squared, 0))
    delta = jnp.minimum(jnp.min(jnp.where(denser, squared, jnp.inf), axis=-1), farthest)
    return log_rho + 0.5 * jnp.log(delta)


@partial(jax.jit, static_argnames="k")
def log_density(
    nearest: Float[Array, "*batch n count"], near: Int[Array, "*batch"] | None, scale: Float[Array, "*batch"], k: int
) -> Float[Array, "*batch n"]:
    """Of the nearest squared distances, in order, the log density of rows with k features; -inf where all are inf."""
    used = jnp.isfinite(nearest)
    if near is not None:
        used &= lax.broadcasted_iota(jnp.int32, nearest.shape, nearest.ndim - 1) < near[..., None, None]
    mean = jnp.sum(jnp.where(used, nearest, 0), axis=-1) / jnp.maximum(jnp.sum(used, axis=-1), 1).astype(nearest.dtype)
    return jnp.where(used.any(axis=-1), -((scale[..., None] * jnp.sqrt(mean / k)) ** 2), -jnp.inf)


def resemblance(
    w: Float[Array, "..."], margin: float, kernel: Kernel, alpha: float, expm1: Callable[[Array], Array] = jnp.expm1
) -> Float[Array, "..."]:
    """PiToMe's f of a cosine w; kernels bring an expm1 that their compiler knows."""
    if kernel == "gaussian":
        s = 1 - margin
        return jnp.exp(-(((1 - w) / s) ** 2) / 2) / (s * math.sqrt(2 * math.pi))
    below = alpha * expm1(jnp.minimum(w - margin, 0))
    return jnp.where(w > margin, w - margin, below) if kernel == "shifted" else jnp.where(w >= margin, w, below)


@jax.jit
def search(queries: Float[Array, "n d"], keys: Float[Array, "m d"], mask: Bool[Array, "n m"] | None) -> tuple[Array, Array]:
    """For each unit query the largest cosine, and the first key that has it.

    Many queries are taken some at a time, so that their scores are still near when they are read again. Keys come first in
    the scores, so that both reductions run over whole vectors of queries; an arg-max runs over single numbers.
    """

    def best(some):
        queries, mask = some
        score = segments.matmul(keys, queries.T)
        if mask is not None:
            score = jnp.where(mask.T, score, -jnp.inf)
        highest = score.max(axis=0)
        position = lax.broadcasted_iota(jnp.int32, score.shape, 0)
        return highest, jnp.min(jnp.where(score == highest[None, :], position, len(keys)), axis=0)

    n = len(queries)
    if n <= 2 * AT_ONCE:
        return best((queries, mask))
    rounds = -(-n // AT_ONCE)
    split = lambda x: jnp.pad(x, ((0, -n % rounds), (0, 0))).reshape(rounds, -1, x.shape[-1])
    found = lax.map(best, jax.tree.map(split, (queries, mask)))
    return jax.tree.map(lambda x: x.reshape(-1)[:n], found)


@jax.jit
def cosine(a: Float[Array, "*batch n d"], b: Float[Array, "*batch m d"]) -> Float[Array, "*batch n m"]:
    """All cosines, in float32: "highest", because one bfloat16 pass would order near-equal pairs unlike other machines."""
    return segments.matmul(unit(a), jnp.swapaxes(unit(b), -1, -2))


@jax.jit
def unit(x: Float[Array, "*batch n d"]) -> Float[Array, "*batch n d"]:
    """Rows of length 1, in float32. Scaled by their largest entry first, so that no square overflows or vanishes."""
    x = x.astype(segments.accumulator(x.dtype))
    peak = jnp.abs(x).max(axis=-1, keepdims=True)
    sound = (peak > 0) & jnp.isfinite(peak)
    x = jnp.where(sound, x / jnp.where(sound, peak, 1), 0)
    return x / jnp.sqrt(jnp.where(sound, jnp.sum(x * x, axis=-1, keepdims=True), 1))  # the root of 0 has no gradient


def _squared(a: Float[Array, "B n k"], b: Float[Array, "B m k"]) -> Float[Array, "B n m"]:
    """All squared distances."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    length = lambda x: jnp.sum(x * x, axis=-1)
    squared = length(a)[:, :, None] + length(b)[:, None, :] - 2 * segments.matmul(a, jnp.swapaxes(b, 1, 2))
    return jnp.maximum(squared, 0)


@partial(jax.jit, static_argnames="k")
def smallest(x: Float[Array, "*batch n"], k: int) -> Float[Array, "*batch k"]:
    """The k smallest numbers of each row, in order: k passes of a minimum, for the small k of neighbourhoods.

    Law:
      smallest(x, k) = sort(x)[..., :k] where nothing is NaN.
    """

    def step(left, _):
        at = jnp.argmin(left, axis=-1)
        here = lax.broadcasted_iota(at.dtype, left.shape, left.ndim - 1)
        return jnp.where(here == at[..., None], jnp.inf, left), jnp.min(left, axis=-1)

    return jnp.moveaxis(lax.scan(step, x, length=k)[1], 0, -1)
