"""Order statistics along rows (the last axis): thresholds by counting, ranks by sorting or by drawing.

A row has fewer than 2^32 entries, so that one word counts it. A vector is one row; a scalar a row of one.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Int, UInt, UInt32

from jaxmerge.params._layout import with_whole_rows
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


def _ranks_side_by_side(bits: UInt32[Array, "*rows n"]) -> Int[Array, "*rows n"]:
    n = bits.shape[-1]
    digits = (n - 1).bit_length()
    size = 1 << digits
    rows = bits.reshape(-1, n)
    padded = jnp.pad(rows, ((0, -rows.shape[0] % LANES), (0, size - n)), constant_values=np.uint32(0x7FFFFFFF))

    def ranks(rows):
        at = jnp.arange(size, dtype=jnp.uint32)[None]
        # by their lower bits, then by their upper bits: each time one word, that of an entry before and where it is
        order = (_bitonic((rows << digits | at).T) % np.uint32(size)).T.astype(jnp.int32)
        upper = jnp.take_along_axis(rows >> (32 - digits), order, axis=1, mode="promise_in_bounds")
        place = (_bitonic((upper << digits | at).T) % np.uint32(size)).T.astype(jnp.int32)
        return lax.map(inverse, (order, place))

    def inverse(orders):
        order, place = orders
        return jnp.zeros_like(order).at[order[place]].set(jnp.arange(size), unique_indices=True, mode="promise_in_bounds")

    found = lax.map(ranks, padded.reshape(-1, LANES, size)).reshape(-1, size)
    return found[: rows.shape[0], :n].reshape(bits.shape)


def _bitonic(x: UInt32[Array, "n lanes"]) -> UInt32[Array, "n lanes"]:
    """Sorted along the first axis, a power of two: Batcher's network, in which everyone meets the one at index ^ distance."""
    n = x.shape[0]
    if n == 1:
        return x
    far = range(n.bit_length() - 1)
    run, distance = np.array([(run, d) for run in far for d in range(run, -1, -1)], np.int32).reshape(-1, 2).T

    def at_distance(d):
        def meet(x, run):
            low, high = (x.reshape(n >> (d + 1), 2, 1 << d, -1)[:, i] for i in range(2))
            down = (jnp.arange(n >> (d + 1)) >> (run - d) & 1 == 1)[:, None, None]
            less, more = jnp.minimum(low, high), jnp.maximum(low, high)
            return jnp.stack([jnp.where(down, more, less), jnp.where(down, less, more)], axis=1).reshape(n, -1)

        return meet

    meet = [at_distance(d) for d in far]
    step = lambda i, x: lax.switch(jnp.asarray(distance)[i], meet, x, jnp.asarray(run)[i])
    return lax.fori_loop(0, len(run), step, x)


def outranks(x: Array, rival: UInt[Array, "*rows n"]) -> Bool[Array, "*rows n"]:
    """Whether each entry is larger than another of its row, or equal and further right; a rival of n: yes, beyond n: no.
    `with_whole_rows`."""
    n = x.shape[-1]
    x, rival = with_whole_rows(x), with_whole_rows(rival).astype(jnp.int32)
    there = jnp.take_along_axis(x, jnp.minimum(rival, n - 1), axis=-1, mode="promise_in_bounds")
    here, there = q.magnitude_bits(x), q.magnitude_bits(there)
    up = (there < here) | ((there == here) & (rival < columns(x).astype(jnp.int32)))
    return jnp.where(rival < n, up, rival == n)
