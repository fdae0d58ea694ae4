"""Order statistics along rows (the last axis): thresholds by counting, ranks by sorting or by drawing.

A row has fewer than 2^32 entries, so that one word counts it. A vector is one row; a scalar a row of one.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Int, UInt, UInt32

from jaxmerge.params._layout import like, with_whole_rows
from jaxmerge.params.order import _quantile as q
from jaxmerge.params.order._devices import fastest


def as_rows(x: Array) -> Array:
    """x (K, *shape) with at least one axis of entries."""
    return x[:, None] if x.ndim == 1 else x


def kth_in_row(bits: UInt32[Array, "K *rows n"], k: UInt32[Array, "K *ones"]) -> UInt32[Array, "K *rows 1"]:
    """The k-th largest pattern of each row; that of inf where k is 0."""

    def bit(i, t):
        candidate = t | (jnp.uint32(1) << (30 - i).astype(jnp.uint32))
        return jnp.where(jnp.sum(bits >= candidate, axis=-1, keepdims=True, dtype=jnp.uint32) >= k, candidate, t)

    t = lax.fori_loop(0, 31, bit, jnp.zeros_like(jnp.max(bits, axis=-1, keepdims=True)))
    return jnp.where(k == 0, q.INF, t)


def columns(x: Array) -> UInt32[Array, "*ones n"]:
    """The index along the row."""
    return jnp.arange(x.shape[-1], dtype=jnp.uint32).reshape(*(1,) * (x.ndim - 1), -1)


def first_in_row(tied: Bool[Array, "K *rows n"], quota: UInt32[Array, "K *rows 1"]) -> UInt32[Array, "K *rows 1"]:
    """Where to cut each row so that its first `quota` tied entries lie before, or all where there are no more."""
    n = tied.shape[-1]
    column = columns(tied)

    def bit(i, c):
        candidate = c | (jnp.uint32(1) << (n.bit_length() - 1 - i).astype(jnp.uint32))
        inside = jnp.sum(tied & (column < candidate), axis=-1, keepdims=True, dtype=jnp.uint32)
        return jnp.where((candidate <= n) & (inside <= quota), candidate, c)

    return lax.fori_loop(0, n.bit_length(), bit, jnp.zeros_like(quota))


def rank_in_row(bits: UInt32[Array, "K *rows n"]) -> Int[Array, "K *rows n"]:
    """How many entries of the row come before: smaller ones, and equal ones further left. Sorts: `with_whole_rows`."""
    bits = with_whole_rows(bits, batch=1)

    def sort(bits):
        order = jnp.argsort(bits, axis=-1, stable=True)
        return jnp.argsort(order, axis=-1, stable=True).astype(jnp.int32)

    return fastest(_ranks_side_by_side, sort)(bits) if bits.shape[-1] <= 1 << 16 else sort(bits)


LANES = 64
"""Rows that are sorted side by side on the CPU, whose sort takes one number at a time."""
SHORT = 13
"""Of rows up to this power of two hardly any entries agree in what of their bits fits one word beside the index."""


def _ranks_side_by_side(bits: UInt32[Array, "*rows n"]) -> Int[Array, "*rows n"]:
    n = bits.shape[-1]
    digits = max((n - 1).bit_length(), 1)
    size = 1 << digits
    at = jnp.arange(size, dtype=jnp.uint32)[None]
    rows = bits.reshape(-1, n)
    padded = jnp.pad(rows, ((0, -rows.shape[0] % LANES), (0, size - n)), constant_values=np.uint32(0x7FFFFFFF))

    def sort(keys):
        """Keys with their index in the row beneath them, side by side."""
        return _bitonic((keys << digits | at).T)

    def taken(rows, where):
        return jnp.take_along_axis(rows, (where % np.uint32(size)).T.astype(jnp.int32), axis=1, mode="promise_in_bounds")

    def in_two_sorts(rows):
        """By their lower bits, then by their upper bits."""
        first = sort(rows)
        second = sort(taken(rows >> (32 - digits), first))
        return taken((first % np.uint32(size)).T, second)

    def in_one_sort(rows):
        """By their upper bits; neighbours that agree in these change places until their lower bits are in order."""
        word = sort(rows >> (digits - 1))
        rest = taken(rows & np.uint32((1 << (digits - 1)) - 1), word).T << digits | word % np.uint32(size)
        alike = word[1:] >> digits == word[:-1] >> digits
        wrong = lambda rest: jnp.any(alike & (rest[1:] < rest[:-1]))

        def exchange(rest, first):
            low, high = rest[first : size - first : 2], rest[first + 1 : size : 2]
            change = alike[first::2] & (high < low)
            both = jnp.stack([jnp.where(change, high, low), jnp.where(change, low, high)], axis=1).reshape(-1, LANES)
            return jnp.concatenate([rest[:first], both, rest[size - first :]])

        again = lambda state: (exchange(exchange(state[0], 0), 1), state[1] + 1)
        rest, _ = lax.while_loop(lambda state: (state[1] < digits) & wrong(state[0]), again, (rest, 0))
        return lax.cond(wrong(rest), lambda: in_two_sorts(rows), lambda: (rest % np.uint32(size)).T)

    def inverse(order):
        return jnp.zeros(size, jnp.int32).at[order].set(jnp.arange(size), unique_indices=True, mode="promise_in_bounds")

    def ranks(rows):
        return lax.map(inverse, (in_one_sort if digits <= SHORT else in_two_sorts)(rows).astype(jnp.int32))

    found = lax.map(ranks, padded.reshape(-1, LANES, size)).reshape(-1, size)
    return found[: rows.shape[0], :n].reshape(bits.shape)


def _bitonic(x: UInt32[Array, "n lanes"]) -> UInt32[Array, "n lanes"]:
    """Sorted along the first axis, a power of two: Batcher's network, two of its steps in one reading of memory.

    To merge two runs, every entry meets its mirror image in the other; then those at half the distance, a quarter, ...
    """
    n = x.shape[0]

    def meet(low, high, mirrored):
        """Pairs along the second axis, in order."""
        high = high[:, ::-1] if mirrored else high
        more = jnp.maximum(low, high)
        return jnp.minimum(low, high), more[:, ::-1] if mirrored else more

    def step(distance, mirrored):
        def one(x):
            halves = x.reshape(n >> (distance + 1), 2, 1 << distance, -1)
            return jnp.stack(meet(halves[:, 0], halves[:, 1], mirrored), axis=1).reshape(n, -1)

        def two(x):
            halves = x.reshape(n >> (distance + 1), 2, 1 << distance, -1)
            both = (v.reshape(-1, 2, 1 << (distance - 1), v.shape[-1]) for v in meet(halves[:, 0], halves[:, 1], mirrored))
            return jnp.stack([v for half in both for v in meet(half[:, 0], half[:, 1], False)], axis=1).reshape(n, -1)

        return two if distance else one

    steps = [(d, d == run) for run in range(n.bit_length() - 1) for d in range(run, -1, -2)]
    kinds = sorted(set(steps))
    which = jnp.asarray([kinds.index(s) for s in steps])
    return lax.fori_loop(0, len(steps), lambda i, x: lax.switch(which[i], [step(*kind) for kind in kinds], x), x)


def outranks(x: Array, rival: UInt[Array, "*rows n"]) -> Bool[Array, "*rows n"]:
    """Whether each entry is larger than another of its row, or equal and further right; a rival of n: yes, beyond n: no.
    `with_whole_rows`."""
    n = x.shape[-1]
    x = with_whole_rows(x)
    rival = like(rival.astype(jnp.int32), x)
    there = jnp.take_along_axis(x, jnp.minimum(rival, n - 1), axis=-1, mode="promise_in_bounds")
    here, there = q.magnitude_bits(x), q.magnitude_bits(there)
    up = (there < here) | ((there == here) & (rival < columns(x).astype(jnp.int32)))
    return jnp.where(rival < n, up, rival == n)
