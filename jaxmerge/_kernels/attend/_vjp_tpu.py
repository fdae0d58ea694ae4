"""The gradient of `attend` on TPU: all of a row is on chip, so weights are computed again and nothing is kept for it.

Scores lie with keys along the sublanes and queries along the lanes: sums over keys are then plain additions of registers, and
two of the three products that end in a gradient need no transposition. With w the weights and g the cotangent of the result,

    c = w (g·v - sum over keys of w g·v),    dq = scale c k,    dk = scale c^T q,    dv = w^T g.

Queries, keys and values may come from one product, and their gradients then go back to one array: its three thirds are written
in three turns, of which the first computes all.
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
from jaxmerge._kernels.attend._heads import even, width_of

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
    q, k, v, parts = (q, q, q, 3) if k is None or v is None else (q, k, v, 1)
    n, s = g.shape[1], g.shape[1] if packed else k.shape[1]
    width = width_of(h, f)
    if (bytes := need(n, s, width, q.dtype)) > 0.9 * (room := tpu.vmem(here.kind)):
        raise ValueError(
            f"attend: mosaic_tpu's gradient of {n} queries and {s} keys takes {bytes >> 20} MiB on chip, more than the "
            f'{room >> 20} MiB there are: train with implementation="xla".'
        )
    groups = h * f // width
    of = lambda i: i * groups if packed else 0  # where the blocks of queries, keys, values begin
    block = lambda count, i: pl.BlockSpec((1, count, width), lambda b, group, part: (b, 0, of(i) + group))
    flat = lambda x: x.reshape(B, x.shape[1], -1)
    given = [flat(q), flat(k), flat(v), flat(g)]
    specs = [block(rows, 0), block(k.shape[1], 1), block(k.shape[1], 2), pl.BlockSpec((1, n, width), lambda b, g, p: (b, 0, g))]
    if bias is not None:
        given.append(bias[:, None, :s].astype(jnp.float32))
        specs.append(pl.BlockSpec((1, 1, s), lambda b, group, part: (b, 0, 0)))
    if offset is not None:
        given.append(offset.reshape(-1, 3, h * f))
        specs.append(pl.BlockSpec((1, 3, width), lambda b, group, part: (b * len(offset) // B, 0, group)))
    if packed:
        outs = [tpu.out((B, rows, 3 * h * f), q.dtype, q)]
        out_specs = [pl.BlockSpec((1, rows, width), lambda b, group, part: (b, 0, part * groups + group))]
    else:
        outs = [tpu.out((B, x.shape[1], h * f), q.dtype, q) for x in (q, k, v)]
        out_specs = [block(x.shape[1], 0) for x in (q, k, v)]
    if bias is not None:
        outs.append(tpu.out((B, groups, 1, s), jnp.float32, q))
        out_specs.append(pl.BlockSpec((1, 1, 1, s), lambda b, group, part: (b, group, 0, 0)))
    moved = q.dtype.itemsize * B * h * f * (4 * n + 4 * s)
    found = pl.pallas_call(
        partial(_kernel, f=f, scale=scale, n=n, s=s, biased=bias is not None, shifted=offset is not None, packed=packed),
        grid=(B, groups, parts),
        in_specs=specs,
        out_specs=out_specs,
        out_shape=outs,
        scratch_shapes=[pltpu.VMEM((x.shape[1], width), jnp.float32) for x in (q, k, v)],
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
    given = 4 + biased + shifted
    (q_ref, k_ref, v_ref, g_ref, *more), outs, sums = refs[:given], refs[given:-3], refs[-3:]
    part = pl.program_id(2)
    precision = tpu.ONE_PASS if q_ref.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    over = lambda a, b, axis: lax.dot_general(a, b, (((axis,), (0,)), ((), ())), precision, jnp.float32)

    @pl.when(part == 0)
    def _():
        for sum in sums:
            sum[...] = jnp.zeros_like(sum)
        bias = tpu.column(more[0][0]) if biased else None
        of_bias = jnp.zeros((s, 1), jnp.float32)
        step = even(n, QUERIES)
        for at in range(0, q_ref.shape[2], f):
            head = slice(at, at + f)
            k, v = k_ref[0, :s, head], v_ref[0, :s, head]
            of_k, of_v = jnp.zeros((s, f), jnp.float32), jnp.zeros((s, f), jnp.float32)
            for start in range(0, n, step):
                here = slice(start, min(start + step, n))
                q, g = q_ref[0, here, head], g_ref[0, here, head]
                if shifted:  # of keys it adds the same to all scores of a query, of values to all products with g
                    q = (q.astype(jnp.float32) + more[-1][0, 0:1, head]).astype(q.dtype)
                score = tpu.inner(k, q) * scale
                score = score if bias is None else score + bias
                weight = jnp.exp(score - jnp.max(score, axis=0, keepdims=True))
                weight = weight / jnp.sum(weight, axis=0, keepdims=True)
                change = tpu.inner(v, g)
                change = weight * (change - jnp.sum(weight * change, axis=0, keepdims=True))
                if biased:
                    of_bias += jnp.sum(change, axis=1, keepdims=True)
                change = change.astype(q.dtype)
                of_v += over(weight.astype(v.dtype), g, 1)
                of_k += over(change, q, 1)
                sums[0][here, head] = over(change, k, 0) * scale
            sums[1][:s, head], sums[2][:s, head] = of_k * scale, of_v
        if biased:
            outs[-1][0, 0] = tpu.row(of_bias)

    if packed:
        for i, sum in enumerate(sums):
            pl.when(part == i)(partial(_put, outs[0], sum))
    else:
        for out, sum in zip(outs, sums, strict=False):
            _put(out, sum)


def _put(out: Any, sum: Any) -> None:
    out[0] = sum[...].astype(out.dtype)


def need(n: int, s: int, width: int, dtype: Any) -> int:
    """Bytes of VMEM: both buffers of each block, three sums, a head's keys, values and their sums, and scores in five forms."""
    rows = tpu.nbytes((max(n, s), width), dtype)
    sums = tpu.nbytes((max(n, s), width), jnp.float32)
    return 2 * 7 * rows + 3 * sums + 6 * sums + 5 * tpu.nbytes((s, min(n, QUERIES)), jnp.float32) + 2 * tpu.MIB
