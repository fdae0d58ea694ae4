"""Zonkey's soft words: every position may begin a word, so every one after it may exist in the present word or not.

    log p_t = sum over i of log(1 - b_i), i from the word's second position to t      b_i the probability that a word begins
    attention score += log P(key exists | query exists) = min(0, log p_key - log p_query)

The same algebra as MrT5's soft deletion: what may not be there is an additive bias on keys.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, PRNGKeyArray

from jaxmerge.attention import MASKED
from jaxmerge.words._patch import limit_patches
from jaxmerge.words._segment import place_in_word

FLOOR = 1e-4
"""Probabilities are kept from 0 and 1 by so much, so that logarithms have gradients."""


def log_existence(begins: Float[Array, "*batch n"], *, mask: Bool[Array, "*batch n"] | None = None) -> Float[Array, "*batch n"]:
    """How likely each position still belongs to the word that the first one begins, as a logarithm: it decays, and never ends.

    Args:
      begins: b, the probability that a word begins at each position; the first position's does not matter.
      mask: True for a position that is there.

    Returns:
      float32, 0 at the first position and falling; `attention.MASKED` at padding. As it stands it is a key bias, where all
      queries are equally sure to exist: `jax.nn.dot_product_attention(bias=...)`, or `attention.append_bias`.

    Law:
      exp(log_existence(b))_t = product of (1 - b_i), i = 1 to t.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jnp.exp(jm.words.log_existence(jnp.array([1.0, 0.5, 0.5]))).tolist()
      [1.0, 0.5, 0.25]

    Source: Zonkey (arXiv:2601.21768).
    """
    b = jnp.clip(begins.astype(jnp.float32), FLOOR, 1 - FLOOR)
    first = jax.lax.broadcasted_iota(jnp.int32, b.shape, b.ndim - 1) == 0
    log_p = jnp.cumsum(jnp.where(first, 0.0, jnp.log1p(-b)), axis=-1)
    return log_p if mask is None else jnp.where(mask, log_p, MASKED)


def existence_bias(log_p: Float[Array, "*batch n"]) -> Float[Array, "*batch n n"]:
    """Probabilistic attention: a key counts by how likely it exists, given that the query does.

        bias(query, key) = log p_key - log p_query for later keys, and 0 for earlier ones, which exist if the query does

    Args:
      log_p: from `log_existence`: it falls along the row, so that the bias is min(0, log p_key - log p_query).

    Returns:
      A bias for every pair; `attention.MASKED` for keys that are padding. Unlike a key bias it is no vector, because softmax
      sees by how much a query's later keys fall behind its earlier ones.

    Law:
      a causal model, which sees no later key, has no use for it: the bias below the diagonal is 0.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jnp.exp(jm.words.existence_bias(jnp.log(jnp.array([1.0, 0.5, 0.25])))).round(2).tolist()
      [[1.0, 0.5, 0.25], [1.0, 1.0, 0.5], [1.0, 1.0, 1.0]]

    Source: Zonkey (arXiv:2601.21768), its Probabilistic Attention.
    """
    keys, queries = log_p[..., None, :], log_p[..., :, None]
    there = keys > MASKED / 2
    return jnp.where(there, jnp.minimum(keys - jnp.where(queries > MASKED / 2, queries, 0.0), 0.0), MASKED)


def sample_starts(
    begins: Float[Array, "*batch n"],
    longest: int,
    *,
    key: PRNGKeyArray | None = None,
    mask: Bool[Array, "*batch n"] | None = None,
) -> Bool[Array, "*batch n"]:
    """Zonkey's segment splitter: draw where words begin, and cut what is longer than the longest.

    Args:
      begins: the probability that a word begins at each position.
      longest: the length of Zonkey's segments, which begin at each start and overlap the next.
      key: to draw with; None takes what is likelier, as in evaluation.
      mask: True for a position that is there.

    Returns:
      Starts, for `segments`. They carry no gradient; that of `begins` comes through `log_existence` of each segment.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.words.sample_starts(jnp.array([0.1, 0.2, 0.9, 0.1, 0.1, 0.1]), 3).astype(int).tolist()
      [1, 0, 1, 0, 0, 1]

    Source: Zonkey (arXiv:2601.21768), its Segment Splitter.
    """
    level = 0.5 if key is None else jax.random.uniform(key, begins.shape)
    first = jax.lax.broadcasted_iota(jnp.int32, begins.shape, begins.ndim - 1) == 0
    starts = limit_patches((level < begins) | first, longest)
    return starts if mask is None else starts & mask


def word_existence(begins: Float[Array, "*batch n"], starts: Bool[Array, "*batch n"]) -> Float[Array, "*batch n"]:
    """`log_existence` of every word of a row at once, each from its own first position.

    Law:
      at a row's first word it is `log_existence`; what lies before a word changes nothing in it.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> starts = jnp.array([True, False, True, False])
      >>> jnp.exp(jm.words.word_existence(jnp.full(4, 0.5), starts)).tolist()
      [1.0, 0.5, 1.0, 0.5]

    Source: ours: Zonkey cuts overlapping segments out first; for words in a row this is the same number without the copies.
    """
    b = jnp.clip(begins.astype(jnp.float32), FLOOR, 1 - FLOOR)
    first = place_in_word(starts) == 0

    def join(earlier, later):
        (begun, y), (begins, z) = earlier, later
        return begun | begins, jnp.where(begins, z, y + z)

    return jax.lax.associative_scan(join, (first, jnp.where(first, 0.0, jnp.log1p(-b))), axis=begins.ndim - 1)[1]


def no_start_probability(
    begins: Float[Array, "*batch n"], length: int, *, mask: Bool[Array, "*batch n"] | None = None
) -> Float[Array, ""]:
    """How likely `length` neighbours hold no start, averaged over all runs of them: the loss that keeps words short enough.

    Args:
      begins: the probability that a word begins at each position.
      length: Zonkey adds the loss up for its longest segment and for one and two positions more.
      mask: True for a position that is there; only runs with one position more after them count.

    Raises:
      ValueError: length is below 1.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.words.no_start_probability(jnp.full((1, 6), 0.5), 2).item()
      0.25

    Source: Zonkey's code (arXiv:2601.21768).
    """
    if length < 1:
        raise ValueError(f"no_start_probability: length must be 1 or more, got {length}.")
    n = begins.shape[-1]
    if n <= length:
        return jnp.zeros((), jnp.float32)
    b = jnp.clip(begins.astype(jnp.float32), 0.0, 1 - FLOOR)
    stay = jnp.cumsum(jnp.log1p(-b), axis=-1)
    before = jnp.concatenate([jnp.zeros_like(stay[..., :1]), stay[..., :-1]], axis=-1)
    p = jnp.exp(stay[..., length - 1 : n - 1] - before[..., : n - length])
    there = jnp.ones_like(p, bool) if mask is None else mask[..., length:]
    return jnp.sum(jnp.where(there, p, 0.0)) / jnp.maximum(jnp.sum(there, dtype=jnp.float32), 1.0)
