"""What `scripts.compare_bytes` trains on and holds out: windows of bytes by domain.

domains = text()                    prose and code that every Python carries
domains = text(["en=en.txt"])       text of one's own
domains = languages(path)           13 languages, held out on the same sentences
"""

import csv
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxmerge import words
from scripts import data, reading


@dataclasses.dataclass(frozen=True)
class Domain:
    """Bytes to train on and bytes held out, uint8; and how many sentences the held-out ones are, where that is known."""

    name: str
    train: data.Text
    heldout: data.Text
    sentences: int = 0


def text(given: Sequence[str] = (), *, length: int = 1) -> list[Domain]:
    """The domains of `--text`, or prose and code of the standard library, with room for windows of that length."""
    corpora = reading.corpora(given)
    data.check_room(corpora, length, length)
    return [Domain(name, c.train, c.heldout) for name, c in corpora.items()]


def languages(path: pathlib.Path, *, held_out: int = 300) -> list[Domain]:
    """The languages of PATH/parallel.tsv (a column each, sentences aligned), the last `held_out` sentences held out in all.

    Each language trains on PATH/XX.txt, where there is one, and on the sentences that are not held out.
    """
    file = path / "parallel.tsv"
    if not file.is_file():
        raise ValueError(f"--data {path}: there is no parallel.tsv with a column for each language.")
    with file.open(encoding="utf-8", newline="") as lines:
        (_, *names), *rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    if not names or len(rows) <= held_out:
        found = f"{len(rows)} sentences in {len(names)} languages"
        raise ValueError(f"--data {path}: parallel.tsv has {found}, too few to hold out {held_out}.")
    out = []
    for name, (*sentences,) in zip(names, zip(*(row[1:] for row in rows), strict=True), strict=True):
        running = path / f"{name}.txt"
        before = [running.read_text("utf-8")] if running.is_file() else []
        join = lambda parts: np.frombuffer("\n".join(parts).encode(), np.uint8)
        out.append(Domain(name, join([*before, *sentences[:-held_out]]), join(sentences[-held_out:]), held_out))
    return out


def draw(domains: list[Domain], step: int, *, batch: int, length: int, seed: int) -> np.ndarray:
    """The windows of a step, (batch, length): domains in turn, so that all weigh the same; places at random."""
    rng = np.random.default_rng((seed, step))
    of = [domains[(step * batch + i) % len(domains)] for i in range(batch)]
    return np.concatenate([data.draw(d.train, rng, 1, length) for d in of])


class Hidden(NamedTuple):
    """Windows with spans hidden: where, what an encoder reads and what a decoder spells, as ids."""

    mask: np.ndarray
    inputs: np.ndarray
    targets: np.ndarray


def hide(windows: np.ndarray, rng: np.random.Generator, *, noise: float, span: float) -> Hidden:
    """Hide a share of (b, length) bytes, in spans of that mean length: as many bytes in every window."""
    mask = words.span_mask(rng, *windows.shape, density=noise, mean=span)
    return Hidden(mask, *words.corrupt(windows.astype(np.int32) + words.OFFSET, mask))


def tile(text: data.Text, length: int, at_most: int | None = None) -> np.ndarray:
    """Held-out windows: evenly spread, as many as there are without overlap, at most so many."""
    whole = len(text) // length
    if whole == 0:
        raise ValueError(f"held-out text of {len(text)} bytes is shorter than a window of {length}; lower --length.")
    return data.tile(text, whole if at_most is None else min(whole, at_most), length)
