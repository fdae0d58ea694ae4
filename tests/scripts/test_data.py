"""The corpora: held-out text is apart, windows are a function of seed and step, baselines are what they say."""

import numpy as np
import pytest

from scripts import data


@pytest.fixture(scope="module", params=data.DOMAINS)
def corpus(request):
    return request.param, data.load(request.param)


def test_nothing_held_out_is_trained_on(corpus):
    domain, c = corpus
    assert len(c.heldout) > 20_000 and len(c.train) > 5 * len(c.heldout)
    if domain == "prose":
        paragraphs = lambda x: {p.strip() for p in x.tobytes().decode().split("\n\n") if p.strip()}
        assert not paragraphs(c.train) & paragraphs(c.heldout)
    else:
        names = [n for n in data.sources() if data.is_held_out(n)]
        assert names and not any("test" in n.split("/") or n.startswith("site-packages") for n in data.sources())


def test_windows(corpus):
    _, c = corpus
    draw = lambda step: data.draw(c.train, np.random.default_rng((0, step)), 4, 64)
    np.testing.assert_array_equal(draw(3), draw(3))
    assert not np.array_equal(draw(3), draw(4))
    assert draw(0).tobytes()[:64] in c.train.tobytes()
    w = data.tile(c.heldout, 16, 256)
    assert (
        w.shape == (16, 256) and w[0].tobytes() == c.heldout[:256].tobytes() and w[-1].tobytes() == c.heldout[-256:].tobytes()
    )


def test_baselines_on_text_of_known_entropy():
    rng = np.random.default_rng(0)
    coin = rng.integers(97, 99, 40_000).astype(np.uint8)  # one fair bit per byte, no order
    windows = data.tile(rng.integers(97, 99, 4000).astype(np.uint8), 8, 256)
    scored = np.zeros(windows.shape, bool)
    scored[:, 2:] = rng.random((8, 254)) < 0.5
    assert data.byte_frequency_bits(coin, windows, scored) == pytest.approx(1, abs=0.02)
    assert data.order_2_bits(coin, windows, scored) == pytest.approx(1, abs=0.02)
    cycle = np.tile(np.frombuffer(b"abcd", np.uint8), 5000)
    windows = data.tile(cycle, 8, 256)
    assert data.byte_frequency_bits(cycle, windows, scored) == pytest.approx(2, abs=0.03)
    assert data.order_2_bits(cycle, windows, scored) < 0.01
    with pytest.raises(ValueError, match="the first two bytes"):
        data.order_2_bits(cycle, windows, ~scored)


def test_unknown_domain():
    with pytest.raises(ValueError, match="domain must be one of"):
        data.load("poems")
