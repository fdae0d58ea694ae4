"""`step` in one launch on Hopper: similarities by wgmma, ranks by counting, chains of what joins, and one pass over x.

A block computes one batch row's matching and moves a share of its tokens. So several blocks repeat the matching, which is
short, and none waits for another. Even tokens are sources, `a`, odd ones destinations, `b`.

    cosines  a (na, k) . b (nb, k) from shared memory, 64 x 64 at a time. Products of bfloat16 numbers are exact in float32, and
             the inverse norms are applied to the sums; a float32 metric is cut into three bfloat16 parts, and the six products
             that matter are added. A row whose metric does not fit on chip is matched by the kernel of `match`, two launches
             more.
    rank_i   = |{j : s_j > s_i, or s_j = s_i and j < i}|: no sort. Sources are those of rank < r.
    edges    the r sources in the order of rank, and where each goes.
    stay_i   = |{j <= i : j is no source}|, from which the new ids follow.
    first_j  each destination's first edge; `next`, the next edge to the same destination.
    move     each thread reads some tokens, writes those that stay, and adds to those that receive by following their chain.
    norm     of a row before it is written: lanes add up what they have, then warps, then the four of a thread.

Behind the cosines every lane has a few tokens, or edges, and walks over the others, which are read from shared memory one by
one; each thread walks a part of the way, and puts together for itself what all have found.
"""

import functools
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
from jaxmerge._kernels._dispatch import target, tuned
from jaxmerge._kernels.match import mosaic_gpu as matching
from jaxmerge._kernels.step import _move
from jaxmerge._kernels.step.ref import Result, in_turn, normalised

CANDIDATES = {"step": tuple({"threads": threads} for threads in (4, 2))}
TILE = 64
LANES = mgpu.LANES
REGISTERS = 32
"""Of each lane, at most, for the rows that a thread reads at a time."""
UNROLLED = 4
AT_ONCE = 832
MOST_TOKENS = 2048
NONE = 1 << 20


