"""Pooling: which positions become one is known before any token is: windows of a grid, runs of a sequence, pairs of frames.

Such a plan is a constant. With `like=x` it takes the batch axes and the layout of the tokens that it is for; without, it has no
batch axes, and `jax.vmap(jm.merge, in_axes=(None, 0))` applies it to every row of a batch.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import ArrayLike, Shaped

from jaxmerge import _segments as segments
from jaxmerge._plan import Plan, SoftPlan
from jaxmerge.tokens._checks import checked_sizes


def grid_pool(
    grid: Sequence[int], out: Sequence[int], *, like: Shaped[ArrayLike, "*batch n d"] | None = None
) -> Plan | SoftPlan:
    """Average a grid of tokens down to a smaller grid, of any rank: sequences, images, videos.

    Args:
      grid: sizes of the grid, row-major: (n,), (height, width) or (frames, height, width).
      out: sizes after pooling, none larger than before.
      like: the tokens, for their batch axes and layout.

    Returns:
      Where all sizes divide, a Plan: windows do not overlap. Otherwise a SoftPlan of zeros and ones whose windows overlap at
      their edges: along each axis output i averages [floor(i h / m), ceil((i + 1) h / m)). `merge` averages either.

    Law:
      where sizes divide, compose(grid_pool(b, c), grid_pool(a, b)) = grid_pool(a, c): pooled grids nest.

    Raises:
      ValueError: ranks differ, a size is below 1 or grows, `like` does not hold the grid's tokens.
      TypeError: a size is not an int.

    Cost: the plan is a constant. A SoftPlan is a dense (m, n) matrix, per row of the batch where `like` has one.

    Example:
      >>> import jaxmerge as jm
      >>> jm.tokens.grid_pool((2, 4), (1, 2)).segment_ids.tolist()
      [0, 0, 1, 1, 0, 0, 1, 1]
      >>> jm.tokens.grid_pool((3,), (2,)).weights.astype(int).tolist()
      [[1, 1, 0], [0, 1, 1]]

    Source: adaptive average pooling of TokenFLEX (arXiv:2504.03154), with PyTorch's windows.
    """
    grid, out = checked_sizes("grid_pool", "grid", grid), checked_sizes("grid_pool", "out", out)
    if len(grid) != len(out) or any(m > n for n, m in zip(grid, out, strict=True)):
        raise ValueError(f"grid_pool: out must be as long as grid, with no size larger than the grid's; got {grid} to {out}.")
    if all(n % m == 0 for n, m in zip(grid, out, strict=True)):
        windows = np.meshgrid(*(np.arange(n) // (n // m) for n, m in zip(grid, out, strict=True)), indexing="ij")
        return _hard(np.ravel_multi_index(windows, out).ravel(), math.prod(out), like)
    weights = np.ones((1, 1), np.float32)
    for n, m in zip(grid, out, strict=True):
        i, j = np.arange(m)[:, None], np.arange(n)[None]
        weights = np.kron(weights, ((j >= i * n // m) & (j < -(-(i + 1) * n // m))).astype(np.float32))
    return SoftPlan(_laid_out(weights, like))


def matryoshka_pool(grid: Sequence[int], tokens: int, *, like: Shaped[ArrayLike, "*batch n d"] | None = None) -> Plan:
    """Average an image's tokens down to `tokens` of them, one of M3's nested grids: square windows of side sqrt(n / tokens).

    Args:
      grid: (height, width).
      tokens: how many to leave; 1, 9, 36, 144 and 576 of M3's 24 x 24.
      like: the tokens, for their batch axes and layout.

    Law:
      sets nest: pooling to 144 and then to 36 is pooling to 36.

    Raises:
      ValueError: no square window cuts this grid into that many tokens; the official code would drop the rest of the image.

    Cost: the plan is a constant.

    Example:
      >>> import jaxmerge as jm
      >>> jm.tokens.matryoshka_pool((4, 4), 4).segment_ids.tolist()
      [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]

    Source: Matryoshka Multimodal Models (arXiv:2405.17430), `mu-cai/matryoshka-mm`.
    """
    h, w = grid = checked_sizes("matryoshka_pool", "grid", grid, rank=2)
    (tokens,) = checked_sizes("matryoshka_pool", "tokens", (tokens,))
    side = math.isqrt(h * w // tokens)
    if side == 0 or h % side or w % side or side * side * tokens != h * w:
        sides = [s for s in range(1, min(h, w) + 1) if h % s == 0 and w % s == 0]
        raise ValueError(
            f"matryoshka_pool: no square window cuts {h} x {w} into {tokens} tokens; "
            f"possible are {sorted(h * w // (s * s) for s in sides)}. grid_pool takes any other size."
        )
    plan = grid_pool(grid, (h // side, w // side), like=like)
    assert isinstance(plan, Plan)  # the sides divide
    return plan


def sequence_pool(n: int, m: int, *, like: Shaped[ArrayLike, "*batch n d"] | None = None) -> Plan:
    """Average n tokens in a row down to m: runs of consecutive tokens, as equal as can be, the longer ones first.

    Args:
      n: how many tokens there are.
      m: how many to leave. For a factor f write m = ceil(n / f), -(-n // f).
      like: the tokens, for their batch axes and layout.

    Law:
      sizes differ by one at most and never grow along the sequence.

    Raises:
      ValueError: m is below 1 or above n.

    Cost: the plan is a constant.

    Example:
      >>> import jaxmerge as jm
      >>> jm.tokens.sequence_pool(7, 3).segment_ids.tolist()
      [0, 0, 0, 1, 1, 2, 2]

    Source: ARC-Encoder (arXiv:2510.20535), both of its rates: a number of tokens, and a pooling factor.
    """
    (n,), (m,) = checked_sizes("sequence_pool", "n", (n,)), checked_sizes("sequence_pool", "m", (m,))
    if m > n:
        raise ValueError(f"sequence_pool: m must be between 1 and n={n}, got {m}.")
    short, longer = divmod(n, m)
    return _hard(np.repeat(np.arange(m), [short + 1] * longer + [short] * (m - longer)), m, like)


def temporal_pairs(
    frames: int,
    tokens: int = 1,
    *,
    last: Literal["keep", "drop"] = "keep",
    like: Shaped[ArrayLike, "*batch n d"] | None = None,
) -> Plan:
    """Average each token of a video with the token in its place in the next frame: frames 0 and 1, 2 and 3, and so on.

    Args:
      frames: how many there are; tokens of one frame follow each other, frame after frame.
      tokens: per frame. 1 where time is the merged axis alone.
      last: what becomes of the last of an odd number of frames: "keep" it as it is, or "drop" it, as the official code does.
      like: the tokens, for their batch axes and layout.

    Law:
      unmerge repeats each frame twice; on a video whose frames come in equal pairs, unmerge(merge(x)) = x.

    Raises:
      ValueError: a size below 1, another `last`, one frame that would be dropped.

    Example:
      >>> import jaxmerge as jm
      >>> jm.tokens.temporal_pairs(5).segment_ids.tolist()
      [0, 0, 1, 1, 2]
      >>> jm.tokens.temporal_pairs(2, tokens=3).segment_ids.tolist()
      [0, 1, 2, 0, 1, 2]

    Cost: the plan is a constant.

    Source: temporal dimension token merging of On-device Sora (arXiv:2502.04363), `eai-lab/On-device-Sora`. Its unmerge adds a
    frame if the number of *pairs* is odd and not 15, so that 6 frames come back as 7, and 5 as 4; ours returns what went in.
    """
    (frames,) = checked_sizes("temporal_pairs", "frames", (frames,))
    (tokens,) = checked_sizes("temporal_pairs", "tokens", (tokens,))
    if last not in ("keep", "drop"):
        raise ValueError(f'temporal_pairs: last must be "keep" or "drop", got {last!r}.')
    if frames == 1 and last == "drop":
        raise ValueError('temporal_pairs: a single frame has no pair, nothing would be left; use last="keep".')
    pair, place = np.divmod(np.arange(frames * tokens), tokens)
    m = (frames + (last == "keep")) // 2
    ids = pair // 2 * tokens + place
    return _hard(np.where(ids < m * tokens, ids, -1), m * tokens, like)


def _hard(ids: np.ndarray, m: int, like: Any) -> Plan:
    return Plan(_laid_out(ids.astype(np.int32), like), m)


def _laid_out(constant: np.ndarray, like: Any) -> Array:
    """A constant (..., n) for every row of `like` (*batch, n, d), laid out as it is."""
    if like is None:
        return jnp.asarray(constant)
    like = jnp.asarray(like)
    if like.ndim < 2 or like.shape[-2] != constant.shape[-1]:
        raise ValueError(f"pooling: like must be the tokens, (*batch, {constant.shape[-1]}, d); got {like.shape}.")
    segments.check_whole("pooling: like", like, like.ndim - 2)
    return segments.rows_like(constant, like)
