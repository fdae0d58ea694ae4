"""Exact order statistics without a sort and without a gather: values stay where they are, counts travel.

The magnitude of a float32 orders as its bit pattern does, so the k-th largest is found bit by bit: count, over all devices, how
many patterns are at least a candidate. Elements that tie at the threshold are kept by their flat index, lowest first, which is
found in the same way; so the choice does not depend on the sharding. Counts and indices are pairs of 32-bit words.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, UInt32

from jaxmerge.params._transform import over

Words = tuple[Array, Array]
"""A count per model: (high, low), each uint32 (K,)."""

INF = np.uint32(0x7F800000)
DIGIT = 11
"""Bits per round of the streamed radix selection: 3 rounds over 31 bits."""
ROUNDS = 3


def magnitude_bits(x: Float[Array, "K ..."]) -> UInt32[Array, "K ..."]:
    """|x| as an integer of the same order; a NaN is larger than any number."""
    return lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.uint32)


# --- counts beyond 32 bits -------------------------------------------------------------------------------------------


def count(mask: Bool[Array, "K ..."], word: int = 32) -> Words:
    """How many are true for each model, exactly; `word` is the width of the counters."""
    sizes = mask.shape[1:]
    limit = 1 << word
    inner, most = [], 1
    for axis in sorted(range(1, mask.ndim), key=lambda a: -mask.shape[a]):
        if most * mask.shape[axis] < limit:
            inner.append(axis)
            most *= mask.shape[axis]
    small = jnp.sum(mask, axis=tuple(inner), dtype=jnp.uint32)
    outer = tuple(range(1, small.ndim))
    if not outer:
        return jnp.zeros_like(small), small
    times = math.prod(sizes) // max(most, 1)
    low_bits = word - times.bit_length()
    if low_bits <= 0 or times * (most >> low_bits) >= limit:
        raise ValueError(f"a leaf of shape {sizes} has more elements than can be counted; split it.")
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
    low = (_high_product(count[0], fraction), wide)
    return add(low, (jnp.zeros_like(wide), _high_product(count[1], fraction)))


def _high_product(a: Array, b: Array) -> Array:
    """The upper word of a b."""
    a1, a0, b1, b0 = a >> 16, a & 0xFFFF, b >> 16, b & 0xFFFF
    middle = (a0 * b0 >> 16) + (a1 * b0 & 0xFFFF) + a0 * b1  # at most 2^32 - 1
    return a1 * b1 + (a1 * b0 >> 16) + (middle >> 16)


def to_words(counts) -> UInt32[np.ndarray, "2 K"]:
    """Python integers, or uint64, as (high, low)."""
    counts = np.asarray(counts, np.uint64)
    return np.stack([counts >> np.uint64(32), counts & np.uint64(0xFFFFFFFF)]).astype(np.uint32)


def from_words(words) -> np.ndarray:
    """(high, low) as uint64."""
    high, low = np.asarray(words, np.uint64)
    return (high << np.uint64(32)) + low


# --- the k-th largest ------------------------------------------------------------------------------------------------


def kth_largest(leaves: list[UInt32[Array, "K ..."]], k: Words, *, bits: int = 31) -> UInt32[Array, "K"]:
    """The k-th largest pattern (of so many bits) of each model over all the leaves; that of inf where k is 0."""

    def bit(i, t):
        candidate = t | (jnp.uint32(1) << (bits - 1 - i).astype(jnp.uint32))
        counts = [count(x >= over(candidate, x)) for x in leaves]
        found = counts[0]
        for c in counts[1:]:
            found = add(found, c)
        return jnp.where(at_least(found, k), candidate, t)

    t = lax.fori_loop(0, bits, bit, jnp.zeros_like(k[1]))
    return jnp.where((k[0] == 0) & (k[1] == 0), INF, t)


def coordinates(shape: tuple[int, ...]) -> tuple[int, int, Array, Array]:
    """The flat index as two 32-bit numbers that order as it does: how many rows and columns; each element's row and column."""
    split = len(shape)
    while split > 0 and math.prod(shape[split - 1 :]) < 1 << 32:
        split -= 1

    def flat(axes: range) -> tuple[int, Array]:
        stride, index = 1, jnp.zeros((1,) * len(shape), jnp.uint32)
        for axis in reversed(axes):
            line = jnp.arange(shape[axis], dtype=jnp.uint32) * np.uint32(stride)
            index = index + line.reshape(*(-1 if a == axis else 1 for a in range(len(shape))))
            stride *= shape[axis]
        return stride, index

    (rows, row), (columns, column) = flat(range(split)), flat(range(split, len(shape)))
    return rows, columns, row, column


