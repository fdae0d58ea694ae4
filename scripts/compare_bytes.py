"""Byte models side by side: ByT5, MrT5 and deletion at random on hidden spans; a plain decoder, HAT and H-Net on the next byte.

    python -m scripts.compare_bytes --out runs/bytes                               # prose and code that every Python carries
    python -m scripts.compare_bytes --data DIRECTORY --out runs/bytes/languages    # parallel.tsv and LANG.txt, by language

Within a task every row sees the same bytes in the same order. ByT5 is trained first; then ByT5 itself, MrT5 (softly, its
controller on) and random deletion at each rate go on from it for `share` of the budget, and are judged with hard deletion.
A row's error is the standard error over held-out windows; the error of a difference is taken window by window.

Writes bytes.json (finished rows are not trained again), bytes.md, curves.png, deletion.png, and each row's parameters with
its model.json, for `scripts.show_bytes`.
"""

import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jaxmerge import words
from scripts import bytes_data, bytes_models, bytes_report, state
from scripts.bytes_data import Domain
from scripts.bytes_models import Contestant, Params
from scripts.bytes_train import Recipe, Scorer, Scores, Trainer


def main(
    *,
    data: pathlib.Path | None = None,
    out: pathlib.Path = pathlib.Path("runs/bytes"),
    rates: tuple[float, ...] | None = None,
    budget: int = 6_000_000,
    share: float = 0.25,
    length: int = 128,
    batch: int = 16,
    rate: float = 3e-3,
    noise: float = 0.3,
    span: float = 6.0,
    k_p: float = 0.02,
    k_i: float = 1e-4,
    lowest: float = -0.1,
    windows: int = 256,
    only: tuple[str, ...] = (),
    seed: int = 0,
) -> None:
    """Train, judge, tell.

    Args:
      data: a directory of parallel.tsv and LANG.txt; none: the text that comes with Python.
      rates: shares of bytes to delete; by default 0.3, 0.5 and 0.7, and 0.5 for languages.
      budget: bytes that every row sees, those of its start included.
      share: the part of the budget after the rows' common start.
      length, batch: bytes in a window, windows in a step.
      rate: of learning.
      noise, span: the share of bytes that is hidden (ByT5: 0.15), the mean length of a hidden span (ByT5: 20).
      k_p, k_i, lowest: the controller's gains, and alpha's floor (the paper: 0).
      windows: held out, of each domain, at most.
      only: names of rows to train, and what they start from; none: all of them.
    """
    console, began = Console(), time.perf_counter()
    rates = rates if rates is not None else (0.5,) if data else (0.3, 0.5, 0.7)
    domains = bytes_data.languages(data) if data else bytes_data.text()
    rows = bytes_models.contestants(rates, share, decoders=data is None)
    rows = chosen(rows, only)
    recipe = Recipe(length, batch, budget, rate, noise, span, k_p, k_i, lowest, windows, seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    cache = Cache(out, recipe, domains)
    columns = [TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[text]}")]
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        for row in rows:
            if row.name in cache.rows:
                console.print(f"{row.name}: found in {out}", highlight=False)
                continue
            cache.keep(row, *run(row, recipe, domains, cache, progress))
    report = {"recipe": dataclasses.asdict(recipe), "domains": cache.domains, "rows": [cache.rows[r.name] for r in rows]}
    for table in bytes_report.tables(report):
        console.print(table.rich())
    bytes_report.write(report, out)
    console.print(f"wrote bytes.json, bytes.md and pictures to {out}, in {time.perf_counter() - began:.0f} s")


def chosen(rows: list[Contestant], only: tuple[str, ...]) -> list[Contestant]:
    """The rows that are named, and those that they start from."""
    names = {row.name: row for row in rows}
    if unknown := set(only) - set(names):
        raise SystemExit(f"--only {' '.join(sorted(unknown))}: not among {', '.join(names)}.")
    wanted = {*only, *(start for name in only if (start := names[name].start))} if only else set(names)
    return [row for row in rows if row.name in wanted]


class Cache:
    """OUT/bytes.json and OUT/ROW: what is finished stays finished, as long as the recipe is the same."""

    def __init__(self, out: pathlib.Path, recipe: Recipe, domains: list[Domain]):
        self.path, self.out, self.recipe = out / "bytes.json", out, dataclasses.asdict(recipe)
        sizes = lambda d: dict(train=len(d.train), heldout=len(d.heldout), sentences=d.sentences)
        self.domains = {d.name: sizes(d) for d in domains}
        self.rows: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            found = json.loads(self.path.read_text())
            if (found["recipe"], found["domains"]) != (self.recipe, self.domains):
                raise SystemExit(f"{self.path} is of another recipe or other text; name another --out, or delete it.")
            self.rows = {row["name"]: row for row in found["rows"]}

    def keep(self, row: Contestant, params: Params, figures: dict[str, Any]) -> None:
        where = self.directory(row.name)
        where.mkdir(exist_ok=True)
        state.save(where / "params", state.named(params))
        bytes_models.save_config(where / "model.json", row.config)
        self.rows[row.name] = figures
        text = json.dumps({"recipe": self.recipe, "domains": self.domains, "rows": list(self.rows.values())}, indent=1)
        self.path.write_text(text + "\n")

    def params(self, row: Contestant) -> Params:
        """Of a finished row."""
        fresh = jax.eval_shape(lambda: row.init(0, None))
        return state.unnamed(state.load(self.directory(row.name) / "params", state.make_mesh(1, 1), state.named(fresh)), fresh)

    def directory(self, name: str) -> pathlib.Path:
        return self.out / name.replace(" ", "_").replace("%", "")
