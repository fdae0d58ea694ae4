"""A whole step of Token Merging in one launch: x is read once and written once, no score, rank or plan leaves the chip.

Queries lie along the lanes, keys along the sublanes, so that maxima over keys run over whole vectors. Nothing is sorted,
gathered or scattered: even and odd positions are picked by a product with a 0/1 matrix, ranks are counts of comparisons, new
ids counts of those that stay, and the means are one product with the matrix of the plan. Several rows of the batch are
planned together: a plan is a chain of short steps, and one row's fill the pauses of another's.
"""

from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jaxtyping import Float

from jaxmerge._kernels import _tpu as tpu
from jaxmerge._kernels._dispatch import target, tuned
from jaxmerge._kernels.step.ref import Result, added, normalised

CANDIDATES = {"step": ({"rows": 1}, {"rows": 2}, {"rows": 4}, {"rows": 8})}
MOST_TOKENS = 2048
MOST_RUNS = 16


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
    rows: int | None = None,
    interpret: Any = None,
) -> Result:
    """`ref.step`; `rows` of the batch at a time, by what was measured or else up to four that fill two MiB.

    Offsets, scales and shifts may be fewer than rows of the batch: each is then for as many rows in turn.
    """
    batch, n, d = x.shape
    k, m, here = metric.shape[-1], n - r, target()
    interpret = here.interpret if interpret is None else interpret
    rows = rows or tuned("step", "mosaic_tpu", here.kind, (metric, x, sizes, residual), r=r).get("rows")
    shared = [a[:, None] for a in (offset, scale, shift) if a is not None]
    alike = min([batch, *(batch // len(a) for a in shared)])  # rows that have the same
    rows = tpu.divisor(alike, rows or min(4, 2 * tpu.MIB // tpu.nbytes((n, d), x.dtype)))
    item = lambda a: jnp.dtype(a.dtype).itemsize
    normed = None if scale is None else tpu.out((batch, m, d), dtype, x)
    moved = (
        sum(a.size * item(a) for a in (metric, x, residual) if a is not None)
        + batch * m * d * (item(x) + (0 if normed is None else item(normed)))
        + 4 * batch * (n * (1 + (sizes is not None)) + m)
    )
    highest = metric.dtype != jnp.bfloat16
    pick, compare = n * n * k * (3 if highest else 1), n * n // 4 * k * (6 if highest else 1)
    flops = 2 * batch * (pick + compare + n * m * d * _passes(x.dtype)) + (0 if normed is None else 8 * batch * m * d)
    per_row = lambda *shape: pl.BlockSpec((rows, *shape), lambda b: (b, 0, 0))
    one = lambda a: pl.BlockSpec((1, *a.shape[1:]), lambda b: (b * rows * len(a) // batch, 0, 0))
    given = [metric, x] + ([] if sizes is None else [sizes.astype(jnp.float32)[:, None, :]])
    specs = [per_row(n, k), per_row(n, d)] + ([] if sizes is None else [per_row(1, n)])
    if residual is not None:
        given, specs = [*given, residual], [*specs, per_row(n, d)]
    has = Has(*(a is not None for a in (sizes, residual, offset, scale, shift)))
    y, mass, ids, *more = pl.pallas_call(
        partial(_kernel, r=r, runs=_runs(protected), has=has, epsilon=epsilon),
        grid=(batch // rows,),
        in_specs=[*specs, *map(one, shared)],
        out_specs=[per_row(m, d), per_row(1, m), per_row(1, n)] + ([] if normed is None else [per_row(m, d)]),
        out_shape=[
            tpu.out((batch, m, d), x.dtype, x),
            tpu.out((batch, 1, m), jnp.float32, x),
            tpu.out((batch, 1, n), jnp.int32, x),
            *([] if normed is None else [normed]),
        ],
        compiler_params=tpu.params(("parallel",), _need(rows, metric, x, residual, r, None if normed is None else dtype)),
        cost_estimate=tpu.cost(flops, moved, batch * (n + m)),
        interpret=interpret,
        name="token_merge_step",
    )(*given, *shared)
    return Result(y, mass[:, 0], ids[:, 0], *more)


class Has(NamedTuple):
    """What a call was given."""

    sizes: bool
    residual: bool
    offset: bool
    scale: bool
    shift: bool


def refusals(
    op: str,
    metric: Any,
    x: Any,
    sizes: Any,
    residual: Any,
    *more: Any,
    r: int,
    protected: tuple[bool, ...],
    dtype: Any = None,
    **how: Any,
) -> list[str]:
    """Why this step cannot be one kernel."""
    n, why = x.shape[1], []
    for name, a in (("metric", metric), ("x", x), ("residual", residual)):
        if a is not None and a.dtype not in (jnp.bfloat16, jnp.float32):
            why.append(f"{name} is {a.dtype}: bfloat16 or float32")
    if n > MOST_TOKENS:
        why.append(f"{n} tokens: all n x n comparisons are held on chip, for at most {MOST_TOKENS}")
    elif (need := _need(1, metric, x, residual, r, dtype)) > 0.9 * tpu.vmem(target().kind):
        why.append(f"a row takes {need >> 20} MiB on chip, more than the {tpu.vmem(target().kind) >> 20} MiB there are")
    if not 0 < r < n:
        why.append(f"r={r}: there is nothing to do")
    if (runs := len(_runs(protected))) > MOST_RUNS:
        why.append(f"the protected positions form {runs} runs: at most {MOST_RUNS}")
    return why


def faster(op: str, metric: Any, x: Any, *more: Any, r: int, kind: str, **how: Any) -> bool:
    """Where the model of the chip says so. XLA's own step writes and reads scores and plan, and takes the means in float32: six
    passes of the matrix unit over the same product, and x through memory once more."""
    batch, n, d = x.shape
    rate, bandwidth = tpu.chip(kind)
    moved = batch * (2 * n - r) * d * x.dtype.itemsize / bandwidth
    product = 2 * batch * n * (n - r) * d / rate
    plan = batch * (300 + n * n / 64) / 1e9  # bundles of the compiled schedule, at a cautious clock
    return max(moved, _passes(x.dtype) * product + plan) < moved + max(moved, 6 * product)


def _kernel(*refs: Any, r: int, runs: tuple[tuple[int, int], ...], has: Has, epsilon: float) -> None:
    given = iter(refs)
    metric_ref, x_ref = next(given), next(given)
    sizes_ref, residual_ref, offset_ref, scale_ref, shift_ref = (next(given) if here else None for here in has)
    y_ref, mass_ref, ids_ref, *normed_ref = given
    rows = range(x_ref.shape[0])
    plans = _segment_ids([metric_ref[b] for b in rows], r, runs)
    for b, ids in zip(rows, plans, strict=True):
        ids_ref[b] = ids
        x = added(x_ref[b], None if residual_ref is None else residual_ref[b], None if offset_ref is None else offset_ref[0])
        _merge(ids, x, None if sizes_ref is None else sizes_ref[b], y_ref.at[b], mass_ref.at[b])
        if scale_ref is not None and shift_ref is not None:
            (normed,) = normed_ref
            normed[b] = normalised(y_ref[b], scale_ref[0], shift_ref[0], epsilon, normed.dtype)


def _segment_ids(metrics: list[Array], r: int, runs: tuple[tuple[int, int], ...]) -> list[Array]:
    """The plans of some rows, (1, n) each. Whole numbers are held in float32, exactly.

    What one row waits for, another fills: every phase takes all rows in turn.
    """
    n = metrics[0].shape[0]
    evens, odds = n - n // 2, n // 2
    each = lambda f, *some: [f(*one) for one in zip(*some, strict=True)]
    down = lambda rows, columns: lax.broadcasted_iota(jnp.int32, (rows, columns), 0)
    across = lambda rows, columns: lax.broadcasted_iota(jnp.int32, (rows, columns), 1)
    free = lambda i: _all([(i < start) | (i >= stop) for start, stop in runs], i >= 0)
    total = lambda mask, value: jnp.sum(jnp.where(mask, value, 0.0), axis=0, keepdims=True)
    of = lambda side, count: jnp.where(across(count, n) == 2 * down(count, n) + side, 1.0, 0.0).astype(jnp.bfloat16)
    key_free, query_free = free(2 * down(odds, 1) + 1), free(2 * across(1, evens))

    directed = each(tpu.directions, metrics)
    halves = [[tpu.select(of(side, count), tpu.parts(x, 3)).astype(x.dtype) for side, count in ((0, evens), (1, odds))]
              for x, _ in directed]  # fmt: skip
    inverse = [tpu.row(over) for _, over in directed]
    query_over = [_picked(of(0, evens), over) for over in inverse]
    key_over = [_picked(of(1, odds), over) for over in inverse]
    score = [tpu.inner(odd, even) for even, odd in halves]
    score = each(lambda dot, over: jnp.where(key_free, dot * tpu.column(over), -jnp.inf), score, key_over)
    best = each(lambda score: jnp.max(score, axis=0, keepdims=True), score)
    to = each(lambda score, best: jnp.min(jnp.where(score == best, down(odds, evens), n), axis=0, keepdims=True), score, best)
    best = each(lambda best, over: jnp.where(query_free, best * over, -jnp.inf), best, query_over)

    before, ahead = down(evens, evens) < across(evens, evens), down(evens, evens)
    rank = each(lambda one, other: total((other > one) | ((other == one) & before), 1.0), best, each(tpu.column, best))
    stay = each(lambda rank, best: jnp.where((rank < r) & (best > -jnp.inf), 0.0, 1.0), rank, best)
    stays = each(tpu.column, stay)
    # Before even position 2i stand i odd ones, before odd position 2j + 1 stand j.
    even = each(lambda stays: total(before, stays) + across(1, evens).astype(jnp.float32), stays)
    odd = each(lambda stays: total(ahead[:, :odds] <= across(evens, odds), stays) + across(1, odds).astype(jnp.float32), stays)
    goal = each(lambda to, odd: total(down(odds, evens) == to, tpu.column(odd)), to, odd)
    even = each(lambda stay, even, goal: jnp.where(stay == 1, even, goal), stay, even, goal)
    return each(lambda even, odd: (_spread(even, of(0, evens)) + _spread(odd, of(1, odds))).astype(jnp.int32), even, odd)


def _picked(of: Array, row: Array) -> Array:
    """(1, n) -> the entries that the rows of a 0/1 matrix pick, (1, count), in float32."""
    dims = (((1,), (1,)), ((), ()))
    wide = jnp.broadcast_to(row, (tpu.SUBLANES, row.shape[1]))
    return tpu.total([lax.dot_general(part, of, dims, tpu.ONE_PASS, jnp.float32) for part in tpu.parts(wide, 3)])[:1]


def _spread(row: Array, of: Array) -> Array:
    """(1, count) -> (1, n): each entry where it was picked from, 0 elsewhere. Whole numbers below 2^16."""
    dims = (((1,), (0,)), ((), ()))
    wide = jnp.broadcast_to(row, (tpu.SUBLANES, row.shape[1]))
    return tpu.total([lax.dot_general(part, of, dims, tpu.ONE_PASS, jnp.float32) for part in tpu.parts(wide, 2)])[:1]


def _merge(ids: Array, x: Array, sizes: Array | None, y_ref: Any, mass_ref: Any) -> None:
    """The means of one row, and the merged sizes.

    Sizes go into the matrix: they are whole numbers, exact in bfloat16 where they have 8 bits, as nearly all have; a second
    product takes the rest where some have more.
    """
    m = y_ref.shape[0]
    member = lax.broadcasted_iota(jnp.int32, (m, ids.shape[1]), 0) == ids
    weight = jnp.where(member, 1.0 if sizes is None else sizes, 0.0)
    mass = jnp.sum(weight, axis=1, keepdims=True)
    mass_ref[...] = tpu.row(mass)
    inverse = jnp.where(mass == 0, 0.0, 1 / jnp.where(mass == 0, 1.0, mass))
    high, low, parts = weight.astype(jnp.bfloat16), None, tpu.parts(x, 3)
    y_ref[...] = (tpu.select(high, parts) * inverse).astype(y_ref.dtype)
    if sizes is not None:
        low = sizes - sizes.astype(jnp.bfloat16).astype(jnp.float32)

        @pl.when(jnp.max(jnp.abs(low)) > 0)
        def _():
            rest = (weight - high.astype(jnp.float32)).astype(jnp.bfloat16)
            y_ref[...] = ((tpu.select(high, parts) + tpu.select(rest, parts)) * inverse).astype(y_ref.dtype)


def _passes(dtype: Any) -> int:
    """bfloat16 parts of x."""
    return 3 if dtype == jnp.float32 else 1


def _need(rows: int, metric: Any, x: Any, residual: Any, r: int, dtype: Any = None) -> int:
    """Bytes of VMEM: both buffers of each block, and what one row holds while it is worked on."""
    n, d = x.shape[1:]
    m = n - r
    blocks = tpu.nbytes(metric.shape[1:], metric.dtype) + tpu.nbytes((n, d), x.dtype) + tpu.nbytes((m, d), x.dtype)
    blocks += 0 if residual is None else tpu.nbytes((n, d), residual.dtype)
    blocks += 0 if dtype is None else tpu.nbytes((m, d), dtype)
    small = 3 * tpu.nbytes((1, n), jnp.float32)
    plan = rows * 8 * tpu.nbytes((n // 2 + 1, n // 2 + 1), jnp.float32) + 4 * tpu.nbytes((n, n), jnp.float32)
    live = plan + 2 * tpu.nbytes((n, d), jnp.float32) + 2 * tpu.nbytes((m, d), jnp.float32)
    return 2 * rows * (blocks + small) + live + 2 * tpu.MIB


def _runs(protected: tuple[bool, ...]) -> tuple[tuple[int, int], ...]:
    """Protected positions as runs [start, stop)."""
    at, runs = 0, []
    for closed, run in groupby(protected):
        length = len(list(run))
        if closed:
            runs.append((at, at + length))
        at += length
    return tuple(runs)


def _all(masks: list[Array], start: Array) -> Array:
    for mask in masks:
        start &= mask
    return start
