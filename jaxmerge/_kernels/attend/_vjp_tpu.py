"""The gradient of `attend` on TPU: keys of a row are on chip as a whole, so weights are computed again and nothing is kept.

Scores lie with keys along the sublanes and queries along the lanes: sums over keys are then plain additions of registers, and
two of the three products that end in a gradient need no transposition. With w the weights and g the cotangent of the result,

    c = w (g·v - sum over keys of w g·v),    dq = scale c k,    dk = scale c^T q,    dv = w^T g.

Blocks of queries come one after the other, their sums stay on chip. Queries, keys and values may come from one product, and
their gradients then go back to one array: its three thirds are written in three turns, when the last block has been.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from jaxmerge._kernels import _tpu as tpu
from jaxmerge._kernels._dispatch import target
from jaxmerge._kernels.attend._heads import ROWS, even, width_of

QUERIES = 256
"""That meet all keys at a time, at most."""


def attend_vjp(
    q: Float[Array, "B t *three h f"],
    k: Float[Array, "B s g f"] | None,
    v: Float[Array, "B s g f"] | None,
    bias: Float[Array, "B s"] | None,
    offset: Float[Array, "one three h f"] | None,
    g: Float[Array, "B n h f"],
    *kept: Array,
    scale: float,
    length: int | None = None,
    interpret: Any = None,
) -> tuple[Array | None, ...]:
    """`ref.attend_vjp`.

    Raises:
      ValueError: a row does not fit on chip.
    """
    B, rows, *_, h, f = q.shape
    packed, here = k is None or v is None, target()
    q, k, v = (q, q, q) if k is None or v is None else (q, k, v)
    n, s = g.shape[1], g.shape[1] if packed else k.shape[1]
    width, queries = width_of(h, f), even(n, QUERIES)
    if (bytes := _need(k.shape[1], n, width, q.dtype)) > 0.9 * (room := tpu.vmem(here.kind)):
        raise ValueError(
            f"attend: mosaic_tpu's gradient of {n} queries and {s} keys takes {bytes >> 20} MiB on chip, more than the "
            f'{room >> 20} MiB there are: train with implementation="xla".'
        )
    groups, blocks = h * f // width, -(-n // queries)
    of = lambda i: i * groups if packed else 0  # where the blocks of queries, keys, values begin
    turn = lambda t: jnp.minimum(t, blocks - 1)
    part = lambda t: jnp.maximum(t - (blocks - 1), 0)
    some = lambda i: pl.BlockSpec((1, queries, width), lambda b, g, t: (b, turn(t), of(i) + g))
    all_of = lambda x, i: pl.BlockSpec((1, x.shape[1], width), lambda b, g, t: (b, 0, of(i) + g))
    flat = lambda x: x.reshape(B, x.shape[1], -1)
    given = [flat(q), flat(k), flat(v), flat(g)]
    specs = [some(0), all_of(k, 1), all_of(v, 2), pl.BlockSpec((1, queries, width), lambda b, g, t: (b, turn(t), g))]
    if bias is not None:
        given.append(bias[:, None, :s].astype(jnp.float32))
        specs.append(pl.BlockSpec((1, 1, s), lambda b, g, t: (b, 0, 0)))
    if offset is not None:
        given.append(offset.reshape(-1, 3, h * f))
        specs.append(pl.BlockSpec((1, 3, width), lambda b, g, t: (b * len(offset) // B, 0, g)))
    if packed:
        outs = [tpu.out((B, rows, 3 * h * f), q.dtype, q)]
        out_specs = [pl.BlockSpec((1, rows, width), lambda b, g, t: (b, 0, part(t) * groups + g))]
    else:
        outs = [tpu.out((B, x.shape[1], h * f), q.dtype, q) for x in (q, k, v)]
        out_specs = [all_of(x, 0) for x in (q, k, v)]
    if bias is not None:
        outs.append(tpu.out((B, groups, 1, s), jnp.float32, q))
        out_specs.append(pl.BlockSpec((1, 1, 1, s), lambda b, g, t: (b, g, 0, 0)))
    sums = [pltpu.VMEM((size, width), jnp.float32) for size in (max(rows, blocks * queries), k.shape[1], k.shape[1])]
    moved = q.dtype.itemsize * B * h * f * (4 * n + 4 * s)
    found = pl.pallas_call(
        partial(_kernel, f=f, scale=scale, n=n, s=s, biased=bias is not None, shifted=offset is not None, packed=packed),
        grid=(B, groups, blocks + (2 if packed else 0)),
        in_specs=specs,
        out_specs=out_specs,
        out_shape=outs,
        scratch_shapes=[*sums, *([pltpu.VMEM((s, 1), jnp.float32)] if bias is not None else [])],
        compiler_params=tpu.params(("parallel", "parallel", "arbitrary"), bytes),
        cost_estimate=tpu.cost(10 * B * h * n * s * f, moved, B * h * n * s),
        interpret=here.interpret if interpret is None else interpret,
        name="attend_vjp",
    )(*given)
    of_bias = found[-1].sum(axis=(1, 2)) if bias is not None else None
    if packed:
        return found[0].reshape(B, rows, 3, h, f), None, None, of_bias
    return *(x.reshape(B, x.shape[1], h, f) for x in found[:3]), of_bias


def _kernel(*refs: Any, f: int, scale: float, n: int, s: int, biased: bool, shifted: bool, packed: bool) -> None:
    given, outputs = 4 + biased + shifted, (1 if packed else 3) + biased
    (q_ref, k_ref, v_ref, g_ref, *more), outs, sums = refs[:given], refs[given : given + outputs], refs[given + outputs :]
    queries, width = q_ref.shape[1:]
    blocks, turn = -(-n // queries), pl.program_id(2)
    precision = tpu.ONE_PASS if q_ref.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    over = lambda a, b, axis: lax.dot_general(a, b, (((axis,), (0,)), ((), ())), precision, jnp.float32)

    @pl.when(turn == 0)
    def _():
        for sum in sums:
            sum[...] = jnp.zeros_like(sum)

    @pl.when(turn < blocks)
    def _():
        bias = tpu.column(more[0][0]) if biased else None
        here = pl.ds(pl.multiple_of(turn * queries, ROWS), queries)
        there = lax.broadcasted_iota(jnp.int32, (queries, 1), 0) < n - turn * queries  # behind the last lies anything
        for at in range(0, width, f):
            head = slice(at, at + f)
            k, v = k_ref[0, :s, head], v_ref[0, :s, head]
            q, g = (jnp.where(there, ref[0, :, head], jnp.zeros((), ref.dtype)) for ref in (q_ref, g_ref))
            if shifted:  # of keys it adds the same to all scores of a query, of values to all products with g
                q = (q.astype(jnp.float32) + more[-1][0, 0:1, head]).astype(q.dtype)
            score = tpu.inner(k, q) * scale
            score = score if bias is None else score + bias
            weight = jnp.exp(score - jnp.max(score, axis=0, keepdims=True))
            weight = weight / jnp.sum(weight, axis=0, keepdims=True)
            change = tpu.inner(v, g)
            change = weight * (change - jnp.sum(weight * change, axis=0, keepdims=True))
            if biased:
                sums[3][...] += jnp.sum(change, axis=1, keepdims=True)
            change = change.astype(q.dtype)
            sums[2][:s, head] += over(weight.astype(v.dtype), g, 1)
            sums[1][:s, head] += over(change, q, 1)
            sums[0][here, head] = over(change, k, 0)

    put = lambda out, i: out.__setitem__(0, (sums[i][: out.shape[1]] * (scale if i < 2 else 1.0)).astype(out.dtype))
    for i in range(3):
        pl.when(turn == blocks - 1 + (i if packed else 0))(partial(put, outs[0 if packed else i], i))
    if biased:

        @pl.when(turn == blocks - 1)
        def _():
            outs[-1][0, 0] = tpu.row(sums[3][...])


def _need(rows: int, n: int, width: int, dtype: Any) -> int:
    """Bytes of VMEM: both buffers of each block, all sums, a head's keys, values and terms of sums, scores in all their forms,
    of which float32, multiplied in parts, takes more."""
    queries, forms = even(n, QUERIES), 5 if jnp.dtype(dtype).itemsize == 2 else 14
    keys = tpu.nbytes((rows, width), dtype)
    blocks = 4 * keys + 4 * tpu.nbytes((queries, width), dtype) + 2 * tpu.nbytes((max(n, rows), width), dtype)
    sums = 2 * tpu.nbytes((rows, width), jnp.float32) + tpu.nbytes((tpu.padded(n, queries), width), jnp.float32)
    scores = forms * tpu.nbytes((rows, queries), jnp.float32) + 4 * tpu.nbytes((rows, 1), jnp.float32)
    return blocks + sums + 2 * keys + scores + 2 * tpu.MIB
