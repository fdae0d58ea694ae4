"""Eight tasks for one base, in four suites: what `scripts.compare_merges` fine-tunes experts on.

digits()             scikit-learn's digits under eight transformations, each with its own labels
images(path)         the same transformations of your own images (`scripts.images.from_file`), each with half of the classes
text()               eight kinds of text that every Python carries: documentation, docstrings, syntax trees, byte code, ...
languages(path)      a directory of LANG.txt, one language each; the base reads one of them

A base is trained on `general`; an expert on `train` of its task. `validation` chooses what is tuned, `test` is reported.
Nothing in `validation` or `test` was trained on: digits and images are split once, text by documents.
"""

import ast
import contextlib
import dataclasses
import dis
import io
import itertools
import pathlib
import sysconfig
import tokenize
import unicodedata
import zlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from scripts import data, images as pictures


class Split(NamedTuple):
    """Inputs (n, ...) and labels (n,), or one label per byte (n, length); labels under 0 are not scored."""

    x: np.ndarray
    y: np.ndarray

    def some(self, count: int, rng: np.random.Generator) -> "Split":
        """`count` examples, each once where there are enough."""
        at = rng.choice(len(self.x), count, replace=count > len(self.x))
        return Split(self.x[at], self.y[at])


@dataclasses.dataclass(frozen=True)
class Task:
    """What an expert learns; `classes` is how many labels there are."""

    name: str
    classes: int
    train: Split
    validation: Split
    test: Split


@dataclasses.dataclass(frozen=True)
class Suite:
    """What the base learns, and the eight tasks. Splits of all tasks have one size, so that one program serves all.

    Attributes:
      classes: of the base.
      heads: whether every task has a head of its own.
    """

    name: str
    general: Split
    classes: int
    heads: bool
    tasks: list[Task]


# --- images ----------------------------------------------------------------------------------------------------------

Transform = Callable[[np.ndarray], np.ndarray]


