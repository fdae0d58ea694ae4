"""Who is in a segment: its members by name, and the positions that a merged token carries on."""

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import ArrayLike, Int, Shaped

from jaxmerge import _segments as segments
from jaxmerge._plan import Plan
from jaxmerge._rank import ranks
from jaxmerge.tokens._checks import check_plan, check_sequences, python_int

Order = Literal["first", "last"]


def members(
    plan: Plan, k: int, *, weight: Shaped[ArrayLike, "*batch n"] | None = None, order: Order = "first"
) -> Int[Array, "*batch m k"]:
    """k positions of each segment; where it holds fewer, they are repeated in turn.

    Args:
      plan: groups of positions.
      k: how many to name.
      weight: the heaviest members come first. None: in the order of their positions.
      order: of equal weights the "first" position comes first, or the "last".

    Returns:
      Positions, int32; -1 in an empty slot.

    Law:
      members(p, 1) are the positions that merge(p, x, reduce="first") takes.

    Raises:
      ValueError: k below 1; another order.

    Cost: n² comparisons, fused.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.tokens.members(jm.Plan(jnp.array([0, 1, 0, 0]), 3), 2).tolist()
      [[0, 2], [1, 1], [-1, -1]]

    Source: PPE's `select_pos_topk`. It means to sort members by weight, but sorts its two columns apart and with an unstable
    sort, so that which members it takes is arbitrary; with a stable one it would be order="last".
    """
    if (k := python_int("members", "k", k)) < 1:
        raise ValueError(f"members: k must be 1 or more, got {k}.")
    if order not in ("first", "last"):
        raise ValueError(f'members: order must be "first" or "last", got {order!r}.')
    check_plan("members", plan)
    check_sequences("members", weight=weight)
    ids, m, n = plan.segment_ids, plan.num_segments, plan.num_positions
    here = segments.positions(ids)
    turn = here if order == "first" else n - 1 - here
    if weight is not None:
        weight = jnp.asarray(weight)
        if weight.shape != ids.shape:
            raise ValueError(f"members: weight must have the plan's shape {ids.shape}, got {weight.shape}.")
        flip = (lambda w: w) if order == "first" else (lambda w: jnp.flip(w, axis=-1))
        turn = flip(ranks(flip(weight)))

    def table(ids, turn, here):
        ahead = (ids[None, :] == ids[:, None]) & (turn[None, :] < turn[:, None])
        place = jnp.sum(ahead, axis=-1, dtype=jnp.int32)
        slot = jnp.where((ids >= 0) & (ids < m) & (place < k), ids * k + place, m * k)
        blank = jnp.broadcast_to(jnp.full_like(here[:1], -1) if n else jnp.full((1,), -1, jnp.int32), (m * k,))
        return blank.at[slot].set(here, mode="drop").reshape(m, k)

    named = segments.batched(table, ids.ndim - 1)(ids, turn, here)
    again = segments.positions(named) % jnp.clip(plan.sizes, 1, k)[..., None]
    return segments.take(again, named)


def carry_positions(
    plan: Plan,
    positions: Shaped[ArrayLike, "*batch n axes"],
    k: int = 1,
    *,
    weight: Shaped[ArrayLike, "*batch n"] | None = None,
    order: Order = "first",
) -> Shaped[Array, "*batch m axes k"]:
    """The positions that a merged token keeps: those of k of its members, along every axis.

    Args:
      plan: groups of positions.
      positions: coordinates of each token, such as (time, row, column).
      k: how many members speak for a segment.
      weight, order: which ones; see `members`.

    Returns:
      coordinates[..., axis, member]; 0 in an empty slot.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> where = jnp.array([[0, 0], [0, 1], [1, 0], [1, 1]])  # row and column
      >>> jm.tokens.carry_positions(jm.Plan(jnp.array([0, 1, 0, 0]), 2), where, 2).tolist()
      [[[0, 1], [0, 0]], [[0, 0], [1, 1]]]

    Source: PPE, where `position_ids` (3 k, m) is this with axes and members flattened.
    """
    check_plan("carry_positions", plan)
    chosen = members(plan, k, weight=weight, order=order)
    positions = jnp.asarray(positions)
    if positions.shape[:-1] != plan.segment_ids.shape:
        raise ValueError(
            f"carry_positions: positions must be the coordinates of the plan's tokens, {(*plan.segment_ids.shape, 'axes')}; "
            f"got {positions.shape}."
        )
    *batch, m, k = chosen.shape
    flat = chosen.reshape(*batch, m * k)
    empty = flat < 0
    taken = segments.fill(empty, segments.take(jnp.where(empty, 0, flat), positions), 0)
    return jnp.swapaxes(taken.reshape(*chosen.shape, positions.shape[-1]), -1, -2)


def rope_positions(positions: Shaped[Array, "*batch m axes k"], sections: Sequence[int]) -> Shaped[Array, "*batch m pairs"]:
    """The position that turns each pair of rotary channels: every axis has its section, every member its part of it.

    Args:
      positions: of `carry_positions`, k members along each axis.
      sections: channel pairs of each axis, such as Qwen-VL's (16, 24, 24). Where k divides them all, each section is cut into
        k runs; else axis and member change with every pair, in turn.

    Returns:
      One position for each of sum(sections) pairs: multiply by the inverse frequencies to get the angles.

    Law:
      with k = 1 and one axis it repeats the position; with k = 1 it is multimodal RoPE.

    Raises:
      ValueError: the number of sections is not that of the axes; positions of lower rank.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.tokens.rope_positions(jnp.array([[[1, 2], [7, 8]]]), (2, 4)).tolist()
      [[1, 2, 7, 7, 8, 8]]

    Source: `apply_multimodal_rotary_pos_emb_ppe` of PPE, with its fallback where k does not divide a section.
    """
    if positions.ndim < 3:
        raise ValueError(f"rope_positions: positions must have shape (*batch, m, axes, k), got {positions.shape}.")
    axes, k = positions.shape[-2:]
    if len(sections) != axes:
        raise ValueError(f"rope_positions: {len(sections)} sections for {axes} axes of positions; give one section per axis.")
    if all(s % k == 0 for s in sections):
        row = np.repeat(np.arange(axes * k), np.repeat([s // k for s in sections], k))
    else:
        row = np.arange(sum(sections)) % (axes * k)
    return positions.reshape(*positions.shape[:-2], axes * k)[..., row]
