"""What stands still in a video: windows of frames chosen by dynamic programming, their static tokens merged over time."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import ArrayLike, Bool, Float, Int

from jaxmerge import _segments as segments
from jaxmerge._plan import Plan, from_parents
from jaxmerge.tokens._checks import check_sequences
from jaxmerge.tokens._nearest import unit


class Windows(NamedTuple):
    """For every frame, the first and the last frame of its window; for every token, whether it is static there.

    A static token is alike from frame to frame through the whole window; no token is static in a window of one frame.
    """

    start: Int[Array, "*batch frames"]
    end: Int[Array, "*batch frames"]
    static: Bool[Array, "*batch frames n"]

    @property
    def saved(self) -> Int[Array, "*batch"]:
        """How many tokens merging the static ones removes: the most that any choice of windows could."""
        here = segments.positions(self.start)
        return jnp.sum(self.static & (self.start != here)[..., None], axis=(-2, -1), dtype=jnp.int32)


def frame_similarity(x: Float[ArrayLike, "*batch frames n d"]) -> Float[Array, "*batch steps n"]:
    """The cosine of each token with the one at its place in the next frame; no gradient.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.tokens.frame_similarity(jnp.array([[[1.0, 0.0]], [[2.0, 0.0]], [[0.0, 1.0]]])).tolist()
      [[1.0], [0.0]]
    """
    check_sequences("frame_similarity", axes=(-3,), x=x)
    u = unit(lax.stop_gradient(jnp.asarray(x)))
    return jnp.sum(u[..., :-1, :, :] * u[..., 1:, :, :], axis=-1)


def static_windows(
    similarity: Float[ArrayLike, "*batch steps n"], *, threshold: float = 0.8, max_window: int | None = None
) -> Windows:
    """Cut a video into windows of frames so that merging each window's static tokens removes the most tokens.

        value(s, e) = #{tokens with similarity > threshold in every step from s to e} · (e - s)
        best(e)     = max over s of best(s - 1) + value(s, e)

    Of equally good cuts the last window is the shortest, and so on to the front.

    Args:
      similarity: of each token with itself in the next frame; one step fewer than frames. NaN is not alike.
      threshold: what counts as alike, exclusive.
      max_window: the longest window, in frames. None: no limit.

    Returns:
      `Windows` over steps + 1 frames.

    Law:
      windows are disjoint runs that cover all frames; no other cut saves more.

    Raises:
      ValueError: max_window below 1.

    Cost: frames · max_window · n comparisons in one scan over the frames.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> windows = jm.tokens.static_windows(jnp.array([[0.9, 0.9], [0.9, 0.1], [0.1, 0.1]]), threshold=0.5)
      >>> windows.start.tolist(), windows.saved.item()
      ([0, 0, 2, 3], 2)

    Source: `select_static_windows` of HoliTom (arXiv:2505.21334).
    """
    check_sequences("static_windows", axes=(-2, -1), similarity=similarity)
    similarity = lax.stop_gradient(jnp.asarray(similarity))
    frames = similarity.shape[-2] + 1
    if max_window is not None and max_window < 1:
        raise ValueError(f"static_windows: max_window must be 1 frame or more, got {max_window}.")
    longest = frames if max_window is None else min(max_window, frames)

    def row(alike):
        alike = jnp.pad(alike, ((1, 0), (0, 0)))  # frame i with frame i - 1
        none = jnp.sum(alike[0], dtype=jnp.int32)  # 0, laid out as the data
        earlier = jnp.arange(longest, dtype=jnp.int32)  # a window of length 1 + earlier

        def forward(carry, step):
            best, run = carry  # best[j]: the most that the first j frames save
            i, alike = step
            run = jnp.where(alike, run + 1, 0)  # steps in a row that each token stood still
            still = jnp.sum(run[None, :] >= earlier[:, None], axis=-1, dtype=jnp.int32)
            total = best.at[jnp.maximum(i - earlier, 0)].get(mode="promise_in_bounds") + still * earlier
            choice = jnp.argmax(jnp.where(earlier <= i, total, -1)).astype(jnp.int32)
            best = jnp.where(jnp.arange(frames + 1) == i + 1, total.max(where=earlier <= i, initial=0), best)
            return (best, run), (choice, run)

        def backward(window, step):
            i, choice = step
            start, end = window
            here = i < start  # the last frame of the window before
            window = jnp.where(here, i - choice, start), jnp.where(here, i, end)
            return window, window

        order = jnp.arange(frames, dtype=jnp.int32)
        begin = jnp.zeros(frames + 1, jnp.int32) + none, jnp.zeros_like(alike[0], jnp.int32)
        _, (choice, run) = lax.scan(forward, begin, (order, alike))
        _, (start, end) = lax.scan(backward, (none + frames, none + frames), (order, choice), reverse=True)
        span = (end - start)[:, None]
        static = (run.at[end].get(mode="promise_in_bounds") >= span) & (span > 0)
        return Windows(start, end, static)

    return segments.batched(row, similarity.ndim - 2)(similarity > threshold)


def static_merging(
    x: Float[ArrayLike, "*batch frames n d"],
    *,
    threshold: float = 0.8,
    max_window: int | None = None,
    capacity: int | None = None,
) -> Plan:
    """Merge each static token over its window, into the window's first frame.

    Args:
      x: tokens of each frame.
      threshold, max_window: see `static_windows`.
      capacity: room for that many tokens: how many are left depends on the data. None: room for all.

    Returns:
      A plan over the frames · n tokens, frame after frame: apply it to x.reshape(*batch, frames * n, d). Numbered by the first
      position; no gradient flows through it.

    Law:
      a video that stands still becomes one frame; with threshold=1.0 it is the identity.

    Cost: frames n d multiply-adds and one scan over the frames.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> x = jnp.array([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.1], [0.0, 1.0]]])  # the first token stays
      >>> jm.tokens.static_merging(x).segment_ids.tolist()
      [0, 1, 0, 2]

    Source: the temporal merging of HoliTom (arXiv:2505.21334).
    """
    x = jnp.asarray(x)
    check_sequences("static_merging", axes=(-3, -2), x=x)
    *batch, frames, n, _ = x.shape
    windows = static_windows(frame_similarity(x), threshold=threshold, max_window=max_window)
    parents = first_of_window(windows).reshape(*batch, frames * n)
    return from_parents(parents, frames * n if capacity is None else capacity, hops=1)


def first_of_window(windows: Windows) -> Int[Array, "*batch frames n"]:
    """Where each token goes, as a position in frames · n: a static one to its window's first frame, the others nowhere."""
    n = windows.static.shape[-1]
    zero = jnp.zeros_like(windows.static, jnp.int32)
    token = lax.broadcasted_iota(jnp.int32, windows.static.shape, windows.static.ndim - 1)
    frame = lax.broadcasted_iota(jnp.int32, windows.static.shape, windows.static.ndim - 2)
    return jnp.where(windows.static, windows.start[..., None] * n, zero + frame * n) + token
