"""What Unicode says about characters: default word boundaries (UAX#29) and the few properties that splitters ask for.

Runs on the host, in numpy; `regex` brings the property tables and is asked once per character ever seen.
"""

import functools

import numpy as np

# Word_Break values, in the order of their codes here. A letter can also be an Extended_Pictographic (WB3c), so that
# property has a bit of its own.
_WORD_BREAK = (
    "CR", "LF", "Newline", "Extend", "ZWJ", "Format", "Katakana", "Hebrew_Letter", "ALetter", "Single_Quote", "Double_Quote",
    "MidNumLet", "MidLetter", "MidNum", "Numeric", "ExtendNumLet", "Regional_Indicator", "WSegSpace",
)  # fmt: skip
_CODE = {name: code for code, name in enumerate(_WORD_BREAK, 1)}
_OTHER = 0
_PICTOGRAPHIC, PUNCTUATION, LOWER, UPPER, SPACE = 1 << 5, 1 << 6, 1 << 7, 1 << 8, 1 << 9
_UNSEEN = 1 << 15


@functools.cache
def _table() -> np.ndarray:
    """One entry per code point, filled as characters are met: the full table would cost a second, texts use little of it."""
    return np.full(0x110000, _UNSEEN, np.uint16)


@functools.cache
def _pattern():
    import regex

    groups = [rf"(?P<{name}>\p{{WB={name}}})" for name in _WORD_BREAK]
    properties = {_PICTOGRAPHIC: "Extended_Pictographic", PUNCTUATION: "P", LOWER: "Ll", UPPER: "Lu", SPACE: "White_Space"}
    return regex.compile("|".join(groups)), [(bit, regex.compile(rf"\p{{{p}}}")) for bit, p in properties.items()]


def properties(points: np.ndarray) -> np.ndarray:
    """Word_Break code (low five bits) and property bits of each code point."""
    table = _table()
    fresh = np.unique(points[table[points] == _UNSEEN])
    word_break, others = _pattern() if fresh.size else (None, ())
    for point in fresh:
        char = chr(point)
        found = word_break.match(char)  # pyright: ignore[reportOptionalMemberAccess]
        code = _CODE[str(found.lastgroup)] if found else _OTHER
        table[point] = code | sum(bit for bit, pattern in others if pattern.match(char))
    return table[points]


def word_bounds(props: np.ndarray) -> np.ndarray:
    """UAX#29: True where a default word begins, one bool per character.

    The rules are pairwise once ignorable characters have joined the one before them (WB4), so every rule is one numpy
    expression over the characters that are left: `b` before the candidate boundary, `c` after it, `a` and `d` one further.
    """
    n = len(props)
    if n == 0:
        return np.zeros(0, bool)
    code = props & 31
    is_ = lambda x, *names: np.isin(x, [_CODE[name] for name in names])
    newline = is_(code, "CR", "LF", "Newline")
    ignorable = is_(code, "Extend", "ZWJ", "Format")
    after_newline = np.r_[True, newline[:-1]]
    base = ~ignorable | after_newline  # WB3a, WB3b, WB4
    at = np.flatnonzero(base)
    kind = np.where(ignorable[at], _OTHER, code[at])

    edge = np.array([_OTHER], kind.dtype)
    c, b, a, d = kind[1:], kind[:-1], np.r_[edge, kind[:-2]], np.r_[kind[2:], edge]
    a, d = a[: len(c)], d[: len(c)]
    touching = at[1:] == at[:-1] + 1
    letter = lambda x: is_(x, "ALetter", "Hebrew_Letter")
    numeric = lambda x: is_(x, "Numeric")
    mid_letter = lambda x: is_(x, "MidLetter", "MidNumLet", "Single_Quote")
    mid_number = lambda x: is_(x, "MidNum", "MidNumLet", "Single_Quote")
    hebrew, katakana, extender = (lambda x, n=n: is_(x, n) for n in ("Hebrew_Letter", "Katakana", "ExtendNumLet"))
    single, double = (lambda x, n=n: is_(x, n) for n in ("Single_Quote", "Double_Quote"))
    joined = is_(b, "CR") & is_(c, "LF") & touching  # WB3
    joined |= is_(code[at[1:] - 1], "ZWJ") & (props[at[1:]] & _PICTOGRAPHIC > 0)  # WB3c
    joined |= is_(b, "WSegSpace") & is_(c, "WSegSpace") & touching  # WB3d
    joined |= letter(b) & letter(c)  # WB5
    joined |= letter(b) & mid_letter(c) & letter(d)  # WB6
    joined |= letter(a) & mid_letter(b) & letter(c)  # WB7
    joined |= hebrew(b) & single(c)  # WB7a
    joined |= hebrew(b) & double(c) & hebrew(d)  # WB7b
    joined |= hebrew(a) & double(b) & hebrew(c)  # WB7c
    joined |= (numeric(b) | letter(b)) & numeric(c)  # WB8, WB9
    joined |= numeric(b) & letter(c)  # WB10
    joined |= numeric(a) & mid_number(b) & numeric(c)  # WB11
    joined |= numeric(b) & mid_number(c) & numeric(d)  # WB12
    joined |= katakana(b) & katakana(c)  # WB13
    wordy = lambda x: letter(x) | numeric(x) | katakana(x)
    joined |= (wordy(b) | extender(b)) & extender(c)  # WB13a
    joined |= extender(b) & wordy(c)  # WB13b
    flag = is_(kind, "Regional_Indicator")
    here = np.arange(len(kind))
    run_start = np.maximum.accumulate(np.where(flag, -1, here)) + 1  # where the present run of flags began
    joined |= flag[1:] & flag[:-1] & ((here - run_start)[1:] % 2 == 1)  # WB15, WB16: flags pair up from the left

    out = np.zeros(n, bool)
    out[at] = np.r_[True, ~joined]
    return out
