"""What the TPU kernels share: directions, exact products with 0/1 matrices, rows to columns, the chips' figures."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

ONE_PASS = lax.Precision.DEFAULT  # said aloud, because a user's default may be higher, which bfloat16 does not know
LANES, SUBLANES = 128, 8
MIB = 2**20
CHIPS = {  # dense bf16 FLOP/s, HBM bytes/s, VMEM bytes of one core
    "TPU v5 lite": (197e12, 819e9, 128 * MIB),
    "TPU v5": (459e12, 2765e9, 64 * MIB),
    "TPU v6 lite": (918e12, 1638e9, 128 * MIB),
    "TPU7x": (2307e12, 7380e9, 64 * MIB),
}
"""By device kind; a chip's two cores, where it has two, together."""
SMALLEST_VMEM = 64 * MIB


def vmem(kind: str) -> int:
    """Bytes of VMEM that one core has; the least of all chips where the kind is not known."""
    return CHIPS[kind][2] if kind in CHIPS else SMALLEST_VMEM


def chip(kind: str) -> tuple[float, float]:
    """FLOP/s and HBM bytes/s of a chip; v5e's where the kind is not known."""
    return CHIPS.get(kind, CHIPS["TPU v5 lite"])[:2]


def padded(n: int, tile: int) -> int:
    """n rounded up to whole tiles."""
    return -(-n // tile) * tile


def nbytes(shape: Sequence[int], dtype: Any) -> int:
    """What a block of this shape takes in VMEM, in whole (8, 128) tiles of 32-bit words."""
    *lead, rows, lanes = shape
    item = jnp.dtype(dtype).itemsize
    size = padded(rows, SUBLANES * (4 // item)) * padded(lanes, LANES) * item
    for extent in lead:
        size *= extent
    return size


def directions(x: Array) -> tuple[Array, Float[Array, "n 1"]]:
    """Rows scaled by powers of two, so that no product overflows, in x's dtype; and 1 over their lengths, 0 without one.

    A cosine is then the product of two such rows times both inverse lengths. A product of bfloat16 rows is exact in float32,
    so that a single pass of the matrix unit is as good as "highest" after normalising.
    """
    wide = x.astype(jnp.float32)
    peak = jnp.max(jnp.abs(wide), axis=1, keepdims=True)
    sound = (jnp.sum(wide * 0, axis=1, keepdims=True) == 0) & (peak > 0)  # inf x 0 and NaN x 0 are not 0
    exponent = lax.bitcast_convert_type(jnp.where(sound, peak, 1.0), jnp.int32) & 0x7F800000
    exponent = jnp.minimum(exponent, 253 << 23)
    scale = lax.bitcast_convert_type((254 << 23) - exponent, jnp.float32)
    wide = jnp.where(sound, wide * scale, 0.0)
    square = jnp.sum(wide * wide, axis=1, keepdims=True)
    inverse = jnp.where(square > 0, 1 / jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return wide.astype(x.dtype), inverse


def inner(a: Array, b: Array) -> Array:
    """a bᵀ, float32: one pass for bfloat16, as many as float32 needs else."""
    precision = ONE_PASS if a.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


def parts(x: Array, count: int) -> list[Array]:
    """x as a sum of `count` bfloat16 arrays: two hold 16 bits of each number, three hold a float32."""
    if x.dtype == jnp.bfloat16:
        return [x]
    found = []
    for _ in range(count):
        found.append(x.astype(jnp.bfloat16))
        x = x - found[-1].astype(jnp.float32)
    return found


def select(chosen: Array, x: Sequence[Array]) -> Array:
    """A matrix of bfloat16 (of 0 and 1, or of whole numbers) times the sum of parts: products are exact, sums in float32."""
    dims = (((1,), (0,)), ((), ()))
    return total([lax.dot_general(chosen, part, dims, ONE_PASS, jnp.float32) for part in x])


def total(terms: Sequence[Array]) -> Array:
    """Their sum."""
    return sum(terms[1:], terms[0])


def column(row: Array) -> Array:
    """(1, n) -> (n, 1)."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def row(column: Array) -> Array:
    """(n, 1) -> (1, n)."""
    return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]


def out(shape: Sequence[int], dtype: Any, like: Array) -> jax.ShapeDtypeStruct:
    """An output that varies over the mesh axes that `like` varies over."""
    return jax.ShapeDtypeStruct(tuple(shape), dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`."""
    return next(k for k in range(min(n, max(most, 1)), 0, -1) if n % k == 0)


def params(semantics: Any, need: int) -> Any:
    """Compiler parameters for grid axes and so many bytes of VMEM."""
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=int(max(16 * MIB, need)))


def cost(flops: int | float, moved: int | float, transcendentals: int = 0) -> pl.CostEstimate:
    """What the compiler is told."""
    return pl.CostEstimate(flops=int(flops), bytes_accessed=int(moved), transcendentals=int(transcendentals))
