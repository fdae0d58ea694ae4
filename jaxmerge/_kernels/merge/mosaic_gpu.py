"""`merge` and `unmerge` on Hopper: every row of the result is read from its members, added in float32 and written once.

A block has 64 segments. Its threads share the ids out and compare all of them with all 64 segments: how many members, which
is first and which last. Then each thread takes rows in turn, several at a time, and asks for the next before it writes: a
segment of one is copied, of two added up, a longer one looks for the members between, id by id. So nothing is sorted and no sum
is atomic: members are added in the order of their positions. It suits plans that keep most tokens as they are, and those whose
segments are runs.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int

from jaxmerge._kernels import _mosaic_gpu as mgpu
from jaxmerge._kernels._dispatch import target, tuned

TILE = 64
"""Segments of a block."""
LANES = 128
THREADS = 2
ROWS = 16 * 1024
"""Bytes that a thread asks for at a time: 32 registers of each lane."""
AHEAD = 8
"""Ids, or words of bits, that are looked at together."""
AT_ONCE = 8
"""Ids that each lane asks for together."""
WORD = 32
SCATTERED = 32
CANDIDATES = {"merge": ({"find": "compare"}, *({"find": "scatter", "tile": tile} for tile in (16, 32, 64)))}
MOST_POSITIONS = 8192
NONE = 1 << 30


def merge(
    ids: Int[Array, "B n"],
    x: Float[Array, "B n d"],
    weight: Float[Array, "B n"] | None = None,
    *,
    m: int,
    mean: bool,
    find: Literal["compare", "scatter"] | None = None,
    tile: int | None = None,
    threads: int | None = None,
    interpret=None,
) -> tuple[Float[Array, "B m d"], Float[Array, "B m"]]:
    """`ref.merge`.

    Args:
      find: how a block finds the members of its segments; as measured, where left out.
      tile: segments of a block that scatters.
      threads: of a block that compares: more where there are too few blocks to fill the chip.
    """
    ids = jnp.pad(ids, ((0, 0), (0, max(0, LANES - ids.shape[1]))), constant_values=-1)
    found = {} if find else settings("merge", ids, x, weight, m=m, mean=mean)
    find, tile = find or found["find"], tile or found.get("tile", SCATTERED)
    form = functools.partial(_compare, threads=threads) if find == "compare" else functools.partial(_scatter, tile=tile)
    return form(ids, x, weight, m=m, mean=mean, interpret=interpret)


class Members(NamedTuple):
    """What a thread knows of its segments: of each how many members, the first and the last, and how to find one between."""

    count: Callable[[Any], Array]
    first: Callable[[Any], Array]
    last: Callable[[Any], Array]
    after: Callable[[Any, Array, Array], Array]
    """Of a slot, a member and whether the next is the last: the next."""


def _compare(ids, x, weight, *, m: int, mean: bool, threads: int | None, interpret):
    (B, n), width = x.shape[:2], ids.shape[1]
    padded = -(-width // LANES) * LANES
    threads = threads or (THREADS if B * -(-m // TILE) > mgpu.BLOCKS else 2 * THREADS)

    def merge_rows(ids, x, weight, y, mass, ids_here, first, last, count, one_first, one_last, one_count, sync):
        b, tile, t = lax.axis_index("row"), lax.axis_index("tile"), lax.axis_index("thread")

        def together():
            plgpu.barrier_arrive(sync)
            plgpu.barrier_wait(sync)

        @pl.when(t == 0)
        def _():
            ids_here[pl.ds(width, LANES)] = mgpu.line(jnp.full((LANES,), -1, jnp.int32))

        @pl.loop(0, -(-padded // LANES // threads))
        def _(i):
            at = jnp.minimum((i * threads + t) * LANES, width - LANES)
            ids_here[pl.ds(at, LANES)] = mgpu.line(mgpu.load(ids.at[b, pl.ds(at, LANES)]))

        together()

        square = (TILE, TILE)
        mine = mgpu.iota(square, 0) + tile * TILE
        column = lambda value: plgpu.layout_cast(jnp.full((TILE,), value, jnp.int32), plgpu.Layout.WGMMA.reduce(1))

        def scan(i, found):
            at = pl.multiple_of((i * threads + t) * TILE, TILE)
            same = lax.broadcast_in_dim(mgpu.columns(ids_here.at[pl.ds(at, TILE)]), square, (1,)) == mine
            lowest = jnp.min(jnp.where(same, mgpu.iota(square, 1), NONE), axis=1) + at
            highest = jnp.max(jnp.where(same, mgpu.iota(square, 1), -NONE), axis=1) + at
            count = jnp.sum(jnp.where(same, 1, 0), axis=1)
            return jnp.minimum(found[0], lowest), jnp.maximum(found[1], highest), found[2] + count

        rounds = (padded // TILE - t + threads - 1) // threads
        of_none = column(NONE), column(0), column(0)
        one_first[t], one_last[t], one_count[t] = lax.fori_loop(0, rounds, scan, of_none)
        together()
        for whole, parts, both in ((first, one_first, jnp.minimum), (last, one_last, jnp.maximum), (count, one_count, jnp.add)):
            whole[t] = functools.reduce(both, [mgpu.rows(parts.at[other]) for other in range(threads)])

        def after(s, p, is_last):
            def look(state):
                at, _ = state
                found = NONE
                for u in reversed(range(AHEAD)):
                    found = jnp.where(ids_here[at + u] == tile * TILE + s, at + u, found)
                return at + AHEAD, found

            known = jnp.where(is_last, last[t, s], NONE)
            return lax.while_loop(lambda state: state[1] == NONE, look, (p + 1, known))[1]

        members = Members(lambda s: count[t, s], lambda s: first[t, s], lambda s: last[t, s], after)
        _move(
            x, weight, y, mass, members, b=b, start=tile * TILE, m=m, mean=mean, of=TILE, thread=t, threads=threads
        )

    scratch = dict(
        ids_here=plgpu.SMEM((padded + LANES,), jnp.int32),
        **{name: plgpu.SMEM((threads, TILE), jnp.int32) for name in ("first", "last", "count")},
        **{f"one_{name}": plgpu.SMEM((threads, TILE), jnp.int32) for name in ("first", "last", "count")},
        sync=plgpu.Barrier(num_arrivals=threads),
    )
    return mgpu.kernel(
        merge_rows, (ids, x, weight), scratch,
        out=(jax.ShapeDtypeStruct((B, m, x.shape[2]), x.dtype), jax.ShapeDtypeStruct((B, m), jnp.float32)),
        grid=dict(row=B, tile=-(-m // TILE)), threads=threads, interpret=interpret,
    )  # fmt: skip


def _scatter(ids, x, weight, *, m: int, mean: bool, tile: int, interpret):
    (B, n), width = x.shape[:2], ids.shape[1]
    chunks, words = -(-n // LANES), -(-n // WORD)
    padded = -(-(words + AHEAD) // AHEAD) * AHEAD  # of zeros, so that AHEAD words can be read from any
    slots = -(-tile // LANES) * LANES

    def merge_rows(ids, x, weight, y, mass, first, last, count, bits):
        b, start = lax.axis_index("row"), lax.axis_index("tile") * tile
        for table, blank in ((first, NONE), (last, -1), (count, 0), (bits, 0)):
            table[...] = mgpu.line(jnp.full(table.shape, blank, jnp.int32))

        @pl.loop(0, -(-chunks // AT_ONCE))
        def _(i):
            at = [i * AT_ONCE * LANES + u * LANES for u in range(min(AT_ONCE, chunks))]
            safe = [jnp.minimum(p, width - LANES) for p in at]
            asked = [mgpu.line(mgpu.load(ids.at[b, pl.ds(p, LANES)])) for p in safe]

            @pl.when(i == 0)
            def _():
                mgpu.together()  # all is blank

            for p, q, id in zip(at, safe, asked, strict=True):
                position = mgpu.line_iota() + q
                slot = id - start
                slot = jnp.where((slot >= 0) & (slot < tile) & (position >= p), slot, -1)  # the last ones overlap
                mgpu.scatter("min", first, slot, position)
                mgpu.scatter("max", last, slot, position)
                mgpu.scatter("add", count, slot, jnp.ones_like(slot))
                mgpu.scatter("or", bits, slot * padded + (position >> 5), jnp.left_shift(1, position & 31))

        mgpu.together()

        def after(s, p, is_last):
            def look(state):
                at, _, _ = state
                where, what = at, jnp.int32(0)
                for u in reversed(range(AHEAD)):
                    word = bits[s * padded + at + u]
                    where, what = jnp.where(word != 0, at + u, where), jnp.where(word != 0, word, what)
                return at + AHEAD, where, what

            word = p >> 5
            rest = bits[s * padded + word] & jnp.left_shift(-2, p & 31)
            found = jnp.where(is_last, 1, rest)
            _, where, what = lax.while_loop(lambda state: state[2] == 0, look, (word + 1, word, found))
            return jnp.where(is_last, last[s], where * WORD + 31 - lax.clz(what & -what))

        members = Members(lambda s: count[s], lambda s: first[s], lambda s: last[s], after)
        _move(x, weight, y, mass, members, b=b, start=start, m=m, mean=mean, of=tile, thread=0, threads=1)

    scratch = dict(
        **{name: plgpu.SMEM((slots,), jnp.int32) for name in ("first", "last", "count")},
        bits=plgpu.SMEM((tile * padded,), jnp.int32),
    )
    return mgpu.kernel(
        merge_rows, (ids, x, weight), scratch,
        out=(jax.ShapeDtypeStruct((B, m, x.shape[2]), x.dtype), jax.ShapeDtypeStruct((B, m), jnp.float32)),
        grid=dict(row=B, tile=-(-m // tile)), threads=1, interpret=interpret,
        unsafe_no_auto_barriers=True,  # nothing is written that is read here, but before `together`
    )  # fmt: skip


def _move(x, weight, y, mass, members: Members, *, b, start, m: int, mean: bool, of: int, thread, threads: int):
    """A thread's turns: it asks for the first members of some segments, and writes those that it asked for before."""
    d = x.shape[2]
    share = of // threads
    at_once = next(u for u in (8, 4, 2, 1) if u * d * x.dtype.itemsize <= ROWS or u == 1)
    w = (lambda p: weight[b, p]) if weight is not None else (lambda p: jnp.float32(1))

    def ask(i):
        """Some segments' first members, all asked for before any is waited for."""
        some = [(i * threads + thread) * at_once + u for u in range(at_once)]
        at = [jnp.where(members.count(s) > 0, members.first(s), 0) for s in some]
        return [(mgpu.read_row(x, b, p), w(p)) for p in at]

    def write(i, asked):
        for u, (row, own) in enumerate(asked):
            s = (i * threads + thread) * at_once + u
            segment, size = start + s, members.count(s)

            def put(total, f, *rows, segment=segment):
                mass[b, segment] = total
                mgpu.write_row(y, b, segment, mgpu.per_part(f, *rows))

            @pl.when((segment < m) & (size <= 1))
            def _(size=size, row=row, own=own, put=put):
                own = jnp.where(size > 0, own, 0.0)
                there = own != 0 if mean else size > 0
                itself = mean or weight is None  # the mean of one is itself
                scaled = lambda row: row if itself else row.astype(jnp.float32) * own
                put(own, lambda row: or_zero(there, scaled(row)), row)

            @pl.when((segment < m) & (size > 1))
            def _(s=s, size=size, row=row, own=own, put=put):
                def add(i, state):
                    p, total, sum = state
                    p = members.after(s, p, i == size - 1)
                    more = w(p)
                    joined = lambda sum, row: sum + row.astype(jnp.float32) * more
                    return p, total + more, mgpu.per_part(joined, sum, mgpu.read_row(x, b, p))

                start = mgpu.per_part(lambda row: row.astype(jnp.float32) * own, row)
                _, total, sum = lax.fori_loop(1, size, add, (members.first(s), own, start))
                factor = 1 / jnp.where(total == 0, 1.0, total)
                put(total, lambda row: or_zero(total != 0, row * factor) if mean else row, sum)  # 0 times NaN is no 0

    turns = share // at_once

    def turn(i, asked):
        more = ask(jnp.minimum(i + 1, turns - 1))
        write(i, asked)
        return more

    lax.fori_loop(0, turns, turn, ask(jnp.int32(0)))


