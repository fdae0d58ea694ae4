"""A whole step of Token Merging in one launch: x is read once and written once, no score, rank or plan leaves the chip.

One row of the batch at a time. All n x n products are taken and those that are no even-odd pair masked: at these n the
matrix unit has them before the next row has arrived. Queries lie along the lanes, so that maxima over keys run over whole
vectors. Nothing is sorted, gathered or scattered: ranks are counts of comparisons, new ids counts of those that stay, and
the means are one product with the 0/1 matrix of the plan.
"""

from functools import partial
from itertools import groupby
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jaxtyping import Float

from jaxmerge._kernels import _tpu as tpu
from jaxmerge._kernels._dispatch import target, tuned

CANDIDATES = {"step": ({"rows": 1}, {"rows": 2}, {"rows": 4}, {"rows": 8})}
MOST_TOKENS = 2048
MOST_RUNS = 16


def step(
    metric: Float[Array, "B n k"],
    x: Float[Array, "B n d"],
    sizes: Float[Array, "B n"] | None = None,
    *,
    r: int,
    protected: tuple[bool, ...],
    rows: int | None = None,
    interpret: Any = None,
) -> tuple[Array, Array, Array]:
    """`ref.step`; `rows` of the batch at a time, by what was measured or else as many as fill a block of a MiB."""
    batch, n, d = x.shape
    k, m, here = metric.shape[-1], n - r, target()
    interpret = here.interpret if interpret is None else interpret
    rows = rows or tuned("step", "mosaic_tpu", here.kind, (metric, x, sizes), r=r).get("rows")
    rows = tpu.divisor(batch, rows or max(1, tpu.MIB // tpu.nbytes((n, d), x.dtype)))
    item = lambda a: jnp.dtype(a.dtype).itemsize
    moved = metric.size * item(metric) + (x.size + batch * m * d) * item(x) + 4 * batch * (n * (1 + (sizes is not None)) + m)
    passes = _passes(x.dtype, sizes is not None)
    flops = 2 * batch * n * (n * k * (1 if metric.dtype == jnp.bfloat16 else 6) + m * d * passes)
    per_row = lambda *shape: pl.BlockSpec((rows, *shape), lambda b: (b, 0, 0))
    given = [metric, x] + ([] if sizes is None else [sizes.astype(jnp.float32)[:, None, :]])
    specs = [per_row(n, k), per_row(n, d)] + ([] if sizes is None else [per_row(1, n)])
    y, mass, ids = pl.pallas_call(
        partial(_kernel, r=r, runs=_runs(protected), weighted=sizes is not None),
        grid=(batch // rows,),
        in_specs=specs,
        out_specs=[per_row(m, d), per_row(1, m), per_row(1, n)],
        out_shape=[
            tpu.out((batch, m, d), x.dtype, x),
            tpu.out((batch, 1, m), jnp.float32, x),
            tpu.out((batch, 1, n), jnp.int32, x),
        ],
        compiler_params=tpu.params(("parallel",), _need(rows, metric, x, r)),
        cost_estimate=tpu.cost(flops, moved, batch * (n + m)),
        interpret=interpret,
        name="token_merge_step",
    )(*given)
    return y, mass[:, 0], ids[:, 0]


def refusals(op: str, metric: Any, x: Any, sizes: Any, *, r: int, protected: tuple[bool, ...]) -> list[str]:
    """Why this step cannot be one kernel."""
    n, why = x.shape[1], []
    for name, a in (("metric", metric), ("x", x)):
        if a.dtype not in (jnp.bfloat16, jnp.float32):
            why.append(f"{name} is {a.dtype}: bfloat16 or float32")
    if n > MOST_TOKENS:
        why.append(f"{n} tokens: all n x n comparisons are held on chip, for at most {MOST_TOKENS}")
    elif (need := _need(1, metric, x, r)) > 0.9 * tpu.vmem(target().kind):
        why.append(f"a row takes {need >> 20} MiB on chip, more than the {tpu.vmem(target().kind) >> 20} MiB there are")
    if not 0 < r < n:
        why.append(f"r={r}: there is nothing to do")
    if (runs := len(_runs(protected))) > MOST_RUNS:
        why.append(f"the protected positions form {runs} runs: at most {MOST_RUNS}")
    return why


def faster(op: str, metric: Any, x: Any, sizes: Any, *, r: int, protected: tuple[bool, ...], kind: str) -> bool:
    """Where the model of the chip says so: its time is at most that of x through memory three times, as XLA does it."""
    batch, n, d = x.shape
    rate, bandwidth = tpu.chip(kind)
    moved = batch * (2 * n - r) * d * x.dtype.itemsize / bandwidth
    matrix = 2 * batch * n * (n - r) * d * _passes(x.dtype, sizes is not None) / rate
    vector = batch * n * n * 24 / (4 * 1024 * 1.2e9)
    return matrix + vector < 3 * moved


def _kernel(*refs: Any, r: int, runs: tuple[tuple[int, int], ...], weighted: bool) -> None:
    metric_ref, x_ref, *sizes_ref, y_ref, mass_ref, ids_ref = refs
    for b in range(x_ref.shape[0]):
        ids = _segment_ids(metric_ref[b], r, runs)
        ids_ref[b] = ids.astype(jnp.int32)
        y, mass = _merged(ids, x_ref[b], sizes_ref[0][b] if weighted else None, y_ref.shape[1])
        y_ref[b], mass_ref[b] = y.astype(y_ref.dtype), mass


def _segment_ids(metric: Array, r: int, runs: tuple[tuple[int, int], ...]) -> Array:
    """The plan of one row, (1, n): float32 holds these whole numbers exactly."""
    n = metric.shape[0]
    keys = lax.broadcasted_iota(jnp.int32, (n, n), 0)
    queries = lax.broadcasted_iota(jnp.int32, (n, n), 1)
    key, query = lax.broadcasted_iota(jnp.int32, (n, 1), 0), lax.broadcasted_iota(jnp.int32, (1, n), 1)
    free = lambda i: _all([(i < start) | (i >= stop) for start, stop in runs], i >= 0)
    total = lambda mask, value: jnp.sum(jnp.where(mask, value, 0.0), axis=0, keepdims=True)

    scaled, inverse = tpu.directions(metric)
    score = jnp.where((key % 2 == 1) & free(key), tpu.inner(scaled, scaled) * inverse, -jnp.inf)
    best = jnp.max(score, axis=0, keepdims=True)
    to = jnp.min(jnp.where(score == best, keys, n), axis=0, keepdims=True)
    best = jnp.where((query % 2 == 0) & free(query), best * tpu.row(inverse), -jnp.inf)

    other = tpu.column(best)
    rank = total((other > best) | ((other == best) & (keys < queries)), 1.0)
    stay = jnp.where((rank < r) & (best > -jnp.inf), 0.0, 1.0)
    place = total(keys < queries, tpu.column(stay))
    goal = total(keys == to, tpu.column(place))
    return jnp.where(stay == 1, place, goal)


def _merged(ids: Array, x: Array, sizes: Array | None, m: int) -> tuple[Array, Array]:
    """The means of one row, (m, d) in float32, and the merged sizes, (1, m)."""
    member = lax.broadcasted_iota(jnp.int32, (m, ids.shape[1]), 0) == ids.astype(jnp.int32)
    mass = jnp.sum(jnp.where(member, 1.0 if sizes is None else sizes, 0.0), axis=1, keepdims=True)
    inverse = jnp.where(mass == 0, 0.0, 1 / jnp.where(mass == 0, 1.0, mass))
    count = _passes(x.dtype, sizes is not None)
    if sizes is not None:
        x = x.astype(jnp.float32) * tpu.column(sizes)
    y = tpu.select(jnp.where(member, 1.0, 0.0).astype(jnp.bfloat16), tpu.parts(x, count))
    return y * inverse, tpu.row(mass)


def _passes(dtype: Any, weighted: bool) -> int:
    """bfloat16 parts of x: 24 bits where x has them, 16 of a bfloat16 times a size."""
    return 3 if dtype == jnp.float32 else 2 if weighted else 1


def _need(rows: int, metric: Any, x: Any, r: int) -> int:
    """Bytes of VMEM: both buffers of each block, and what one row holds while it is worked on."""
    n, d = x.shape[1:]
    m = n - r
    blocks = tpu.nbytes(metric.shape[1:], metric.dtype) + tpu.nbytes((n, d), x.dtype) + tpu.nbytes((m, d), x.dtype)
    small = 3 * tpu.nbytes((1, n), jnp.float32)
    live = 6 * tpu.nbytes((n, n), jnp.float32) + 2 * tpu.nbytes((n, d), jnp.float32) + tpu.nbytes((m, d), jnp.float32)
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
