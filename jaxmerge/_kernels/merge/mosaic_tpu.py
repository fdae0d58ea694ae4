"""A plan times rows, as products of 0/1 blocks on the matrix unit: only blocks that hold a 1 are visited.

Positions are cut into blocks, segments into tiles. Which pairs meet is found first, from the ids alone, and the grid is the
list of those pairs, as long as it happens to be: a plan that keeps the order of the positions (bytes into words, hard deletion,
neighbours) visits each block once or twice, however long the sequence; one that mixes all with all visits all pairs.
Rows are cut into bfloat16 parts, so that each product with a 0 or 1 is exact.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from jaxmerge._kernels import _tpu as tpu
from jaxmerge._kernels._dispatch import target, tuned

BLOCKS = {16384: (512, 512), 2**31: (256, 128)}
"""Positions in a block, segments in a tile, up to so many positions: many steps cost time where all meet, large ones where few
do, and beyond some length only plans that keep the order are worth it."""
CANDIDATES = {op: tuple({"block": (a, b)} for a in (256, 512, 1024) for b in (128, 256, 512)) for op in ("merge", "unmerge")}
MOST_PAIRS = 2**17
"""Pairs are listed in scalar memory."""


def merge(
    ids: Int[Array, "B n"],
    x: Float[Array, "B n d"],
    weight: Float[Array, "B n"] | None = None,
    *,
    m: int,
    mean: bool,
    block: tuple[int, int] | None = None,
    interpret: Any = None,
) -> tuple[Array, Array]:
    """`ref.merge`."""
    n, d = x.shape[1:]
    cut = _Cut(n, m, _block("merge", (ids, x, weight), n, block, m=m, mean=mean))
    ids, positions = cut.ids(ids), [] if weight is None else [cut.padded(weight, 0.0)]
    pairs, count = cut.pairs(ids, outer="tile")

    def kernel(at, count_ref, ids_ref, x_ref, *refs):
        weight_ref, (y_ref, mass_ref, sums, masses) = (refs[0] if weight is not None else None), refs[-4:]
        where = _Where(at, count_ref, cut, outer="tile")
        member = cut.segment(where.tile, axis=0) == ids_ref[0]
        given = jnp.where(cut.inside(tpu.column(ids_ref[0]), where.tile), x_ref[0], jnp.zeros((), x.dtype))
        if weight_ref is not None:
            given = given.astype(jnp.float32) * tpu.column(weight_ref[0])

        @pl.when(where.first)
        def _():
            sums[...], masses[...] = jnp.zeros_like(sums), jnp.zeros_like(masses)

        one = jnp.where(member, 1.0, 0.0)
        sums[...] += tpu.select(one.astype(jnp.bfloat16), tpu.parts(given, _passes(x.dtype, weight is not None)))
        masses[...] += jnp.sum(one if weight_ref is None else one * weight_ref[0], axis=1, keepdims=True)

        @pl.when(where.last)
        def _():
            mass, y = masses[...], sums[...]
            if mean:
                y *= jnp.where(mass == 0, 0.0, 1 / jnp.where(mass == 0, 1.0, mass))
            y_ref[0], mass_ref[0] = y.astype(y_ref.dtype), tpu.row(mass)

    y, mass = _call(
        kernel, "merge_rows", cut, pairs, count, ids, x, positions, [],
        outer="tile", features=d, extra=True, weighted=weight is not None, interpret=interpret,
    )  # fmt: skip
    return y, mass[:, 0]


def unmerge(
    ids: Int[Array, "B n"],
    y: Float[Array, "B m d"],
    before: Float[Array, "B m"] | None = None,
    after: Float[Array, "B n"] | None = None,
    *,
    block: tuple[int, int] | None = None,
    interpret: Any = None,
) -> Array:
    """`ref.unmerge`."""
    n, (m, d) = ids.shape[1], y.shape[1:]
    cut = _Cut(n, m, _block("unmerge", (ids, y, before, after), n, block))
    ids, positions = cut.ids(ids), [] if after is None else [cut.padded(after, 0.0)]
    segments = [] if before is None else [before.astype(jnp.float32)[:, None, :]]
    pairs, count = cut.pairs(ids, outer="block")

    def kernel(at, count_ref, ids_ref, y_ref, *refs):
        x_ref, sums = refs[-2:]
        after_ref = refs[0] if after is not None else None
        before_ref = refs[len(positions)] if before is not None else None
        where = _Where(at, count_ref, cut, outer="block")
        member = tpu.column(ids_ref[0]) == cut.segment(where.tile, axis=1)
        real = cut.segment(where.tile, axis=0) < m
        given = jnp.where(real, y_ref[0], jnp.zeros((), y.dtype))
        if before_ref is not None:
            scale = jnp.where(cut.segment(where.tile, axis=1) < m, before_ref[0], 0.0)
            given = given.astype(jnp.float32) * tpu.column(scale)

        @pl.when(where.first)
        def _():
            sums[...] = jnp.zeros_like(sums)

        one = jnp.where(member, 1.0, 0.0).astype(jnp.bfloat16)
        sums[...] += tpu.select(one, tpu.parts(given, _passes(y.dtype, before is not None)))

        @pl.when(where.last)
        def _():
            x = sums[...]
            if after_ref is not None:
                x *= tpu.column(after_ref[0])
            x_ref[0] = x.astype(x_ref.dtype)

    return _call(
        kernel, "unmerge_rows", cut, pairs, count, ids, y, positions, segments,
        outer="block", features=d, extra=False, weighted=before is not None, interpret=interpret,
    )[0]  # fmt: skip


def refusals(op: str, ids: Any, x: Any, *rest: Any, m: int = 0, mean: bool = False) -> list[str]:
    """Why this merge or unmerge cannot be a kernel."""
    n, d = ids.shape[1], x.shape[2]
    m = x.shape[1] if op == "unmerge" else m
    why = []
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        why.append(f"rows are {x.dtype}: bfloat16 or float32")
    if min(n, m, d) == 0:
        why.append(f"n={n}, m={m}, d={d}: there is nothing to do")
        return why
    static: dict[str, Any] = {"m": m, "mean": mean} if op == "merge" else {}
    cut = _Cut(n, m, _block(op, (ids, x, *rest), n, None, **static))
    if (pairs := x.shape[0] * cut.blocks * cut.tiles) > MOST_PAIRS:
        why.append(
            f"up to {pairs} pairs of blocks, more than the {MOST_PAIRS} that scalar memory lists: merge fewer rows at once"
        )
    if (need := _need(cut, _width(d), x.dtype)) > 0.9 * tpu.vmem(target().kind):
        why.append(f"blocks take {need >> 20} MiB on chip, more than the {tpu.vmem(target().kind) >> 20} MiB there are")
    return why


def faster(op: str, ids: Any, x: Any, *rest: Any, m: int = 0, mean: bool = False, kind: str) -> bool:
    """XLA merges by the same product, whole and in float32: this has fewer passes and visits less. It unmerges by a gather of
    rows, which stays ahead where a dense product costs more than four times the bytes."""
    if op == "merge":
        return True
    n, d, m = ids.shape[1], x.shape[2], x.shape[1]
    rate, bandwidth = tpu.chip(kind)
    passes = _passes(x.dtype, rest[0] is not None)
    return 2 * n * m * d * passes / rate < 4 * (n + m) * d * x.dtype.itemsize / bandwidth


class _Cut:
    """n positions in blocks, m segments in tiles."""

    def __init__(self, n: int, m: int, block: tuple[int, int]):
        self.n, self.m = n, m
        self.block, self.tile = min(n, block[0]), min(m, block[1])
        self.blocks, self.tiles = pl.cdiv(n, self.block), pl.cdiv(m, self.tile)

    def padded(self, x: Array, value: int | float) -> Array:
        """One number per position, (B, 1, n) in whole blocks."""
        return jnp.pad(x, ((0, 0), (0, self.blocks * self.block - self.n)), constant_values=value)[:, None, :]

    def ids(self, ids: Array) -> Array:
        """Ids in whole blocks, what is dropped as -1."""
        return self.padded(jnp.where((ids >= 0) & (ids < self.m), ids, -1).astype(jnp.int32), -1)

    def segment(self, tile: Array, axis: int) -> Array:
        """The segments of a tile, along an axis of the block of pairs: (tile, 1) or (1, tile)."""
        shape = (self.tile, 1) if axis == 0 else (1, self.tile)
        return lax.broadcasted_iota(jnp.int32, shape, axis) + tile * self.tile

    def inside(self, ids: Array, tile: Array) -> Array:
        """Which ids are in a tile."""
        return (ids >= tile * self.tile) & (ids < (tile + 1) * self.tile)

    def pairs(self, ids: Int[Array, "B 1 n"], outer: str) -> tuple[Int[Array, "pairs"], Int[Array, "1"]]:
        """The pairs of block and tile that meet, all rows of the batch in turn, by `outer` first; and how many there are.

        A pair is one number, ((row * tiles + tile) * blocks + block) or with block and tile exchanged. Whatever is written
        is visited, at least with its first partner.
        """
        batch = ids.shape[0]
        tile = jnp.where(ids < 0, -1, ids // self.tile).reshape(batch, self.blocks, self.block, 1)
        meet = (tile == jnp.arange(self.tiles, dtype=jnp.int32)[None, None, None, :]).any(axis=2)
        meet = meet.swapaxes(1, 2) if outer == "tile" else meet
        partner = lax.broadcasted_iota(jnp.int32, meet.shape, 2)
        meet = (meet | ((partner == 0) & ~meet.any(axis=2, keepdims=True))).reshape(-1)
        every = jnp.arange(meet.size, dtype=jnp.int32)
        return jnp.sort(jnp.where(meet, every, meet.size)), jnp.sum(meet, dtype=jnp.int32)[None]


class _Where:
    """Where in the list of pairs a step of the grid is."""

    def __init__(self, at: Any, count: Any, cut: _Cut, outer: str):
        inner = cut.blocks if outer == "tile" else cut.tiles
        p, last = pl.program_id(1), count[0] - 1
        group = lambda i: at[i] // inner
        self.first = (p == 0) | (group(jnp.maximum(p - 1, 0)) != group(p))
        self.last = (p == last) | (group(jnp.minimum(p + 1, last)) != group(p))
        _, block, tile = _unpack(at[p], cut, outer)
        self.block, self.tile = block, tile


def _unpack(pair: Any, cut: _Cut, outer: str) -> tuple[Any, Any, Any]:
    """Row, block and tile of a pair."""
    inner, groups = (cut.blocks, cut.tiles) if outer == "tile" else (cut.tiles, cut.blocks)
    row, group, item = pair // (inner * groups), pair // inner % groups, pair % inner
    return (row, item, group) if outer == "tile" else (row, group, item)


def _call(
    kernel: Callable[..., None],
    name: str,
    cut: _Cut,
    pairs: Array,
    count: Array,
    ids: Array,
    x: Array,
    positions: list[Array],
    segments: list[Array],
    *,
    outer: str,
    features: int,
    extra: bool,
    weighted: bool,
    interpret: Any,
) -> Any:
    """The kernel over all pairs, for each block of features. `extra`: the mass of each segment is written too."""
    batch, here = ids.shape[0], target()
    width = _width(features)
    unpack = partial(_unpack, cut=cut, outer=outer)

    def of_block(f, p, at, count):
        row, block, _ = unpack(at[p])
        return row, 0, block

    def of_tile(f, p, at, count):
        row, _, tile = unpack(at[p])
        return row, 0, tile

    def block_rows(f, p, at, count):
        row, block, _ = unpack(at[p])
        return row, block, f

    def tile_rows(f, p, at, count):
        row, _, tile = unpack(at[p])
        return row, tile, f

    blocks, tiles = pl.BlockSpec((1, cut.block, width), block_rows), pl.BlockSpec((1, cut.tile, width), tile_rows)
    read, written = (blocks, tiles) if outer == "tile" else (tiles, blocks)
    rows, height = (cut.m, cut.tile) if outer == "tile" else (cut.n, cut.block)
    outputs, specs = [tpu.out((batch, rows, features), x.dtype, x)], [written]
    scratch = [pltpu.VMEM((height, width), jnp.float32)]
    if extra:
        outputs.append(tpu.out((batch, 1, rows), jnp.float32, x))
        specs.append(pl.BlockSpec((1, 1, height), of_tile))
        scratch.append(pltpu.VMEM((height, 1), jnp.float32))
    expected = batch * (cut.blocks + cut.tiles - 1)  # where the order of the positions is kept
    flops = 2 * expected * cut.block * cut.tile * features * _passes(x.dtype, weighted)
    moved = batch * (cut.n + cut.m) * (features * x.dtype.itemsize + 4)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(features // width, count[0]),
            in_specs=[
                pl.BlockSpec((1, 1, cut.block), of_block),
                read,
                *(pl.BlockSpec((1, 1, cut.block), of_block) for _ in positions),
                *(pl.BlockSpec((1, 1, cut.tile), of_tile) for _ in segments),
            ],
            out_specs=specs,
            scratch_shapes=scratch,
        ),
        out_shape=outputs,
        compiler_params=tpu.params(("parallel", "arbitrary"), _need(cut, width, x.dtype)),
        cost_estimate=tpu.cost(flops, moved),
        interpret=here.interpret if interpret is None else interpret,
        name=name,
    )(pairs, count, ids, x, *(p.astype(jnp.float32) for p in positions), *segments)


def _block(op: str, shapes: tuple, n: int, block: tuple[int, int] | None, **static: Any) -> tuple[int, int]:
    measured = tuned(op, "mosaic_tpu", target().kind, shapes, **static).get("block")
    return block or measured or next(block for most, block in BLOCKS.items() if n <= most)


def _width(d: int) -> int:
    """Features at a time: all, or of many the largest part that divides them in whole vectors."""
    return next((w for w in range(2048, 511, -tpu.LANES) if d % w == 0), d) if d > 2048 else d


def _passes(dtype: Any, weighted: bool) -> int:
    """bfloat16 parts of a row: 24 bits where it has them, 16 of a bfloat16 times a weight."""
    return 3 if dtype == jnp.float32 else 2 if weighted else 1


def _need(cut: _Cut, width: int, dtype: Any) -> int:
    """Bytes of VMEM: both buffers of what is read and written, and what a pair holds while it is worked on."""
    blocks = tpu.nbytes((cut.block, width), dtype) + tpu.nbytes((cut.tile, width), dtype)
    wide = tpu.nbytes((max(cut.block, cut.tile), width), jnp.float32)
    columns = 4 * tpu.nbytes((max(cut.block, cut.tile), tpu.LANES), jnp.float32)
    return 2 * blocks + 5 * wide + 3 * tpu.nbytes((cut.tile, cut.block), jnp.float32) + columns + 2 * tpu.MIB
