"""What merging is worth in a whole model: a forward pass with and without it, and how much of the work saved is time saved.

    python -m scripts.bench.vit --out runs/bench

Our own model against itself: the same weights, one thread, all r in turn. The arithmetic is counted by formula (matrix
products and attention, for each block's own number of tokens) and by `compiled.cost_analysis()`. The last column, the
speed-up over the ratio of operations, is 100 % where merging costs nothing. Writes vit.json.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from rich.console import Console
from rich.table import Table

import jaxmerge as jm
from models.vit import VARIANTS, ViT, ViTConfig
from scripts.bench import meter


def main(
    *,
    variant: str = "B/16",
    batch: int = 8,
    rs: tuple[int, ...] = (0, 16),
    rounds: int = 7,
    out: pathlib.Path = pathlib.Path("runs/bench"),
) -> None:
    """Time them and print the table.

    Args:
      variant: one of models.vit.VARIANTS.
      batch: images.
      rs: tokens removed per block, 0 first.
      rounds: how often each r has a turn.
      out: directory for vit.json.
    """
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    console.print(f"one thread, on core {meter.pin()}")
    rows = measure(VARIANTS[variant], batch, rs, rounds)
    table = Table(title=f"ViT-{variant}, batch {batch}, milliseconds of processor time")
    for column in ("r", "GFLOP", "compiled", "median", "min", "max", "operations / this", "time / this", "of the ratio"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["r"]), f"{row['flops'] / 1e9:.1f}", f"{row['compiled_flops'] / 1e9:.1f}",
            *(f"{row['times'][f'cpu_{w}']:.0f}" for w in ("median", "min", "max")),
            f"{row['flop_ratio']:.3f} x", f"{row['speedup']:.3f} x", f"{row['speedup'] / row['flop_ratio']:.1%}",
        )  # fmt: skip
    console.print(table)
    (out / "vit.json").write_text(json.dumps(dict(variant=variant, batch=batch, rounds=rounds, rows=rows), indent=2))


def measure(config: ViTConfig, batch: int, rs: tuple[int, ...], rounds: int) -> list[dict]:
    """A row for each r; ratios are to the first, and of times the median over the rounds of the ratio within a round."""
    graph, state = nnx.split(ViT(config, rngs=nnx.Rngs(0)))
    shape = (batch, config.image_size, config.image_size, config.channels)
    images = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    compiled, calls = {}, {}
    for r in rs:
        forward = jax.jit(lambda state, images, r=r: nnx.merge(graph, state)(images, r=r))
        compiled[r] = forward.lower(state, images).compile()
        calls[str(r)] = lambda r=r: jax.block_until_ready(compiled[r](state, images))
    times = meter.interleave(calls, rounds, warm=1)
    first = times[str(rs[0])][:, 0]
    return [
        dict(
            r=r,
            flops=flops(config, batch, r),
            compiled_flops=(compiled[r].cost_analysis() or {})["flops"],
            flop_ratio=flops(config, batch, rs[0]) / flops(config, batch, r),
            speedup=float(np.median(first / times[str(r)][:, 0])),
            times=meter.summary({"": times[str(r)]})[""],
        )
        for r in rs
    ]


def flops(config: ViTConfig, batch: int, r: int) -> float:
    """Of one forward pass: two per multiply-add of every matrix product. A block merges between attention and MLP."""
    d, n = config.width, config.num_tokens
    total = 2 * (n - config.num_prefix) * config.patch_size**2 * config.channels * d + 2 * d * config.num_classes
    for r_block in jm.tokens.schedule(config.depth, r, n=n, protected=config.num_prefix):
        total += 8 * n * d * d + 4 * n * n * d
        n -= r_block
        total += 4 * n * d * int(config.mlp_ratio * d)
    return float(batch * total)


if __name__ == "__main__":
    tyro.cli(main)
