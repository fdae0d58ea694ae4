"""What merging is worth in a whole model: a pass with and without it, and how much of the work saved is time saved.

    python -m scripts.bench.vit --out runs/bench
    python -m scripts.bench.vit --variant L/16 --resolution 384 --batch 64 --rs 0 23 --attention cudnn      (on a GPU)

Our own model against itself: the same weights, all r in turn; on one thread of a CPU, or in bfloat16 on an accelerator. There
with our kernels, without them, and "cut": the last tokens of each block dropped by a slice, which is what a merge that costs
nothing would take. A forward pass reads its matrices in bfloat16, as a served model holds them; training keeps float32. The
arithmetic is counted by formula (matrix products and attention, for each block's own number of tokens), also with tokens padded
to eights, and by `compiled.cost_analysis()`. The last column, the speed-up over the ratio of operations, is 100 % where merging
costs nothing and time follows operations. Writes vit.json.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from rich.console import Console
from rich.table import Table

import jaxmerge as jm
from jaxmerge._kernels import _dispatch as dispatch
from models.vit import VARIANTS, Flash, ViT, ViTConfig, bias_of
from scripts.bench import device, meter
from scripts.refusals import refusals

WITHOUT: dict[Flash, Flash] = {"mosaic_gpu": "cudnn", "mosaic_tpu": "xla"}
"""What runs in place of our attention where our kernels do not."""
Way = Literal["kernel", "XLA", "cut"]


def main(
    *,
    variant: str = "B/16",
    resolution: int | None = None,
    batch: int = 8,
    rs: tuple[int, ...] = (0, 16),
    rounds: int = 7,
    train: bool = False,
    attention: Flash = None,
    ways: tuple[Way, ...] = ("kernel", "XLA", "cut"),
    out: pathlib.Path = pathlib.Path("runs/bench"),
    name: str = "vit",
) -> None:
    """Time them and print the table.

    Args:
      variant: one of models.vit.VARIANTS.
      resolution: of the images, if it is not the variant's.
      batch: images.
      rs: tokens removed per block, 0 first.
      rounds: how often each r has a turn, on a CPU.
      train: the gradient too, on an accelerator.
      attention: "cudnn" for a flash kernel on a GPU, "mosaic_gpu" for ours; without our kernels it is cuDNN's.
      ways: to lose tokens, on an accelerator.
      out: directory for the figures, written again after each.
      name: of their file, without .json.
    """
    out.mkdir(parents=True, exist_ok=True)
    console, config = Console(), VARIANTS[variant]
    config = dataclasses.replace(config, image_size=resolution or config.image_size)
    if jax.default_backend() != "cpu":
        about = dict(variant=variant, config=vars(config), batch=batch, train=train, attention=attention)
        write = lambda rows: device.write(out / f"{name}.json", about | dict(rows=rows))
        rows = on_device(config, batch, rs, train=train, attention=attention, ways=ways, write=write)
        table = Table(
            title=f"ViT-{variant}@{config.image_size}, batch {batch}, {'gradient' if train else 'forward'}, {attention}"
        )
        for column in ("r", "merging", "ms", "images/s", "operations / this", "padded", "time / this", "of the ratio"):
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(
                str(row["r"]), row["merging"], f"{row['seconds'] * 1e3:.2f}", f"{batch / row['seconds']:.0f}",
                f"{row['flop_ratio']:.3f} x", f"{row['padded_ratio']:.3f} x", f"{row['speedup']:.3f} x",
                f"{row['speedup'] / row['flop_ratio']:.1%}",
            )  # fmt: skip
        console.print(table)
        return
    console.print(f"one thread, on core {meter.pin()}")
    rows = measure(config, batch, rs, rounds)
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
    device.write(out / f"{name}.json", dict(variant=variant, batch=batch, rounds=rounds, rows=rows))


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


def on_device(
    config: ViTConfig,
    batch: int,
    rs: tuple[int, ...],
    *,
    train: bool,
    attention: Flash,
    ways: tuple[Way, ...],
    write: Callable[[list[dict]], None],
) -> list[dict]:
    """A row for each r and each way to lose tokens: our kernels, XLA alone, a slice. Ratios are to the first."""

    def split(attention: Flash) -> Any:
        return nnx.split(nnx.eval_shape(lambda: ViT(config, dtype=jnp.bfloat16, attention=attention, rngs=nnx.Rngs(0))))

    weights, tree = jax.tree.flatten_with_path(split(attention)[1])
    weights = [jax.ShapeDtypeStruct(w.shape, w.dtype if train else held(path)) for path, w in weights]
    images = jax.ShapeDtypeStruct((batch, config.image_size, config.image_size, config.channels), jnp.float32)
    here = jax.default_backend()
    programs = {}
    for r in rs:
        for merging in ways if r else ("none",):
            graph, _ = split(WITHOUT.get(attention, attention) if merging == "XLA" else attention)
            whole = (lambda model, images, r=r: cut(model, images, r)) if merging == "cut" else (lambda m, i, r=r: m(i, r=r))
            forward = lambda state, images, whole=whole, graph=graph: whole(nnx.merge(graph, state), images)
            loss = lambda state, images, forward=forward: forward(state, images).var()
            call = jax.grad(loss) if train else forward
            flat = lambda *some, call=call: call(jax.tree.unflatten(tree, some[:-1]), some[-1])
            with dispatch.aim(here) if merging == "XLA" else contextlib.nullcontext():  # a device without a name has no kernels
                # one copy: its own activations fill the caches
                programs[r, merging] = device.Program(flat, [*weights, images], draw=small, copies=1)
    device.compile_all(programs.values())
    rows: list[dict] = []
    for (r, merging), program in programs.items():
        seconds = program.seconds(wall=True)
        rows.append(
            dict(
                r=r,
                merging=merging,
                seconds=seconds,
                speedup=rows[0]["seconds"] / seconds if rows else 1.0,
                flop_ratio=flops(config, batch, rs[0]) / flops(config, batch, r),
                padded_ratio=flops(config, batch, rs[0], 8) / flops(config, batch, r, 8),
            )
        )
        write(rows)
    return rows


def cut(model: ViT, images: jax.Array, r: int) -> jax.Array:
    """The model's pass with the last r tokens of every block dropped where it would merge."""
    x = model.tokens(images)
    layers = jm.tokens.schedule(model.config.depth, r, n=x.shape[1], protected=model.config.num_prefix)
    for block, fewer in zip(model.blocks, layers, strict=True):
        added = block.attn(block.norm1(x), None)[0] + bias_of(block.attn.proj)[None, None]
        x = (x + added)[:, : x.shape[1] - fewer]
        x = x + block.mlp(block.norm2(x))
    return model.classify(x, jm.identity(x.shape[1], like=x))


