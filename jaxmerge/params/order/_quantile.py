"""Exact order statistics without a sort and without a gather: values stay where they are, counts travel.

The magnitude of a float32 orders as its bit pattern does, so the k-th largest is found bit by bit: count, over all devices, how
many patterns are at least a candidate. Elements that tie at the threshold are kept by their flat index, lowest first, which is
found in the same way; so the choice does not depend on the sharding. Counts and indices are pairs of 32-bit words.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, UInt32

from jaxmerge.params._deferred import Entries
from jaxmerge.params._transform import each, models, over
from jaxmerge.params.order import _search as search
from jaxmerge.params.order._devices import fastest
from jaxmerge.params.order._search import Order
from jaxmerge.params.order._words import (
    Words as Words,
    add as add,
    at_least as at_least,
    count as count,
    counts as counts,
    from_words as from_words,
    number as number,
    quotient as quotient,
    share as share,
    smaller as smaller,
    subtract as subtract,
    to_words as to_words,
    together as together,
)

INF = np.uint32(0x7F800000)
DIGIT = 11
"""Bits per round of the streamed radix selection: 3 rounds over 31 bits."""
ROUNDS = 3
ORIGIN = np.zeros(2, np.uint32)
"""Where a whole leaf begins."""
GROUP = 64
"""Neighbours that a sample takes together, where they divide the leaf."""
SAMPLE = 1 << 13
"""Entries of a model that say where to look first."""


def magnitude_bits(x: Float[Array, "..."]) -> UInt32[Array, "..."]:
    """|x| as an integer of the same order; a NaN is larger than any number."""
    return lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.uint32)


# --- the k-th largest ------------------------------------------------------------------------------------------------


def kth_largest(leaves: Sequence[Entries], k: Words, order: Order = lambda x: x, *, bits: int = 31) -> UInt32[Array, "_"]:
    """The k-th largest pattern (of so many bits) of each model over all the leaves; that of inf where k is 0.

    Args:
      leaves: (K, *shape) each.
      k: (K,) or, for several order statistics of each model, (n K,): the first of every model, the second, ...
      order: the entries' patterns.
    """
    halve = lambda k, *leaves: _halve(list(leaves), k, order, bits)
    look = lambda k, *leaves: _look(list(leaves), k, order, bits)[0]
    return fastest(look, halve)(k, *leaves)


def place(x: Entries, k: Words, order: Order = lambda x: x) -> tuple[UInt32[Array, "_"], Words, Words]:
    """`kth_largest` of one leaf and its `sides`."""

    def halve(k, x):
        t = _halve([x], k, order, 31)
        return t, *sides(x, t, order)

    def look(k, x):
        t, above, there = _look([x], k, order, 31)
        known = lambda: (above, subtract(there, above))
        return t, *lax.cond(jnp.any((k[0] | k[1]) == 0), lambda: sides(x, t, order), known)

    return fastest(look, halve)(k, x)


def sides(x: Entries, t: UInt32[Array, "_"], order: Order = lambda x: x) -> tuple[Words, Words]:
    """How many patterns are above t (n K,), and how many are t."""

    def reduce(x, t):
        bits = order(x)
        return count(each(jnp.greater, bits, t)), count(each(jnp.equal, bits, t))

    def together(x, t):
        both = search.counts(x, [(jnp.greater, t), (jnp.equal, t)], order)
        return tuple(lax.optimization_barrier(both))  # one loop, also where one of them is not used

    return fastest(together, lambda x, t: _each(lambda t: reduce(x, t), x.shape[0], t))(x, t)


def _halve(leaves: Sequence[Entries], k: Words, order: Order, bits: int) -> UInt32[Array, "_"]:
    def bit(i, t):
        candidate = t | (jnp.uint32(1) << (bits - 1 - i).astype(jnp.uint32))
        counts = [_each(lambda t, x=x: count((b := order(x)) >= over(t, b)), x.shape[0], candidate) for x in leaves]
        return jnp.where(at_least(functools.reduce(add, counts), k), candidate, t)

    return jnp.where((k[0] | k[1]) == 0, INF, lax.fori_loop(0, bits, bit, jnp.zeros_like(k[1])))


def _look(leaves: Sequence[Entries], k: Words, order: Order, bits: int) -> tuple[UInt32[Array, "_"], Words, Words]:
    """With how many are above it and at least it, where k is not 0."""
    none = (k[0] | k[1]) == 0
    some = k[0], jnp.where(none, 1, k[1])
    t, above, there = search.kth_largest(leaves, some, order, bits=bits, start=typical(leaves, some, order))
    return jnp.where(none, INF, t), above, there


def typical(leaves: Sequence[Entries], k: Words, order: Order) -> UInt32[Array, "4 _"]:
    """Patterns about the k-th largest (n K): where a few thousand of the entries put it, give or take what they scatter."""
    models, size = leaves[0].shape[0], max(sum(math.prod(x.shape[1:]) for x in leaves), 1)
    # apart, or XLA keeps an array of patterns for all who ask
    some = [_every(order(x), size // SAMPLE).reshape(models, -1) for x in lax.optimization_barrier(leaves)]
    values = jnp.sort(jnp.concatenate(some, axis=1), axis=1)
    values, many = jnp.tile(values, (k[0].shape[0] // models, 1)), values.shape[1]
    part = number(k) / size
    deviation = jnp.sqrt(part * (1 - part) * many) + 1
    at = lambda d: jnp.take_along_axis(values, place(d)[:, None], axis=1, mode="promise_in_bounds")[:, 0]
    place = lambda d: jnp.clip((1 - part) * many + d * deviation, 0, many - 1).astype(jnp.int32)
    middle = at(0.0)
    tied = (at(-1.5) == middle) | (middle == at(1.5))  # many tie: is it that value, or are more than k above it?
    return jnp.stack([at(-4.5), jnp.where(tied, middle - 1, at(-1.5)), jnp.where(tied, middle, at(1.5)), at(4.5)])


def _every(x: Array, step: int) -> Array:
    """About one in so many entries of each model, from all over it."""
    if x.ndim == 1:
        return x
    rows = max(min(math.isqrt(step), x.shape[1]), 1) if x.ndim > 2 else 1
    columns = max(min(step // rows, x.shape[-1]), 1)
    return x[:, ::rows, ..., ::columns] if x.ndim > 2 else x[:, ::columns]


def _each(f: Callable, models: int, *arrays: Array):
    """f of each part of K of the arrays (n K,), the results side by side again."""
    n = arrays[0].shape[0] // models
    parts = [f(*(a[i * models : (i + 1) * models] for a in arrays)) for i in range(n)]
    return parts[0] if n == 1 else jax.tree.map(lambda *p: jnp.concatenate(p), *parts)


def kth_of_every(step: int, x: Entries, k: Words, order: Order = lambda x: x) -> UInt32[Array, "_"]:
    """`kth_largest` of one group of neighbours in so many, from the first: of `how_many` entries."""
    if step == 1:
        return kth_largest([x], k, order)

    def some(k, x):
        bits = order(x)
        rows, group = math.prod(x.shape[1:]) // row_size(x.shape[1:]), _group(x.shape[1:])
        taken = bits.reshape(bits.shape[0], rows, -1, group)[:, :, ::step]
        return kth_largest([lax.optimization_barrier(taken.reshape(bits.shape[0], -1, group))], k)

    def masked(k, x):  # as they lie; what is left out counts as 0, below which nothing is
        of_group = quotient(coordinates(x.shape[1:])[3], jnp.uint32(_group(x.shape[1:])))
        taken = of_group == quotient(of_group, jnp.uint32(step)) * np.uint32(step)
        return kth_largest([x], k, lambda x: jnp.where(taken[None], order(x), 0))

    return fastest(some, masked)(k, x)


def how_many(step: int, shape: tuple[int, ...]) -> int:
    """Entries of a leaf that `kth_of_every` looks at."""
    groups = row_size(shape) // _group(shape)
    return math.prod(shape) // row_size(shape) * -(-groups // step) * _group(shape)


def _group(shape: tuple[int, ...]) -> int:
    return GROUP if row_size(shape) % GROUP == 0 else 1


def coordinates(shape: tuple[int, ...], origin: Array | np.ndarray = ORIGIN) -> tuple[int, int, Array, Array]:
    """The flat index as two 32-bit numbers that order as it does: how many rows and columns; each element's row and column.

    A block within one row of a leaf counts from `origin`, the row and column of its first entry.
    """
    split = _split(shape)

    def flat(axes: range) -> tuple[int, Array]:
        stride, index = 1, jnp.zeros((1,) * len(shape), jnp.uint32)
        for axis in reversed(axes):
            line = jnp.arange(shape[axis], dtype=jnp.uint32) * np.uint32(stride)
            index = index + line.reshape(*(-1 if a == axis else 1 for a in range(len(shape))))
            stride *= shape[axis]
        return stride, index

    (rows, row), (columns, column) = flat(range(split)), flat(range(split, len(shape)))
    return rows, columns, row + jnp.asarray(origin[0]), column + jnp.asarray(origin[1])


def position(shape: tuple[int, ...], flat: int | np.ndarray) -> np.ndarray:
    """Flat indices as the (row, column) of `coordinates`; the end is the first column of the row after the last."""
    return np.array(divmod(flat, row_size(shape))).astype(np.uint32)


def row_size(shape: tuple[int, ...]) -> int:
    """How many columns `coordinates` has: all entries, if 32 bits can count them."""
    return max(math.prod(shape[_split(shape) :]), 1)


def _split(shape: tuple[int, ...]) -> int:
    split = len(shape)
    while split > 0 and math.prod(shape[split - 1 :]) < 1 << 32:
        split -= 1
    return split


def first(
    x: Entries, quota: Words, choose: Callable[[Any], Array] = lambda x: x, there: Words | None = None
) -> tuple[UInt32[Array, "2 K"], Words]:
    """Where to cut so that exactly the first `quota` of the chosen, by flat index, lie before; and how many do.

    Args:
      x: (K, *shape).
      quota: (K,).
      choose: x -> which are chosen.
      there: how many those are, where that is known.

    Returns:
      The cut as (row, column), for `before`, and min(quota, chosen).
    """
    rows, columns = coordinates(x.shape[1:])[:2]
    there = count(choose(x)) if there is None else there
    kept = smaller(there, quota)
    nothing = jnp.zeros_like(quota[1])

    def halve(x, there, kept):
        chosen, (_, _, row, column) = choose(x), coordinates(x.shape[1:])

        def largest(size, inside, quota):
            """The largest c <= size with at most `quota` of the chosen inside c."""

            def bit(i, c):
                candidate = c | (jnp.uint32(1) << (size.bit_length() - 1 - i).astype(jnp.uint32))
                fits = (candidate <= size) & at_least(quota, count(chosen & inside(candidate)))
                return jnp.where(fits, candidate, c)

            return lax.fori_loop(0, size.bit_length(), bit, nothing)

        def rows_before(r):
            return row[None] < over(r, chosen)

        # fewer than 2^32 elements: no need to look for the row
        r = at_least(kept, there).astype(jnp.uint32) if rows == 1 else largest(rows, rows_before, kept)
        left = subtract(kept, count(chosen & rows_before(r)))
        c = largest(columns, lambda c: (row[None] == over(r, chosen)) & (column[None] < over(c, chosen)), left)
        return jnp.stack([r, c])

    def look(x, there, kept):
        """Count the chosen in each run of neighbours: in the run where the quota is reached, entry by entry."""
        in_runs = lambda x: [chosen.reshape(-1, search.run(x)) for chosen in models(choose(x))]
        reached = [jnp.cumsum(together(runs, (1,))) for runs in in_runs(x)]
        run = [jnp.sum(n < k, dtype=jnp.int32) for n, k in zip(reached, kept[1], strict=True)]
        run, x = lax.optimization_barrier((run, x))  # read again, or XLA keeps what was chosen
        cuts = []
        for k, runs in enumerate(in_runs(x)):
            here = lax.dynamic_index_in_dim(runs, run[k], keepdims=False)
            left = kept[1][k] - jnp.where(run[k] > 0, reached[k][run[k] - 1], 0)
            cuts.append(run[k].astype(jnp.uint32) * runs.shape[1] + 1 + jnp.sum(jnp.cumsum(here, dtype=jnp.uint32) < left))
        all_of_them = at_least(kept, there)
        none = (kept[0] | kept[1]) == 0
        cut = jnp.where(all_of_them | none, 0, jnp.stack(cuts).astype(jnp.uint32))
        return jnp.stack([(all_of_them & ~none).astype(jnp.uint32), cut])

    def whole(x, there, kept):  # all or none: nearly always, and then no further pass over the leaf
        return jnp.stack([jnp.where((kept[0] | kept[1]) == 0, jnp.uint32(0), np.uint32(rows)), nothing])

    partial = jnp.any(((kept[0] | kept[1]) != 0) & ~at_least(quota, there))
    search_for = fastest(look, halve) if rows == 1 else halve
    return lax.cond(partial, search_for, whole, x, there, kept), kept


def first_tied(
    x: Entries, t: UInt32[Array, "_"], tied: Words, quota: Words, order: Order = lambda x: x
) -> tuple[UInt32[Array, "2 _"], Words]:
    """`first` of those whose pattern is t (n K,), for every order statistic; `tied` are how many there are."""
    models = x.shape[0]
    found = []
    for i in range(0, t.shape[0], models):
        part = slice(i, i + models)
        of_pattern = lambda x, t=t[part]: each(jnp.equal, order(x), t)
        found.append(first(x, (quota[0][part], quota[1][part]), of_pattern, (tied[0][part], tied[1][part])))
    cut = jnp.concatenate([cut for cut, _ in found], axis=1)
    high, low = (jnp.concatenate([kept[i] for _, kept in found]) for i in range(2))
    return cut, (high, low)


def before(cut: tuple[Array, Array] | UInt32[Array, "2"], x: Array, origin: Array | np.ndarray = ORIGIN) -> Bool[Array, "..."]:
    """Which elements of one model's leaf, or of a block of it that begins at `origin`, lie before the cut, by flat index."""
    _, _, row, column = coordinates(x.shape, origin)
    return (row < cut[0]) | ((row == cut[0]) & (column < cut[1]))


