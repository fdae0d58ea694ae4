"""Text that every Python carries: prose (the documentation in `pydoc_data`) and code (the standard library's sources).

Whole topics and files are held out, chosen by the checksum of their names. Topics quote each other, so a paragraph that
occurs in a held-out topic is taken out of the training text. Windows are drawn by step: the same seed and step give the same
batch, so a resumed run reads on where it stopped.
"""

import dataclasses
import pathlib
import sysconfig
import zlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

DOMAINS = ("prose", "code")
# Generated tables, vendored or interactive programs, tests, and what differs from machine to machine.
_LEFT_OUT = {
    "__phello__", "__pycache__", "dist-packages", "distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data",
    "site-packages", "test", "tests", "turtledemo", "venv",
}  # fmt: skip
_MAX_FILE = 200_000


class Text(Protocol):
    """Bytes that are sliced: an array of uint8, or `texts.Pieces`, which reads them from files."""

    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Training and held-out bytes of one domain, uint8."""

    train: Text
    heldout: Text


def load(domain: str) -> Corpus:
    """The corpus of a domain, "prose" or "code"."""
    if domain not in DOMAINS:
        raise ValueError(f"load: domain must be one of {DOMAINS}, got {domain!r}.")
    documents = topics() if domain == "prose" else sources()
    held = {name: text for name, text in documents.items() if is_held_out(name)}
    train = {name: text for name, text in documents.items() if name not in held}
    if domain == "prose":
        seen = {p.strip() for text in held.values() for p in text.split("\n\n")}
        train = {n: "\n\n".join(p for p in text.split("\n\n") if p.strip() not in seen) for n, text in train.items()}
    join = lambda parts: np.frombuffer("\n\n".join(parts.values()).encode("utf-8"), np.uint8)
    return Corpus(join(train), join(held))


def is_held_out(name: str) -> bool:
    """One document in eight, whatever the machine or the Python. (Residue 3 holds out no topic that quotes half the others.)"""
    return zlib.crc32(name.encode()) % 8 == 3


def check_room(corpora: Mapping[str, Corpus], train: int, heldout: int) -> None:
    """Refuse text that is shorter than the windows to be drawn from it."""
    for name, c in corpora.items():
        if len(c.train) < train or len(c.heldout) < heldout:
            raise ValueError(
                f"{name} has {len(c.train):,} bytes to train on and {len(c.heldout):,} held out, too few for windows of "
                f"{train:,} and {heldout:,}; give more text, or lower --length."
            )


def draw(text: Text, rng: np.random.Generator, batch: int, length: int) -> np.ndarray:
    """Windows at random places, (batch, length) uint8."""
    return np.stack([text[a : a + length] for a in rng.integers(0, len(text) - length + 1, batch)])


def tile(text: Text, count: int, length: int) -> np.ndarray:
    """Windows evenly spread over the text, without overlap where there is room: what evaluation reads."""
    return np.stack([text[a : a + length] for a in np.linspace(0, len(text) - length, count).astype(np.int64)])


def excerpt(text: Text, at_most: int = 1 << 24) -> np.ndarray:
    """All of a text or, of a longer one, stretches that are evenly spread over it: what statistics are taken of."""
    if len(text) <= at_most:
        return text[: len(text)]
    return tile(text, 256, at_most // 256).reshape(-1)


def byte_frequency_bits(train: np.ndarray, windows: np.ndarray, scored: np.ndarray) -> float:
    """Bits per byte that is scored, of windows, under the training text's byte frequencies."""
    p = (np.bincount(train, minlength=256) + 1.0) / (len(train) + 256)
    return float(-np.log2(p[windows[scored]]).mean())


def order_2_bits(train: np.ndarray, windows: np.ndarray, scored: np.ndarray) -> float:
    """The same under an order-2 byte model, the two bytes before a byte hidden or not: trigram counts, backed off to bigrams
    and bytes (Witten and Bell, 1991)."""
    a, b, c = train[:-2].astype(np.int64), train[1:-1].astype(np.int64), train[2:].astype(np.int64)
    tri = np.bincount((a << 16) | (b << 8) | c, minlength=1 << 24).reshape(256, 256, 256)
    bi, uni = tri.sum(0), tri.sum((0, 1))
    if scored[:, :2].any():
        raise ValueError("order_2_bits: the first two bytes of a window have no two bytes before them; score later ones.")
    w, after = windows.astype(np.int64), scored[:, 2:]
    x, y, z = w[:, :-2][after], w[:, 1:-1][after], w[:, 2:][after]
    p = (uni[z] + 1.0) / (uni.sum() + 256)
    for counts, total, kinds in (
        (bi[y, z], bi.sum(1)[y], (bi > 0).sum(1)[y]),
        (tri[x, y, z], tri.sum(2)[x, y], (tri > 0).sum(2)[x, y]),
    ):
        mass = total + kinds
        p = np.where(mass > 0, (counts + kinds * p) / np.maximum(mass, 1), p)
    return float(-np.log2(p).mean())


def topics() -> dict[str, str]:
    """Python's documentation, topic by topic."""
    from pydoc_data import topics

    return {name: topics.topics[name] for name in sorted(topics.topics)}


def sources() -> dict[str, str]:
    """The standard library's files, by path."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    out = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        strange = any(part in _LEFT_OUT or part.startswith(("config-", "_sysconfigdata")) for part in name.parts)
        if not strange and path.stat().st_size <= _MAX_FILE:
            out[name.as_posix()] = path.read_text("utf-8", errors="ignore")
    return out