def step(
    metric: Float[Array, "B n k"],
    x: Float[Array, "B n d"],
    sizes: Float[Array, "B n"] | None = None,
    residual: Float[Array, "B n d"] | None = None,
    offset: Float[Array, "one d"] | None = None,
    scale: Float[Array, "one d"] | None = None,
    shift: Float[Array, "one d"] | None = None,
    *,
    r: int,
    protected: tuple[bool, ...],
    epsilon: float = 0.0,
    dtype: Any = None,
    threads: int | None = None,
    splits: int | None = None,
    pairs: int | None = None,
    interpret: Any = None,
) -> Result:
    """`ref.step`; `threads` of a block, how many blocks share a row of the batch, and how many pairs a thread reads at a time.

    Offsets, scales and shifts may be fewer than rows of the batch: each is then for as many rows in turn.
    """
    B, n, d = x.shape
    if threads is None:
        threads = int(tuned("step", "mosaic_gpu", target().kind, (metric, x, sizes, residual), r=r).get("threads", 4))
    width = d * (x.dtype.itemsize + (0 if residual is None else residual.dtype.itemsize))
    pairs = pairs or max(1, min(2, REGISTERS // 2 * 512 // width))
    blocks = splits or max(1, mgpu.BLOCKS * 4 // threads // B)  # so that one wave of them fills the chip
    c, scratch = _laid_out(metric, d, offset, scale, r=r, threads=threads)
    share = -(-c.na // blocks)
    c.share, c.pairs, c.epsilon = -(-share // (threads * pairs)) * threads * pairs, pairs, epsilon
    closed = np.array(protected)
    open_a, open_b = _bias(~closed[::2], c.ga), _bias(~closed[1::2], c.tb * TILE)
    if c.slots:
        given = [_in_pairs(c, metric), open_a, open_b]
    else:
        b_ok = None if not closed[1::2].any() else jnp.asarray(~closed[1::2])[None]
        given = [*matching.best(metric[:, ::2], metric[:, 1::2], b_ok=b_ok, interpret=interpret), open_a]

    def token_merge_step(*refs, **scratch):
        given, (x, sizes, residual, offset, scale, shift, y, mass, ids, *normed) = refs[:3], refs[3:]
        here = SimpleNamespace(**vars(c), **scratch)
        here.row, here.share_at, here.t = (lax.axis_index(name) for name in ("row", "share", "thread"))
        _keep(here, B, offset, scale, shift)
        if c.slots:
            flat, open_a, open_b = given
            _prepare(here, flat)
            _cosines(here, open_b)
            _choose(here, [(here.best_parts.at[p], here.to_parts.at[p]) for p in range(here.of_b)], here.inverse, open_a)
        else:
            similarity, index, open_a = given
            _choose(here, [(similarity.at[here.row], index.at[here.row])], None, open_a)
        _ranks(here)
        _edges(here)
        _chains(here)
        _move.move(here, x, sizes, residual, y, mass, ids, *normed)

    wide = lambda a, there: a.astype(jnp.float32) if there else None
    vectors = wide(offset, offset is not None), wide(scale, c.normalises), wide(shift, c.normalises)
    found = mgpu.kernel(
        token_merge_step, (*given, x, sizes, residual, *vectors), scratch,
        out=(
            jax.ShapeDtypeStruct((B, n - r, d), x.dtype),
            jax.ShapeDtypeStruct((B, n - r), jnp.float32),
            jax.ShapeDtypeStruct((B, n), jnp.int32),
            *([jax.ShapeDtypeStruct((B, n - r, d), dtype)] if c.normalises else []),
        ),
        grid=dict(row=B, share=-(-c.na // c.share)), threads=threads, interpret=interpret,
    )  # fmt: skip
    if scale is None or shift is None or c.normalises:
        return Result(*found)
    return Result(*found, normed=normalised(found[0], in_turn(scale, x), in_turn(shift, x), epsilon, dtype))


def _keep(c: SimpleNamespace, B: int, *vectors: Any) -> None:
    """On chip: what every token gets."""
    own = lambda ref: c.row * ref.shape[0] // B

    @pl.when(c.t == 0)
    def _():
        for kept, vector in zip((c.added, c.scale, c.shift), vectors, strict=True):
            if vector is not None:
                kept[...] = vector[own(vector)]


def _laid_out(metric: Any, d: int, offset: Any, scale: Any, *, r: int, threads: int) -> tuple[SimpleNamespace, dict[str, Any]]:
    """How much there is of what, and the scratch. `slots` is for how many tiles of the metric there is room as they come: for
    all, or for one of each thread; 0 where it does not fit on chip."""
    n, k = metric.shape[1:]
    c = SimpleNamespace(n=n, na=(n + 1) // 2, nb=n // 2, d=d, r=r, threads=threads, k=k + -k % 16)
    c.ga, c.gb, c.gr = (-(-count // LANES) * LANES for count in (c.na, c.nb, r))  # whole registers of all lanes
    c.ta, c.tb = -(-c.na // TILE), -(-c.nb // TILE)
    rounds = lambda parts: -(-c.ta * parts // threads) * -(-c.tb // parts)
    c.of_b = min(range(1, c.tb + 1), key=rounds)  # parts that a tile of sources is compared in, by different threads
    c.parts = 3 if metric.dtype == jnp.float32 else 1
    c.normalises = scale is not None and d % LANES == 0
    own = lambda parts, size, dtype=jnp.int32: plgpu.SMEM((parts, size), dtype)
    row = lambda there: plgpu.SMEM((d,), jnp.float32) if there else None
    scratch = dict(
        best=own(threads, c.ga, jnp.float32), to=own(1, c.ga),
        rank_parts=own(threads, c.ga), rank=own(threads, c.ga),
        source_parts=own(threads, c.gr), source=own(threads, c.gr),
        goes_parts=own(threads, c.gr), goes=own(threads, c.gr),
        stay=own(1, c.ga), first=own(1, c.gb), next=own(1, c.gr),
        sync=plgpu.Barrier(num_arrivals=threads),
        added=row(offset is not None), scale=row(c.normalises), shift=row(c.normalises),
    )  # fmt: skip
    tiles = c.ta + c.tb
    for c.slots in (tiles, threads) if n <= AT_ONCE else ():
        cosines = dict(
            tiles=plgpu.SMEM((c.parts * tiles, TILE, c.k), jnp.bfloat16, transforms=mgpu.tiled(c.k)),
            inverse=plgpu.SMEM((max(tiles * TILE, c.ga),), jnp.float32),
            best_parts=own(c.of_b, c.ga, jnp.float32), to_parts=own(c.of_b, c.ga),
            raw=plgpu.SMEM((c.slots, TILE, c.k), metric.dtype) if c.parts == 1 else None,
            loaded=plgpu.Barrier(num_barriers=c.slots) if c.parts == 1 else None,
        )  # fmt: skip
        if mgpu.shared(scratch | cosines) <= mgpu.MOST_SHARED:
            return c, scratch | cosines
    c.slots = 0
    return c, scratch


def _in_pairs(c: SimpleNamespace, metric: Array) -> Array:
    """The metric as pairs of rows (., 2, k), wherever a batch row begins."""
    B, n, k = metric.shape
    flat, pad = metric.reshape(B * n, k), B * n % 2
    if c.parts > 1 or B * n < 2 * TILE:
        pad += 2 * TILE  # float32 is read without the copy engine, which knows where an array ends
    if pad or c.k > k:
        flat = jnp.pad(flat, ((0, pad), (0, c.k - k)))
    return flat.reshape(-1, 2, c.k)


def _prepare(c: SimpleNamespace, flat: Any) -> None:
    """tiles, inverse: rows of the metric scaled, and what their norms are divided by."""
    odd = (c.row * c.n) % 2  # where the row's even tokens are in `flat`

    def given(tile):
        side = jnp.where(tile < c.ta, 0, 1)
        at = (c.row * c.n + side) // 2 + (tile - side * c.ta) * TILE
        return flat.at[pl.ds(at, TILE), jnp.where(side == 0, odd, 1 - odd)]

    at_first = c.parts == 1 and c.slots > c.threads

    slot = (lambda tile: tile) if at_first else (lambda tile: c.t)

    def ask(tile):
        plgpu.copy_gmem_to_smem(given(tile), c.raw.at[slot(tile)], c.loaded.at[slot(tile)])

    def normalise(tile):
        here = given(tile)
        if c.parts == 1:
            if not at_first:
                plgpu.commit_smem()  # lanes have read what the copy engine writes next
                ask(tile)
            plgpu.barrier_wait(c.loaded.at[slot(tile)])
            here = c.raw.at[slot(tile)]
        v = plgpu.layout_cast(mgpu.load(here).astype(jnp.float32), plgpu.Layout.WGMMA)
        v, c.inverse[_rows(tile)] = mgpu.unit(v)
        for p in range(c.parts):
            part = v.astype(jnp.bfloat16)
            c.tiles[p * (c.ta + c.tb) + tile] = part
            v = v - part.astype(jnp.float32)

    if at_first:
        mgpu.each(c.t, c.threads, c.ta + c.tb, ask)
    mgpu.each(c.t, c.threads, c.ta + c.tb, normalise)
    plgpu.commit_smem()


def _cosines(c: SimpleNamespace, open_b: Any) -> None:
    """best_parts, to_parts: a . b / |b| for the best b of a part, and which it is."""
    square = (TILE, TILE)
    wide = lambda ref: lax.broadcast_in_dim(mgpu.columns(ref), square, (1,))
    start = lambda value, dtype: plgpu.layout_cast(jnp.full((TILE,), value, dtype), plgpu.Layout.WGMMA.reduce(1))

    def match(unit):
        tile, part = (unit, 0) if c.of_b == 1 else (lax.rem(unit, c.ta), unit // c.ta)

        def against(i, found):
            highest, index = found
            other = part + i * c.of_b

            def products(multiply):
                for p in range(c.parts):
                    for q in range(c.parts - p):
                        left, right = p * (c.ta + c.tb) + tile, q * (c.ta + c.tb) + c.ta + other
                        multiply(c.tiles.at[left], c.tiles.at[right].transpose((1, 0)))

            score = mgpu.accumulated(square, products)
            score = score * wide(c.inverse.at[_rows(c.ta + other)]) + wide(open_b.at[_rows(other)])
            high = jnp.max(score, axis=1)
            is_high = score == lax.broadcast_in_dim(high, square, (0,))
            at = jnp.min(jnp.where(is_high, mgpu.iota(square, 1), NONE), axis=1) + other * TILE
            better = high > highest
            return jnp.where(better, high, highest), jnp.where(better, at, index)

        rounds = c.tb if c.of_b == 1 else (c.tb - part + c.of_b - 1) // c.of_b
        highest, index = lax.fori_loop(0, rounds, against, (start(-jnp.inf, jnp.float32), start(0, jnp.int32)))
        c.best_parts[part, _rows(tile)] = highest
        c.to_parts[part, _rows(tile)] = index

    _together(c)
    mgpu.each(c.t, c.threads, c.ta * c.of_b, match)
    _together(c)


def _choose(c: SimpleNamespace, parts: list[tuple[Any, Any]], inverse: Any, open_a: Any) -> None:
    """best, to: the cosine with the best destination, -inf where there is none to find, and the destination."""
    some = pl.ds(0, c.ga)
    found = [(mgpu.load(similarity.at[some]), mgpu.load(index.at[some])) for similarity, index in parts]
    highest = functools.reduce(jnp.maximum, [high for high, _ in found])
    index = functools.reduce(jnp.minimum, [jnp.where(high == highest, to, NONE) for high, to in found])
    cosine = highest if inverse is None else highest * mgpu.load(inverse.at[some])
    c.best[c.t] = mgpu.line(jnp.where(mgpu.load(open_a) == 0, cosine, -jnp.inf))

    @pl.when(c.t == 0)
    def _():
        c.to[0] = index


def _ranks(c: SimpleNamespace) -> None:
    """rank, of each source."""
    mine, lane = mgpu.load(c.best.at[c.t]), mgpu.line_iota(c.ga)

    def ahead(j, sum):
        other = c.best[c.t, j]
        return sum + jnp.where((other > mine) | ((other == mine) & (j < lane)), 1, 0)

    c.rank_parts[c.t] = _walk(_share(c, c.na), ahead, jnp.zeros_like(lane))
    _together(c)
    c.rank[c.t] = mgpu.line(_sum(c, c.rank_parts))


def _edges(c: SimpleNamespace) -> None:
    """source and goes, of each edge; NONE behind the last."""
    edge = mgpu.line_iota(c.gr)

    def look(j, found):
        here = edge == c.rank[c.t, j]
        return tuple(jnp.where(here, new, old) for old, new in zip(found, (j, c.to[0, j]), strict=True))

    c.source_parts[c.t], c.goes_parts[c.t] = _walk(_share(c, c.na), look, (jnp.zeros_like(edge),) * 2)
    _together(c)
    for parts, whole in ((c.source_parts, c.source), (c.goes_parts, c.goes)):
        whole[c.t] = jnp.where(edge < c.r, _sum(c, parts), NONE)


def _chains(c: SimpleNamespace) -> None:
    """stay of each source, first of each destination, next of each edge."""
    edges = (0, -(-c.r // UNROLLED))
    last = edges[1] * UNROLLED - 1

    def number():
        lane = mgpu.line_iota(c.ga)
        gone = lambda q, sum: sum + jnp.where(c.source[c.t, q] <= lane, 1, 0)
        c.stay[0] = lane + 1 - _walk(edges, gone, jnp.zeros_like(lane))

    def begin():
        lane = mgpu.line_iota(c.gb)
        earlier = lambda q, least: jnp.where(c.goes[c.t, last - q] == lane, last - q, least)
        c.first[0] = _walk(edges, earlier, jnp.full_like(lane, NONE))

    def link():
        mine, lane = mgpu.load(c.goes.at[c.t]), mgpu.line_iota(c.gr)

        def earlier(q, least):
            return jnp.where((c.goes[c.t, last - q] == mine) & (last - q > lane), last - q, least)

        c.next[0] = _walk(edges, earlier, jnp.full_like(lane, NONE))

    for i, task in enumerate((number, begin, link)):
        pl.when(c.t == i % c.threads)(task)
    _together(c)


def _bias(open: np.ndarray, length: int) -> Array:
    """0 where a token may take part, -inf where it may not, and behind the end."""
    return jnp.asarray(np.where(np.pad(open, (0, length - len(open))), 0, -np.inf), jnp.float32)


def _rows(tile: Any) -> Any:
    """Where the rows of a tile are."""
    return pl.ds(pl.multiple_of(tile * TILE, TILE), TILE)


def _share(c: SimpleNamespace, length: int) -> tuple[Any, Any]:
    """A thread's share of a walk over `length`."""
    rounds = -(-length // UNROLLED)
    each = -(-rounds // c.threads)
    return jnp.minimum(c.t * each, rounds), jnp.minimum((c.t + 1) * each, rounds)


def _sum(c: SimpleNamespace, parts: Any) -> Array:
    """What all threads have found."""
    return functools.reduce(jnp.add, [mgpu.load(parts.at[part]) for part in range(c.threads)])


def _walk(span: tuple[Any, Any], do: Any, carry: Any) -> Any:
    """carry = do(j, carry) for j in UNROLLED * span, which may go a little beyond the end."""

    def some(i, carry):
        for u in range(UNROLLED):
            carry = do(i * UNROLLED + u, carry)
        return carry

    return lax.fori_loop(*span, some, carry)


def _together(c: SimpleNamespace) -> None:
    """Wait until all threads have written."""
    plgpu.barrier_arrive(c.sync)
    plgpu.barrier_wait(c.sync)


device_refusals = mgpu.device_refusals


def refusals(
    op: str, metric: Any, x: Any, sizes: Any, residual: Any, offset: Any = None, scale: Any = None, *_: Any, r: int, **how: Any
) -> list[str]:
    """Why this step cannot be one kernel."""
    n, k = x.shape[1], metric.shape[2]
    why = mgpu.row_refusals(x) + ([] if residual is None else mgpu.row_refusals(residual))
    if metric.dtype not in (jnp.bfloat16, jnp.float32):
        why.append(f"metric is {metric.dtype}: bfloat16 or float32")
    if n > MOST_TOKENS:
        why.append(f"{n} tokens: each block compares all pairs, of at most {MOST_TOKENS}")
    if not 0 < r < n:
        why.append(f"r={r}: there is nothing to do")
    if not why:
        c, scratch = _laid_out(metric, x.shape[2], offset, scale, r=r, threads=4)
        half = lambda n: jax.ShapeDtypeStruct((metric.shape[0], n, k), metric.dtype)
        if not c.slots:
            why += matching.refusals("match", half(n - n // 2), half(n // 2))
        if (takes := mgpu.shared(scratch)) > mgpu.MOST_SHARED:
            why.append(f"r={r} of {n} tokens take {takes >> 10} KiB on chip, more than the {mgpu.MOST_SHARED >> 10} there are")
    return why


def faster(op: str, *shapes: Any, kind: str, **how: Any) -> bool:
    """Always. On an H200, ViT-B at 224, 64 images: 23 microseconds where XLA took 430; ViT-H at 518, 8 images: 61 and 556."""
    return True
