"""What the Hopper kernels share: how they are launched, and rows made ready for wgmma."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mosaic
from jax.experimental.mosaic.gpu.utils import memref_ptr, shfl_bfly
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, vector

from jaxmerge._kernels._dispatch import target

_idx = inspect.signature(plgpu.load).parameters.get("idx")
EVERYTHING = (...,) if _idx is not None and _idx.default is inspect.Parameter.empty else ()
"""The index that `plgpu.load` demands in jax 0.10, and no longer has in 0.12."""

LANES = 128
"""Of a warpgroup, which is one thread in Pallas."""
WARPS = 4
"""Of a thread in Pallas: 32 lanes each."""
MOST_SHARED = 227 * 1024
"""Bytes of shared memory that a block can have."""
SHARED = 200 * 1024
"""Bytes that a kernel may plan with, where it does not count all that it takes."""
BLOCKS = 132
"""That an H100 or H200 runs at a time, at least: its multiprocessors."""
HOPPER = ("H100", "H200", "H800", "H20", "GH200")


def device_refusals(kind: str) -> list[str]:
    """Why these kernels cannot run on a kind of device: wgmma is Hopper's alone."""
    words = kind.replace("-", " ").split()
    return [] if any(name in words for name in HOPPER) else [f"{kind or 'an unnamed device'} is no Hopper"]


def row_refusals(x: Any) -> list[str]:
    """Why rows of x cannot be moved."""
    why = []
    if x.dtype not in (jnp.bfloat16, jnp.float32, jnp.float16):
        why.append(f"rows are {x.dtype}: bfloat16, float16 or float32")
    if x.shape[2] < LANES or x.shape[2] * x.dtype.itemsize % 16:
        why.append(f"rows have {x.shape[2]} features: at least {LANES}, the lanes of a thread, and whole 16 bytes")
    if math.prod(x.shape) >= 2**31:
        why.append(f"{math.prod(x.shape)} numbers: fewer than 2^31")
    return why


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
        interpret=target().interpret or None if interpret is None else interpret,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup, **params),
    )(*[operands[i] for i in given])


