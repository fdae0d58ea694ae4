"""The rows of `scripts.compare_bytes`: which model, what it learns, what it costs.

Two tasks, never in one table. "hidden spans": an encoder reads a window whose spans are hidden, a decoder spells them (ByT5,
MrT5, deletion at random). "next byte": a decoder reads a window and predicts each byte after the first (plain, HAT, H-Net).
"""

import dataclasses
import json
import pathlib
import typing
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxmerge import words
from models import decoder, hat, hnet, mrt5, t5
from models.decoder import ByteDecoder, DecoderConfig
from models.hat import HAT, HATConfig
from models.hnet import HNet, HNetConfig
from models.mrt5 import MrT5, MrT5Config
from models.t5 import T5, T5Config
from scripts import bytes_data, state

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

    @property
    def packs(self) -> bool:
        """Whether what it keeps is packed into a number of slots that is chosen beforehand."""
        return isinstance(self.config, MrT5Config | HATConfig | HNetConfig)

    @property
    def queries(self) -> float:
        """How large the initial weights of queries are beside those of keys."""
        match self.config:
            case MrT5Config():
                return self.config.base.d_kv**-0.5
            case T5Config():
                return self.config.d_kv**-0.5
        return 1.0

    def make(self) -> nnx.Module:
        return build(self.config, nnx.Rngs(0))

    def init(self, seed: int, start: Params | None) -> Params:
        """Fresh parameters, those of `start` in their place."""
        params = state.to_tree(build(self.config, nnx.Rngs(seed)))
        if isinstance(self.config, MrT5Config):
            return params if start is None else {**params, "t5": start}
        if isinstance(self.config, T5Config) and start is None:
            head_start(params)
        return params if start is None else start

    def model(self, params: Params) -> Any:
        """A module that holds these parameters; cheap enough to call inside jit."""
        return state.filled(nnx.eval_shape(self.make), params)

    def batch(self, windows: np.ndarray, rng: np.random.Generator, *, noise: float, span: float) -> Batch:
        """What the model reads, from (b, length) bytes."""
        if self.task == "hidden spans":
            hidden = bytes_data.hide(windows, rng, noise=noise, span=span)
            return jnp.asarray(hidden.inputs), jnp.asarray(hidden.targets)
        if isinstance(self.config, HATConfig):
            return jnp.asarray(windows.astype(np.int32)), jnp.asarray(word_starts(windows, self.config.max_word))
        return (jnp.asarray(windows.astype(np.int32)),)

    def room(self, batches: list[Batch]) -> int | None:
        """Slots for words in training, where deletion, which is soft there, needs none.

        HAT's are counted; H-Net's, which it is free to choose, may be half of the bytes: what finds no room early on hears of
        no chunk.
        """
        match self.config:
            case HATConfig():
                return words.capacity_for([int(starts.sum(axis=1).max()) for _, starts in batches], multiple_of=8)
            case HNetConfig():
                return batches[0][0].shape[1] // 2
        return None

    def loss(
        self, params: Params, batch: Batch, key: Array, alpha: Array | float = 0.0, capacity: int | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """What training lowers, and `ce` (nats) and `rate` (deleted, or spared by the words) of the batch."""
        model = self.gated(self.model(params), key)
        match model:
            case MrT5():
                return mrt5.loss(model, *batch[:2], alpha=0.0 if self.at_random else alpha, capacity=capacity)
            case T5():
                ids, labels = batch
                encoded = model.encode(ids)
                logits = model.decode(t5.shift_right(labels), encoded.states, encoded.key_bias).logits
                ce = t5.cross_entropy(logits, labels)
                return ce, {"ce": ce, "rate": jnp.zeros(())}
            case HAT():
                return hat.loss(model, *batch, capacity=capacity)
            case HNet():
                return hnet.loss(model, *batch, capacities=(capacity,))
            case ByteDecoder():
                total, metrics = decoder.loss(model, *batch)
                return total, {**metrics, "rate": jnp.zeros(())}
        raise TypeError(f"Contestant: no loss is known for {type(model).__name__}.")

    def score(self, params: Params, batch: Batch, key: Array, capacity: int | None = None) -> dict[str, Array]:
        """Per window: nats in all, positions that were kept, and bytes that found no room."""
        model, ids = self.gated(self.model(params), key), batch[0]
        full, none = jnp.full(len(ids), ids.shape[1]), jnp.zeros(len(ids), int)
        match model:
            case MrT5():
                encoded = model.encode(ids, capacity=capacity)
                logits = model.decode(t5.shift_right(batch[1]), encoded).logits
                kept = words.kept(encoded.gate, mask=encoded.mask, threshold=self.config.threshold).sum(-1)
                overflow = none if encoded.plan is None else encoded.plan.overflow
                return {"nats": nats(logits, batch[1]).sum(-1), "kept": kept, "overflow": overflow}
            case T5():
                encoded = model.encode(ids)
                logits = model.decode(t5.shift_right(batch[1]), encoded.states, encoded.key_bias).logits
                return {"nats": nats(logits, batch[1]).sum(-1), "kept": full, "overflow": none}
            case HAT():
                docs = jnp.zeros_like(ids)
                read = hat.read_words(batch[1], docs, capacity=capacity, max_word=self.config.max_word)
                cost, scored, _ = model.nats(ids, docs, read)
                of_first = jnp.arange(cost.shape[1])[None] == 0  # the first byte: no other model is asked for it
                cost = jnp.where(scored & ~of_first, cost, 0).sum(-1)
                return {"nats": cost, "kept": (read.plan.sizes > 0).sum(-1), "overflow": read.plan.overflow}
            case HNet():
                logits, (routed,) = model(ids, capacities=(capacity,))
                cost = nats(logits[:, :-1], ids[:, 1:]).sum(-1)
                return {"nats": cost, "kept": (routed.plan.sizes > 0).sum(-1), "overflow": routed.plan.overflow}
            case ByteDecoder():
                cost = nats(model(ids)[:, :-1], ids[:, 1:]).sum(-1)
                return {"nats": cost, "kept": full, "overflow": none}
        raise TypeError(f"Contestant: no score is known for {type(model).__name__}.")

    def gated(self, model: Any, key: Array) -> Any:
        """The model, its gate replaced by chance where this is the control."""
        if self.at_random:
            model.gate = lambda x: jnp.where(jax.random.bernoulli(key, self.deletion or 0.0, x.shape[:-1]), -SURE, SURE)
        return model


SURE = 30.0
"""A gate's logit at which it is open, or shut, to float32."""
BUILD = {T5Config: T5, MrT5Config: MrT5, DecoderConfig: ByteDecoder, HATConfig: HAT, HNetConfig: HNet}


def build(config: Any, rngs: nnx.Rngs) -> Any:
    """The model that a config describes."""
    family: Any = BUILD[type(config)]
    return family(config, rngs=rngs)


def word_starts(windows: np.ndarray, max_bytes: int) -> np.ndarray:
    """Where words begin in each window, whitespace ending them, as in HAT's paper."""
    return np.stack([words.starts(w.tobytes(), rule="whitespace", max_bytes=max_bytes) for w in windows])


def nats(logits: Array, labels: Array) -> Array:
    """-log p(label)."""
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]


