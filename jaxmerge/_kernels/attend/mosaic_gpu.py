"""`attend` on Hopper: flash attention with a bias for every key, added to scores in registers: merged keys cost nothing more.

A block has one head of one row of the batch, and each of its threads 64 queries. Tiles of keys and values come through a ring
that holds all of a short sequence; the first thread asks for the next tile where one has been read. Sums are float32; weights
are rounded to the values' dtype, as every flash kernel does.

Where the mean of the keys over heads is asked for, there is one head more, whose blocks add up the tiles of keys of all others:
memory has time for that while products are what there is to wait for.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float

from jaxmerge._kernels import _mosaic_gpu as mgpu
from jaxmerge._kernels.attend._tiles import LEAST, LOG2E, STAGES, TILE, base_two, from_largest, heads_each, operands
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
    each = heads_each(h, B * -(-n // (threads * TILE)), tiles)
    asked, width = each * tiles, 2 * TILE * f  # tiles of keys that a block asks for, and bytes of each
    own = 2 if each > 1 and 3 * threads * width + 2 * width <= SHARED else 1  # heads whose queries are there at a time
    stages = max(1, min(asked, STAGES, (SHARED - (own + 1) * threads * width) // (2 * width)))
    shift_of = lambda offset, b, which, head: mgpu.columns(offset.at[b * offset.shape[0] // B, which, head])
    along = lambda column, width: mgpu.by_row(column, (TILE, width))
    across = lambda row: mgpu.by_column(row, (TILE, row.size))

    bias, counts = from_largest(base_two(bias, s)) if for_vjp else (base_two(bias, s), None)

    def attend_rows(q, k, v, bias, counts, offset, out, *more, queries, result, ring, biases, ready, free, **there):
        b, group, block, t = (lax.axis_index(name) for name in ("row", "heads", "block", "thread"))
        start = (block * threads + t) * TILE
        slot = lambda i: lax.rem(i, jnp.int32(stages))

        def put(place, rows):
            plgpu.wait_smem_to_gmem(0)  # those before are out
            result[t] = rows.astype(q.dtype)
            plgpu.commit_smem()
            # a start that is not seen to be a multiple of 8: so rows are not copied in eights, but up to the last
            plgpu.copy_smem_to_gmem(result.at[t], place(pl.ds(jnp.minimum(start, n), TILE)))

        def attention():
            own_of = lambda i: t * own + lax.rem(i, jnp.int32(own))
            of_b = lambda ref: b if ref.shape[0] > 1 else 0
            factor = scale * LOG2E * (1 if counts is None else counts[of_b(counts)])

            def ask(i):
                """A tile of keys, with its bias, and one of values, to a slot of the ring, of which each side has a half."""
                head, at = (group * each + lax.div(i, jnp.int32(tiles))) // (h // g), slot(i)
                rows = pl.ds(lax.rem(i, jnp.int32(tiles)) * TILE, TILE)
                plgpu.copy_gmem_to_smem(k.at[b, rows, first[1] + head], ring.at[at], there["keys"].at[at])
                if bias is not None:
                    plgpu.copy_gmem_to_smem(bias.at[of_b(bias), rows], biases.at[at], there["keys"].at[at])
                plgpu.copy_gmem_to_smem(v.at[b, rows, first[2] + head], ring.at[stages + at], there["values"].at[at])

            def ask_queries(i):
                here = q.at[b, pl.ds(start, TILE), group * each + i]
                plgpu.copy_gmem_to_smem(here, queries.at[own_of(i)], ready.at[own_of(i)])

            ask_queries(jnp.int32(0))

            @pl.when(t == 0)
            def _():
                for i in range(stages):
                    ask(jnp.int32(i))

            def of_head(number, _):
                head, mine = group * each + number, own_of(number)
                if own > 1:
                    pl.when(number + 1 < each)(lambda: ask_queries(number + 1))
                plgpu.barrier_wait(ready.at[mine])
                if offset is not None:  # of keys it adds the same to all scores of a query
                    rows = mgpu.load(queries.at[mine], plgpu.Layout.WGMMA).astype(jnp.float32)
                    queries[mine] = (rows + across(shift_of(offset, b, 0, head))).astype(q.dtype)
                    plgpu.commit_smem()

                def tile(i, state):
                    highest, mass, sum = state
                    number_of, at = number * tiles + i, slot(number * tiles + i)
                    plgpu.barrier_wait(there["keys"].at[at])
                    score = mgpu.product(queries.at[mine], ring.at[at].transpose((1, 0))) * factor
                    if bias is not None:
                        score = score + across(mgpu.columns(biases.at[at]))
                    higher = jnp.maximum(highest, jnp.max(score, axis=1))
                    weight = jnp.exp2(score - along(higher, TILE))
                    shrink = jnp.exp2(highest - higher)
                    mass = mass * shrink + jnp.sum(weight, axis=1)
                    plgpu.barrier_wait(there["values"].at[at])
                    sum = sum * along(shrink, f) + mgpu.product(weight.astype(v.dtype), ring.at[stages + at])
                    if stages < asked:

                        @pl.when(number_of + stages < asked)
                        def _():
                            plgpu.barrier_arrive(free.at[at])

                        @pl.when((t == 0) & (number_of + stages < asked))
                        def _():
                            plgpu.barrier_wait(free.at[at])
                            ask(number_of + stages)

                    return higher, mass, sum

                start_from = mgpu.filled((TILE,), 3 * LEAST), mgpu.filled((TILE,), 0.0), mgpu.filled((TILE, f), 0.0)
                highest, mass, sum = lax.fori_loop(0, tiles, tile, start_from)
                if for_vjp:
                    more[-1][b, head, pl.ds(start, TILE)] = highest + jnp.log(mass) * LOG2E
                sum = sum * along(1 / mass, f)
                results = sum if offset is None else sum + across(shift_of(offset, b, 2, head))
                put(lambda rows: out.at[b, rows, head], results)
                if own < each and own == 1:
                    pl.when(number + 1 < each)(lambda: ask_queries(number + 1))

            lax.fori_loop(0, each, of_head, None)

        def average():
            """Of a tile of keys over the heads: each thread has a half of the ring."""
            at_of = lambda i: t * stages + slot(i)

            def ask(i):
                tile = k.at[b, pl.ds(start, TILE), first[1] + i]
                plgpu.copy_gmem_to_smem(tile, ring.at[at_of(i)], there["summed"].at[at_of(i)])

            for i in range(min(stages, h)):
                ask(jnp.int32(i))

            def add(i, sum):
                plgpu.barrier_wait(there["summed"].at[at_of(i)])
                sum = sum + mgpu.load(ring.at[at_of(i)], plgpu.Layout.WGMMA).astype(jnp.float32)
                if stages < h:

                    @pl.when(i + stages < h)
                    def _():
                        plgpu.commit_smem()  # lanes have read what the copy engine writes next
                        ask(i + stages)

                return sum

            sum = lax.fori_loop(0, h, add, mgpu.filled((TILE, f), 0.0))
            if offset is not None:
                sum = sum + across(functools.reduce(jnp.add, [shift_of(offset, b, 1, i) for i in range(h)]))
            put(lambda rows: more[0].at[b, rows], sum * (1 / h))

        if mean_keys:
            pl.when(group < h // each)(attention)
            pl.when(group == h // each)(average)
        else:
            attention()
        plgpu.wait_smem_to_gmem(0)

    rows = lambda count: plgpu.SMEM((count, TILE, f), q.dtype, transforms=mgpu.tiled(f))
    arriving = lambda count, arrivals=1: plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)
    return mgpu.kernel(
        attend_rows,
        (q, k, v, bias, counts, offset),
        dict(
            queries=rows(threads * own), result=plgpu.SMEM((threads, TILE, f), q.dtype), ring=rows(2 * stages),
            biases=None if bias is None else plgpu.SMEM((stages, TILE), jnp.float32),
            ready=arriving(threads * own), keys=arriving(stages, 1 if bias is None else 2), values=arriving(stages),
            summed=arriving(threads * stages) if mean_keys else None,
            free=arriving(stages, threads) if stages < asked else None,
        ),
        out=(
            jax.ShapeDtypeStruct((B, n, h, f), q.dtype),
            *([jax.ShapeDtypeStruct((B, n, f), q.dtype)] if mean_keys else []),
            *([jax.ShapeDtypeStruct((B, h, n + -n % (2 * TILE)), jnp.float32)] if for_vjp else []),
        ),
        grid=dict(row=B, heads=h // each + mean_keys, block=-(-n // (threads * TILE))),
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