# --- streamed: a histogram per round ---------------------------------------------------------------------------------


def histogram(bits: UInt32[Array, "K ..."], prefix: UInt32[Array, "K"], shift: UInt32[Array, ""]) -> UInt32[Array, "K bins"]:
    """How often each next digit occurs among the patterns that begin with the prefix, over one device's block."""
    models = bits.shape[0]
    bits = bits.reshape(models, -1)
    above = bits >> shift
    digit = jnp.where(above >> DIGIT == prefix[:, None], above & ((1 << DIGIT) - 1), 1 << DIGIT)

    def scatter(digit):
        rows = lax.broadcasted_iota(jnp.int32, digit.shape, 0)
        return jnp.zeros((models, 1 << DIGIT), jnp.uint32).at[rows, digit].add(1, mode="drop")

    def compare(digit):  # scatters serialise on TPU
        bins = jnp.arange(1 << DIGIT, dtype=jnp.uint32)[None, :, None]
        return jnp.sum(digit[:, None, :] == bins, axis=-1, dtype=jnp.uint32)

    return lax.platform_dependent(digit, tpu=compare, default=scatter)


def next_digit(counts: np.ndarray, remaining: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From the counts (K, bins) of the next digit: the digit of the `remaining`-th largest, and its rank among those."""
    from_top = np.cumsum(counts[:, ::-1], axis=1, dtype=np.uint64)[:, ::-1]
    digit = np.maximum((from_top >= remaining[:, None]).sum(axis=1) - 1, 0)
    above = np.concatenate([from_top, np.zeros((len(counts), 1), np.uint64)], axis=1)
    return digit, remaining - above[np.arange(len(counts)), digit + 1]
