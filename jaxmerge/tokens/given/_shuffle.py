"""Token-Shuffle's layout: a window of tokens side by side in the features of one, and back. Nothing is averaged."""

from jax import Array
from jaxtyping import Shaped

from jaxmerge._segments import check_whole
from jaxmerge.tokens._checks import checked_sizes


def space_to_depth(x: Shaped[Array, "*batch n d"], grid: tuple[int, int], window: int) -> Shaped[Array, "*batch m e"]:
    """Put the tokens of each window side by side into one, row by row of the window: n / window² tokens, d window² features.

    Args:
      x: tokens of an image, row-major.
      grid: (height, width), both multiples of the window.
      window: side of the square windows.

    Features are the minor axis of what is put side by side, so on an Explicit mesh they must not be sharded.

    Law:
      depth_to_space(space_to_depth(x, grid, s), grid, s) = x, exactly; the mean over the window² parts of each token is
      merge(grid_pool(grid, (height / s, width / s)), x).

    Raises:
      ValueError: the window does not divide the grid, or x does not hold its tokens.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.tokens.space_to_depth(jnp.arange(8.0)[:, None], (2, 4), 2).astype(int).tolist()
      [[0, 1, 4, 5], [2, 3, 6, 7]]

    Source: Token-Shuffle (arXiv:2504.17789); its learned maps are `models.reducers.token_shuffle`.
    """
    h, w = _checked("space_to_depth", grid, window)
    if x.ndim < 2:
        raise ValueError(f"space_to_depth: x must have shape (*batch, n, d), got {x.shape}.")
    *batch, n, d = x.shape
    if n != h * w:
        raise ValueError(f"space_to_depth: x must hold the {h} x {w} = {h * w} tokens of the grid, got {x.shape}.")
    _check_whole("space_to_depth: x", x)
    k = len(batch)
    x = x.reshape(*batch, h // window, window, w // window, window, d)
    x = x.transpose(*range(k), k, k + 2, k + 1, k + 3, k + 4)
    x = x.reshape(*batch, h // window, w // window, window**2 * d)  # one group of axes at a time, for Explicit meshes
    return x.reshape(*batch, n // window**2, window**2 * d)


def depth_to_space(y: Shaped[Array, "*batch m e"], grid: tuple[int, int], window: int) -> Shaped[Array, "*batch n d"]:
    """Take each token apart into the tokens of its window, the inverse of `space_to_depth`.

    Args:
      y: one token per window, row-major.
      grid: (height, width) *after*, both multiples of the window.
      window: side of the square windows.

    Raises:
      ValueError: the window does not divide the grid, or y does not hold a token for each window.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.tokens.depth_to_space(jnp.array([[0, 1, 4, 5], [2, 3, 6, 7]]), (2, 4), 2)[:, 0].tolist()
      [0, 1, 2, 3, 4, 5, 6, 7]
    """
    h, w = _checked("depth_to_space", grid, window)
    *batch, m, e = y.shape
    if m * window**2 != h * w or e % window**2:
        raise ValueError(
            f"depth_to_space: y must have shape (*batch, {h * w // window**2}, a multiple of {window**2}), got {y.shape}."
        )
    _check_whole("depth_to_space: y", y)
    k = len(batch)
    y = y.reshape(*batch, h // window, w // window, window, window, e // window**2)
    y = y.transpose(*range(k), k, k + 2, k + 1, k + 3, k + 4)
    return y.reshape(*batch, h * w, e // window**2)


def _check_whole(what: str, x: Array) -> None:
    check_whole(what, x, x.ndim - 2)
    check_whole(what, x, x.ndim - 1, "its features")


def _checked(who: str, grid: tuple[int, int], window: int) -> tuple[int, int]:
    h, w = checked_sizes(who, "grid", grid, rank=2)
    if window < 1 or h % window or w % window:
        raise ValueError(f"{who}: the window must divide the grid; got window {window} and grid {h} x {w}.")
    return h, w
