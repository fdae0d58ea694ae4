"""Training and scoring of one row of `scripts.compare_bytes`."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxmerge import words
from scripts import bytes_data
from scripts.bytes_data import Domain
from scripts.bytes_models import Contestant, Params


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is the same for all rows of a suite.

    Attributes:
      noise, span: the share of bytes that is hidden from encoder-decoders, and the mean length of a hidden span.
      k_p, k_i, lowest: the controller's gains and alpha's floor.
      points: how often held-out bits per byte are taken on the way, on `peek` windows of each domain.
      windows: of each domain, held out, at most.
    """

    length: int
    batch: int
    budget: int
    rate: float
    noise: float
    span: float
    k_p: float
    k_i: float
    lowest: float
    windows: int
    points: int = 6
    peek: int = 32
    seed: int = 0

    def steps(self, row: Contestant) -> int:
        """Of a row that begins afresh, or that continues another."""
        return max(round(self.budget * row.share / (self.batch * self.length)), 1)

    @property
    def hidden(self) -> int:
        """Bytes of a window that are hidden."""
        return words.span_counts(self.length, density=self.noise, mean=self.span)[0]

    def scored(self, row: Contestant) -> int:
        """Bytes of a window that bits are counted on."""
        return self.hidden if row.task == "hidden spans" else self.length - 1


class TrainState(NamedTuple):
    params: Params
    optimiser: Any
    controller: words.ControllerState


class Trainer:
    """Windows by step, AdamW, and for MrT5 the controller: the same for all rows."""

    def __init__(self, row: Contestant, recipe: Recipe, domains: list[Domain]):
        self.row, self.recipe, self.domains, self.steps = row, recipe, domains, recipe.steps(row)
        self.tx = optimiser(
            recipe.rate, self.steps, begins=row.start is None, decays=row.share == 1 or row.start is not None,
            queries=row.queries,
        )  # fmt: skip
        self.controller = words.pi_controller(target=row.deletion or 0.0, k_p=recipe.k_p, k_i=recipe.k_i, lowest=recipe.lowest)
        self.capacity = row.room([self.batch(i) for i in range(50)])
        self.step = jax.jit(self._step, donate_argnums=0)

    def _step(self, s: TrainState, batch: tuple[Array, ...], key: Array) -> tuple[TrainState, dict[str, Array]]:
        loss = lambda params: self.row.loss(params, batch, key, s.controller.alpha, self.capacity)
        (total, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(s.params)
        updates, state = self.tx.update(gradient, s.optimiser, s.params)
        controller = self.controller.update(s.controller, metrics["rate"])
        metrics |= {"loss": total, "alpha": s.controller.alpha}
        return TrainState(optax.apply_updates(s.params, updates), state, controller), metrics  # pyright: ignore

    def batch(self, step: int) -> tuple[Array, ...]:
        """The batch of a step: a function of the recipe and the step alone, the same for all rows of a task."""
        r = self.recipe
        at = step if self.row.start is None else step + 1_000_000
        windows = bytes_data.draw(self.domains, at, batch=r.batch, length=r.length, seed=r.seed)
        return self.row.batch(windows, np.random.default_rng((r.seed, at, 1)), noise=r.noise, span=r.span)

    def begin(self, params: Params) -> TrainState:
        return TrainState(params, self.tx.init(params), self.controller.init())

    def __call__(
        self, params: Params, scorer: "Scorer", tick: Callable[[str], Any], tell: Callable[[str], Any]
    ) -> tuple[Params, list[dict[str, float]], list[dict[str, float]]]:
        """The trained parameters; the curve of held-out bits; the log of training, averages between points."""
        r = self.recipe
        s = self.begin(jax.tree.map(jnp.array, params))  # a step consumes its state
        curve, log, seen = [], [], []
        at = {round(self.steps * (i + 1) / r.points) for i in range(r.points)}
        for i in range(self.steps):
            s, metrics = self.step(s, self.batch(i), jax.random.fold_in(jax.random.key(r.seed), i))
            seen.append(metrics)
            if i + 1 in at or len(seen) == 50:
                means = {k: float(np.mean([float(m[k]) for m in seen])) for k in metrics}
                if not np.isfinite(means["loss"]):
                    raise FloatingPointError(
                        f"{self.row.name}: the loss is {means['loss']} at step {i}; lower --rate {r.rate}."
                    )
                log.append({"step": i + 1, **means})
                seen = []
            if i + 1 in at:
                bits = scorer(s.params, r.peek).bits
                curve.append({"bytes": (i + 1) * r.batch * r.length, "bits": float(np.mean([b.mean() for b in bits.values()]))})
                tell(f"{self.row.name}: {curve[-1]['bits']:.3f} bits per byte after {curve[-1]['bytes']:,} bytes")
            if log:
                last = log[-1]
                tick(f"{last['ce'] / np.log(2):.2f} bits, rate {last['rate']:.0%}, alpha {last['alpha']:.4f}")
        return s.params, curve, log


def optimiser(rate: float, steps: int, *, begins: bool, decays: bool, queries: float = 1.0) -> optax.GradientTransformation:
    """AdamW with warm-up, constant where another row goes on from here, linear to 0 at the end of every other.

    T5's queries begin smaller than its keys by sqrt(d_kv), in place of attention's 1/sqrt(d); so do their steps here, or
    cross-attention is never learned. The position bias, a few large numbers, moves ten times as fast; the gate at a fifth, so
    that the controller can follow it.
    """
    warmup = min(50, steps // 5 + 1) if begins else min(10, steps // 5 + 1)
    schedule = optax.join_schedules(
        [optax.linear_schedule(0.0, rate, warmup), optax.linear_schedule(rate, 0.0 if decays else rate, steps - warmup + 1)],
        [warmup],
    )

    def scale(updates, _):
        def factor(path):
            names = [k.key for k in path]
            if names[-1] == "position":
                return 10.0
            if names[0] == "gate":
                return 0.2
            return queries if names[-2:] == ["q", "kernel"] else 1.0

        return jax.tree_util.tree_map_with_path(lambda path, u: factor(path) * u, updates)

    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01), optax.stateless(scale)
    )


