"""`attend` on Hopper: flash attention with a bias for every key, added to scores in registers: merged keys cost nothing more.

A block has one head of one row of the batch, and each of its threads 64 queries. Tiles of keys and values come through a ring
that holds all of a short sequence; the first thread asks for the next tile where one has been read. Sums are float32; weights
are rounded to the values' dtype, as every flash kernel does.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float

from jaxmerge._kernels import _mosaic_gpu as mgpu

TILE = 64
"""Queries of a thread."""
KEYS = 64
"""Keys of a tile."""
SHARED = mgpu.SHARED // 2
"""Of a block: two run on a multiprocessor at a time, one computes while the other waits."""
LOG2E = math.log2(math.e)
LEAST = -1e38
"""What a masked key is worth: finite, so that a query that sees no key is the mean of all values, as in the reference."""


def attend(
    q: Float[Array, "B t *three h f"],
    k: Float[Array, "B s g f"] | None,
    v: Float[Array, "B s g f"] | None,
    bias: Float[Array, "B s"] | None,
    offset: Float[Array, "one three h f"] | None = None,
    *,
    scale: float,
    length: int | None = None,
    keys: int = KEYS,
    threads: int | None = None,
    interpret: Any = None,
) -> Float[Array, "B n h f"]:
    """`ref.attend`; `keys` of a tile, `threads` of a block."""
    B, n, *_, h, f = q.shape
    if k is None or v is None:
        q = k = v = _whole(q.reshape(B, n, 3 * h, f))
        n = s = n if length is None else length
        g, first = h, (0, h, 2 * h)
    else:
        (s, g), first = k.shape[1:3], (0, 0, 0)  # heads before those of queries, of keys, of values
        q, k, v = _whole(q), _whole(k), _whole(v)
    tiles = -(-s // keys)
    threads = threads or (2 if n > 3 * TILE else 1)
    stages = max(1, min(tiles, (SHARED - 2 * threads * TILE * f * 2) // (2 * keys * f * 2)))

    def attend_rows(q, k, v, bias, offset, out, *, queries, result, keys_here, values, ready, k_full, v_full, free):
        b, head, block, t = (lax.axis_index(name) for name in ("row", "head", "block", "thread"))
        start = (block * threads + t) * TILE
        slot = lambda i: lax.rem(i, jnp.int32(stages))

        def ask(i):
            rows, at = pl.ds(i * keys, keys), slot(i)
            for ref, start, here, full in ((k, first[1], keys_here, k_full), (v, first[2], values, v_full)):
                plgpu.copy_gmem_to_smem(ref.at[b, rows, start + head // (h // g)], here.at[at], full.at[at])

        plgpu.copy_gmem_to_smem(q.at[b, pl.ds(start, TILE), head], queries.at[t], ready.at[t])

        @pl.when(t == 0)
        def _():
            for i in range(stages):
                ask(jnp.int32(i))

        plgpu.barrier_wait(ready.at[t])
        per_query = lambda value: plgpu.layout_cast(jnp.full((TILE,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))
        along = lambda row, width: lax.broadcast_in_dim(row, (TILE, width), (0,))
        across = lambda ref, width: lax.broadcast_in_dim(mgpu.columns(ref), (TILE, width), (1,))
        if offset is not None:  # of keys it adds the same to all scores of a query
            own = mgpu.load(queries.at[t], plgpu.Layout.WGMMA).astype(jnp.float32)
            queries[t] = (own + across(offset.at[b * offset.shape[0] // B, 0, head], f)).astype(q.dtype)
            plgpu.commit_smem()

        def tile(i, state):
            highest, mass, sum = state
            at = slot(i)
            plgpu.barrier_wait(k_full.at[at])
            score = mgpu.product(queries.at[t], keys_here.at[at].transpose((1, 0))) * (scale * LOG2E)
            if bias is not None:
                score = score + across(bias.at[b if bias.shape[0] > 1 else 0, pl.ds(i * keys, keys)], keys)
            higher = jnp.maximum(highest, jnp.max(score, axis=1))
            weight = jnp.exp2(score - along(higher, keys))
            shrink = jnp.exp2(highest - higher)
            mass = mass * shrink + jnp.sum(weight, axis=1)
            plgpu.barrier_wait(v_full.at[at])
            sum = sum * along(shrink, f) + mgpu.product(weight.astype(v.dtype), values.at[at])
            if stages < tiles:

                @pl.when(i + stages < tiles)
                def _():
                    plgpu.barrier_arrive(free.at[at])

                @pl.when((t == 0) & (i + stages < tiles))
                def _():
                    plgpu.barrier_wait(free.at[at])
                    ask(i + stages)

            return higher, mass, sum

        zeros = plgpu.layout_cast(jnp.zeros((TILE, f), jnp.float32), plgpu.Layout.WGMMA)
        _, mass, sum = lax.fori_loop(0, tiles, tile, (per_query(3 * LEAST), per_query(0), zeros))
        sum = sum * along(1 / mass, f)
        result[t] = (sum if offset is None else sum + across(offset.at[b * offset.shape[0] // B, 2, head], f)).astype(out.dtype)
        plgpu.commit_smem()
        plain = jnp.minimum(start, n)  # not seen to be a multiple of 8: so rows are not copied in eights, but up to the last
        plgpu.copy_smem_to_gmem(result.at[t], out.at[b, pl.ds(plain, TILE), head])
        plgpu.wait_smem_to_gmem(0)

    rows = lambda *shape: plgpu.SMEM((*shape, f), q.dtype, transforms=mgpu.tiled(f))
    return mgpu.kernel(
        attend_rows,
        (q, k, v, _padded(None if bias is None else bias[:, :s], s, keys), offset),
        dict(
            queries=rows(threads, TILE), result=plgpu.SMEM((threads, TILE, f), q.dtype),
            keys_here=rows(stages, keys), values=rows(stages, keys),
            ready=plgpu.Barrier(num_barriers=threads),
            k_full=plgpu.Barrier(num_barriers=stages), v_full=plgpu.Barrier(num_barriers=stages),
            free=plgpu.Barrier(num_arrivals=threads, num_barriers=stages) if stages < tiles else None,
        ),
        out=(jax.ShapeDtypeStruct((B, n, h, f), q.dtype),),
        grid=dict(row=B, head=h, block=-(-n // (threads * TILE))), threads=threads, interpret=interpret, approx_math=True,
    )[0]  # fmt: skip


def _whole(x: Array) -> Array:
    """x with rows in eights, as they are laid out on chip: a copy, unless it is so already."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, 0)))


