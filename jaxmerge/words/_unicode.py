"""What Unicode says about characters: default word boundaries (UAX#29) and the few properties that splitters ask for.

Runs on the host, in numpy. Every character has a class, one byte: characters that are alike to every rule share one. Most
rules look at two neighbours, so that one table over pairs of classes answers them; the few that look further are asked where
that table says so. `regex` brings the properties and is asked once per character ever seen.
"""

import functools

import numpy as np

# Word_Break values, in the order of their codes here; 0 is any other.
_WORD_BREAK = (
    "CR", "LF", "Newline", "Extend", "ZWJ", "Format", "Katakana", "Hebrew_Letter", "ALetter", "Single_Quote", "Double_Quote",
    "MidNumLet", "MidLetter", "MidNum", "Numeric", "ExtendNumLet", "Regional_Indicator", "WSegSpace",
)  # fmt: skip
_CODE = {name: code for code, name in enumerate(_WORD_BREAK, 1)}
# Beside its code (low five bits) a class has the properties that are not Word_Break's.
PICTOGRAPHIC, PUNCTUATION, LOWER, UPPER, WHITE, BLANK = (1 << bit for bit in range(5, 11))
"""BLANK is U+0020 itself."""

_MANY = 64
"""Room for so many classes; Unicode 17 needs 33."""
_UNSEEN = 255
_OTHER = 0
"""The class of a character without any property."""

# What the table says of a character and the one before it.
JOIN, LOOK, TOUCH, CUT, ODD, IS_WHITE, IS_PUNCTUATION, IS_BLANK = (1 << bit for bit in range(8))
"""JOIN: no word begins between them. LOOK: that depends on one further. TOUCH: none begins if they touch, that is if nothing
lies between that the rules ignore. CUT: HAT begins one. ODD: whitespace may share a word with other characters. The last three
are properties of the character itself."""


class _Tables:
    """The class of each character met so far, the meaning of each class, and the table over pairs."""

    def __init__(self):
        self.of_point = np.full(0x110000, _UNSEEN, np.uint8)
        self.of_byte = b""
        self.meaning = np.zeros(_MANY, np.uint16)
        self.pairs = np.zeros(_MANY * _MANY, np.uint8)
        self._class_of: dict[int, int] = {}
        self._learn([_OTHER])
        self.add(np.arange(128))
        self.of_byte = self.of_point[:256].tobytes()

    def add(self, points: np.ndarray) -> None:
        word_break, others = _patterns()
        meaning = []
        for char in map(chr, points):
            found = word_break.match(char)
            code = _CODE[str(found.lastgroup)] if found else _OTHER
            meaning.append(code | sum(bit for bit, pattern in others if pattern.match(char)) | (BLANK if char == " " else 0))
        self._learn(meaning)
        self.of_point[points] = [self._class_of[m] for m in meaning]

    def _learn(self, meanings: list[int]) -> None:
        new = sorted(set(meanings) - set(self._class_of))
        for meaning in new:
            self.meaning[len(self._class_of)] = meaning
            self._class_of[meaning] = len(self._class_of)
        if new:
            b, c = np.meshgrid(self.meaning, self.meaning, indexing="ij")
            self.pairs = _pairs(b.ravel(), c.ravel())


@functools.cache
def tables() -> _Tables:
    """Filled as characters are met: to ask for all would cost seconds, and texts use few."""
    return _Tables()


@functools.cache
def _patterns():
    import regex

    groups = [rf"(?P<{name}>\p{{WB={name}}})" for name in _WORD_BREAK]
    properties = {PICTOGRAPHIC: "Extended_Pictographic", PUNCTUATION: "P", LOWER: "Ll", UPPER: "Lu", WHITE: "White_Space"}
    return regex.compile("|".join(groups)), [(bit, regex.compile(rf"\p{{{p}}}")) for bit, p in properties.items()]


def _is(meaning: np.ndarray, *names: str) -> np.ndarray:
    return np.isin(meaning & 31, [_CODE[name] for name in names])


def _letter(meaning: np.ndarray) -> np.ndarray:
    return _is(meaning, "ALetter", "Hebrew_Letter")


def _within_word(meaning: np.ndarray) -> np.ndarray:
    return _is(meaning, "MidLetter", "MidNumLet", "Single_Quote")


def _within_number(meaning: np.ndarray) -> np.ndarray:
    return _is(meaning, "MidNum", "MidNumLet", "Single_Quote")


def _ignored(meaning: np.ndarray) -> np.ndarray:
    return _is(meaning, "Extend", "ZWJ", "Format")


