"""DyVTE: at some layer the text has seen enough, and all visual tokens leave at once."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxmerge import _segments as segments
from jaxmerge._plan import Plan
from jaxmerge.tokens._checks import check_sequences, python_int
from jaxmerge.tokens.pruning._prune import keep


def exit_layer(logits: Float[Array, "*batch layers 2"]) -> Int[Array, "*batch"]:
    """The first layer whose router says exit; the number of layers where none does.

    Args:
      logits: of [stay, exit], one pair per layer. NaN and equal logits say stay.

    Raises:
      ValueError: the last axis is not a pair.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.tokens.exit_layer(jnp.array([[[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]], [[1.0, 0.0]] * 3])).tolist()
      [1, 3]

    Source: DyVTE (arXiv:2411.19628): visual tokens leave after the layer that says so, and never come back.
    """
    logits = jnp.asarray(logits)
    if logits.ndim < 2 or logits.shape[-1] != 2:
        raise ValueError(f"exit_layer: logits must have shape (*batch, layers, 2), got {logits.shape}.")
    says = logits[..., 1] > logits[..., 0]
    return jnp.where(says.any(axis=-1), says.argmax(axis=-1), logits.shape[-2]).astype(jnp.int32)


def visible_layers(
    leaves_after: Int[Array, "*batch"], visual: Bool[Array, "*batch n"], depth: int
) -> Bool[Array, "*batch layers n"]:
    """Which tokens each layer sees: text always, visual tokens up to the layer after which they leave.

    The static form of a dynamic exit, for training and for batches whose rows leave at different layers: a mask for
    `attention.key_bias`. Where all rows have left, `exit_plan` makes the sequence short.

    Args:
      leaves_after: from `exit_layer`; `depth` for never.
      visual: True for a visual token.
      depth: number of layers.

    Raises:
      ValueError: depth below 1, batch shapes that differ.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.tokens.visible_layers(jnp.array(0), jnp.array([False, True]), 2).tolist()
      [[True, True], [True, False]]

    Source: DyVTE (arXiv:2411.19628).
    """
    depth = python_int("visible_layers", "depth", depth)
    if depth < 1 or leaves_after.shape != visual.shape[:-1]:
        raise ValueError(
            "visible_layers: expected leaves_after (*batch), visual (*batch, n) and depth of 1 or more; "
            f"got {leaves_after.shape}, {visual.shape} and {depth}."
        )
    layers = segments.positions(jnp.broadcast_to(leaves_after[..., None], (*leaves_after.shape, depth)))
    return ~visual[..., None, :] | (layers <= leaves_after[..., None])[..., None]


def exit_plan(exits: Bool[Array, "*batch"], visual: Bool[Array, "*batch n"], capacity: int) -> Plan:
    """Drop all visual tokens of the rows that exit, and nothing of the others.

    Args:
      exits: which rows exit now.
      visual: True for a visual token.
      capacity: m, room for what stays: the number of text tokens where all rows exit, n where some do not; what finds no room
        is counted by `plan.overflow`.

    Law:
      exit_plan(none, visual, n) is the identity; exit_plan(all, visual, m) = keep(~visual, m).

    Raises:
      ValueError: batch shapes that differ. TypeError: what is not boolean.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> visual = jnp.array([[False, True, True, False]] * 2)
      >>> jm.tokens.exit_plan(jnp.array([True, False]), visual, 4).segment_ids.tolist()
      [[0, -1, -1, 1], [0, 1, 2, 3]]

    Source: DyVTE (arXiv:2411.19628), whose code runs one row at a time.
    """
    exits, visual = jnp.asarray(exits), jnp.asarray(visual)
    check_sequences("exit_plan", visual=visual)
    if exits.dtype != bool or visual.dtype != bool:
        raise TypeError(f"exit_plan: exits and visual must be boolean, got {exits.dtype} and {visual.dtype}.")
    if exits.shape != visual.shape[:-1]:
        raise ValueError(f"exit_plan: expected exits (*batch), visual (*batch, n); got {exits.shape} and {visual.shape}.")
    return keep(~(visual & exits[..., None]), capacity)
