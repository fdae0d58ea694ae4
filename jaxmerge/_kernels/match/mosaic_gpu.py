"""`match`, `energy` and the nearest on Hopper: similarities by wgmma, what they come to in registers, no score in memory.

Two launches. `prepare` scales every key by a power of two and takes its inverse norm. The products are then of raw bfloat16
numbers, exact in float32; the inverse norms are applied to the sums, so one pass is as good as float32. A float32 metric is
cut into three bfloat16 parts, high to low, and the six products that matter are added. For distances rows stay as they are,
and their squared lengths take the place of inverse norms.

A block of `sweep` has 128 queries, two compute threads of 64 each, and a thread that keeps a ring of key tiles full. A thread
makes its own queries ready and holds them in registers. Those that do not fit there are made ready with the keys and stay in
shared memory, which the matrix unit then reads for both; those too wide for that pass through the ring too, a chunk of features
beside the keys' same chunk, and XLA makes such rows ready. The keys of a query may be split among blocks.
A compute thread holds, for each query and each of `slots` columns, the best score yet and the group of `slots` keys that it
is from: four instructions a score. Rows are reduced once, at the end; strict comparisons and a minimum over positions make the
first of equals win. For the energy it holds sums there instead; for the nearest a list, in order, of the least that each
column has seen, into which a score is inserted by a minimum and a maximum for every place. A row's least are then taken from
the heads of its columns' lists, one by one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Bool, Float, Int

from jaxmerge._kernels import _mosaic_gpu as mgpu
from jaxmerge._kernels._dispatch import target, tuned
from jaxmerge._kernels.match import _collect as collecting
from jaxmerge._kernels.match._peaks import by_sweeps
from jaxmerge._kernels.match.ref import Kernel, resemblance

TILE = 64
"""Queries of one compute thread."""
QUERIES = 2 * TILE
KEYS = 128
"""Keys of a tile."""
MOST_NEIGHBORS = 16
HELD = 112
"""Registers of each lane, at most, for its queries, what is collected of them, and what is added to scores or compared."""
LISTS = 80
"""Registers of each lane, at most, for what is nearest to a query in each column."""
CANDIDATES = {
    "match": tuple({"slots": slots} for slots in (32, 16, 64)),
    "energy": tuple({"slots": slots} for slots in (32, 16, 64)),
    "nearest_k": tuple({"slots": slots} for slots in (32, 16, 8)),
    "nearest_ahead": tuple({"slots": slots} for slots in (32, 16, 64)),
}
"""Of more columns each has fewer scores to walk through, and there is more to reduce at the end."""


def match(
    a: Float[Array, "B n k"],
    b: Float[Array, "B m k"],
    *,
    a_ok: Bool[Array, "#B n"] | None = None,
    b_ok: Bool[Array, "#B m"] | None = None,
    window: int | None = None,
    slots: int | None = None,
    split: int | None = None,
    stages: int | None = None,
    interpret=None,
) -> tuple[Float[Array, "B n"], Int[Array, "B n"]]:
    """`ref.match`."""
    n, slots = a.shape[1], slots or _slots("match", (a, b), 32)
    split = split or _split(a.shape[0], n, b.shape[1])
    how = {"window": window, "slots": slots, "split": split, "stages": stages, "interpret": interpret}
    similarity, index = best(a, b, b_ok=b_ok, **how)
    similarity, index = similarity[:, :n], index[:, :n]
    if a_ok is not None:
        similarity, index = jnp.where(a_ok, similarity, -jnp.inf), jnp.where(a_ok, index, 0)
    return similarity, index


def best(a, b, *, b_ok=None, window=None, slots=32, split=1, stages=None, interpret=None):
    """`match` of queries padded to whole blocks; each looks at a part of the keys, if they are split."""
    split = min(split, -(-b.shape[1] // KEYS))
    how = {"window": window, "stages": stages, "interpret": interpret, "split": split}
    found, inverse = sweep(a, b, opened(b, b_ok), collecting.Best(), slots, **how)
    if inverse is None:
        return tuple(found)
    products, index = found
    part = jnp.argmax(products, axis=0)[None]  # the first of equals
    pick = lambda x: jnp.take_along_axis(x, part, axis=0)[0]
    return pick(products) * inverse, pick(index)


def energy(
    a: Float[Array, "B n k"],
    b: Float[Array, "B m k"],
    *,
    margin: float,
    kernel: Kernel = "shifted",
    alpha: float = 1.0,
    slots: int | None = None,
    stages: int | None = None,
    interpret=None,
) -> Float[Array, "B n"]:
    """`ref.energy`."""
    slots = slots or _slots("energy", (a, b), 32, margin=margin, kernel=kernel, alpha=alpha)
    f = lambda cosine: resemblance(cosine, margin, kernel, alpha, expm1=lambda x: jnp.exp(x) - 1)
    (sums,), _ = sweep(a, b, opened(b, None), collecting.Sums(f), slots, stages=stages, interpret=interpret)
    return sums[:, : a.shape[1]]


def nearest_k(
    a: Float[Array, "B n k"],
    b: Float[Array, "B m k"],
    *,
    count: int,
    b_ok: Bool[Array, "#B m"] | None = None,
    slots: int | None = None,
    stages: int | None = None,
    interpret=None,
) -> Float[Array, "B n count"]:
    """`ref.nearest_k`, where all rows are finite; one that is not is infinitely far from all."""
    most = next(s for s in (32, 16, 8) if count * s // 2 <= LISTS or s == 8)
    slots = slots or _slots("nearest_k", (a, b), most, count=count)
    least, _ = sweep(a, b, opened(b, b_ok), collecting.Least(count), slots, stages=stages, interpret=interpret)
    return jnp.stack(least, axis=-1)[:, : a.shape[1]]


def nearest_ahead(
    a: Float[Array, "B n k"],
    b: Float[Array, "B m k"],
    a_place: Int[Array, "B n"] | None = None,
    b_place: Int[Array, "B m"] | None = None,
    b_ok: Bool[Array, "B m"] | None = None,
    *,
    slots: int | None = None,
    stages: int | None = None,
    interpret=None,
) -> tuple[Float[Array, "B n"], Int[Array, "B n"], Float[Array, "B n"]]:
    """`ref.nearest_ahead`."""
    slots = slots or _slots("nearest_ahead", (a, b), 32)
    places = tuple(
        None if place is None else jnp.pad(place.astype(jnp.float32), ((0, 0), (0, -place.shape[1] % KEYS)))
        for place in (a_place, b_place)
    )
    found, _ = sweep(a, b, opened(b, b_ok), collecting.Ahead(), slots, stages=stages, interpret=interpret, places=places)
    return tuple(one[:, : a.shape[1]] for one in found)


peaks = by_sweeps(nearest_k, nearest_ahead)


def _slots(op: str, arrays: tuple[Array, Array], default: int, **static: Any) -> int:
    """The columns in which a thread collects: as measured on this kind of device, or else as given."""
    return int(tuned(op, "mosaic_gpu", target().kind, arrays, **static).get("slots", default))


def _split(batch: int, n: int, m: int) -> int:
    """Among how many blocks the keys of a query are split: as few as save the most rounds of tiles, if a quarter or more.

    Where blocks are few, or a few more than multiprocessors, some have nothing to do. Eight rounds pay for what follows.
    """
    blocks, tiles = batch * -(-n // QUERIES), -(-m // KEYS)
    rounds = {split: -(-blocks * split // mgpu.BLOCKS) * -(-tiles // split) for split in (1, 2, 3, 4)}
    split = min(rounds, key=lambda split: rounds[split])
    return split if rounds[1] - rounds[split] >= max(8, rounds[1] / 4) else 1


def opened(b: Array, b_ok: Array | None) -> Array | None:
    """What is added to every key's score: -inf where it may not be looked at, and behind the last."""
    m = b.shape[1]
    if b_ok is None and m % KEYS == 0:
        return None
    bias = jnp.zeros((1, m), jnp.float32) if b_ok is None else jnp.where(b_ok, 0.0, -jnp.inf).astype(jnp.float32)
    return jnp.pad(bias, ((0, 0), (0, -m % KEYS)), constant_values=-jnp.inf)


