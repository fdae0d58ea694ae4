"""Splitters: where do words begin? On the host, over a whole text at once."""

import itertools
from collections.abc import Iterator
from typing import Literal

import numpy as np

from jaxmerge.words import _unicode
from jaxmerge.words._vocabulary import Text, utf8

Rule = Literal["hat", "unicode", "whitespace"]


def starts(text: Text, *, rule: Rule = "hat", max_bytes: int | None = None) -> np.ndarray:
    """Where words begin, one bool per UTF-8 byte of the text.

    Args:
      text: bytes need not be valid UTF-8: every byte that belongs to no character counts as a letter-like character of its
        own, so nothing is lost.
      rule:
        "whitespace": whitespace belongs to the word before it (HAT's paper). Leading whitespace is a word of its own.
        "unicode": the default word boundaries of UAX#29.
        "hat": what the released HAT models use: UAX#29, then a cut after punctuation and between lower and upper case;
        a single space joins the word after it, punctuation the word before it.
      max_bytes: cut longer words, at a character's edge, unless a single character is longer than the limit.

    Returns:
      `Bool[np.ndarray, "n"]`, for `segments`. The first byte of a text always begins a word.

    Law:
      b"".join(split(text)) = text's bytes; with `max_bytes` no word is longer.

    Raises:
      ValueError: an unknown rule, `max_bytes` below 1, or a str with lone surrogates that stand for no byte. TypeError: neither
        text nor bytes.

    Example:
      >>> import jaxmerge as jm
      >>> jm.words.starts("Hi, you", rule="whitespace").astype(int).tolist()
      [1, 0, 0, 0, 1, 0, 0]

    Source: Hierarchical Autoregressive Transformers (arXiv:2501.10322), section 3; Unicode Standard Annex 29.
    """
    if rule not in ("hat", "unicode", "whitespace"):
        raise ValueError(f'starts: rule must be "hat", "unicode" or "whitespace", got {rule!r}.')
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"starts: max_bytes must be 1 or more, or None for no limit; got {max_bytes}.")
    raw = utf8("starts", text)
    out = np.zeros(len(raw), bool)
    for part in _chunks(raw):
        points, lead = _decode(raw[part])
        if lead is None:
            out[part] = _RULES[rule](points)
        else:
            out[part][lead] = _RULES[rule](points)
    out[:1] = True
    return out if max_bytes is None else _limit(raw, out, max_bytes)


def split(text: Text, *, rule: Rule = "hat", max_bytes: int | None = None) -> list[bytes]:
    """The words of a text, as bytes. See `starts`.

    Example:
      >>> import jaxmerge as jm
      >>> jm.words.split("Hello, world!  iPhone")
      [b'Hello,', b' world!', b'  ', b'i', b'Phone']
    """
    raw = utf8("split", text)
    at = [*np.flatnonzero(starts(raw, rule=rule, max_bytes=max_bytes)).tolist(), len(raw)]
    return [raw[i:j] for i, j in itertools.pairwise(at)]


_CHUNK = 1 << 15
"""Bytes at a time: what they need stays in a core's cache."""


def _chunks(raw: bytes) -> Iterator[slice]:
    """Parts of about `_CHUNK` bytes that end with a newline: no rule looks across one."""
    begin = 0
    while begin < len(raw):
        end = len(raw)
        if end - begin > _CHUNK:
            end = raw.rfind(b"\n", begin, begin + _CHUNK) + 1 or raw.find(b"\n", begin + _CHUNK) + 1 or end
        yield slice(begin, end)
        begin = end


def _decode(raw: bytes) -> tuple[np.ndarray, np.ndarray | None]:
    """The characters, and which bytes they begin with (None: each with its own). A byte of no character is U+DC80 to U+DCFF."""
    of_bytes = np.frombuffer(raw, np.uint8)
    if raw.isascii():
        return of_bytes, None
    points = np.frombuffer(raw.decode("utf-8", "surrogateescape").encode("utf-32-le", "surrogatepass"), np.uint32)
    lead = (of_bytes & 0xC0) != 0x80
    if np.count_nonzero(lead) != len(points) or (points - 0xDC80 < 0x80).any():
        width = np.where(points - 0xDC80 < 0x80, 1, 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000))
        lead = np.zeros(len(raw), bool)
        lead[np.cumsum(width) - width] = True
    return points, lead


def _whitespace(points: np.ndarray) -> np.ndarray:
    """Whitespace belongs to the word before it, so a word begins where it ends, and at the head."""
    white = _unicode.neighbours(_unicode.classes(points)) & _unicode.IS_WHITE > 0
    return ~white & np.r_[True, white[:-1]]


def _unicode_words(points: np.ndarray) -> np.ndarray:
    kinds = _unicode.classes(points)
    return _unicode.word_bounds(kinds, _unicode.neighbours(kinds))


def _hat(points: np.ndarray) -> np.ndarray:
    """The released rule, from UAX#29 bounds. Its step "merge runs of spaces" is WB3d of exact UAX#29 bounds already."""
    kinds = _unicode.classes(points)
    pairs = _unicode.neighbours(kinds)
    bounds = _unicode.word_bounds(kinds, pairs)
    bounds |= pairs & _unicode.CUT > 0
    single = bounds & np.r_[bounds[1:], True]
    space = single & (pairs & _unicode.IS_BLANK > 0)
    punctuation = single & (pairs & _unicode.IS_PUNCTUATION > 0)
    white = pairs & _unicode.IS_WHITE > 0
    if (pairs & _unicode.ODD).any():  # a piece counts as whitespace if it is nothing else
        at = np.flatnonzero(bounds)
        white = np.repeat(np.logical_and.reduceat(white, at), np.diff(at, append=len(white)))
    # Pieces join in pairs: space + word, space + punctuation, word + punctuation, punctuation + punctuation.
    joined = space[:-1] & ~white[1:]
    joined |= ~white[:-1] & punctuation[1:]
    bounds[1:] &= ~joined
    return bounds


_RULES = {"hat": _hat, "unicode": _unicode_words, "whitespace": _whitespace}


def _limit(raw: bytes, out: np.ndarray, max_bytes: int) -> np.ndarray:
    """Cut every word that is longer than the limit, at the last character's edge that fits."""
    at = np.r_[np.flatnonzero(out), len(out)]
    long = np.flatnonzero(np.diff(at) > max_bytes)
    here, end = at[long], at[long + 1]
    if not len(long):
        return out
    edge = np.zeros(len(out) + 1, np.int64)
    for part in _chunks(raw):
        lead = _decode(raw[part])[1]
        edge[part] = 1 if lead is None else lead
    edge[-1] = 1
    edge = np.maximum.accumulate(np.where(edge, np.arange(len(edge)), 0))  # the last edge at or before each byte
    while len(here):
        fits = edge[here + max_bytes]
        here = np.where(fits > here, fits, here + max_bytes)
        out[here] = True
        more = end - here > max_bytes
        here, end = here[more], end[more]
    return out
