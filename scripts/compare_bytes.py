"""Byte models side by side: ByT5, MrT5 and deletion at random on hidden spans; a plain decoder, HAT and H-Net on the next byte.

    python -m scripts.compare_bytes --out runs/bytes                               # prose and code that every Python carries
    python -m scripts.compare_bytes --data DIRECTORY --out runs/bytes_languages    # parallel.tsv and LANG.txt, by language
    python -m scripts.compare_bytes --text en=en.txt de=german/ --out runs/mine    # text of your own

Within a task every row sees the same bytes in the same order. ByT5 is trained first; then ByT5 itself, MrT5 (softly, its
controller on) and random deletion at each rate go on from it for `share` of the budget, and are judged with hard deletion.
A row's error is the standard error over held-out windows; the error of a difference is taken window by window.

Writes bytes.json (finished rows are not trained again), bytes.md, bytes.png, and each row's parameters with its model.json,
for `scripts.show_bytes`.
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
from scripts import bytes_data, bytes_models, bytes_report, bytes_speed, state
from scripts.bytes_data import Domain
from scripts.bytes_models import Contestant, Params
from scripts.bytes_train import Recipe, Scorer, Trainer
from scripts.refusals import refusals


def main(
    *,
    data: pathlib.Path | None = None,
    text: tuple[str, ...] = (),
    out: pathlib.Path = pathlib.Path("runs/bytes"),
    rates: tuple[float, ...] | None = None,
    budget: int = 3_400_000,
    share: float = 0.25,
    decoder_budget: int = 2_000_000,
    length: int = 128,
    decoder_length: int = 256,
    tokens: int = 2048,
    rate: float = 2e-3,
    noise: float = 0.3,
    span: float = 6.0,
    k_p: float = 0.05,
    k_i: float = 1e-4,
    lowest: float = -0.1,
    windows: int = 256,
    rounds: int = 9,
    only: tuple[str, ...] = (),
    seed: int = 0,
) -> None:
    """Train, judge, tell.

    Args:
      data: a directory of parallel.tsv and LANG.txt; none: the text that comes with Python.
      text: your own instead: files, folders, quoted globs; NAME=PATH for several domains.
      rates: shares of bytes to delete; by default 0.3, 0.5 and 0.7, and 0.5 for languages.
      budget: bytes that every encoder-decoder sees, those of its start included.
      share: the part of the budget after the rows' common start.
      decoder_budget: bytes that every decoder sees.
      length, decoder_length: bytes in a window.
      tokens: bytes in a step.
      rate: of learning.
      noise, span: the share of bytes that is hidden (ByT5: 0.15), the mean length of a hidden span (ByT5: 20).
      k_p, k_i, lowest: the controller's gains, and alpha's floor (the paper: 0).
      windows: held out, of each domain, at most.
      rounds: of timing, in turn; 0 leaves it out.
      only: names of rows to train, and what they start from; none: all of them.
    """
    console, began = Console(), time.perf_counter()
    console.width = console.width if console.is_terminal else 140
    rates = rates if rates is not None else (0.5,) if data else (0.3, 0.5, 0.7)
    if data and text:
        raise ValueError("compare_bytes: --data and --text each say what to read; give one of them.")
    domains = bytes_data.languages(data) if data else bytes_data.text(text, length=max(length, decoder_length))
    rows = chosen(bytes_models.contestants(rates, share, decoders=data is None), only)
    common: dict[str, Any] = dict(
        rate=rate, noise=noise, span=span, k_p=k_p, k_i=k_i, lowest=lowest, windows=windows, seed=seed
    )  # fmt: skip
    recipes = {
        "hidden spans": Recipe(length=length, batch=tokens // length, budget=budget, **common),
        "next byte": Recipe(length=decoder_length, batch=tokens // decoder_length, budget=decoder_budget, **common),
    }
    out.mkdir(parents=True, exist_ok=True)
    cache = Cache(out, recipes, domains)
    columns = [TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[text]}")]
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        for row in rows:
            if row.name in cache.rows:
                console.print(f"{row.name}: found in {out}", highlight=False)
                continue
            start = cache.params(next(r for r in rows if r.name == row.start)) if row.start else None
            cache.keep(row, *run(row, recipes[row.task], domains, start, progress))
    if rounds and any("ms" not in cache.rows[row.name] for row in rows):
        console.print("timing", highlight=False)
        params, widths = {r.name: cache.params(r) for r in rows}, {r.name: cache.rows[r.name]["width"] for r in rows}
        for name, ms in bytes_speed.times(rows, recipes, domains, params=params, widths=widths, rounds=rounds).items():
            cache.rows[name]["ms"] = ms
        cache.write()
    report = cache.report([row.name for row in rows])
    for sheet in bytes_report.tables(report):
        console.print(sheet.rich())
    bytes_report.write(report, out)
    console.print(f"wrote bytes.json, bytes.md and bytes.png to {out}, in {time.perf_counter() - began:.0f} s")


def chosen(rows: list[Contestant], only: tuple[str, ...]) -> list[Contestant]:
    """The rows that are named, and those that they start from."""
    names = {row.name: row for row in rows}
    if unknown := set(only) - set(names):
        raise ValueError(f"--only {' '.join(sorted(unknown))}: not among {', '.join(names)}.")
    wanted = {*only, *(start for name in only if (start := names[name].start))} if only else set(names)
    return [row for row in rows if row.name in wanted]


def run(
    row: Contestant, recipe: Recipe, domains: list[Domain], start: Params | None, progress: Progress
) -> tuple[Params, dict[str, Any]]:
    """Train a row and judge it: its parameters and its figures."""
    trainer, scorer = Trainer(row, recipe, domains), Scorer(row, recipe, domains)
    task = progress.add_task(f"{row.name:10s}", total=trainer.steps, text="compiling")
    tick = lambda text: progress.update(task, advance=1, text=text)
    tell = lambda text: progress.console.print(text, highlight=False)
    before = time.process_time()
    params, curve, log = trainer(row.init(recipe.seed, start), scorer, tick, tell)
    seconds = time.process_time() - before

    figures = dict(seconds=seconds, steps=trainer.steps, curve=curve, log=log)
    return params, judge(row, params, trainer, scorer) | figures


def judge(row: Contestant, params: Params, trainer: Trainer, scorer: Scorer) -> dict[str, Any]:
    """A trained row's figures.

    What it keeps is packed with room for the fullest held-out window, so that nothing is lost. Deletion's cost is told at the
    mean: that of batches whose windows keep about as much.
    """
    soft = scores = scorer(params)
    kept = np.concatenate(list(soft.kept.values()))
    fullest = width = words.capacity_for(kept, multiple_of=4, at_most=scorer.reads)
    if row.packs:
        scores = scorer(params, capacity=fullest)
        if scores.overflow:
            raise RuntimeError(f"{row.name}: {scores.overflow} bytes found no room in {fullest} slots.")
    if row.deletion:
        width = words.capacity_for([int(np.ceil(kept.mean()))], multiple_of=4, at_most=scorer.reads)
    means = lambda found, scale=1: {d: float(v.mean() / scale) for d, v in found.items()}
    return dict(
        name=row.name, task=row.task, start=row.start, deletion=row.deletion, at_random=row.at_random,
        parameters=sum(x.size for x in jax.tree.leaves(params)), width=width, fullest=fullest,
        bits={d: np.round(b.astype(float), 5).tolist() for d, b in scores.bits.items()},
        soft=means(soft.bits) if row.deletion else None, kept=means(scores.kept, scorer.reads),
        flops=bytes_speed.operations_of(row, params, trainer, scorer, width if row.packs else None),
    )  # fmt: skip


class Cache:
    """OUT/bytes.json and OUT/ROW: what is finished stays finished, as long as the recipe is the same."""

    def __init__(self, out: pathlib.Path, recipes: dict[str, Recipe], domains: list[Domain]):
        self.out = out
        sizes = lambda d: dict(train=len(d.train), heldout=len(d.heldout), sentences=d.sentences)
        self.given = {
            "recipes": {task: dataclasses.asdict(recipe) for task, recipe in recipes.items()},
            "domains": {d.name: sizes(d) for d in domains},
        }
        self.rows: dict[str, dict[str, Any]] = {}
        if (path := out / "bytes.json").exists():
            found = json.loads(path.read_text())
            if any(found[k] != v for k, v in self.given.items()):
                raise ValueError(f"{path} is of another recipe or other text; name another --out, or delete it.")
            self.rows = {row["name"]: row for row in found["rows"]}

    def report(self, names: list[str] | None = None) -> dict[str, Any]:
        """Everything, or the rows that are named, in that order."""
        return {**self.given, "rows": [self.rows[name] for name in (self.rows if names is None else names)]}

    def write(self) -> None:
        (self.out / "bytes.json").write_text(json.dumps(self.report(), indent=1) + "\n")

    def keep(self, row: Contestant, params: Params, figures: dict[str, Any]) -> None:
        where = self.directory(row.name)
        where.mkdir(exist_ok=True)
        state.save(where / "params", params)
        bytes_models.save_config(where / "model.json", row.config)
        self.rows[row.name] = figures
        self.write()

    def params(self, row: Contestant) -> Params:
        """Of a finished row."""
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
        fresh = jax.tree.map(like, jax.eval_shape(lambda: row.init(0, None)))
        return state.load_like(self.directory(row.name) / "params", fresh)

    def directory(self, name: str) -> pathlib.Path:
        return self.out / name.replace(" ", "_").replace("%", "").lower()


if __name__ == "__main__":
    with refusals():
        tyro.cli(main, prog=f"python -m {__spec__.name}", description=__doc__)
