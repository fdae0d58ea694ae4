"""Compare every way to merge eight experts of one base: accuracy on each task, normalized by the task's own expert.

    python -m scripts.compare_merges --suite digits --out runs/merges/digits
    python -m scripts.compare_merges --suite text --out runs/merges/text
    python -m scripts.compare_merges --suite images --data images.npz --out runs/merges/images
    python -m scripts.compare_merges --suite languages --data DIRECTORY --out runs/merges/languages

Trains a base, fits a head for each task on its features (images) or shares one (text), fine-tunes an expert per task, merges
the experts in every way: first at defaults, then with the length of the merged task vector chosen on validation data, as the
papers choose their lambda. Writes merges.json, accuracy.png (by merge, and against the number of experts) and tasks.png (the
task vectors' cosines, sign conflicts and lengths).
"""

import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table

import jaxmerge as jm
from models.lm import ByteLM
from models.t5 import T5Config
from models.vit import ViT, ViTConfig
from scripts import tasks
from scripts.experts import Head, Network, Params, Scorer, Trainer, grams, information, probe, without_head
from scripts.merges import MERGES, Given, Merge, Merged
from scripts.refusals import refusals

FACTORS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0)
"""What a merged task vector is multiplied by, to see which is best on validation data."""
BY_NUMBER = ("linear", "task_arithmetic", "ties", "tsvm", "iso_c", "emr")
"""The best-known merges, which are also tried with fewer experts."""


