"""`step` in one launch on Hopper: the row's similarities by wgmma, ranks by counting, and the mean of what joins.

A thread block holds one batch row's matching and moves a share of its tokens. So several blocks repeat the matching, which
is cheap, and none waits for another. Even tokens are sources `i`, odd ones destinations `j`; tiles have 64 rows.

    cosines  a (i, k) . b (j, k) from shared memory: a product of bfloat16 numbers is exact in float32, and the inverse norms
             are applied to the sum. A float32 metric is cut into three bfloat16 parts, and the six products that matter are
             added, so that it costs six passes and loses nothing.
    ranks    rank_i = |{j : s_j > s_i, or s_j = s_i and j < i}|: no sort. Sources are those of rank < r.
    ids      stay_i, how many sources up to i stay, counted as ranks are.
    joins    of the r edges, in the order of rank: `source`, `to`, and `next`, the next edge to the same destination. `first`
             is each destination's first edge. These chains are followed token by token.
    move     each thread reads rows of x, writes those that stay, and adds the chain to those that receive.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int

from jaxmerge._kernels import _mosaic_gpu as mgpu

TILE = 64
"""Rows of one wgmma."""
LANES = 128
"""Of a warpgroup, which is one Pallas thread."""
PAIRS = 4
"""Pairs of tokens that a thread reads at a time: enough loads in flight to hide the memory's latency."""
NONE = 1 << 20


