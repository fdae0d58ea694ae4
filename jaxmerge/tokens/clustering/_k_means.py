"""k-means over the tokens of each row, and how to choose k."""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import ArrayLike, Bool, Float, Int

from jaxmerge import _segments as segments
from jaxmerge._kernels.match._distances import distances
from jaxmerge._plan import Plan
from jaxmerge.tokens._checks import check_rows, checked_sizes, checked_tokens, python_int
from jaxmerge.tokens._nearest import unit
from jaxmerge.tokens.clustering._density import in_order

Init = Literal["farthest", "k-means++", "first"]
Metric = Literal["cosine", "euclidean"]
Criterion = Literal["silhouette", "elbow"]


def k_means(
    x: Float[ArrayLike, "*batch n d"],
    k: int,
    *,
    iterations: int = 10,
    init: Init = "farthest",
    metric: Metric = "cosine",
    key: Array | None = None,
    mask: Bool[ArrayLike, "*batch n"] | None = None,
) -> Plan:
    """Cluster tokens by Lloyd's algorithm: assign to the nearest mean, take means, repeat.

    Args:
      x: tokens. Any floating dtype; compared in float32. A row with NaN or infinity moves no mean.
      k: how many clusters, a Python int.
      iterations: how many times the means move. Static; no early exit.
      init: "farthest" starts at the first token and adds the one that is farthest from those chosen; "k-means++" draws it in
        proportion to the squared distance; "first" takes the first k.
      metric: "cosine" clusters tokens of length 1, "euclidean" as they are.
      key: for "k-means++" alone. Its draws are shared over the batch, so that a row's plan does not depend on its neighbours;
        vmap over keys to draw apart.
      mask: True for tokens that take part. The others belong to no segment.

    Returns:
      A plan of k segments numbered by the first position they hold. A mean that nobody is nearest to stays where it is, and
      if it ends empty its slot is empty, at the end. No gradient flows through it. The codebook is
      merge(plan, unit tokens), the position map plan.segment_ids.

    Law:
      with "euclidean" the sum of squares never rises from one iteration to the next; k_means(x, n) of distinct tokens is the
      identity.

    Raises:
      ValueError: k outside [1, n]; negative iterations; unknown init or metric; "k-means++" without a key, another with one.
      TypeError: k is not a Python int.

    Cost: n k d multiply-adds for each of the 2 iterations + 1 products, and k passes over the tokens to start.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [3.0, 0.2], [0.1, 2.0]])
      >>> jm.tokens.k_means(x, 2).segment_ids.tolist()
      [0, 1, 0, 1]

    Source: VQToken (arXiv:2503.16980): cosine, "k-means++"; its codes are means of normalised tokens.
    """
    x = checked_tokens("k_means", x)
    check_rows("k_means", x, mask=mask)
    n = x.shape[-2]
    k = python_int("k_means", "k", k)
    if not 1 <= k <= n:
        raise ValueError(f"k_means: k must be between 1 and the number of tokens, {n}; got {k}.")
    if iterations < 0:
        raise ValueError(f"k_means: iterations must be 0 or more, got {iterations}.")
    if init not in ("farthest", "k-means++", "first"):
        raise ValueError(f'k_means: init must be "farthest", "k-means++" or "first", got {init!r}.')
    if (init == "k-means++") != (key is not None):
        raise ValueError(f'k_means: a key goes with init="k-means++", and with it alone; got init={init!r}, key={key}.')
    x = lax.stop_gradient(_space(x, metric))
    valid = jnp.ones_like(x[..., 0], bool) if mask is None else jnp.asarray(mask) & jnp.ones_like(x[..., 0], bool)
    draws = jnp.zeros((k, n)) if key is None else jax.random.gumbel(key, (k, n))

    def row(x, valid):
        sound = jnp.isfinite(x).all(axis=-1)
        x = jnp.where(sound[:, None], x, 0)
        if metric == "euclidean":  # centred: the cancellation in |c|² - 2 x·c grows with the distance from the origin
            weight = (valid & sound).astype(x.dtype)[:, None]
            x = jnp.where(sound[:, None], x - (jnp.sum(x * weight, axis=0) / jnp.maximum(weight.sum(), 1))[None, :], 0)
            peak = jnp.max(jnp.abs(x))
            x = x / jnp.where(peak > 0, peak, 1)
        member = (valid & sound).astype(x.dtype)
        means, _ = lax.scan(
            lambda c, _: (_move(x, c, member, metric), None), x[_seeds(x, valid & sound, draws, init)], length=iterations
        )
        return jnp.where(valid, _assign(x, means, metric), -1)

    return in_order(Plan(segments.batched(row, x.ndim - 2)(x, valid), k))


