"""HoliTom: merge what stands still over time; then, in each frame, keep what attention points at and cluster the rest."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import ArrayLike, Bool, Float, Shaped

from jaxmerge import _segments as segments
from jaxmerge._plan import Plan, from_parents, merge
from jaxmerge._rank import ranks
from jaxmerge.tokens._checks import check_plan, check_rows, check_sequences, checked_tokens
from jaxmerge.tokens._nearest import nearest
from jaxmerge.tokens.clustering._density import clusters, density_centers, in_order, joined, keep_apart
from jaxmerge.tokens.clustering._static import first_of_window, frame_similarity, static_windows
from jaxmerge.tokens.pruning._prune import keep_top_k


class Weighted(NamedTuple):
    """A plan, and how much each position weighs: merge(plan, x, weight=weight)."""

    plan: Plan
    weight: Float[Array, "*batch n"]


def attention_and_density(
    x: Float[ArrayLike, "*batch n d"],
    attention: Shaped[Array, "*batch n"],
    keep: int,
    k: int,
    *,
    neighbors: int = 7,
    beta: float | None = 0.6,
) -> Weighted:
    """Keep the tokens of highest attention as they are, and gather the others around k density peaks.

    Args:
      x: tokens, clustered by Euclidean distance.
      attention: how much attention each token receives.
      keep: how many are kept for it.
      k: how many clusters of the others.
      neighbors: of a density; at most k of them count.
      beta: a cluster is beta · centre + (1 - beta) · mean of its other members, its centre alone if there are none. None: the
        plain mean of all.

    Returns:
      A plan of keep + k segments numbered by the first position they hold (the official tokens: first those kept, then the
      clusters by the position of their centre), and the weights that make the mean beta's. No gradient flows through either.

    Law:
      nothing is dropped while k > 0; the weights of each segment add up to 1, or with beta=None are 1 each.

    Raises:
      ValueError: keep or k do not fit n.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> x = jnp.array([[0.0], [5.0], [0.1], [0.2]])
      >>> plan, weight = jm.tokens.attention_and_density(x, jnp.array([0.1, 0.9, 0.2, 0.1]), 1, 1, beta=0.5)
      >>> plan.segment_ids.tolist(), weight.tolist()
      ([0, 1, 0, 0], [0.5, 1.0, 0.25, 0.25])

    Source: `merge_tokens_by_attention_density` of HoliTom (arXiv:2505.21334); its line for D > 0 raises, for the shape of a
    mask. With keep=0 it is `merge_tokens_by_density`. beta=None is NO_BETA=1.
    """
    x, attention = checked_tokens("attention_and_density", x), jnp.asarray(attention)
    check_rows("attention_and_density", x, attention=attention)
    kept = keep_top_k(lax.stop_gradient(attention), keep).kept
    if k == 0:
        plan = keep_apart(Plan(jnp.where(kept, 0, -1), 0), kept, keep)
        return Weighted(plan, plan.kept.astype(jnp.float32))
    near = min(neighbors, k)
    centers = density_centers(x, k, neighbors=near, mask=~kept)
    plan = keep_apart(clusters(x, centers, k, mask=~kept, most=k), kept, keep)
    return Weighted(plan, center_weight(plan, centers | kept, beta))


def attention_and_similarity(
    x: Float[ArrayLike, "*batch n d"], attention: Shaped[Array, "*batch n"], keep: int, *, halving: bool = False
) -> Weighted:
    """Keep the tokens of highest attention; each of the others joins the kept one that it is most like.

    Args:
      x: tokens, compared by cosine.
      attention: how much attention each receives, in HoliTom from the prompt's last token.
      keep: how many stay.
      halving: weigh members as the official loop does, x_kept <- (x_kept + x) / 2 for one after the other: the last one that
        joins weighs 1/2, the one before 1/4, and so on. False: the mean of all.

    Returns:
      A plan of `keep` segments in the order of the kept tokens, so that rotary positions stay theirs, and the weights. No
      gradient flows through either.

    Law:
      nothing is dropped while keep > 0; with halving, the weights of each segment add up to 1.

    Raises:
      ValueError: keep outside [0, n].

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.9, 0.0]])
      >>> plan, weight = jm.tokens.attention_and_similarity(x, jnp.array([0.4, 0.3, 0.2, 0.1]), 2, halving=True)
      >>> plan.segment_ids.tolist(), weight.tolist()
      ([0, 1, 0, 0], [0.25, 1.0, 0.25, 0.5])

    Source: what HoliTom (arXiv:2505.21334) does inside the language model, from one layer on (HOLITOM_k, HOLITOM_r).
    """
    x, attention = checked_tokens("attention_and_similarity", x), jnp.asarray(attention)
    check_rows("attention_and_similarity", x, attention=attention)
    kept = keep_top_k(lax.stop_gradient(attention), keep).kept
    to = nearest(x, x, mask=jnp.broadcast_to(kept[..., None, :], (*kept.shape, kept.shape[-1]))).index.astype(jnp.int32)
    parents = jnp.where(kept, segments.positions(to), to if keep else -1)
    plan = from_parents(parents, keep, hops=1)
    if not halving:
        return Weighted(plan, plan.kept.astype(jnp.float32))

    def row(to, kept):  # after me, so many more halve what I brought
        here = jnp.arange(len(to))
        joins = (to[None, :] == to[:, None]) & ~kept[None, :]
        later = jnp.sum(joins & ((here[None, :] > here[:, None]) | kept[:, None]), axis=-1)
        return 0.5 ** (later + ~kept).astype(jnp.float32)

    weight = segments.batched(row, kept.ndim - 1)(parents, kept)
    return Weighted(plan, jnp.where(plan.kept, weight, 0.0))


def center_weight(plan: Plan, centers: Bool[Array, "*batch n"], beta: float | None) -> Float[Array, "*batch n"]:
    """Weights with which a segment's mean is beta · centre + (1 - beta) · mean of the others; 1 each for beta=None.

    Law:
      in each segment with a centre they add up to 1.

    Raises:
      ValueError: centers that are not of the plan's shape.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> plan, centers = jm.Plan(jnp.array([0, 1, 0, 0, -1]), 2), jnp.array([True, True, False, False, False])
      >>> jm.tokens.center_weight(plan, centers, 0.5).tolist()
      [0.5, 1.0, 0.25, 0.25, 0.0]
    """
    check_plan("center_weight", plan)
    if jnp.shape(centers) != plan.segment_ids.shape:
        raise ValueError(f"center_weight: centers must be {plan.segment_ids.shape}, as the plan; got {jnp.shape(centers)}.")
    if beta is None or plan.num_segments == 0:
        return plan.kept.astype(jnp.float32)
    others = segments.take(jnp.where(plan.kept, plan.segment_ids, 0), plan.sizes) - 1
    weight = jnp.where(centers, jnp.where(others > 0, beta, 1.0), (1 - beta) / jnp.maximum(others, 1).astype(jnp.float32))
    return jnp.where(plan.kept, weight, 0.0)


def holitom(
    x: Float[ArrayLike, "*batch frames n d"],
    attention: Float[ArrayLike, "*batch frames n"],
    *,
    ratio: float,
    threshold: float = 0.8,
    max_window: int | None = None,
    density: float = 0.0,
    neighbors: int = 7,
    beta: float | None = 0.6,
    capacity: int | None = None,
) -> Weighted:
    """A whole video to about `ratio` of its tokens: static tokens over time, then each frame by attention and density.

    1. `static_windows`: a static token becomes its mean over the window, in the window's first frame.
    2. ratio' = min(ratio · tokens / (tokens - those saved), 1).
    3. The static tokens of each window: round(ratio' · their number) clusters around density peaks.
    4. The others of each frame: m = ceil(ratio' · their number) segments, of which round((1 - density) m) are the tokens of
       highest attention and the rest clusters around density peaks; with no clusters, the rest is dropped.

    Args:
      x: tokens of each frame (HoliTom's are pooled). attention: how much each receives.
      ratio: the share of tokens to keep.
      threshold, max_window: see `static_windows`.
      density: the share of a frame's budget that goes to clusters (HoliTom's D).
      neighbors, beta: see `attention_and_density`.
      capacity: room for that many segments: their number depends on the data. None: room for all tokens.

    Returns:
      A plan over the frames · n tokens and their weights, for x.reshape(*batch, frames * n, d). Segments are numbered by the
      first position they hold. Budgets are computed in float32 (officially in float64: where ratio' times a number is whole
      to within 1e-7, ceil may differ by one). No gradient flows through either.

    Raises:
      ValueError: a ratio or density outside [0, 1]; attention that is not (*batch, frames, n).

    Cost: per frame that of two `density_centers`, and n centres at most.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> x = jnp.ones((4, 6, 2)) * jnp.arange(1.0, 7.0)[None, :, None]
      >>> plan, weight = jm.tokens.holitom(x, jnp.ones((4, 6)), ratio=0.125)
      >>> int((plan.sizes > 0).sum()), int(plan.kept.sum())
      (3, 24)

    Source: HoliTom (arXiv:2505.21334), what it does before the language model.
    """
    x, attention = jnp.asarray(x), lax.stop_gradient(jnp.asarray(attention))
    check_sequences("holitom", axes=(-3, -2), x=x)
    check_sequences("holitom", axes=(-2, -1), attention=attention)
    *batch, frames, n, _ = x.shape
    if not (0 <= ratio <= 1 and 0 <= density <= 1):
        raise ValueError(f"holitom: ratio and density must be between 0 and 1, got {ratio} and {density}.")
    if attention.shape != (*batch, frames, n):
        raise ValueError(f"holitom: attention must have shape {(*batch, frames, n)}, got {attention.shape}.")
    windows = static_windows(frame_similarity(x), threshold=threshold, max_window=max_window)
    up = first_of_window(windows)
    flat = lambda a: a.reshape(*batch, frames * n, *a.shape[len(batch) + 2 :])
    still = Plan(flat(up), frames * n)  # each static token in the slot of its first frame
    y = merge(still, flat(x)).reshape(x.shape)
    first = windows.static & (windows.start == segments.positions(windows.start))[..., None]
    moving = ~windows.static

    share = jnp.minimum(ratio * frames * n / (frames * n - windows.saved).astype(jnp.float32), 1.0)[..., None]
    budget = lambda mask: jnp.broadcast_to(share, mask.shape[:-1]) * mask.sum(axis=-1).astype(share.dtype)
    still_clusters = jnp.round(budget(first)).astype(jnp.int32)
    slots = jnp.ceil(budget(moving)).astype(jnp.int32)
    dominant = jnp.round(slots.astype(share.dtype) * (1 - density)).astype(jnp.int32)
    kept = moving & (ranks(jnp.where(moving, attention, -jnp.inf)) < dominant[..., None])

    near = min(neighbors, n)

    def around_peaks(mask, count):
        centers = density_centers(y, n, neighbors=near, mask=mask, count=count)
        return centers, joined(lax.stop_gradient(y), centers, mask)

    first_centers, to_first = around_peaks(first, still_clusters)
    rest_centers, to_rest = around_peaks(moving & ~kept, slots - dominant)
    token = segments.positions(to_first)
    to = jnp.where(kept, token, jnp.where(moving, to_rest, to_first))
    start = segments.positions(windows.start)[..., None] * n
    parents = jnp.where(first | moving, jnp.where(to >= 0, start + to, -1), up)
    plan = in_order(from_parents(flat(parents), frames * n if capacity is None else capacity, hops=2))

    # a cluster of static tokens is a mean of means: each position weighs its share of its window
    inner = from_parents(flat(jnp.where(first | moving, parents, -1)), plan.num_segments, hops=1)
    outer = center_weight(inner, flat(kept | first_centers | rest_centers), beta)
    length = flat(jnp.where(windows.static, (windows.end - windows.start + 1)[..., None], 1))
    weight = segments.take(still.segment_ids, outer) / length.astype(outer.dtype)
    return Weighted(plan, jnp.where(plan.kept, weight, 0.0))
