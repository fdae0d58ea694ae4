"""Splitters: laws, UAX#29 by hand, and every sentence of the released HAT splitter."""

import itertools
import json
import pathlib

import numpy as np
import pytest

from jaxmerge import words

CASE = json.loads((pathlib.Path(__file__).parents[1] / "golden/bytes/hat_splitter_a.json").read_text())
SENTENCES = CASE["sentences"]


def golden_words(arrays, limit):
    flat, lengths = arrays[f"flat/{limit}/bytes"].tobytes(), arrays[f"flat/{limit}/word_len"]
    ends = np.cumsum(lengths)
    every = [flat[end - n : end] for n, end in zip(lengths, ends, strict=True)]
    at = np.r_[0, np.cumsum(arrays[f"flat/{limit}/words_per_sentence"])]
    return [every[i:j] for i, j in itertools.pairwise(at)]


@pytest.mark.parametrize("limit", [None, 100, 16, 4, 1])
def test_hat_rule_equals_the_released_splitter(golden, limit):
    want = golden_words(golden("bytes/hat_splitter_a"), limit or "unlimited")
    assert [words.split(s, max_bytes=limit) for s in SENTENCES] == want
    if limit is None:
        assert [[w.decode() for w in words.split(s)] for s in SENTENCES] == CASE["split_text"]


def test_unicode_rule_equals_the_unicode_consortium():
    """All 1,944 strings of WordBreakTest, of Unicode 17, which is the version of `regex` that has its tables."""
    lines = (pathlib.Path(__file__).parents[1] / "golden/bytes/word_break_17.txt").read_text("utf-8").splitlines()
    cases = [line.strip("÷ ").split("÷") for line in lines if not line.startswith("#")]
    assert len(cases) == 1944
    for case in cases:
        want = ["".join(chr(int(point, 16)) for point in word.split("×")) for word in case]
        assert [w.decode() for w in words.split("".join(want), rule="unicode")] == want


# Each line is one rule of UAX#29; the bar marks a boundary.
UAX29 = {
    "WB3": "a|\r\n|b",
    "WB3a, WB3b: nothing attaches to a newline": "\n|\u0308|a",
    "WB3c": "👩\u200d👧|👧",
    "WB3c: a letter that is also a pictograph": "x\u200dⓂ",
    "WB3d": "a|  |b",
    "WB3d: only touching spaces": " \u0308| |b",
    "WB4": "a\u0308\u200db",
    "WB5": "abc",
    "WB6, WB7": "can't|'|1",
    "WB6: across ignorable characters": "a\u0301.\u0301b",
    "WB6: not before a digit": "a|.|1",
    "WB7a": "ש'",
    "WB7b, WB7c": 'ש"ש|"',
    "WB8, WB9, WB10": "a1b22",
    "WB11, WB12": "3.14|,|x",
    "WB11: one separator only": "3|.|.|14",
    "WB13": "カタカナ|あ|い",
    "WB13a, WB13b": "_a_1_カ_",
    "WB15, WB16": "🇩🇪|🇫🇷|🇪",
    "WB15: ignorable characters do not part a flag": "a|🇩\u200d🇪|🇫",
    "WB999": "ว\u0e31|น",
}


@pytest.mark.parametrize("rule", UAX29)
def test_unicode_rules(rule):
    pieces = UAX29[rule].split("|")
    assert [w.decode() for w in words.split("".join(pieces), rule="unicode")] == pieces


def test_whitespace_belongs_to_the_word_before():
    assert words.split("\u3000 a b\u2003\nc ", rule="whitespace") == [s.encode() for s in ("\u3000 ", "a ", "b\u2003\n", "c ")]


@pytest.mark.parametrize("rule", ["hat", "unicode", "whitespace"])
@pytest.mark.parametrize("limit", [None, 7, 3])
def test_nothing_is_lost_and_limits_hold(rule, limit):
    rng = np.random.default_rng(0)
    alphabet = "aZ9 .,'_\n\tüß漢カ\u0308\u200d🇩👧שन\u0000"
    texts = ["".join(rng.choice(list(alphabet), 40)) for _ in range(50)]
    raw = [t.encode() for t in texts] + [rng.integers(0, 256, 60).astype(np.uint8).tobytes() for _ in range(50)]
    for text in raw:
        got = words.split(text, rule=rule, max_bytes=limit)
        assert b"".join(got) == text
        assert all(got)
        assert limit is None or max(map(len, got)) <= limit
        at = words.starts(text, rule=rule, max_bytes=limit)
        assert at.dtype == bool and at.shape == (len(text),) and at.sum() == len(got)