def adaptive_k_means(
    x: Float[ArrayLike, "*batch n d"],
    ks: Sequence[int],
    *,
    criterion: Criterion = "silhouette",
    iterations: int = 10,
    init: Init = "farthest",
    metric: Metric = "cosine",
    key: Array | None = None,
) -> Plan:
    """k-means with the best k of a static range, each row its own.

    Args:
      ks: the candidates, increasing.
      criterion: "silhouette" takes the largest mean silhouette; "elbow" the k whose sum of squares lies farthest below the
        line from the first to the last candidate's. Of equal ones the smallest k wins.
      x, iterations, init, metric, key: see `k_means`.

    Returns:
      A plan with room for max(ks) segments; those that a row does not use are empty, at the end.

    Raises:
      ValueError: no candidates, or not increasing; an unknown criterion.

    Cost: one k-means of max(ks) for each candidate, and n² d multiply-adds for the silhouette.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.1], [1.0, 0.1], [0.1, 1.0], [-1.0, 0.0]])
      >>> plan = jm.tokens.adaptive_k_means(x, range(2, 6))
      >>> plan.segment_ids.tolist(), plan.num_segments
      ([0, 1, 2, 0, 1, 2], 5)

    Source: VQToken's adaptive K (arXiv:2503.16980), in 12 to 20. Its "silhouette" ignores the labels, so that it always takes
    the first K tried; ours is the definition (Rousseeuw 1987), and the elbow's rule is ours.
    """
    ks = list(checked_sizes("adaptive_k_means", "ks", ks))
    if ks != sorted(set(ks)):
        raise ValueError(f"adaptive_k_means: ks must be increasing candidates, at least one; got {ks}.")
    if criterion not in ("silhouette", "elbow"):
        raise ValueError(f'adaptive_k_means: criterion must be "silhouette" or "elbow", got {criterion!r}.')
    x, most = jnp.asarray(x), ks[-1]
    plans = [k_means(x, k, iterations=iterations, init=init, metric=metric, key=key).segment_ids for k in ks]
    if criterion == "silhouette":
        gain = [silhouette(x, Plan(ids, most), metric=metric) for ids in plans]
    else:
        loss = [inertia(x, Plan(ids, most), metric=metric) for ids in plans]
        share = [(k - ks[0]) / max(ks[-1] - ks[0], 1) for k in ks]
        gain = [loss[0] + s * (loss[-1] - loss[0]) - mine for s, mine in zip(share, loss, strict=True)]
    best, ids = gain[0], plans[0]
    for better, other in zip(gain[1:], plans[1:], strict=True):
        ids = jnp.where((better > best)[..., None], other, ids)
        best = jnp.maximum(best, better)
    return Plan(ids, most)


def silhouette(x: Float[ArrayLike, "*batch n d"], plan: Plan, *, metric: Metric = "cosine") -> Float[Array, "*batch"]:
    """How well tokens sit in their groups, from -1 to 1: the mean of (b - a) / max(a, b).

    a is a token's mean distance to the others of its group, b that to the nearest other group; tokens alone count 0.

    Args:
      x: tokens. plan: their groups. metric: "cosine" measures between tokens of length 1.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> x, plan = jnp.array([[0.0], [0.0], [1.0], [1.0]]), jm.Plan(jnp.array([0, 0, 1, 1]), 2)
      >>> jm.tokens.silhouette(x, plan, metric="euclidean").item()
      1.0

    Source: Rousseeuw (1987), as scikit-learn's `silhouette_score`.
    """
    x = lax.stop_gradient(_grouped("silhouette", x, plan, metric))
    m = plan.num_segments

    def row(x, ids):
        dist = jnp.minimum(jnp.sqrt(distances(x).squared), jnp.finfo(jnp.float32).max / (len(x) + 1))
        member = jax.nn.one_hot(ids, m, dtype=jnp.float32)  # (n, m)
        size = member.sum(axis=0)[None, :]
        total = segments.matmul(dist, member)
        own = jnp.sum(total * member, axis=-1) / jnp.maximum(jnp.sum(size * member, axis=-1) - 1, 1)
        other = jnp.where((member > 0) | (size == 0), jnp.inf, total / jnp.maximum(size, 1)).min(axis=-1)
        counts = (jnp.sum(size * member, axis=-1) > 1) & jnp.isfinite(other)
        larger = jnp.where(counts, jnp.maximum(own, other), 1)
        score = jnp.where(counts, other - own, 0) / jnp.where(larger > 0, larger, 1)
        return score.sum() / jnp.maximum(member.sum(), 1)

    return segments.batched(row, x.ndim - 2)(x, plan.segment_ids)


