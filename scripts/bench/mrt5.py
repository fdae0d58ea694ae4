"""MrT5 and ByT5 against the official MrT5 and Hugging Face's ByT5 in torch: the same weights and bytes, in turn, in one run.

    git clone https://github.com/jkallini/mrt5 ../mrt5         # a Python with torch and transformers 4.39.1 beside ours
    python -m scripts.bench.mrt5 --mrt5 ../mrt5 --python ../torch-env/bin/python --out runs/bench
    python -m scripts.bench.mrt5 --step --mrt5 ...             the full training step: gradients, clipping, AdamW

The gate is set so that it deletes the given part of these bytes. Both sides then pack to the longest row. Before anything is
timed, the losses of both sides must agree. Beside the ratio to torch stands what deletion saves here, against what the
products' floating-point operations promise: (hard / soft) measured over (hard / soft) counted.

Without --python our side is timed alone. Writes mrt5_forward.json or mrt5_step.json.
"""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from rich.console import Console
from rich.table import Table

from jaxmerge import words
from models import load, mrt5, published, t5
from scripts.refusals import refusals

NAMES = ("byt5", "soft", "hard")


def main(
    *,
    mrt5: pathlib.Path | None = None,
    python: pathlib.Path | None = None,
    out: pathlib.Path = pathlib.Path("runs/bench"),
    size: str = "small",
    batch: int = 1,
    inputs: int = 1024,
    targets: int = 189,
    deleted: float = 0.5,
    step: bool = False,
    rounds: int = 3,
    threads: int = 2,
) -> None:
    """Time them, print the table, write the figures.

    Args:
      mrt5: a checkout of jkallini/mrt5.
      python: an interpreter with torch and transformers 4.39.1.
      out: directory for the figures.
      size: of ByT5.
      batch, inputs, targets: rows, bytes that the encoder reads, bytes that the decoder predicts.
      deleted: which part of the bytes the gate deletes.
      step: the whole training step instead of the forward pass.
      rounds: how often everyone has a turn.
      threads: of torch; JAX takes the cores that the process may use.
    """
    if (mrt5 is None) != (python is None):
        raise ValueError("bench.mrt5: give --mrt5 and --python together, or neither.")
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    base = dataclasses.replace(t5.VARIANTS[size], dropout=0.0)
    config, model, ids, labels, capacity = prepare(base, batch, inputs, targets, deleted)
    with tempfile.TemporaryDirectory() as folder:
        peer = None
        if mrt5 and python:
            where: Any = dict(folder=pathlib.Path(folder), checkout=mrt5, python=python, threads=threads)
            peer = start_peer(config=config, model=model, ids=ids, labels=labels, **where)
        ours = programs(config, model, ids, labels, capacity, step=step)
        del model
        rows = measure(ours, peer, rounds, step=step)
    title = f"byt5-{size}, {batch} x {inputs} bytes, {targets} targets, {capacity} slots: {'step' if step else 'forward'}"
    promise = operations(config, batch, capacity, inputs, targets) / operations(config, batch, inputs, inputs, targets)
    for clock in ("cpu", "wall"):
        report(console, rows, clock, f"{title}, {clock} seconds", promise)
    figures = {"config": dataclasses.asdict(config), "capacity": capacity, "promise": promise, "rounds": rows, "title": title}
    (out / f"mrt5_{'step' if step else 'forward'}.json").write_text(json.dumps(figures, indent=1) + "\n")


def report(console: Console, rows: dict[str, dict[str, list]], clock: str, title: str, promise: float) -> None:
    """Medians of one clock, the ratio of both sides, and what deletion saves against what it promises."""
    med = {who: {n: float(np.median([t[clock] for t in ts])) for n, ts in r.items()} for who, r in rows.items()}
    table = Table(title=title)
    for column in ("", *rows, *(["torch / jaxmerge"] if len(rows) > 1 else [])):
        table.add_column(column, justify="right")
    for name, shown in zip(NAMES, ("ByT5", "MrT5, soft", "MrT5, hard"), strict=True):
        ratio = [f"{med['torch'][name] / med['jaxmerge'][name]:.2f}"] if len(rows) > 1 else []
        table.add_row(shown, *(f"{m[name]:.2f}" for m in med.values()), *ratio)
    console.print(table)
    for who, m in med.items():
        share = m["hard"] / m["soft"]
        console.print(f"{who}: hard takes {share:.3f} of soft; operations promise {promise:.3f}; {share / promise - 1:+.1%}")


def prepare(
    base: t5.T5Config, batch: int, inputs: int, targets: int, deleted: float
) -> tuple[Any, Any, np.ndarray, np.ndarray, int]:
    """A random model whose gate deletes that part of random bytes, the bytes, and the slots that the longest row takes."""
    config = mrt5.MrT5Config(dataclasses.replace(base, softmax1=True))
    model = jax.jit(lambda: nnx.state(mrt5.MrT5(config, rngs=nnx.Rngs(0))))()
    model = nnx.merge(nnx.split(published.blank(mrt5.MrT5, config))[0], model)
    rng = np.random.default_rng(0)
    ids, labels = (rng.integers(3, 259, (batch, n)).astype(np.int32) for n in (inputs, targets))
    graph, params = nnx.split(model)
    z = jax.jit(lambda p, ids: nnx.merge(graph, p).encode(ids).gate_logits)(params, ids)
    model.gate.out.bias[...] = model.gate.out.bias[...] - jnp.quantile(z, deleted)
    kept = (np.asarray(z) > np.quantile(z, deleted)).sum(-1)
    return config, model, ids, labels, words.capacity_for(kept, multiple_of=8, at_most=inputs)


