"""The k-th largest on one CPU device: a few passes that each count at several pivots, and one that collects what is left.

On many devices a pass should cost one number per model, which bisection does (`_quantile`); here it should cost one reading of
memory. XLA writes an array for every single reduction on the CPU, but makes several at once one loop, in which further pivots
cost two operations each: those of all the order statistics that are wanted. They follow from the counts: the rank that is
wanted, give or take what a sample would scatter, on the line between the ends of the bracket. Once few are left in the bracket,
hardly a run of a hundred neighbours holds more than two that differ: one more pass notes the least and the greatest of each,
and the rest is found among those. Where counting is slow to narrow the bracket, entries come in lumps, and it reaches further;
then many tie: the same pass draws the ends of the bracket in to patterns that occur, and next these are counted by themselves;
then the bracket is cut in equal parts.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Int32, UInt32

from jaxmerge.params._deferred import Entries
from jaxmerge.params.order import _words as w

Order = Callable[[Any], Array]
"""x (K, *shape) -> uint32 patterns that order as its entries are to be ordered, made model by model (`each`)."""

PIVOTS = 4
RUN = 128
"""Neighbours of which two are collected, at most."""
TOP = np.uint32(0xFFFFFFFF)


def counts(x: Entries, tests: list[tuple[Callable, Array]], order: Order) -> list[w.Words]:
    """How many patterns pass each test, such as (jnp.greater, t (n K,)), for each model."""
    bits = order(x)
    models = bits.shape[0]
    inner, most = w.inner_axes(bits.shape)
    found = []
    for k in range(models):  # each in a loop of its own
        one = _signed(bits[k : k + 1])
        passed = [compare(one, _signed(t[i])) for compare, t in tests for i in range(k, t.shape[0], models)]
        found.append(_reduce([p.astype(jnp.uint32) for p in passed], [lax.add] * len(passed), inner))
    by_test = [v for of_all_models in zip(*found, strict=True) for v in of_all_models]
    many = tests[0][1].shape[0]
    small = [jnp.concatenate(by_test[i : i + many]) for i in range(0, len(by_test), many)]
    return [w.widened(v, bits.shape, most) for v in small]


def _signed(bits: UInt32[Array, "..."]) -> Int32[Array, "..."]:
    """The same order in signed numbers, which processors compare in one operation."""
    return lax.bitcast_convert_type(bits ^ np.uint32(1 << 31), jnp.int32)


def _unsigned(bits: Int32[Array, "..."]) -> UInt32[Array, "..."]:
    return lax.bitcast_convert_type(bits, jnp.uint32) ^ np.uint32(1 << 31)


def _reduce(operands: list[Array], by: list[Callable], axes: tuple[int, ...]) -> list[Array]:
    """Each reduced over the axes by its own sum, minimum or maximum, in one loop."""
    start = {
        lax.add: lambda dtype: 0,
        lax.min: lambda dtype: np.iinfo(dtype).max,
        lax.max: lambda dtype: np.iinfo(dtype).min,
    }
    first = [np.asarray(start[f](v.dtype), v.dtype) for f, v in zip(by, operands, strict=True)]
    return lax.reduce(operands, first, lambda a, b: [f(p, q) for f, p, q in zip(by, a, b, strict=True)], axes)


def kth_largest(
    leaves: Sequence[Entries],
    k: w.Words,
    order: Order,
    *,
    bits: int,
    start: UInt32[Array, "pivots _"] | None = None,
) -> tuple[UInt32[Array, "_"], w.Words, w.Words]:
    """The k-th largest pattern (of so many bits) of each model over all the leaves, and how many are above it and at least it.

    Args:
      leaves: (K, *shape) each.
      k: (n K,), from 1: the first order statistic of every model, the second, ...
      start: the first pivots.
    """
    nothing = jnp.zeros_like(k[1])
    size = sum(math.prod(x.shape[1:]) for x in leaves)
    runs = sum(math.prod(x.shape[1:]) // run(x) for x in leaves)
    few = max(round((runs * runs / 8) ** (1 / 3)), 1)  # at random, one in fifty times three of them fall into one run

    def step(state):
        *bracket, slow, look, pivots = state
        # patterns are made as they are read: outside the loop, where XLA would lift them, they would fill an array
        entries, pivots = lax.optimization_barrier((leaves, pivots))
        *bracket, slow, look = lax.cond(look, collect, narrow, entries, bracket, slow, pivots)
        return *bracket, slow, look, _pivots(*bracket, k=k, slow=slow, size=size)

    def narrow(entries, bracket, slow, pivots):
        lo, hi, below, above = bracket  # below = #(>= lo) >= k > above = #(> hi)
        before = w.number(w.subtract(below, above))
        counted = [counts(x, [(jnp.greater, p) for p in pivots], order) for x in entries]
        for pivot, *parts in zip(pivots, *counted, strict=True):
            n = functools.reduce(w.add, parts)
            closer = w.at_least(n, k) & (pivot >= lo)
            lo, below = jnp.where(closer, pivot + 1, lo), _choose(closer, n, below)
            closer = ~w.at_least(n, k) & (pivot < hi)
            hi, above = jnp.where(closer, pivot, hi), _choose(closer, n, above)
        inside = w.subtract(below, above)
        left = (lo == hi) | ((inside[0] == 0) & (inside[1] <= few))
        slow = jnp.where(~left & (w.number(inside) * PIVOTS > before), jnp.minimum(slow + 1, 3), 0)
        return lo, hi, below, above, slow, jnp.all(left) | jnp.any(slow == 2)

    def collect(entries, bracket, slow, pivots):
        lo, hi, below, above = bracket
        found = [_ends(x, lo, hi, order) for x in entries]
        n, least, greatest = (jnp.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
        crowded = jnp.any((n > 2) & (least < greatest), axis=1) | (w.subtract(below, above)[0] > 0)  # one word counts the rest
        low = jnp.min(jnp.where(n > 0, least, TOP), axis=1)
        least, greatest = jnp.where(n > 0, least, 0), jnp.where(n > 0, greatest, 0)
        high = jnp.max(greatest, axis=1)
        rank = w.subtract(k, above)[1]

        def at_least(t):  # from 1
            one, others = (least >= t[:, None]).astype(jnp.uint32), jnp.where(greatest >= t[:, None], n - 1, 0)
            return functools.reduce(jnp.add, _reduce([one, others], [lax.add] * 2, (1,)))

        wide = 32 - lax.clz(jnp.max(jnp.where(crowded, 0, high))).astype(jnp.int32)

        def bit(i, t):
            candidate = t | (jnp.uint32(1) << (wide - 1 - i).astype(jnp.uint32))
            return jnp.where(at_least(candidate) >= rank, candidate, t)

        t = lax.fori_loop(0, wide, bit, nothing)
        enough = _choose(t > 0, w.add(above, (nothing, at_least(t))), below)
        larger = w.add(above, (nothing, at_least(t + 1)))
        lo, hi = lo + jnp.where(crowded, low, t), lo + jnp.where(crowded, high, t)
        return lo, hi, _choose(crowded, below, enough), _choose(crowded, above, larger), slow, jnp.bool_(False)

    lo, hi = nothing, jnp.full_like(nothing, (1 << bits) - 1)
    high, low = w.to_words([size])
    everything = jnp.broadcast_to(high, nothing.shape), jnp.broadcast_to(low, nothing.shape)
    bracket = lo, hi, everything, (nothing, nothing)
    slow = jnp.full(nothing.shape, 3 if start is None else 0, jnp.int32)
    start = _pivots(*bracket, k=k, slow=slow, size=size) if start is None else jnp.minimum(start, (hi - 1)[None])
    state = (*bracket, slow, jnp.bool_(False), start)
    found, _, below, above, *_ = lax.while_loop(lambda state: jnp.any(state[0] < state[1]), step, state)
    return found, above, below


def run(x: Entries) -> int:
    """How many neighbours along the last axis make a run: as many as divide it, or all of it."""
    n = x.shape[-1] if x.ndim > 1 else 1
    return next((r for r in range(min(RUN, n), 31, -1) if n % r == 0), n)


def _ends(x: Entries, lo: Array, hi: Array, order: Order) -> tuple[UInt32[Array, "_ runs"], ...]:
    """How many patterns of each run are in the bracket (n K,), the least and the greatest of them, from lo."""
    models, bits = x.shape[0], order(x)
    found = []
    for k in range(models):
        one, operands = bits[k].reshape(*bits.shape[1:-1], -1, run(x)), []
        for i in range(k, lo.shape[0], models):
            from_lo = _signed(one - lo[i])
            inside = from_lo <= _signed(hi[i] - lo[i])
            least = jnp.where(inside, from_lo, np.int32(2**31 - 1))
            greatest = jnp.where(inside, from_lo, np.int32(-(2**31)))
            operands += [inside.astype(jnp.int32), least, greatest]
        by = [lax.add, lax.min, lax.max] * (len(operands) // 3)
        found.append([v.reshape(-1) for v in _reduce(operands, by, (one.ndim - 1,))])
    by_bracket = [v for of_all_models in zip(*found, strict=True) for v in of_all_models]
    n, least, greatest = (jnp.stack([v for i, v in enumerate(by_bracket) if i // models % 3 == which]) for which in range(3))
    return n.astype(jnp.uint32), _unsigned(least), _unsigned(greatest)


def _choose(which: Array, a: w.Words, b: w.Words) -> w.Words:
    return jnp.where(which, a[0], b[0]), jnp.where(which, a[1], b[1])


def _pivots(
    lo: Array, hi: Array, below: w.Words, above: w.Words, *, k: w.Words, slow: Int32[Array, "_"], size: int
) -> UInt32[Array, "pivots _"]:
    """Where to count next, from lo to under hi: about the k-th, give or take what a sample of as many scatters, on a line of
    the logarithm of the rank from the nearer end, as tails are. Where that was slow, four times as far; then the ends by
    themselves and the roundest pattern between, at which coarse data tie; then equal parts."""
    inside, rank = w.number(w.subtract(below, above)), w.number(w.subtract(below, k)) + 0.5
    under, over = size - w.number(below) + 0.5, w.number(above) + 0.5
    deviation = jnp.sqrt(rank / inside * (inside - rank)) * jnp.where(slow == 1, 4, 1)
    near, far = 1.5 * deviation + 1, 4.5 * deviation + 3
    ranks = [
        jnp.where(rank > far, rank - far, rank / 2),
        jnp.where(rank > near, rank - near, rank / 4),
        jnp.where(rank + near < inside, rank + near, (inside + rank) / 2),
        jnp.where(rank + far < inside, rank + far, (3 * inside + rank) / 4),
    ]
    wide = jnp.maximum(hi - lo, 1)
    differing = jnp.minimum(31 - lax.clz(lo ^ hi), 31)  # the highest bit: 1 in hi
    round_ = hi >> differing << differing
    coarse = [lo, round_ - 1, round_, hi - 1]
    pivots = []
    for i, r in enumerate(ranks):
        from_top = jnp.log1p(r / (inside - r + over)) / jnp.log1p(inside / over)
        from_bottom = jnp.log1p(r / under) / jnp.log1p(inside / under)
        place = jnp.where(under < over, from_bottom, from_top)
        step = jnp.clip(place * wide.astype(jnp.float32), 0, 2.0**32 - 256).astype(jnp.uint32)
        part = wide // (PIVOTS + 1) * np.uint32(i + 1) + wide % (PIVOTS + 1) * np.uint32(i + 1) // (PIVOTS + 1)
        pivot = jnp.where(slow < 2, lo + step, jnp.where(slow == 2, coarse[i], lo + part))
        pivots.append(jnp.minimum(pivot, lo + wide - 1))
    return jnp.stack(pivots)