def inertia(x: Float[ArrayLike, "*batch n d"], plan: Plan, *, metric: Metric = "cosine") -> Float[Array, "*batch"]:
    """The sum of squared distances of tokens to the mean of their group; with "cosine", of tokens of length 1.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.tokens.inertia(jnp.array([[0.0], [2.0], [5.0]]), jm.Plan(jnp.array([0, 0, 1]), 2), metric="euclidean").item()
      2.0
    """
    x = _grouped("inertia", x, plan, metric)

    def row(x, ids):
        member = jax.nn.one_hot(ids, plan.num_segments, axis=0, dtype=jnp.float32)
        mean = segments.matmul(member, x) / jnp.maximum(member.sum(axis=1), 1)[:, None]
        return jnp.sum(((x - segments.matmul(member.T, mean)) * member.sum(axis=0)[:, None]) ** 2)

    return segments.batched(row, x.ndim - 2)(x, plan.segment_ids)


def _grouped(name: str, x: ArrayLike, plan: Plan, metric: Metric) -> Float[Array, "*batch n d"]:
    """The tokens of a plan, as the metric sees them."""
    x = checked_tokens(name, x)
    if x.shape[:-1] != plan.segment_ids.shape:
        raise ValueError(f"{name}: x must be the plan's tokens, {(*plan.segment_ids.shape, 'd')}; got {x.shape}.")
    return _space(x, metric)


def _space(x: Float[Array, "*batch n d"], metric: Metric) -> Float[Array, "*batch n d"]:
    """The tokens as the metric sees them, in float32."""
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f'k-means: metric must be "cosine" or "euclidean", got {metric!r}.')
    return unit(x) if metric == "cosine" else x.astype(segments.accumulator(x.dtype))


def _seeds(x: Float[Array, "n d"], valid: Bool[Array, "n"], draws: Float[Array, "k n"], init: Init) -> Int[Array, "k"]:
    """The tokens that the means start from."""
    if init == "first":
        place = jnp.cumsum(valid, dtype=jnp.int32) - 1
        slot = jnp.where(valid, place, len(x))
        return jnp.argmax(slot[None, :] == jnp.arange(len(draws))[:, None], axis=-1)

    def step(nearest, draw):
        weight = jnp.where(jnp.isinf(nearest), 0, jnp.log(nearest)) + draw if init == "k-means++" else nearest
        at = jnp.argmax(jnp.where(valid, weight, -jnp.inf))
        away = jnp.sum((x - x[at][None, :]) ** 2, axis=-1)
        return jnp.minimum(nearest, away), at

    return lax.scan(step, jnp.full_like(x[:, 0], jnp.inf), draws)[1]


def _assign(x: Float[Array, "n d"], means: Float[Array, "k d"], metric: Metric) -> Int[Array, "n"]:
    """The nearest mean of each token; of equal ones the first."""
    if metric == "cosine":
        return jnp.argmax(segments.matmul(x, unit(means).T), axis=-1).astype(jnp.int32)
    square = jnp.sum(means * means, axis=-1)
    return jnp.argmin(square[None, :] - 2 * segments.matmul(x, means.T), axis=-1).astype(jnp.int32)


def _move(x: Float[Array, "n d"], means: Float[Array, "k d"], weight: Float[Array, "n"], metric: Metric) -> Float[Array, "k d"]:
    """Each mean goes to the middle of those who are nearest to it, or stays."""
    member = jax.nn.one_hot(_assign(x, means, metric), len(means), axis=0, dtype=x.dtype) * weight[None, :]
    mass = member.sum(axis=-1)[:, None]
    return jnp.where(mass > 0, segments.matmul(member, x) / jnp.maximum(mass, 1), means)
