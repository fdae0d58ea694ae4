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
TURNS = 12
"""Tiles that a block multiplies, of several heads where one has fewer. On an H200, 64 images and 12 heads, forward and back, in
microseconds: at 197 tokens 216 with one head of 4 tiles to a block, 210 with three, 207 with four to six; at 577, of 10 tiles,
993 with one and 1008 with three."""


def heads_each(h: int, blocks: int, tiles: int) -> int:
    """Heads that a block takes in turn, of `tiles` each, where `blocks` have rows of their own: what the next needs is on its
    way before the last has ended. Not so many that a multiprocessor, which has room for two blocks, has fewer than four."""
    enough = lambda each: each == 1 or (each * tiles <= TURNS and blocks * (h // each) >= 4 * mgpu.BLOCKS)
    return max(each for each in range(1, h + 1) if h % each == 0 and enough(each))


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
    blocks_q, blocks_k = -(-n // TILE), -(-s // TILE)
    each_q = heads_each(h, 2 * B * blocks_q, tiles_k)
    each_k = heads_each(heads, 2 * B * blocks_k, tiles_q * share)
    own = min(2, max(each_q, each_k))  # heads whose own tiles are there at a time
    tile, asked = 2 * other * f, max(each_q * tiles_k, each_k * tiles_q * share)
    stages = max(2, min(asked, STAGES, (SHARED - own * 4 * TILE * f) // (2 * tile)))
    scores = (TILE, other)
    slot = lambda i: lax.rem(i, jnp.int32(stages))
    whole_of = lambda i, parts: (lax.div(i, jnp.int32(parts)), lax.rem(i, jnp.int32(parts)))

    def body(q, k, v, g, log_mass, of_out, bias, counts, offset, *outs, mine, ring, of_mine, of_ring, **barriers):
        b, group, block = (lax.axis_index(name) for name in ("row", "heads", "block"))
        here = pl.ds(block * TILE, TILE)
        dq, dk, dv = (outs[0],) * 3 if packed else outs[:3]
        (q_at, k_at, v_at), of_b = first, lambda ref: b * ref.shape[0] // B
        factor = scale * LOG2E * (1 if counts is None else counts[of_b(counts)])
        offset_of = lambda which, head: mgpu.columns(offset.at[of_b(offset), which, head])

        def over(each, count, own_of, theirs_of, ready, full, item):
            """`item(number, loop)` for every head of this block, of which it has two tiles, and numbers of their rows;
            `loop(terms, sums, mass)`, over all tiles of the others, adds c and w times these to the first and second of
            `sums`, and c to the mass."""
            at_of = lambda number: lax.rem(number, jnp.int32(own))

            def copy(tiles, numbers, rows, to, room, of_room, barrier):
                for side, (ref, head) in enumerate(tiles):
                    plgpu.copy_gmem_to_smem(ref.at[b, rows, head], room.at[2 * to + side], barrier.at[to])
                for side, ref in enumerate(numbers):
                    there = of_room.at[pl.ds((2 * to + side) * rows.size, rows.size)]
                    plgpu.copy_gmem_to_smem(ref.at[rows], there, barrier.at[to])

            def ask_own(number):
                tiles, numbers = own_of(number)
                copy(tiles, numbers, here, at_of(number), mine, of_mine, ready)

            def ask(i):
                number, turn = whole_of(i, count)
                tiles, numbers, tile = theirs_of(number, turn)
                copy(tiles, numbers, pl.ds(tile * other, other), slot(i), ring, of_ring, full)

            ask_own(jnp.int32(0))
            for i in range(min(stages, each * count)):
                ask(jnp.int32(i))

            def one(number, _):
                at = at_of(number)
                plgpu.barrier_wait(ready.at[at])

                def loop(terms, sums, mass):
                    def turn(i, mass):
                        now = number * count + i
                        first, second = (ring.at[2 * slot(now) + side] for side in range(2))
                        plgpu.barrier_wait(full.at[slot(now)])

                        def products(score, change):
                            mgpu.add_product(score, mine.at[2 * at], first.transpose((1, 0)))
                            mgpu.add_product(change, mine.at[2 * at + 1], second.transpose((1, 0)))
                            return score[...], change[...]  # with them what was multiplied before has ended

                        score, change = pl.run_scoped(products, *[plgpu.ACC(scores, jnp.float32)] * 2)

                        if stages < each * count:

                            @pl.when((now > 0) & (now - 1 + stages < each * count))
                            def _():
                                plgpu.commit_smem()  # all lanes are here
                                ask(now - 1 + stages)

                        if each > 1:

                            @pl.when((i == 0) & (number + 1 < each))
                            def _():
                                plgpu.wait_smem_to_gmem(0)  # rows of the head before, from where the next one's go
                                ask_own(number + 1)

                        numbers = lambda side: of_ring.at[pl.ds((2 * slot(now) + side) * other, other)]
                        added, taken = terms(lambda side: mgpu.by_column(mgpu.columns(numbers(side)), scores))
                        weight = jnp.exp2(score * factor + added)
                        change = weight * (change - taken)
                        mgpu.add_product(sums[0], change.astype(dtype), first)
                        if len(sums) > 1:
                            mgpu.add_product(sums[1], weight.astype(dtype), second)
                        return mass if mass is None else mass + jnp.sum(change, axis=1)

                    return lax.fori_loop(0, count, turn, mass)

                item(number, at, loop)

            lax.fori_loop(0, each, one, None)
            plgpu.wait_smem_to_gmem(0)

        def put(at, *results):
            """Rows of results, from where this block's own were."""
            plgpu.commit_smem()  # which all lanes have read
            for side, (*_, value) in enumerate(results):
                mine[2 * at + side] = value.astype(dtype)
            plgpu.commit_smem()
            for side, (ref, head, _) in enumerate(results):
                plgpu.copy_smem_to_gmem(mine.at[2 * at + side], ref.at[b, here, head])

        def of_keys():
            begin = group * each_k
            bias_here = mgpu.filled((TILE,), 0.0) if bias is None else mgpu.rows(bias.at[of_b(bias), here])

            def theirs(number, turn):  # the head of a tile, and which
                of_head, tile = whole_of(turn, tiles_q)
                head = (begin + number) * share + of_head
                return ((q, q_at + head), (g, head)), (log_mass.at[b, head], of_out.at[b, head]), tile

            def of_head(number, at, loop):
                head, added = begin + number, bias_here
                if offset is not None:  # what that of queries adds to their scores
                    keys = mgpu.load(mine.at[2 * at], plgpu.Layout.WGMMA).astype(jnp.float32)
                    keys = keys * mgpu.by_column(offset_of(0, head), (TILE, f))
                    added = added + jnp.sum(keys, axis=1) * factor
                added = mgpu.by_row(added, scores)

                def summed(*sums):
                    mass = mgpu.filled((TILE,), 0.0) if biased or offset is not None else None
                    mass = loop(lambda of_tile: (added - of_tile(0), of_tile(1)), sums, mass)
                    return mass, sums[0][...], sums[1][...]

                mass, of_k, of_v = pl.run_scoped(summed, *[plgpu.ACC((TILE, f), jnp.float32)] * 2)
                if offset is not None:
                    of_k = of_k + mgpu.by_row(mass, (TILE, f)) * mgpu.by_column(offset_of(0, head), (TILE, f))
                put(at, (dk, k_at + head, of_k * scale), (dv, v_at + head, of_v))
                if biased:
                    outs[-1][b, head, here] = mass

            own_of = lambda number: (((k, k_at + begin + number), (v, v_at + begin + number)), ())
            over(each_k, tiles_q * share, own_of, theirs, barriers["keys_ready"], barriers["queries_there"], of_head)

        def of_queries():
            begin = (group - heads // each_k) * each_q

            def theirs(number, tile):
                head = (begin + number) // share
                return ((k, k_at + head), (v, v_at + head)), () if bias is None else (bias.at[of_b(bias)],), tile

            def own_of(number):
                head = begin + number
                return ((q, q_at + head), (g, head)), (log_mass.at[b, head], of_out.at[b, head])

            def of_head(number, at, loop):
                head = begin + number
                if offset is not None:
                    rows = mgpu.load(mine.at[2 * at], plgpu.Layout.WGMMA).astype(jnp.float32)
                    mine[2 * at] = (rows + mgpu.by_column(offset_of(0, head), (TILE, f))).astype(dtype)
                    plgpu.commit_smem()
                numbers = [mgpu.rows(of_mine.at[pl.ds((2 * at + side) * TILE, TILE)]) for side in range(2)]
                less, taken = (mgpu.by_row(some, scores) for some in numbers)

                def summed(sum):
                    loop(lambda of_tile: (-less if bias is None else of_tile(0) - less, taken), (sum,), None)
                    return sum[...]

                sum = pl.run_scoped(summed, plgpu.ACC((TILE, f), jnp.float32))
                put(at, (dq, q_at + head, sum * scale))

            over(each_q, tiles_k, own_of, theirs, barriers["queries_ready"], barriers["keys_there"], of_head)

        pl.when((group < heads // each_k) & (block < blocks_k))(of_keys)
        pl.when((group >= heads // each_k) & (block < blocks_q))(of_queries)

    tiles = lambda count, rows: plgpu.SMEM((count, rows, f), dtype, transforms=mgpu.tiled(math.gcd(f, other)))
    numbers = lambda count, rows: plgpu.SMEM((2 * count * rows,), jnp.float32)
    arriving = lambda count, arrivals: plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)
    like = [jax.ShapeDtypeStruct(x.shape, dtype) for x in ((q,) if packed else (q, k, v))]
    bias, counts = from_largest(base_two(bias, s))
    found = mgpu.kernel(
        body,
        (q, k, v, whole(g), log_mass, of_out, bias, counts, offset),
        dict(
            mine=tiles(2 * own, TILE), of_mine=numbers(own, TILE), queries_ready=arriving(own, 4), keys_ready=arriving(own, 2),
            ring=tiles(2 * stages, other), of_ring=numbers(stages, other), queries_there=arriving(stages, 4),
            keys_there=arriving(stages, 2 if bias is None else 3),
        ),
        out=[*like, *([jax.ShapeDtypeStruct((B, heads, blocks_k * TILE), jnp.float32)] if biased else [])],
        grid=dict(row=B, heads=heads // each_k + h // each_q, block=max(blocks_q, blocks_k)),
        threads=1, interpret=interpret, approx_math=True,
    )  # fmt: skip
    of_bias = found[-1].sum(axis=1)[:, :s].astype(jnp.float32) if biased else None
    if not packed:
        return *(x[:, :size] for x, size in zip(found, (n, s, s), strict=False)), of_bias
    there = found[0][:, : min(rows, blocks_q * TILE)]  # what lies behind is in no block
    there = jnp.pad(there, ((0, 0), (0, rows - there.shape[1]), (0, 0), (0, 0)))
    return there.reshape(B, rows, 3, h, f), None, None, of_bias
