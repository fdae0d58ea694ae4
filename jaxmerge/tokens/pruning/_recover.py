"""Recoverable Compression: how many tokens stand out of the rest is how many to keep; what the text asks for comes back."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import ArrayLike, Bool, Float, Int

from jaxmerge import _segments as segments
from jaxmerge._plan import Plan
from jaxmerge._rank import ranks
from jaxmerge.tokens._checks import check_sequences, python_int
from jaxmerge.tokens.pruning._assign import assign
from jaxmerge.tokens.pruning._prune import keep

OUTLIER = 1.5
"""A local outlier factor above this is an outlier: what scikit-learn calls contamination="auto"."""


def local_outlier_factor(
    points: Float[ArrayLike, "*batch n d"], k: int = 20, *, mask: Bool[Array, "*batch n"] | None = None
) -> Float[Array, "*batch n"]:
    """How much sparser it is around each point than around its k nearest neighbours: about 1 inside, above 1 outside.

    reach(a, b) = max(distance of b to its k-th neighbour, |a - b|); density(a) = 1 / mean reach(a, its neighbours);
    factor(a) = mean density(its neighbours) / density(a).

    Args:
      points: compared in float32. A value that is not finite counts as 0.
      k: neighbours; one fewer than the points where there are not as many. Of equally near ones the first.
      mask: True for points that are there; all by default.

    Returns:
      float32; 1 for a point that is not there or has no neighbour.

    Cost: n² distances and k passes over them: memory is n² whatever k is, and there is no sort.

    Raises:
      ValueError: k below 1, points of rank 1.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> line = jnp.array([0.0, 1.0, 2.0, 3.0, 9.0])[:, None]
      >>> (jm.tokens.local_outlier_factor(line, 2) > 1.5).tolist()
      [False, False, False, False, True]

    Source: Breunig et al., SIGMOD 2000, with exactly k neighbours and 1e-10 in the density, as scikit-learn has it.
    """
    points = jnp.asarray(points)
    if points.ndim < 2 or k < 1:
        raise ValueError(f"local_outlier_factor: expected points (*batch, n, d) and k of 1 or more; got {points.shape}, k={k}.")
    check_sequences("local_outlier_factor", axes=(-2,), points=points)
    check_sequences("local_outlier_factor", mask=mask)
    k = python_int("local_outlier_factor", "k", k)
    there = jnp.ones_like(points[..., 0], bool) if mask is None else mask
    if there.shape != points.shape[:-1]:
        raise ValueError(f"local_outlier_factor: mask must have shape {points.shape[:-1]}, one per point; got {there.shape}.")
    return segments.batched(lambda p, m: _factor(p, m, k), points.ndim - 2)(lax.stop_gradient(points), there)


def recover(
    score: Float[ArrayLike, "*batch n"],
    text: Float[ArrayLike, "*batch n"],
    metric: Float[ArrayLike, "*batch n d"],
    capacity: int,
    *,
    neighbours: int = 20,
    rest: Callable[[Array, Array], Plan] | None = None,
) -> Plan:
    """Keep the tokens of highest score, recover of the others those most like the text, and merge what is left.

    How many: of the n scores a share is outliers (`local_outlier_factor` above 1.5, of the scores as points on a line); that
    share of n tokens is kept. Of the text scores, in which the kept ones count as the lowest, a share is outliers; that share
    of what was not kept is recovered.

    Args:
      score: attention of the class token to each token.
      text: similarity of the question to each token.
      metric: what the rest is merged by; keys.
      capacity: room for kept and recovered; the kept come first, and a row that needs fewer leaves empty slots.
      neighbours: k of the local outlier factor.
      rest: from (metric, mask) to a plan in which the tokens of the mask join segments, such as
        `lambda x, mask: k_means(x, 8, mask=mask)`. Its segments come after the `capacity` others. None: every token of the
        rest joins the kept or recovered one it is most like.

    Law:
      no kept or recovered token shares a segment with another.

    Cost: two local outlier factors of n scalars (n² distances each), n · capacity cosines.

    Raises:
      ValueError: shapes that differ, capacity outside [0, n], a plan of the rest of another shape.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> x = jnp.eye(8)
      >>> even = jnp.linspace(0, 0.1, 8)
      >>> score, text = even.at[2].set(5.0), even.at[jnp.array([5, 6])].set(jnp.array([5.0, 6.0]))
      >>> plan = jm.tokens.recover(score, text, x, 3, neighbours=3, rest=lambda x, mask: jm.Plan(jnp.where(mask, 0, -1), 1))
      >>> plan.segment_ids.tolist(), plan.sizes.tolist()
      ([3, 3, 0, 3, 3, 3, 1, 3], [1, 1, 0, 6])

    Source: Recoverable Compression (arXiv:2409.01179). Its code pools the shares over the batch, sums what it merges with
    attention as weights, and takes the number of merged tokens from the number of kept ones; the last two are choices of `rest`
    and of `merge(weight=)` here.
    """
    score, text, metric = (lax.stop_gradient(jnp.asarray(a)) for a in (score, text, metric))
    check_sequences("recover", score=score, text=text)
    check_sequences("recover", axes=(-2,), metric=metric)
    n = score.shape[-1]
    if metric.ndim < 2 or not score.shape == text.shape == metric.shape[:-1]:
        raise ValueError(
            "recover: expected score and text (*batch, n) and metric (*batch, n, d); "
            f"got {score.shape}, {text.shape} and {metric.shape}."
        )
    if not 0 <= capacity <= n:
        raise ValueError(f"recover: capacity must be between 0 and the number of tokens, {n}; got {capacity}.")
    score, text = _finite(score), _finite(text)
    seen = jnp.minimum(_outliers(score, neighbours), capacity)  # int(n · outliers / n)
    kept = ranks(score) < seen[..., None]
    lowest = text.min(axis=-1, keepdims=True)
    others = jnp.where(kept, lowest, text)
    asked = jnp.minimum((n - seen) * _outliers(others, neighbours) // n, capacity - seen)
    recovered = (ranks(jnp.where(kept, -jnp.inf, text)) < asked[..., None]) & ~kept
    stay = kept | recovered
    if rest is None:
        return assign(metric, stay, capacity)
    plan = rest(metric, ~stay)
    if plan.segment_ids.shape != score.shape:
        raise ValueError(f"recover: rest must return a plan of shape {score.shape}, got {plan.segment_ids.shape}.")
    merged = jnp.where(plan.segment_ids < 0, -1, plan.segment_ids + capacity)
    return Plan(jnp.where(stay, keep(stay, capacity).segment_ids, merged), capacity + plan.num_segments)


def _outliers(score: Float[Array, "*batch n"], k: int) -> Int[Array, "*batch"]:
    """How many of some numbers stand out."""
    return (local_outlier_factor(score[..., None], k) > OUTLIER).sum(axis=-1, dtype=jnp.int32)


def _finite(x: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
    return jnp.where(jnp.isfinite(x), x, 0).astype(jnp.float32)


def _factor(points: Float[Array, "n d"], there: Bool[Array, "n"], k: int) -> Float[Array, "n"]:
    n = len(points)
    p = jnp.where(jnp.isfinite(points), points, 0).astype(jnp.float32)
    # differences, not |a|² + |b|² - 2 a·b: near points are what matters here, and that form cancels between them
    away = jnp.sqrt(jnp.sum(jnp.square(p[:, None] - p[None]), axis=-1))
    pairs = there[:, None] & there[None] & ~jnp.eye(n, dtype=bool)
    away = jnp.where(pairs, away, jnp.inf)

    def nearest(_, state):
        left, near = state
        one = (jnp.arange(n)[None] == left.argmin(axis=-1)[:, None]) & pairs & ~near
        return jnp.where(one, jnp.inf, left), near | one

    _, near = lax.fori_loop(0, min(k, max(n - 1, 1)), nearest, (away, pairs & ~pairs))
    count = near.sum(axis=-1)
    others = jnp.maximum(count, 1).astype(p.dtype)
    radius = jnp.where(near, away, -jnp.inf).max(axis=-1)
    reach = jnp.where(near, jnp.maximum(jnp.where(near, away, 0), radius[None]), 0)
    density = 1 / (reach.sum(axis=-1) / others + 1e-10)
    around = jnp.where(near, density[None], 0).sum(axis=-1) / others
    return jnp.where(there & (count > 0), around / density, 1)
