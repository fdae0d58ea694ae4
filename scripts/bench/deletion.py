"""What hard deletion saves against what its FLOPs promise: ByT5 and MrT5 of one shape, one thread, one process, in turn.

    python -m scripts.bench.deletion

The encoder is deep and the decoder shallow, as ByT5's are; MrT5 packs to a share of the bytes after block 3. Timed are the
forward pass and a train step (loss, gradient, AdamW). FLOPs are those of the matrix products (`scripts.bytes_flops`); the
promise is ByT5's time times MrT5's FLOPs over ByT5's.

Writes deletion.json.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from rich.console import Console
from rich.table import Table

from models import mrt5, t5
from models.mrt5 import MrT5, MrT5Config
from models.t5 import T5, T5Config
from scripts.bench import meter
from scripts.bytes_flops import operations

SHAPE = T5Config(d_model=512, d_kv=64, d_ff=1024, num_heads=6, num_layers=12, num_decoder_layers=4, softmax1=True, dropout=0.0)


def main(
    *,
    out: pathlib.Path = pathlib.Path("runs/bench"),
    shape: T5Config = SHAPE,
    gate_layer: int = 3,
    inputs: int = 1024,
    targets: int = 189,
    batch: int = 1,
    keep: tuple[float, ...] = (1.0, 0.5),
    rounds: int = 5,
) -> None:
    """Time them, print a table, write the figures.

    Args:
      keep: shares of the bytes that MrT5 has room for after its gate.
    """
    console = Console()
    console.print(f"one thread, on core {meter.pin()}")
    rng = np.random.default_rng(0)
    ids, labels = (jnp.asarray(rng.integers(3, 259, (batch, n)), jnp.int32) for n in (inputs, targets))
    calls, flops = {}, {}
    for name, model, capacity in contestants(shape, gate_layer, inputs, keep):
        forward, step, params = programs(model, capacity)
        flops[name] = dict(
            forward=operations(forward, params, ids, labels), step=operations(jax.grad(forward), params, ids, labels)
        )  # fmt: skip
        run, memory = jax.jit(forward), [(params, optimiser.init(params))]
        once = jax.jit(step, donate_argnums=0)
        calls[f"{name}/forward"] = lambda run=run, memory=memory: run(memory[0][0], ids, labels).block_until_ready()
        calls[f"{name}/step"] = lambda once=once, memory=memory: memory.append(
            jax.block_until_ready(once(memory.pop(), ids, labels))
        )
    taken = meter.summary(meter.interleave(calls, rounds, warm=1))
    report = [row for name in flops for row in against(name, flops, taken)]
    console.print(table(report))
    out.mkdir(parents=True, exist_ok=True)
    (out / "deletion.json").write_text(json.dumps(report, indent=1) + "\n")


optimiser = optax.adamw(1e-4)


def contestants(shape: T5Config, gate_layer: int, inputs: int, keep: tuple[float, ...]):
    """ByT5, then MrT5 by how much it has room for."""
    yield "ByT5", T5(shape, rngs=nnx.Rngs(0)), None
    for share in keep:
        name = f"MrT5, {1 - share:.0%} deleted"
        yield name, MrT5(MrT5Config(shape, gate_layer), rngs=nnx.Rngs(0)), round(share * inputs)


def programs(model: T5 | MrT5, capacity: int | None):
    """The loss, a train step, and the parameters of both."""
    graph, params = nnx.split(model)

    def forward(params, ids, labels):
        model = nnx.merge(graph, params)
        if isinstance(model, MrT5):
            return mrt5.loss(model, ids, labels, 0.0, capacity=capacity)[0]
        encoded = model.encode(ids)
        return t5.cross_entropy(model.decode(t5.shift_right(labels), encoded.states, encoded.key_bias).logits, labels)

    def step(state, ids, labels):
        params, memory = state
        updates, memory = optimiser.update(jax.grad(forward)(params, ids, labels), memory, params)
        return optax.apply_updates(params, updates), memory

    return forward, step, params


def against(name: str, flops: dict[str, dict[str, int]], taken: dict[str, dict[str, float]]):
    """A row for each program: FLOPs and time as shares of ByT5's, and the time over what the FLOPs promise."""
    for what in ("forward", "step"):
        work = flops[name][what] / flops["ByT5"][what]
        time = taken[f"{name}/{what}"]["cpu_median"] / taken[f"ByT5/{what}"]["cpu_median"]
        yield dict(
            name=name, program=what, gflop=flops[name][what] / 1e9, **taken[f"{name}/{what}"], flops_share=work,
            time_share=time, of_promise=time / work,
        )  # fmt: skip


def table(report: list[dict]) -> Table:
    out = Table(title="Processor time of hard deletion, and what FLOPs promise")
    out.add_column("", no_wrap=True)
    for column in ("program", "GFLOP", "ms, median", "min", "FLOPs of ByT5's", "time of ByT5's", "time / promise"):
        out.add_column(column, justify="right")
    for row in report:
        out.add_row(
            row["name"], row["program"], f"{row['gflop']:.1f}", f"{row['cpu_median']:.0f}", f"{row['cpu_min']:.0f}",
            f"{row['flops_share']:.3f}", f"{row['time_share']:.3f}", f"{row['of_promise']:.3f}",
        )  # fmt: skip
    return out


if __name__ == "__main__":
    tyro.cli(main)
