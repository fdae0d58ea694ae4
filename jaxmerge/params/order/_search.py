"""The k-th largest on one CPU device: a few passes that each count at several pivots, and one that collects what is left.

On many devices a pass should cost one number per model, which bisection does (`_quantile`); here it should cost one reading of
memory. XLA writes an array for every single reduction on the CPU, but makes several at once one loop, in which further pivots
are nearly free: those of all the order statistics that are wanted. They follow from the counts: the rank that is wanted, give
or take what a sample would scatter, on the line between the ends of the bracket. The ends are patterns that occur, so that ties
and coarse data end the search early. Once few are left in the bracket, hardly a run of a hundred neighbours holds more than two
of them: one more pass notes the least and the greatest of each run, and the rest is found among those.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import UInt32

from jaxmerge.params._deferred import Entries
from jaxmerge.params.order import _words as w

Order = Callable[[Any], Array]
"""x (K, *shape) -> uint32 patterns that order as its entries are to be ordered, made model by model (`each`)."""

PIVOTS = 4
RUN = 128
"""Neighbours of which two are collected, at most."""
TOP = np.uint32(0xFFFFFFFF)


def counts(x: Entries, pivots: list[Array], order: Order) -> tuple[list[w.Words], list[Array], list[Array]]:
    """At each pivot (n K,): how many patterns are at least it; the least of those; the greatest of the others."""
    bits = order(x)
    models = bits.shape[0]
    inner, most = w.inner_axes(bits.shape)
    found = []
    for k in range(models):  # each in a loop of its own
        one, operands = bits[k : k + 1], []
        for t in (p[i] for p in pivots for i in range(k, p.shape[0], models)):
            there = one >= t
            operands += [there.astype(jnp.uint32), jnp.where(there, one, TOP), jnp.where(there, np.uint32(0), one)]
        found.append(_reduce(operands, inner))
    by_pivot = [v for of_all_models in zip(*found, strict=True) for v in of_all_models]
    n, up, down = ([v for i, v in enumerate(by_pivot) if i // models % 3 == which] for which in range(3))
    outer = tuple(range(1, n[0].ndim))
    many = pivots[0].shape[0]
    together = lambda parts: [jnp.concatenate(parts[i : i + many]) for i in range(0, len(parts), many)]
    return (
        [w.widened(v, bits.shape, most) for v in together(n)],
        together([jnp.min(v, axis=outer) for v in up]),
        together([jnp.max(v, axis=outer) for v in down]),
    )


def _reduce(operands: list[Array], axes: tuple[int, ...]) -> list[Array]:
    """Of every three the sum, the minimum and the maximum over the axes, in one loop."""

    def step(a, b):
        return [f(p, q) for f, p, q in zip([jnp.add, jnp.minimum, jnp.maximum] * (len(operands) // 3), a, b, strict=True)]

    return lax.reduce(operands, [np.uint32(0), TOP, np.uint32(0)] * (len(operands) // 3), step, axes)


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
    runs = sum(math.prod(x.shape[1:]) // run(x) for x in leaves)
    few = max(round((runs * runs / 8) ** (1 / 3)), 1)  # at random, one in fifty times three of them fall into one run

    def left(lo, hi, below, above):
        inside = w.subtract(below, above)
        return (lo == hi) | ((inside[0] == 0) & (inside[1] <= few))

    def step(state):
        *bracket, pivots, stalled, crowded = state
        # patterns are made as they are read: outside the loop, where XLA would lift them, they would fill an array
        entries, pivots = lax.optimization_barrier((leaves, pivots))
        ready = jnp.all(left(*bracket)) & ~crowded
        return lax.cond(ready, collect, narrow, entries, bracket, pivots, stalled)

    def narrow(entries, bracket, pivots, stalled):
        lo, hi, below, above = bracket  # below = #(>= lo) >= k > above = #(> hi)
        wide = hi - lo
        found = [counts(x, list(pivots), order) for x in entries]
        for i in range(PIVOTS):
            n, up, down = found[0][0][i], found[0][1][i], found[0][2][i]
            for m, u, d in ((f[0][i], f[1][i], f[2][i]) for f in found[1:]):
                n, up, down = w.add(n, m), jnp.minimum(up, u), jnp.maximum(down, d)
            enough = w.at_least(n, k)
            closer = enough & w.at_least(below, n)
            lo, below = jnp.where(closer, jnp.maximum(lo, up), lo), _choose(closer, n, below)
            closer = ~enough & w.at_least(n, above)
            hi, above = jnp.where(closer, jnp.minimum(hi, down), hi), _choose(closer, n, above)
        stalled = ~stalled & ((hi - lo).astype(jnp.float32) * (PIVOTS + 1) > wide.astype(jnp.float32))
        bracket = lo, hi, below, above
        return *bracket, _between(*bracket, k=k, stalled=stalled), stalled, jnp.bool_(False)

    def collect(entries, bracket, pivots, stalled):
        lo, hi, below, above = bracket
        found = [_ends(x, lo, hi, order) for x in entries]
        n, least, greatest = (jnp.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
        crowded = jnp.any((n > 2) & (lo < hi)[:, None])
        least, greatest = jnp.where(n > 0, least - lo[:, None], 0), jnp.where(n > 1, greatest - lo[:, None], 0)
        rank = w.subtract(k, above)[1]

        def at_least(t):
            return _counted((n > 0) & (least >= t[:, None]), (n > 1) & (greatest >= t[:, None]))

        wide = 32 - lax.clz(jnp.max(hi - lo)).astype(jnp.int32)

        def bit(i, t):
            candidate = t | (jnp.uint32(1) << (wide - 1 - i).astype(jnp.uint32))
            return jnp.where(at_least(candidate) >= rank, candidate, t)

        t = lax.fori_loop(0, wide, bit, nothing)
        larger, enough = (w.add(above, (nothing, at_least(v))) for v in (t + 1, t))
        keep = crowded | (lo == hi)
        lo, hi = jnp.where(keep, lo, lo + t), jnp.where(keep, hi, lo + t)
        return lo, hi, _choose(keep, below, enough), _choose(keep, above, larger), pivots, stalled, crowded

    lo, hi = nothing, jnp.full_like(nothing, (1 << bits) - 1)
    never = jnp.zeros(nothing.shape, bool)
    high, low = w.to_words([sum(math.prod(x.shape[1:]) for x in leaves)])
    everything = jnp.broadcast_to(high, nothing.shape), jnp.broadcast_to(low, nothing.shape)
    bracket = lo, hi, everything, (nothing, nothing)
    start = _between(*bracket, k=k, stalled=~never) if start is None else jnp.clip(start, 1, hi[None])
    state = (*bracket, start, never, jnp.bool_(False))
    found, _, below, above, *_ = lax.while_loop(lambda state: jnp.any(state[0] < state[1]), step, state)
    return found, above, below


def run(x: Entries) -> int:
    """How many neighbours along the last axis make a run: as many as divide it, or all of it."""
    n = x.shape[-1] if x.ndim > 1 else 1
    return next((r for r in range(min(RUN, n), 31, -1) if n % r == 0), n)


def _ends(x: Entries, lo: Array, hi: Array, order: Order) -> tuple[UInt32[Array, "_ runs"], ...]:
    """How many patterns of each run are in the bracket (n K,), the least and the greatest of them."""
    models, bits = x.shape[0], order(x)
    found = []
    for k in range(models):
        one, operands = bits[k].reshape(*bits.shape[1:-1], -1, run(x)), []
        for i in range(k, lo.shape[0], models):
            inside = (one >= lo[i]) & (one <= hi[i])
            operands += [inside.astype(jnp.uint32), jnp.where(inside, one, TOP), jnp.where(inside, one, np.uint32(0))]
        found.append([v.reshape(-1) for v in _reduce(operands, (one.ndim - 1,))])
    by_bracket = [v for of_all_models in zip(*found, strict=True) for v in of_all_models]
    return tuple(jnp.stack([v for i, v in enumerate(by_bracket) if i // models % 3 == which]) for which in range(3))


def _counted(a: Array, b: Array) -> UInt32[Array, "_"]:
    """How many of both are true for each model; one loop, as it is two sums."""
    add = lambda x, y: (x[0] + y[0], x[1] + y[1])
    one, other = lax.reduce((a.astype(jnp.uint32), b.astype(jnp.uint32)), (np.uint32(0), np.uint32(0)), add, (1,))
    return one + other


def _choose(which: Array, a: w.Words, b: w.Words) -> w.Words:
    return jnp.where(which, a[0], b[0]), jnp.where(which, a[1], b[1])


def _between(lo: Array, hi: Array, below: w.Words, above: w.Words, *, k: w.Words, stalled: Array) -> UInt32[Array, "pivots _"]:
    """Pivots above lo and up to hi: about the k-th, give or take what a sample of as many scatters, on a line of the logarithm
    of the rank, as tails are. Where that did not narrow the bracket enough, many may tie: at an end, or at the roundest pattern
    between, as they do in coarse data."""
    inside, rank, start = w.number(w.subtract(below, above)), w.number(w.subtract(below, k)) + 0.5, w.number(above) + 0.5
    deviation = jnp.sqrt(rank / inside * (inside - rank))
    near, far = 1.5 * deviation + 1, 4.5 * deviation + 3
    ranks = [
        jnp.where(rank > far, rank - far, rank / 2),
        jnp.where(rank > near, rank - near, rank / 4),
        jnp.where(rank + near < inside, rank + near, (inside + rank) / 2),
        jnp.where(rank + far < inside, rank + far, (3 * inside + rank) / 4),
    ]
    whole = jnp.log1p(inside / start)
    wide = hi - lo
    differing = jnp.minimum(31 - lax.clz(lo ^ hi), 31)  # the highest bit: 1 in hi
    round_ = hi >> differing << differing
    pivots = []
    for r, coarse in zip(ranks, (lo + 1, round_, round_ + 1, hi), strict=True):
        place = jnp.log1p(r / (inside - r + start)) / whole
        step = jnp.clip(place * wide.astype(jnp.float32), 0, 2.0**32 - 256).astype(jnp.uint32)
        pivot = lo + jnp.minimum(step, jnp.maximum(wide, 1) - 1) + 1
        pivots.append(jnp.where(stalled, jnp.minimum(coarse, jnp.maximum(hi, 1)), pivot))
    return jnp.stack(pivots)