def step(
    metric: Float[Array, "B n k"],
    x: Float[Array, "B n d"],
    sizes: Float[Array, "B n"] | None = None,
    *,
    r: int,
    protected: tuple[bool, ...],
    threads: int = 4,
    splits: int | None = None,
    interpret=None,
) -> tuple[Float[Array, "B m d"], Float[Array, "B m"], Int[Array, "B n"]]:
    B, n, k = metric.shape
    d, m = x.shape[2], n - r
    na, nb = (n + 1) // 2, n // 2
    ta, tb, tr = -(-na // TILE), -(-nb // TILE), -(-r // TILE)
    parts = 3 if metric.dtype == jnp.float32 else 1
    bits = metric.dtype.itemsize * 8
    splits = splits or _splits(B, na, threads)
    share = -(-na // splits)
    share = -(-share // (threads * PAIRS)) * threads * PAIRS  # pairs of one block
    splits = -(-na // share)
    pairs = -(-share // threads)  # of one thread

    closed = np.array(protected)
    open_a = _bias(~closed[::2], ta * TILE)
    open_b = _bias(~closed[1::2], tb * TILE)
    flat, pad = metric.reshape(B * n, k), 0
    if parts > 1:  # read past the row, straight into registers: never past the end
        pad = (-(B * n)) % 2 + 2 * TILE
    elif B * n % 2 or B * n < 2 * TILE:
        pad = (-(B * n)) % 2 + 2 * TILE
    kp = -k % 16
    if pad or kp:
        flat = jnp.pad(flat, ((0, pad), (0, kp)))
    k += kp
    flat = flat.reshape(-1, 2, k)

    def body(flat, x, sizes, open_a, open_b, y, y_size, ids, raw, tiles, inverse, best, to, rank, stay, edge, chain, first, loaded, sync):
        b, share_at, t = lax.axis_index("row"), lax.axis_index("share"), lax.axis_index("thread")
        odd = (b * n) % 2  # of the row's first token in `flat`
        start = lambda side: (b * n + side) // 2
        half = lambda side: odd if side == 0 else 1 - odd

        def together():
            plgpu.barrier_arrive(sync)
            plgpu.barrier_wait(sync)

        def each(count, do):  # share tiles out among threads
            for i in range(-(-count // threads)):
                tile = i * threads + t
                if (i + 1) * threads <= count:
                    do(tile)
                else:
                    pl.when(tile < count)(lambda tile=tile: do(tile))

        rows = lambda tile: pl.ds(pl.multiple_of(tile * TILE, TILE), TILE)

        # -- normalise: scaled by a power of two, cut into bfloat16 parts, inverse norms beside
        def normalise(tile):
            side = jnp.where(tile < ta, 0, 1)
            at = start(side) + (tile - side * ta) * TILE
            here = flat.at[pl.ds(at, TILE), jnp.where(side == 0, odd, 1 - odd)]
            if parts == 1:
                plgpu.copy_gmem_to_smem(here, raw.at[t], loaded.at[t])
                plgpu.barrier_wait(loaded.at[t])
                v = plgpu.load(raw.at[t], optimized=False).astype(jnp.float32)
            else:
                v = plgpu.load(here, optimized=False)
            v = plgpu.layout_cast(v, plgpu.Layout.WGMMA)
            v, inverse[rows(tile)] = mgpu.unit(v)
            for p in range(parts):
                part = v.astype(jnp.bfloat16)
                tiles[p * (ta + tb) + tile] = part
                v = v - part.astype(jnp.float32)

        each(ta + tb, normalise)
        plgpu.commit_smem()
        together()

        # -- cosines: the best destination of each source
        def match(tile):
            wide = lambda c: lax.broadcast_in_dim(c, (TILE, TILE), (1,))
            tall = lambda c: lax.broadcast_in_dim(c, (TILE, TILE), (0,))
            column = plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), 1, layout=plgpu.Layout.WGMMA)

            def against(other, found):
                highest, index = found

                def product(acc):
                    for p in range(parts):
                        for q in range(parts - p):
                            left, right = p * (ta + tb) + tile, q * (ta + tb) + ta + other
                            plgpu.wgmma(acc, tiles.at[left], tiles.at[right].transpose((1, 0)))
                    return acc[...]

                score = pl.run_scoped(product, plgpu.ACC((TILE, TILE), jnp.float32))
                at = rows(ta + other)
                score = score * wide(mgpu.columns(inverse.at[at])) + wide(mgpu.columns(open_b.at[rows(other)]))
                high = jnp.max(score, axis=1)
                where = jnp.min(jnp.where(score == tall(high), column, NONE), axis=1) + other * TILE
                better = high > highest
                return jnp.where(better, high, highest), jnp.where(better, where, index)

            none = _row(jnp.full((TILE,), -jnp.inf, jnp.float32)), _row(jnp.full((TILE,), 0, jnp.int32))
            highest, index = lax.fori_loop(0, tb, against, none)
            best[rows(tile)] = highest * mgpu.rows(inverse.at[rows(tile)]) + mgpu.rows(open_a.at[rows(tile)])
            to[rows(tile)] = index

        each(ta, match)
        together()

        # -- ranks
        tall = lambda c: lax.broadcast_in_dim(c, (TILE, TILE), (0,))
        wide = lambda c: lax.broadcast_in_dim(c, (TILE, TILE), (1,))
        iota = lambda axis: plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), axis, layout=plgpu.Layout.WGMMA)
        count = lambda mask: jnp.sum(jnp.where(mask, 1, 0), axis=1)
        zero = lambda: _row(jnp.full((TILE,), 0, jnp.int32))

        def order(tile):
            mine = tall(mgpu.rows(best.at[rows(tile)]))

            def against(other, sum):
                theirs = wide(mgpu.columns(best.at[rows(other)]))
                before = iota(1) + other * TILE < iota(0) + tile * TILE
                return sum + count((theirs > mine) | ((theirs == mine) & before))

            rank[rows(tile)] = lax.fori_loop(0, ta, against, zero())

        each(ta, order)
        together()

        # -- how many stay up to each source; the edges, by rank
        def number(tile):
            def against(other, sum):
                stays = wide(mgpu.columns(rank.at[rows(other)])) >= r
                return sum + count(stays & (iota(1) + other * TILE <= iota(0) + tile * TILE))

            stay[rows(tile)] = lax.fori_loop(0, tile + 1, against, zero())

        def compact(tile):
            def against(other, sums):
                here = wide(mgpu.columns(rank.at[rows(other)])) == iota(0) + tile * TILE
                source, destination = sums
                source += jnp.sum(jnp.where(here, iota(1) + other * TILE, 0), axis=1)
                destination += jnp.sum(jnp.where(here, wide(mgpu.columns(to.at[rows(other)])), 0), axis=1)
                return source, destination

            source, destination = lax.fori_loop(0, ta, against, (zero(), zero()))
            edge[0, rows(tile)] = source
            edge[1, rows(tile)] = destination

        each(ta, number)
        each(tr, compact)
        together()

        # -- chains of edges with one destination
        def link(tile):
            mine = tall(mgpu.rows(edge.at[1, rows(tile)]))

            def against(other, least):
                same = wide(mgpu.columns(edge.at[1, rows(other)])) == mine
                at = iota(1) + other * TILE
                later = same & (at > iota(0) + tile * TILE) & (at < r)
                return jnp.minimum(least, jnp.min(jnp.where(later, at, NONE), axis=1))

            chain[rows(tile)] = lax.fori_loop(tile, tr, against, zero() + NONE)

        def begin(tile):
            def against(other, least):
                at = iota(1) + other * TILE
                here = (wide(mgpu.columns(edge.at[1, rows(other)])) == iota(0) + tile * TILE) & (at < r)
                return jnp.minimum(least, jnp.min(jnp.where(here, at, NONE), axis=1))

            first[rows(tile)] = lax.fori_loop(0, tr, against, zero() + NONE)

        each(tr, link)
        each(tb, begin)
        together()

        # -- move the rows
        weight = (lambda p: sizes[b, p]) if sizes is not None else (lambda p: jnp.float32(1))

        def put(i, stays, at, row, size):
            y[b, at, :] = row
            y_size[b, at] = size

        @pl.loop(0, pairs // PAIRS)
        def _(block):
            begin = share_at * share + (block * threads + t) * PAIRS
            some = [begin + u for u in range(PAIRS)]
            evens = [x[b, 2 * jnp.minimum(i, na - 1), :] for i in some]
            odds = [x[b, 2 * jnp.minimum(i, nb - 1) + 1, :] for i in some]
            for u, i in enumerate(some):

                @pl.when(i < na)
                def _(u=u, i=i):
                    up_to = stay[i]
                    stays = rank[i] >= r

                    @pl.when(stays)
                    def _():
                        y[b, up_to - 1 + i, :] = evens[u]
                        y_size[b, up_to - 1 + i] = weight(2 * i)
                        ids[b, 2 * i] = up_to - 1 + i

                    @pl.when(jnp.logical_not(stays))
                    def _():
                        j = to[i]
                        ids[b, 2 * i] = stay[j] + j

                @pl.when(i < nb)
                def _(u=u, i=i):
                    at = stay[i] + i
                    head = first[i]
                    ids[b, 2 * i + 1] = at

                    @pl.when(head >= r)
                    def _():
                        y[b, at, :] = odds[u]
                        y_size[b, at] = weight(2 * i + 1)

                    @pl.when(head < r)
                    def _():
                        size = weight(2 * i + 1)

                        def add(state):
                            e, mass, sum = state
                            p = 2 * edge[0, e]
                            w = weight(p)
                            return chain[e], mass + w, sum + x[b, p, :].astype(jnp.float32) * w

                        state = head, size, odds[u].astype(jnp.float32) * size
                        _, mass, sum = lax.while_loop(lambda s: s[0] < r, add, state)
                        y[b, at, :] = (sum * (1 / mass)).astype(x.dtype)
                        y_size[b, at] = mass

    scratch = dict(
        raw=plgpu.SMEM((threads, TILE, k), metric.dtype) if parts == 1 else None,
        tiles=plgpu.SMEM((parts * (ta + tb), TILE, k), jnp.bfloat16, transforms=mgpu.tiled(k)),
        inverse=plgpu.SMEM(((ta + tb) * TILE,), jnp.float32),
        best=plgpu.SMEM((ta * TILE,), jnp.float32),
        to=plgpu.SMEM((ta * TILE,), jnp.int32),
        rank=plgpu.SMEM((ta * TILE,), jnp.int32),
        stay=plgpu.SMEM((ta * TILE,), jnp.int32),
        edge=plgpu.SMEM((2, tr * TILE), jnp.int32),
        chain=plgpu.SMEM((tr * TILE,), jnp.int32),
        first=plgpu.SMEM((tb * TILE,), jnp.int32),
        loaded=plgpu.Barrier(num_barriers=threads),
        sync=plgpu.Barrier(num_arrivals=threads),
    )
    operands = [flat, x, sizes, open_a, open_b]
    run = mgpu.kernel(
        body, operands, scratch,
        out=(
            jax.ShapeDtypeStruct((B, m, d), x.dtype),
            jax.ShapeDtypeStruct((B, m), jnp.float32),
            jax.ShapeDtypeStruct((B, n), jnp.int32),
        ),
        grid=dict(row=B, share=splits),
        threads=threads,
        interpret=interpret,
    )  # fmt: skip
    return run


def _bias(open, length):
    """0 where a token may take part, -inf where it may not, and behind the end."""
    return jnp.asarray(np.where(np.pad(open, (0, length - len(open))), 0, -np.inf), jnp.float32)


def _splits(B, na, threads):
    return max(1, min(-(-na // (threads * PAIRS)), -(-132 * 3 // B)))


_row = lambda v: plgpu.layout_cast(v, plgpu.Layout.WGMMA.reduce(1))