def prepare(xs: tuple[Array, ...], *, scaled: bool = True, interpret=None) -> list[tuple[Array, Array]]:
    """Of each x (B, n, k): its bfloat16 parts (parts, B, n', k') and inverse norms (B, n'), in one launch.

    n' is a multiple of 128, k' of what a swizzle holds. Added features are 0; added rows hold anything that is finite. Where
    rows are not scaled, their squared lengths come in place of the norms: inf for a row that is not finite, whose parts are 0.
    """
    given, (B, _, k) = xs, xs[0].shape
    parts, kp = _parts(xs[0]), _features(k)
    rows = [x.shape[1] for x in xs]
    lengths = [-(-n // QUERIES) * QUERIES for n in rows]
    xs = tuple(map(_flat, xs))
    counts = [length // TILE for length in lengths]
    if not _resident(parts, kp):
        return [_cut(x, (length, kp), parts, scaled) for x, length in zip(given, lengths, strict=True)]

    def body(*refs):
        xs_refs, outs, scratch = refs[: len(xs)], refs[len(xs) : 3 * len(xs)], refs[3 * len(xs) :]
        raw, cut, inv, loaded = scratch
        row, tile = lax.axis_index("row"), lax.axis_index("tile")
        for i in range(len(xs)):
            x, part_ref, inverse_ref = xs_refs[i], outs[2 * i], outs[2 * i + 1]
            before = sum(counts[:i])

            @pl.when((tile >= before) & (tile < before + counts[i]))
            def _(i=i, x=x, part_ref=part_ref, inverse_ref=inverse_ref, before=before):
                here = pl.ds((tile - before) * TILE, TILE)
                plgpu.copy_gmem_to_smem(x.at[pl.ds(row * rows[i] + (tile - before) * TILE, TILE)], raw, loaded)
                plgpu.barrier_wait(loaded)
                some, inv[...] = parted(raw, parts, scaled)
                for p, part in enumerate(some):
                    cut[p] = part
                plgpu.commit_smem()
                for p in range(parts):
                    plgpu.copy_smem_to_gmem(cut.at[p], part_ref.at[p, row, here])
                plgpu.copy_smem_to_gmem(inv, inverse_ref.at[row, here])
                plgpu.wait_smem_to_gmem(0)

    out = []
    for length in lengths:
        out += [jax.ShapeDtypeStruct((parts, B, length, kp), jnp.bfloat16), jax.ShapeDtypeStruct((B, length), jnp.float32)]
    scratch = (
        plgpu.SMEM((TILE, kp), xs[0].dtype),
        plgpu.SMEM((parts, TILE, kp), jnp.bfloat16, transforms=mgpu.tiled(kp)),
        plgpu.SMEM((TILE,), jnp.float32),
        plgpu.Barrier(),
    )
    found = mgpu.kernel(body, xs, scratch, out=out, grid=dict(row=B, tile=sum(counts)), threads=1, interpret=interpret)
    return list(zip(found[::2], found[1::2], strict=True))


def parted(raw: Any, parts: int, scaled: bool) -> tuple[list[Array], Array]:
    """Of rows in shared memory their bfloat16 parts, in registers, and their inverse norms, or squared lengths."""
    v = plgpu.layout_cast(mgpu.load(raw).astype(jnp.float32), plgpu.Layout.WGMMA)
    (v, inverse), some = (mgpu.unit(v) if scaled else mgpu.squared(v)), []
    for _ in range(parts):
        some.append(v.astype(jnp.bfloat16))
        v = v - some[-1].astype(jnp.float32)
    return some, inverse


def _flat(x: Array) -> Array:
    """The rows of all the batch, (rows, k'), as many as a tile has or more."""
    x = x.reshape(-1, x.shape[-1])
    return jnp.pad(x, ((0, max(0, TILE - len(x))), (0, _features(x.shape[1]) - x.shape[1])))


def _cut(x: Array, padded: tuple[int, int], parts: int, scaled: bool) -> tuple[Array, Array]:
    """What `prepare` makes of one x, by XLA: for rows that do not fit on chip, of which a sweep costs far more than this."""
    x = jnp.pad(x, ((0, 0), *((0, whole - size) for whole, size in zip(padded, x.shape[1:], strict=True))))
    rest, inverse = jax.vmap(mgpu.unit if scaled else mgpu.squared)(x.astype(jnp.float32))
    found = []
    for _ in range(parts):
        found.append(rest.astype(jnp.bfloat16))
        rest = rest - lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)  # a cast there and back may be left out
    return jnp.stack(found), inverse


def sweep(a, b, bias, collect, slots, *, window=None, stages=None, interpret=None, places=(None, None), split=1):
    """What is collected over the keys for each query, (B, n') each. Of `places`, keys below the query's are ahead of it.

    Of keys that are split, (split, B, n') each, as if the queries' numbers were 1; these come beside, (B, n'), else None.
    """
    B, rows, parts = *a.shape[:2], _parts(a)
    of_keys = [x for x in (bias, places[1]) if x is not None]  # a number for each column of a tile
    held = parts * _features(a.shape[2]) // 4 + len(collect.start) * slots // 2 + len(of_keys) * KEYS // 4 <= HELD
    *queries, (b, inverse_b) = prepare((b,) if held else (a, b), scaled=collect.scaled, interpret=interpret)
    ((a, inverse_a),) = queries or [(_flat(a), None)]
    (m, k), n = b.shape[2:], rows + -rows % QUERIES
    stay = held or _resident(parts, k)
    wide = _chunk(k) if stay else 64 if parts == 1 else 32  # features of a chunk
    chunks = k // wide
    tiles, blocks = m // KEYS, n // QUERIES
    steps, depth = (parts * chunks, 1) if stay else (chunks, parts)  # ring steps a tile, of so many parts of the keys' chunk
    lasting, passing = (2 * parts * chunks, 0) if stay else (0, 2 * parts)  # chunks of queries: for good, and in a ring step
    ring = mgpu.SHARED - (QUERIES * k * a.dtype.itemsize if held else lasting * TILE * wide * 2)
    stages = stages or min(8, ring // ((depth * KEYS + passing * TILE) * wide * 2))
    groups = KEYS // slots

    def each_step(turn: Callable[[Any, Sequence[int], Any], None]) -> None:
        """Call with the number of each ring step of a tile, its parts and its chunk: in a loop where there may be many."""
        if stay:
            for step in range(steps):
                turn(step, (step // chunks,), step % chunks)
        else:
            pl.loop(0, chunks)(lambda c: turn(c, range(parts), c))

    def body(a, b, inverse_a, inverse_b, bias, place_a, place_b, *outputs, queries, keys, ready, full, free):
        row, block, t = lax.axis_index("row"), lax.axis_index("block"), lax.axis_index("thread")
        part = lax.axis_index("part")
        low, high = (part * tiles // split, (part + 1) * tiles // split) if split > 1 else (jnp.int32(0), jnp.int32(tiles))
        if window is not None:
            low = jnp.minimum(jnp.maximum(low, jnp.maximum(block * QUERIES - window, 0) // KEYS), tiles)
            high = jnp.maximum(low, jnp.minimum((block * QUERIES + QUERIES - 1 + window) // KEYS + 1, high))
        slot = lambda step: lax.rem(step, jnp.int32(stages))

        @pl.when(t < 2)
        def _():
            plgpu.set_max_registers(232, action="increase")
            here = pl.ds(block * QUERIES + t * TILE, TILE)
            if stay:
                plgpu.barrier_wait(ready.at[t])
            own, inverse = parted(queries.at[t], parts, collect.scaled) if held else (None, None)
            of_query = lambda: mgpu.rows(inverse_a.at[row, here]) if inverse is None else inverse
            each_query = mgpu.by_row(of_query(), (TILE, slots)) if isinstance(collect, collecting.Sums) else None
            place = None if place_a is None else mgpu.by_row(mgpu.rows(place_a.at[row, here]), (TILE, slots))

            def tile(i: Any, found: Any) -> Any:
                at = pl.ds(i * KEYS, KEYS)
                scale = mgpu.columns(inverse_b.at[row, at])
                add = None if bias is None else mgpu.columns(bias.at[row if bias.shape[0] > 1 else 0, at])
                places = None if place_b is None else mgpu.columns(place_b.at[row, at])

                def products(multiply):
                    first = (i - low) * steps

                    @each_step
                    def _(step, some, c):
                        s = slot(first + step)
                        plgpu.barrier_wait(full.at[s])
                        for at, q in enumerate(some):
                            for p in range(parts - q):
                                if own is not None:
                                    left = own[p][:, c * wide : (c + 1) * wide]
                                else:
                                    left = queries.at[(t * parts + p) * chunks + c if stay else (s * 2 + t) * parts + p]
                                multiply(left, keys.at[s * depth + at].transpose((1, 0)))
                        plgpu.wgmma_wait(sum(parts - q for q in some))  # the step before has been read

                        @pl.when(step > 0)
                        def _():
                            plgpu.barrier_arrive(free.at[slot(first + step - 1)])

                score = mgpu.accumulated((TILE, KEYS), products)
                plgpu.barrier_arrive(free.at[slot((i - low) * steps + steps - 1)])
                for g in range(groups):
                    cut = slice(g * slots, (g + 1) * slots)
                    near = None
                    if window is not None:
                        away = mgpu.iota((TILE, slots), 0) + (block * QUERIES + t * TILE) - (i * KEYS + g * slots)
                        away = away - mgpu.iota((TILE, slots), 1)
                        near = (away <= window) & (away >= -window)
                    if places is not None and place is not None:
                        near = mgpu.by_column(places[cut], (TILE, slots)) < place
                    found = collect.fold(
                        found, score[:, cut], scale[cut], None if add is None else add[cut], each_query, i * groups + g, near
                    )
                return found

            matrix = lambda value, dtype: plgpu.layout_cast(jnp.full((TILE, slots), value, dtype), plgpu.Layout.WGMMA)
            found = lax.fori_loop(low, high, tile, tuple(matrix(*one) for one in collect.start))
            for ref, value in zip(outputs, collect.finish(found, of_query() if split == 1 else 1.0), strict=False):
                ref[part, row, here] = value
            if split > 1:
                outputs[-1][part, row, here] = of_query()

        @pl.when(t == 2)
        def _():
            plgpu.set_max_registers(40, action="decrease")

            def load_queries(c: Any, to: Callable[[int, int], Any], barrier: Callable[[int], Any]) -> None:
                for w in range(2):
                    rows = pl.ds(block * QUERIES + w * TILE, TILE)
                    for p in range(parts):
                        plgpu.copy_gmem_to_smem(a.at[p, row, rows, pl.ds(c * wide, wide)], queries.at[to(w, p)], barrier(w))

            for w in range(2 if held else 0):
                there = pl.ds(row * rows + block * QUERIES + w * TILE, TILE)
                plgpu.copy_gmem_to_smem(a.at[there], queries.at[w], ready.at[w])
            for c in range(chunks if stay and not held else 0):
                load_queries(c, lambda w, p, c=c: (w * parts + p) * chunks + c, lambda w: ready.at[w])

            @pl.loop(low, high)
            def _(i):
                @each_step
                def _(step, some, c):
                    step += (i - low) * steps
                    s = slot(step)

                    @pl.when(step >= stages)
                    def _():
                        plgpu.barrier_wait(free.at[s])

                    for at, q in enumerate(some):
                        tile = b.at[q, row, pl.ds(i * KEYS, KEYS), pl.ds(c * wide, wide)]
                        plgpu.copy_gmem_to_smem(tile, keys.at[s * depth + at], full.at[s])
                    if not stay:
                        load_queries(c, lambda w, p: (s * 2 + w) * parts + p, lambda w: full.at[s])

            @pl.loop(jnp.maximum((high - low) * steps - stages, 0), (high - low) * steps)
            def _(step):  # leave when all has been read
                plgpu.barrier_wait(free.at[slot(step)])

    chunk_of = lambda count, rows: plgpu.SMEM((count, rows, wide), jnp.bfloat16, transforms=mgpu.tiled(wide))
    scratch = dict(
        queries=plgpu.SMEM((2, TILE, k), a.dtype) if held else chunk_of(lasting + stages * passing, TILE),
        keys=chunk_of(stages * depth, KEYS),
        ready=plgpu.Barrier(num_arrivals=1 if held else parts * chunks, num_barriers=2) if stay else None,
        full=plgpu.Barrier(num_arrivals=depth + passing, num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    )
    found = mgpu.kernel(
        body, (a, b, inverse_a, inverse_b, bias, *places), scratch,
        out=[jax.ShapeDtypeStruct((split, B, n), dtype) for dtype in (*collect.outputs, *[jnp.float32] * (split > 1))],
        grid=dict(row=B, block=blocks, part=split), threads=3, interpret=interpret,
    )  # fmt: skip
    return (found[:-1], found[-1][0]) if split > 1 else ([one.reshape(B, n) for one in found], None)


device_refusals = mgpu.device_refusals


def refusals(op: str, a: Any, b: Any, *rest: Any, **static: Any) -> list[str]:
    """Why this cannot be a kernel."""
    why, b = [], a if op == "peaks" else b
    if static.get("count", 1) > MOST_NEIGHBORS:
        why.append(f"{static['count']} neighbours: at most {MOST_NEIGHBORS}, which are held in registers")
    if any(not isinstance(static.get(name, 0.0), int | float) for name in ("margin", "alpha")):
        why.append("margin and alpha must be Python numbers: they are compiled in")
    for name, x in (("queries", a), ("keys", b)):
        if x.dtype not in (jnp.bfloat16, jnp.float32):
            why.append(f"{name} are {x.dtype}: bfloat16 or float32")
    if a.dtype != b.dtype:
        why.append(f"queries are {a.dtype} and keys {b.dtype}: one dtype")
    if min(a.shape[1], b.shape[1], a.shape[2]) == 0:
        why.append("there is nothing to compare")
    return why


def faster(op: str, a: Any, b: Any, *rest: Any, kind: str, **static: Any) -> bool:
    """Where scores are many: XLA takes them to memory and back."""
    return a.shape[1] * (a if op == "peaks" else b).shape[1] >= 2**16


def _parts(x: Array) -> int:
    """How many bfloat16 numbers a number is cut into."""
    return 3 if x.dtype == jnp.float32 else 1


def _features(k: int) -> int:
    """k padded to what chunks and swizzles hold."""
    return -(-k // 16) * 16 if k <= 128 else -(-k // 64) * 64


def _chunk(k: int) -> int:
    """Features of a chunk, if queries stay on chip."""
    return 64 if k % 64 == 0 else k


def _resident(parts: int, k: int) -> bool:
    """Whether the queries of a block stay on chip, beside a ring of two key tiles."""
    return QUERIES * parts * k * 2 + 2 * KEYS * _chunk(k) * 2 <= mgpu.SHARED
