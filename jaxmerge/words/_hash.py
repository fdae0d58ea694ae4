"""BLT's hash embeddings: which row of a table stands for the n bytes that end here.

    h_j = (sum over i of prime^i · x[j - n + 1 + i], in 64 bits with wraparound) mod rows, never negative

A device has no 64-bit integers by default, so a number is kept as two words of 32 bits.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int, UInt32

from jaxmerge.words._segment import document_starts

PRIMES = (
    1000000007, 5915587277, 1500450271, 3267000013, 5754853343, 4093082899, 9576890767, 3628273133, 2860486313, 5463458053,
    3367900313,
)  # fmt: skip
"""BLT's bases, one per hash function."""

Word = tuple[UInt32[Array, "..."], UInt32[Array, "..."]]


def ngram_hash(
    ids: Int[Array, "*batch n"],
    size: int,
    rows: int,
    *,
    function: int = 0,
    documents: Int[Array, "*batch n"] | None = None,
) -> Int[Array, "*batch n"]:
    """The row of a hash table for each n-gram of bytes, by the byte it ends with.

    Args:
      ids: bytes as BLT numbers them, b + 4; any int32 will do.
      size: n; BLT adds up the embeddings of 3 to 8.
      rows: of the table, below 2^31.
      function: which of BLT's eleven hash functions.
      documents: ids of packed documents; before the first byte of each lie zeros, as before a row.

    Returns:
      int32 in [0, rows). Equal to Python's `%` on a 64-bit sum that wraps around: with n = 3 it does so already.

    Raises:
      ValueError: size or rows out of range, or no such function.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.words.ngram_hash(jnp.array([104, 105, 106, 36]), 3, 500002).tolist()
      [253450, 282165, 222261, 253313]

    Source: BLT (arXiv:2412.09871), section 3.2.1; equal to blt_a.
    """
    if size < 1:
        raise ValueError(f"ngram_hash: size must be 1 or more, got {size}.")
    if not 0 < rows < 2**31:
        raise ValueError(f"ngram_hash: rows must lie between 1 and 2^31 - 1, got {rows}.")
    if not 0 <= function < len(PRIMES):
        raise ValueError(f"ngram_hash: function must lie between 0 and {len(PRIMES) - 1}, got {function}.")
    first = document_starts(jnp.zeros_like(ids) if documents is None else documents)
    begun = jnp.cumsum(first, axis=-1, dtype=jnp.int32)
    back = lambda x, by: jnp.concatenate([jnp.zeros_like(x[..., :by]), x[..., :-by]], axis=-1) if by else x
    zero = jnp.zeros_like(ids, jnp.uint32)
    total: Word = zero, zero
    for i in range(size):
        by = min(size - 1 - i, ids.shape[-1])
        x = jnp.where(back(begun, by) == begun, back(ids, by), 0)
        total = _add(total, _times(x, pow(PRIMES[function], i, 2**64)))
    return _mod(total, rows)


def _add(a: Word, b: Word) -> Word:
    low = a[1] + b[1]
    return a[0] + b[0] + (low < a[1]).astype(jnp.uint32), low


def _times(x: Int[Array, "..."], c: int) -> Word:
    """x · c modulo 2^64, of an int32 and a constant, by limbs of 16 bits."""
    u = jax.lax.bitcast_convert_type(x.astype(jnp.int32), jnp.uint32)
    word = lambda value: jnp.uint32(value & 0xFFFFFFFF)
    x0, x1, c0, c1 = u & 0xFFFF, u >> 16, word(c & 0xFFFF), word((c >> 16) & 0xFFFF)
    middle = x1 * c0 + (x0 * c0 >> 16)  # below 2^32, whatever the limbs
    carry = x0 * c1 + (middle & 0xFFFF)
    high = x1 * c1 + (middle >> 16) + (carry >> 16)
    negative = jnp.where(x < 0, word(c), jnp.uint32(0))  # the sign of x extends into the upper word
    return high + u * word(c >> 32) - negative, u * word(c)


def _mod(a: Word, m: int) -> Int[Array, "..."]:
    """The signed 64-bit number modulo m, from 0 to m - 1: long division, as many bits at a time as fit beside m."""
    step = 32 - m.bit_length()
    r = jnp.zeros_like(a[0])
    for word in a:
        left = 32
        while left:
            bits = min(step, left)
            left -= bits
            r = ((r << bits) | ((word >> left) & jnp.uint32((1 << bits) - 1))) % jnp.uint32(m)
    wrapped = pow(2, 64, m)  # a negative number stands for itself plus 2^64
    r = jnp.where(a[0] >> 31 == 1, r + jnp.uint32((m - wrapped) % m), r) % jnp.uint32(m)
    return r.astype(jnp.int32)