def operations(config: mrt5.MrT5Config, batch: int, slots: int, inputs: int, targets: int) -> float:
    """Floating-point operations of the products of one forward pass, with that many slots above the gate."""
    c = config.base
    inner = c.num_heads * c.d_kv
    width = lambda n: 2 * n * (4 * c.d_model * inner + 3 * c.d_model * c.d_ff)
    pairs = lambda n, m: 4 * n * m * inner
    block = lambda n: width(n) + pairs(n, n)
    encoder = config.gate_layer * block(inputs) + (c.num_layers - config.gate_layer) * block(slots)
    cross = 2 * targets * 2 * c.d_model * inner + 2 * slots * 2 * c.d_model * inner + pairs(targets, slots)
    decoder = c.num_decoder_layers * (block(targets) + cross) + 2 * targets * c.d_model * c.vocab_size
    return float(batch * (encoder + decoder))


def programs(
    config: Any, model: Any, ids: np.ndarray, labels: np.ndarray, capacity: int, *, step: bool
) -> dict[str, Callable[[], float]]:
    """Our side: calls that return the cross-entropy. A step changes the parameters, which all calls share."""
    graph, params = nnx.split(model)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4, weight_decay=0.01))
    state = [params, tx.init(params) if step else None]
    x, y = jnp.asarray(ids), jnp.asarray(labels)

    def loss(p, name, x, y):
        m = nnx.merge(graph, p)
        if name == "byt5":
            b = byt5(config, m)
            encoded = b.encode(x)
            ce = t5.cross_entropy(b.decode(t5.shift_right(y), encoded.states, encoded.key_bias).logits, y)
            return ce, ce
        total, metrics = mrt5.loss(m, x, y, 0.01, capacity=capacity if name == "hard" else None)
        return total, metrics["ce"]

    @functools.partial(jax.jit, static_argnums=0)
    def forward(name, p, x, y):
        return loss(p, name, x, y)[1]

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
    def update(name, p, opt, x, y):
        (_, ce), grads = jax.value_and_grad(loss, has_aux=True)(p, name, x, y)
        updates, opt = tx.update(grads, opt, p)
        return optax.apply_updates(p, updates), opt, ce

    def call(name: str) -> float:
        if not step:
            return float(forward(name, state[0], x, y))
        state[0], state[1], ce = jax.block_until_ready(update(name, *state, x, y))
        return float(ce)

    return {name: functools.partial(call, name) for name in NAMES}


def byt5(config: mrt5.MrT5Config, model: mrt5.MrT5) -> t5.T5:
    """The ByT5 in an MrT5: with the plain softmax."""
    for stack in (model.t5.encoder, model.t5.decoder):
        for block in stack.blocks:
            block.attention.softmax1 = False
            if stack.decoder:
                block.cross.softmax1 = False
    return model.t5


def start_peer(
    *,
    folder: pathlib.Path,
    config: Any,
    model: Any,
    ids: Any,
    labels: Any,
    checkout: pathlib.Path,
    python: pathlib.Path,
    threads: int,
) -> subprocess.Popen:
    """The other side's process, with the same weights."""
    name = functools.partial(mrt5.torch_name, gate_layer=config.gate_layer)
    weights: Any = load.export(model, name)
    np.savez(folder / "weights.npz", **weights)
    np.savez(folder / "inputs.npz", ids=ids, labels=labels)
    (folder / "config.json").write_text(json.dumps(published.config_to_json(config)))
    script = pathlib.Path(__file__).with_name("mrt5_torch.py")
    command = [str(python.absolute()), str(script), str(folder), str(checkout.absolute()), str(threads)]
    theirs = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # they have a `models` too
    peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=theirs, cwd=folder)
    assert peer.stdout is not None
    if peer.stdout.readline().strip() != "ready":
        raise RuntimeError(f"bench.mrt5: {' '.join(command)} did not start; its message is above.")
    return peer


def measure(ours: dict, peer: subprocess.Popen | None, rounds: int, *, step: bool) -> dict[str, dict[str, list]]:
    """Everyone in turn; one turn before that to compile, whose losses must agree."""

    def mine(name: str) -> dict[str, float]:
        wall, processor = time.perf_counter(), time.process_time()
        ce = ours[name]()
        return {"cpu": time.process_time() - processor, "wall": time.perf_counter() - wall, "ce": ce}

    def theirs(name: str) -> dict[str, float]:
        assert peer is not None and peer.stdin is not None and peer.stdout is not None
        peer.stdin.write(f"{name}{'+step' if step else ''}\n")
        peer.stdin.flush()
        return json.loads(peer.stdout.readline())

    sides = {"jaxmerge": mine, **({"torch": theirs} if peer else {})}
    rows: dict[str, dict[str, list]] = {who: {name: [] for name in NAMES} for who in sides}
    for i in range(rounds + 1):
        for name in NAMES:
            found = {who: run(name) for who, run in sides.items()}
            if i == 0 and name in ("byt5", "soft") and peer and abs(found["jaxmerge"]["ce"] - found["torch"]["ce"]) > 2e-3:
                raise ValueError(f"bench.mrt5: the losses of {name} differ: {found}.")
            if i:
                for who, t in found.items():
                    rows[who][name].append(t)
    if peer is not None:
        peer.terminate()
    return rows


if __name__ == "__main__":
    with refusals():
        tyro.cli(main, prog=f"python -m {__spec__.name}", description=__doc__)
