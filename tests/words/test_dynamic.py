"""Dynamic tokenization: a plain BPE loop beside, boundaries, the rules for spaces, embeddings from a callable, faults."""

import collections
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge import words

BYTES = [bytes([b]) for b in range(256)]
TEXTS = ["the theme of the thesis is there", "other mothers, others' brothers", "  two\n\nlines\n", "größer als groß, 漢字漢字"]


def batch(texts=TEXTS):
    raw = [t.encode() for t in texts]
    ids = np.zeros((len(raw), max(map(len, raw))), np.int64)
    for row, r in zip(ids, raw, strict=True):
        row[: len(r)] = np.frombuffer(r, np.uint8)
    return ids, np.arange(ids.shape[1]) < np.array([len(r) for r in raw])[:, None]


def spelled(out, vocabulary=BYTES):
    every = [*vocabulary, *out.new]
    return [[every[t] for t in row if t >= 0] for row in out.ids]


def plain(rows, merges, may):
    """BPE over lists, pair by pair."""
    for _ in range(merges):
        pairs = collections.Counter(p for row in rows for p in itertools.pairwise(row) if may(*p))
        if not pairs:
            break
        best = max(pairs, key=lambda p: pairs[p])
        for k, row in enumerate(rows):
            out, i = [], 0
            while i < len(row):
                if tuple(row[i : i + 2]) == best:
                    out.append(row[i] + row[i + 1])
                    i += 2
                else:
                    out.append(row[i])
                    i += 1
            rows[k] = out
    return rows


def official(left, right):
    joined = left + right
    if any(b in b" \t\n" for b in joined[1:]):
        return joined != b"\n\n" and all(b in b" \t\n" for b in joined)
    return True


@pytest.mark.parametrize("merges", [0, 1, 7, 25, 1000])
def test_equal_to_plain_bpe(merges):
    ids, mask = batch([*TEXTS, "aaaaaaa aaaa aaaaa"])
    rows = [[bytes([b]) for b in row[m]] for row, m in zip(ids, mask, strict=True)]
    out = words.dynamic_tokens(ids, BYTES, merges, mask=mask)
    assert spelled(out) == plain(rows, merges, official)
    assert len(out.merges) <= merges


def test_the_plan_holds_words_and_spells_them():
    ids, mask = batch()
    starts = np.zeros(ids.shape, bool)
    for row, text in zip(starts, TEXTS, strict=True):
        row[: len(text.encode())] = words.starts(text)
    out = words.dynamic_tokens(ids, BYTES, 60, starts=starts, mask=mask)
    number = jnp.asarray(starts, jnp.int32)
    inside, at_head = (jm.merge(out.plan, number, reduce=reduce) for reduce in ("sum", "first"))
    np.testing.assert_array_equal(inside, at_head)  # a start stands at a segment's head, or nowhere
    for got, sizes, text in zip(spelled(out), out.plan.sizes, TEXTS, strict=True):
        assert b"".join(got) == text.encode()
        assert [len(t) for t in got] == sizes[: len(got)].tolist()
    assert out.ids.shape[1] < ids.shape[1] / 2
    small = words.dynamic_tokens(ids, BYTES, 60, starts=starts, mask=mask, capacity=5)
    assert small.ids.shape == (4, 5) and (small.ids == out.ids[:, :5]).all() and small.plan.overflow.sum() > 0


def test_rules_and_special_tokens():
    ids, mask = batch(["a b a b", "漢漢漢漢"])
    loose = words.dynamic_tokens(ids, BYTES, 3, mask=mask, across_spaces=True, across_characters=False)
    assert all(t.decode() for t in loose.new) and any(b" " in t[1:] for t in loose.new)
    strict = words.dynamic_tokens(ids, BYTES, 50, mask=mask)
    assert not any(b" " in t[1:] for t in strict.new) and any(t == "漢漢".encode() for t in strict.new)
    special = words.dynamic_tokens(np.array([[0, 1, 0, 0, 2, 0]]), [b"a", b"", b"b"], 9)
    assert special.ids.tolist() == [[0, 1, 5]] and special.new[2] == b"aaba"
    assert words.dynamic_tokens(ids, BYTES, 50, mask=mask, least=99).ids.shape == ids.shape
    known = words.dynamic_tokens(np.array([[0, 1]]), [b"a", b"b", b"ab"], 1)
    assert known.ids.tolist() == [[2]] and known.new == []
    assert words.dynamic_tokens(np.zeros((2, 0), int), BYTES, 3).ids.shape == (2, 0)


def test_embeddings_are_made_once():
    asked = []

    def embed(tokens):
        asked.append(tokens)
        return np.array([[len(t), t[0]] for t in tokens], np.float32)

    table = np.stack([np.zeros(256), np.arange(256)], axis=1).astype(np.float32)
    embeddings = words.cached_embeddings(embed, table, 100)
    ids, mask = batch()
    out = words.dynamic_tokens(ids, BYTES, 20, mask=mask)
    got = embeddings(out)
    for row, tokens in zip(got, spelled(out), strict=True):
        want = [[0 if len(t) == 1 else len(t), t[0]] for t in tokens]
        np.testing.assert_array_equal(row[: len(want)], want)
        assert not row[len(want) :].any()
    embeddings(out)
    assert len(asked) == 1 and len(asked[0]) == len(set(asked[0]))
    small = words.cached_embeddings(embed, table, 1)
    np.testing.assert_array_equal(small(out), got)
    small(out)
    assert len(asked) == 3 and len(asked[2]) == len(asked[1]) - 1


def test_bad_arguments(unchecked):
    ids = np.zeros((1, 3), int)
    with pytest.raises(ValueError, match=r"mask must have the shape of ids, \(1, 3\), got \(3,\)"):
        words.dynamic_tokens(ids, BYTES, 1, mask=np.ones(3, bool))
    with pytest.raises(ValueError, match="num_merges must be 0 or more, got -1"):
        words.dynamic_tokens(ids, BYTES, -1)
    with pytest.raises(ValueError, match="ids must lie between 0 and 255; mask padding out"):
        words.dynamic_tokens(ids - 1, BYTES, 1)
    with pytest.raises(ValueError, match="size must be 1 or more"):
        words.cached_embeddings(lambda t: np.zeros((len(t), 1)), np.zeros((1, 1)), 0)
    with pytest.raises(ValueError, match=r"embed must return \(1, 2\), got \(1, 1\)"):
        words.cached_embeddings(lambda t: np.zeros((len(t), 1)), np.zeros((256, 2)), 1)(words.dynamic_tokens(ids, BYTES, 1))