def first(chosen: Bool[Array, "K ..."], quota: Words) -> tuple[UInt32[Array, "2 K"], Words]:
    """Where to cut so that exactly the first `quota` of the chosen, by flat index, lie before; and how many do.

    Returns:
      The cut as (row, column), for `before`, and min(quota, chosen).
    """
    rows, columns, row, column = coordinates(chosen.shape[1:])
    there = count(chosen)
    kept = smaller(there, quota)
    nothing = jnp.zeros_like(quota[1])

    def search(_):
        def largest(size, inside, quota):
            """The largest c <= size with at most `quota` of the chosen inside c."""

            def bit(i, c):
                candidate = c | (jnp.uint32(1) << (size.bit_length() - 1 - i).astype(jnp.uint32))
                fits = (candidate <= size) & at_least(quota, count(chosen & inside(candidate)))
                return jnp.where(fits, candidate, c)

            return lax.fori_loop(0, size.bit_length(), bit, nothing)

        def rows_before(r):
            return row[None] < over(r, chosen)

        # fewer than 2^32 elements: no need to look for the row
        r = at_least(kept, there).astype(jnp.uint32) if rows == 1 else largest(rows, rows_before, kept)
        left = subtract(kept, count(chosen & rows_before(r)))
        c = largest(columns, lambda c: (row[None] == over(r, chosen)) & (column[None] < over(c, chosen)), left)
        return jnp.stack([r, c])

    def whole(_):  # all or none: nearly always, and then no further pass over the leaf
        return jnp.stack([jnp.where((kept[0] | kept[1]) == 0, jnp.uint32(0), np.uint32(rows)), nothing])

    partial = jnp.any(((kept[0] | kept[1]) != 0) & ~at_least(quota, there))
    return lax.cond(partial, search, whole, None), kept


def before(cut: UInt32[Array, "2 K"], x: Array) -> Bool[Array, "K ..."]:
    """Which elements of x (K, *shape) lie before the cut, by flat index."""
    _, _, row, column = coordinates(x.shape[1:])
    r, c = over(cut[0], x), over(cut[1], x)
    return (row[None] < r) | ((row[None] == r) & (column[None] < c))


# --- streamed: a histogram per round ---------------------------------------------------------------------------------


def histogram(bits: UInt32[Array, "K ..."], prefix: UInt32[Array, "K"], shift: UInt32[Array, ""]) -> UInt32[Array, "K bins"]:
    """How often each next digit occurs among the patterns that begin with the prefix, over one device's block."""
    models = bits.shape[0]
    bits = bits.reshape(models, -1)
    above = bits >> shift
    digit = jnp.where(above >> DIGIT == prefix[:, None], above & ((1 << DIGIT) - 1), 1 << DIGIT)

    def scatter(digit):
        rows = lax.broadcasted_iota(jnp.int32, digit.shape, 0)
        return jnp.zeros((models, 1 << DIGIT), jnp.uint32).at[rows, digit].add(1, mode="drop")

    def compare(digit):  # scatters serialise on TPU
        bins = jnp.arange(1 << DIGIT, dtype=jnp.uint32)[None, :, None]
        return jnp.sum(digit[:, None, :] == bins, axis=-1, dtype=jnp.uint32)

    return lax.platform_dependent(digit, tpu=compare, default=scatter)


def next_digit(counts: np.ndarray, remaining: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From the counts (K, bins) of the next digit: the digit of the `remaining`-th largest, and its rank among those."""
    from_top = np.cumsum(counts[:, ::-1], axis=1, dtype=np.uint64)[:, ::-1]
    digit = np.maximum((from_top >= remaining[:, None]).sum(axis=1) - 1, 0)
    above = np.concatenate([from_top, np.zeros((len(counts), 1), np.uint64)], axis=1)
    return digit, remaining - above[np.arange(len(counts)), digit + 1]
