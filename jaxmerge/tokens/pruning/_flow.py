"""FlowCut: what flows from a token to the class token, gathered over layers, and how much the attention says can go."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import ArrayLike, Bool, Float, Int

from jaxmerge import _segments as segments
from jaxmerge._plan import Plan
from jaxmerge._rank import ranks
from jaxmerge.tokens._checks import check_sequences, floating, python_int
from jaxmerge.tokens.pruning._prune import keep


def flow_score(
    attention: Float[ArrayLike, "*batch n"],
    affinity: Float[ArrayLike, "*batch n"],
    values: Float[ArrayLike, "*batch n d"],
    *,
    so_far: Float[Array, "*batch n"] | None = None,
    momentum: float = 0.5,
) -> Float[Array, "*batch n"]:
    """How much each token gives to the class token: (attention + affinity, each made to sum to 1) times |value|_1.

    Args:
      attention: of the class token to each patch, averaged over heads.
      affinity: softmax over all tokens of class value · value, averaged over heads, at the patches.
      values: of the patches, averaged over heads.
      so_far: the score after the layer before, for the tokens that are still there
        (`merge(plan, score, reduce="first")` after each cut). None in the first layer.
      momentum: the part of `so_far` in momentum · so_far + (1 - momentum) · score.

    Returns:
      float32. An attention or affinity that sums to 0 counts as 0.

    Raises:
      ValueError: shapes that differ.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> a, v = jnp.array([1.0, 3.0]), jnp.array([[1.0, -1.0], [2.0, 0.0]])
      >>> score = jm.tokens.flow_score(a, a, v)
      >>> score.tolist(), jm.tokens.flow_score(a, a, v, so_far=jnp.zeros(2)).tolist()
      ([1.0, 3.0], [0.5, 1.5])

    Source: FlowCut (arXiv:2505.19536), `compute_score` and the running mean of its encoder layer.
    """
    attention, affinity, values = jnp.asarray(attention), jnp.asarray(affinity), jnp.asarray(values)
    if not attention.shape == affinity.shape == values.shape[:-1]:
        raise ValueError(
            "flow_score: expected attention and affinity (*batch, n) and values (*batch, n, d); "
            f"got {attention.shape}, {affinity.shape} and {values.shape}."
        )
    score = (_share(attention) + _share(affinity)) * jnp.abs(values.astype(jnp.float32)).sum(axis=-1)
    return score if so_far is None else momentum * so_far + (1 - momentum) * score


def flow_budget(
    attention: Float[ArrayLike, "*batch n"], layers_left: int, target: int, *, mask: Bool[Array, "*batch n"] | None = None
) -> Int[Array, "*batch"]:
    """How many tokens to cut now: many where the class token looks at few, none where it looks at all alike.

    With N tokens there and H the entropy of the attention: round((N - target) / sqrt(layers_left) · (1 - (H / log N)²)),
    and in the last layer N - target.

    Args:
      attention: of the class token to each patch.
      layers_left: until the target must be met; 0 in the last one.
      target: how many tokens are to be left at the end.
      mask: True for a token that is still there (`plan.sizes > 0`); all by default.

    Returns:
      One number per row, from 0 to N - target. The official code takes the largest of the batch for all: `.max()`.
      0 log 0 is 0; theirs is NaN. Attention that sums to 0, or has a NaN, counts as even.

    Raises:
      ValueError: `layers_left` or `target` below 0.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.tokens.flow_budget(jnp.array([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]]), 1, 1).tolist()
      [0, 3]

    Source: FlowCut (arXiv:2505.19536), `adaptive_prune_ratio`.
    """
    if layers_left < 0 or target < 0:
        raise ValueError(f"flow_budget: layers_left and target must be 0 or more, got {layers_left} and {target}.")
    if jnp.ndim(attention) == 0:
        raise ValueError("flow_budget: attention must have shape (*batch, n), got a scalar.")
    attention = jnp.asarray(attention).astype(jnp.float32)
    there = jnp.ones_like(attention, bool) if mask is None else mask
    count = there.sum(axis=-1, dtype=jnp.int32)
    most = jnp.maximum(count - target, 0)
    if layers_left == 0:
        return most
    p = _share(jnp.where(there, attention, 0))
    p = jnp.where(
        p.sum(axis=-1, keepdims=True) > 0, p, there.astype(p.dtype) / jnp.maximum(count, 1)[..., None].astype(p.dtype)
    )
    entropy = -jnp.sum(p * jnp.log(jnp.where(p > 0, p, 1)), axis=-1)
    even = entropy / jnp.log(jnp.maximum(count, 2).astype(p.dtype))
    return jnp.clip(jnp.round(most.astype(p.dtype) / layers_left**0.5 * (1 - even**2)).astype(jnp.int32), 0, most)


def flow_cut(
    score: Float[ArrayLike, "*batch n"],
    count: Int[Array, "*batch"] | int,
    capacity: int,
    *,
    mask: Bool[Array, "*batch n"] | None = None,
) -> Plan:
    """Cut some tokens of lowest score, a different number in each row, and pack what is left into static room.

    Args:
      score: from `flow_score`.
      count: how many to cut, from `flow_budget`.
      capacity: m, room for the rest. What finds no room is cut too, lowest score first; missing tokens leave empty slots.
      mask: True for a token that is still there; all by default.

    Law:
      flow_cut(score, n - k, k) = keep_top_k(score, k).

    Static schedule: the last cut is to the target, so its capacity is the target; before it, pass capacity n and let empty
    slots be masked (`attention.key_bias(plan)`), or the capacities that calibration found large enough.

    Raises:
      ValueError: capacity is negative or larger than n.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> score = jnp.array([[0.1, 0.9, 0.3, 0.7], [0.1, 0.9, 0.3, 0.7]])
      >>> jm.tokens.flow_cut(score, jnp.array([1, 3]), 3).segment_ids.tolist()
      [[-1, 0, 1, 2], [-1, 0, -1, -1]]

    Source: FlowCut (arXiv:2505.19536), which cuts as many from every row of a batch.
    """
    check_sequences("flow_cut", score=score, mask=mask)
    score, capacity = floating(score), python_int("flow_cut", "capacity", capacity)
    n = score.shape[-1]
    if not 0 <= capacity <= n:
        raise ValueError(f"flow_cut: capacity must be between 0 and the number of tokens, {n}; got {capacity}.")
    there = jnp.ones_like(score, bool) if mask is None else mask
    left = jnp.clip(there.sum(axis=-1, dtype=jnp.int32) - count, 0, capacity)
    # NaN is the lowest of those that are there, and ahead of those that are not
    finite = jnp.clip(jnp.where(jnp.isnan(score), -jnp.inf, score), jnp.finfo(score.dtype).min)
    return keep((ranks(jnp.where(there, finite, -jnp.inf)) < left[..., None]) & there, capacity)


def flow_layers(depth: int) -> list[int | None]:
    """For each layer of an encoder of which the last but one is read: the `layers_left` to cut with, or None.

    Law:
      the last that is not None is 0: there the target is met.

    Raises:
      ValueError: depth below 2.

    Example:
      >>> import jaxmerge as jm
      >>> jm.tokens.flow_layers(6)
      [None, 2, None, 0, None, None]

    Source: FlowCut (arXiv:2505.19536): after every second layer, counted from the one that is read.
    """
    if python_int("flow_layers", "depth", depth) < 2:
        raise ValueError(f"flow_layers: depth must be 2 or more, got {depth}.")
    left = [depth - 2 - i - 1 for i in range(depth)]
    return [x if x >= 0 and x % 2 == 0 else None for x in left]


def _share(x: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
    """x / sum x, in float32; 0 where the sum is 0 or not finite."""
    x = x.astype(segments.accumulator(x.dtype))
    total = x.sum(axis=-1, keepdims=True)
    sound = (total > 0) & jnp.isfinite(total)
    return jnp.where(sound, x / jnp.where(sound, total, 1), 0)
