"""All scores of queries with keys, a block at a time, none of which leaves the chip.

Queries lie along sublanes, keys along lanes. What a sweep over the keys collects (a maximum, a sum, the few least) it keeps
for each of 128 lanes, so that a score costs a few operations of the vector unit and none that crosses lanes; lanes meet at the
end. Products are of the rows as they come, scaled by powers of two: see `_tpu.directions`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Bool, Float, Int

from jaxmerge._kernels import _tpu as tpu
from jaxmerge._kernels._dispatch import target, tuned
from jaxmerge._kernels.match._peaks import by_sweeps
from jaxmerge._kernels.match.ref import Kernel, resemblance

QUERIES, KEYS = 1024, 512
CANDIDATES = {
    op: tuple({"block": (a, b)} for a in (256, 512, 1024, 2048) for b in (256, 512, 1024))
    for op in ("match", "energy", "nearest_k", "nearest_ahead")
}
MOST_NEIGHBORS = 16


def match(
    a: Float[Array, "B n k"],
    b: Float[Array, "B m k"],
    *,
    a_ok: Bool[Array, "#B n"] | None = None,
    b_ok: Bool[Array, "#B m"] | None = None,
    window: int | None = None,
    block: tuple[int, int] | None = None,
    interpret: Any = None,
) -> tuple[Array, Array]:
    """`ref.match`."""
    a, over_a = _directions(a)
    b, over_b = _directions(b)

    def fold(score, at, best, first):
        better = score > best
        return jnp.where(better, score, best), jnp.where(better, at, first)

    def finish(best, first):
        top = jnp.max(best, axis=1, keepdims=True)
        index = jnp.min(jnp.where(best == top, first, jnp.inf), axis=1, keepdims=True)
        return tpu.row(top), tpu.row(jnp.where(top > -jnp.inf, index, 0.0))

    start = (-jnp.inf, jnp.inf)
    sweep = _Sweep(fold, finish, start, 2, lambda dot, over: (dot * over,), (-jnp.inf,))
    best, index = _call(sweep, "match", a, b, [], [over_b], b_ok, window, block=block, interpret=interpret)
    best = jnp.where(best[:, 0] > -jnp.inf, best[:, 0] * over_a, -jnp.inf)  # -inf x 0 is NaN
    best = best if a_ok is None else jnp.where(a_ok, best, -jnp.inf)
    return best, jnp.where(best > -jnp.inf, index[:, 0], 0).astype(jnp.int32)


def energy(
    a: Float[Array, "B n k"],
    b: Float[Array, "B m k"],
    *,
    margin: float,
    kernel: Kernel = "shifted",
    alpha: float = 1.0,
    block: tuple[int, int] | None = None,
    interpret: Any = None,
) -> Array:
    """`ref.energy`."""
    a, over_a = _directions(a)
    b, over_b = _directions(b)
    fold = lambda score, at, total: (total + score,)
    finish = lambda total: (tpu.row(jnp.sum(total, axis=1, keepdims=True)),)
    f = lambda dot, other, one: (resemblance(dot * one * other, margin, kernel, alpha, expm1=lambda x: jnp.exp(x) - 1),)
    sweep = _Sweep(fold, finish, (0.0,), 1, f, (0.0,))
    return _call(sweep, "energy", a, b, [over_a], [over_b], block=block, interpret=interpret)[0][:, 0]


def nearest_k(
    a: Float[Array, "B n k"],
    b: Float[Array, "B m k"],
    *,
    count: int,
    b_ok: Bool[Array, "#B m"] | None = None,
    block: tuple[int, int] | None = None,
    interpret: Any = None,
) -> Array:
    """`ref.nearest_k`."""

    def fold(score, at, *least):
        kept = []
        for one in least:  # an insertion into an ordered list
            kept.append(jnp.minimum(score, one))
            score = jnp.maximum(score, one)
        return tuple(kept)

    def finish(*least):
        found, least = [], list(least)
        lane = lax.broadcasted_iota(jnp.int32, least[0].shape, 1)
        for _ in range(count):
            low = jnp.min(least[0], axis=1, keepdims=True)
            found.append(tpu.row(low))
            here = lane == jnp.min(jnp.where(least[0] == low, lane, tpu.LANES), axis=1, keepdims=True)
            least = [jnp.where(here, after, one) for one, after in zip(least, [*least[1:], jnp.inf], strict=True)]
        return tuple(found)

    sweep = _Sweep(fold, finish, (jnp.inf,) * count, count, lambda dot, squared: (squared - 2 * dot,), (jnp.inf,))
    least = _call(sweep, "nearest_k", a, b, [], [_squared(b)], b_ok, block=block, interpret=interpret)
    return jnp.maximum(jnp.concatenate(least, axis=1).swapaxes(1, 2) + _squared(a)[:, :, None], 0)


def nearest_ahead(
    a: Float[Array, "B n k"],
    b: Float[Array, "B m k"],
    a_place: Int[Array, "B n"] | None = None,
    b_place: Int[Array, "B m"] | None = None,
    b_ok: Bool[Array, "B m"] | None = None,
    *,
    block: tuple[int, int] | None = None,
    interpret: Any = None,
) -> tuple[Array, Array, Array]:
    """`ref.nearest_ahead`."""

    def score(dot, squared, *places):
        away = squared - 2 * dot
        return (jnp.where(places[0] < places[1], away, jnp.inf) if places else away), away

    def fold(ahead, away, at, least, first, most):
        better = ahead < least
        return jnp.where(better, ahead, least), jnp.where(better, at, first), jnp.maximum(away, most)

    def finish(least, first, most):
        low = jnp.min(least, axis=1, keepdims=True)
        index = jnp.min(jnp.where(least == low, first, jnp.inf), axis=1, keepdims=True)
        return tpu.row(low), tpu.row(jnp.where(low < jnp.inf, index, 0.0)), tpu.row(jnp.max(most, axis=1, keepdims=True))

    sweep = _Sweep(fold, finish, (jnp.inf, jnp.inf, -jnp.inf), 3, score, (jnp.inf, -jnp.inf))
    of_queries, of_keys = ([], []) if a_place is None or b_place is None else ([a_place], [b_place])
    call = partial(_call, sweep, "nearest_ahead", a, b, of_queries, [_squared(b), *of_keys], b_ok)
    least, index, most = (found[:, 0] for found in call(block=block, interpret=interpret))
    far = lambda x: jnp.where(jnp.isfinite(x), jnp.maximum(x + _squared(a), 0), x)
    return far(least), index.astype(jnp.int32), far(most)


peaks = by_sweeps(nearest_k, nearest_ahead)


def refusals(op: str, a: Any, b: Any, *rest: Any, **static: Any) -> list[str]:
    """Why this cannot be a kernel."""
    why, b = [], a if op == "peaks" else b
    for name, x in (("queries", a), ("keys", b)):
        if x.dtype not in (jnp.bfloat16, jnp.float32):
            why.append(f"{name} are {x.dtype}: bfloat16 or float32")
    if a.dtype != b.dtype:
        why.append(f"queries are {a.dtype} and keys {b.dtype}: one dtype")
    if min(a.shape[1], b.shape[1], a.shape[2]) == 0:
        why.append("there is nothing to compare")
    if static.get("count", 1) > MOST_NEIGHBORS:
        why.append(f"{static['count']} neighbours: at most {MOST_NEIGHBORS}")
    if any(not isinstance(static.get(name, 0.0), int | float) for name in ("margin", "alpha")):
        why.append("margin and alpha must be Python numbers: they are compiled in")
    need = _need((QUERIES, KEYS), a.shape[2], a.dtype)
    if need > 0.9 * tpu.vmem(target().kind):
        why.append(f"blocks take {need >> 20} MiB on chip, more than the {tpu.vmem(target().kind) >> 20} MiB there are")
    return why


def faster(op: str, a: Any, b: Any, *rest: Any, kind: str, **static: Any) -> bool:
    """Where the scores are more than the operands, by far: XLA takes them to memory and back, and float32 in six passes."""
    if op == "peaks":
        batch, n, k = a.shape
        if a.dtype == jnp.bfloat16:  # two single passes of the matrix unit, where XLA takes six
            return n * n >= 2**16
        (rate, bandwidth), seen = tpu.chip(kind), 2 * static["count"] + 4  # twelve, where it takes six: if memory is slower
        return 4 * batch * n * n > tpu.vmem(kind) and 6 * 2 * k / rate < 4 * seen / bandwidth
    return a.shape[1] * b.shape[1] >= 2**16


class _Sweep(NamedTuple):
    """What is collected over the keys: `fold` takes scores (queries, 128), the keys' positions and what is kept so far."""

    fold: Callable[..., tuple]
    finish: Callable[..., tuple]
    start: tuple[float, ...]
    outputs: int
    score: Callable[..., tuple[Array, ...]]
    """Of products, what a key brings (rows) and what a query brings (columns)."""
    closed: tuple[float, ...]
    """The scores of a key that may not be looked at."""