def shared(scratch: Mapping[str, Any]) -> int:
    """Bytes that scratch takes: Pallas lets every array begin at a whole KiB, and has 2 KiB of its own for reductions."""
    arrays = [x for x in scratch.values() if hasattr(x, "memory_space")]
    barriers = (int(np.prod(x.num_barriers)) for x in scratch.values() if isinstance(x, plgpu.Barrier))
    sizes = (math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays)
    return sum(-(-size // 1024) * 1024 for size in sizes) + 2048 + 8 * sum(barriers)


def unit(v: Array) -> tuple[Array, Array]:
    """Rows scaled by a power of two to a largest entry in [1, 4), and their inverse norms; 0 for rows without direction."""
    peak = jnp.max(jnp.abs(v), axis=1)
    exponent = lax.bitcast_convert_type(peak, jnp.int32) & 0x7F800000
    sound = (peak > 0) & (exponent < 0x7F800000)
    scale = lax.bitcast_convert_type(jnp.maximum(0x7F000000 - exponent, 0x00800000), jnp.float32)
    wide = lambda c: lax.broadcast_in_dim(c, v.shape, (0,))
    v = jnp.where(wide(sound), v * wide(scale), 0.0)
    return v, jnp.where(sound, lax.rsqrt(jnp.sum(v * v, axis=1)), 0.0)


def squared(v: Array) -> tuple[Array, Array]:
    """Rows as they are and their squared lengths; a row that is not finite becomes 0, of length inf."""
    sound = (lax.bitcast_convert_type(jnp.max(jnp.abs(v), axis=1), jnp.int32) & 0x7F800000) < 0x7F800000
    v = jnp.where(lax.broadcast_in_dim(sound, v.shape, (0,)), v, 0.0)
    return v, jnp.where(sound, jnp.sum(v * v, axis=1), jnp.inf)


def tiled(width: int) -> tuple[Any, ...]:
    """The transforms under which bfloat16 rows of this width are operands of wgmma."""
    swizzle = plgpu.find_swizzle(width * 16)
    return plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)


def add_product(acc: Any, a: Any, b: Any) -> None:
    """acc += a b by wgmma, while the thread goes on; a is in shared memory or in registers, b in shared memory."""
    plgpu.wgmma(acc, a, b)


def accumulated(shape: tuple[int, int], body: Callable[[Callable[[Any, Any], None]], None]) -> Array:
    """The sum, in float32, of all a b that `body(multiply)` multiplies."""

    def into(acc):
        body(functools.partial(add_product, acc))
        return acc[...]

    return pl.run_scoped(into, plgpu.ACC(shape, jnp.float32))


def product(a: Any, b: Any) -> Array:
    """a b in float32."""
    return accumulated((a.shape[0], b.shape[1]), lambda multiply: multiply(a, b))


Row = tuple[Array, ...]
"""The features of a token in registers, as `spans` cuts them."""


def spans(d: int) -> tuple[Any, ...]:
    """d features as spans that fill whole registers of all lanes: one, or two that overlap and hold the same there."""
    if d % LANES == 0:
        return (slice(None),)
    first = d - d % (2 * LANES) if d > 2 * LANES else LANES
    rest = -(-(d - first) // LANES) * LANES
    return pl.ds(0, first), pl.ds(d - rest, rest)


def read_row(ref: Any, b: Any, p: Any) -> Row:
    """Row p of batch row b."""
    return tuple(ref[b, p, span] for span in spans(ref.shape[2]))


def write_row(ref: Any, b: Any, p: Any, row: Row) -> None:
    """The same, the other way."""
    for span, part in zip(spans(ref.shape[2]), row, strict=True):
        ref[b, p, span] = part.astype(ref.dtype)


def per_part(f: Callable[..., Array], *rows: Row) -> Row:
    """f of every part of a row, or of several rows' together."""
    return tuple(map(f, *rows))


def load(ref: Any, layout: Any = None) -> Array:
    """A whole reference into registers, by whatever instructions there are for its layout."""
    return plgpu.load(ref, *EVERYTHING, layout=layout, optimized=False)


def rows(ref: Any) -> Array:
    """One number for each row of a wgmma accumulator."""
    return load(ref, plgpu.Layout.WGMMA.reduce(1))


def columns(ref: Any) -> Array:
    """One number for each of its columns."""
    return load(ref, plgpu.Layout.WGMMA.reduce(0))


def by_row(numbers: Array, shape: Sequence[int]) -> Array:
    """One number for each row of an accumulator, in all columns."""
    return lax.broadcast_in_dim(numbers, shape, (0,))


def by_column(numbers: Array, shape: Sequence[int]) -> Array:
    """One number for each of its columns, in all rows."""
    return lax.broadcast_in_dim(numbers, shape, (1,))


def filled(shape: tuple[int, ...], value: float) -> Array:
    """An accumulator of one number, or such numbers for its rows."""
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def iota(shape: tuple[int, ...], axis: int) -> Array:
    """The row's or column's number in an accumulator."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def _line(shape: tuple[int, ...]) -> Any:
    return plgpu.Layout.WG_STRIDED(shape, vec_size=1)


def line(v: Array) -> Array:
    """An array of one axis, of which each lane has every 128th entry."""
    return plgpu.layout_cast(v, _line(v.shape))


def line_iota(size: int) -> Array:
    """The positions in such an array."""
    return plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=_line((size,)))


def scatter(how: str, ref: Any, at: Array, value: Array) -> None:
    """ref[at] = how(ref[at], value) for every entry of two lines, in any order, each at once; where `at` < 0, nothing.

    Args:
      how: "min", "max", "add" or "or".
      ref: int32, one axis, in shared memory.
    """
    from jaxlib.mlir.dialects import llvm  # which jax.extend does not have

    kind = {"min": "s32", "max": "s32", "add": "u32", "or": "b32"}[how]
    asm = f"{{ .reg .pred p; setp.ge.s32 p, $1, 0; @p red.shared.{how}.{kind} [$0], $2; }}"

    def each(_, ref, at, value):
        i32, void = ir.IntegerType.get_signless(32), ir.Type.parse("!llvm.void")
        start = llvm.ptrtoint(i32, memref_ptr(ref))
        for i, v in zip(at.registers.flat, value.registers.flat, strict=True):
            i, v = (vector.extract(r, [], [0]) if isinstance(r.type, ir.VectorType) else r for r in (i, v))
            there = arith.addi(start, arith.muli(i, mosaic.c(4, i32)))
            llvm.inline_asm(void, [there, i, v], asm, "r,r,r,~{memory}", has_side_effects=True)

    inlined: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _line(at.shape), _line(at.shape)))(each)
    inlined(ref, line(at), line(value))


def totals(ref: Any, *rows: Array) -> list[Array]:
    """What the entries of each row come to, in float32; `ref`, in shared memory, has room for WARPS numbers of each."""
    from jaxlib.mlir.dialects import llvm

    layout = plgpu.Layout.WG_STRIDED(rows[0].shape, vec_size=2 if rows[0].size % (2 * LANES) == 0 else 1)

    def each(_, ref, *rows):
        i32, void = ir.IntegerType.get_signless(32), ir.Type.parse("!llvm.void")
        lane = mosaic.thread_idx()
        first = arith.cmpi(arith.CmpIPredicate.eq, arith.remui(lane, mosaic.c(32, i32)), mosaic.c(0, i32))
        warp = arith.remui(arith.divui(lane, mosaic.c(32, i32)), mosaic.c(WARPS, i32))
        start = arith.addi(llvm.ptrtoint(i32, memref_ptr(ref)), arith.muli(warp, mosaic.c(4, i32)))
        mosaic.warpgroup_barrier()  # who was here before has read what is there
        for number, row in enumerate(rows):
            some = [vector.extract(r, [], [i]) for r in row.registers.flat for i in range(row.layout.vec_size)]
            while len(some) > 1:
                some = [arith.addf(*two) for two in zip(some[::2], some[1::2], strict=False)] + some[len(some) // 2 * 2 :]
            (total,) = some
            for distance in (16, 8, 4, 2, 1):
                total = arith.addf(total, shfl_bfly(total, distance))
            there = arith.addi(start, mosaic.c(4 * WARPS * number, i32))
            llvm.inline_asm(
                void, [first, there, total], "@$0 st.shared.f32 [$1], $2;", "b,r,f,~{memory}", has_side_effects=True
            )
        mosaic.warpgroup_barrier()

    inlined: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *[layout] * len(rows)))(each)
    inlined(ref, *[plgpu.layout_cast(row, layout) for row in rows])
    return [functools.reduce(jnp.add, [ref[number * WARPS + warp] for warp in range(WARPS)]) for number in range(len(rows))]


def together() -> None:
    """All lanes of a thread have come here, and see what each has written to shared memory."""
    barrier: Any = plgpu.inline_mgpu()(lambda _: mosaic.warpgroup_barrier())
    barrier()


def each(t: Array | int, threads: int, count: int, do: Callable[[Any], None]) -> None:
    """do(i) for every i below count, shared out among the threads, of which this is one."""

    def one(turn, _):
        i = turn * threads + t
        pl.when(i < count)(lambda: do(i)) if count % threads else do(i)

    lax.fori_loop(0, -(-count // threads), one, None)
