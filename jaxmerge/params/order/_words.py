"""Counts beyond 32 bits: pairs of 32-bit words, one count per model."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, UInt32

from jaxmerge.params.order._devices import fastest

Words = tuple[Array, Array]
"""A count per model: (high, low), each uint32 (K,)."""


def count(mask: Bool[Array, "K ..."], word: int = 32) -> Words:
    """How many are true for each model, exactly; `word` is the width of the counters."""
    inner, most = inner_axes(mask.shape, word)

    def reduce(mask):
        return jnp.sum(mask, axis=inner, dtype=jnp.uint32)

    def by_model(mask):
        return jnp.concatenate([together(mask[k : k + 1], inner) for k in range(mask.shape[0])])

    return widened(fastest(by_model, reduce)(mask), mask.shape, most, word)


def counts(*masks: Bool[Array, "K ..."]) -> list[Words]:
    """`count` of each; on one CPU device in one loop, for masks that look at several models."""
    shape = masks[0].shape
    inner, most = inner_axes(shape)

    def apart(*masks):
        return [jnp.sum(mask, axis=inner, dtype=jnp.uint32) for mask in masks]

    def at_once(*masks):
        ones = [mask[k : k + 1].astype(jnp.uint32) for mask in masks for k in range(shape[0])]
        add = lambda a, b: [p + q for p, q in zip(a, b, strict=True)]
        small = lax.reduce(ones, [np.uint32(0)] * len(ones), add, inner)
        return [jnp.concatenate(small[i : i + shape[0]]) for i in range(0, len(small), shape[0])]

    return [widened(small, shape, most) for small in fastest(at_once, apart)(*masks)]


def together(mask: Bool[Array, "..."], axes: tuple[int, ...]) -> UInt32[Array, "..."]:
    """How many are true over the axes. XLA writes an array for a single reduction on the CPU, but makes two a loop."""
    one = mask.astype(jnp.uint32)
    both = lambda a, b: (a[0] + b[0], jnp.maximum(a[1], b[1]))
    return lax.optimization_barrier(lax.reduce((one, one), (np.uint32(0), np.uint32(0)), both, axes))[0]


def inner_axes(shape: tuple[int, ...], word: int = 32) -> tuple[tuple[int, ...], int]:
    """Axes of (K, *shape) over which one word can count, and how many entries they have."""
    inner, most = [], 1
    for axis in sorted(range(1, len(shape)), key=lambda a: -shape[a]):
        if most * shape[axis] < 1 << word:
            inner.append(axis)
            most *= shape[axis]
    return tuple(inner), most


def widened(small: UInt32[Array, "K ..."], shape: tuple[int, ...], most: int, word: int = 32) -> Words:
    """Counts of at most `most`, over the inner axes of (K, *shape), added up over the others."""
    outer = tuple(range(1, small.ndim))
    if not outer:
        return jnp.zeros_like(small), small
    limit, times = 1 << word, math.prod(shape[1:]) // max(most, 1)
    low_bits = word - times.bit_length()
    if low_bits <= 0 or times * (most >> low_bits) >= limit:
        raise ValueError(f"a leaf of shape {shape[1:]} has more elements than can be counted; split it.")
    high = jnp.sum(small >> low_bits, axis=outer, dtype=jnp.uint32)
    low = jnp.sum(small & ((1 << low_bits) - 1), axis=outer, dtype=jnp.uint32)
    return add((high >> (32 - low_bits), high << low_bits), (jnp.zeros_like(low), low))


def add(a: Words, b: Words) -> Words:
    low = a[1] + b[1]
    return a[0] + b[0] + (low < a[1]).astype(jnp.uint32), low


def subtract(a: Words, b: Words) -> Words:
    """a - b where a >= b."""
    return a[0] - b[0] - (a[1] < b[1]).astype(jnp.uint32), a[1] - b[1]


def at_least(a: Words, b: Words) -> Array:
    return (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] >= b[1]))


def smaller(a: Words, b: Words) -> Words:
    less = at_least(b, a)
    return jnp.where(less, a[0], b[0]), jnp.where(less, a[1], b[1])


def share(count: Words, fraction: UInt32[Array, "K"]) -> Words:
    """floor(count * fraction / 2^32)."""
    wide = count[0] * fraction
    low = (high_product(count[0], fraction), wide)
    return add(low, (jnp.zeros_like(wide), high_product(count[1], fraction)))


def high_product(a: Array, b: Array) -> Array:
    """The upper word of a b."""
    a1, a0, b1, b0 = a >> 16, a & 0xFFFF, b >> 16, b & 0xFFFF
    middle = (a0 * b0 >> 16) + (a1 * b0 & 0xFFFF) + a0 * b1  # at most 2^32 - 1
    return a1 * b1 + (a1 * b0 >> 16) + (middle >> 16)


def quotient(a: Array, b: Array) -> Array:
    """a // b, of one b for all; by multiplication, since processors divide integers one by one."""
    part = high_product(a, np.uint32(0xFFFFFFFF) // b)  # a // b, or one less
    return part + (a - part * b >= b).astype(jnp.uint32)


def to_words(counts) -> UInt32[np.ndarray, "2 K"]:
    """Python integers, or uint64, as (high, low)."""
    counts = np.asarray(counts, np.uint64)
    return np.stack([counts >> np.uint64(32), counts & np.uint64(0xFFFFFFFF)]).astype(np.uint32)


def from_words(words) -> np.ndarray:
    """(high, low) as uint64."""
    high, low = np.asarray(words, np.uint64)
    return (high << np.uint64(32)) + low


def number(a: Words) -> Array:
    """As float32, rounded."""
    return a[0].astype(jnp.float32) * 2.0**32 + a[1].astype(jnp.float32)