def _pairs(b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The rules of UAX#29 that two neighbours decide, or that depend on one further, and those of HAT."""
    numeric = lambda x: _is(x, "Numeric")
    wordy = lambda x: _letter(x) | numeric(x) | _is(x, "Katakana")
    extender = lambda x: _is(x, "ExtendNumLet")
    white = lambda x: x & WHITE > 0

    join = _letter(b) & _letter(c)  # WB5
    join |= _is(b, "Hebrew_Letter") & _is(c, "Single_Quote")  # WB7a
    join |= (numeric(b) | _letter(b)) & numeric(c)  # WB8, WB9
    join |= numeric(b) & _letter(c)  # WB10
    join |= _is(b, "Katakana") & _is(c, "Katakana")  # WB13
    join |= (wordy(b) | extender(b)) & extender(c)  # WB13a
    join |= extender(b) & wordy(c)  # WB13b

    hebrew, double = (lambda x, n=n: _is(x, n) for n in ("Hebrew_Letter", "Double_Quote"))
    look = _letter(b) & _within_word(c) | _within_word(b) & _letter(c)
    look |= hebrew(b) & double(c) | double(b) & hebrew(c)
    look |= numeric(b) & _within_number(c) | _within_number(b) & numeric(c)
    look |= _is(b, "Regional_Indicator") & _is(c, "Regional_Indicator")

    touch = _is(b, "CR") & _is(c, "LF")  # WB3
    touch |= _is(b, "ZWJ") & (c & PICTOGRAPHIC > 0)  # WB3c
    touch |= _is(b, "WSegSpace") & _is(c, "WSegSpace")  # WB3d

    cut = (b & PUNCTUATION > 0) | ((b & LOWER > 0) & (c & UPPER > 0))
    odd = white(b) & (_ignored(c) | extender(b)) | white(c) & extender(c)
    own = white(c) * IS_WHITE + (c & PUNCTUATION > 0) * IS_PUNCTUATION + (c & BLANK > 0) * IS_BLANK
    return (join * JOIN + (look & ~join) * LOOK + touch * TOUCH + cut * CUT + odd * ODD + own).astype(np.uint8)


def classes(points: np.ndarray) -> np.ndarray:
    """The class of each code point (uint32, or bytes of ASCII as uint8)."""
    known = tables()
    if points.dtype == np.uint8:
        return np.frombuffer(points.tobytes().translate(known.of_byte), np.uint8)
    found = known.of_point[points]
    if (found == _UNSEEN).any():
        known.add(np.unique(points[found == _UNSEEN]))
        found = known.of_point[points]
    return found


def neighbours(kinds: np.ndarray) -> np.ndarray:
    """What the table says of each character and the one before it; before the first lies none."""
    index = np.empty(len(kinds), np.uint16)
    index[:1] = _OTHER
    index[1:] = kinds[:-1]
    index *= _MANY
    index += kinds
    return tables().pairs.take(index)


def word_bounds(kinds: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """UAX#29: True where a default word begins, one bool per character.

    Args:
      kinds: from `classes`.
      pairs: from `neighbours(kinds)`.
    """
    meaning = tables().meaning
    ignorable = _among(kinds, _ignored(meaning))
    if not ignorable.any():
        out = pairs & (JOIN | TOUCH) == 0
        return _look(kinds, pairs, out)
    base = ~ignorable  # WB4: what is ignored belongs to the character before, unless that is none or a newline (WB3a, WB3b)
    base[0] = True
    base[1:] |= _among(kinds[:-1], _is(meaning, "CR", "LF", "Newline"))
    at = np.flatnonzero(base)
    left = np.where(ignorable[at], np.uint8(_OTHER), kinds[at])
    near = neighbours(left)
    out = np.zeros(len(kinds), bool)
    out[at] = _look(left, near, near & JOIN | pairs[at] & TOUCH == 0)
    return out


def _among(kinds: np.ndarray, some: np.ndarray) -> np.ndarray:
    """Which characters are of some classes: few as a rule, so that comparing is faster than looking up."""
    out = np.zeros(len(kinds), bool)
    for kind in np.flatnonzero(some):
        out |= kinds == kind
    return out


def _look(kinds: np.ndarray, pairs: np.ndarray, out: np.ndarray) -> np.ndarray:
    """The rules that look at `a` before or `d` after a candidate between `b` and `c`: where they hold, no word begins."""
    at = np.flatnonzero(pairs & LOOK)
    if not len(at):
        return out
    around = at[:, None] + np.array([-2, -1, 0, 1])
    known = (around >= 0) & (around < len(kinds))
    a, b, c, d = np.where(known, tables().meaning[kinds[np.clip(around, 0, len(kinds) - 1)]], _OTHER).T
    hebrew, double, numeric = (lambda x, n=n: _is(x, n) for n in ("Hebrew_Letter", "Double_Quote", "Numeric"))
    joined = _letter(b) & _within_word(c) & _letter(d)  # WB6
    joined |= _letter(a) & _within_word(b) & _letter(c)  # WB7
    joined |= hebrew(b) & double(c) & hebrew(d)  # WB7b
    joined |= hebrew(a) & double(b) & hebrew(c)  # WB7c
    joined |= numeric(a) & _within_number(b) & numeric(c)  # WB11
    joined |= numeric(b) & _within_number(c) & numeric(d)  # WB12
    out[at[joined]] = False
    flags = at[_is(b, "Regional_Indicator")]
    if len(flags):  # WB15, WB16: flags pair up from the left, so every other candidate of a run is none
        new_run = np.diff(flags, prepend=-9) != 1
        run_start = flags[np.maximum.accumulate(np.where(new_run, np.arange(len(flags)), 0))]
        out[flags[(flags - run_start) % 2 == 0]] = False
    return out
