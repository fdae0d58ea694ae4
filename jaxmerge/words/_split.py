"""Splitters: where do words begin? On the host, over a whole text at once."""

import itertools
from typing import Literal

import numpy as np

from jaxmerge.words import _unicode

Rule = Literal["hat", "unicode", "whitespace"]


def starts(text: str | bytes, *, rule: Rule = "hat", max_bytes: int | None = None) -> np.ndarray:
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
      ValueError: an unknown rule, `max_bytes` below 1, or a str with lone surrogates that stand for no byte.

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
    if isinstance(text, bytes):
        text = text.decode("utf-8", "surrogateescape")
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    width = _width(points)
    props = _unicode.properties(points)
    if rule == "whitespace":
        space = props & _unicode.SPACE > 0
        chars = ~space & np.r_[True, space[:-1]] if len(space) else space
    else:
        chars = _unicode.word_bounds(props)
        chars = _hat(props, points, chars) if rule == "hat" else chars
    chars[:1] = True
    edge = np.cumsum(width) - width  # the first byte of each character
    out = np.zeros(int(width.sum()), bool)
    out[edge[chars]] = True
    return out if max_bytes is None else _limit(out, edge, max_bytes)


def split(text: str | bytes, *, rule: Rule = "hat", max_bytes: int | None = None) -> list[bytes]:
    """The words of a text, as bytes. See `starts`.

    Example:
      >>> import jaxmerge as jm
      >>> jm.words.split("Hello, world!  iPhone")
      [b'Hello,', b' world!', b'  ', b'i', b'Phone']
    """
    raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
    at = [*np.flatnonzero(starts(text, rule=rule, max_bytes=max_bytes)).tolist(), len(raw)]
    return [raw[i:j] for i, j in itertools.pairwise(at)]


def _width(points: np.ndarray) -> np.ndarray:
    """UTF-8 bytes per character. A byte that was no character came through as U+DC80 to U+DCFF."""
    escaped = (points >= 0xDC80) & (points <= 0xDCFF)
    wrong = (points >= 0xD800) & (points <= 0xDFFF) & ~escaped
    if wrong.any():
        raise ValueError(f"starts: the text has a lone surrogate, U+{points[wrong][0]:04X}, that no bytes encode; pass bytes.")
    return np.where(escaped, 1, 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)).astype(np.int64)


def _hat(props: np.ndarray, points: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """The released rule, from UAX#29 bounds. Its step "merge runs of spaces" is WB3d of exact UAX#29 bounds already."""
    if len(points) == 0:
        return bounds
    punctuation, space = props & _unicode.PUNCTUATION > 0, props & _unicode.SPACE > 0
    bounds = bounds.copy()
    bounds[1:] |= punctuation[:-1]
    bounds[1:] |= (props[:-1] & _unicode.LOWER > 0) & (props[1:] & _unicode.UPPER > 0)
    at = np.flatnonzero(bounds)
    length = np.diff(np.r_[at, len(points)])
    blank, single = np.logical_and.reduceat(space, at), length == 1
    is_space = single & (points[at] == 0x20)
    is_punctuation = single & punctuation[at]
    is_word = ~blank & ~is_punctuation
    # Pieces join in pairs: space + word, space + punctuation, word + punctuation, punctuation + punctuation.
    follows = (is_space[:-1] & is_word[1:]) | (~blank | is_space)[:-1] & is_punctuation[1:]
    bounds[at[1:][follows]] = False
    return bounds


def _limit(out: np.ndarray, edge: np.ndarray, max_bytes: int) -> np.ndarray:
    """Cut every word that is longer than the limit, at the last character's edge that fits."""
    is_edge = np.zeros(len(out) + 1, bool)
    is_edge[edge] = True
    is_edge[-1] = True
    at = np.r_[np.flatnonzero(out), len(out)]
    for i in np.flatnonzero(np.diff(at) > max_bytes):
        here, end = at[i], at[i + 1]
        while end - here > max_bytes:
            fits = np.flatnonzero(is_edge[here + 1 : here + max_bytes + 1])
            here += fits[-1] + 1 if len(fits) else max_bytes
            out[here] = True
    return out