def _padded(bias: Array | None, s: int, keys: int) -> Array | None:
    """The bias to base 2 for whole tiles: no weight behind the last key."""
    if bias is None and s % keys == 0:
        return None
    bias = jnp.zeros((1, s), jnp.float32) if bias is None else jnp.maximum(bias.astype(jnp.float32) * LOG2E, LEAST)
    return jnp.pad(bias, ((0, 0), (0, -s % keys)), constant_values=-jnp.inf)


device_refusals = mgpu.device_refusals


def refusals(
    op: str, q: Any, k: Any, v: Any, bias: Any, offset: Any = None, *, scale: float, length: int | None = None
) -> list[str]:
    """Why this attention cannot be a kernel."""
    why = []
    f = q.shape[-1]
    if {x.dtype for x in (q, k, v) if x is not None} not in ({jnp.dtype(jnp.bfloat16)}, {jnp.dtype(jnp.float16)}):
        why.append(f"queries are {q.dtype}: bfloat16 or float16, keys and values alike")
    if f % 16 or f > 128:
        why.append(f"heads have {f} features: a multiple of 16, at most 128")
    if 0 in (q.shape[1] if k is None else k.shape[1], q.shape[1], length):
        why.append("there is nothing to do")
    return why


def faster(op: str, *arrays: Any, kind: str, **static: Any) -> bool:
    """Not unless asked by name: XLA's attention has derivatives of every kind."""
    return False
