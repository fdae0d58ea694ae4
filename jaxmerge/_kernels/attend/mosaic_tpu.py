"""`attend` on TPU: the scores of one block of queries with all keys stay on chip, the bias of every key is added there.

Heads lie side by side along the lanes, as a product writes them: a block has the heads that fill whole registers, two of 64
features, and picks each by a slice. Keys and values of a row are on chip as a whole; a softmax looks at all of its scores.
The mean of the keys over heads, where it is asked for, is a sum that stays on chip from the first heads of a row to the last.
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
from jaxmerge._kernels.attend._vjp_tpu import attend_vjp as attend_vjp

QUERIES = 256
"""Of a block, at most."""


def attend(
    q: Float[Array, "B t *three h f"],
    k: Float[Array, "B s g f"] | None,
    v: Float[Array, "B s g f"] | None,
    bias: Float[Array, "B s"] | None,
    offset: Float[Array, "one three h f"] | None = None,
    *,
    scale: float,
    length: int | None = None,
    mean_keys: bool = False,
    for_vjp: bool = False,
    interpret: Any = None,
) -> tuple[Array, ...]:
    """`ref.attend`; `attend_vjp` needs no more, so `for_vjp` changes nothing."""
    B, n, *_, h, f = q.shape
    q, k, v, parts = (q, q, q, 3) if k is None or v is None else (q, k, v, 1)
    rows, here = k.shape[1], target()
    n = n if length is None else length
    s = n if parts == 3 else rows
    width, queries = width_of(h, f), even(n, QUERIES)
    blocks, groups = -(-n // queries), h * f // width
    of = lambda i: i * groups if parts == 3 else 0  # where the blocks of queries, keys, values begin
    block = lambda count, i, at: pl.BlockSpec((1, count, width), lambda b, g, t: (b, t * at, of(i) + g))
    flat = lambda x: x.reshape(B, x.shape[1], -1)
    given = [flat(q), flat(k), flat(v)]
    specs = [block(queries, 0, 1), block(rows, 1, 0), block(rows, 2, 0)]
    if bias is not None or s < rows:
        bias = jnp.zeros((B, s), jnp.float32) if bias is None else bias[:, :s].astype(jnp.float32)
        given.append(jnp.pad(bias, ((0, 0), (0, rows - s)), constant_values=-jnp.inf)[:, None])
        specs.append(pl.BlockSpec((1, 1, rows), lambda b, g, t: (b, 0, 0)))
    if offset is not None:
        given.append(offset.reshape(-1, 3, h * f))
        specs.append(pl.BlockSpec((1, 3, width), lambda b, g, t: (b * len(offset) // B, 0, g)))
    moved = q.dtype.itemsize * B * (h * f * (2 * n + 2 * s) + mean_keys * s * f) + 4 * B * s
    in_turn = "arbitrary" if mean_keys else "parallel"
    out, *keys = pl.pallas_call(
        partial(_kernel, f=f, scale=scale, biased=bias is not None, shifted=offset is not None, h=h),
        grid=(B, groups, blocks),
        in_specs=specs,
        out_specs=[
            pl.BlockSpec((1, queries, width), lambda b, g, t: (b, t, g)),
            *([pl.BlockSpec((1, s, f), lambda b, g, t: (b, 0, 0))] if mean_keys else []),
        ],
        out_shape=[tpu.out((B, n, h * f), q.dtype, q), *([tpu.out((B, s, f), q.dtype, q)] if mean_keys else [])],
        scratch_shapes=[pltpu.VMEM((s, f), jnp.float32)] if mean_keys else [],
        compiler_params=tpu.params(("parallel", in_turn, in_turn), _need(rows, queries, width, q.dtype, f if mean_keys else 0)),
        cost_estimate=tpu.cost(4 * B * h * n * s * f, moved, B * h * n * s),
        interpret=here.interpret if interpret is None else interpret,
        name="attend",
    )(*given)
    return out.reshape(B, n, h, f), *keys


def _kernel(*refs: Any, f: int, scale: float, biased: bool, shifted: bool, h: int) -> None:
    given = 3 + biased + shifted
    (q_ref, k_ref, v_ref, *more), (out_ref, *mean) = refs[:given], refs[given:]
    bias = more[0][0] if biased else None
    if mean:
        group, offset = pl.program_id(1), more[-1] if shifted else None
        pl.when(pl.program_id(2) == 0)(lambda: _average(group, k_ref, offset, *mean, h=h))
    for at in range(0, out_ref.shape[2], f):
        head = slice(at, at + f)
        q, k, v = (ref[0, :, head] for ref in (q_ref, k_ref, v_ref))
        if shifted:  # of keys it adds the same to all scores of a query
            q = (q.astype(jnp.float32) + more[-1][0, 0:1, head]).astype(q.dtype)
        score = tpu.inner(q, k) * scale
        score = score if bias is None else score + bias
        weight = jnp.exp(score - jnp.max(score, axis=1, keepdims=True))
        mass = jnp.sum(weight, axis=1, keepdims=True)
        precision = tpu.ONE_PASS if v.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
        sum = lax.dot_general(weight.astype(v.dtype), v, (((1,), (0,)), ((), ())), precision, jnp.float32) / mass
        out_ref[0, :, head] = (sum + more[-1][0, 2:3, head] if shifted else sum).astype(out_ref.dtype)


def _average(group: Any, k_ref: Any, offset: Any, mean_ref: Any, sum: Any, *, h: int) -> None:
    """The mean over heads of keys as the offset makes them: these heads added to those before."""
    s, f = sum.shape
    width = k_ref.shape[2]
    for at in range(0, width, f):
        head = k_ref[0, :s, at : at + f].astype(jnp.float32)
        head = head if offset is None else head + offset[0, 1:2, at : at + f]
        sum[...] = head + (sum[...] if at else jnp.where(group == 0, 0.0, sum[...]))

    @pl.when(group == h * f // width - 1)
    def _():
        mean_ref[0] = (sum[...] * (1 / h)).astype(mean_ref.dtype)


def refusals(
    op: str,
    q: Any,
    k: Any,
    v: Any,
    bias: Any,
    *more: Any,
    scale: float,
    length: int | None = None,
    mean_keys: bool = False,
) -> list[str]:
    """Why this attention cannot be a kernel."""
    why, (n, *_, h, f) = [], q.shape[1:]
    if {x.dtype for x in (q, k, v) if x is not None} not in ({jnp.dtype(jnp.bfloat16)}, {jnp.dtype(jnp.float32)}):
        why.append(f"queries are {q.dtype}: bfloat16 or float32, keys and values alike")
    if k is not None and k.shape[2] != h:
        why.append(f"{h} heads share {k.shape[2]} of keys: as many of keys as of queries")
    if h * f % tpu.LANES and k is None:
        why.append(f"{h} heads of {f} features are {h * f}: a multiple of {tpu.LANES}, or queries, keys and values apart")
    rows = n if k is None else k.shape[1]
    n = n if length is None else length
    need = _need(rows, even(n, QUERIES), width_of(h, f), q.dtype, f if mean_keys else 0)
    if min(n, rows) == 0:
        why.append("there is nothing to do")
    elif need > 0.9 * tpu.vmem(target().kind):
        why.append(f"{rows} keys take {need >> 20} MiB on chip, more than the {tpu.vmem(target().kind) >> 20} MiB there are")
    return why


def faster(op: str, *arrays: Any, kind: str, **static: Any) -> bool:
    """Not unless asked by name: XLA's attention has derivatives of every kind."""
    return False


def _need(rows: int, queries: int, width: int, dtype: Any, mean: int) -> int:
    """Bytes of VMEM: both buffers of each block, the heads of keys and values by themselves, the scores of one; the sum of
    `mean` features of the keys, a head's terms of it, and both buffers of the mean."""
    side = tpu.nbytes((rows, width), dtype)
    blocks = 2 * side + 2 * tpu.nbytes((queries, width), dtype)
    average = 4 * tpu.nbytes((rows, mean), jnp.float32) + 2 * tpu.nbytes((rows, mean), dtype) if mean else 0
    return 2 * blocks + 2 * side + 4 * tpu.nbytes((queries, rows), jnp.float32) + average + 2 * tpu.MIB
