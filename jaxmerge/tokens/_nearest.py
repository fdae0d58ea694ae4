"""Likeness: the cosine, and for each token the other one that is most like it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import ArrayLike, Bool, Float, Int

from jaxmerge import _segments as segments

AT_ONCE = 256
"""Queries whose scores stand in memory at the same time: few enough for a cache, many enough for the matrix unit."""


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
        rows = jnp.zeros_like(queries, bool).any(axis=-1, keepdims=True)  # no row is read: for the queries' layout
        mask = jnp.broadcast_to(mask, (*batch, n, m)) | rows
    search = segments.batched(_search, len(batch))
    return Nearest(*search(unit(lax.stop_gradient(queries)), unit(lax.stop_gradient(keys)), mask))


def _search(queries: Float[Array, "n d"], keys: Float[Array, "m d"], mask: Bool[Array, "n m"] | None) -> tuple[Array, Array]:
    """For each unit query the largest cosine, and the first key that has it.

    Many queries are taken some at a time, so that their scores are still near when they are read again. Keys come first in
    the scores, so that both reductions run over whole vectors of queries; an arg-max runs over single numbers.
    """

    def best(some):
        queries, mask = some
        score = segments.matmul(keys, queries.T)
        if mask is not None:
            score = jnp.where(mask.T, score, -jnp.inf)
        highest = score.max(axis=0)
        position = lax.broadcasted_iota(jnp.int32, score.shape, 0)
        return highest, jnp.min(jnp.where(score == highest[None, :], position, len(keys)), axis=0)

    n = len(queries)
    if n <= 2 * AT_ONCE:
        return best((queries, mask))
    rounds = -(-n // AT_ONCE)
    split = lambda x: jnp.pad(x, ((0, -n % rounds), (0, 0))).reshape(rounds, -1, x.shape[-1])
    found = lax.map(best, jax.tree.map(split, (queries, mask)))
    return jax.tree.map(lambda x: x.reshape(-1)[:n], found)


def cosine(a: Float[Array, "*batch n d"], b: Float[Array, "*batch m d"]) -> Float[Array, "*batch n m"]:
    """All cosines, in float32: "highest", because one bfloat16 pass would order near-equal pairs unlike other machines."""
    return segments.matmul(unit(a), jnp.swapaxes(unit(b), -1, -2))


def unit(x: Float[Array, "*batch n d"]) -> Float[Array, "*batch n d"]:
    """Rows of length 1, in float32. Scaled by their largest entry first, so that no square overflows or vanishes."""
    x = x.astype(segments.accumulator(x.dtype))
    peak = jnp.abs(x).max(axis=-1, keepdims=True)
    sound = (peak > 0) & jnp.isfinite(peak)
    x = jnp.where(sound, x / jnp.where(sound, peak, 1), 0)
    return x / jnp.sqrt(jnp.where(sound, jnp.sum(x * x, axis=-1, keepdims=True), 1))  # the root of 0 has no gradient
