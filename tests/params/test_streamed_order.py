"""Order statistics of leaves that stream through the host: exact, ties by flat index, whatever the sample says."""

import numpy as np
import pytest

from jaxmerge.params.order import _host

KINDS = {
    "all distinct": lambda rng, shape: rng.standard_normal(shape),
    "coarse": lambda rng, shape: np.round(8 * rng.standard_normal(shape)) / 8,
    "mostly zero": lambda rng, shape: np.where(rng.random(shape) < 0.01, 1.0, 0.0),
    "half zero": lambda rng, shape: np.where(np.arange(shape[1]) % 2, rng.standard_normal(shape), 0),
    "all alike": lambda rng, shape: np.full(shape, 3.0),
}


def streamed(u: np.ndarray, block: int, sample: bool) -> _host.Streamed:
    n = u.shape[1]
    blocks = lambda: ((i, u[:, i : i + block]) for i in range(0, n, block))

    def tally(patterns):
        above, at = (np.stack([f(u[np.arange(t.size) % len(u)], t[:, None]) for t in patterns]) for f in (np.greater, np.equal))
        return above.sum(axis=-1), np.add.reduceat(at, range(0, n, _host.RUN), axis=-1, dtype=np.uint32)

    held = _host.Held(lambda: u[:, :: max(n >> 8, 1)], tally, lambda start, stop: u[:, start:stop])
    return _host.Streamed(len(u), (n,), blocks, held if sample else None)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_sorting(kind, monkeypatch):
    rng = np.random.default_rng(0)
    for few in (_host.FEW, 50):  # with 50 most searches fall back on histograms
        monkeypatch.setattr(_host, "FEW", few)
        for n in (1, 7, 1000, 30_000):
            x = KINDS[kind](rng, (2, n)).astype(np.float32)
            u = np.abs(x).view(np.uint32)
            k = rng.integers(1, n + 1, 4)
            for sample in (False, True):
                found = _host.select(streamed(u, 4096, sample), k)
                for c, wanted in enumerate(k):
                    row = u[c % 2]
                    t = np.sort(row)[n - wanted]
                    at = np.flatnonzero(row == t)
                    quota = wanted - int((row > t).sum())
                    cut = n if quota == at.size else at[quota - 1] + 1
                    assert (found.pattern[c], found.above[c], found.tied[c], found.cut[c]) == (t, wanted - quota, at.size, cut)


def test_histogram_counts_digits_after_a_prefix():
    u = np.random.default_rng(0).integers(0, 1 << 31, (2, 5000), np.uint32)
    u[:, :100] = u[0, 0]
    prefix = np.array([0, 0, u[0, 0] >> 20, u[1, 0] >> 20], np.uint32)
    first, second = (_host.histogram(u, p, shift, 11) for p, shift in ((prefix[:2], 20), (prefix, 9)))
    for c in range(2):
        np.testing.assert_array_equal(first[c], np.bincount(u[c] >> 20, minlength=2048))
        mine = u[c][u[c] >> 20 == prefix[2 + c]]
        np.testing.assert_array_equal(second[2 + c], np.bincount((mine >> 9) & 2047, minlength=2048))
