"""Span corruption: the official outputs for every mask, the law of restoring, T5's counts and distribution, faults."""

import itertools

import numpy as np
import pytest

from jaxmerge import words

CASES = 14


def test_corruption_equals_the_official(golden):
    z = golden("bytes/span_a")
    for i in range(CASES):
        tokens, mask = z[f"case{i}/tokens"][None], z[f"case{i}/mask"][None]
        inputs, targets = words.corrupt(tokens, mask)
        np.testing.assert_array_equal(inputs[0], z[f"case{i}/inputs"])
        np.testing.assert_array_equal(targets[0], z[f"case{i}/targets"])
        assert inputs.dtype == targets.dtype == np.int32


def test_a_ragged_batch_is_its_rows(golden):
    """All official cases at once, each with its own length."""
    z = golden("bytes/span_a")
    lengths = np.array([len(z[f"case{i}/tokens"]) for i in range(CASES)])
    ids, mask = np.full((CASES, lengths.max()), 77, np.int32), np.ones((CASES, lengths.max()), bool)
    for i, n in enumerate(lengths):
        ids[i, :n], mask[i, :n] = z[f"case{i}/tokens"], z[f"case{i}/mask"]
    for name, got in words.corrupt(ids, mask, lengths=lengths)._asdict().items():
        for i, row in enumerate(got):
            want = z[f"case{i}/{name}"]
            np.testing.assert_array_equal(row[: len(want)], want)
            assert not row[len(want) :].any()


def test_lengths_equal_the_official(golden):
    for inputs, thousandths, mean, length, targets in golden("bytes/span_a")["lengths/rows"]:
        for rounding in ("t5", "flax"):
            got = words.span_lengths(int(inputs), density=thousandths / 1000, mean=mean, rounding=rounding)
            assert got == (length, targets)


@pytest.mark.parametrize("roll", [False, True])
def test_masks_have_the_official_counts(golden, roll):
    for length, thousandths, mean, noise, spans, first in golden("bytes/span_a")["t5_mask/stats"]:
        how = dict(density=thousandths / 1000, mean=mean)
        mask = words.span_mask(np.random.default_rng(0), 50, int(length), roll=roll, **how)
        assert (mask.sum(1) == noise).all()
        runs = (np.diff(mask.astype(int), axis=1, prepend=0) == 1).sum(1)
        assert (runs == spans).all() and (mask[:, 0] == first).all() if not roll else (runs <= spans + 1).all()
        if roll:
            assert mask[:, 0].any() and abs(mask.mean(0) - noise / length).max() < 0.5


def test_spans_are_uniform():
    """Every way to cut what leaves, and what stays, is as likely: 10 of 20,000 draws each, within five deviations."""
    masks = words.span_mask(np.random.default_rng(0), 20_000, 12, density=0.4, mean=2.0)
    assert words.span_counts(12, density=0.4, mean=2.0) == (5, 2)
    _, count = np.unique(masks, axis=0, return_counts=True)
    ways = 6 * 4  # one cut among 6 places between 7 that stay, one among 4 between 5 that leave
    assert len(count) == ways
    expected = 20_000 / ways
    assert np.abs(count - expected).max() < 5 * np.sqrt(expected)


def test_conventions_differ_above_one_half():
    assert words.span_counts(100, density=0.8, mean=10.0, rounding="t5") == (80, 8)
    assert words.span_counts(100, density=0.8, mean=10.0, rounding="flax") == (80, 2)
    counts = lambda length: [words.span_counts(length, rounding=rounding) for rounding in ("t5", "flax")]
    assert counts(190) == [(29, 1), (28, 1)]  # float32 has 28.500002 bytes leave, float64 28.5, rounded to even
    assert all(len(set(counts(length))) == 1 for length in range(1, 1200) if (3 * length) % 20 != 10)
    crowded = words.span_mask(np.random.default_rng(0), 4, 10, density=0.9, mean=1.0)  # 9 spans, 1 byte to part them
    assert (crowded.sum(1) == 9).all()
    assert words.span_mask(np.random.default_rng(0), 3, 1).tolist() == [[False]] * 3


def restored(inputs, targets, spans):
    """Inputs with each sentinel replaced by its span of the targets; sentinels are known by their order."""
    out, rest = [], [int(t) for t in targets]
    for i in inputs:
        if spans and i == spans[0]:
            at = rest.index(spans[0])
            end = rest.index(spans[1]) if len(spans) > 1 and spans[1] in rest else rest.index(words.EOS)
            out += rest[at + 1 : end]
            spans = spans[1:]
        else:
            out.append(int(i))
    return out


def test_targets_put_back_make_the_text_whole():
    rng = np.random.default_rng(1)
    text = rng.integers(3, 200, (6, 400)).astype(np.int32)  # no byte is taken for a sentinel
    mask = words.span_mask(rng, 6, 400, mean=5.0)
    inputs, targets = words.corrupt(text, mask)
    assert inputs.shape == (6, 400 - 60 + 12 + 1) and targets.shape == (6, 60 + 12 + 1)
    for row, a, b in zip(text, inputs, targets, strict=True):
        assert restored(a, b, list(range(words.SENTINEL, words.SENTINEL - 12, -1))) == [*row.tolist(), words.EOS]


def test_bad_arguments(unchecked):
    ids = np.full((1, 8), 70, np.int32)
    with pytest.raises(ValueError, match=r"mask must have the shape of ids, \(1, 8\), got \(1, 7\)"):
        words.corrupt(ids, np.zeros((1, 7), bool))
    with pytest.raises(ValueError, match="a row has 4 spans, more than the 3 ids from 2 down"):
        words.corrupt(ids, np.array(list(itertools.islice(itertools.cycle([True, False]), 8)))[None], sentinel=2)
    for bad, message in (
        (dict(length=0), "length must be 1 byte"),
        (dict(length=9, density=1.0), "density must lie between 0 and 1"),
        (dict(length=9, mean=0.5), "mean must be 1 byte"),
        (dict(length=9, rounding="even"), 'rounding must be "t5" or "flax"'),
    ):
        with pytest.raises(ValueError, match=message):
            words.span_counts(**bad)
    with pytest.raises(ValueError, match="inputs must have room for 3 ids, got 2"):
        words.span_lengths(2)
