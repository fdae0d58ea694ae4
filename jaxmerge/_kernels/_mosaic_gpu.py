"""What the Hopper kernels share: how they are launched, and rows made ready for wgmma."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu


def kernel(
    body: Callable[..., None],
    operands: Sequence[Array | None],
    scratch: Any,
    *,
    out: Sequence[Any],
    grid: dict[str, int],
    threads: int,
    interpret: Any = None,
    **params: Any,
) -> Any:
    """`body(*operands, *out, **scratch)` for every point of the grid; operands and scratch left out are None."""
    given = [i for i, x in enumerate(operands) if x is not None]
    absent = {name: None for name, kind in scratch.items() if kind is None} if isinstance(scratch, Mapping) else {}
    if absent:
        scratch = {name: kind for name, kind in scratch.items() if kind is not None}

    def entry(*refs, **scratch):
        full = [None] * len(operands)
        for i, ref in zip(given, refs, strict=False):
            full[i] = ref
        body(*full, *refs[len(given) :], **absent, **scratch)

    entry.__name__ = body.__name__
    return plgpu.kernel(
        entry,
        out_type=tuple(out),
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=threads,
        thread_name="thread",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup, **params),
    )(*[operands[i] for i in given])


def unit(v: Array) -> tuple[Array, Array]:
    """Rows scaled by a power of two to a largest entry in [1, 4), and their inverse norms; 0 for rows without direction."""
    peak = jnp.max(jnp.abs(v), axis=1)
    exponent = lax.bitcast_convert_type(peak, jnp.int32) & 0x7F800000
    sound = (peak > 0) & (exponent < 0x7F800000)
    scale = lax.bitcast_convert_type(jnp.maximum(0x7F000000 - exponent, 0x00800000), jnp.float32)
    wide = lambda c: lax.broadcast_in_dim(c, v.shape, (0,))
    v = jnp.where(wide(sound), v * wide(scale), 0.0)
    return v, jnp.where(sound, lax.rsqrt(jnp.sum(v * v, axis=1)), 0.0)


def tiled(width: int) -> tuple[Any, ...]:
    """The transforms under which bfloat16 rows of this width are operands of wgmma."""
    swizzle = plgpu.find_swizzle(width * 16)
    return plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)


def rows(ref: Any) -> Array:
    """One number for each row of a wgmma accumulator."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def columns(ref: Any) -> Array:
    """One number for each of its columns."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)


def iota(shape: tuple[int, int], axis: int) -> Array:
    """The row's or column's number in an accumulator."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)
