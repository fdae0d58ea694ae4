"""Matching near by: a token merges only with tokens next to it, in linear time."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import ArrayLike, Float

from jaxmerge._plan import Plan, from_parents, identity
from jaxmerge._rank import highest
from jaxmerge.tokens._checks import checked_metric, checked_r, protected_mask
from jaxmerge.tokens._nearest import unit
from jaxmerge.tokens.matching._bipartite import bipartite_matching
from jaxmerge.tokens.matching._two_sided import per_row, sent


def local_matching(metric: Float[ArrayLike, "*batch n d"], r: int, *, window: int, protect: Sequence[int] = ()) -> Plan:
    """Bipartite matching within a band: the i-th even token may join the j-th odd one where |i - j| <= window.

    Args:
      metric: what to compare tokens by.
      r: how many tokens to remove, in all; the r most similar pairs of the whole row merge.
      window: reach, in pairs. 0 merges disjoint neighbours (2i, 2i + 1) alone; n // 2 or more is `bipartite_matching`.
      protect: positions that neither move nor receive.

    Returns:
      A plan of n - r segments, in the order of the tokens that stay.

    Law:
      a token moves by 2 window + 1 positions at most; local_matching(x, r, window=n) = bipartite_matching(x, r).

    Raises:
      ValueError: r out of range, a negative window, a protected position outside [-n, n). TypeError: r is not an int.

    Cost: n (window + 1/2) similarities, one diagonal of the band at a time; memory O(n).

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [0.5, 0.5], [0.0, 1.0], [1.0, 0.0]])
      >>> jm.tokens.local_matching(x, 1, window=0).segment_ids.tolist()
      [0, 1, 2, 2, 3, 4]
      >>> jm.tokens.local_matching(x, 1, window=1).segment_ids.tolist()
      [0, 1, 1, 2, 3, 4]

    Source: the local-window merging of MergeDNA (arXiv:2511.14806), as the band of OpenToMe's
    `naive_local_bipartite_soft_matching`. OpenToMe leaves the last of an odd number of tokens out, protect=(n - 1,) here. Its
    fast form compares tokens near the ends with zeros outside the sequence, which beat a negative similarity and then
    count as the end token; ours never looks outside.
    """
    name = "local_matching"
    metric = checked_metric(name, metric)
    n = metric.shape[-2]
    if window < 0:
        raise ValueError(f"{name}: window must be 0 or more, got {window}.")
    free = ~protected_mask(name, protect, n)
    left, right = (n + 1) // 2, n // 2
    w = min(window, left)
    partner = np.arange(left) + np.arange(-w, w + 1)[:, None]  # (offsets, even): which odd one each diagonal meets
    inside = (partner >= 0) & (partner < right)
    allowed = inside & free[::2] & free[1::2][np.where(inside, partner, 0)] if right else inside
    largest = allowed.any(axis=0).sum().item()
    r = checked_r(name, r, largest, f"of n={n} tokens, {n - free.sum()} protected, {largest} have a partner within {window}")
    if r == 0:
        return identity(metric.shape[-2], like=metric)
    u = unit(metric)
    a, b = u[..., ::2, :], _padded(u[..., 1::2, :], w, w + left - right)

    def diagonal(best, at):
        offset, may = at
        similarity = jnp.sum(a * lax.dynamic_slice_in_dim(b, offset, left, axis=-2), axis=-1)
        may = jnp.broadcast_to(may, similarity.shape)
        better = may & (similarity > best[0])  # of equal ones, the first diagonal
        return (jnp.where(better, similarity, best[0]), jnp.where(better, offset, best[1])), None

    none = a[..., 0]
    start = jnp.full_like(none, -jnp.inf), jnp.zeros_like(none, jnp.int32)
    (best, offset), _ = lax.scan(diagonal, start, (jnp.arange(2 * w + 1, dtype=jnp.int32), jnp.asarray(allowed)))
    even = per_row(np.arange(0, n, 2), metric)
    goal = jnp.where(highest(best, r), even + 2 * (offset - w) + 1, even)
    return from_parents(sent(metric, even, goal), n - r, hops=1)


def block_matching(metric: Float[ArrayLike, "*batch n d"], r: int, *, block: int) -> Plan:
    """Bipartite matching inside of each block of consecutive tokens: r tokens leave every block.

    Args:
      metric: what to compare tokens by.
      r: how many tokens to remove from each block, at most half of it.
      block: tokens in a block; divides n.

    Returns:
      A plan of n - r n / block segments, block by block.

    Law:
      blocks do not meet: the plan of one does not depend on another; block_matching(x, r, block=n) = bipartite_matching(x, r).

    Raises:
      ValueError: block does not divide n, r out of range. TypeError: r is not an int.

    Cost: n block / 4 similarities.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> x = jnp.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.2, 1.0], [1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [0.0, 2.0]])
      >>> jm.tokens.block_matching(x, 1, block=4).segment_ids.tolist()
      [0, 0, 1, 2, 3, 4, 4, 5]

    Source: the static-window form of MergeDNA's local merging (arXiv:2511.14806).
    """
    name = "block_matching"
    metric = checked_metric(name, metric)
    *batch, n, d = metric.shape
    if block < 1 or n % block:
        raise ValueError(f"{name}: block must divide n={n}, got {block}; pad the tokens, or use local_matching.")
    r = checked_r(name, r, block // 2, f"at most half of a block of {block} tokens can merge")
    ids = bipartite_matching(metric.reshape(*batch, n // block, block, d), r).segment_ids
    ids += lax.broadcasted_iota(jnp.int32, ids.shape, ids.ndim - 2) * (block - r)
    return Plan(ids.reshape(*batch, n), n - r * (n // block))


def adjacent_matching(metric: Float[ArrayLike, "*batch n d"], r: int, *, protect: Sequence[int] = ()) -> Plan:
    """Join the r most similar pairs of neighbours; segments are runs of consecutive tokens.

    Args:
      metric: what to compare tokens by.
      r: how many tokens to remove, one for each of the n - 1 places between neighbours at most.
      protect: positions that stay alone.

    Returns:
      A plan of n - r segments, all of them runs: order and positions keep their meaning, so it suits text and signals.

    Law:
      segment ids never fall; adjacent_matching(x, n - 1) is one segment; reversing the tokens reverses the groups.

    Raises:
      ValueError: r out of range, a protected position outside [-n, n). TypeError: r is not an int.

    Cost: n similarities. Pairs that must not chain are `local_matching(x, r, window=0)`.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> x = jnp.array([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [0.0, 1.0]])
      >>> jm.tokens.adjacent_matching(x, 2).segment_ids.tolist()
      [0, 0, 0, 1]

    Source: merging of adjacent tokens by stage, as MAELRE does while sequences are long; no code is public, and the choice of
    the r strongest links of the whole row is ours. `in_rounds` makes it progressive.
    """
    name = "adjacent_matching"
    metric = checked_metric(name, metric)
    n = metric.shape[-2]
    free = ~protected_mask(name, protect, n)
    allowed = free[:-1] & free[1:]
    largest = allowed.sum().item()
    r = checked_r(name, r, largest, f"{largest} pairs of neighbours among n={n} tokens are not protected")
    if r == 0:
        return identity(metric.shape[-2], like=metric)
    u = unit(metric)
    similarity = jnp.sum(u[..., :-1, :] * u[..., 1:, :], axis=-1)
    similarity = jnp.where(jnp.broadcast_to(allowed, similarity.shape), similarity, -jnp.inf)
    begins = jnp.concatenate([jnp.zeros_like(similarity[..., :1], bool), ~highest(similarity, r)], axis=-1)
    return Plan(jnp.cumsum(begins, axis=-1, dtype=jnp.int32), n - r)


def _padded(x: Array, before: int, after: int) -> Array:
    """Zero rows around the tokens."""
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0)] * (x.ndim - 2) + [(before, after, 0), (0, 0, 0)])
