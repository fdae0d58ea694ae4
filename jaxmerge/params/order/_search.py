"""The k-th largest on one CPU device: a few passes that each count at several pivots, and look at what lies beside them.

On many devices a pass should cost one number per model, which bisection does (`_quantile`); here it should cost one reading of
memory. XLA writes an array for every single reduction on the CPU, but makes several at once one loop, in which further pivots
are nearly free. The pivots follow from the counts: the rank that is wanted, give or take what a sample would scatter, on the
line between the ends of the bracket. The ends are patterns that occur, so that ties and coarse data end the search early.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import UInt32

from jaxmerge.params._transform import over
from jaxmerge.params.order import _words as w

Order = Callable[[Array], Array]
"""x (K, *shape) -> uint32 patterns that order as its entries are to be ordered."""

PIVOTS = 4
TOP = np.uint32(0xFFFFFFFF)


def counts(x: Array, pivots: list[Array], order: Order) -> tuple[list[w.Words], list[Array], list[Array]]:
    """At each pivot (K,): how many patterns are at least it; the least of those; the greatest of the others."""
    bits = order(x)
    inner, most = w.inner_axes(bits.shape)
    operands, zeros = [], []
    for t in pivots:
        there = bits >= over(t, bits)
        operands += [there.astype(jnp.uint32), jnp.where(there, bits, TOP), jnp.where(there, np.uint32(0), bits)]
        zeros += [np.uint32(0), TOP, np.uint32(0)]

    def both(a, b):
        return [f(p, q) for f, p, q in zip([jnp.add, jnp.minimum, jnp.maximum] * len(pivots), a, b, strict=True)]

    found = lax.reduce(operands, zeros, both, inner)
    outer = tuple(range(1, found[0].ndim))
    return (
        [w.widened(n, bits.shape, most) for n in found[::3]],
        [jnp.min(v, axis=outer) for v in found[1::3]],
        [jnp.max(v, axis=outer) for v in found[2::3]],
    )


def kth_largest(
    leaves: list[Array], k: w.Words, order: Order, *, bits: int, start: UInt32[Array, "pivots K"] | None = None
) -> UInt32[Array, "K"]:
    """The k-th largest pattern (of so many bits) of each model over all the leaves, k from 1; `start` are the first pivots."""
    size = w.to_words([sum(x[0].size for x in leaves)])
    nothing = jnp.zeros_like(k[1])
    target = w.subtract(k, (nothing, jnp.ones_like(nothing)))  # so many lie above the k-th, at most

    def narrow(state):
        lo, hi, below, above, pivots, _, stalled = state  # below = #(>= lo) >= k > above = #(> hi)
        wide = hi - lo
        # patterns are made as they are read: outside the loop, where XLA would lift them, they would fill an array
        entries, pivots = lax.optimization_barrier((leaves, pivots))
        found = [counts(x, list(pivots), order) for x in entries]
        for i in range(PIVOTS):
            n, up, down = found[0][0][i], found[0][1][i], found[0][2][i]
            for m, u, d in ((f[0][i], f[1][i], f[2][i]) for f in found[1:]):
                n, up, down = w.add(n, m), jnp.minimum(up, u), jnp.maximum(down, d)
            enough = w.at_least(n, k)
            closer = enough & w.at_least(below, n)
            lo = jnp.where(closer, jnp.maximum(lo, up), lo)
            below = _choose(closer, n, below)
            hi = jnp.where(enough & w.at_least(k, n), jnp.minimum(hi, up), hi)  # just k: it is the least of them
            closer = ~enough & w.at_least(n, above)
            hi = jnp.where(closer, jnp.minimum(hi, down), hi)
            above = _choose(closer, n, above)
            lo = jnp.where(~enough & w.at_least(n, target), jnp.maximum(lo, down), lo)  # one short: the greatest below
        stalled = ~stalled & ((hi - lo).astype(jnp.float32) * (PIVOTS + 1) > wide.astype(jnp.float32))
        inside, rank = w.number(w.subtract(below, above)), w.number(w.subtract(below, k)) + 0.5
        return lo, hi, below, above, _between(lo, hi, rank, inside, stalled), jnp.any(lo < hi), stalled

    lo, hi = nothing, jnp.full_like(nothing, (1 << bits) - 1)
    never = jnp.zeros(nothing.shape, bool)
    if start is None:
        start = _between(lo, hi, jnp.ones(nothing.shape), jnp.ones(nothing.shape), ~never)
    start = jnp.clip(start, 1, hi[None])
    everything = tuple(jnp.broadcast_to(v, nothing.shape) for v in size)
    state = (lo, hi, everything, (nothing, nothing), start, jnp.bool_(True), never)
    return lax.while_loop(lambda state: state[5], narrow, state)[0]


def _choose(which: Array, a: w.Words, b: w.Words) -> w.Words:
    return jnp.where(which, a[0], b[0]), jnp.where(which, a[1], b[1])


def _between(lo: Array, hi: Array, rank: Array, inside: Array, stalled: Array) -> UInt32[Array, "pivots K"]:
    """Pivots above lo and up to hi: about the rank; or evenly, where that did not narrow the bracket enough the last time."""
    part = rank / inside
    deviation = jnp.sqrt(inside * part * (1 - part))  # of the rank at a place, were the entries a sample
    near, far = (deviation / 2 + 0.5) / inside, jnp.maximum(1 / 8, (2.5 * deviation + 2) / inside)
    places = [
        jnp.where(part > far, part - far, part / 2),
        jnp.where(part > near, part - near, part / 4),
        jnp.where(part + near < 1, part + near, (1 + part) / 2),
        jnp.where(part + far < 1, part + far, (3 + part) / 4),
    ]
    wide = hi - lo
    pivots = []
    for i, place in enumerate(places):
        place = jnp.where(stalled, (i + 1) / (PIVOTS + 1), place)
        step = jnp.clip(place * wide.astype(jnp.float32), 0, 2.0**32 - 256).astype(jnp.uint32)
        pivots.append(lo + jnp.minimum(step, jnp.maximum(wide, 1) - 1) + 1)
    return jnp.stack(pivots)
