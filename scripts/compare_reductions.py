"""Compare every way to reduce tokens on one Vision Transformer: accuracy, arithmetic, time and pictures.

    python -m scripts.compare_reductions --out runs/reductions
    python -m scripts.compare_reductions --data images.npz --patch 2 --out runs/mine

Trains a ViT of 196 patches on handwritten digits over photographs (or on your images), with every token. Then, untrained for
it, every planner removes the same number of tokens, after every block but the last, or all at once after the first.
Writes reductions.json, accuracy.png (accuracy against arithmetic, one panel per family) and pictures.png (what each merged).
"""

import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxmerge as jm
from models.vit import ViT, ViTConfig
from scripts.draw import gallery, merged_patches
from scripts.images import Images, from_file, photo_digits
from scripts.reductions import REDUCTIONS, Reduction
from scripts.refusals import refusals
from scripts.train_vit import fit


def main(
    *,
    out: pathlib.Path = pathlib.Path("runs/reductions"),
    data: pathlib.Path | None = None,
    images: int = 16_384,
    patch: int = 2,
    width: int = 64,
    depth: int = 4,
    heads: int = 2,
    steps: int = 1000,
    batch: int = 32,
    learning_rate: float = 3e-3,
    rs: tuple[int, ...] = (25, 32),
    only: tuple[str, ...] = (),
    rounds: int = 3,
    held_out: int = 512,
    seed: int = 0,
) -> None:
    """Train once, reduce in every way, tell what it costs and saves.

    Args:
      out: directory for the table, the plot and the pictures.
      data: an .npz with train_images, train_labels, test_images, test_labels; none: digits over photographs.
      images: how many digits over photographs to train on.
      patch: pixels along a patch's side.
      rs: tokens removed after every block but the last: the budgets. Grid pooling needs what is left to be a square.
      only: names of reductions to try; none: all of them.
      rounds: how often each is timed, in turn.
      held_out: images to evaluate on.
    """
    if unknown := set(only) - {r.name for r in REDUCTIONS}:
        raise ValueError(f"--only {' '.join(sorted(unknown))}: not among {', '.join(r.name for r in REDUCTIONS)}.")
    pool = from_file(data) if data else photo_digits(seed, images, held_out)
    config = ViTConfig(
        width=width, depth=depth, num_heads=heads, patch_size=patch, image_size=pool.train.shape[1], mlp_ratio=2,
        num_classes=len(pool.classes), channels=pool.train.shape[-1],
    )  # fmt: skip
    most = max(rs) * (depth - 1)
    if config.grid**2 - most < max(rs):
        raise ValueError(f"--rs {max(rs)}: {depth - 1} blocks would remove {most} of {config.grid**2} patches; ask for fewer.")
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    began = time.perf_counter()
    model = ViT(config, rngs=nnx.Rngs(seed))
    model.pos_embed[...] = sines(config)  # a place to start from: learning the grid from nothing takes thousands of steps
    fit(model, pool, steps=steps, batch=batch, learning_rate=learning_rate, r=0, seed=seed, shift=2)
    seconds = time.perf_counter() - began
    console.print(f"trained {steps} steps of {batch} images in {seconds:.0f} s")

    chosen = [r for r in REDUCTIONS if not only or r.name in only]
    rows, plans = evaluate(model, pool, chosen, rs, held_out=held_out, rounds=rounds)
    console.print(table(rows, f"{held_out} held-out images, {config.grid**2} patches, {depth} blocks"))
    settings = dict(
        data=data.name if data else "digits over photographs", patch=patch, width=width, depth=depth, heads=heads, steps=steps,
        batch=batch, learning_rate=learning_rate, seconds=seconds, seed=seed, held_out=held_out,
    )  # fmt: skip
    (out / "reductions.json").write_text(json.dumps(dict(settings=settings, rows=rows), indent=2))
    plot(rows, out / "accuracy.png")
    pictures(pool.held_out[:SHOWN], plans, config.grid, out / "pictures.png")
    console.print(f"wrote reductions.json, accuracy.png and pictures.png to {out}")


SHOWN = 6  # images in the gallery


