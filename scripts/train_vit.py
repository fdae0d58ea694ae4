"""Train a small Vision Transformer on scikit-learn's digits, merge its tokens, and show what that costs and saves.

    python -m scripts.train_vit --out runs/vit

Two CPU cores, about a minute: over 98 % of held-out digits right, with all tokens and with an eighth of them. Writes
vit.json (the table), digits.png and photo.png (which patches merged).
"""

import json
import pathlib
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_sample_image

import jaxmerge as jm
from models.vit import ViT, ViTConfig
from scripts.draw import gallery, merged_patches
from scripts.images import Images, digits
from scripts.refusals import refusals

CONFIG = ViTConfig(
    width=48, depth=4, num_heads=4, patch_size=4, image_size=32, mlp_ratio=2, num_classes=10, channels=1,
    class_token=False, pool="mean",
)  # fmt: skip


def main(
    *,
    out: pathlib.Path = pathlib.Path("runs/vit"),
    steps: int = 700,
    batch: int = 32,
    learning_rate: float = 4e-3,
    train_r: int = 16,
    rs: tuple[int, ...] = (0, 4, 8, 12, 16, 32),
    seed: int = 0,
) -> None:
    """Train with `train_r` tokens merged per block; evaluate with each of `rs`; draw.

    Args:
      out: directory for the table and the pictures.
      train_r: merging while training too makes each step cheaper.
      rs: tokens removed per block at evaluation, 0 first.
    """
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    data = digits(seed)
    began = time.perf_counter(), time.process_time()
    model = ViT(CONFIG, rngs=nnx.Rngs(seed))
    fit(model, data, steps=steps, batch=batch, learning_rate=learning_rate, r=train_r, seed=seed)
    seconds, cpu_seconds = time.perf_counter() - began[0], time.process_time() - began[1]
    console.print(f"trained {steps} steps in {seconds:.0f} s ({cpu_seconds:.0f} s of processor time)")

    rows = evaluate(model, data, rs)
    table = Table(title=f"{len(data.held_out)} held-out digits, {CONFIG.num_tokens} tokens, {CONFIG.depth} blocks")
    for column in ("r", "tokens left", "MFLOPs / image", "accuracy", "images / s", "speed-up"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["r"]), str(row["tokens"]), f"{row['flops'] / 1e6:.1f}", f"{row['accuracy']:.1%}",
            f"{row['images_per_second']:,.0f}", f"{row['speedup']:.2f} x",
        )  # fmt: skip
    console.print(table)
    report = dict(steps=steps, seconds=seconds, cpu_seconds=cpu_seconds, seed=seed, train_r=train_r, rows=rows)
    (out / "vit.json").write_text(json.dumps(report, indent=2))
    draw_digits(model, data.held_out[:6], out / "digits.png")
    draw_photo(out / "photo.png")
    console.print(f"wrote vit.json, digits.png and photo.png to {out}")


