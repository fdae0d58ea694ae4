"""Gates that learn nothing: the controls that a learned gate must beat at the same rate of deletion."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from jaxmerge._plan import unmerge
from jaxmerge.tokens import ranks
from jaxmerge.words._segment import place_in_word, segments
from jaxmerge.words._vocabulary import EOS, to_ids

SEPARATORS = (*to_ids("\t\n !\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~").tolist(), EOS)
"""Ids that begin a segment for `fixed_gate`: ASCII's tab, newline, space and punctuation, and the end mark."""


def random_gate(
    key: PRNGKeyArray,
    mask: Bool[Array, "*batch n"],
    rate: float | Float[Array, ""],
    *,
    spread: float = 0.05,
    scale: float = -30.0,
) -> Float[Array, "*batch n"]:
    """Delete bytes at random, in every row as many as a rate asks for.

    Args:
      key: new in every step.
      mask: True for a byte.
      rate: the fraction to delete.
      spread: the rate of a row is drawn from a normal distribution of that deviation about `rate`.
      scale: the gate of a byte that is gone; of one that stays it is 0.

    Returns:
      A gate, in float32; padding is gone. (The official code draws one rate for the whole batch, and deletes padding among
      the rest, so that rows keep different parts.)

    Raises:
      ValueError: a rate outside [0, 1], a scale that is not negative.

    Example:
      >>> import jax, jax.numpy as jnp, jaxmerge as jm
      >>> gate = jm.words.random_gate(jax.random.key(0), jnp.ones((2, 10), bool), 0.3, spread=0.0)
      >>> (gate < 0).sum(axis=1).tolist()
      [3, 3]

    Source: MrT5 (arXiv:2410.20771), its RandomT5.
    """
    _check("random_gate", rate, scale)
    noise, normal = jax.random.split(key)
    size = jnp.sum(mask, axis=-1, keepdims=True, dtype=jnp.int32)
    drawn = jnp.clip(rate + spread * jax.random.normal(normal, size.shape), 0.0, 1.0)
    gone = ranks(jnp.where(mask, jax.random.uniform(noise, mask.shape), -1.0)) < jnp.round(drawn * size)
    return jnp.where(gone | ~mask, jnp.float32(scale), 0.0)


def fixed_gate(
    ids: Int[Array, "*batch n"],
    mask: Bool[Array, "*batch n"],
    rate: float,
    *,
    separators: tuple[int, ...] = SEPARATORS,
    scale: float = -30.0,
) -> Float[Array, "*batch n"]:
    """Delete the end of every word: of its c bytes, from a separator to before the next, ceil((1 - rate) c) stay.

    Args:
      ids: bytes as `to_ids` numbers them.
      mask: True for a byte.
      rate: the fraction to delete of each word, rounded down.
      separators: ids that begin a word.
      scale: the gate of a byte that is gone; of one that stays it is 0.

    Returns:
      A gate, in float32; padding is gone. Rows are alone: the official code pools the words of the whole batch, and so keeps
      nothing but one prefix of every row. For one row it is the same, padding apart.

    Raises:
      ValueError: a rate outside [0, 1], a scale that is not negative.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> ids = jnp.asarray(jm.words.to_ids("the quick fox"))
      >>> gate = jm.words.fixed_gate(ids, jnp.ones(13, bool), 0.5)
      >>> jm.words.to_bytes(ids[gate == 0])
      b'th qu f'

    Source: MrT5 (arXiv:2410.20771), its FixedT5.
    """
    _check("fixed_gate", rate, scale)
    starts = (ids[..., None] == jnp.asarray(separators, ids.dtype).reshape(*(1,) * ids.ndim, -1)).any(axis=-1)
    starts |= jax.lax.broadcasted_iota(jnp.int32, ids.shape, ids.ndim - 1) == 0
    plan = segments(starts & mask, ids.shape[-1], mask=mask)
    stay = jnp.ceil(jnp.float32(1 - rate) * unmerge(plan, plan.sizes).astype(jnp.float32))
    return jnp.where(mask & (place_in_word(starts) < stay), 0.0, jnp.float32(scale))


def _check(name: str, rate: float | Array, scale: float) -> None:
    if isinstance(rate, (int, float)) and not 0 <= rate <= 1:
        raise ValueError(f"{name}: rate must lie between 0 and 1, got {rate}.")
    if not scale < 0:
        raise ValueError(f"{name}: scale must be negative, because deleted bytes must weigh less; got {scale}.")
