"""HiPrune: what the object layer looks at, with its neighbours on the grid, and what the deep layer gathers in."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import ArrayLike, Bool, Float

from jaxmerge import _segments as segments
from jaxmerge._plan import Plan
from jaxmerge._rank import highest
from jaxmerge.tokens._checks import check_sequences, floating
from jaxmerge.tokens.pruning._prune import keep


def hiprune(
    middle: Float[ArrayLike, "*batch n"],
    deep: Float[ArrayLike, "*batch n"],
    k: int,
    *,
    width: int,
    alpha: float = 0.1,
    wrap: bool = False,
) -> Plan:
    """Keep k patches in their order: anchors, the buffers around them, and as many registers as there is room for.

    Anchors are the round(alpha k / 5) patches that a middle layer looks at most; buffers are the four neighbours of each
    on the grid; registers are those of the rest that a deep layer looks at most. How many anchors and buffers there are
    depends on the image, k does not.

    Args:
      middle: attention that each patch receives in the object layer (LLaVA-1.5: layer 9), averaged over heads and queries.
      deep: the same in the last layer that is read (LLaVA-1.5: layer -2).
      k: how many to keep.
      width: patches in a row of the grid, which is read row by row; n is a multiple of it. No class token.
      alpha: the part of k that anchors and their buffers may take.
      wrap: find neighbours as the official code does, on the line and not on the grid: left of a row is the end of the row
        above, and what falls off either end of the line is its first or its last patch.

    Law:
      every anchor is kept, and every neighbour of it; exactly k patches are kept.

    Cost: two rankings of n scores; no sort up to 4096 patches.

    Raises:
      ValueError: shapes that differ, k outside [0, n], a width that does not divide n, anchors and buffers beyond k.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> middle = jnp.zeros(9).at[4].set(1.0)  # the centre of 3 x 3
      >>> plan = jm.tokens.hiprune(middle, jnp.arange(9.0), 6, width=3, alpha=1.0)
      >>> plan.segment_ids.reshape(3, 3).tolist()
      [[-1, 0, -1], [1, 2, 3], [-1, 4, 5]]

    Source: HiPrune (arXiv:2508.00553), whose grid is 24 x 24 and wraps; `wrap=True` and `width=24` agree with its code.
    """
    check_sequences("hiprune", middle=middle, deep=deep)
    middle, deep = floating(middle), floating(deep)
    n = middle.shape[-1]
    if middle.shape != deep.shape:
        raise ValueError(f"hiprune: middle {middle.shape} and deep {deep.shape} must have one shape (*batch, n).")
    if width < 1 or n % width:
        raise ValueError(f"hiprune: width {width} does not divide n={n} patches; leave the class token out.")
    if not 0 <= k <= n:
        raise ValueError(f"hiprune: k must be between 0 and the number of patches, {n}; got {k}.")
    anchors = round(k * alpha / 5)
    if not 0 <= 5 * anchors <= k:
        raise ValueError(
            f"hiprune: alpha={alpha} asks for {anchors} anchors with 4 neighbours each, beyond k={k}; lower alpha."
        )
    anchor = highest(middle, anchors)
    chosen = segments.batched(lambda row: _with_neighbours(row, width, wrap), anchor.ndim - 1)(anchor)
    first = jnp.where(chosen, jnp.inf, jnp.minimum(deep, jnp.finfo(deep.dtype).max))
    return keep(highest(first, k), k)


def _with_neighbours(mask: Bool[Array, "n"], width: int, wrap: bool) -> Bool[Array, "n"]:
    """True also left of, right of, above and below every True."""
    if wrap:
        line = mask | _next(mask, 1) | _next(mask[::-1], 1)[::-1] | _next(mask, width) | _next(mask[::-1], width)[::-1]
        # what falls off the line is clamped to its ends
        first = jnp.concatenate([line[:1] | mask[:width].any(keepdims=True), line[1:]])
        return jnp.concatenate([first[:-1], first[-1:] | mask[-width:].any(keepdims=True)])
    grid = mask.reshape(-1, width)
    down = grid | _next(grid, 1) | _next(grid[::-1], 1)[::-1]
    across = _next(grid.T, 1).T | _next(grid.T[::-1], 1)[::-1].T
    return (down | across).reshape(-1)


def _next(mask: Bool[Array, "n *rest"], steps: int) -> Bool[Array, "n *rest"]:
    """Every True moved on by some rows; what leaves is gone."""
    return jnp.concatenate([jnp.zeros_like(mask[:steps]), mask[: len(mask) - steps]])
