"""`step` in one launch on Hopper: similarities by wgmma, ranks by counting, chains of what joins, and one pass over x.

A block computes one batch row's matching and moves a share of its tokens. So several blocks repeat the matching, which is
cheap, and none waits for another. Even tokens are sources, `a`, odd ones destinations, `b`; tiles have 64 of them.

    cosines  a (na, k) . b (nb, k) from shared memory. Products of bfloat16 numbers are exact in float32, and the inverse norms
             are applied to the sums; a float32 metric is cut into three bfloat16 parts, and the six products that matter are
             added. Rows longer than `AT_ONCE` tokens are matched by the kernel of `match`, in two launches more.
    rank_i   = |{j : s_j > s_i, or s_j = s_i and j < i}|: no sort. Sources are those of rank < r.
    stay_i   = |{j <= i : j is no source}|, from which the new ids follow.
    edges    the r sources in the order of rank, where each goes `to`, and the `next` edge that goes there too; `first` is each
             destination's first edge.
    move     each thread reads some tokens, writes those that stay, and adds to those that receive by following their chain.
"""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float

from jaxmerge._kernels import _mosaic_gpu as mgpu
from jaxmerge._kernels.match import mosaic_gpu as matching

TILE = 64
PAIRS = 4
"""Pairs of tokens that a thread reads at a time: enough loads in flight to hide the memory's latency."""
AT_ONCE = 832
MOST_TOKENS = 2048
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
    prefetch: bool = True,
    interpret: Any = None,
) -> tuple[Array, Array, Array]:
    """`ref.step`; `threads` of a block, and how many blocks share a row of the batch."""
    B, n, d = x.shape
    na, nb = (n + 1) // 2, n // 2
    blocks = splits or -(-3 * 132 // B)
    share = -(-na // max(1, blocks))
    share = -(-share // (threads * PAIRS)) * threads * PAIRS
    c = SimpleNamespace(
        n=n, na=na, nb=nb, r=r, ta=-(-na // TILE), tb=-(-nb // TILE), tr=-(-r // TILE), threads=threads, share=share
    )
    closed = np.array(protected)
    open_a, open_b = _bias(~closed[::2], c.ta), _bias(~closed[1::2], c.tb)
    vector = lambda length, dtype=jnp.int32: plgpu.SMEM((length * TILE,), dtype)
    scratch = dict(
        best=vector(c.ta, jnp.float32), to=vector(c.ta), rank=vector(c.ta), stay=vector(c.ta),
        source=vector(c.tr), goes=vector(c.tr), next=vector(c.tr), first=vector(c.tb),
        sync=plgpu.Barrier(num_arrivals=threads),
    )  # fmt: skip
    at_once = n <= AT_ONCE
    if at_once:
        given, more = _prepare(c, metric)
        scratch |= more
        given = [given, open_a, open_b]
    else:
        b_ok = None if not closed[1::2].any() else jnp.asarray(~closed[1::2])[None]
        given = [*matching.best(metric[:, ::2], metric[:, 1::2], b_ok=b_ok, interpret=interpret), open_a]

    def token_merge_step(*refs, **scratch):
        given, (x, sizes, y, mass, ids) = refs[:3], refs[3:]
        here = SimpleNamespace(**vars(c), **scratch)
        here.row, here.share_at, here.t = (lax.axis_index(name) for name in ("row", "share", "thread"))
        if prefetch:
            _prefetch(here, x)
        if at_once:
            _cosines(here, *given)
        else:
            _copy(here, *given)
        _ranks(here)
        _edges(here)
        _move(here, x, sizes, y, mass, ids)

    return mgpu.kernel(
        token_merge_step, (*given, x, sizes), scratch,
        out=(
            jax.ShapeDtypeStruct((B, n - r, d), x.dtype),
            jax.ShapeDtypeStruct((B, n - r), jnp.float32),
            jax.ShapeDtypeStruct((B, n), jnp.int32),
        ),
        grid=dict(row=B, share=-(-na // share)), threads=threads, interpret=interpret,
    )  # fmt: skip


def _prepare(c: SimpleNamespace, metric: Array) -> tuple[Array, dict]:
    """The metric as pairs of rows (., 2, k), wherever a batch row begins, and the scratch that the cosines need."""
    B, n, k = metric.shape
    c.parts = 3 if metric.dtype == jnp.float32 else 1
    c.k = k + -k % 16
    flat, pad = metric.reshape(B * n, k), B * n % 2
    if c.parts > 1 or B * n < 2 * TILE:
        pad += 2 * TILE  # float32 is read without the copy engine, which knows where an array ends
    if pad or c.k > k:
        flat = jnp.pad(flat, ((0, pad), (0, c.k - k)))
    tiles = c.ta + c.tb
    return flat.reshape(-1, 2, c.k), dict(
        raw=plgpu.SMEM((c.threads, TILE, c.k), metric.dtype) if c.parts == 1 else None,
        tiles=plgpu.SMEM((c.parts * tiles, TILE, c.k), jnp.bfloat16, transforms=mgpu.tiled(c.k)),
        inverse=plgpu.SMEM((tiles * TILE,), jnp.float32),
        loaded=plgpu.Barrier(num_barriers=c.threads),
    )


def _prefetch(c: SimpleNamespace, x: Any) -> None:
    """Ask for this block's tokens, so that they are in the L2 cache when the matching is done."""
    rows = 2 * c.share // c.threads
    width = max(w for w in range(128, 257, 128) if x.shape[2] % w == 0)
    at = jnp.minimum(2 * c.share_at * c.share + c.t * rows, max(0, c.n - rows))
    for column in range(0, x.shape[2], width):
        plgpu.async_prefetch(x.at[c.row, pl.ds(at, min(rows, c.n)), pl.ds(column, width)])


def _cosines(c: SimpleNamespace, flat: Any, open_a: Any, open_b: Any) -> None:
    """best, to: the most similar destination of each source."""
    odd = (c.row * c.n) % 2  # where the row's even tokens are in `flat`

    def normalise(tile):
        side = jnp.where(tile < c.ta, 0, 1)
        at = (c.row * c.n + side) // 2 + (tile - side * c.ta) * TILE
        here = flat.at[pl.ds(at, TILE), jnp.where(side == 0, odd, 1 - odd)]
        if c.parts == 1:
            plgpu.copy_gmem_to_smem(here, c.raw.at[c.t], c.loaded.at[c.t])
            plgpu.barrier_wait(c.loaded.at[c.t])
            here = c.raw.at[c.t]
        v = plgpu.layout_cast(mgpu.load(here).astype(jnp.float32), plgpu.Layout.WGMMA)
        v, c.inverse[_rows(tile)] = mgpu.unit(v)
        for p in range(c.parts):
            part = v.astype(jnp.bfloat16)
            c.tiles[p * (c.ta + c.tb) + tile] = part
            v = v - part.astype(jnp.float32)

    def match(tile):
        def against(other, found):
            highest, index = found

            def product(acc):
                for p in range(c.parts):
                    for q in range(c.parts - p):
                        left, right = p * (c.ta + c.tb) + tile, q * (c.ta + c.tb) + c.ta + other
                        plgpu.wgmma(acc, c.tiles.at[left], c.tiles.at[right].transpose((1, 0)))
                return acc[...]

            score = pl.run_scoped(product, plgpu.ACC((TILE, TILE), jnp.float32))
            score = score * _wide(c.inverse.at[_rows(c.ta + other)]) + _wide(open_b.at[_rows(other)])
            high = jnp.max(score, axis=1)
            at = jnp.min(jnp.where(score == _tall(high), _iota(1), NONE), axis=1) + other * TILE
            better = high > highest
            return jnp.where(better, high, highest), jnp.where(better, at, index)

        highest, index = lax.fori_loop(0, c.tb, against, (_column(-jnp.inf, jnp.float32), _column(0)))
        c.best[_rows(tile)] = highest * mgpu.rows(c.inverse.at[_rows(tile)]) + mgpu.rows(open_a.at[_rows(tile)])
        c.to[_rows(tile)] = index

    _each(c, c.ta + c.tb, normalise)
    plgpu.commit_smem()
    _together(c)
    _each(c, c.ta, match)
    _together(c)


def _copy(c: SimpleNamespace, similarity: Any, index: Any, open_a: Any) -> None:
    """best, to: as `match` found them."""

    def fetch(tile):
        c.best[_rows(tile)] = mgpu.rows(similarity.at[c.row, _rows(tile)]) + mgpu.rows(open_a.at[_rows(tile)])
        c.to[_rows(tile)] = mgpu.rows(index.at[c.row, _rows(tile)])

    _each(c, c.ta, fetch)
    _together(c)


def _ranks(c: SimpleNamespace) -> None:
    """rank, and from it stay and the edges' source and goes."""

    def order(tile):
        mine = _tall(mgpu.rows(c.best.at[_rows(tile)]))

        def against(other, sum):
            theirs = _wide(c.best.at[_rows(other)])
            before = _iota(1) + other * TILE < _iota(0) + tile * TILE
            return sum + _count((theirs > mine) | ((theirs == mine) & before))

        c.rank[_rows(tile)] = lax.fori_loop(0, c.ta, against, _column(0))

    def number(tile):
        def against(other, sum):
            stays = _wide(c.rank.at[_rows(other)]) >= c.r
            return sum + _count(stays & (_iota(1) + other * TILE <= _iota(0) + tile * TILE))

        c.stay[_rows(tile)] = lax.fori_loop(0, tile + 1, against, _column(0))

    def compact(tile):
        def against(other, sums):
            here = _wide(c.rank.at[_rows(other)]) == _iota(0) + tile * TILE
            pick = lambda v: jnp.sum(jnp.where(here, v, 0), axis=1)
            return sums[0] + pick(_iota(1) + other * TILE), sums[1] + pick(_wide(c.to.at[_rows(other)]))

        c.source[_rows(tile)], c.goes[_rows(tile)] = lax.fori_loop(0, c.ta, against, (_column(0), _column(0)))

    _each(c, c.ta, order)
    _together(c)
    _each(c, c.ta, number)
    _each(c, c.tr, compact)
    _together(c)


def _edges(c: SimpleNamespace) -> None:
    """next and first: the edges of each destination as a chain."""

    def least(mine, tile, after, start):
        def against(other, sum):
            at = _iota(1) + other * TILE
            found = (_wide(c.goes.at[_rows(other)]) == mine) & (at < c.r)
            if after:
                found = found & (at > _iota(0) + tile * TILE)
            return jnp.minimum(sum, jnp.min(jnp.where(found, at, NONE), axis=1))

        return lax.fori_loop(start, c.tr, against, _column(NONE))

    def link(tile):
        c.next[_rows(tile)] = least(_tall(mgpu.rows(c.goes.at[_rows(tile)])), tile, True, tile)

    def begin(tile):
        c.first[_rows(tile)] = least(_iota(0) + tile * TILE, tile, False, 0)

    _each(c, c.tr, link)
    _each(c, c.tb, begin)
    _together(c)


def _move(c: SimpleNamespace, x: Any, sizes: Any, y: Any, mass: Any, ids: Any) -> None:
    """This block's tokens: written where they stay, with what joins them."""
    weight = (lambda p: sizes[c.row, p]) if sizes is not None else (lambda p: jnp.float32(1))

    @pl.loop(0, c.share // (c.threads * PAIRS))
    def _(i):
        pairs = [c.share_at * c.share + (i * c.threads + c.t) * PAIRS + u for u in range(PAIRS)]
        evens = [x[c.row, 2 * jnp.minimum(p, c.na - 1), :] for p in pairs]
        odds = [x[c.row, 2 * jnp.minimum(p, c.nb - 1) + 1, :] for p in pairs]

        def source(p, row):
            stays = c.rank[p] >= c.r

            @pl.when(stays)
            def _():
                at = c.stay[p] - 1 + p
                y[c.row, at, :] = row
                mass[c.row, at] = weight(2 * p)
                ids[c.row, 2 * p] = at

            @pl.when(jnp.logical_not(stays))
            def _():
                to = c.to[p]
                ids[c.row, 2 * p] = c.stay[to] + to

        def destination(p, row):
            at, edge = c.stay[p] + p, c.first[p]
            ids[c.row, 2 * p + 1] = at

            @pl.when(edge >= c.r)
            def _():
                y[c.row, at, :] = row
                mass[c.row, at] = weight(2 * p + 1)

            @pl.when(edge < c.r)
            def _():
                def add(state):
                    edge, total, sum = state
                    q = 2 * c.source[edge]
                    w = weight(q)
                    return c.next[edge], total + w, sum + x[c.row, q, :].astype(jnp.float32) * w

                own = weight(2 * p + 1)
                state = edge, own, row.astype(jnp.float32) * own
                _, total, sum = lax.while_loop(lambda state: state[0] < c.r, add, state)
                y[c.row, at, :] = (sum * (1 / total)).astype(x.dtype)
                mass[c.row, at] = total

        for p, even, odd in zip(pairs, evens, odds, strict=True):
            pl.when(p < c.na)(lambda p=p, row=even: source(p, row))
            pl.when(p < c.nb)(lambda p=p, row=odd: destination(p, row))


def _bias(open: np.ndarray, tiles: int) -> Array:
    """0 where a token may take part, -inf where it may not, and behind the end."""
    return jnp.asarray(np.where(np.pad(open, (0, tiles * TILE - len(open))), 0, -np.inf), jnp.float32)


def _each(c: SimpleNamespace, count: int, do: Any) -> None:
    """do(tile) for every tile, shared out among the threads."""
    for i in range(-(-count // c.threads)):
        tile = i * c.threads + c.t
        if (i + 1) * c.threads <= count:
            do(tile)
        else:
            pl.when(tile < count)(lambda tile=tile: do(tile))


def _together(c: SimpleNamespace) -> None:
    """Wait until all threads have written."""
    plgpu.barrier_arrive(c.sync)
    plgpu.barrier_wait(c.sync)


def _rows(tile: Any) -> Any:
    return pl.ds(pl.multiple_of(tile * TILE, TILE), TILE)


def _column(value: Any, dtype: Any = jnp.int32) -> Array:
    return plgpu.layout_cast(jnp.full((TILE,), value, dtype), plgpu.Layout.WGMMA.reduce(1))


_iota = lambda axis: mgpu.iota((TILE, TILE), axis)
_wide = lambda ref: lax.broadcast_in_dim(mgpu.columns(ref), (TILE, TILE), (1,))
_tall = lambda v: lax.broadcast_in_dim(v, (TILE, TILE), (0,))
_count = lambda mask: jnp.sum(jnp.where(mask, 1, 0), axis=1)


device_refusals = mgpu.device_refusals


def refusals(op: str, metric: Any, x: Any, sizes: Any, *, r: int, protected: tuple[bool, ...]) -> list[str]:
    """Why this step cannot be one kernel."""
    n, k, why = x.shape[1], metric.shape[2], mgpu.row_refusals(x)
    if metric.dtype not in (jnp.bfloat16, jnp.float32):
        why.append(f"metric is {metric.dtype}: bfloat16 or float32")
    if n > MOST_TOKENS:
        why.append(f"{n} tokens: each block compares all pairs, of at most {MOST_TOKENS}")
    if not 0 < r < n:
        why.append(f"r={r}: there is nothing to do")
    if n <= AT_ONCE:
        parts, tiles = 3 if metric.dtype == jnp.float32 else 1, -(-n // 2 // TILE) * 2
        need = TILE * (k + 15) * 2 * (parts * tiles + 4)
        if need > mgpu.SHARED:
            why.append(f"the metric's {n} rows of {k} take {need >> 10} KiB of the {mgpu.SHARED >> 10} KiB on chip")
    return why


def faster(op: str, metric: Any, x: Any, sizes: Any, *, r: int, protected: tuple[bool, ...], kind: str) -> bool:
    """Always, where it was measured: XLA needs some twenty launches."""
    return True
