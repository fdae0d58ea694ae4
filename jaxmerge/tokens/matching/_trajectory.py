"""Merging along trajectories: a token of a video joins the one of the frame before that it came from."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import ArrayLike, Float

from jaxmerge import _segments as segments
from jaxmerge._plan import Plan, from_parents, identity
from jaxmerge.tokens._checks import checked_capacity, checked_metric, checked_sizes
from jaxmerge.tokens._nearest import unit


def trajectory_matching(
    metric: Float[ArrayLike, "*batch n d"],
    *,
    grid: tuple[int, int],
    window: int,
    threshold: float | None = None,
    capacity: int | None = None,
) -> Plan:
    """Follow each token of a video back through the frames and merge what lies on one trajectory.

    The token at (y, x) of frame t came from the one that it is most like, among those at most `window` rows and columns
    away, in frame t - 1. Of equal ones the first in reading order wins.

    Args:
      metric: what to compare tokens by, frame by frame, each row by row: n = frames x h x w. COVE takes diffusion features.
      grid: (h, w) of a frame.
      window: how far a token may move from frame to frame; (2 window + 1)² candidates.
        Beyond the frame there are none, so any large number looks everywhere.
      threshold: a cosine; a token that is not more similar than that to any candidate begins a trajectory. None: only the
        first frame begins trajectories.
      capacity: m, room for that many trajectories, where a threshold is given. Further ones overflow, free slots are empty.

    Returns:
      A plan of h w segments, or of `capacity`, in the order in which trajectories begin. `unmerge` gives every token its
      trajectory's value again.

    Law:
      every token lies on one trajectory; without a threshold each holds a token of the first frame; a still video gives
      h w trajectories, one per place, if its tokens differ.

    Raises:
      ValueError: n is no multiple of h w, a negative window, a threshold without capacity or the reverse.

    Cost: n (2 window + 1)² similarities, one offset at a time, in memory O(n); log2(frames) gathers join the frames.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> frame = jnp.eye(4)
      >>> video = jnp.concatenate([frame, frame[jnp.array([1, 0, 2, 3])]])  # two neighbours change places
      >>> jm.tokens.trajectory_matching(video, grid=(2, 2), window=1).segment_ids.tolist()
      [0, 1, 2, 3, 1, 0, 2, 3]

    Source: COVE (arXiv:2406.08850), the sliding window and the merging over time; its code is not public. There a token
    looks for its best matches in the other frames; ours looks for one, in the frame before, so that trajectories share no
    token and can be unmerged. The threshold is ours.
    """
    name = "trajectory_matching"
    metric = checked_metric(name, metric)
    *batch, n, d = metric.shape
    h, w = checked_sizes(name, "grid", grid, rank=2)
    if n % (h * w):
        raise ValueError(f"{name}: n={n} tokens are no whole number of frames of grid {grid}.")
    window = min(checked_capacity(name, window, "window"), max(h, w) - 1)  # no token can move farther
    if (threshold is None) != (capacity is None):
        raise ValueError(
            f"{name}: threshold and capacity come together, because a threshold makes the number of trajectories "
            f"depend on data; got threshold={threshold}, capacity={capacity}."
        )
    frames, place = n // (h * w), h * w
    m = place if capacity is None else capacity
    if frames < 2:
        return Plan(identity(metric.shape[-2], like=metric).segment_ids, m)
    u = unit(metric).reshape(*batch, frames, h, w, d)
    now, before = u[..., 1:, :, :, :], u[..., :-1, :, :, :]
    side = np.arange(-window, window + 1)
    dy, dx = (o.reshape(-1) for o in np.meshgrid(side, side, indexing="ij"))
    y, x = np.arange(h)[:, None] + dy[:, None, None], np.arange(w) + dx[:, None, None]
    inside = (y >= 0) & (y < h) & (x >= 0) & (x < w)  # (offsets, h, w)
    edge = [(0, 0, 0)] * (before.ndim - 3) + [(window, window, 0)] * 2 + [(0, 0, 0)]
    before = lax.pad(before, jnp.zeros((), before.dtype), edge)

    def offset(best, at):
        dy, dx, may = at
        shifted = lax.dynamic_slice_in_dim(before, dy + window, h, axis=-3)
        shifted = lax.dynamic_slice_in_dim(shifted, dx + window, w, axis=-2)
        similarity = jnp.sum(now * shifted, axis=-1)
        better = jnp.broadcast_to(may, similarity.shape) & (similarity > best[0])
        return (jnp.where(better, similarity, best[0]), jnp.where(better, dy * w + dx, best[1])), None

    none = now[..., 0]
    start = jnp.full_like(none, -jnp.inf), jnp.zeros_like(none, jnp.int32)
    offsets = jnp.asarray(dy, jnp.int32), jnp.asarray(dx, jnp.int32), jnp.asarray(inside)
    (best, shift), _ = lax.scan(offset, start, offsets)
    flat = lambda a: a.reshape(*batch, n - place)
    best, shift = flat(best), flat(shift)
    here = segments.positions(identity(metric.shape[-2], like=metric).segment_ids)
    back = here[..., place:] - place + shift
    if threshold is not None:
        back = jnp.where(best > threshold, back, here[..., place:])
    return from_parents(jnp.concatenate([here[..., :place], back], axis=-1), m, hops=frames - 1)
