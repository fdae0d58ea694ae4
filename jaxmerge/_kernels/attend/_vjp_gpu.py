"""The gradient of `attend` on Hopper, in one launch: weights are computed again, and no score reaches memory.

With w the weights, o the result, g its cotangent and c = w (g·v - g·o) the cotangent of scores:

    dq = scale c k        of 64 queries, over all tiles of keys
    dk = scale c^T q      of 64 keys, over all tiles of queries, of all heads that share the keys
    dv = w^T g

A block has 64 rows of either kind. What it holds of them (queries and g, or keys and values) meets tiles of the others, which
come through a ring; the transposed products give it the same rows of an accumulator either way. So sums never leave a block:
nothing is added up in memory, and a result does not depend on who came first. Sums are float32; weights and c are rounded to
the values' dtype, as every flash kernel does.
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
from jaxmerge._kernels.attend._tiles import LOG2E, STAGES, TILE, base_two, from_largest, operands, whole

SHARED = mgpu.SHARED // 2
"""Of a block: two run on a multiprocessor at a time, one computes while the other waits."""


def gradients(
    q: Float[Array, "B t *three h f"],
    k: Float[Array, "B s g f"] | None,
    v: Float[Array, "B s g f"] | None,
    bias: Float[Array, "B s"] | None,
    offset: Float[Array, "one three h f"] | None,
    g: Float[Array, "B n h f"],
    out: Float[Array, "B n h f"],
    log_mass: Float[Array, "B h tiles"],
    *,
    scale: float,
    length: int | None = None,
    interpret: Any = None,
) -> tuple[Array | None, ...]:
    """`ref.attend_vjp`, of what `attend` gave: `out` and `log_mass`."""
    B, h, f, dtype = q.shape[0], *q.shape[-2:], q.dtype
    rows, packed, biased = q.shape[1], k is None, bias is not None
    (q, k, v), first, n, s, heads = operands(q, k, v, length)
    share = h // heads
    gv = out.astype(jnp.float32) if offset is None else out - jnp.repeat(offset[:, None, 2], B // len(offset), axis=0)
    of_out = jnp.sum(g.astype(jnp.float32) * gv, axis=-1).swapaxes(1, 2)  # g·o, but for the offset of v, which g·v lacks too
    of_out = jnp.pad(of_out, ((0, 0), (0, 0), (0, log_mass.shape[2] - n)))
    other = TILE if f <= 80 else TILE // 2  # rows of a tile of the others: wider sums leave fewer registers for scores
    tiles_q, tiles_k = -(-n // other), -(-s // other)
    stages = max(2, min(max(tiles_q * share, tiles_k), STAGES, (SHARED - 2 * TILE * f * 2) // (2 * other * f * 2)))
    scores = (TILE, other)
    blocks_q, blocks_k = -(-n // TILE), -(-s // TILE)
    slot = lambda i: lax.rem(i, jnp.int32(stages))

    def body(q, k, v, g, log_mass, of_out, bias, counts, offset, *outs, own, ring, ready, full):
        b, head, block = (lax.axis_index(name) for name in ("row", "head", "block"))
        here = pl.ds(block * TILE, TILE)
        dq, dk, dv = (outs[0],) * 3 if packed else outs[:3]
        (q_at, k_at, v_at), of_b = first, lambda ref: b * ref.shape[0] // B
        factor = scale * LOG2E * (1 if counts is None else counts[of_b(counts)])
        bias_of = lambda keys: bias.at[of_b(bias), keys]
        offset_of = lambda which, head: mgpu.columns(offset.at[of_b(offset), which, head])

        def asking(theirs):
            """What asks for two tiles of the others, by their number: `theirs` tells from where."""

            def ask(i):
                tile, two = theirs(i)
                for side, (ref, head) in enumerate(two):
                    rows, at = pl.ds(tile * other, other), slot(i)
                    plgpu.copy_gmem_to_smem(ref.at[b, rows, head], ring.at[2 * at + side], full.at[at])

            return ask

        def start(mine, ask, count):
            """This block's own two tiles are there, and the first of the others on their way."""
            for side, (ref, head) in enumerate(mine):
                plgpu.copy_gmem_to_smem(ref.at[b, here, head], own.at[side], ready)
            for i in range(min(stages, count)):
                ask(jnp.int32(i))
            plgpu.barrier_wait(ready)

        def over(count, ask, terms, sums, mass):
            """Over all tiles of the others, add c and w times these to the first and second of `sums`, and c to the mass."""

            def turn(i, mass):
                first, second = (ring.at[2 * slot(i) + side] for side in range(2))
                added, taken = terms(i)
                plgpu.barrier_wait(full.at[slot(i)])

                def products(score, change):
                    mgpu.add_product(score, own.at[0], first.transpose((1, 0)))
                    mgpu.add_product(change, own.at[1], second.transpose((1, 0)))
                    return score[...], change[...]  # with them what was multiplied before has ended

                score, change = pl.run_scoped(products, *[plgpu.ACC(scores, jnp.float32)] * 2)

                if stages < count:

                    @pl.when((i > 0) & (i - 1 + stages < count))
                    def _():
                        plgpu.commit_smem()  # all lanes are here
                        ask(i - 1 + stages)

                weight = jnp.exp2(score * factor + added)
                change = weight * (change - taken)
                mgpu.add_product(sums[0], change.astype(dtype), first)
                if len(sums) > 1:
                    mgpu.add_product(sums[1], weight.astype(dtype), second)
                return mass if mass is None else mass + jnp.sum(change, axis=1)

            return lax.fori_loop(0, count, turn, mass)

        def put(*results):
            """Rows of results, from where this block's own were."""
            plgpu.commit_smem()  # which all lanes have read
            for side, (*_, value) in enumerate(results):
                own[side] = value.astype(dtype)
            plgpu.commit_smem()
            for side, (ref, head, _) in enumerate(results):
                plgpu.copy_smem_to_gmem(own.at[side], ref.at[b, here, head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when((head < h) & (block < blocks_q))
        def _():
            of_keys = head // share
            ask = asking(lambda i: (i, ((k, k_at + of_keys), (v, v_at + of_keys))))
            start(((q, q_at + head), (g, head)), ask, tiles_k)
            if offset is not None:
                mine = mgpu.load(own.at[0], plgpu.Layout.WGMMA).astype(jnp.float32)
                own[0] = (mine + mgpu.by_column(offset_of(0, head), (TILE, f))).astype(dtype)
                plgpu.commit_smem()
            less = mgpu.by_row(mgpu.rows(log_mass.at[b, head, here]), scores)
            taken = mgpu.by_row(mgpu.rows(of_out.at[b, head, here]), scores)

            def terms(i):
                if bias is None:
                    return -less, taken
                return mgpu.by_column(mgpu.columns(bias_of(pl.ds(i * other, other))), scores) - less, taken

            def summed(sum):
                over(tiles_k, ask, terms, (sum,), None)
                return sum[...]

            sum = pl.run_scoped(summed, plgpu.ACC((TILE, f), jnp.float32))
            put((dq, q_at + head, sum * scale))

        @pl.when((head >= h) & (block < blocks_k))
        def _():
            mine = head - h
            query = lambda i: (mine * share + i // tiles_q, lax.rem(i, jnp.int32(tiles_q)))  # the head of a tile, and which

            def theirs(i):
                of_queries, tile = query(i)
                return tile, ((q, q_at + of_queries), (g, of_queries))

            ask = asking(theirs)
            start(((k, k_at + mine), (v, v_at + mine)), ask, tiles_q * share)
            added = mgpu.filled((TILE,), 0.0) if bias is None else mgpu.rows(bias_of(here))
            if offset is not None:  # what that of queries adds to their scores
                keys = mgpu.load(own.at[0], plgpu.Layout.WGMMA).astype(jnp.float32)
                keys = keys * mgpu.by_column(offset_of(0, mine), (TILE, f))
                added = added + jnp.sum(keys, axis=1) * factor
            added = mgpu.by_row(added, scores)

            def terms(i):
                of_queries, tile = query(i)
                of = lambda ref: mgpu.by_column(mgpu.columns(ref.at[b, of_queries, pl.ds(tile * other, other)]), scores)
                return added - of(log_mass), of(of_out)

            def summed(*sums):
                mass = mgpu.filled((TILE,), 0.0) if biased or offset is not None else None
                mass = over(tiles_q * share, ask, terms, sums, mass)
                return mass, sums[0][...], sums[1][...]

            mass, of_k, of_v = pl.run_scoped(summed, *[plgpu.ACC((TILE, f), jnp.float32)] * 2)
            if offset is not None:
                of_k = of_k + mgpu.by_row(mass, (TILE, f)) * mgpu.by_column(offset_of(0, mine), (TILE, f))
            put((dk, k_at + mine, of_k * scale), (dv, v_at + mine, of_v))
            if biased:
                outs[-1][b, mine, here] = mass

    tiles = lambda count, rows: plgpu.SMEM((count, rows, f), dtype, transforms=mgpu.tiled(math.gcd(f, other)))
    like = [jax.ShapeDtypeStruct(x.shape, dtype) for x in ((q,) if packed else (q, k, v))]
    found = mgpu.kernel(
        body,
        (q, k, v, whole(g), log_mass, of_out, *from_largest(base_two(bias, s)), offset),
        dict(
            own=tiles(2, TILE), ring=tiles(2 * stages, other), ready=plgpu.Barrier(num_arrivals=2),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        ),
        out=[*like, *([jax.ShapeDtypeStruct((B, heads, blocks_k * TILE), jnp.float32)] if biased else [])],
        grid=dict(row=B, head=h + heads, block=max(blocks_q, blocks_k)),
        threads=1, interpret=interpret, approx_math=True,
    )  # fmt: skip
    of_bias = found[-1].sum(axis=1)[:, :s].astype(jnp.float32) if biased else None
    if not packed:
        return *(x[:, :size] for x, size in zip(found, (n, s, s), strict=False)), of_bias
    there = found[0][:, : min(rows, blocks_q * TILE)]  # what lies behind is in no block
    there = jnp.pad(there, ((0, 0), (0, rows - there.shape[1]), (0, 0), (0, 0)))
    return there.reshape(B, rows, 3, h, f), None, None, of_bias