def head_start(params: Params) -> None:
    """What minutes of training would not find by themselves, for T5's parameters, in place.

    Heads look at near bytes, the encoder's to one side each; what a block adds is small beside what is there; queries and keys
    of cross-attention begin equal, so that a sentinel finds itself in what the encoder read.
    """
    for name, sides in (("encoder", 2), ("decoder", 1)):
        stack = params[name]
        buckets, heads = stack["position"].shape
        far = np.arange(buckets // sides)
        slope = 3.0 * 0.25 ** (np.arange(heads) // 2)
        bias = np.where(far[:, None] > 0, -np.log1p(np.maximum(far - 1, 0))[:, None] * slope, -2.0)
        if sides == 2:  # buckets of what comes before, then of what comes after
            left = np.arange(heads) % 2 == 0
            bias = np.concatenate([np.where(left, bias, -6.0), np.where(left, -6.0, bias)])
            bias[0] = -2.0
        stack["position"] = jnp.asarray(bias, jnp.float32)
        for block in stack["blocks"].values():
            for part, leaf, scale in (("attention", "o", 0.35), ("ffn", "wo", 0.35), ("cross", "o", 0.5)):
                if part in block:
                    block[part][leaf]["kernel"] *= scale
            if "cross" in block:
                kernel = block["cross"]["k"]["kernel"]
                block["cross"]["q"]["kernel"] = 2 * kernel * (kernel.shape[1] // heads) ** -0.5


def contestants(rates: tuple[float, ...], share: float, *, decoders: bool) -> list[Contestant]:
    """The rows of a suite."""
    base = T5Config(
        d_model=128, d_kv=32, d_ff=256, num_heads=4, num_layers=4, num_decoder_layers=2, softmax1=True, dropout=0.0
    )  # fmt: skip
    return [*spans(base, 1, share, rates), *(next_byte() if decoders else [])]


def spans(base: T5Config, gate_layer: int, share: float, rates: tuple[float, ...]) -> list[Contestant]:
    """ByT5 from scratch; then from it, for so much of the budget: ByT5 itself, MrT5 and random deletion at every rate."""
    gated = MrT5Config(base, gate_layer)
    more: dict[str, Any] = dict(task="hidden spans", start="start", share=share)
    rows = [Contestant("start", "hidden spans", base, share=1 - share), Contestant("ByT5", config=base, **more)]
    for rate in rates:
        rows.append(Contestant(f"MrT5 {rate:.0%}", config=gated, deletion=rate, **more))
        rows.append(Contestant(f"random {rate:.0%}", config=gated, deletion=rate, at_random=True, **more))
    return rows


def next_byte() -> list[Contestant]:
    """Decoders whose train steps cost the same, within a few per cent: matched by the depth and width of HAT's backbone."""
    plain = DecoderConfig(width=128, depth=4, num_heads=4, d_ff=320)
    letters, backbone = DecoderConfig(96, 1, 4, 192), DecoderConfig(192, 6, 4, 528)
    word = HATConfig(letters, backbone, dataclasses.replace(letters, depth=2), max_word=24)
    chunk = HNetConfig(("T1", ("T4",), "T1"), width=(128, 160), d_ff=(256, 256), num_heads=(4, 4), ratios=(4.0,))
    return [Contestant(name, "next byte", config) for name, config in (("plain", plain), ("HAT", word), ("H-Net", chunk))]


def save_config(path: pathlib.Path, config: Any) -> None:
    """The architecture, beside the parameters. MrT5's own file stays as `scripts.state` writes it."""
    family = {} if isinstance(config, MrT5Config) else {"family": type(config).__name__}
    path.write_text(json.dumps({**family, **dataclasses.asdict(config)}, indent=1) + "\n")


def load_config(path: pathlib.Path) -> Any:
    """The architecture, from the model.json beside a checkpoint."""
    if not path.exists():
        raise ValueError(f"load_config: {path} is missing; training writes it beside its checkpoints.")
    fields = json.loads(path.read_text())
    family = fields.pop("family", "MrT5Config")
    kinds = {kind.__name__: kind for kind in BUILD}
    if family not in kinds:
        raise ValueError(f"load_config: {path} names the family {family!r}; known are {', '.join(kinds)}.")
    return _from_dict(kinds[family], fields)


def _from_dict(kind: type, fields: dict[str, Any]) -> Any:
    """A config whose fields may be configs themselves."""
    hints = typing.get_type_hints(kind)
    inner = lambda name, v: _from_dict(hints[name], v) if dataclasses.is_dataclass(hints[name]) else v
    return kind(**{name: inner(name, v) for name, v in fields.items()})