def fit(model: ViT, data: Images, *, steps: int, batch: int, learning_rate: float, r: int, seed: int, shift: int = 4) -> None:
    """AdamW with a cosine, on images moved by up to `shift` pixels; r tokens merge in every block."""
    rate = optax.warmup_cosine_decay_schedule(0, learning_rate, steps // 10, steps)
    optimizer = nnx.Optimizer(model, optax.adamw(rate, b2=0.98, weight_decay=0.05), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, images, labels, by):
        border = ((shift, shift), (shift, shift), (0, 0))
        move = lambda image, by: jax.lax.dynamic_slice(
            jnp.pad(image, border, constant_values=-1.0), (by[0], by[1], 0), image.shape
        )
        images = jax.vmap(move)(images, by)
        loss = lambda m: optax.softmax_cross_entropy_with_integer_labels(m(images, r=r), labels).mean()
        optimizer.update(model, nnx.grad(loss)(model))

    rng = np.random.default_rng(seed)
    for _ in track(range(steps), "training the ViT"):
        some = rng.choice(len(data.train), batch, replace=False)
        step(model, optimizer, data.train[some], data.train_labels[some], rng.integers(0, 2 * shift + 1, (batch, 2)))
    jax.block_until_ready(nnx.state(model))


def evaluate(model: ViT, data: Images, rs: tuple[int, ...]) -> list[dict]:
    """Accuracy, arithmetic and speed for each r: compiled, warmed up, all r in turn, the median of the rounds."""
    graph, state = nnx.split(model)
    images, labels = jnp.asarray(data.held_out), data.held_out_labels
    programs, rows = {}, []
    for r in rs:
        forward = jax.jit(lambda state, images, r=r: nnx.merge(graph, state)(images, r=r)).lower(state, images).compile()
        left = CONFIG.num_tokens - sum(jm.tokens.schedule(CONFIG.depth, r, n=CONFIG.num_tokens))
        cost = forward.cost_analysis() or {}
        accuracy = float((np.asarray(forward(state, images)).argmax(-1) == labels).mean())
        rows.append(dict(r=r, tokens=left, flops=cost["flops"] / len(images), accuracy=accuracy))
        programs[r] = partial(forward, state, images)
    seconds = {r: [] for r in rs}
    for _ in range(9):
        for r, program in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program())
            seconds[r].append(time.perf_counter() - began)
    for row in rows:
        median = float(np.median(seconds[row["r"]]))
        row |= dict(images_per_second=len(images) / median, speedup=float(np.median(seconds[rs[0]])) / median)
    return rows


def draw_digits(model: ViT, images: np.ndarray, path: pathlib.Path, rs: tuple[int, ...] = (0, 4, 8, 12)) -> None:
    """One row per r: the patches that the model merges."""
    gray, rows = np.clip((images[..., 0] + 1) / 2, 0, 1), []
    for r in rs:
        _, plan = nnx.jit(lambda m, x, r=r: m.features(x, r=r))(model, jnp.asarray(images))
        one = lambda i, plan=plan: jax.tree.map(lambda ids: ids[i], plan)
        drawn = [merged_patches(g, one(i), (CONFIG.grid, CONFIG.grid), zoom=8, line=2) for i, g in enumerate(gray)]
        rows.append([(f"r = {r}: {plan.num_segments} tokens" if i == 0 else "", d) for i, d in enumerate(drawn)])
    gallery(rows, path)


def draw_photo(path: pathlib.Path, shares: tuple[float, ...] = (1.0, 0.6, 0.3, 0.1), patch: int = 16) -> None:
    """Merge the patches of a photograph by their pixels alone, round after round: no network, no training."""

    @partial(jax.jit, static_argnums=2)
    def shrink(x, plan, r):
        step = jm.tokens.bipartite_matching(x, r)
        return jm.merge(step, x, weight=plan.sizes), jm.compose(step, plan)

    pictures = []
    for name in ("china.jpg", "flower.jpg"):
        photo = load_sample_image(name)[:416] / 255
        grid = photo.shape[0] // patch, photo.shape[1] // patch
        x = photo.reshape(grid[0], 4, patch // 4, grid[1], 4, patch // 4, 3).mean(axis=(2, 5))  # 4 x 4 colours a patch
        x = x.transpose(0, 2, 1, 3, 4).reshape(grid[0] * grid[1], -1)
        place = np.indices(grid).reshape(2, -1).T / max(grid)
        # The last column is a constant, so that directions tell light from dark and near from far.
        x = np.concatenate([x - x.mean(0), 2 * place - 1, np.full((len(x), 1), 3.0)], axis=-1)
        plan, x = jm.identity(len(x)), jnp.asarray(x, jnp.float32)
        drawn = []
        for share in shares:
            target = round(share * plan.num_positions)
            while plan.num_segments > target:  # a quarter at a time, so that the likest go first
                x, plan = shrink(x, plan, min(plan.num_segments - target, max(plan.num_segments // 4, 1)))
            caption = f"{target} of {plan.num_positions} patches"
            drawn.append((caption, merged_patches(photo, plan, grid)))
        pictures.append(drawn)
    gallery(pictures, path)


if __name__ == "__main__":
    with refusals():
        tyro.cli(main, prog=f"python -m {__spec__.name}", description=__doc__)
