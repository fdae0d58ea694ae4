"""From word starts to plans, and one word back in time."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import ArrayLike, Bool, Float, Int, Shaped

from jaxmerge._plan import Plan


def segments(starts: Bool[Array, "*batch n"], capacity: int, *, mask: Bool[Array, "*batch n"] | None = None) -> Plan:
    """The plan that brings bytes to their words.

    Args:
      starts: True where a word begins: from `starts` on the host, or from a router.
      capacity: m, room for that many words. Bytes of further words are counted by `plan.overflow`.
      mask: True for a byte, False for padding, which joins no word.

    Returns:
      A plan whose segments are the words in order. Bytes before the first start belong to no word.

    Law:
      merge(segments(starts, m), x, reduce="first") = x at the starts.

    Raises:
      ValueError: capacity is negative, or the shapes differ. TypeError: `starts` or `mask` is not boolean.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> plan = jm.words.segments(jnp.array([True, False, True, True]), 2)
      >>> plan.segment_ids.tolist(), plan.overflow.item()
      ([0, 0, 1, 2], 1)

    Source: HAT (arXiv:2501.10322), BLT (arXiv:2412.09871), H-Net (arXiv:2507.07955) all begin so.
    """
    if starts.dtype != bool or (mask is not None and mask.dtype != bool):
        got = starts.dtype if starts.dtype != bool else mask.dtype  # pyright: ignore[reportOptionalMemberAccess]
        raise TypeError(f"segments: starts and mask must be boolean, got {got}; compare scores with a threshold first.")
    if mask is None:
        return Plan(jnp.cumsum(starts, axis=-1, dtype=jnp.int32) - 1, capacity)
    if mask.shape != starts.shape:
        raise ValueError(f"segments: mask must have the shape of starts, {starts.shape}, got {mask.shape}.")
    ids = jnp.cumsum(starts & mask, axis=-1, dtype=jnp.int32) - 1
    return Plan(jnp.where(mask, ids, -1), capacity)


def document_starts(documents: Int[Array, "*batch n"]) -> Bool[Array, "*batch n"]:
    """Where a document begins in a row of several: where the id differs from the one before. The row's head always does.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.words.document_starts(jnp.array([3, 3, 5, 5, 1])).astype(int).tolist()
      [1, 0, 1, 0, 1]
    """
    changed = documents != jnp.concatenate([documents[..., :1], documents[..., :-1]], axis=-1)
    return changed | (jax.lax.broadcasted_iota(jnp.int32, documents.shape, documents.ndim - 1) == 0)


def shift(words: Float[Array, "*batch m d"], first: Shaped[Array, "d"] | None = None) -> Float[Array, "*batch m d"]:
    """Move every word one slot on, so that a byte reads the word before its own: word j - 1 writes word j.

    Args:
      words: what a model over words put out.
      first: what the first word reads (HAT learns it); zeros by default.

    Law:
      unmerge(plan, shift(words)) at a byte of word j depends on word j - 1 alone.

    Raises:
      ValueError: `first` is not one vector of the words' width.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.words.shift(jnp.array([[1.0], [2.0], [3.0]])).tolist()
      [[0.0], [1.0], [2.0]]

    Source: HAT (arXiv:2501.10322).
    """
    if first is None:
        top = jnp.zeros_like(words[..., :1, :])
    elif first.shape != words.shape[-1:]:
        raise ValueError(f"shift: first must be one vector of shape {words.shape[-1:]}, got {first.shape}.")
    else:
        top = jnp.zeros_like(words[..., :1, :]) + first.astype(words.dtype).reshape(*(1,) * (words.ndim - 1), -1)
    return jnp.concatenate([top, words[..., :-1, :]], axis=-2)


def capacity_for(counts: ArrayLike | Sequence[int], *, multiple_of: int = 128, at_most: int | None = None) -> int:
    """A capacity that holds every row, from a small set, so that few programs are compiled. On the host.

    Args:
      counts: words (or kept bytes) per row.
      multiple_of: the result is a multiple of it.
      at_most: a cap, usually n; what exceeds it will overflow.

    Raises:
      ValueError: no counts, a negative one, or `multiple_of` below 1.

    Example:
      >>> import jaxmerge as jm
      >>> jm.words.capacity_for([3, 130, 77]), jm.words.capacity_for([3, 130], at_most=200)
      (256, 200)
    """
    if multiple_of < 1:
        raise ValueError(f"capacity_for: multiple_of must be 1 or more, got {multiple_of}.")
    counts = np.asarray(counts)
    if counts.size == 0 or counts.min() < 0:
        raise ValueError(f"capacity_for: counts must be one or more numbers, none negative; got {counts.tolist()}.")
    capacity = max(-(-int(counts.max()) // multiple_of), 1) * multiple_of
    return capacity if at_most is None else min(capacity, at_most)


def place_in_word(starts: Bool[Array, "*batch n"]) -> Int[Array, "*batch n"]:
    """How far the last start lies behind each byte; before any, how far the head of the row.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.words.place_in_word(jnp.array([False, False, True, False, True])).tolist()
      [0, 1, 0, 1, 0]
    """
    here = jax.lax.broadcasted_iota(jnp.int32, starts.shape, starts.ndim - 1)
    return here - jax.lax.cummax(jnp.where(starts, here, 0), axis=starts.ndim - 1)