def test_a_limit_cuts_inside_a_character_only_if_it_must():
    assert words.split("äöü", max_bytes=3) == [s.encode() for s in "äöü"]
    assert words.split("👧", max_bytes=3) == ["👧".encode()[:3], "👧".encode()[3:]]


@pytest.mark.parametrize("rule", ["hat", "unicode", "whitespace"])
def test_parts_are_the_whole(rule, monkeypatch):
    """Long texts are split part by part, from newline to newline: the same as in one go, as text and as bytes."""
    rng = np.random.default_rng(1)
    alphabet = list("aZ9 .,'\"\n\n\r\tüß漢カ\u0308\u200d🇩👧שन\u202f")
    texts = ["".join(rng.choice(alphabet, 300)) for _ in range(20)] + ["\u0308\n" * 40, "x" * 90, "\r\n" * 50]
    raw = [t.encode() for t in texts] + [rng.choice(np.frombuffer(b"\n\r a\xc3\xbc\xff\xe2\x80", np.uint8), 300).tobytes()]
    whole = [words.starts(r, rule=rule) for r in raw]
    for text, want in zip(texts, whole, strict=False):
        np.testing.assert_array_equal(words.starts(text, rule=rule), want)
    monkeypatch.setattr("jaxmerge.words._split._CHUNK", 16)
    for r, want in zip(raw, whole, strict=True):
        np.testing.assert_array_equal(words.starts(r, rule=rule), want)
        assert max(map(len, words.split(r, rule=rule, max_bytes=5))) <= 5


def test_whitespace_within_a_word_is_no_whitespace():
    """A narrow no-break space joins letters; a space that carries an accent is a letter to HAT."""
    assert words.split("a\u202fb!") == ["a\u202fb!".encode()]
    assert words.split("\u202f!") == ["\u202f".encode(), b"!"]
    assert words.split(" \u0308!") == [" \u0308!".encode()]
    assert words.split("  \u0308!") == ["  \u0308!".encode()]
    assert words.split("  !") == [b"  ", b"!"]


def test_bytes_that_are_no_character_stand_alone():
    assert words.split(b"ab\xff\xfecd") == [b"ab", b"\xff", b"\xfe", b"cd"]
    assert words.split(b"caf\xc3", rule="whitespace") == [b"caf\xc3"]


def test_every_kind_of_bytes_is_text():
    raw = "é, b".encode()
    for same in (bytearray(raw), memoryview(raw), np.frombuffer(raw, np.uint8)):
        assert words.split(same) == words.split(raw)
        np.testing.assert_array_equal(words.to_ids(same), words.to_ids(raw))
    assert words.to_bytes(words.to_ids("\udcff")) == b"\xff"  # as Python reads a byte of no character


def test_bad_arguments(unchecked):
    for name in ("split", "starts", "to_ids"):
        with pytest.raises(TypeError, match=f"{name}: a text must be str or bytes, got NoneType"):
            getattr(words, name)(None)
        with pytest.raises(ValueError, match=f"{name}: the text has a lone surrogate, U.D800"):
            getattr(words, name)("\ud800")
    with pytest.raises(ValueError, match=r'rule must be "hat", "unicode" or "whitespace", got \'bpe\''):
        words.starts("a", rule="bpe")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="max_bytes must be 1 or more"):
        words.starts("a", max_bytes=0)
    with pytest.raises(ValueError, match=r"lone surrogate, U\+D800"):
        words.starts("a\ud800")


def test_vocabulary_round_trip():
    every = bytes(range(256))
    ids = words.to_ids(every)
    assert ids.dtype == np.int32 and ids.min() == 3 and ids.max() == 258 < words.SIZE
    assert words.to_bytes(np.r_[ids, words.EOS, words.PAD, words.UNK, 300]) == every
