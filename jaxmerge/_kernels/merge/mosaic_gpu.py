"""`merge` and `unmerge` on Hopper: every row of the result is read from its members, added in float32 and written once.

A block has 64 segments. Its threads share the ids out, and count each segment's members and find the first by comparing all
ids with all 64 segments. So nothing is sorted and no sum is atomic: members are added in the order of their positions. Then
each thread takes rows in turn, several at a time; where a segment has more members than one, it looks for the next.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int

from jaxmerge._kernels import _mosaic_gpu as mgpu

TILE = 64
"""Segments of a block."""
LANES = 128
THREADS = 4
NONE = 1 << 30


def merge(
    ids: Int[Array, "B n"],
    x: Float[Array, "B n d"],
    weight: Float[Array, "B n"] | None = None,
    *,
    m: int,
    mean: bool,
    interpret=None,
) -> tuple[Float[Array, "B m d"], Float[Array, "B m"]]:
    y, mass, _ = rows(ids, x, weight, m=m, mean=mean, interpret=interpret)
    return y, mass


def rows(ids, x, weight, *, m, mean, at_once=4, interpret=None):
    """The merged rows, their mass, and the position of each segment's first member (n where there is none)."""
    B, n, d = x.shape
    ids = jnp.pad(ids, ((0, 0), (0, max(0, LANES - n))), constant_values=-1)
    width = ids.shape[1]
    padded = -(-width // LANES) * LANES
    share = TILE // THREADS

    def body(ids, x, weight, y, mass, position, here, first, count, one_first, one_count, sync):
        b, tile, t = lax.axis_index("row"), lax.axis_index("tile"), lax.axis_index("thread")

        def together():
            plgpu.barrier_arrive(sync)
            plgpu.barrier_wait(sync)

        layout = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)
        line = lambda v: plgpu.layout_cast(v, layout)

        @pl.when(t == 0)
        def _():
            here[pl.ds(padded - LANES, LANES)] = line(jnp.full((LANES,), -1, jnp.int32))

        together()

        @pl.loop(0, -(-padded // LANES // THREADS))
        def _(i):
            at = jnp.minimum((i * THREADS + t) * LANES, width - LANES)
            here[pl.ds(at, LANES)] = line(mgpu.load(ids.at[b, pl.ds(at, LANES)]))

        together()

        grid = (TILE, TILE)
        mine = mgpu.iota(grid, 0) + tile * TILE
        wide = lambda c: lax.broadcast_in_dim(c, grid, (1,))

        def scan(i, found):
            lowest, members = found
            at = (i * THREADS + t) * TILE
            same = wide(mgpu.columns(here.at[pl.ds(pl.multiple_of(at, TILE), TILE)])) == mine
            lowest = jnp.minimum(lowest, jnp.min(jnp.where(same, mgpu.iota(grid, 1) + at, NONE), axis=1))
            return lowest, members + jnp.sum(jnp.where(same, 1, 0), axis=1)

        column = lambda value: plgpu.layout_cast(jnp.full((TILE,), value, jnp.int32), plgpu.Layout.WGMMA.reduce(1))
        chunks = padded // TILE
        rounds = (chunks - t + THREADS - 1) // THREADS
        one_first[t], one_count[t] = lax.fori_loop(0, rounds, scan, (column(NONE), column(0)))
        together()

        @pl.when(t == 0)
        def _():
            lowest, members = mgpu.rows(one_first.at[0]), mgpu.rows(one_count.at[0])
            for other in range(1, THREADS):
                lowest = jnp.minimum(lowest, mgpu.rows(one_first.at[other]))
                members = members + mgpu.rows(one_count.at[other])
            first[...] = lowest
            count[...] = members

        together()

        w = (lambda p: weight[b, p]) if weight is not None else (lambda p: jnp.float32(1))

        def after(s, p):
            """The next member of segment s behind position p."""
            def look(c, best):
                at = c * LANES + plgpu.broadcasted_iota(jnp.int32, (LANES,), 0, layout=layout)
                v = line(mgpu.load(here.at[pl.ds(c * LANES, LANES)]))
                return jnp.minimum(best, jnp.where((v == s) & (at > p), at, NONE))

            best = lax.fori_loop(0, padded // LANES, look, line(jnp.full((LANES,), NONE, jnp.int32)))
            return jnp.min(best)

        @pl.loop(0, share // at_once)
        def _(i):
            some = [(i * THREADS + t) * at_once + u for u in range(at_once)]
            start = [first[s] for s in some]
            at = [jnp.where(p < NONE, p, 0) for p in start]
            read = [x[b, p, :] for p in at]
            for u, s in enumerate(some):

                @pl.when(tile * TILE + s < m)
                def _(u=u, s=s):
                    segment = tile * TILE + s
                    members = count[s]
                    own = jnp.where(members > 0, w(at[u]), 0.0)
                    if position is not None:
                        position[b, segment] = jnp.where(members > 0, at[u], n)

                    def put(total, sum):
                        mass[b, segment] = total
                        if mean:
                            none = jnp.broadcast_to(total == 0, (d,))  # 0 times NaN is no 0
                            sum = jnp.where(none, 0.0, sum * (1 / jnp.where(total == 0, 1.0, total)))
                        y[b, segment, :] = sum.astype(x.dtype)

                    @pl.when(members == 1)
                    def _():
                        if mean and weight is None:
                            mass[b, segment] = jnp.float32(1)
                            y[b, segment, :] = read[u]
                        else:
                            put(own, read[u].astype(jnp.float32) * own)

                    @pl.when(members == 0)
                    def _():
                        mass[b, segment] = jnp.float32(0)
                        y[b, segment, :] = jnp.where(jnp.broadcast_to(members > 0, (d,)), read[u], jnp.zeros_like(read[u]))

                    @pl.when(members > 1)
                    def _():
                        def add(_, state):
                            p, total, sum = state
                            p = after(segment, p)
                            more = w(p)
                            return p, total + more, sum + x[b, p, :].astype(jnp.float32) * more

                        state = at[u], own, read[u].astype(jnp.float32) * own
                        _, total, sum = lax.fori_loop(1, members, add, state)
                        put(total, sum)

    scratch = dict(
        here=plgpu.SMEM((padded,), jnp.int32),
        first=plgpu.SMEM((TILE,), jnp.int32),
        count=plgpu.SMEM((TILE,), jnp.int32),
        one_first=plgpu.SMEM((THREADS, TILE), jnp.int32),
        one_count=plgpu.SMEM((THREADS, TILE), jnp.int32),
        sync=plgpu.Barrier(num_arrivals=THREADS),
    )
    return mgpu.kernel(
        body, (ids, x, weight), scratch,
        out=(
            jax.ShapeDtypeStruct((B, m, d), x.dtype),
            jax.ShapeDtypeStruct((B, m), jnp.float32),
            jax.ShapeDtypeStruct((B, m), jnp.int32),
        ),
        grid=dict(row=B, tile=-(-m // TILE)), threads=THREADS, interpret=interpret,
    )  # fmt: skip


def unmerge(
    ids: Int[Array, "B n"],
    y: Float[Array, "B m d"],
    before: Float[Array, "B m"] | None = None,
    after: Float[Array, "B n"] | None = None,
    *,
    at_once: int = 8,
    interpret=None,
) -> Float[Array, "B n d"]:
    B, n = ids.shape
    m, d = y.shape[1:]

    def body(ids, y, before, after, x):
        b, block, t = lax.axis_index("row"), lax.axis_index("block"), lax.axis_index("thread")
        some = [(block * THREADS + t) * at_once + u for u in range(at_once)]
        at = [ids[b, jnp.minimum(i, n - 1)] for i in some]
        inside = [(s >= 0) & (s < m) for s in at]
        safe = [jnp.where(ok, s, 0) for ok, s in zip(inside, at, strict=True)]
        read = [y[b, s, :] for s in safe]
        for u, i in enumerate(some):

            @pl.when(i < n)
            def _(u=u, i=i):
                row = read[u]
                if before is not None or after is not None:
                    factor = jnp.float32(1)
                    if before is not None:
                        factor = factor * before[b, safe[u]]
                    if after is not None:
                        factor = factor * after[b, i]
                    row = (row.astype(jnp.float32) * factor).astype(y.dtype)

                x[b, i, :] = jnp.where(jnp.broadcast_to(inside[u], (d,)), row, jnp.zeros_like(row))

    return mgpu.kernel(
        body, (ids, y, before, after), {},
        out=(jax.ShapeDtypeStruct((B, n, d), y.dtype),),
        grid=dict(row=B, block=-(-n // (THREADS * at_once))), threads=THREADS, interpret=interpret,
    )[0]  # fmt: skip
