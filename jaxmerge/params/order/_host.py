"""Exact order statistics on the host, for leaves that stream through it: XLA has no fast selection on a CPU, numpy does.

A sample says between which two patterns the k-th largest lies. Where most of what it has there are a few patterns (differences
of numbers that are stored in 16 bits come in lumps), entries are counted at these alone, which XLA does fastest. Else one look
at all entries counts those above and notes the few between; the rest is found among these. Where a sample is not to be had, or
was wrong, or too many entries are alike, histograms of the patterns take its place: one of their upper, one of their lower
bits. Entries that tie at the threshold are kept by their flat index, lowest first, as everywhere here.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

HALF = 16
FEW = 1 << 22
"""Entries between two patterns that are noted one by one, per model."""
LUMPS = 3
"""Patterns at which entries are counted."""
RUN = 1 << 12
"""Entries that are counted together."""


class Held(NamedTuple):
    """What can be asked of a leaf that is in memory.

    Attributes:
      sample: () -> the magnitudes of entries from all over it, uint32 (K, m).
      tally: patterns (c, n K) -> how many entries are above each (c, n K), and how many of each run are it (c, n K, runs).
      part: (start, stop) -> the magnitudes of these entries, uint32 (K, stop - start).
    """

    sample: Callable[[], np.ndarray]
    tally: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    part: Callable[[int, int], np.ndarray]


class Streamed(NamedTuple):
    """A stacked leaf (K, n), flat, a block at a time, as often as asked; its magnitudes as integers of 31 bits.

    Attributes:
      models, shape: K, and the leaf's shape, of n entries.
      blocks: () -> (offset, uint32 (K, m)) until all have been seen, in order.
      held: what else can be asked, of a large leaf that is in memory; or None.
      total: (f, settings, combine) -> what f(settings, block) comes to over all blocks, float64; f must not see zeros that fill
        a block up.
    """

    models: int
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[tuple[int, np.ndarray]]]
    held: Held | None = None
    total: Callable[[Callable, Any, np.ufunc], np.ndarray] = lambda f, settings, combine: np.zeros(0)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Found(NamedTuple):
    """Of every cut (n K): the pattern, how many are above and at it, and the flat index before which those at it are kept."""

    pattern: np.ndarray
    above: np.ndarray
    tied: np.ndarray
    cut: np.ndarray


def select(x: Streamed, k: np.ndarray) -> Found:
    """The k-th largest of each model; k (n K,), 1 or more: the first order statistic of every model, the second, ..."""
    if x.held is not None:
        low, high, lumps = _around(x.held.sample(), k, x)
        found = None if lumps is None else _among(x, x.held, k, lumps)
        found = found or _collect(x, k, low, high)
        if found is not None:
            return found
    histogram = _histogram(x, len(k), lambda u, c: u >> HALF)
    digit, left = _next(histogram, k)
    low = digit << HALF
    if histogram[np.arange(len(k)), digit].max() <= FEW:
        found = _collect(x, k, low, low + (1 << HALF))
        assert found is not None  # it was counted
        return found
    histogram = _histogram(x, len(k), lambda u, c: u[u >> HALF == digit[c]] & ((1 << HALF) - 1))
    last, left = _next(histogram, left)
    pattern = (low | last).astype(np.uint32)
    return locate(x, pattern, left)


def locate(x: Streamed, pattern: np.ndarray, quota: np.ndarray) -> Found:
    """Where to cut so that exactly the first `quota` of the entries at each pattern (n K,) lie before."""
    above, tied, cut = (np.zeros(len(pattern), np.int64) for _ in range(3))
    for offset, u in x.blocks():
        for c, t in enumerate(pattern):
            row = u[c % x.models]
            there = row == t
            n = int(np.count_nonzero(there))
            above[c] += int(np.count_nonzero(row > t))
            if tied[c] < quota[c] <= tied[c] + n:
                cut[c] = offset + int(np.flatnonzero(there)[quota[c] - tied[c] - 1]) + 1
            tied[c] += n
    return Found(pattern, above, tied, np.where(tied <= quota, x.size, cut))


def _around(sample: np.ndarray, k: np.ndarray, x: Streamed) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Between which patterns a sample puts the k-th largest, give or take five times what it scatters; the lumps there."""
    many = sample.shape[1]
    part = k / x.size
    reach = 5 * np.sqrt(part * (1 - part) * many) + 8
    at = np.stack([(1 - part) * many - reach, (1 - part) * many + reach]).astype(np.int64)
    low, high = np.zeros(len(k), np.int64), np.full(len(k), 1 << 31)
    lumps = []
    for c, (first, last) in enumerate(at.T):
        values = sample[c % x.models].copy()
        if last < many:  # one after the other: numpy is fast at one place alone
            values.partition(last)
            high[c] = int(values[last]) + 1
        if first >= 0:
            values[: last + 1].partition(first)
            low[c] = values[first]
        lumps.append(_lumps(values[max(first, 0) : last + 1]))
    few = [patterns for patterns in lumps if patterns is not None]
    return low, high, np.stack(few, axis=1) if len(few) == len(k) else None


