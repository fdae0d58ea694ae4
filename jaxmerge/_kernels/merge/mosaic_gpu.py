"""`merge` and `unmerge` on Hopper: every row of the result is read from its members, added in float32 and written once.

A block has 64 segments. Its threads share the ids out and compare all of them with all 64 segments: how many members, and
which is first. Where some segment has more, they look for the second of each, the third, and so on. Nothing is sorted and no
sum is atomic: members are added in the order of their positions. Then each thread takes rows in turn, several at a time.
"""

import functools
from typing import Any

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
THREADS = 2
LISTED = 64
"""Members of a segment that are found for all segments at once."""
MOST_POSITIONS = 8192
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

    def body(ids, x, weight, y, mass, position, ids_here, nth, count, largest, one_first, one_count, sync):
        b, tile, t = lax.axis_index("row"), lax.axis_index("tile"), lax.axis_index("thread")

        def together():
            plgpu.barrier_arrive(sync)
            plgpu.barrier_wait(sync)

        layout = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)
        line = lambda v: plgpu.layout_cast(v, layout)

        @pl.when(t == 0)
        def _():
            ids_here[pl.ds(padded - LANES, LANES)] = line(jnp.full((LANES,), -1, jnp.int32))

        together()

        @pl.loop(0, -(-padded // LANES // THREADS))
        def _(i):
            at = jnp.minimum((i * THREADS + t) * LANES, width - LANES)
            ids_here[pl.ds(at, LANES)] = line(mgpu.load(ids.at[b, pl.ds(at, LANES)]))

        together()

        square = (TILE, TILE)
        mine = mgpu.iota(square, 0) + tile * TILE
        wide = lambda v: lax.broadcast_in_dim(v, square, (1,))
        tall = lambda v: lax.broadcast_in_dim(v, square, (0,))
        column = lambda value: plgpu.layout_cast(jnp.full((TILE,), value, jnp.int32), plgpu.Layout.WGMMA.reduce(1))
        rounds = (padded // TILE - t + THREADS - 1) // THREADS

        def members(i, found):
            """Where the ids of a chunk are those of the segments, and their positions."""
            at = pl.multiple_of((i * THREADS + t) * TILE, TILE)
            return wide(mgpu.columns(ids_here.at[pl.ds(at, TILE)])) == mine, mgpu.iota(square, 1) + at

        def scan(i, found):
            same, at = members(i, found)
            lowest = jnp.minimum(found[0], jnp.min(jnp.where(same, at, NONE), axis=1))
            return lowest, found[1] + jnp.sum(jnp.where(same, 1, 0), axis=1)

        def lowest_of_all(slot):
            least = mgpu.rows(one_first.at[0])
            for other in range(1, THREADS):
                least = jnp.minimum(least, mgpu.rows(one_first.at[other]))
            nth[slot] = least

        one_first[t], one_count[t] = lax.fori_loop(0, rounds, scan, (column(NONE), column(0)))
        together()

        @pl.when(t == 0)
        def _():
            sum = mgpu.rows(one_count.at[0])
            for other in range(1, THREADS):
                sum = sum + mgpu.rows(one_count.at[other])
            count[...] = sum
            lowest_of_all(0)

        together()
        # No index may be a constant: shared memory at an address that ptxas knows is refused by the device.
        largest[t] = functools.reduce(jnp.maximum, [count[t * share + u] for u in range(share)])
        together()
        most = functools.reduce(jnp.maximum, [largest[lax.rem(t + other, THREADS)] for other in range(THREADS)])

        def later(k, _):
            """The k-th member of each segment, behind the one before it."""
            before = tall(mgpu.rows(nth.at[k - 1]))

            def scan(i, least):
                same, at = members(i, least)
                return jnp.minimum(least, jnp.min(jnp.where(same & (at > before), at, NONE), axis=1))

            one_first[t] = lax.fori_loop(0, rounds, scan, column(NONE))
            together()
            pl.when(t == 0)(lambda: lowest_of_all(k))
            together()

        listed = jnp.minimum(most, LISTED)
        lax.fori_loop(1, listed, later, None)
        w = (lambda p: weight[b, p]) if weight is not None else (lambda p: jnp.float32(1))

        def next_member(segment, s, k, p):
            """The k-th member of a segment, behind p: listed, or else looked for one by one."""
            look = lambda: lax.while_loop(lambda q: ids_here[q] != segment, lambda q: q + 1, p + 1)
            return lax.cond(k < LISTED, lambda: nth[jnp.minimum(k, LISTED - 1), s], look)

        @pl.loop(0, share // at_once)
        def _(i):
            some = [(i * THREADS + t) * at_once + u for u in range(at_once)]
            sizes = [count[s] for s in some]
            at = [jnp.where(size > 0, nth[0, s], 0) for size, s in zip(sizes, some, strict=True)]
            read = [x[b, p, :] for p in at]

            def put(u, total, row):
                segment = tile * TILE + some[u]

                @pl.when(segment < m)
                def _():
                    mass[b, segment] = total
                    y[b, segment, :] = row.astype(x.dtype)
                    if position is not None:
                        position[b, segment] = jnp.where(sizes[u] > 0, at[u], n)

            rounds = functools.reduce(jnp.maximum, sizes)
            own = [jnp.where(size > 0, w(p), 0.0) for size, p in zip(sizes, at, strict=True)]
            copied = rounds <= 1 if mean else rounds < 0  # the mean of one is itself

            @pl.when(copied)
            def _():
                for u in range(at_once):
                    there = jnp.broadcast_to(own[u] != 0, (d,))
                    put(u, own[u], jnp.where(there, read[u], jnp.zeros_like(read[u])))

            @pl.when(jnp.logical_not(copied))
            def _():
                def add(k, state):
                    has = [k < size for size in sizes]
                    p = [
                        lax.cond(ok, lambda s=s, q=q: next_member(tile * TILE + s, s, k, q), lambda q=q: q)
                        for ok, s, (q, *_) in zip(has, some, state, strict=True)
                    ]
                    rows = [x[b, q, :].astype(jnp.float32) for q in p]
                    more = [jnp.where(ok, w(q), 0.0) for ok, q in zip(has, p, strict=True)]
                    sums = [
                        jnp.where(jnp.broadcast_to(ok, (d,)), sum + row * factor, sum)
                        for ok, (_, _, sum), row, factor in zip(has, state, rows, more, strict=True)
                    ]
                    totals = [total + factor for (_, total, _), factor in zip(state, more, strict=True)]
                    return list(zip(p, totals, sums, strict=True))

                start = []
                for u in range(at_once):
                    row = read[u].astype(jnp.float32)
                    start.append((at[u], own[u], jnp.where(jnp.broadcast_to(sizes[u] > 0, (d,)), row * own[u], 0.0)))
                for u, (_, total, sum) in enumerate(lax.fori_loop(1, rounds, add, start)):
                    if mean:
                        none = jnp.broadcast_to(total == 0, (d,))  # 0 times NaN is no 0
                        sum = jnp.where(none, 0.0, sum * (1 / jnp.where(total == 0, 1.0, total)))
                    put(u, total, sum)

    scratch = dict(
        ids_here=plgpu.SMEM((padded,), jnp.int32),
        nth=plgpu.SMEM((LISTED, TILE), jnp.int32),
        count=plgpu.SMEM((TILE,), jnp.int32),
        largest=plgpu.SMEM((THREADS,), jnp.int32),
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
    at_once: int = 4,
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


device_refusals = mgpu.device_refusals


def refusals(op: str, ids: Any, x: Any, *rest: Any, m: int | None = None, mean: bool = False) -> list[str]:
    """Why this merge or unmerge cannot be a kernel."""
    why, n = mgpu.row_refusals(x), ids.shape[1]
    if min(n, x.shape[1], x.shape[1] if m is None else m) == 0:
        why.append("there is nothing to do")
    if op == "merge" and n > MOST_POSITIONS:
        why.append(f"{n} positions: each block reads all ids, of at most {MOST_POSITIONS}")
    return why


def faster(op: str, ids: Any, x: Any, *rest: Any, m: int | None = None, mean: bool = False, kind: str) -> bool:
    return True
