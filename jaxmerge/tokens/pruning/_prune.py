"""Pruning: keep some tokens, in order, and drop the rest."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import ArrayLike, Bool, Float, Int, Shaped

from jaxmerge import _segments as segments
from jaxmerge._kernels._dispatch import Implementation
from jaxmerge._kernels.pack import pack as kernel
from jaxmerge._plan import Plan, merge
from jaxmerge._rank import highest
from jaxmerge.tokens._checks import check_sequences, checked_capacity, python_int


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
    mask = jnp.asarray(mask)
    check_sequences("keep", mask=mask)
    if mask.dtype != bool:
        raise TypeError(f"keep: mask must be boolean, got {mask.dtype}; compare your scores with a threshold first.")
    slots = checked_capacity("keep", capacity)
    return Plan(jnp.where(mask, jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1, -1), slots)


class Packed(NamedTuple):
    """The kept tokens, their positions (n in an empty slot), and the plan that was applied."""

    x: Float[Array, "*batch c d"]
    positions: Int[Array, "*batch c"]
    plan: Plan


def pack(
    mask: Bool[ArrayLike, "*batch n"],
    x: Float[ArrayLike, "*batch n d"],
    capacity: int,
    *,
    implementation: Implementation | None = None,
) -> Packed:
    """Delete tokens for good: those that a mask names, packed to the left of a shorter sequence, and where each was.

    Args:
      mask: True for a token to keep.
      x: the tokens.
      capacity: room for that many; further kept tokens are lost and counted by `plan.overflow`, missing ones leave empty slots,
        which are 0.
      implementation: "xla", or a kernel ("mosaic_tpu", "mosaic_gpu"). None takes the kernel where it is known to run and
        believed to be faster; `jaxmerge doctor` says where.

    Returns:
      Gradients flow through x.

    Law:
      pack(mask, x, c).x = merge(keep(mask, c), x, reduce="first").

    Raises:
      ValueError: mask and x are of different tokens; capacity is negative; the implementation cannot run here. TypeError: the
        mask is not boolean.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> packed = jm.tokens.pack(jnp.array([True, False, True]), jnp.array([[1.0], [2.0], [3.0]]), 2)
      >>> packed.x.tolist(), packed.positions.tolist()
      ([[1.0], [3.0]], [0, 2])

    Source: hard deletion in MrT5 (arXiv:2410.20771).
    """
    mask, x = jnp.asarray(mask), jnp.asarray(x)
    check_sequences("pack", mask=mask)
    plan = keep(mask, capacity)
    if x.shape[:-1] != mask.shape:
        raise ValueError(f"pack: mask {mask.shape} and x {x.shape} must be of the same tokens: (*batch, n) and (*batch, n, d).")

    def apart() -> Any:
        here = segments.firsts(plan.segment_ids, capacity)
        return merge(plan, x, reduce="first"), here, mask.sum(axis=-1, dtype=jnp.int32)

    packed, positions, _ = kernel(mask, x, capacity=capacity, implementation=implementation, xla=apart)
    return Packed(packed, positions, plan)


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
    score = jnp.asarray(score)
    check_sequences("keep_top_k", score=score)
    n = score.shape[-1]
    k = python_int("keep_top_k", "k", k)
    if not 0 <= k <= n:
        raise ValueError(f"keep_top_k: k must be between 0 and the number of tokens, {n}; got {k}.")
    return keep(highest(score, k), k)