def _lumps(values: np.ndarray) -> np.ndarray | None:
    """The patterns that occur most often, if they are more than half of all."""
    patterns, many = np.unique(values, return_counts=True)
    most = np.argsort(many)[::-1][:LUMPS]
    return np.resize(patterns[most], LUMPS) if 2 * many[most].sum() > values.size else None


def _among(x: Streamed, held: Held, k: np.ndarray, patterns: np.ndarray) -> Found | None:
    """The k-th largest, if it is one of these patterns (c, n K)."""
    above, at = held.tally(patterns)
    tied = at.sum(axis=-1, dtype=np.int64)
    here = (above < k) & (k <= above + tied)
    if not here.any(axis=0).all():
        return None
    which = here.argmax(axis=0), np.arange(len(k))
    pattern, above, tied, at = patterns[which], above[which], tied[which], at[which]
    cut = np.full(len(k), x.size)
    for c in np.flatnonzero(k < above + tied):
        reached = np.cumsum(at[c], dtype=np.int64)
        run = int(np.searchsorted(reached, k[c] - above[c]))
        left = k[c] - above[c] - (reached[run] - at[c, run])
        row = held.part(run * RUN, min((run + 1) * RUN, x.size))[c % x.models]
        cut[c] = run * RUN + np.flatnonzero(row == pattern[c])[left - 1] + 1
    return Found(pattern, above, tied, cut)


def _collect(x: Streamed, k: np.ndarray, low: np.ndarray, high: np.ndarray) -> Found | None:
    """The k-th largest, if it is in [low, high) and not too many others are."""
    above, there = np.zeros(len(k), np.int64), np.zeros(len(k), np.int64)
    values: list[list[np.ndarray]] = [[] for _ in k]
    places: list[list[np.ndarray]] = [[] for _ in k]
    offsets = []
    room = np.empty(0, np.uint32), np.empty(0, bool)
    for offset, u in x.blocks():
        if room[0].size != u.shape[1]:  # memory that is there already
            room = np.empty(u.shape[1], np.uint32), np.empty(u.shape[1], bool)
        offsets.append(offset)
        for c in range(len(k)):
            row = u[c % x.models]
            inside = np.less(np.subtract(row, np.uint32(low[c]), out=room[0]), np.uint32(high[c] - low[c]), out=room[1])
            at = np.flatnonzero(inside)
            there[c] += at.size
            if there[c] > FEW:
                return None
            values[c].append(row[at])
            places[c].append(at.astype(np.uint32))
            if high[c] < 1 << 31:
                above[c] += int(np.count_nonzero(np.greater_equal(row, np.uint32(high[c]), out=room[1])))
    if not ((above < k) & (k <= above + there)).all():
        return None
    found = []
    for c in range(len(k)):
        mine, rank = np.concatenate(values[c]), int(k[c] - above[c])
        mine.partition(mine.size - rank)
        t = mine[mine.size - rank]
        larger = int(np.count_nonzero(mine > t))
        at = np.concatenate([p[v == t] + np.int64(o) for o, v, p in zip(offsets, values[c], places[c], strict=True)])
        quota = rank - larger
        found.append((t, above[c] + larger, at.size, at[quota - 1] + 1 if quota < at.size else x.size))
    pattern, above, tied, cut = (np.array(v) for v in zip(*found, strict=True))
    return Found(pattern.astype(np.uint32), above, tied, cut)


def _histogram(x: Streamed, cuts: int, digits: Callable[[np.ndarray, int], np.ndarray]) -> np.ndarray:
    counts = np.zeros((cuts, 1 << HALF), np.int64)
    for _, u in x.blocks():
        for c in range(cuts):
            counts[c] += np.bincount(digits(u[c % x.models], c), minlength=1 << HALF)
    return counts


def _next(counts: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The digit of the k-th largest, and its rank among those of that digit."""
    from_top = np.cumsum(counts[:, ::-1], axis=1)[:, ::-1]
    digit = (from_top >= k[:, None]).sum(axis=1) - 1
    above = np.concatenate([from_top, np.zeros((len(counts), 1), np.int64)], axis=1)
    return digit, k - above[np.arange(len(k)), digit + 1]


def histogram(u: np.ndarray, prefix: np.ndarray, shift: int, digit: int) -> np.ndarray:
    """How often each next digit occurs among the patterns (K, n) that begin with the prefix (n K,): as `order`'s, in numpy."""
    counts = []
    for c, p in enumerate(prefix):
        row = u[c % len(u)]
        above = row >> np.uint32(shift)
        mine = above if not p and shift + digit >= 31 else above[above >> np.uint32(digit) == p]
        counts.append(np.bincount(mine & np.uint32((1 << digit) - 1), minlength=1 << digit))
    return np.stack(counts).astype(np.uint64)
