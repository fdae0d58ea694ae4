"""The rows of `scripts.compare_bytes`: which model, what it learns, what it costs.

Two tasks, never in one table. "hidden spans": an encoder reads a window whose spans are hidden, a decoder spells them (ByT5,
MrT5, deletion at random). "next byte": a decoder reads a window and predicts each byte after the first (plain, HAT, H-Net).
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxmerge import words
from models import mrt5, t5
from models.mrt5 import MrT5, MrT5Config
from models.t5 import T5, T5Config
from scripts import bytes_data

Task = Literal["hidden spans", "next byte"]
Params = dict[str, Any]
Batch = tuple[Array, ...]


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One row.

    Attributes:
      start: the row whose parameters it continues; None: it begins afresh.
      deletion: the share of bytes that is to be deleted.
      at_random: deletion looks at nothing: the control.
      share: its part of the byte budget.
    """

    name: str
    task: Task
    config: Any
    start: str | None = None
    deletion: float | None = None
    at_random: bool = False
    share: float = 1.0

    def make(self, rngs: nnx.Rngs) -> nnx.Module:
        return BUILD[type(self.config)](self.config, rngs=rngs)

    def init(self, seed: int, start: Params | None) -> Params:
        """Fresh parameters, those of `start` in their place."""
        params = nnx.to_pure_dict(nnx.state(self.make(nnx.Rngs(seed)), nnx.Param))
        if isinstance(self.config, MrT5Config):
            return params if start is None else {**params, "t5": start}
        if isinstance(self.config, T5Config) and start is None:
            near_bytes_first(params)
        return params if start is None else start

    def model(self, params: Params) -> Any:
        """A module that holds these parameters; cheap enough to call inside jit."""
        graph, state = nnx.split(nnx.eval_shape(lambda: self.make(nnx.Rngs(0))))
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)

    def batch(self, windows: np.ndarray, rng: np.random.Generator, *, noise: float, span: float) -> Batch:
        """What the model reads, from (b, length) bytes."""
        if self.task == "hidden spans":
            return tuple(map(jnp.asarray, bytes_data.hide_spans(windows, rng, noise=noise, span=span)))
        return (jnp.asarray(windows.astype(np.int32)),)

    def loss(
        self, params: Params, batch: Batch, key: Array, alpha: Array | float = 0.0, capacity: int | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """What training lowers, and `ce` (nats) and `rate` (deleted, or spared by the words) of the batch."""
        model = self.gated(self.model(params), key)
        if isinstance(model, MrT5):
            return mrt5.loss(model, *batch, 0.0 if self.at_random else alpha, capacity=capacity)
        ids, labels = batch
        encoded = model.encode(ids)
        ce = t5.cross_entropy(model.decode(t5.shift_right(labels), encoded.states, encoded.key_bias).logits, labels)
        return ce, {"ce": ce, "rate": jnp.zeros(())}

    def score(self, params: Params, batch: Batch, key: Array, capacity: int | None = None) -> dict[str, Array]:
        """Per window: nats in all, positions that were kept, and those that found no room."""
        model = self.gated(self.model(params), key)
        ids, labels = batch
        if isinstance(model, MrT5):
            encoded = model.encode(ids, capacity=capacity)
            logits = model.decode(t5.shift_right(labels), encoded).logits
            kept = words.kept(encoded.gate, mask=encoded.mask, threshold=self.config.threshold).sum(-1)
            overflow = jnp.zeros_like(kept) if encoded.plan is None else encoded.plan.overflow
        else:
            encoded = model.encode(ids)
            logits = model.decode(t5.shift_right(labels), encoded.states, encoded.key_bias).logits
            kept, overflow = jnp.full(len(ids), ids.shape[1]), jnp.zeros(len(ids), int)
        return {"nats": nats(logits, labels).sum(-1), "kept": kept, "overflow": overflow}

    def gated(self, model: Any, key: Array) -> Any:
        """The model, its gate replaced by chance where this is the control."""
        if self.at_random:
            assert self.deletion is not None
            model.gate = lambda x: jnp.where(jax.random.bernoulli(key, self.deletion, x.shape[:-1]), -SURE, SURE)
        return model


SURE = 30.0
"""A gate's logit at which it is open, or shut, to float32."""
BUILD: dict[type, Any] = {T5Config: T5, MrT5Config: MrT5}


def nats(logits: Array, labels: Array) -> Array:
    """-log p(label)."""
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]


def near_bytes_first(params: Params) -> None:
    """A head start for minutes of training: near bytes weigh more, each head has a slope of its own."""
    for stack, sides in (("encoder", 2), ("decoder", 1)):
        buckets, heads = params[stack]["position"].shape
        slope = 3.0 * 0.5 ** np.arange(heads)
        bias = -np.log1p(np.arange(buckets) % (buckets // sides))[:, None] * slope
        params[stack]["position"] = params[stack]["position"] + jnp.asarray(bias, jnp.float32)


def spans(base: T5Config, gate_layer: int, share: float, rates: tuple[float, ...]) -> list[Contestant]:
    """ByT5 from scratch; then from it, for so much of the budget: ByT5 itself, MrT5 and random deletion at every rate."""
    gated = MrT5Config(base, gate_layer)
    start = Contestant("start", "hidden spans", base, share=1 - share)
    more = dict(task="hidden spans", start="start", share=share)
    rows = [start, Contestant("ByT5", config=base, **more)]
    for rate in rates:
        rows.append(Contestant(f"MrT5 {rate:.0%}", config=gated, deletion=rate, **more))
        rows.append(Contestant(f"random {rate:.0%}", config=gated, deletion=rate, at_random=True, **more))
    return rows