class Scores(NamedTuple):
    """By domain and window."""

    bits: dict[str, np.ndarray]
    """Per byte that is scored."""
    kept: dict[str, np.ndarray]
    """Of the positions that the encoder reads, or that a backbone is spared."""
    overflow: int


class Scorer:
    """Held-out windows, and the programs that read them: one for soft deletion and one for each capacity."""

    def __init__(self, row: Contestant, recipe: Recipe, domains: list[Domain], rows: int = 32):
        self.row, self.recipe, self.rows = row, recipe, rows
        self.batches = {}
        for k, d in enumerate(domains):
            windows = bytes_data.tile(d.heldout, recipe.length, recipe.windows)
            order = np.random.default_rng((recipe.seed, k, 2)).permutation(len(windows))
            rng = np.random.default_rng((recipe.seed, k, 3))
            self.batches[d.name] = len(windows), self._split(windows[order], rng)
        self.step = jax.jit(row.score, static_argnames="capacity")

    @property
    def first(self) -> tuple[Array, ...]:
        """A batch."""
        return next(iter(self.batches.values()))[1][0]

    @property
    def reads(self) -> int:
        """Positions that the model reads of a window."""
        return self.first[0].shape[1]

    def _split(self, windows: np.ndarray, rng: np.random.Generator) -> list[tuple[Array, ...]]:
        """Batches of equal shape; the last one is filled up with windows that are not counted."""
        full = np.concatenate([windows, windows[: -len(windows) % self.rows]])
        full = np.resize(full, (-(-len(full) // self.rows) * self.rows, full.shape[1]))
        parts = np.split(full, len(full) // self.rows)
        return [self.row.batch(p, rng, noise=self.recipe.noise, span=self.recipe.span) for p in parts]

    def __call__(self, params: Params, at_most: int | None = None, capacity: int | None = None) -> Scores:
        bits, kept, overflow = {}, {}, 0
        for name, (count, batches) in self.batches.items():
            count = count if at_most is None else min(count, at_most)
            found = []
            for i, batch in enumerate(batches[: -(-count // self.rows)]):
                found.append(jax.device_get(self.step(params, batch, jax.random.key(i), capacity=capacity)))
            all_ = {k: np.concatenate([f[k] for f in found])[:count] for k in found[0]}
            bits[name] = all_["nats"] / np.log(2) / self.recipe.scored(self.row)
            kept[name] = all_["kept"]
            overflow += int(all_["overflow"].sum())
        return Scores(bits, kept, overflow)
