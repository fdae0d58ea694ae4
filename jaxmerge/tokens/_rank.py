"""Who is ahead of whom: stable ranks without a sort where sorts are slow."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int, Shaped

from jaxmerge import _segments as segments

COMPARE_ALL = 4096
"""Up to this many tokens, ranks are counted over all pairs: the comparisons fuse, and sorts are slow on TPU and CPU."""


def ranks(score: Shaped[Array, "*batch n"]) -> Int[Array, "*batch n"]:
    """0 for the highest score, n - 1 for the lowest; of equal scores the first is ahead. NaN scores lowest.

    Law:
      ranks are a permutation in every row; `ranks(s) < k` are the k highest.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.tokens.ranks(jnp.array([0.1, 0.9, 0.3, 0.9])).tolist()
      [3, 0, 2, 1]
    """
    n = score.shape[-1]
    if jnp.issubdtype(score.dtype, jnp.inexact):
        score = jnp.where(jnp.isnan(score), -jnp.inf, score)
    if n > COMPARE_ALL:
        order = jnp.argsort(score, axis=-1, descending=True, stable=True)
        return jnp.argsort(order, axis=-1).astype(jnp.int32)

    def count(score):
        i = jnp.arange(n)
        mine, other = score[:, None], score[None, :]
        ahead = (other > mine) | ((other == mine) & (i[None, :] < i[:, None]))
        return ahead.sum(axis=-1, dtype=jnp.int32)

    return segments.batched(count, score.ndim - 1)(score)
