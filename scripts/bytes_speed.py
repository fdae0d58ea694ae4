"""What a row of `scripts.compare_bytes` costs: operations, and milliseconds of processor time, in turn with the others."""

import jax
import jax.numpy as jnp
import numpy as np

from scripts.bench import meter
from scripts.bytes_data import Domain
from scripts.bytes_flops import operations, xla_operations
from scripts.bytes_models import Contestant, Params
from scripts.bytes_train import Recipe, Scorer, Trainer


def operations_of(row: Contestant, params: Params, trainer: Trainer, scorer: Scorer, capacity: int | None) -> dict[str, float]:
    """Per window: of the scoring pass (deletion hard) and of the loss and its gradient (soft); matrix products', and XLA's."""
    key, batch, held = jax.random.key(0), trainer.batch(0), scorer.first
    forward = lambda params, batch: row.score(params, batch, key, capacity)["nats"]
    gradient = jax.grad(lambda params, batch: row.loss(params, batch, key, 0.0, trainer.capacity)[0])
    return {
        "forward": operations(forward, params, held) / len(held[0]),
        "xla_forward": xla_operations(forward, params, held) / len(held[0]),
        "step": operations(gradient, params, batch) / len(batch[0]),
        "xla_step": xla_operations(gradient, params, batch) / len(batch[0]),
    }


def times(
    rows: list[Contestant], recipes: dict[str, Recipe], domains: list[Domain], *, params: dict[str, Params],
    widths: dict[str, int], rounds: int,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """By row, medians of processor milliseconds per window: a scoring pass, and a train step with its optimiser."""
    calls, windows = {}, {}
    for row in rows:
        trainer, scorer = Trainer(row, recipes[row.task], domains), Scorer(row, recipes[row.task], domains)
        capacity, key = widths[row.name] if row.packs else None, jax.random.key(0)
        batch, held, memory = trainer.batch(0), scorer.first, [trainer.begin(jax.tree.map(jnp.array, params[row.name]))]

        def forward(row=row, scorer=scorer, held=held, capacity=capacity, key=key):
            jax.block_until_ready(scorer.step(params[row.name], held, key, capacity=capacity))

        def step(trainer=trainer, batch=batch, memory=memory, key=key):
            memory.append(jax.block_until_ready(trainer.step(memory.pop(), batch, key)[0]))

        calls |= {f"{row.name}/forward": forward, f"{row.name}/step": step}
        windows |= {f"{row.name}/forward": len(held[0]), f"{row.name}/step": len(batch[0])}
    out: dict[str, dict[str, float]] = {row.name: {} for row in rows}
    for call, t in meter.interleave(calls, rounds).items():
        name, what = call.split("/")
        out[name][what] = float(np.median(t[:, 0])) * 1e3 / windows[call]
    return out
