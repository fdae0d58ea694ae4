"""Splitting, the byte codec, span corruption and packing on real text: megabytes per second of one core.

    pip install hat-splitter        # the released splitter, in Rust; its licence is not a free one: run it to compare, no more
    python -m scripts.bench.words --text data/*.txt --out runs/bench

Every row is processor time of one thread, the median of many rounds in which everybody has a turn. The released splitter is
timed beside ours where it can be imported, after both have split every text alike. Packing says what part of its rows is
empty, for documents of a few lines, in rows of `--row` bytes and as many words as so many bytes of the text have, and a tenth.

Writes words.json.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from scripts.bench import meter
from scripts.refusals import refusals

NATIVE = "hat-splitter"


def main(
    *,
    text: tuple[pathlib.Path, ...],
    out: pathlib.Path = pathlib.Path("runs/bench"),
    rounds: int = 9,
    row: int = 4096,
    lines: int = 4,
) -> None:
    """Time everything on each file, print a table, write the figures.

    Args:
      text: files of UTF-8.
      out: directory for words.json.
      rounds: how often everyone has a turn.
      row: bytes per packed row.
      lines: lines per document that is packed.
    """
    console = Console()
    console.print(f"one thread, on core {meter.pin()}")
    native = released()
    if native is None:
        console.print("hat-splitter is not installed: ours alone")
    table = Table(title="MB/s")
    report: dict[str, dict[str, float]] = {}
    for path in text:
        report[path.stem] = figures = measure(path.read_bytes(), native, rounds, row, lines)
        if not table.columns:
            for name in ("", *figures):
                table.add_column(name, justify="right")
        table.add_row(path.stem, *(f"{v:.2%}" if name == "waste" else f"{v:.1f}" for name, v in figures.items()))
    console.print(table)
    out.mkdir(parents=True, exist_ok=True)
    (out / "words.json").write_text(json.dumps(dict(rounds=rounds, row=row, lines=lines, texts=report), indent=2))
    console.print(f"wrote words.json to {out}")


def measure(raw: bytes, native: Any, rounds: int, row: int, lines: int) -> dict[str, float]:
    """Column to megabytes per second, and the waste of packing."""
    from jaxmerge import words

    decoded = raw.decode()
    ids = words.to_ids(raw)
    length = words.span_lengths(1024)[0]
    batch = ids[: len(ids) // length * length].reshape(-1, length)
    rng = np.random.default_rng(0)
    every = [line for line in raw.split(b"\n") if line]
    documents = [b"\n".join(every[i : i + lines]) for i in range(0, len(every), lines)]
    budget = int(1.1 * row * words.starts(raw).sum() / len(raw))

    calls: dict[str, Callable[[], object]] = {
        "hat": lambda: words.starts(raw),
        "hat, 100 bytes": lambda: words.starts(raw, max_bytes=100),
        "hat, words": lambda: words.split(raw),
        "unicode": lambda: words.starts(raw, rule="unicode"),
        "whitespace": lambda: words.starts(raw, rule="whitespace"),
        "to_ids": lambda: words.to_ids(raw),
        "to_bytes": lambda: words.to_bytes(ids),
        "spans": lambda: words.corrupt(batch, words.span_mask(rng, *batch.shape)),
        "pack": lambda: words.pack(documents, row, budget),
    }
    if native is not None:
        ours = [word.decode() for word in words.split(raw)]
        if native.split(decoded) != ours:
            raise SystemExit("the released splitter has other words: not the same work.")
        calls[f"{NATIVE}, words"] = lambda: native.split(decoded)
        calls[f"{NATIVE}, 100 bytes"] = lambda: native.split_with_limit(decoded, 100)
    times = meter.interleave(calls, rounds)
    size = {"spans": batch.size, "pack": sum(map(len, documents))}
    speed = {name: size.get(name, len(raw)) / 1e6 / float(np.median(t[:, 0])) for name, t in times.items()}
    return speed | {"waste": words.pack(documents, row, budget).waste(budget)}


def released() -> Any:
    """The released splitter, if it is there."""
    try:
        import hat_splitter  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return hat_splitter.HATSplitter()


if __name__ == "__main__":
    with refusals():
        tyro.cli(main, prog=f"python -m {__spec__.name}", description=__doc__)