def held(path: Any) -> Any:
    """The dtype in which a served model holds a parameter: in bfloat16 what blocks read so, matrices and the MLP's biases."""
    name = jax.tree_util.keystr(path)
    return jnp.bfloat16 if ("kernel" in name and "head" not in name) or ("mlp" in name and "bias" in name) else jnp.float32


def small(rng: np.random.Generator, shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Weights and images."""
    return 0.02 * jax.random.normal(jax.random.key(int(rng.integers(1 << 30))), shape.shape, shape.dtype)


def flops(config: ViTConfig, batch: int, r: int, multiple: int = 1) -> float:
    """Of one forward pass: two per multiply-add of every matrix product. A block merges between attention and MLP.

    Tokens are counted in whole multiples.
    """
    d, n = config.width, config.num_tokens
    total = 2 * (n - config.num_prefix) * config.patch_size**2 * config.channels * d + 2 * d * config.num_classes
    padded = lambda n: -(-n // multiple) * multiple
    for r_block in jm.tokens.schedule(config.depth, r, n=n, protected=config.num_prefix):
        total += 8 * padded(n) * d * d + 4 * padded(n) ** 2 * d
        n -= r_block
        total += 4 * padded(n) * d * int(config.mlp_ratio * d)
    return float(batch * total)


if __name__ == "__main__":
    with refusals():
        tyro.cli(main, prog=f"python -m {__spec__.name}", description=__doc__)