def unmerge(
    ids: Int[Array, "B n"],
    y: Float[Array, "B m d"],
    before: Float[Array, "B m"] | None = None,
    after: Float[Array, "B n"] | None = None,
    *,
    at_once: int = 4,
    interpret=None,
) -> Float[Array, "B n d"]:
    B, n = ids.shape
    m, d = y.shape[1:]

    def unmerge_rows(ids, y, before, after, x):
        b, block, t = lax.axis_index("row"), lax.axis_index("block"), lax.axis_index("thread")
        some = [(block * THREADS + t) * at_once + u for u in range(at_once)]
        at = [ids[b, jnp.minimum(i, n - 1)] for i in some]
        inside = [(s >= 0) & (s < m) for s in at]
        safe = [jnp.where(ok, s, 0) for ok, s in zip(inside, at, strict=True)]
        read = [mgpu.read_row(y, b, s) for s in safe]  # all asked for before any is waited for
        ones = [jnp.float32(1)] * at_once
        first = ones if before is None else [before[b, s] for s in safe]
        then = ones if after is None else [after[b, jnp.minimum(i, n - 1)] for i in some]
        for u, i in enumerate(some):

            @pl.when(i < n)
            def _(u=u, i=i):
                plain = before is None and after is None
                scaled = lambda row: row if plain else row.astype(jnp.float32) * (first[u] * then[u])
                mgpu.write_row(x, b, i, mgpu.per_part(lambda row: or_zero(inside[u], scaled(row)), read[u]))

    return mgpu.kernel(
        unmerge_rows, (ids, y, before, after), {},
        out=(jax.ShapeDtypeStruct((B, n, d), y.dtype),),
        grid=dict(row=B, block=-(-n // (THREADS * at_once))), threads=THREADS, interpret=interpret,
        unsafe_no_auto_barriers=True,  # nothing that is written is read here
    )[0]  # fmt: skip


def settings(op, *arrays, **static):
    return {"find": "compare"}


def or_zero(there: Array, row: Array) -> Array:
    """The row, or zeros where it is not there."""
    return jnp.where(jnp.broadcast_to(there, row.shape), row, jnp.zeros_like(row))


device_refusals = mgpu.device_refusals


def refusals(op: str, ids: Any, x: Any, *rest: Any, m: int | None = None, mean: bool = False) -> list[str]:
    """Why this merge or unmerge cannot be a kernel."""
    why, n = mgpu.row_refusals(x), ids.shape[1]
    if min(n, x.shape[1], x.shape[1] if m is None else m) == 0:
        why.append("there is nothing to do")
    if op == "merge" and n > MOST_POSITIONS:
        why.append(f"{n} positions: each block reads all ids, of at most {MOST_POSITIONS}")
    return why


def faster(op: str, ids: Any, x: Any, *rest: Any, m: int | None = None, mean: bool = False, kind: str) -> bool:
    """Unmerge everywhere; merge where a search among all ids is short beside the rows. Measured on an H200."""
    return op == "unmerge" or ids.shape[1] <= 2048