def sines(config: ViTConfig) -> jax.Array:
    """Two-dimensional sine and cosine positions, 0 for the class token."""
    rate = 10_000.0 ** (-np.arange(config.width // 4) / (config.width // 4))
    y, x = (place.reshape(-1, 1) * rate for place in np.indices((config.grid, config.grid)))
    table = np.concatenate([np.sin(y), np.cos(y), np.sin(x), np.cos(x)], axis=1)
    table = np.pad(table, ((config.num_prefix, 0), (0, config.width - table.shape[1])))
    return jnp.asarray(table[None], jnp.float32)


def evaluate(
    model: ViT, data: Images, reductions: list[Reduction], rs: tuple[int, ...], *, held_out: int, rounds: int
) -> tuple[list[dict], dict[str, jm.Plan | jm.SoftPlan]]:
    """One row per reduction and budget, and what each did to the first images at the middle budget.

    All programs are compiled first and then timed in turn, so that a busy machine is busy for all of them.
    """
    graph, state = nnx.split(model)
    images, labels = jnp.asarray(data.held_out[:held_out]), data.held_out_labels[:held_out]
    depth, middle = len(model.blocks), sorted(rs)[len(rs) // 2]
    whole = Reduction("all tokens", "-", lambda seen, r: jm.identity(seen.x.shape[1]))
    wanted = [(whole, 0)] + [(how, r) for how in reductions for r in rs]
    rows, programs, plans = [], [], {}
    for how, r in track(wanted, "compiling and scoring"):
        budget = [r * (depth - 1)] if how.once else [r] * (depth - 1)

        def forward(state, images, how=how, budget=budget):
            x, plan = nnx.merge(graph, state).features(
                images, r=budget, planner=how.planner, reduce=how.reduce, proportional=how.proportional
            )
            return nnx.merge(graph, state).classify(x, plan), plan

        program = jax.jit(forward).lower(state, images).compile()
        logits, plan = program(state, images)
        cost = program.cost_analysis() or {}
        accuracy = float((np.asarray(logits).argmax(-1) == labels).mean())
        rows.append(
            dict(name=how.name, family=how.family, r=r, tokens=plan.num_segments, accuracy=accuracy,
                 mflops=cost["flops"] / len(images) / 1e6)
        )  # fmt: skip
        programs.append(program)
        if r == middle:
            plans[how.name] = jax.tree.map(lambda a: a[:SHOWN], plan)
    times = np.array([[_seconds(p, state, images) for p in programs] for _ in track(range(rounds), "timing")])
    for row, seconds in zip(rows, times.T, strict=True):
        row |= dict(
            images_per_second=len(images) / float(np.median(seconds)),
            speedup=float(np.median(times[:, 0] / seconds)),
            flop_ratio=rows[0]["mflops"] / row["mflops"],
        )
    return rows, plans


def _seconds(program, *args) -> float:
    began = time.perf_counter()
    jax.block_until_ready(program(*args))
    return time.perf_counter() - began


def table(rows: list[dict], title: str) -> Table:
    """The rows, families together, best accuracy first within a budget."""
    out = Table(title=title)
    for column in ("family", "reduction"):
        out.add_column(column, no_wrap=True)
    for column in ("r", "left", "accuracy", "MFLOPs", "FLOP ratio", "images/s", "speed-up"):
        out.add_column(column, justify="right")
    order = sorted(rows, key=lambda row: (row["r"], row["family"], -row["accuracy"]))
    for row, after in zip(order, [*order[1:], None], strict=True):
        out.add_row(
            row["family"], row["name"], str(row["r"]), str(row["tokens"]), f"{row['accuracy']:.1%}", f"{row['mflops']:.1f}",
            f"{row['flop_ratio']:.2f} x", f"{row['images_per_second']:,.0f}", f"{row['speedup']:.2f} x",
            end_section=after is not None and after["r"] != row["r"],
        )  # fmt: skip
    return out


def plot(rows: list[dict], path: pathlib.Path) -> None:
    """Accuracy against arithmetic, one panel per family, Token Merging in each for comparison."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    whole, families = rows[0], sorted({row["family"] for row in rows[1:]})
    figure = Figure(figsize=(3.2 * len(families), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(families), sharey=True, squeeze=False)[0]
    for axis, family in zip(axes, families, strict=True):
        names = list(dict.fromkeys(row["name"] for row in rows[1:] if row["family"] == family))
        for name in names if "ToMe" in names else ["ToMe", *names]:
            line = [whole, *sorted((row for row in rows if row["name"] == name), key=lambda row: row["r"])]
            if len(line) > 1:
                style = dict(color="black", linestyle="--", linewidth=1) if name == "ToMe" else dict(marker=".", linewidth=1)
                axis.plot([p["mflops"] for p in line], [100 * p["accuracy"] for p in line], label=name, **style)
        axis.set(title=family, xlabel="MFLOPs per image")
        axis.legend(fontsize=6)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy, %")
    figure.savefig(path, dpi=100)


def pictures(images: np.ndarray, plans: dict[str, jm.Plan | jm.SoftPlan], grid: int, path: pathlib.Path) -> None:
    """One row of pictures per reduction: groups outlined, dropped patches grey."""
    zoom, images = max(1, 168 // images.shape[1]), np.clip((images + 1) / 2, 0, 1)
    rows = []
    for name, plan in plans.items():
        patches = lambda i, plan=plan: (
            jm.Plan(plan.segment_ids[i, 1:], plan.num_segments)
            if isinstance(plan, jm.Plan)
            else jm.SoftPlan(plan.weights[i, :, 1:])
        )
        drawn = [merged_patches(image, patches(i), (grid, grid), zoom=zoom, line=1) for i, image in enumerate(images)]
        rows.append([(name if i == 0 else "", picture) for i, picture in enumerate(drawn)])
    gallery(rows, path)


if __name__ == "__main__":
    with refusals():
        tyro.cli(main, prog=f"python -m {__spec__.name}", description=__doc__)
