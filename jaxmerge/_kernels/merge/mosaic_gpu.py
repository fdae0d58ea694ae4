"""`merge` and `unmerge` on Hopper: every row of the result is read from its members, added in float32 and written once.

A block of `merge` is one thread, 128 lanes, and has a few segments. Each lane reads every 128th id, and notes its position in
the tables of the segment, by reductions in shared memory: the first member, the last, how many, and a bit for each, 32
positions a word. Then the block takes its segments in turns, and asks for the next turn's first members before it writes: one
alone is copied, to others those behind are added as the bits have them. So nothing is sorted, no sum is atomic, and members
are added in the order of their positions.

Measured on an H200 that copies 4.29 TB/s, in bfloat16: 66 % of that at 197 tokens of 768 features of which 13 leave, and 79 %
at 577 of which 40 leave (batches of 64). Where most segments have several members, found and fetched one after another, it is
23 % at 4096 tokens of 320 features of which half leave, and 35 % where 1024 bytes of 1472 features become 256. Blocks of 32 or
64 segments are slower nearly everywhere. Memory is idle until members are known; to send for x in the meantime, as it lies, to
the second cache made the first of these slower, 14.9 microseconds instead of 13.1.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int

from jaxmerge._kernels import _mosaic_gpu as mgpu
from jaxmerge._kernels._dispatch import target, tuned

CANDIDATES = {"merge": tuple({"tile": tile, "joined": joined} for joined in (1, 4) for tile in (16, 8))}
LANES = mgpu.LANES
THREADS = 2
"""Of a block that unmerges."""
MOST_POSITIONS = 8192
ROWS = 8 * 1024
"""Bytes of first members that are asked for in a turn, 16 registers of each lane."""
AHEAD = 8
"""Ids that each lane asks for together, or words of bits that are looked at together."""
WORD = 32
NONE = 1 << 30


def merge(
    ids: Int[Array, "B n"],
    x: Float[Array, "B n d"],
    weight: Float[Array, "B n"] | None = None,
    *,
    m: int,
    mean: bool,
    tile: int = 0,
    joined: int = 0,
    at_once: int = 0,
    interpret: Any = None,
) -> tuple[Float[Array, "B m d"], Float[Array, "B m"]]:
    """`ref.merge`.

    Args:
      tile: segments of a block, a multiple of `at_once`; if left out, as measured for such rows with weights, or else 16.
      joined: how many members behind the first are asked for together, likewise, or else 1. Where there are fewer, the last
        is asked for again, which is on its way.
      at_once: segments of a turn; if left out, a power of two, at most 4 and no more than ROWS.
    """
    with_weights = ids, x, jax.ShapeDtypeStruct(ids.shape, jnp.float32)
    found = tuned("merge", "mosaic_gpu", target().kind, with_weights, m=m, mean=True)
    tile, joined = tile or found.get("tile", 16), joined or found.get("joined", 1)
    B, n, d = x.shape
    at_once = at_once or next(u for u in (4, 2, 1) if u * d * x.dtype.itemsize <= ROWS or u == 1)
    turns, peeled = tile // at_once, joined == 1  # else the last turn asks for its own rows again: half as much to compile
    ids = jnp.pad(ids, ((0, 0), (0, max(0, LANES - n))), constant_values=-1)
    words = -(-ids.shape[1] // WORD) | 1  # an odd number: those of consecutive segments are in different banks

    def merge_rows(ids, x, weight, y, mass, first, last, count, bits):
        b, start = lax.axis_index("row"), lax.axis_index("tile") * tile
        w = (lambda p: weight[b, p]) if weight is not None else (lambda p: jnp.float32(1))
        for table, blank in ((first, NONE), (last, -1), (count, 0), (bits, 0)):
            table[...] = mgpu.line(jnp.full(table.shape, blank, jnp.int32))

        mgpu.together()
        _note(ids.at[b], start, tile, words, first, last, count, bits)
        mgpu.together()

        def ask(turn):
            """The first members of its segments and their weights, all asked for before any is waited for."""
            slots = [turn * at_once + u for u in range(at_once)]
            at = [jnp.where(count[s] > 0, first[s], 0) for s in slots]
            return [(mgpu.read_row(x, b, p), w(p)) for p in at]

        def write(turn, asked):
            for u, (row, own) in enumerate(asked):
                s = turn * at_once + u
                segment, size = start + s, count[s]

                def put(total, f, row, segment=segment):
                    mass[b, segment] = total
                    mgpu.write_row(y, b, segment, mgpu.per_part(f, row))

                @pl.when((segment < m) & (size <= 1))
                def _(size=size, row=row, own=own, put=put):
                    own = jnp.where(size > 0, own, 0.0)
                    there = own != 0 if mean else size > 0
                    itself = mean or weight is None  # the mean of one is itself
                    scaled = lambda row: row if itself else row.astype(jnp.float32) * own
                    put(own, lambda row: or_zero(there, scaled(row)), row)

                @pl.when((segment < m) & (size > 1))
                def _(s=s, size=size, row=row, own=own, put=put):
                    total, sum = add_others(s, size, own, mgpu.per_part(lambda row: row.astype(jnp.float32) * own, row))
                    factor = 1 / jnp.where(total == 0, 1.0, total)
                    put(total, lambda row: or_zero(total != 0, row * factor) if mean else row, sum)  # 0 times NaN is no 0

        def add_others(s, size, total, sum):
            """To a segment's first member, weighted, the others in order."""

            def plus(state, member):
                (total, sum), (row, own, there) = state, member
                only = (lambda v: v) if there is None else lambda v: or_zero(there, v)
                return total + only(own), mgpu.per_part(lambda sum, row: sum + only(row.astype(jnp.float32) * own), sum, row)

            def add(i, state):
                p, *sums = state
                members = []
                for u in range(joined):
                    k = 1 + i * joined + u  # of 0 to size - 1; the first of a round is always there
                    between = k < size - 1
                    p = jnp.where(between, _next(bits, s * words, p, between), last[s])
                    members.append((mgpu.read_row(x, b, p), w(p), k < size if u else None))
                return p, *functools.reduce(plus, members, sums)

            rounds = (size - 2 + joined) // joined
            return lax.fori_loop(0, rounds, add, (first[s], total, sum))[1:]

        def take(turn, asked):
            more = ask(turn + 1 if peeled else jnp.minimum(turn + 1, turns - 1))
            write(turn, asked)
            return more

        asked = lax.fori_loop(0, turns - peeled, take, ask(jnp.int32(0)))
        if peeled:
            write(jnp.int32(turns - 1), asked)

    table = lambda size: plgpu.SMEM((-(-size // LANES) * LANES,), jnp.int32)
    return mgpu.kernel(
        merge_rows, (ids, x, weight),
        dict(first=table(tile), last=table(tile), count=table(tile), bits=table(tile * words + AHEAD)),  # AHEAD: see `_next`
        out=(jax.ShapeDtypeStruct((B, m, d), x.dtype), jax.ShapeDtypeStruct((B, m), jnp.float32)),
        grid=dict(row=B, tile=-(-m // tile)), threads=1, interpret=interpret,
        unsafe_no_auto_barriers=True,  # nothing is written that is read here, but before `together`
    )  # fmt: skip


def _note(ids: Any, start: Any, tile: int, words: int, first: Any, last: Any, count: Any, bits: Any) -> None:
    """Put the members of the segments from `start` on into their tables; ids are at least as many as lanes."""
    width = ids.shape[0]
    span = LANES * min(AHEAD, width // LANES)
    unrolled = min(2, -(-width // span))

    @pl.loop(0, -(-width // (unrolled * span)))
    def _(i):
        at = [(i * unrolled + u) * span for u in range(unrolled)]
        inside = [jnp.minimum(p, width - span) for p in at]
        asked = [mgpu.line(mgpu.load(ids.at[pl.ds(p, span)])) for p in inside]
        for p, q, id in zip(at, inside, asked, strict=True):
            position, slot = mgpu.line_iota(span) + q, id - start
            slot = jnp.where((slot >= 0) & (slot < tile) & (position >= p), slot, -1)  # what overlaps counts once
            mgpu.scatter("min", first, slot, position)
            mgpu.scatter("max", last, slot, position)
            mgpu.scatter("add", count, slot, jnp.ones_like(slot))
            mgpu.scatter("or", bits, slot * words + (position >> 5), jnp.left_shift(1, position & 31))


def _next(bits: Any, start: Any, p: Array, wanted: Array) -> Array:
    """The position of the next bit behind p that is set, of the words from `start` on; anything where none is wanted.

    Words are looked at a few together: behind those of the last segment there must be as many more.
    """

    def look(state):
        at, _, _ = state
        where, what = at, jnp.int32(0)
        for u in reversed(range(AHEAD)):
            word = bits[start + at + u]
            where, what = jnp.where(word != 0, at + u, where), jnp.where(word != 0, word, what)
        return at + AHEAD, where, what

    word = p >> 5
    rest = bits[start + word] & jnp.left_shift(-2, p & 31)
    _, where, what = lax.while_loop(lambda state: state[2] == 0, look, (word + 1, word, jnp.where(wanted, rest, 1)))
    return where * WORD + 31 - lax.clz(what & -what)


def or_zero(there: Array, row: Array) -> Array:
    """The row, or zeros where it is not there."""
    return jnp.where(jnp.broadcast_to(there, row.shape), row, jnp.zeros_like(row))


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
    """Measured on an H200: everywhere, of merges the longest at 4096 positions."""
    return True
