"""Text of one's own: files, folders and globs, read where they lie, a window at a time, whatever they hold and however large.

    texts.load(["corpus/", "more/**/*.txt"])                 one domain, "text"
    texts.load(["en=en.txt", "de=german/", "de=de.txt"])     two, by name

One byte in eight is held out, chosen by names and sizes alone: of many documents (files) whole ones, by the checksum of their
names; of few, or where one of them is most of the text, stretches spread over each, cut at ends of lines. Nothing is decoded:
UTF-8 of any language, and any other bytes, are bytes.
"""

import bisect
import dataclasses
import glob
import itertools
import pathlib
import re
import zlib
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np

from scripts import data

BETWEEN = b"\n\n"
"""What stands between two pieces of text."""
SHARE = 8
"""One byte in so many is held out."""
MANY = 8
"""From so many documents on, whole ones are held out."""
STRETCH = 8192
"""Bytes of a held-out stretch, at least, where the text has room for eight of them."""
_NAME = re.compile(r"([\w-]+)=(.+)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some bytes of a file."""

    path: pathlib.Path
    start: int
    size: int


class Pieces:
    """Pieces of files as one text: it has a length and is sliced, and only then are the bytes of the slice read."""

    def __init__(self, pieces: Sequence[Piece]):
        self.pieces = [p for p in pieces if p.size]
        lengths = (p.size + len(BETWEEN) for p in self.pieces)
        self.ends = list(itertools.accumulate(lengths))  # each with what follows it; of the last one, that is not there

    def __len__(self) -> int:
        return self.ends[-1] - len(BETWEEN) if self.ends else 0

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, step = part.indices(len(self))
        if step != 1:
            raise ValueError(f"Pieces: text is read forwards, byte by byte; got a step of {step}.")
        read, i = [], bisect.bisect_right(self.ends, start)
        while start < stop:
            piece, end = self.pieces[i], min(self.ends[i], stop)
            inside = start - (self.ends[i] - len(BETWEEN) - piece.size)
            whole = _read(piece, inside, end - start) + BETWEEN[max(inside - piece.size, 0) :]
            read.append(np.frombuffer(whole[: end - start], np.uint8))
            start, i = end, i + 1
        return np.concatenate(read) if read else np.zeros(0, np.uint8)


def _read(piece: Piece, start: int, count: int) -> bytes:
    """At most so many bytes of a piece, and all of those that it has."""
    count = max(min(count, piece.size - start), 0)
    if not count:
        return b""
    with piece.path.open("rb") as file:
        file.seek(piece.start + start)
        read = file.read(count)
    if len(read) < count:
        raise ValueError(f"{piece.path} has become shorter while it was read; leave text alone while a model trains on it.")
    return read


def load(given: Sequence[str]) -> dict[str, data.Corpus]:
    """The corpus of each domain: NAME=PATH, or PATH for the domain "text"; a path is a file, a folder or a glob."""
    owner: dict[pathlib.Path, str] = {}
    documents: dict[str, dict[pathlib.Path, pathlib.Path]] = {}
    for name, place in map(named, given):
        for path in find(place):
            file = path.resolve()
            if (other := owner.setdefault(file, name)) != name:
                raise ValueError(f"--text: {path} is given as {other} and as {name}; a file belongs to one.")
            _check(path)
            documents.setdefault(name, {})[file] = path
    return {name: split(list(paths)) for name, paths in documents.items()}


def named(one: str) -> tuple[str, str]:
    """Name and path of NAME=PATH, or of PATH."""
    both = None if pathlib.Path(one).exists() else _NAME.fullmatch(one)
    return (both[1], both[2]) if both else ("text", one)


def absolute(one: str) -> str:
    """NAME=PATH from wherever one stands."""
    name, place = named(one)
    return f"{name}={pathlib.Path(place).expanduser().absolute()}"


def find(place: str) -> list[pathlib.Path]:
    """The files of a path: itself, or what a folder holds or a glob matches; hidden and empty ones in a folder are left out."""
    path = pathlib.Path(place).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.is_file())
        found = [p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        missing = f"the folder {place} holds no text"
    else:
        found = sorted(p for p in map(pathlib.Path, glob.glob(str(path), recursive=True)) if p.is_file())
        missing = f"no text is called {place}, or matches it"
    found = [p for p in found if p.stat().st_size]
    if not found:
        raise ValueError(f"--text: {missing}; give a file, a folder or a quoted glob such as 'books/**/*.txt', or NAME=PATH.")
    return found


def _check(path: pathlib.Path) -> None:
    """Refuse what is no text before a model is trained on it."""
    with path.open("rb") as file:
        head = file.read(4096)
    if not head:
        raise ValueError(f"--text: {path} is empty.")
    if b"\0" in head or head.startswith(b"\x1f\x8b"):
        raise ValueError(
            f"--text: {path} does not look like text (it holds zero bytes, or is packed by gzip); leave it out by a glob such "
            "as 'folder/**/*.txt', unpack it, or turn UTF-16 into UTF-8."
        )


def split(paths: Sequence[pathlib.Path]) -> data.Corpus:
    """What of some documents is trained on, and what is held out."""
    sizes = {p: p.stat().st_size for p in paths}
    total = sum(sizes.values())
    held: set[pathlib.Path] = set()
    if len(paths) >= MANY and 2 * max(sizes.values()) <= total:
        so_far = 0
        for path in sorted(paths, key=lambda p: (zlib.crc32(p.name.encode()), str(p))):
            if so_far < total // SHARE and so_far + sizes[path] <= 2 * total // SHARE:
                held.add(path)
                so_far += sizes[path]
    if held:
        whole = lambda kept: Pieces([Piece(p, 0, sizes[p]) for p in paths if (p in held) != kept])
        return data.Corpus(whole(True), whole(False))
    train, heldout = zip(*(stretches(p, sizes[p]) for p in paths), strict=True)
    return data.Corpus(Pieces([*itertools.chain(*train)]), Pieces([*itertools.chain(*heldout)]))


def stretches(path: pathlib.Path, size: int) -> tuple[list[Piece], list[Piece]]:
    """A document in up to eight equal parts; the last eighth of each is held out."""
    parts = min(max(size // (SHARE * STRETCH), 1), 8)
    cuts = [0]
    with path.open("rb") as file:
        for i in range(parts):
            begin, end = size * i // parts, size * (i + 1) // parts
            cuts += [_cut(file, end - (end - begin) // SHARE, end), size if i + 1 == parts else _cut(file, end, size)]
    pieces = [Piece(path, a, b - a) for a, b in itertools.pairwise(cuts)]
    return pieces[::2], pieces[1::2]


def _cut(file: BinaryIO, at: int, limit: int) -> int:
    """The first place from `at` on where a line begins or, where none is near, a character."""
    file.seek(at)
    near = file.read(min(4096, (limit - at) // 2))
    line = near.find(b"\n")
    return at + (line + 1 if line >= 0 else next((i for i, byte in enumerate(near[:4]) if byte & 0xC0 != 0x80), 0))
