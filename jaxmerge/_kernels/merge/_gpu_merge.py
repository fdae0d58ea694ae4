"""Two ways to find the members of segments on Hopper, and from there one way to move the rows: one launch in either case.

compare: a block of 64 segments compares all ids of its row of the batch with all 64, seven operations a pair, between barriers;
rows are stored between barriers too, 54 in the program. It was measured on an H200: 54 % of a copy's bandwidth at 197 tokens of
768 bfloat16 features, 57 % at 577, a batch of 64. Of its blocks (256 lanes, 109 registers) two are on a multiprocessor at a
time. So the 576 of 577 tokens come in 2.2 waves, and each begins with a search in which no row is moved.

scatter: a block is one thread, 128 lanes, and has 16 to 64 segments. Each lane reads every 128th id, and puts its position
where the segment's members are noted, by reductions in shared memory: the first, the last, how many, and a bit for each, from
which those between are read in order, 32 positions a word. That is n steps, not 64 n, with two barriers in all, and 64 to 79
registers leave room for six to eight blocks. It was never timed. On paper: at 577 tokens a block of 32 reads 2.3 KB of ids from
L2 for the 96 KiB of rows that it moves, and begins to move them one load and some 150 cycles later than `unmerge` does, which
reaches 76 and 88 % of a copy's bandwidth there. With half a microsecond to one more, at 4 TB/s, that is 70 to 73 % at 197
tokens, where a copy takes 9.3 us, and 83 to 86 % at 577, where it takes 27.

A launch of its own that writes first, last and count for a second one to move rows would read 4 n and write 12 m bytes a row
of the batch, less than 1 % of what is moved, but it takes 2.5 to 3 us before the other starts: 62 and 81 %.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int

from jaxmerge._kernels import _mosaic_gpu as mgpu

TILE = 64
"""Segments of a block that compares."""
LANES = mgpu.LANES
THREADS = 2
ROWS = 16 * 1024
"""Bytes that a thread asks for at a time, 32 registers of each lane, where it compares; half of them where it scatters."""
AHEAD = 8
"""Ids, or words of bits, that are looked at together."""
AT_ONCE = 8
"""Ids that each lane asks for together, where it scatters."""
WORD = 32
NONE = 1 << 30


class Members(NamedTuple):
    """What a thread knows of its segments: of each how many members, the first and the last, and how to find one between."""

    count: Callable[[Any], Array]
    first: Callable[[Any], Array]
    last: Callable[[Any], Array]
    after: Callable[[Any, Array, Array], Any]
    """Of a slot, a member and whether the next is the last: the next."""


Merged = tuple[Float[Array, "B m d"], Float[Array, "B m"]]


def compare(
    ids: Int[Array, "B width"],
    x: Float[Array, "B n d"],
    weight: Float[Array, "B n"] | None,
    *,
    m: int,
    mean: bool,
    interpret: Any,
    threads: int | None = None,
) -> Merged:
    """`ref.merge` of rows of at least 128 ids; `threads` of a block: more where there are too few blocks to fill the chip."""
    B, width = ids.shape
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
            """Id by id."""

            def look(state):
                at, _ = state
                found = NONE
                for u in reversed(range(AHEAD)):
                    found = jnp.where(ids_here[at + u] == tile * TILE + s, at + u, found)
                return at + AHEAD, found

            known = jnp.where(is_last, last[t, s], NONE)
            return lax.while_loop(lambda state: state[1] == NONE, look, (p + 1, known))[1]

        members = Members(lambda s: count[t, s], lambda s: first[t, s], lambda s: last[t, s], after)

        at_once = _at_once(x, ROWS)
        slots = lambda i: [(i * threads + t) * at_once + u for u in range(at_once)]
        turns = TILE // threads // at_once
        _move(x, weight, y, mass, members, slots, turns, b=b, start=tile * TILE, m=m, mean=mean, peeled=False)

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


def scatter(
    ids: Int[Array, "B width"],
    x: Float[Array, "B n d"],
    weight: Float[Array, "B n"] | None,
    *,
    m: int,
    mean: bool,
    interpret: Any,
    tile: int = 32,
    at_once: int | None = None,
) -> Merged:
    """`ref.merge` of rows of at least 128 ids; `tile` segments of a block, a multiple of 16, `at_once` of them in a turn."""
    B, width = ids.shape
    span = LANES * min(AT_ONCE, width // LANES)
    unrolled = min(2, -(-width // span))
    words = -(-width // WORD) | 1  # an odd number: those of consecutive segments are in different banks
    whole = lambda size: plgpu.SMEM((-(-size // LANES) * LANES,), jnp.int32)
    at_once = at_once or min(4, _at_once(x, ROWS // 2))

    def merge_rows(ids, x, weight, y, mass, first, last, count, bits):
        b, start = lax.axis_index("row"), lax.axis_index("tile") * tile
        for table, blank in ((first, NONE), (last, -1), (count, 0), (bits, 0)):
            table[...] = mgpu.line(jnp.full(table.shape, blank, jnp.int32))

        mgpu.together()

        @pl.loop(0, -(-width // (unrolled * span)))
        def _(i):
            at = [(i * unrolled + u) * span for u in range(unrolled)]
            inside = [jnp.minimum(p, width - span) for p in at]
            asked = [mgpu.line(mgpu.load(ids.at[b, pl.ds(p, span)])) for p in inside]
            for p, q, id in zip(at, inside, asked, strict=True):
                position, slot = mgpu.line_iota(span) + q, id - start
                slot = jnp.where((slot >= 0) & (slot < tile) & (position >= p), slot, -1)  # what overlaps counts once
                mgpu.scatter("min", first, slot, position)
                mgpu.scatter("max", last, slot, position)
                mgpu.scatter("add", count, slot, jnp.ones_like(slot))
                mgpu.scatter("or", bits, slot * words + (position >> 5), jnp.left_shift(1, position & 31))

        mgpu.together()

        def after(s, p, is_last):
            """The next bit that is set behind that of p."""

            def look(state):
                at, _, _ = state
                where, what = at, jnp.int32(0)
                for u in reversed(range(AHEAD)):
                    word = bits[s * words + at + u]
                    where, what = jnp.where(word != 0, at + u, where), jnp.where(word != 0, word, what)
                return at + AHEAD, where, what

            word = p >> 5
            rest = bits[s * words + word] & jnp.left_shift(-2, p & 31)
            found = jnp.where(is_last, 1, rest)
            _, where, what = lax.while_loop(lambda state: state[2] == 0, look, (word + 1, word, found))
            return jnp.where(is_last, last[s], where * WORD + 31 - lax.clz(what & -what))

        members = Members(lambda s: count[s], lambda s: first[s], lambda s: last[s], after)
        slots = lambda i: [i * at_once + u for u in range(at_once)]
        _move(x, weight, y, mass, members, slots, tile // at_once, b=b, start=start, m=m, mean=mean, peeled=True)

    scratch = dict(
        **{name: whole(tile) for name in ("first", "last", "count")},
        bits=whole(tile * words + AHEAD),  # where the last segment's are read a few at a time, there is something
    )
    return mgpu.kernel(
        merge_rows, (ids, x, weight), scratch,
        out=(jax.ShapeDtypeStruct((B, m, x.shape[2]), x.dtype), jax.ShapeDtypeStruct((B, m), jnp.float32)),
        grid=dict(row=B, tile=-(-m // tile)), threads=1, interpret=interpret,
        unsafe_no_auto_barriers=True,  # nothing is written that is read here, but before `together`
    )  # fmt: skip


def _at_once(x, most: int) -> int:
    """How many rows of x are no more than so many bytes."""
    return next(u for u in (8, 4, 2, 1) if u * x.shape[2] * x.dtype.itemsize <= most or u == 1)


def _move(x, weight, y, mass, members: Members, slots, turns: int, *, b, start, m: int, mean: bool, peeled: bool):
    """A thread's turns, `slots(i)`: it asks for the first members of some segments, and writes those asked for before.

    The last turn is `peeled` off the loop, or asks for its own rows again: a program half as long.
    """
    w = (lambda p: weight[b, p]) if weight is not None else (lambda p: jnp.float32(1))

    def ask(i):
        """Some segments' first members, all asked for before any is waited for."""
        at = [jnp.where(members.count(s) > 0, members.first(s), 0) for s in slots(i)]
        return [(mgpu.read_row(x, b, p), w(p)) for p in at]

    def write(i, asked):
        for s, (row, own) in zip(slots(i), asked, strict=True):
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

    def turn(i, asked):
        more = ask(i + 1 if peeled else jnp.minimum(i + 1, turns - 1))
        write(i, asked)
        return more

    asked = lax.fori_loop(0, turns - peeled, turn, ask(jnp.int32(0)))
    if peeled:
        write(jnp.int32(turns - 1), asked)


def or_zero(there: Array, row: Array) -> Array:
    """The row, or zeros where it is not there."""
    return jnp.where(jnp.broadcast_to(there, row.shape), row, jnp.zeros_like(row))
