"""Packing: nothing lost, nothing leaks, both budgets hold, little waste, and a stream is as good as a batch."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge import words

ALPHABET = np.array(list("abc AB 12.,'\n\r\tß漢\u0308 "))


def texts(count, longest, seed=0):
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(ALPHABET, rng.integers(0, longest))) for _ in range(count)]


def check(packed, documents, max_bytes, max_words, *, end=None, offset=3):
    """Every promise of `Packed`."""
    assert words.unpack(packed, offset=offset) == {i: t.encode() for i, t in enumerate(documents) if t or end is not None}
    there = packed.documents >= 0
    assert packed.ids.shape[1] == max_bytes and packed.words.max(initial=-1) < max_words
    assert all(a.dtype == np.int32 and a.shape == packed.ids.shape for a in packed[:4])
    for blank, value in zip(packed[:4], (0, -1, -1, -1), strict=True):
        assert (blank[~there] == value).all()
    for row in range(len(packed.ids)):
        used = there[row].sum()
        assert there[row, :used].all() and used
        word, document = packed.words[row, :used], packed.documents[row, :used]
        assert word[0] == 0 and set(np.diff(word)) <= {0, 1}
        assert all(len(set(document[word == w])) == 1 for w in range(word[-1] + 1))
    covered = np.zeros(there.shape, int)
    for row, at, length, document, begin in packed.pieces:
        covered[row, at : at + length] += 1
        assert (packed.documents[row, at : at + length] == document).all()
        np.testing.assert_array_equal(packed.positions[row, at : at + length], np.arange(length))
        text = documents[document].encode()
        alone = np.r_[words.starts(text, max_bytes=max_bytes), True][begin : begin + length]
        np.testing.assert_array_equal(np.diff(packed.words[row, at : at + length], prepend=-9) > 0, alone)
    assert (covered == there).all()


@pytest.mark.parametrize("end", [None, 1])
@pytest.mark.parametrize("max_bytes, max_words", [(64, 30), (64, 5), (20, 20), (7, 3)])
def test_every_promise(max_bytes, max_words, end):
    documents = texts(60, 90)
    check(words.pack(documents, max_bytes, max_words, end=end), documents, max_bytes, max_words, end=end)


@pytest.mark.parametrize("end", [None, 1])
def test_filling_holes_keeps_every_promise_and_wastes_less(end):
    """Documents about as long as rows: best fit alone must leave much empty; with holes filled next to nothing is."""
    documents = [text for text in texts(400, 70, seed=3) if len(text.encode()) > 40]
    packed = [words.pack(documents, 70, 70, end=end, fill=fill) for fill in (None, 8)]
    check(packed[1], documents, 70, 70, end=end)
    assert packed[0].waste(70) > 0.05 and packed[1].waste(70) < 0.03
    tight = words.pack(documents, 70, 20, end=end, fill=1)
    check(tight, documents, 70, 20, end=end)
    assert tight.waste(20) < 0.03


@pytest.mark.parametrize("fill", [None, 4])
def test_a_stream_keeps_every_promise(fill):
    documents = texts(300, 120)
    batches = list(words.pack_stream(iter(documents), 64, 20, rows=4, look=3, end=1, fill=fill))
    assert {len(b.ids) for b in batches[:-1]} == {4} and 0 < len(batches[-1].ids) <= 4
    rows = np.cumsum([0] + [len(b.ids) for b in batches])
    pieces = [b.pieces + np.array([row, 0, 0, 0, 0]) for b, row in zip(batches, rows[:-1], strict=True)]
    whole = words.Packed(*(np.concatenate(parts) for parts in list(zip(*batches, strict=True))[:4]), np.concatenate(pieces))
    check(whole, documents, 64, 20, end=1)
    endless = words.pack_stream(itertools.cycle(documents), 64, 20, rows=2)
    assert [next(endless).ids.shape for _ in range(50)] == [(2, 64)] * 50
    assert list(words.pack_stream([], 8, 8, rows=2)) == list(words.pack_stream(["", ""], 8, 8, rows=2)) == []


def test_documents_join_as_words_of_a_plan():
    packed = words.pack(["Hi, you", "no", "well then"], 12, 4)
    plan = jm.Plan(jnp.asarray(packed.words), 4)
    assert plan.sizes.tolist() == [[3, 4, 0, 0], [2, 4, 5, 0]]
    same = packed.documents[:, :, None] == packed.documents[:, None, :]
    assert same[:, 0].sum(axis=1).tolist() == [7, 2]


def prose(count, seed):
    """Sentences with lengths and words as text has them: a lognormal number of words, each of a geometric length."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfw"))
    one = lambda: "".join(rng.choice(letters, 1 + rng.geometric(0.25)))
    return [" ".join(one() for _ in range(1 + int(rng.lognormal(3.2, 0.8)))) + "." for _ in range(count)]


def test_little_is_wasted():
    """Under 3 % of rows of 2,048 bytes with a word budget a tenth above the mean, on documents of about 200 bytes."""
    documents = prose(1500, 0)
    raw = "\n".join(documents).encode()
    budget = int(2048 * words.starts(raw).sum() / len(raw) * 1.1)
    packed = words.pack(documents, 2048, budget)
    assert packed.waste(budget) < 0.03
    streamed = list(words.pack_stream(documents, 2048, budget, rows=8, look=4))
    assert np.mean([b.waste(budget) for b in streamed[:-1]]) < 0.03


def test_rows_follow_their_documents():
    packed = words.pack(prose(200, 1), 1024, 300)
    first = [packed.documents[row, 0] for row in range(len(packed.ids))]
    assert first == sorted(first)
    assert all((np.diff(row[row >= 0]) >= 0).all() for row in packed.documents)


def test_other_rules_and_numberings():
    documents = texts(30, 60)
    packed = words.pack(documents, 40, 40, rule="whitespace", longest_word=5, end=256, offset=0)
    assert words.unpack(packed, offset=0) == {i: t.encode() for i, t in enumerate(documents)}
    assert (packed.ids == 256).sum() == 30
    longest = max(np.bincount(row[row >= 0]).max() for row in packed.words)
    assert longest <= 5
    raw = [b"\xff\xfe a", "caf\u00e9", b""]
    assert words.unpack(words.pack(raw, 9, 9)) == {0: b"\xff\xfe a", 1: "caf\u00e9".encode()}


def test_bad_arguments(unchecked):
    for call in (lambda t: words.pack(t, 8, 2), lambda t: list(words.pack_stream(t, 8, 2, rows=1))):
        with pytest.raises(TypeError, match=r"texts must be several, such as \[text\]; got one str"):
            call("one text")
        with pytest.raises(TypeError, match="a text must be str or bytes, got int"):
            call([7])
    with pytest.raises(ValueError, match="max_words must be 1 or more, got 0"):
        words.pack(["a"], 8, 0)
    with pytest.raises(ValueError, match="end must be no byte's id, 3 to 258; got 7"):
        words.pack(["a"], 8, 8, end=7)
    with pytest.raises(ValueError, match="look must be 1 or more, got 0"):
        words.pack_stream(["a"], 8, 8, rows=1, look=0)
    with pytest.raises(ValueError, match="fill must be 1 byte or more, or None; got 0"):
        words.pack(["a"], 8, 8, fill=0)
    with pytest.raises(ValueError, match='rule must be "hat"'):
        words.pack(["a"], 8, 8, rule="bpe")  # pyright: ignore[reportArgumentType]
