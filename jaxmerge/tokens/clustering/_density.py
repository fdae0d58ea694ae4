"""Density-peak clustering with k nearest neighbours (DPC-KNN): centres are dense and far from anything denser."""

from functools import partial
from typing import Literal

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import ArrayLike, Bool, Float, Int

from jaxmerge import _segments as segments
from jaxmerge._kernels import match as kernels
from jaxmerge._kernels._dispatch import Implementation
from jaxmerge._kernels.match._distances import distances
from jaxmerge._kernels.match.ref import peak_scores
from jaxmerge._plan import Plan, from_parents
from jaxmerge._rank import ranks
from jaxmerge.tokens._checks import (
    check_plan,
    check_rows,
    check_sequences,
    checked_capacity,
    checked_tokens,
    python_int,
    spreads,
)

Order = Literal["first", "center"]


def density_peaks(
    x: Float[ArrayLike, "*batch n d"],
    k: int,
    *,
    neighbors: int = 5,
    mask: Bool[ArrayLike, "*batch n"] | None = None,
    order: Order = "first",
    implementation: Implementation | None = None,
) -> Plan:
    """Cluster tokens around the k density peaks: `nearest_center(x, density_centers(x, k), k)`.

    Args:
      x: tokens. Any floating dtype; distances are taken in float32.
      k: how many clusters, a Python int.
      neighbors: how many nearest tokens, itself included, a density looks at.
      mask: True for tokens that take part. The others belong to no segment.
      order: number segments by the "first" position they hold, or by the position of their "center".
      implementation: see `nearest`; in a kernel no distance between two tokens reaches memory.

    Returns:
      A plan of k segments, every one with a centre if that many tokens take part. No gradient flows through it.

    Law:
      density_peaks(x, n) is the identity; shifting and rotating all tokens changes nothing.

    Raises:
      ValueError, TypeError: see `density_centers`.

    Cost: n² d multiply-adds once, and `neighbors` passes over n²; in a kernel n² d twice and n k d once.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> x = jnp.array([[0.0], [0.1], [5.0], [0.2], [5.1]])
      >>> jm.tokens.density_peaks(x, 2, neighbors=2).segment_ids.tolist()
      [0, 0, 1, 0, 1]

    Source: DPC-KNN (Du, Ding, Jia 2016) as in Chat-UniVi (arXiv:2311.08046) and PPE, whose segments come in the order of the
    centres' scores, and HoliTom (arXiv:2505.21334), whose come in the order of the centres' positions.
    """
    centers = density_centers(x, k, neighbors=neighbors, mask=mask, implementation=implementation)
    most = python_int("density_peaks", "k", k)
    return clusters(x, centers, k, mask=mask, order=order, implementation=implementation, most=most)


