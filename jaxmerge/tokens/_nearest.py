"""Likeness: the cosine, and for each token the other one that is most like it."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import ArrayLike, Bool, Float, Int

from jaxmerge import _segments as segments
from jaxmerge._kernels._dispatch import Implementation
from jaxmerge._kernels.match import match
from jaxmerge._kernels.match.ref import cosine as cosine, search, unit as unit
from jaxmerge.tokens._checks import spreads


class Nearest(NamedTuple):
    """For each query, the best key: `similarity` (its cosine, float32) and `index` (its position)."""

    similarity: Float[Array, "*batch n"]
    index: Int[Array, "*batch n"]


def nearest(
    queries: Float[ArrayLike, "*batch n d"],
    keys: Float[ArrayLike, "*batch m d"],
    *,
    mask: Bool[ArrayLike, "*#batch n m"] | None = None,
    implementation: Implementation | None = None,
) -> Nearest:
    """For each query the key of largest cosine; of equal ones the first.

    Args:
      queries, keys: any floating dtype; compared in float32. A row without a direction (zero, inf, NaN) has similarity 0
        to every other.
      mask: True where a query may look at a key; broadcasts over the batch. A query that may look at none has similarity
        -inf, index 0.
      implementation: "xla", or a kernel ("mosaic_tpu", "mosaic_gpu"), in which no score reaches memory. None takes the kernel
        where it is known to run and believed to be faster; `jaxmerge doctor` says where. None of them knows a mask.

    Law:
      the answer does not change when rows are scaled by powers of two; nearest(x, x) is the identity on distinct directions.

    Raises:
      ValueError: no keys; batch shapes or d differ; the implementation cannot run here (all reasons are named).

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
    segments.check_whole("nearest: keys", keys, keys.ndim - 2)
    batch, n, m = queries.shape[:-2], queries.shape[-2], keys.shape[-2]
    queries, keys = lax.stop_gradient(queries), lax.stop_gradient(keys)
    if mask is not None:
        if implementation not in (None, "xla"):
            raise ValueError(f'nearest: {implementation} takes no mask; leave it out, or use implementation="xla".')
        if not spreads(jnp.shape(mask), (*batch, n, m)):
            raise ValueError(f"nearest: mask must have shape {(*batch, n, m)}, queries by keys; got {jnp.shape(mask)}.")
        row = jnp.zeros_like(queries, bool).any(axis=-1, keepdims=True)  # no row is read: for the queries' layout
        mask = jnp.broadcast_to(mask, (*batch, n, m)) | row
    xla = lambda: segments.batched(search, len(batch))(unit(queries), unit(keys), mask)
    if mask is not None:
        return Nearest(*xla())
    return Nearest(*match(queries, keys, implementation=implementation, xla=xla))
