"""Who is ahead of whom: stable ranks, and the k highest, without a sort where sorts are slow."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Int, Shaped

from jaxmerge import _segments as segments

COMPARE_ALL = 4096
"""Up to this many tokens, ranks are counted over all pairs: the comparisons fuse, and sorts are slow on TPU and CPU."""


def ranks(score: Shaped[Array, "*batch n"]) -> Int[Array, "*batch n"]:
    """0 for the highest score, n - 1 for the lowest; of equal scores the first is ahead. NaN scores lowest.

    Law:
      ranks are a permutation in every row; `ranks(s) < k` are the k highest.

    Raises:
      ValueError: a scalar or complex score.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.tokens.ranks(jnp.array([0.1, 0.9, 0.3, 0.9])).tolist()
      [3, 0, 2, 1]
    """
    score = jnp.asarray(score)
    if score.ndim == 0 or jnp.iscomplexobj(score):
        raise ValueError(f"ranks: score must be real numbers along an axis, got {score.dtype} of shape {score.shape}.")
    segments.check_whole("ranks: score", score, score.ndim - 1)
    return _ranks(score)


@jax.jit
def _ranks(score: Shaped[Array, "*batch n"]) -> Int[Array, "*batch n"]:
    """`ranks` of what is known to be real numbers, each row on one device."""
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


@partial(jax.jit, static_argnames="k")
def highest(score: Shaped[Array, "*batch n"], k: int) -> Bool[Array, "*batch n"]:
    """Which are the k highest; of equal scores the first. NaN scores lowest. As many counts as a score has bits: no n x n.

    Law:
      highest(s, k) = ranks(s) < k.
    """
    if not jnp.issubdtype(score.dtype, jnp.floating):
        return ranks(score) < k
    score = jnp.where(score == 0, 0, jnp.where(jnp.isnan(score), -jnp.inf, score))  # -0 equals 0
    last = jnp.finfo(score.dtype).bits - 1
    whole = jnp.dtype(f"int{last + 1}")
    bits = lax.bitcast_convert_type(score, whole)
    order = bits ^ ((bits >> last) & jnp.iinfo(whole).max)  # these integers order as the scores do
    count = lambda mask: jnp.sum(mask, axis=-1, keepdims=True, dtype=jnp.int32)

    def bit(i, t):  # t becomes the largest number that k scores reach; the first bit, added to the least integer, gives 0
        candidate = t + lax.shift_left(jnp.ones_like(t), jnp.full_like(t, last - i))
        return jnp.where(count(order >= candidate) >= k, candidate, t)

    t = lax.fori_loop(0, last + 1, bit, jnp.full_like(order[..., :1], jnp.iinfo(whole).min))
    above, level = order > t, order == t
    return above | (level & (jnp.cumsum(level, axis=-1, dtype=jnp.int32) <= k - count(above)))