def density_centers(
    x: Float[ArrayLike, "*batch n d"],
    k: int,
    *,
    neighbors: int = 5,
    mask: Bool[ArrayLike, "*batch n"] | None = None,
    count: Int[Array, "*batch"] | None = None,
    implementation: Implementation | None = None,
) -> Bool[Array, "*batch n"]:
    """The k tokens of largest density times distance to the next denser one.

        dist_ij = |x_i - x_j| / sqrt(d)
        rho_i   = exp(-mean of dist_ij² over the nearest tokens j, itself included)
        delta_i = min dist_ij over denser j; the largest distance of all for the densest
        centres = top k of rho · delta

    Of equal densities the first position counts as denser, and of equal scores the first wins, so twins do not both become
    centres; the official codes add random noise of 1e-6 to rho instead. Products are compared as logarithms: where exp
    underflows (tokens far apart), ours still tells densities apart.

    Args:
      x: tokens. A row with NaN or infinity is far from all and becomes a centre last.
      k: how many centres at most, a Python int.
      neighbors: how many nearest tokens, itself included.
      mask: True for tokens that take part.
      count: how many centres each row gets, at most k: for budgets that depend on the data. Densities then look at no more
        neighbours than there are centres, as HoliTom's do. None is k.
      implementation: see `nearest`. A kernel takes distances between the tokens as they are, but for a shift and a scale that
        round nothing; the distance to the next denser one is that of the two tokens themselves.

    Returns:
      True at the centres: k of them, or as many as take part.

    Raises:
      ValueError: k outside [0, n], neighbors outside [1, n]; the implementation cannot run here (all reasons are named).
      TypeError: k is not a Python int.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.tokens.density_centers(jnp.array([[0.0], [0.1], [5.0], [0.2], [5.1]]), 2, neighbors=2).tolist()
      [True, False, True, False, False]

    Source: see `density_peaks`.
    """
    x = checked_tokens("density_centers", x)
    check_rows("density_centers", x, mask=mask)
    *batch, n, _ = x.shape
    k, neighbors = python_int("density_centers", "k", k), python_int("density_centers", "neighbors", neighbors)
    if not 0 <= k <= n:
        raise ValueError(f"density_centers: k must be between 0 and the number of tokens, {n}; got {k}.")
    if not 1 <= neighbors <= max(n, 1):
        raise ValueError(f"density_centers: neighbors must be between 1 and the number of tokens, {n}; got {neighbors}.")
    x = lax.stop_gradient(x)
    if n == 0:
        return jnp.zeros((*batch, 0), bool)
    everyone = _everyone(x)
    allowed = None if mask is None else jnp.asarray(mask) & everyone
    near = None if count is None else jnp.clip(count, 1, neighbors) + jnp.sum(~everyone, axis=-1, dtype=jnp.int32)
    xla = lambda: segments.batched(partial(peak_scores, count=neighbors), len(batch))(x, allowed, near)
    score = kernels.peaks(x, allowed, near, count=neighbors, implementation=implementation, xla=xla)
    valid = everyone if allowed is None else allowed
    score = jnp.where(valid, jnp.maximum(score, jnp.finfo(score.dtype).min), -jnp.inf)
    return valid & (ranks(score) < (k if count is None else jnp.minimum(count, k)[..., None]))


def nearest_center(
    x: Float[ArrayLike, "*batch n d"],
    centers: Bool[ArrayLike, "*batch n"],
    k: int,
    *,
    mask: Bool[ArrayLike, "*batch n"] | None = None,
    order: Order = "first",
    implementation: Implementation | None = None,
) -> Plan:
    """Each token joins the centre that is nearest; a centre stays with itself.

    Args:
      x: tokens, compared by Euclidean distance in float32.
      centers: True at the centres.
      k: room for that many; the clusters of further centres are counted by `overflow`.
      mask: True for tokens that take part.
      order: number segments by the "first" position they hold, or by the position of their "center".
      implementation: see `density_peaks`.

    Returns:
      A plan of k segments. Of equally near centres the first wins. No gradient flows through it.

    Raises:
      ValueError: another order; the implementation cannot run here (all reasons are named).

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> x, centers = jnp.array([[5.0], [0.0], [4.0], [1.0]]), jnp.array([False, True, True, False])
      >>> jm.tokens.nearest_center(x, centers, 2).segment_ids.tolist()
      [0, 1, 0, 1]
      >>> jm.tokens.nearest_center(x, centers, 2, order="center").segment_ids.tolist()
      [1, 0, 1, 0]
    """
    return clusters(x, centers, k, mask=mask, order=order, implementation=implementation)


def clusters(
    x: Float[ArrayLike, "*batch n d"],
    centers: Bool[ArrayLike, "*batch n"],
    k: int,
    *,
    mask: Bool[ArrayLike, "*batch n"] | None,
    order: Order = "first",
    implementation: Implementation | None = None,
    most: int | None = None,
) -> Plan:
    """`nearest_center`, of at most so many centres, where that is known."""
    x = checked_tokens("nearest_center", x)
    check_rows("nearest_center", x, centers=centers, mask=mask)
    if order not in ("first", "center"):
        raise ValueError(f'nearest_center: order must be "first" or "center", got {order!r}.')
    x = lax.stop_gradient(x)
    if x.shape[-2] == 0:
        return Plan(jnp.zeros(x.shape[:-1], jnp.int32), k)
    valid = _everyone(x) if mask is None else jnp.asarray(mask) & _everyone(x)
    parents = joined(x, jnp.asarray(centers), valid, most=most, implementation=implementation)
    plan = from_parents(parents, k, hops=1)
    return plan if order == "center" else in_order(plan)