def _scrambled(x: np.ndarray, tiles: int = 4) -> np.ndarray:
    """The tiles of a grid in another order, the same for every image."""
    n, side, _, c = x.shape
    order = np.random.default_rng(0).permutation(tiles * tiles)
    cut = x.reshape(n, tiles, side // tiles, tiles, side // tiles, c).transpose(0, 1, 3, 2, 4, 5)
    cut = cut.reshape(n, tiles * tiles, side // tiles, side // tiles, c)[:, order]
    return cut.reshape(n, tiles, tiles, side // tiles, side // tiles, c).transpose(0, 1, 3, 2, 4, 5).reshape(x.shape)


def _slanted(x: np.ndarray) -> np.ndarray:
    """Every row pushed further to the side than the one above, round the edge."""
    side = x.shape[1]
    return np.stack([np.roll(x[:, i], i - side // 2, axis=1) for i in range(side)], axis=1)


def _striped(x: np.ndarray) -> np.ndarray:
    """Every other pair of columns inverted."""
    sign = np.where(np.arange(x.shape[2]) // 2 % 2, -1, 1)
    return x * sign[None, None, :, None].astype(x.dtype)


def _noisy(x: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(len(x)).normal(0, 0.7, x.shape)
    return (x + noise).astype(np.float32)


TRANSFORMS: dict[str, Transform] = {
    "upside down": lambda x: x[:, ::-1],
    "quarter turn": lambda x: np.rot90(x, axes=(1, 2)),
    "negative": lambda x: -x,
    "noisy": _noisy,
    "scrambled": _scrambled,
    "slanted": _slanted,
    "striped": _striped,
    "quarters swapped": lambda x: np.roll(x, (x.shape[1] // 2, x.shape[2] // 2), axis=(1, 2)),
}

DIGIT_LABELS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "ten": lambda d: d,
    "odd": lambda d: d % 2,
    "five or more": lambda d: (d >= 5).astype(int),
    "prime": lambda d: np.isin(d, (2, 3, 5, 7)).astype(int),
    "loop": lambda d: np.isin(d, (0, 6, 8, 9)).astype(int),
}
DIGITS = (
    ("upside down", "ten"), ("quarter turn", "ten"), ("negative", "ten"), ("noisy", "odd"),
    ("scrambled", "ten"), ("slanted", "five or more"), ("striped", "prime"), ("quarters swapped", "loop"),
)  # fmt: skip


def digits(seed: int, *, side: int = 16, copies: int = 4, validation: int = 200) -> Suite:
    """Digits of `side` pixels, moved by a pixel or two for each of the `copies` that are trained on."""
    whole = pictures.digits(seed)
    rng = np.random.default_rng((seed, 3))
    shrink = lambda x: x.reshape(len(x), side, 32 // side, side, 32 // side, 1).mean(axis=(2, 4))

    def moved(x):
        by = rng.integers(-1, 2, (len(x), 2))
        return np.stack([np.roll(image, shift, axis=(0, 1)) for image, shift in zip(x, by, strict=True)])

    kept = [shrink(whole.train[validation:])] * copies
    train = Split(np.concatenate([moved(x) for x in kept]), np.tile(whole.train_labels[validation:], copies))
    valid = Split(shrink(whole.train[:validation]), whole.train_labels[:validation])
    test = Split(shrink(whole.held_out), whole.held_out_labels)
    tasks = []
    for how, label in DIGITS:
        f, g = TRANSFORMS[how], DIGIT_LABELS[label]
        as_task = lambda s, f=f, g=g: Split(np.ascontiguousarray(f(s.x), np.float32), g(s.y).astype(np.int32))
        name = how if label == "ten" else f"{how}: {label}"
        tasks.append(Task(name, 10 if label == "ten" else 2, as_task(train), as_task(valid), as_task(test)))
    return Suite("digits", Split(train.x, train.y.astype(np.int32)), 10, True, tasks)


def images(path: pathlib.Path, seed: int, *, validation: int = 256, test: int = 512) -> Suite:
    """Task k sees the classes k, k + 1, ... (half of all, at least two) through the k-th transformation; the base sees all."""
    whole = pictures.from_file(path)
    rng = np.random.default_rng((seed, 3))
    classes = len(whole.classes)
    half = max(2, classes // 2)
    if classes < 2 or whole.train.shape[1] % 4:
        raise ValueError(
            f"{path}: needs two classes or more and a side that 4 divides; got {classes} and {whole.train.shape[1]}."
        )
    tasks = []
    for k, (how, f) in enumerate(TRANSFORMS.items()):
        of = [(k + i) % classes for i in range(half)]
        number = np.full(classes, -1)
        number[of] = np.arange(half)

        def as_task(x, y, number=number, f=f):
            there = number[y] >= 0
            return Split(np.ascontiguousarray(f(x[there]), np.float32), number[y[there]].astype(np.int32))

        held = as_task(whole.held_out, whole.held_out_labels)
        middle = len(held.x) // 3
        valid, rest = Split(held.x[:middle], held.y[:middle]), Split(held.x[middle:], held.y[middle:])
        tasks.append((how, as_task(whole.train, whole.train_labels), valid, rest))
    least = [min(len(t[i].x) for t in tasks) for i in (1, 2, 3)]
    sizes = (least[0], min(validation, least[1]), min(test, least[2]))
    tasks = [Task(t[0], half, *(s.some(n, rng) for s, n in zip(t[1:], sizes, strict=True))) for t in tasks]
    return Suite("images", Split(whole.train, whole.train_labels.astype(np.int32)), classes, True, tasks)


# --- text ------------------------------------------------------------------------------------------------------------

Documents = Iterable[tuple[str, str]]


def _quietly(f: Callable[[str], str]) -> Callable[[str], str]:
    """ "" where a file is no Python of this version."""

    def g(source):
        with contextlib.suppress(SyntaxError, ValueError, RecursionError):
            return f(source)
        return ""

    return g


def _docstrings(source: str) -> str:
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def _comments(source: str) -> str:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return "\n".join(t.string for t in tokens if t.type == tokenize.COMMENT)


def _byte_code(source: str) -> str:
    out = io.StringIO()
    dis.dis(compile(source, "file", "exec", dont_inherit=True), file=out, depth=1)
    return out.getvalue()


def _sources_as(f: Callable[[str], str]) -> Documents:
    """The standard library's files in an order that has nothing to do with their names."""
    for name, source in sorted(data.sources().items(), key=lambda item: zlib.crc32(item[0].encode())):
        yield name, _quietly(f)(source)


def _charmaps() -> Documents:
    root = pathlib.Path(sysconfig.get_paths()["stdlib"]) / "encodings"
    for path in sorted(root.glob("*.py"), key=lambda p: zlib.crc32(p.name.encode())):
        if path.stat().st_size > 8_000:
            yield path.name, path.read_text("utf-8", errors="ignore")


def _character_names() -> Documents:
    for block in range(0, 0x1FB00, 64):
        names = [unicodedata.name(chr(c), "") for c in range(block, block + 64)]
        if not any(name.startswith(("CJK", "HANGUL SYL", "EGYPTIAN", "CUNEIFORM")) for name in names):
            yield f"{block:05X}", "\n".join(filter(None, names))


def _corpus(documents: Documents, train: int = 300_000, held_out: int = 40_000) -> data.Corpus:
    """Whole documents until there are so many bytes to train on, and so many held out."""
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    sizes, wanted = {False: 0, True: 0}, {False: train, True: held_out}
    for name, text in documents:
        held = data.is_held_out(name)
        if sizes[held] < wanted[held] and text:
            parts[held].append(text.encode())
            sizes[held] += len(parts[held][-1])
        if all(sizes[h] >= wanted[h] for h in sizes):
            break
    join = lambda some: np.frombuffer(b"\n\n".join(some), np.uint8)
    return data.Corpus(join(parts[False]), join(parts[True]))


KINDS: dict[str, Callable[[], data.Corpus]] = {
    "documentation": lambda: data.load("prose"),
    "docstrings": lambda: _corpus(_sources_as(_docstrings)),
    "comments": lambda: _corpus(_sources_as(_comments)),
    "bare code": lambda: _corpus(_sources_as(lambda source: ast.unparse(ast.parse(source)))),
    "syntax trees": lambda: _corpus(_sources_as(lambda source: ast.dump(ast.parse(source), indent=1))),
    "byte code": lambda: _corpus(_sources_as(_byte_code)),
    "character maps": lambda: _corpus(_charmaps()),
    "character names": lambda: _corpus(_character_names()),
}


def _windows(windows: np.ndarray, *, unscored: int = 0) -> Split:
    """Each byte is to be predicted from those before it; the first few are context alone."""
    windows = windows.astype(np.int32)
    y = windows[:, 1:].copy()
    y[:, :unscored] = -1
    return Split(windows[:, :-1], y)


def _text_suite(
    name: str, general: data.Text, corpora: dict[str, data.Corpus], seed: int, *, length: int, windows: int, held_out: int
) -> Suite:
    rng = np.random.default_rng((seed, 4))
    tasks = []
    for title, corpus in corpora.items():
        if len(corpus.train) <= length or len(corpus.heldout) <= 2 * length:
            found = f"{len(corpus.train):,} and {len(corpus.heldout):,}"
            raise ValueError(f"{title}: too little text to train on and hold out, {found} bytes; a window has {length + 1}.")
        half = len(corpus.heldout) // 2
        held = [
            _windows(data.tile(part, n, length + 1), unscored=length // 4)
            for part, n in ((corpus.heldout[:half], max(held_out // 4, 1)), (corpus.heldout[half:], held_out))
        ]
        tasks.append(Task(title, 256, _windows(data.draw(corpus.train, rng, windows, length + 1)), *held))
    return Suite(name, _windows(data.draw(general, rng, 4 * windows, length + 1)), 256, False, tasks)


def text(seed: int, *, length: int = 64, windows: int = 4096, held_out: int = 192) -> Suite:
    """The base reads the standard library's files as they are."""
    corpora = {name: corpus() for name, corpus in KINDS.items()}
    return _text_suite("text", data.load("code").train, corpora, seed, length=length, windows=windows, held_out=held_out)


def languages(
    path: pathlib.Path, seed: int, *, base: str = "en", length: int = 64, windows: int = 4096, held_out: int = 192
) -> Suite:
    """The base reads one language, the tasks are the first eight others; every eighth block of 50 lines is held out."""
    files = {p.stem: p for p in sorted(path.glob("*.txt"))}
    if base not in files or len(files) < 9:
        found = ", ".join(files) or "none"
        raise ValueError(f"{path}: needs {base}.txt for the base and eight languages beside it; there are {found}.")

    def corpus(file):
        lines = file.read_text("utf-8").splitlines()
        blocks = ["\n".join(lines[i : i + 50]) for i in range(0, len(lines), 50)]
        return _corpus(((str(i), block) for i, block in enumerate(blocks)), 2**40, 2**40)

    others = itertools.islice((stem for stem in files if stem != base), 8)
    corpora = {stem: corpus(files[stem]) for stem in others}
    general = corpus(files[base]).train
    return _text_suite("languages", general, corpora, seed, length=length, windows=windows, held_out=held_out)