def main(
    *,
    suite: Literal["digits", "text", "images", "languages"] = "digits",
    data: pathlib.Path | None = None,
    out: pathlib.Path = pathlib.Path("runs/merges"),
    width: int = 64,
    depth: int = 4,
    heads: int = 4,
    steps: int = 1500,
    expert_steps: int = 300,
    batch: int = 32,
    rate: float = 3e-3,
    expert_rate: float = 1e-3,
    learned_steps: int = 300,
    orders: int = 2,
    held_out: int | None = None,
    only: tuple[str, ...] = (),
    seed: int = 0,
) -> None:
    """Train a base and eight experts, merge them in every way, tell what is left of each.

    Args:
      suite: which eight tasks; see `scripts/tasks.py`.
      data: images as one .npz (train_images, train_labels, test_images, test_labels), or a directory of LANG.txt with en.txt.
      out: directory for the tables and the pictures.
      steps, rate: of the base.
      expert_steps, expert_rate: of each expert.
      learned_steps: of merges that learn coefficients.
      orders: how many orders of the tasks are averaged over where fewer than all are merged; 0 leaves that out.
      held_out: examples of each task to evaluate on, at most; none: as many as the suite has.
      only: names of merges to try; none: all of them.
    """
    if unknown := set(only) - {m.name for m in MERGES}:
        raise ValueError(f"--only {' '.join(sorted(unknown))}: not among {', '.join(m.name for m in MERGES)}.")
    console, began = Console(), time.perf_counter()
    chosen = load(suite, data, seed)
    out.mkdir(parents=True, exist_ok=True)
    network = build(chosen, width, depth, heads)
    rng = np.random.default_rng((seed, 7))
    some = lambda split: split if held_out is None else split.some(min(held_out, len(split.x)), rng)
    validation, test = ([some(getattr(t, part)) for t in chosen.tasks] for part in ("validation", "test"))

    with Progress(console=console) as progress:
        base, head, experts, joint = train(
            network, chosen, progress, steps=steps, expert_steps=expert_steps, batch=batch, rate=rate,
            expert_rate=expert_rate, seed=seed,
        )  # fmt: skip
    statistics = [t.train.some(min(128, len(t.train.x)), rng) for t in chosen.tasks]
    seen = list(zip(experts, head, statistics, strict=True))
    given = Given(
        network, base, experts, head, [t.train.x for t in chosen.tasks], validation,
        [grams(network, e, h, s.x) for e, h, s in seen],
        [information(network, e, h, s.x, seed=seed) for e, h, s in seen], learned_steps, max(batch // 2, 2), seed,
    )  # fmt: skip
    trained = time.perf_counter() - began
    console.print(f"a base, eight experts and one model for all tasks, trained in {trained:.0f} s")

    judge = Judge(given, Scorer(network, head, validation), Scorer(network, head, test))
    rows = [
        judge.row("experts", "reference", experts),
        judge.row("base", "reference", base),
        judge.row("multi-task training", "reference", joint),
    ]
    for merge in track([m for m in MERGES if not only or m.name in only], "merging", console=console):
        started = time.perf_counter()
        merged = jax.block_until_ready(merge.work(given))
        seconds = time.perf_counter() - started
        rows.append(judge.row(merge.name, merge.family, merged) | dict(seconds=seconds))
    named = [m for m in MERGES if m.name in BY_NUMBER and (not only or m.name in only)]
    numbers = by_number(given, judge, named, orders, console)

    names = [t.name for t in chosen.tasks]
    console.print(table(rows, names, f"{suite}: accuracy, % of each task's expert"))
    settings = dict(
        suite=suite, data=data.name if data else None, width=width, depth=depth, heads=heads, steps=steps,
        expert_steps=expert_steps, batch=batch, rate=rate, expert_rate=expert_rate, learned_steps=learned_steps, orders=orders,
        seed=seed, trained_seconds=trained, seconds=time.perf_counter() - began, tasks=names, scored=judge.test.counts,
        parameters=sum(x.size for x in jax.tree.leaves(base)),
    )  # fmt: skip
    vectors = given.vectors
    analysis = dict(
        cosines=np.asarray(jm.params.cosines(vectors)).tolist(),
        sign_conflict={n: float(v) for n, v in jm.params.sign_conflict(vectors).items()},
        task_norms={n: np.asarray(v).tolist() for n, v in jm.params.task_norms(vectors).items()},
    )
    report = dict(settings=settings, rows=rows, by_number=numbers, analysis=analysis)
    (out / "merges.json").write_text(json.dumps(report, indent=1))
    plot(rows, numbers, suite, out / "accuracy.png")
    jm.params.draw_tasks(vectors, names).savefig(out / "tasks.png", dpi=100)
    console.print(f"wrote merges.json, accuracy.png and tasks.png to {out}, in {time.perf_counter() - began:.0f} s")


def load(suite: str, data: pathlib.Path | None, seed: int) -> tasks.Suite:
    """The suite's data, or a word on what is missing."""
    if (data is None) != (suite in ("digits", "text")):
        wants = "takes no --data: it reads what comes with Python and scikit-learn" if data else "needs --data: see --help"
        raise ValueError(f"--suite {suite} {wants}.")
    if suite == "digits":
        return tasks.digits(seed)
    if suite == "text":
        return tasks.text(seed)
    assert data is not None
    return tasks.images(data, seed) if suite == "images" else tasks.languages(data, seed)


def build(suite: tasks.Suite, width: int, depth: int, heads: int) -> Network:
    """A Vision Transformer of 16 patches, or a byte-level decoder."""
    if suite.heads:
        side, channels = suite.general.x.shape[1], suite.general.x.shape[-1]
        classes = max(suite.classes, *(t.classes for t in suite.tasks))
        config = ViTConfig(
            width=width, depth=depth, num_heads=heads, patch_size=side // 4, image_size=side, mlp_ratio=2, num_classes=classes,
            channels=channels, class_token=False, pool="mean",
        )  # fmt: skip
        return Network(lambda rngs: ViT(config, rngs=rngs), width, classes)
    text = T5Config(
        d_model=width, d_kv=width // heads, d_ff=2 * width, num_heads=heads, num_decoder_layers=depth, vocab_size=256,
        num_buckets=16, max_distance=64,
    )  # fmt: skip
    return Network(lambda rngs: ByteLM(text, rngs=rngs), width, 256)


def train(
    network: Network,
    suite: tasks.Suite,
    progress: Progress,
    *,
    steps: int,
    expert_steps: int,
    batch: int,
    rate: float,
    expert_rate: float,
    seed: int,
) -> tuple[Params, list[Head], list[Params], Params]:
    """The base, the heads, the experts; and one model trained on all tasks, three times as long, with twice the batch."""
    alone, together = Trainer(network, batch=batch, seed=seed), Trainer(network, batch=2 * batch, seed=seed)
    count = len(suite.tasks)

    def bar(name, of_steps, times=1):
        job = progress.add_task(name, total=times * -(-of_steps // alone.chunk))
        return lambda: progress.advance(job)

    base = alone(network.init(seed), [{}], [suite.general], steps=steps, rate=rate, tick=bar("the base", steps))
    heads: list[Head] = [{} for _ in suite.tasks]
    if suite.heads:
        base, _ = without_head(base)
        heads = [probe(network, base, task) for task in suite.tasks]
    tick = bar("the experts", expert_steps, count)
    experts = [
        alone(base, [head], [task.train], steps=expert_steps, rate=expert_rate, tick=tick)
        for head, task in zip(heads, suite.tasks, strict=True)
    ]
    splits, tick = [task.train for task in suite.tasks], bar("all tasks together", 3 * expert_steps)
    joint = together(base, heads, splits, steps=3 * expert_steps, rate=expert_rate, tick=tick)
    return base, heads, experts, joint


class Judge:
    """Accuracies on the tasks' test data, normalized by the experts'; and the best length of a merged task vector."""

    def __init__(self, given: Given, validation: Scorer, test: Scorer):
        self.base, self.validation, self.test = given.base, validation, test
        self.expert = [s(given.experts)[:, 0] for s in (validation, test)]

    def row(self, name: str, family: str, merged: Merged) -> dict[str, Any]:
        """A row of the table: at the merge's defaults and, where one model serves all tasks, with the best factor."""
        row = dict(name=name, family=family, default=self.figures(merged))
        if not isinstance(merged, list) and family != "reference":
            factor = self.best(merged)
            row |= dict(factor=factor, tuned=self.figures(self.stretched(merged, factor)))
        return row

    def figures(self, merged: Merged) -> dict[str, Any]:
        found = self.test(merged)
        accuracy, nats = found.T
        variance = accuracy * (1 - accuracy) / self.test.counts
        return dict(
            accuracy=accuracy.tolist(), bits=(nats / np.log(2)).tolist(), normalized=(accuracy / self.expert[1]).tolist(),
            mean=float((accuracy / self.expert[1]).mean()),
            error=float(np.sqrt((variance / self.expert[1] ** 2).sum()) / len(accuracy)),
        )  # fmt: skip

    def stretched(self, merged: Params, factor: float) -> Params:
        return jax.tree.map(lambda b, m: b + jnp.float32(factor) * (m - b), self.base, merged)

    def best(self, merged: Params, among: Sequence[int] | None = None) -> float:
        """The factor of the highest normalized accuracy on the tasks' validation data."""
        among = list(range(len(self.expert[0]))) if among is None else list(among)
        mean = lambda f: (self.validation(self.stretched(merged, f), among)[:, 0] / self.expert[0][among]).mean()
        return max(FACTORS, key=mean)


def by_number(given: Given, judge: Judge, merges: list[Merge], orders: int, console: Console) -> list[dict[str, Any]]:
    """Normalized accuracy on the tasks whose experts were merged, 1 to all of them, with the best factor."""
    count = len(given.experts)
    wanted = [(merge, k) for merge in merges for k in range(1, count + 1)] if orders else []
    rows = []
    for merge, k in track(wanted, "fewer experts", console=console):
        found = []
        for start in np.arange(1 if k == count else orders) * count // max(orders, 1):
            among = [int(start + i) % count for i in range(k)]
            merged = merge.work(given.of(among))
            if not isinstance(merged, list):
                merged = judge.stretched(merged, judge.best(merged, among))
            found.append((judge.test(merged, among)[:, 0] / judge.expert[1][among]).mean())
        rows.append(dict(name=merge.name, experts=k, normalized=float(np.mean(found))))
    return rows


def table(rows: list[dict], names: list[str], title: str) -> Table:
    """As the literature prints it: a row per merge, a column per task, the mean; and the mean with the best factor."""
    columns = [str(k) for k in range(1, len(names) + 1)]
    told = ", ".join(f"{k} {name}" for k, name in zip(columns, names, strict=True))
    out = Table(
        title=title,
        caption=f"{told}; ± standard error of the mean over the test data",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    out.add_column("merge", no_wrap=True)
    for name in (*columns, "mean", "±", "factor", "mean"):
        out.add_column(name, justify="right", no_wrap=True)
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        best = (f"{row['factor']:g}", f"{row['tuned']['mean']:.1%}") if "tuned" in row else ("", "")
        found = row["default"]
        cells = (f"{100 * v:.0f}" for v in found["normalized"])
        out.add_row(row["name"], *cells, f"{found['mean']:.1%}", f"{100 * found['error']:.1f}", *best)
        if after is not None and after["family"] != row["family"]:
            out.add_row()
    return out


def plot(rows: list[dict], numbers: list[dict], title: str, path: pathlib.Path) -> None:
    """Normalized accuracy by merge, at defaults and with the best factor; and against the number of experts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.6 + 0.19 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    bars = [row for row in rows if row["family"] != "reference"]
    place = np.arange(len(bars))
    left.barh(place, [100 * row.get("tuned", row["default"])["mean"] for row in bars], color="0.8", label="best factor")
    left.barh(place, [100 * row["default"]["mean"] for row in bars], height=0.4, label="defaults")
    for row, style in zip([r for r in rows if r["family"] == "reference"][1:], (":", "--"), strict=True):
        left.axvline(100 * row["default"]["mean"], color="black", linewidth=1, linestyle=style, label=row["name"])
    left.set_yticks(place, [row["name"] for row in bars], fontsize=7)
    left.invert_yaxis()
    left.set(title=f"{title}: eight experts", xlabel="accuracy, % of the experts'", xlim=(0, 105))
    figure.legend(*left.get_legend_handles_labels(), fontsize=7, loc="outside lower left", ncols=4)
    for name in dict.fromkeys(row["name"] for row in numbers):
        line = [row for row in numbers if row["name"] == name]
        right.plot([r["experts"] for r in line], [100 * r["normalized"] for r in line], marker=".", linewidth=1, label=name)
    right.set(title="best factor, on the tasks merged", xlabel="experts", ylabel="accuracy, % of the experts'")
    if numbers:
        right.legend(fontsize=7)
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    with refusals():
        tyro.cli(main, prog=f"python -m {__spec__.name}", description=__doc__)
