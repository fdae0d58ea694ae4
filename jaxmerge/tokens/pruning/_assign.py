"""Some tokens stay, every other joins the one that stays and is most like it: what ranking methods do with the rest."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import ArrayLike, Bool, Float

from jaxmerge._plan import Plan, merge
from jaxmerge.tokens._checks import check_sequences, checked_capacity
from jaxmerge.tokens._nearest import nearest
from jaxmerge.tokens.pruning._prune import keep


def assign(
    metric: Float[ArrayLike, "*batch n d"],
    mask: Bool[Array, "*batch n"],
    capacity: int,
    *,
    targets: Bool[Array, "*batch n"] | None = None,
    rest: Bool[Array, "*batch n"] | None = None,
) -> Plan:
    """Keep the tokens that a mask names, in their order, and give every other to the kept one it is most like.

    Likeness is the cosine; of equal ones the first wins.

    Args:
      metric: what to compare tokens by. A row without a direction (zero, inf, NaN) has similarity 0 to every other.
      mask: True for a token that stays.
      capacity: m, room for that many; further kept tokens are counted by `plan.overflow`, missing ones leave empty slots.
      targets: of the kept tokens, those that may receive; all by default.
      rest: of the other tokens, those that are merged; all by default. What is not is dropped, and so is what finds no target.

    Returns:
      A plan of m segments, numbered by the kept token of each.

    Law:
      assign(x, mask, m, rest=none) = keep(mask, m).

    Cost: n m cosines of d features; no sort.

    Raises:
      ValueError: shapes that differ, a metric of rank 1, a negative capacity.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [0.2, 1.0]])
      >>> jm.tokens.assign(x, jnp.array([True, True, False, False]), 2).segment_ids.tolist()
      [0, 1, 0, 1]

    Source: the last step of DiffRate (arXiv:2305.17997) and of VisionZip (arXiv:2412.04467), without their restrictions.
    """
    return assign_by_similarity(metric, mask, capacity, targets, rest)[0]


def assign_by_similarity(
    metric: Float[ArrayLike, "*batch n d"],
    mask: Bool[Array, "*batch n"],
    capacity: int,
    targets: Bool[Array, "*batch n"] | None = None,
    rest: Bool[Array, "*batch n"] | None = None,
) -> tuple[Plan, Float[Array, "*batch n"]]:
    """The plan of `assign`, and how like each token is to what it joined: 1 for a kept one, 0 for a dropped one."""
    metric, mask = jnp.asarray(metric), jnp.asarray(mask)
    shapes = {k: jnp.shape(v) for k, v in dict(mask=mask, targets=targets, rest=rest).items() if v is not None}
    if metric.ndim < 2 or set(shapes.values()) != {metric.shape[:-1]}:
        raise ValueError(f"assign: expected metric (*batch, n, d) and masks (*batch, n); got metric {metric.shape}, {shapes}.")
    check_sequences("assign", axes=(-2,), metric=metric)
    check_sequences("assign", mask=mask, targets=targets, rest=rest)
    slots = keep(mask, checked_capacity("assign", capacity))
    rest = ~mask if rest is None else rest & ~mask
    if capacity == 0:
        return slots, jnp.zeros_like(mask, jnp.float32)
    keys = merge(slots, metric, reduce="first")
    open_ = merge(slots, mask if targets is None else targets & mask, reduce="first")
    near = nearest(metric, keys, mask=rest[..., :, None] & open_[..., None, :])
    found = near.similarity > -jnp.inf
    ids = jnp.where(mask, slots.segment_ids, jnp.where(found, near.index, -1).astype(jnp.int32))
    return Plan(ids, capacity), jnp.where(slots.kept, 1.0, jnp.where(found, near.similarity, 0.0))
