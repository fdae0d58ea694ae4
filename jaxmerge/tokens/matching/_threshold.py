"""Matching by a threshold: how many tokens merge depends on the image; a static capacity holds those that stay."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import ArrayLike, Bool, Float, Int

from jaxmerge import _segments as segments
from jaxmerge._plan import Plan, from_parents, identity
from jaxmerge._rank import ranks
from jaxmerge.tokens._checks import checked_capacity, checked_metric, checked_r, protected_mask
from jaxmerge.tokens._nearest import nearest
from jaxmerge.tokens.matching._two_sided import look, sent


def threshold_matching(
    metric: Float[ArrayLike, "*batch n d"],
    threshold: Float[ArrayLike, "*#batch"],
    capacity: int,
    *,
    protect: Sequence[int] = (),
    valid: Bool[ArrayLike, "*batch n"] | None = None,
    max_r: int | None = None,
) -> Plan:
    """Merge every even position whose best odd one is more similar than the threshold; complex images keep more tokens.

    Args:
      metric: what to compare tokens by.
      threshold: a cosine, found by `matching_threshold`; one for all, or one per row of the batch.
      capacity: m, room for that many tokens; n is always enough. Free slots come last and are empty; `plan.overflow`
        counts positions that found no room.
      protect: positions that neither move nor receive.
      valid: which tokens are real, in a second round `plan.sizes > 0` of the first. Others are dropped.
      max_r: at most so many merges per row, the most similar ones.

    Returns:
      A plan of `capacity` segments, in the order of the tokens that stay.

    Law:
      raising the threshold never merges more; t = matching_threshold(x, r) removes r tokens per row on average, if t > 0 and
      no two pairs tie.

    Raises:
      ValueError: max_r negative, a protected position outside [-n, n).

    Cost: that of `bipartite_matching`, without a rank unless max_r asks for one.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> x = jnp.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, -1.0]])
      >>> plan = jm.tokens.threshold_matching(x, 0.9, 4)
      >>> plan.segment_ids.tolist(), plan.sizes.tolist()
      ([0, 0, 1, 2], [2, 1, 1, 0])

    Source: DyMU (arXiv:2504.17040), `batch_level_bipartite_soft_matching` and the threshold of `bipartite_soft_matching`.
    The official batch form divides by size + 1e-4 and orders tokens by an unstable sort; groups and sizes are the same.
    """
    name = "threshold_matching"
    metric, capacity = checked_metric(name, metric), checked_capacity(name, capacity)
    sources, best, goal = _pairs(name, metric, protect, valid)
    threshold = jnp.asarray(threshold, jnp.float32)
    moves = best > threshold.reshape(*(1,) * (best.ndim - 1 - threshold.ndim), *threshold.shape, 1)
    if max_r is not None:
        moves &= ranks(best) < checked_r(name, max_r, metric.shape[-2], "max_r counts merges among n tokens")
    parents = sent(metric, sources, jnp.where(moves, goal, sources))
    if valid is not None:
        parents = jnp.where(valid, parents, -1)
    return from_parents(parents, capacity, hops=1)


def matching_threshold(
    metric: Float[ArrayLike, "*batch n d"],
    r: int,
    *,
    protect: Sequence[int] = (),
    valid: Bool[ArrayLike, "*batch n"] | None = None,
) -> Float[Array, ""]:
    """The threshold at which r tokens per row merge on average, over this batch; at least 0.

    Of all rows' pairs, similarity descending, it is the one behind the first r x rows: exactly those are above it.

    Args:
      metric, protect, valid: as for `threshold_matching`.
      r: tokens to remove per row, on average, at most what one row can.

    Raises:
      ValueError: r out of range. TypeError: r is not an int.

    Cost: the similarities, and 31 counts over all pairs. Nothing is sorted or gathered: over a sharded batch only counts
    travel.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> x = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
      >>> round(jm.tokens.matching_threshold(x, 1).item(), 4)
      0.8

    Source: DyMU (arXiv:2504.17040), which finds the threshold of each layer so; `RunningThreshold` averages over batches.
    """
    name = "matching_threshold"
    metric = checked_metric(name, metric)
    n = metric.shape[-2]
    fixed = protected_mask(name, protect, n)
    largest = min((~fixed[::2]).sum().item(), (~fixed[1::2]).sum().item())
    r = checked_r(name, r, largest, f"of n={n} tokens, {fixed.sum()} protected, no more can merge in each row")
    _, best, _ = _pairs(name, metric, protect, valid)
    return _largest_after(best, min(r * (best.size // best.shape[-1]), best.size - 1))


class RunningThreshold(NamedTuple):
    """The mean of thresholds over batches, one per layer or a scalar: explicit state for calibration.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> state = jm.tokens.RunningThreshold.init(2)
      >>> state = state.update(jnp.array([0.5, 0.9])).update(jnp.array([0.7, 0.7]))
      >>> print(state.threshold.round(3))
      [0.6 0.8]

    Source: DyMU (arXiv:2504.17040), where 1 stands for "nothing merges yet" too.
    """

    threshold: Float[Array, "..."]
    count: Int[Array, ""]

    @classmethod
    def init(cls, layers: int) -> "RunningThreshold":
        """Before any batch: a threshold of 1, above which nothing is."""
        return cls(jnp.ones(layers), jnp.zeros((), jnp.int32))

    def update(self, threshold: Float[Array, "..."]) -> "RunningThreshold":
        """With one more batch counted in."""
        count = self.count.astype(jnp.float32)
        return RunningThreshold((self.threshold * count + threshold) / (count + 1), self.count + 1)


def earlier_matching(
    metric: Float[ArrayLike, "*batch n d"], threshold: float, capacity: int, *, hops: int | None = None
) -> Plan:
    """Merge each frame into the earlier one that it is most like, if (cos + 1) / 2 is above the threshold.

    Args:
      metric: one vector per frame, in time order.
      threshold: in [0, 1]; the authors' is .75.
      capacity: m, room for that many merged frames; further ones overflow, free slots are empty.
      hops: None follows chains: a frame whose best match has merged itself goes where that went. 1 is the official rule,
        one step: such a frame is dropped, its content lost.

    Returns:
      A plan whose slots are numbered by their first frame. Tokens within frames merge as features: merge(plan, x) of
      x (*batch, frames, tokens, channels) is the mean of each token over the frames.

    Law:
      the first frame stays; with hops=None no frame is lost.

    Raises:
      ValueError: hops below 1.

    Cost: n² similarities of frames.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> x = jnp.array([[1.0, 0.0], [1.0, 0.1], [0.9, 0.2], [-1.0, 0.0]])
      >>> jm.tokens.earlier_matching(x, 0.75, 2).segment_ids.tolist()
      [0, 0, 0, 1]
      >>> jm.tokens.earlier_matching(x, 0.75, 2, hops=1).segment_ids.tolist()
      [0, 0, -1, 1]

    Source: B-VLLM (arXiv:2412.09919), `threshold_soft_matching`. Its spatial merging is `in_rounds` with `halvings`.
    """
    metric = checked_metric("earlier_matching", metric)
    n = metric.shape[-2]
    capacity = checked_capacity("earlier_matching", capacity)
    best, to = nearest(metric, metric, mask=np.tri(n, k=-1, dtype=bool))
    to = jnp.where((best + 1) / 2 > threshold, to.astype(jnp.int32), segments.positions(to))
    return from_parents(to, capacity, hops=hops)


def _pairs(name: str, metric: Array, protect: Sequence[int], valid: ArrayLike | None) -> tuple[Array, Array, Array]:
    """Even positions, the similarity of each to its best odd one, and that one's position; -inf where there is none."""
    n = metric.shape[-2]
    fixed = protected_mask(name, protect, n)
    if n == 1:
        alone = identity(metric.shape[-2], like=metric).segment_ids
        return alone, jnp.full_like(metric[..., 0], -jnp.inf, jnp.float32), alone
    free = jnp.broadcast_to(~fixed, metric.shape[:-1])
    if valid is not None:
        free &= jnp.asarray(valid)
    mask = free[..., ::2, None] & free[..., None, 1::2]
    return look(metric, np.arange(0, n, 2), np.arange(1, n, 2), mask)


def _largest_after(x: Float[Array, "..."], k: int) -> Float[Array, ""]:
    """The value that k others are ahead of, negative ones counted as 0: found bit by bit, as bits order like magnitudes."""
    bits = lax.bitcast_convert_type(jnp.where(x > 0, x, 0), jnp.int32)

    def step(i, found):
        larger = found | (jnp.int32(1) << (30 - i))
        return jnp.where(jnp.sum(bits >= larger, dtype=jnp.int32) > k, larger, found)

    return lax.bitcast_convert_type(jax.lax.fori_loop(0, 31, step, jnp.int32(0)), jnp.float32)
