"""The two simple splits of Token Merging: every k-th token receives, or r random tokens leave."""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import ArrayLike, Float, Key

from jaxmerge import _segments as segments
from jaxmerge._plan import Plan, from_parents, identity
from jaxmerge.tokens._checks import checked_metric, checked_r, protected_mask
from jaxmerge.tokens.matching._two_sided import drawn, look, sent, two_sided_matching


def kth_bipartite_matching(
    metric: Float[ArrayLike, "*batch n d"], k: int, *, remainder: Literal["keep", "drop"] = "keep"
) -> Plan:
    """Keep every k-th token; each of the others merges into the kept one that it is most like, wherever that stands.

    Args:
      metric: what to compare tokens by.
      k: one of each k consecutive tokens stays, the last; 1 is the identity.
      remainder: the n mod k tokens at the end that fill no group: "keep" leaves each alone, "drop" loses them.

    Returns:
      A plan of n // k segments, and n mod k more where the remainder is kept.

    Law:
      kth_bipartite_matching(x, 2) = bipartite_matching(x, n // 2) for even n.

    Raises:
      ValueError: k below 1 or above n; an unknown remainder.

    Cost: similarities n (k - 1) / k x n / k; nothing is ranked.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> x = jnp.array([[1.0, 0.0], [1.0, 0.1], [0.1, 1.0], [0.0, 1.0], [1.0, 1.0]])
      >>> jm.tokens.kth_bipartite_matching(x, 2).segment_ids.tolist()
      [0, 0, 1, 1, 2]

    Source: `kth_bipartite_soft_matching` of Token Merging (arXiv:2210.09461), which drops the remainder silently:
    remainder="drop".
    """
    name = "kth_bipartite_matching"
    metric = checked_metric(name, metric)
    n = metric.shape[-2]
    if not 1 <= k <= n:
        raise ValueError(f"{name}: k must be between 1 and the number of tokens, {n}; got {k}.")
    if remainder not in ("keep", "drop"):
        raise ValueError(f'{name}: remainder must be "keep" or "drop", got {remainder!r}.')
    if k == 1:
        return identity(metric.shape[-2], like=metric)
    whole = n // k * k
    groups = np.arange(whole).reshape(-1, k)
    sources, _, goal = look(metric, groups[:, :-1].reshape(-1), groups[:, -1])
    parents = sent(metric, sources, goal)
    if remainder == "keep":
        return from_parents(parents, n // k + n - whole, hops=1)
    return from_parents(jnp.where(segments.positions(parents) < whole, parents, -1), n // k, hops=1)


def random_bipartite_matching(
    metric: Float[ArrayLike, "*batch n d"], r: int, key: Key[Array, "*#batch"], *, protect: Sequence[int] = ()
) -> Plan:
    """Merge r random tokens, each into the one of the others that it is most like: a baseline for the choice of sources.

    Args:
      metric: what to compare tokens by.
      r: how many tokens to remove; at least one must be left to receive.
      key: one key draws the same tokens in every row of the batch, and so gives the same plan under vmap;
        `jax.random.split(key, batch)` draws anew in each.
      protect: positions that neither move nor receive.

    Returns:
      A plan of n - r segments.

    Raises:
      ValueError: r is negative or leaves nobody to receive; a protected position outside [-n, n). TypeError: r is not an int.

    Cost: r (n - r) similarities.

    Example:
      >>> import jax, jax.numpy as jnp, jaxmerge as jm
      >>> x = jnp.array([[1.0, 0.0], [1.0, 0.1], [0.9, 0.0], [0.0, 1.0]])
      >>> jm.tokens.random_bipartite_matching(x, 1, jax.random.key(0)).sizes.sum().item()
      4

    Source: `random_bipartite_soft_matching` of Token Merging (arXiv:2210.09461): one draw per row, no protection, receivers
    in random order; ours keep their own.
    """
    name = "random_bipartite_matching"
    metric = checked_metric(name, metric)
    free = np.flatnonzero(~protected_mask(name, protect, metric.shape[-2]))
    why = f"of {len(free)} tokens that are not protected, one must stay to receive"
    r = checked_r(name, r, max(len(free) - 1, 0), why)
    if r == 0:
        return identity(metric.shape[-2], like=metric)

    def split(key):
        order = jax.random.permutation(key, jnp.asarray(free, jnp.int32))
        return order[:r], jnp.sort(order[r:])  # receivers in their order, so that of equal ones the first wins

    sources, receivers = drawn(name, key, split)
    return two_sided_matching(metric, sources, receivers)