def _call(
    sweep: _Sweep,
    name: str,
    a: Array,
    b: Array,
    of_queries: Sequence[Array],
    of_keys: Sequence[Array],
    b_ok: Array | None = None,
    window: int | None = None,
    *,
    block: tuple[int, int] | None,
    interpret: Any,
) -> Any:
    """The sweep of every query over the keys: outputs (B, 1, n) in float32."""
    (batch, n, k), m, here = a.shape, b.shape[1], target()
    queries, keys = block or tuned(name, "mosaic_tpu", here.kind, (a, b)).get("block", (QUERIES, KEYS))
    queries, keys = min(queries, n), min(keys, tpu.padded(m, tpu.LANES))
    blocks = pl.cdiv(m, keys)
    steps = blocks if window is None else min(blocks, pl.cdiv(queries + 2 * window, keys) + 1)
    first = lambda i: 0 if window is None else jnp.maximum(i * queries - window, 0) // keys
    block_of = lambda i, j: jnp.minimum(first(i) + j, blocks - 1)
    over = lambda x, value: jnp.pad(x.astype(jnp.float32), ((0, 0), (0, blocks * keys - m)), constant_values=value)[:, None, :]
    open_ = over(jnp.ones((1, m)) if b_ok is None else b_ok, 0.0)
    row = lambda x: pl.BlockSpec((1, 1, keys), lambda r, i, j: (r if x.shape[0] == batch else 0, 0, block_of(i, j)))
    rows = [open_, *(over(x, 0.0) for x in of_keys)]
    columns = [x.astype(jnp.float32)[:, None, :] for x in of_queries]

    def kernel(a_ref, b_ref, open_ref, *refs):
        i, j = pl.program_id(1), pl.program_id(2)
        at = first(i) + j
        outputs, kept = refs[-len(sweep.start) - sweep.outputs : -len(sweep.start)], refs[-len(sweep.start) :]

        @pl.when(j == 0)
        def _():
            for ref, value in zip(kept, sweep.start, strict=True):
                ref[...] = jnp.full_like(ref, value)

        @pl.when(at < blocks)
        def _():
            dot = tpu.inner(a_ref[0], b_ref[0])
            brought = [tpu.column(ref[0]) for ref in refs[len(of_keys) : len(of_keys) + len(columns)]]
            state = tuple(ref[...] for ref in kept)
            for c in range(keys // tpu.LANES):
                lanes = slice(c * tpu.LANES, (c + 1) * tpu.LANES)
                scores = sweep.score(dot[:, lanes], *(ref[0][:, lanes] for ref in refs[: len(of_keys)]), *brought)
                allowed = open_ref[0][:, lanes] > 0
                key = lax.broadcasted_iota(jnp.int32, scores[0].shape, 1) + (at * keys + c * tpu.LANES)
                if window is not None:
                    query = lax.broadcasted_iota(jnp.int32, scores[0].shape, 0) + i * queries
                    allowed &= jnp.abs(query - key) <= window
                scores = [jnp.where(allowed, score, closed) for score, closed in zip(scores, sweep.closed, strict=True)]
                state = sweep.fold(*scores, key.astype(jnp.float32), *state)
            for ref, value in zip(kept, state, strict=True):
                ref[...] = value

        @pl.when(j == steps - 1)
        def _():
            for ref, value in zip(outputs, sweep.finish(*(ref[...] for ref in kept)), strict=True):
                ref[0] = value

    passes = 1 if a.dtype == jnp.bfloat16 else 6
    scores = batch * n * min(m, steps * keys)
    item = a.dtype.itemsize
    return pl.pallas_call(
        kernel,
        grid=(batch, pl.cdiv(n, queries), steps),
        in_specs=[
            pl.BlockSpec((1, queries, k), lambda r, i, j: (r, i, 0)),
            pl.BlockSpec((1, keys, k), lambda r, i, j: (r, block_of(i, j), 0)),
            *(row(x) for x in rows),
            *(pl.BlockSpec((1, 1, queries), lambda r, i, j: (r, 0, i)) for _ in columns),
        ],
        out_specs=[pl.BlockSpec((1, 1, queries), lambda r, i, j: (r, 0, i))] * sweep.outputs,
        out_shape=[tpu.out((batch, 1, n), jnp.float32, a)] * sweep.outputs,
        scratch_shapes=[pltpu.VMEM((queries, tpu.LANES), jnp.float32)] * len(sweep.start),
        compiler_params=tpu.params(("parallel", "parallel", "arbitrary"), _need((queries, keys), k, a.dtype)),
        cost_estimate=tpu.cost(
            2 * scores * k * passes,
            (a.size + b.size * (1 if blocks == 1 else pl.cdiv(n, queries) * steps / blocks)) * item
            + 4 * batch * n * sweep.outputs,
            scores if name == "energy" else 0,
        ),
        interpret=here.interpret if interpret is None else interpret,
        name=name,
    )(a, b, *rows, *columns)


def _directions(x: Float[Array, "B n k"]) -> tuple[Array, Float[Array, "B n"]]:
    """Rows scaled by powers of two, and 1 over their lengths: once, outside, where each row is swept over many times."""
    scaled, inverse = jax.vmap(tpu.directions)(x)
    return scaled, inverse[..., 0]


def _squared(x: Float[Array, "B n k"]) -> Float[Array, "B n"]:
    """The rows' squared lengths."""
    return jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1)


def _need(block: tuple[int, int], k: int, dtype: Any) -> int:
    """Bytes of VMEM: both buffers of the blocks, the scores, and what is kept."""
    queries, keys = block
    blocks = tpu.nbytes((queries, k), dtype) + tpu.nbytes((keys, k), dtype)
    scores = 3 * tpu.nbytes((queries, keys), jnp.float32)
    return 3 * blocks + scores + (2 * MOST_NEIGHBORS) * tpu.nbytes((queries, tpu.LANES), jnp.float32) + 2 * tpu.MIB
