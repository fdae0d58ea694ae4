"""Matching in general: given who may leave and who may receive, each source joins the destination most like it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import ArrayLike, Bool, Float, Int

from jaxmerge import _segments as segments
from jaxmerge._plan import Plan, from_parents, identity
from jaxmerge._rank import highest
from jaxmerge.tokens._checks import checked_metric, checked_r, spreads
from jaxmerge.tokens._nearest import nearest


def two_sided_matching(
    metric: Float[ArrayLike, "*batch n d"],
    sources: Int[ArrayLike, "*#batch a"],
    destinations: Int[ArrayLike, "*#batch b"],
    r: int | None = None,
    *,
    mask: Bool[ArrayLike, "*#batch a b"] | None = None,
) -> Plan:
    """Merge the r sources that are most like a destination, each into the destination that it is most like.

    Likeness is the cosine; of equal ones the first in the list wins. What is in neither list stays alone. Every matching
    whose two sides are lists of positions is this function: strided cells, k-th tokens, random halves, energies.

    Args:
      metric: what to compare tokens by, any floating dtype; compared in float32.
      sources, destinations: positions, each at most once and in one list only; numpy for a fixed split, a traced array
        for one that depends on data. Without batch axes the rows of the batch share them.
      r: how many sources merge, a Python int; None for all of them.
      mask: True where a source may join a destination. A source that may join none is chosen last and stays; where r
        counts on it, as many tokens at the end find no room, and `plan.overflow` counts them.

    Returns:
      A plan of n - r segments, numbered in the order of the positions that stay. No gradient flows through it.

    Law:
      two_sided_matching(x, np.arange(0, n, 2), np.arange(1, n, 2), r) = bipartite_matching(x, r).

    Raises:
      ValueError: r negative or above the number of sources, no destination, a metric of rank 1; and of lists in
        numpy, a position outside [0, n) or named twice. TypeError: r is not a Python int.

    Cost: the a x b similarities and a comparison of all pairs of sources; no sort.

    Example:
      >>> import jax.numpy as jnp, numpy as np, jaxmerge as jm
      >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [0.5, 0.5]])
      >>> jm.tokens.two_sided_matching(x, np.array([2, 3]), np.array([0, 1]), 1).segment_ids.tolist()
      [0, 1, 0, 2]

    Source: the core of `bipartite_soft_matching` (arXiv:2210.09461) and of all its descendants.
    """
    name = "two_sided_matching"
    metric = checked_metric(name, metric)
    n = metric.shape[-2]
    _check_sides(name, sources, destinations, metric.shape[:-1])
    a, b = np.shape(sources)[-1], np.shape(destinations)[-1]
    moving = a if r is None else checked_r(name, r, a, f"there are {a} sources")
    if moving == 0:
        return identity(metric.shape[-2], like=metric)
    if b == 0:
        raise ValueError(f"{name}: {moving} sources should merge but there is no destination.")
    sources, best, goal = look(metric, sources, destinations, mask)
    if moving < a:
        goal = jnp.where(highest(best, moving), goal, sources)
    if mask is not None:
        goal = jnp.where(best > -jnp.inf, goal, sources)
    return from_parents(sent(metric, sources, goal), n - moving, hops=1)


def look(
    metric: Array, sources: ArrayLike, destinations: ArrayLike, mask: ArrayLike | None = None
) -> tuple[Array, Array, Array]:
    """Sources per row of the batch, the similarity of each to its best destination, and that destination's position."""
    sources, destinations = per_row(sources, metric), per_row(destinations, metric)
    a, b = segments.take(sources, metric), segments.take(destinations, metric)
    best, to = nearest(a, b, mask=mask)
    return sources, best, segments.take(to.astype(jnp.int32), destinations)


def sent(metric: Array, sources: Array, goal: Array) -> Int[Array, "*batch n"]:
    """Parents: every position its own, but each source its goal."""
    put = lambda here, s, g: here.at[s].set(g, mode="promise_in_bounds")
    return segments.batched(put, metric.ndim - 2)(segments.positions(_ids(metric)), sources, goal)


def per_row(indices: ArrayLike, metric: Array) -> Int[Array, "*batch k"]:
    """Positions for every row of the batch, laid out as the metric is."""
    indices = jnp.asarray(indices, jnp.int32)
    indices = indices.reshape(*(1,) * (metric.ndim - 1 - indices.ndim), *indices.shape)
    return indices + jnp.zeros_like(_ids(metric)[..., :1])


def drawn(name: str, key: Array, draw: Callable[[Array], tuple[Array, Array]]) -> tuple[Array, Array]:
    """Both sides by chance: from one key for all rows of the batch, or from one key each."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise TypeError(f"{name}: key must be a typed key, as jax.random.key(0) makes it; got {key.dtype}{list(key.shape)}.")
    return segments.batched(draw, key.ndim)(key)


def _ids(metric: Array) -> Int[Array, "*batch n"]:
    """Zeros, one per token: where positions take their layout from."""
    return jnp.zeros_like(metric[..., 0], jnp.int32)


def _check_sides(name: str, sources: ArrayLike, destinations: ArrayLike, tokens: tuple[int, ...]) -> None:
    *batch, n = tokens
    both = (("source", sources), ("destination", destinations))
    for side, i in both:
        shape = np.shape(i)
        if not shape or not spreads(shape[:-1], tuple(batch)):
            wanted = f"of shape (k,), or (*batch, k) for the metric's batch {tuple(batch)}"
            raise ValueError(f"{name}: {side}s must be positions {wanted}; got {shape}.")
    sides = [(side, np.asarray(i)) for side, i in both if not isinstance(i, jax.Array)]  # values of others may not be known
    for side, i in sides:
        bad = i[(i < 0) | (i >= n)]
        if bad.size:
            raise ValueError(f"{name}: {side} {bad.flat[0]} is not among n={n} tokens.")
    if sides and all(i.ndim == 1 for _, i in sides):
        values, counts = np.unique(np.concatenate([i for _, i in sides]), return_counts=True)
        if (counts > 1).any():
            raise ValueError(f"{name}: position {values[counts > 1][0]} is named twice; a token is on one side, once.")
