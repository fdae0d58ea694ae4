"""Pruning: keep some tokens, in order, and drop the rest."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Shaped

from jaxmerge._plan import Plan
from jaxmerge._rank import highest


def keep(mask: Bool[Array, "*batch n"], capacity: int) -> Plan:
    """Keep the tokens that a mask names, packed to the left in their order.

    Args:
      mask: True for a token to keep.
      capacity: m, room for that many; further kept tokens are counted by `plan.overflow`, missing ones leave empty slots.

    Returns:
      A plan whose slots hold one token at most, so `merge(plan, x, reduce="first")` is a gather.

    Law:
      merge(keep(mask, n), x, reduce="first")[: mask.sum()] = x[mask].

    Raises:
      ValueError: capacity is negative. TypeError: the mask is not boolean.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> plan = jm.tokens.keep(jnp.array([True, False, True, True]), 2)
      >>> plan.segment_ids.tolist(), plan.overflow.item()
      ([0, -1, 1, 2], 1)

    Source: hard deletion in MrT5 (arXiv:2410.20771); EViT-style pruning.
    """
    if mask.dtype != bool:
        raise TypeError(f"keep: mask must be boolean, got {mask.dtype}; compare your scores with a threshold first.")
    return Plan(jnp.where(mask, jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1, -1), capacity)


def keep_top_k(score: Shaped[Array, "*batch n"], k: int) -> Plan:
    """Keep the k tokens of highest score, in their own order; of equal scores, the first. NaN scores lowest.

    Args:
      score: one number per token.
      k: how many to keep, at most n.

    Law:
      keep_top_k(s, n) is the identity; the result does not change under a strictly increasing map of the scores.

    Raises:
      ValueError: k is negative or larger than n.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.tokens.keep_top_k(jnp.array([0.1, 0.9, 0.3, 0.9]), 2).segment_ids.tolist()
      [-1, 0, -1, 1]
    """
    n = score.shape[-1]
    if not 0 <= k <= n:
        raise ValueError(f"keep_top_k: k must be between 0 and the number of tokens, {n}; got {k}.")
    return keep(highest(score, k), k)
