"""Merging on a grid, for diffusion models: one token of each cell receives."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import ArrayLike, Float, Int, Key

from jaxmerge._plan import Plan, identity
from jaxmerge.tokens._checks import checked_metric, checked_r, checked_sizes
from jaxmerge.tokens.matching._two_sided import drawn, two_sided_matching


def grid_matching(
    metric: Float[ArrayLike, "*batch n d"],
    r: int,
    *,
    grid: tuple[int, int],
    stride: tuple[int, int] = (2, 2),
    key: Key[Array, "*#batch"] | None = None,
) -> Plan:
    """Merge the r tokens of a grid that are most like a receiver; each cell of the grid has one receiver.

    Receivers lie all over the image, so that what is unmerged again has no holes. Cells at the border that are not whole
    have no receiver: their tokens are sources.

    Args:
      metric: what to compare tokens by; tomesd takes the block's input as it is, before the norm.
      r: how many tokens to remove; the authors' ratio is r = int(n * ratio), .5 by default.
      grid: (h, w) with h w = n, row by row.
      stride: (sy, sx), the size of a cell.
      key: None makes the upper left token of each cell the receiver; a key, a random one, the same in every row of the
        batch, so that conditional and unconditional halves stay aligned. One key per row draws anew in each.

    Returns:
      A plan of n - r segments, in the order of the tokens that stay.

    Raises:
      ValueError: r above the number of sources (the official code clips it), a grid that does not hold n tokens, a cell
        larger than the grid or below 1. TypeError: r is not an int.

    Cost: similarities of n (1 - 1 / (sy sx)) sources with n / (sy sx) receivers.

    The residual is added outside, x + unmerge(plan, f(merge(plan, norm(x)))): what stays unmerged keeps the detail.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> x = jnp.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [0.9, 0.0], [0.5, 0.5], [0.4, 0.5], [0.0, 0.9]])
      >>> jm.tokens.grid_matching(x, 4, grid=(2, 4)).segment_ids.tolist()
      [0, 0, 1, 1, 0, 2, 3, 1]

    Source: tomesd (arXiv:2303.17604), `bipartite_soft_matching_random2d`; merge without weights is its mean. Its lists
    come from an unstable sort, so its order of tokens is arbitrary; sets and unmerged results are the same.
    """
    name = "grid_matching"
    metric = checked_metric(name, metric)
    n, (h, w) = metric.shape[-2], checked_sizes(name, "grid", grid, rank=2)
    sy, sx = checked_sizes(name, "stride", stride, rank=2)
    if h * w != n:
        raise ValueError(f"{name}: grid {grid} holds {h * w} tokens, metric has n={n}.")
    if sy > h or sx > w:
        raise ValueError(f"{name}: stride {stride} must fit into grid {grid}.")
    cells = _cells(h, w, sy, sx)
    count = len(cells)
    why = f"a grid of {grid} in cells of {stride} has {count} receivers and {n - count} sources"
    r = checked_r(name, r, n - count, why)
    if r == 0:
        return identity(metric.shape[-2], like=metric)
    if key is None:
        receivers = cells[:, 0]
        return two_sided_matching(metric, np.setdiff1d(np.arange(n), receivers), receivers, r)

    def split(key):
        member = jax.random.randint(key, (count,), 0, sy * sx)
        receivers = jnp.take_along_axis(jnp.asarray(cells), member[:, None], axis=1)[:, 0]
        receives = jnp.zeros(n, bool).at[receivers].set(True)
        pack = lambda mask, size: jnp.flatnonzero(mask, size=size).astype(jnp.int32)
        return pack(~receives, n - count), pack(receives, count)

    sources, receivers = drawn(name, key, split)
    return two_sided_matching(metric, sources, receivers, r)


def _cells(h: int, w: int, sy: int, sx: int) -> Int[np.ndarray, "cells members"]:
    """Positions of the tokens of each whole cell, row by row."""
    rows, columns = h // sy, w // sx
    at = np.arange(h * w, dtype=np.int32).reshape(h, w)[: rows * sy, : columns * sx]
    return at.reshape(rows, sy, columns, sx).transpose(0, 2, 1, 3).reshape(rows * columns, sy * sx)
