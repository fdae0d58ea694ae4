"""`attend` on Hopper: flash attention with a bias for every key, added to scores in registers: merged keys cost nothing more.

A block has one head of one row of the batch, and each of its threads 64 queries. Tiles of keys and values come through a ring
that holds all of a short sequence; the first thread asks for the next tile where one has been read. Sums are float32; weights
are rounded to the values' dtype, as every flash kernel does.

Where the mean of the keys over heads is asked for, there is one head more, whose blocks add up the tiles of keys of all others:
memory has time for that while products are what there is to wait for.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float

from jaxmerge._kernels import _mosaic_gpu as mgpu
from jaxmerge._kernels.attend._tiles import LEAST, LOG2E, STAGES, TILE, base_two, from_largest, operands
from jaxmerge._kernels.attend._vjp_gpu import gradients

SHARED = mgpu.SHARED // 2
"""Of a block: two run on a multiprocessor at a time, one computes while the other waits."""


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
    threads: int | None = None,
    interpret: Any = None,
) -> tuple[Array, ...]:
    """`ref.attend`; `threads` of a block, one or two. With `for_vjp` what `attend_vjp` needs comes last: to base 2, the
    logarithm of what all keys weigh for each query, (B, h, n'), n' whole tiles."""
    B, h, f = q.shape[0], *q.shape[-2:]
    (q, k, v), first, n, s, g = operands(q, k, v, length)
    tiles = -(-s // TILE)
    threads = threads or (2 if n > 3 * TILE else 1)
    stages = max(1, min(tiles, STAGES, (SHARED - 2 * threads * TILE * f * 2) // (2 * TILE * f * 2)))
    shift_of = lambda offset, b, which, head: mgpu.columns(offset.at[b * offset.shape[0] // B, which, head])
    along = lambda column, width: mgpu.by_row(column, (TILE, width))
    across = lambda row: mgpu.by_column(row, (TILE, row.size))

    bias, counts = from_largest(base_two(bias, s)) if for_vjp else (base_two(bias, s), None)

    def attend_rows(q, k, v, bias, counts, offset, out, *more, queries, result, ring, biases, ready, full, listed, free):
        b, head, block, t = (lax.axis_index(name) for name in ("row", "head", "block", "thread"))
        start = (block * threads + t) * TILE
        slot = lambda side, i: side * stages + lax.rem(i, jnp.int32(stages))
        of_b = lambda ref: b if ref.shape[0] > 1 else 0

        def ask(ref, i, head, at):
            """A tile of keys or values, to one of the slots of the ring, of which each side has a half."""
            plgpu.copy_gmem_to_smem(ref.at[b, pl.ds(i * TILE, TILE), head], ring.at[at], full.at[at])

        def put(there, rows):
            result[t] = rows.astype(q.dtype)
            plgpu.commit_smem()
            # a start that is not seen to be a multiple of 8: so rows are not copied in eights, but up to the last
            plgpu.copy_smem_to_gmem(result.at[t], there(pl.ds(jnp.minimum(start, n), TILE)))
            plgpu.wait_smem_to_gmem(0)

        def attention():
            def ask_both(i):
                for side, (ref, before) in enumerate(((k, first[1]), (v, first[2]))):
                    ask(ref, i, before + head // (h // g), slot(side, i))
                if bias is not None:
                    here = bias.at[of_b(bias), pl.ds(i * TILE, TILE)]
                    plgpu.copy_gmem_to_smem(here, biases.at[slot(0, i)], listed.at[slot(0, i)])

            plgpu.copy_gmem_to_smem(q.at[b, pl.ds(start, TILE), head], queries.at[t], ready.at[t])

            @pl.when(t == 0)
            def _():
                for i in range(stages):
                    ask_both(jnp.int32(i))

            plgpu.barrier_wait(ready.at[t])
            if offset is not None:  # of keys it adds the same to all scores of a query
                mine = mgpu.load(queries.at[t], plgpu.Layout.WGMMA).astype(jnp.float32)
                queries[t] = (mine + across(shift_of(offset, b, 0, head))).astype(q.dtype)
                plgpu.commit_smem()

            factor = scale * LOG2E * (1 if counts is None else counts[of_b(counts)])

            def tile(i, state):
                highest, mass, sum = state
                keys, values = slot(0, i), slot(1, i)
                plgpu.barrier_wait(full.at[keys])
                score = mgpu.product(queries.at[t], ring.at[keys].transpose((1, 0))) * factor
                if bias is not None:
                    plgpu.barrier_wait(listed.at[keys])
                    score = score + across(mgpu.columns(biases.at[keys]))
                higher = jnp.maximum(highest, jnp.max(score, axis=1))
                weight = jnp.exp2(score - along(higher, TILE))
                shrink = jnp.exp2(highest - higher)
                mass = mass * shrink + jnp.sum(weight, axis=1)
                plgpu.barrier_wait(full.at[values])
                sum = sum * along(shrink, f) + mgpu.product(weight.astype(v.dtype), ring.at[values])
                if stages < tiles:

                    @pl.when(i + stages < tiles)
                    def _():
                        plgpu.barrier_arrive(free.at[keys])

                    @pl.when((t == 0) & (i + stages < tiles))
                    def _():
                        plgpu.barrier_wait(free.at[keys])
                        ask_both(i + stages)

                return higher, mass, sum

            start_from = mgpu.filled((TILE,), 3 * LEAST), mgpu.filled((TILE,), 0.0), mgpu.filled((TILE, f), 0.0)
            highest, mass, sum = lax.fori_loop(0, tiles, tile, start_from)
            if for_vjp:
                more[-1][b, head, pl.ds(start, TILE)] = highest + jnp.log(mass) * LOG2E
            sum = sum * along(1 / mass, f)
            put(lambda rows: out.at[b, rows, head], sum if offset is None else sum + across(shift_of(offset, b, 2, head)))

        def average():
            """Of a tile of keys over the heads: each thread has a half of the ring."""
            ask_head = lambda i: ask(k, block * threads + t, first[1] + i, slot(t, i))
            for i in range(min(stages, h)):
                ask_head(jnp.int32(i))

            def add(i, sum):
                if offset is not None:  # one after the other: all at once would take the registers of another block
                    sum = sum + across(shift_of(offset, b, 1, i))
                plgpu.barrier_wait(full.at[slot(t, i)])
                sum = sum + mgpu.load(ring.at[slot(t, i)], plgpu.Layout.WGMMA).astype(jnp.float32)
                if stages < h:

                    @pl.when(i + stages < h)
                    def _():
                        plgpu.commit_smem()  # lanes have read what the copy engine writes next
                        ask_head(i + stages)

                return sum

            sum = lax.fori_loop(0, h, add, mgpu.filled((TILE, f), 0.0))
            put(lambda rows: more[0].at[b, rows], sum * (1 / h))

        if mean_keys:
            pl.when(head < h)(attention)
            pl.when(head == h)(average)
        else:
            attention()

    rows = lambda *shape: plgpu.SMEM((*shape, f), q.dtype, transforms=mgpu.tiled(f))
    return mgpu.kernel(
        attend_rows,
        (q, k, v, bias, counts, offset),
        dict(
            queries=rows(threads, TILE), result=plgpu.SMEM((threads, TILE, f), q.dtype), ring=rows(2 * stages, TILE),
            biases=None if bias is None else plgpu.SMEM((stages, TILE), jnp.float32),
            ready=plgpu.Barrier(num_barriers=threads), full=plgpu.Barrier(num_barriers=2 * stages),
            listed=None if bias is None else plgpu.Barrier(num_barriers=stages),
            free=plgpu.Barrier(num_arrivals=threads, num_barriers=stages) if stages < tiles else None,
        ),
        out=(
            jax.ShapeDtypeStruct((B, n, h, f), q.dtype),
            *([jax.ShapeDtypeStruct((B, n, f), q.dtype)] if mean_keys else []),
            *([jax.ShapeDtypeStruct((B, h, n + -n % (2 * TILE)), jnp.float32)] if for_vjp else []),
        ),
        grid=dict(row=B, head=h + mean_keys, block=-(-n // (threads * TILE))),
        threads=threads, interpret=interpret, approx_math=True,
    )  # fmt: skip


def attend_vjp(
    q: Float[Array, "B t *three h f"],
    k: Float[Array, "B s g f"] | None,
    v: Float[Array, "B s g f"] | None,
    bias: Float[Array, "B s"] | None,
    offset: Float[Array, "one three h f"] | None,
    g: Float[Array, "B n h f"],
    *kept: Array,
    **how: Any,
) -> tuple[Array | None, ...]:
    """`ref.attend_vjp`."""
    out, log_mass = kept or attend(q, k, v, bias, offset, for_vjp=True, **how)
    return gradients(q, k, v, bias, offset, g, out, log_mass, **how)


device_refusals = mgpu.device_refusals


def refusals(
    op: str, q: Any, k: Any, v: Any, bias: Any, *more: Any, scale: float, length: int | None = None, **_: Any
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
