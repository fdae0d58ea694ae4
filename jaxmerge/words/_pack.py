"""Packing documents into rows under two budgets, bytes and words. On the host, in numpy.

A model that reads bytes and thinks in words has a static size for both. A document is cut only if it is longer than a row, and
then between words; the pieces go, longest first, each into the fullest row that still has room for it (best fit).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxmerge.words._split import Rule, starts
from jaxmerge.words._vocabulary import OFFSET, PAD, Text, utf8

Texts = Sequence[Text]


class _Budget(NamedTuple):
    """What a row holds and how documents are split."""

    max_bytes: int
    max_words: int
    rule: Rule
    longest_word: int
    end: int | None
    offset: int
    fill: int | None


class Packed(NamedTuple):
    """Rows of bytes, int32. Where there is no byte: `ids` is PAD, the other arrays are -1."""

    ids: Int[np.ndarray, "rows n"]
    documents: Int[np.ndarray, "rows n"]
    """Which text a byte is from: what attention must not cross."""
    words: Int[np.ndarray, "rows n"]
    """Which word of the row: `Plan(words, max_words)`."""
    positions: Int[np.ndarray, "rows n"]
    """Position in its piece of the document, from 0."""
    pieces: Int[np.ndarray, "pieces 5"]
    """Row, first position in the row, length, document, first byte in the document: of every piece, by row."""

    def waste(self, max_words: int) -> float:
        """The part of the rows that is empty, in bytes or in words, whichever is scarcer."""
        rows, n = self.ids.shape
        words = (self.words.max(axis=1, initial=-1) + 1).sum()
        return 1 - max((self.words >= 0).sum() / (rows * n), words / (rows * max_words))


def pack(
    texts: Texts,
    max_bytes: int,
    max_words: int,
    *,
    rule: Rule = "hat",
    longest_word: int | None = None,
    end: int | None = None,
    offset: int = OFFSET,
    fill: int | None = None,
) -> Packed:
    """Pack documents into as few rows as best fit finds.

    Args:
      texts: documents. An empty one takes no room.
      max_bytes, max_words: what a row holds. Words per byte differ by language; `starts` on a sample tells.
      rule, longest_word: how to split, as in `starts`; a word is no longer than a row in any case.
      end: an id to end every document with, a word of its own.
      offset: byte b is b + offset: 3 is ByT5's, 0 HAT's.
      fill: cut other documents too, to fill holes of so many bytes or more with the emptiest rows. By default a row stays as
        empty as best fit leaves it: little, unless documents are about as long as rows.

    Returns:
      Rows, and where each piece came from. Rows come in the order of their first documents, as documents do within them.

    Law:
      unpack(pack(texts, ...)) = texts, as bytes; a row's documents have no word, and no byte, in common; and a document's words
      are those that `starts` gives it alone.

    Raises:
      ValueError: a budget below 1, an end mark and room for one byte, an end that is a byte's id. TypeError: `texts` is a
        single text, or holds what is none.

    Example:
      >>> import jaxmerge as jm
      >>> packed = jm.words.pack(["Hi, you", "no", "well then"], 9, 3)
      >>> packed.ids.shape, packed.documents[0].tolist(), packed.words[0].tolist()
      ((2, 9), [0, 0, 0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1, 1, 2, 2])

    Source: best-fit packing, arXiv:2404.10830; the second budget is ours.
    """
    _check_several("pack", texts)
    budget = _budget(max_bytes, max_words, rule, longest_word, end, offset, fill)
    pieces = _cut(texts, 0, budget)
    return _write(*_best_fit(pieces, budget), budget)


def pack_stream(
    texts: Iterable[Text],
    max_bytes: int,
    max_words: int,
    *,
    rows: int,
    look: int = 16,
    rule: Rule = "hat",
    longest_word: int | None = None,
    end: int | None = None,
    offset: int = OFFSET,
    fill: int | None = None,
) -> Iterator[Packed]:
    """Pack an endless stream: batches of `rows` full rows, from a window of documents that is `look` batches long.

    Args:
      texts: documents, as they come.
      max_bytes, max_words, rule, longest_word, end, offset, fill: as in `pack`.
      rows: rows of each batch. The last batch has fewer; pad it, or leave it out.
      look: how many batches of text to choose from. What does not fill a row waits for the next window.

    Yields:
      `Packed`, whose documents are counted from the first of the stream.

    Raises:
      ValueError: as `pack`, and rows or look below 1.

    Example:
      >>> import jaxmerge as jm
      >>> [p.ids.shape for p in jm.words.pack_stream(["one two"] * 10, 16, 6, rows=2, look=1)]
      [(2, 16), (2, 16), (1, 16)]
    """
    _check_several("pack_stream", texts)
    budget = _budget(max_bytes, max_words, rule, longest_word, end, offset, fill)
    for name, value in dict(rows=rows, look=look).items():
        if value < 1:
            raise ValueError(f"pack_stream: {name} must be 1 or more, got {value}.")
    return _stream(texts, rows, look, budget)


def unpack(packed: Packed, *, offset: int = OFFSET) -> dict[int, bytes]:
    """The documents again: number to bytes, end marks left out.

    Example:
      >>> import jaxmerge as jm
      >>> jm.words.unpack(jm.words.pack(["Hi, you", "no"], 8, 3))
      {0: b'Hi, you', 1: b'no'}
    """
    out: dict[int, list[bytes]] = {}
    order = np.lexsort((packed.pieces[:, 4], packed.pieces[:, 3]))
    for row, at, length, document, _ in packed.pieces[order].tolist():
        ids = packed.ids[row, at : at + length] - offset
        out.setdefault(document, []).append(ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes())
    return {document: b"".join(parts) for document, parts in out.items()}


class _Pieces(NamedTuple):
    """What can stand in a row: documents, or parts of them. `raw` and `starts` hold them end to end, one entry per byte."""

    raw: np.ndarray
    starts: np.ndarray
    table: np.ndarray
    """(pieces, 6): begin and end in `raw`, words, document, first byte in the document, whether an end mark is last."""


def _check_several(name: str, texts: Iterable[Text]) -> None:
    if isinstance(texts, str | bytes):
        raise TypeError(f"{name}: texts must be several, such as [text]; got one {type(texts).__name__}.")


def _budget(max_bytes, max_words, rule, longest_word, end, offset, fill) -> _Budget:  # noqa: PLR0917
    for name, value in dict(max_bytes=max_bytes, max_words=max_words).items():
        if value < 1:
            raise ValueError(f"pack: {name} must be 1 or more, got {value}.")
    if end is not None and offset <= end < offset + 256:
        raise ValueError(f"pack: end must be no byte's id, {offset} to {offset + 255}; got {end}.")
    if fill is not None and fill < 1:
        raise ValueError(f"pack: fill must be 1 byte or more, or None; got {fill}.")
    return _Budget(max_bytes, max_words, rule, min(longest_word or max_bytes, max_bytes), end, offset, fill)


def _cut(texts: Texts, first: int, budget: _Budget) -> _Pieces:
    """Split every document into words, in one pass over all, and those longer than a row into pieces.

    Documents are joined by newlines, because no rule joins anything to a newline before it or after it. Where a document has
    an end mark, the newline stands for it.
    """
    parts = [utf8("pack", text) for text in texts]
    end = np.cumsum([len(part) + 1 for part in parts], dtype=np.int64)  # after each newline
    if not parts:
        return _Pieces(np.zeros(0, np.uint8), np.zeros(0, bool), np.zeros((0, 6), np.int64))
    raw = b"\n".join([*parts, b""])
    begins = starts(raw, rule=budget.rule, max_bytes=budget.longest_word)
    begins[end - 1] = True
    begins[end[:-1]] = True  # a document's first byte, also where the word before would take it in
    begin, marked = np.r_[0, end[:-1]], budget.end is not None
    stop = end if marked else end - 1
    at = np.r_[np.flatnonzero(begins), len(raw)]
    word, last = np.searchsorted(at, begin), np.searchsorted(at, stop)
    number = np.arange(first, first + len(parts))
    fits = (stop - begin <= budget.max_bytes) & (last - word <= budget.max_words)
    table = [np.stack([begin, stop, last - word, number, 0 * begin, 0 * begin + marked], axis=1)[fits & (stop > begin)]]
    for i in np.flatnonzero(~fits):
        here = int(word[i])
        while here < last[i]:
            room = np.searchsorted(at, at[here] + budget.max_bytes, side="right") - 1
            there = int(min(room, here + budget.max_words, last[i]))
            table.append(
                np.array([[at[here], at[there], there - here, number[i], at[here] - begin[i], marked and there == last[i]]])
            )
            here = there
    whole = np.concatenate(table)
    return _Pieces(np.frombuffer(raw, np.uint8), begins, whole[np.argsort(whole[:, 0])])


def _best_fit(pieces: _Pieces, budget: _Budget) -> tuple[_Pieces, np.ndarray]:
    """The row of each piece: the longest first; rows are numbered as their first documents are."""
    size, words = pieces.table[:, 1] - pieces.table[:, 0], pieces.table[:, 2]
    order = np.argsort(-np.maximum(size / budget.max_bytes, words / budget.max_words), kind="stable")
    row = np.empty(len(size), np.int64)
    row[order] = _fullest(size[order].tolist(), words[order].tolist(), budget.max_bytes, budget.max_words)
    if budget.fill is not None:
        pieces, row = _fill_holes(pieces, row, budget, budget.fill)
    _, first, which = np.unique(row, return_index=True, return_inverse=True)
    return pieces, np.argsort(np.argsort(first))[which]


def _fill_holes(pieces: _Pieces, row: np.ndarray, budget: _Budget, fill: int) -> tuple[_Pieces, np.ndarray]:
    """Cut up the emptiest row to fill the largest holes of the others, as long as they have room for all of it."""
    count = int(row.max(initial=-1)) + 1
    size, words = pieces.table[:, 1] - pieces.table[:, 0], pieces.table[:, 2]
    room = budget.max_bytes - np.bincount(row, weights=size, minlength=count).astype(np.int64)
    words_left = budget.max_words - np.bincount(row, weights=words, minlength=count).astype(np.int64)
    within: list[list[list[int]]] = [[] for _ in range(count)]
    for r, piece in zip(row.tolist(), pieces.table.tolist(), strict=True):
        within[r].append(piece)
    usable = lambda r: room[r] >= fill and words_left[r] > 0
    for empty in np.argsort(-room, kind="stable").tolist():
        holes = sorted((r for r in range(count) if r != empty and within[r] and usable(r)), key=lambda r: -room[r])
        if sum(room[r] for r in holes) < budget.max_bytes - room[empty]:
            break
        waiting, within[empty] = within[empty], []
        while waiting:
            begin, stop, words, document, at, marked = waiting.pop()
            edges = np.r_[np.flatnonzero(pieces.starts[begin:stop]), stop - begin]
            while holes and not (fits := min(np.searchsorted(edges, room[holes[0]], "right") - 1, words_left[holes[0]])):
                holes.pop(0)
            if not holes:
                within[empty].append([begin, stop, words, document, at, marked])
                continue
            hole, bytes_ = holes[0], int(edges[fits])
            whole = fits == words
            within[hole].append([begin, begin + bytes_, int(fits), document, at, marked if whole else 0])
            room[hole] -= bytes_
            words_left[hole] -= fits
            if not whole:
                waiting.append([begin + bytes_, stop, words - int(fits), document, at + bytes_, marked])
            if not usable(hole):
                holes.pop(0)
        left = np.array(within[empty], np.int64).reshape(-1, 6)
        room[empty] = budget.max_bytes - (left[:, 1] - left[:, 0]).sum()
        words_left[empty] = budget.max_words - left[:, 2].sum()
    table = np.array([piece for r in within for piece in r], np.int64).reshape(-1, 6)
    row = np.repeat(np.arange(count), [len(r) for r in within])
    order = np.lexsort((table[:, 4], table[:, 3]))
    return pieces._replace(table=table[order]), row[order]


def _fullest(sizes: list[int], words: list[int], max_bytes: int, max_words: int) -> list[int]:
    """For each piece the row with least room in bytes that has room for it; a new one if there is none, among 64 kinds tried.

    Rows are kept by the number of bytes left in them; which numbers occur is one long integer, whose lowest bit from `size` up
    is the fullest row's.
    """
    rows: list[int] = []
    words_left: list[int] = []
    with_left: list[list[int]] = [[] for _ in range(max_bytes + 1)]
    occurs = 0
    for size, count in zip(sizes, words, strict=True):
        row, left, room = -1, max_bytes, occurs >> size
        for _ in range(64):
            if not room:
                break
            left = size + (room & -room).bit_length() - 1
            row = next((r for r in with_left[left][-8:] if words_left[r] >= count), -1)
            if row >= 0:
                break
            room &= room - 1
        if row < 0:
            row, left = len(words_left), max_bytes
            words_left.append(max_words)
        else:
            with_left[left].remove(row)
            if not with_left[left]:
                occurs ^= 1 << left
        rows.append(row)
        words_left[row] -= count
        left -= size
        if left and words_left[row]:
            with_left[left].append(row)
            occurs |= 1 << left
    return rows


def _write(pieces: _Pieces, row: np.ndarray, budget: _Budget) -> Packed:
    """Put the pieces into their rows, side by side in the order of their documents."""
    order = np.argsort(row, kind="stable")
    row, (begin, stop, _, document, begun_at, marked) = row[order], pieces.table[order].T
    length = stop - begin
    count = int(row[-1]) + 1 if len(row) else 0
    used = np.bincount(row, weights=length, minlength=count).astype(np.int64)
    first = np.cumsum(length) - length  # of each piece, were the rows end to end
    row_first = np.cumsum(used) - used
    each = lambda of_piece: np.repeat(of_piece.astype(np.int32), length)
    here = np.arange(int(used.sum()), dtype=np.int32)
    source = here + each(begin - first)
    ids = pieces.raw[source].astype(np.int32) + budget.offset
    if budget.end is not None:
        ids[(first + length - 1)[marked > 0]] = budget.end
    word = np.cumsum(pieces.starts[source], dtype=np.int32) - 1
    filled = np.arange(budget.max_bytes) < used[:, None]

    def lay(values: np.ndarray, blank: int) -> np.ndarray:
        out = np.full((count, budget.max_bytes), blank, np.int32)
        out[filled] = values
        return out

    table = np.stack([row, first - row_first[row], length, document, begun_at], axis=1)
    word -= np.repeat(word[row_first], used)
    return Packed(lay(ids, PAD), lay(each(document), -1), lay(word, -1), lay(here - each(first), -1), table)


def _stream(texts: Iterable[Text], rows: int, look: int, budget: _Budget) -> Iterator[Packed]:
    """Fill a window, give away batches of full rows, and hold the pieces of the emptiest rows for the next window."""
    texts, seen = iter(texts), 0
    held = _cut([], 0, budget)
    more = True
    while more:
        room = look * rows * budget.max_bytes - len(held.raw)
        new: list[bytes] = []
        while more and room > 0:
            text = next(texts, None)
            if more := text is not None:
                new.append(utf8("pack_stream", text))
                room -= len(new[-1])
        window = _join(held, _cut(new, seen, budget))
        seen += len(new)
        window, row = _best_fit(window, budget)
        count = int(row.max(initial=-1)) + 1
        fill = np.bincount(row, weights=window.table[:, 1] - window.table[:, 0], minlength=count)
        words = np.bincount(row, weights=window.table[:, 2], minlength=count)
        emptiest = np.argsort(np.maximum(fill / budget.max_bytes, words / budget.max_words), kind="stable")
        later = np.isin(row, emptiest[: count % rows if more else 0])
        held = _pick(window, later)
        given, row = window._replace(table=window.table[~later]), np.unique(row[~later], return_inverse=True)[1]
        for at in range(0, int(row.max(initial=-1)) + 1, rows):
            batch = (row >= at) & (row < at + rows)
            yield _write(given._replace(table=given.table[batch]), row[batch] - at, budget)


def _join(a: _Pieces, b: _Pieces) -> _Pieces:
    moved = b.table + np.array([len(a.raw), len(a.raw), 0, 0, 0, 0])
    return _Pieces(*(np.concatenate(pair) for pair in ((a.raw, b.raw), (a.starts, b.starts), (a.table, moved))))


def _pick(pieces: _Pieces, some: np.ndarray) -> _Pieces:
    """Some of the pieces, and no other byte."""
    table = pieces.table[some]
    length = table[:, 1] - table[:, 0]
    end = np.cumsum(length)
    at = np.arange(int(length.sum())) + np.repeat(table[:, 0] - (end - length), length)
    return _Pieces(
        pieces.raw[at], pieces.starts[at], np.concatenate([np.stack([end - length, end], axis=1), table[:, 2:]], axis=1)
    )