def joined(
    x: Float[Array, "*batch n d"],
    centers: Bool[Array, "*batch n"],
    valid: Bool[Array, "*batch n"],
    *,
    most: int | None = None,
    implementation: Implementation | None = None,
) -> Int[Array, "*batch n"]:
    """The position of each valid token's nearest valid centre, of at most so many; -1 where there is none."""

    def row(x, centers):
        squared = jnp.minimum(distances(x).squared, jnp.finfo(jnp.float32).max)
        return jnp.argmin(jnp.where(centers[None, :], squared, jnp.inf), axis=-1).astype(jnp.int32)

    centers = centers & valid
    most = x.shape[-2] if most is None else max(most, 1)
    xla = lambda: segments.batched(row, x.ndim - 2)(x, centers)
    near = kernels.closest(x, centers, most=most, implementation=implementation, xla=xla)
    near = jnp.where(centers, segments.positions(near), near)
    return jnp.where(valid & centers.any(axis=-1, keepdims=True), near, -1)


def in_order(plan: Plan) -> Plan:
    """The same groups, numbered by the first position that each holds; empty slots come last.

    Law:
      in_order(in_order(p)) = in_order(p), and p.sizes are permuted.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.tokens.in_order(jm.Plan(jnp.array([2, 0, -1, 2, 0]), 3)).segment_ids.tolist()
      [0, 1, -1, 0, 1]
    """
    check_plan("in_order", plan)
    return keep_apart(plan, jnp.zeros_like(plan.segment_ids, bool), 0)


def keep_apart(plan: Plan, mask: Bool[ArrayLike, "*batch n"], capacity: int) -> Plan:
    """Give every token that a mask names a segment of its own, beside the groups of a plan.

    Args:
      plan: groups of the other tokens; what it says of the named ones does not matter.
      mask: tokens to keep as they are.
      capacity: room for that many of them.

    Returns:
      A plan of plan.num_segments + capacity segments, numbered by the first position they hold.

    Law:
      keep_apart(p, nobody, 0) = in_order(p).

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> rest = jm.Plan(jnp.array([0, 0, 1, 0]), 2)
      >>> jm.tokens.keep_apart(rest, jnp.array([False, True, False, False]), 1).segment_ids.tolist()
      [0, 1, 2, 0]
    """
    check_plan("keep_apart", plan)
    check_sequences("keep_apart", mask=mask)
    mask, capacity = jnp.asarray(mask), checked_capacity("keep_apart", capacity)
    if not spreads(mask.shape, plan.segment_ids.shape):
        raise ValueError(f"keep_apart: mask must have the plan's shape {plan.segment_ids.shape}, got {mask.shape}.")
    ids, m = jnp.where(mask, -1, plan.segment_ids), plan.num_segments
    if plan.num_positions == 0:
        return Plan(ids, m + capacity)
    inside = (ids >= 0) & (ids < m)
    first = segments.take(jnp.where(inside, ids, 0), segments.firsts(ids, m)) if m else ids
    parents = jnp.where(mask, segments.positions(ids), jnp.where(inside, first, -1))
    numbered = from_parents(parents, m + capacity, hops=1).segment_ids
    return Plan(jnp.where(ids >= m, m + capacity, numbered), m + capacity)


def _everyone(x: Array) -> Bool[Array, "*batch n"]:
    """True for every token, laid out as they are."""
    return jnp.isnan(x[..., 0]) | True
