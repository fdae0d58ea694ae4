"""Likeness: the cosine, and for each token the other one that is most like it."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import ArrayLike, Bool, Float, Int

from jaxmerge import _segments as segments
from jaxmerge._kernels.match.ref import cosine as cosine, search, unit as unit


class Nearest(NamedTuple):
    """For each query, the best key: `similarity` (its cosine, float32) and `index` (its position)."""

    similarity: Float[Array, "*batch n"]
    index: Int[Array, "*batch n"]


def nearest(
    queries: Float[ArrayLike, "*batch n d"],
    keys: Float[ArrayLike, "*batch m d"],
    *,
    mask: Bool[ArrayLike, "*#batch n m"] | None = None,
) -> Nearest:
    """For each query the key of largest cosine; of equal ones the first.

    Args:
      queries, keys: any floating dtype; compared in float32. A row without a direction (zero, inf, NaN) has similarity 0
        to every other.
      mask: True where a query may look at a key; broadcasts over the batch. A query that may look at none has similarity
        -inf, index 0.

    Law:
      the answer does not change when rows are scaled by powers of two; nearest(x, x) is the identity on distinct directions.

    Raises:
      ValueError: no keys; batch shapes or d differ.

    No gradient flows through it: take rows of `keys` by `index` where you need one.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> a, b = jnp.array([[2.0, 0.1], [0.0, 3.0]]), jnp.array([[0.0, 1.0], [1.0, 0.0]])
      >>> jm.tokens.nearest(a, b).index.tolist()
      [1, 0]
    """
    queries, keys = jnp.asarray(queries), jnp.asarray(keys)
    if queries.shape[:-2] != keys.shape[:-2] or queries.shape[-1] != keys.shape[-1]:
        raise ValueError(f"nearest: queries {queries.shape} and keys {keys.shape} must share batch axes and features.")
    if keys.shape[-2] == 0:
        raise ValueError("nearest: there must be at least one key.")
    batch, n, m = queries.shape[:-2], queries.shape[-2], keys.shape[-2]
    if mask is not None:
        row = jnp.zeros_like(queries, bool).any(axis=-1, keepdims=True)  # no row is read: for the queries' layout
        mask = jnp.broadcast_to(mask, (*batch, n, m)) | row
    rows = segments.batched(search, len(batch))
    return Nearest(*rows(unit(lax.stop_gradient(queries)), unit(lax.stop_gradient(keys)), mask))
