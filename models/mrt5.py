"""MrT5: ByT5 whose encoder deletes bytes part of the way up. What differs from `models/t5.py`, and nothing else.

Softly (training), a gate G <= 0 is added to every later attention score of its key. Hard (inference), bytes with a gate at
or below the threshold leave: the rest is packed to a static capacity and keeps its positions, so that the later blocks cost
less. A row may lose all its bytes; it then reads nothing.

Source: MrT5 (arXiv:2410.20771).
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

import jaxmerge as jm
from jaxmerge.attention import key_bias
from models import t5


@dataclasses.dataclass(frozen=True)
class MrT5Config:
    """ByT5, where in its encoder bytes are deleted, and how far a gate reaches down."""

    base: t5.T5Config = dataclasses.field(default_factory=lambda: dataclasses.replace(t5.VARIANTS["small"], softmax1=True))
    gate_layer: int = 3
    gate_scale: float = -30.0

    def __post_init__(self):
        if not 0 <= self.gate_layer < self.base.num_layers:
            raise ValueError(
                f"MrT5Config: gate_layer must name an encoder block, 0 to {self.base.num_layers - 1}; got {self.gate_layer}."
            )

    @property
    def threshold(self) -> float:
        """A byte whose gate is not above this is deleted."""
        return self.gate_scale / 2


class Encoded(NamedTuple):
    """What the encoder hands on: the first two for `MrT5.decode`, the rest for losses, metrics and pictures."""

    states: Float[Array, "b m d"]
    key_bias: Float[Array, "b m"]
    gate: Float[Array, "b n"]
    gate_logits: Float[Array, "b n"]
    mask: Bool[Array, "b n"]
    """True where the input has a byte."""
    plan: jm.Plan | None
    """Which slot each byte went to; None if deletion was soft."""
    hidden: tuple[Array, ...]
    excess: Float[Array, ""]


class DeleteGate(nnx.Module):
    """z = w · RMSNorm(h) + b."""

    def __init__(self, d: int, *, rngs: nnx.Rngs):
        self.norm = t5.RMSNorm(d, dtype=jnp.float32)
        self.out = nnx.Linear(
            d, 1, kernel_init=nnx.initializers.xavier_uniform(), bias_init=nnx.initializers.ones_init(), rngs=rngs
        )

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n"]:
        return self.out(self.norm(x))[..., 0]


class MrT5(nnx.Module):
    """The model. `scan`, `remat` and `block_size` are those of `t5.T5`.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> from flax import nnx
      >>> from models.mrt5 import MrT5, MrT5Config
      >>> from models.t5 import T5Config
      >>> tiny = T5Config(d_model=16, d_kv=4, d_ff=32, num_heads=2, num_layers=2, num_decoder_layers=1, softmax1=True)
      >>> model = MrT5(MrT5Config(tiny, gate_layer=1), rngs=nnx.Rngs(0))
      >>> ids = jnp.asarray(jm.words.to_ids("Hello, world!"))[None]
      >>> encode = nnx.jit(MrT5.encode, static_argnames="capacity")
      >>> encode(model, ids).states.shape, encode(model, ids, capacity=8).states.shape
      ((1, 13, 16), (1, 8, 16))
    """

    def __init__(
        self,
        c: MrT5Config,
        *,
        dtype: Any = jnp.float32,
        scan: bool = False,
        remat: str | None = None,
        block_size: t5.BlockSize = None,
        rngs: nnx.Rngs,
    ):
        self.t5 = t5.T5(c.base, dtype=dtype, scan=scan, remat=remat, block_size=block_size, rngs=rngs)
        self.gate = DeleteGate(c.base.d_model, rngs=rngs)
        self.gate_layer, self.gate_scale, self.threshold = c.gate_layer, c.gate_scale, c.threshold

    def encode(
        self,
        ids: Int[Array, "b n"],
        mask: Bool[Array, "b n"] | None = None,
        *,
        capacity: int | None = None,
        threshold: float | None = None,
        keep_gate: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> Encoded:
        """States for the decoder to read.

        Args:
          ids: bytes, from `words.to_ids`.
          mask: True where there is a byte; without it, where the id is not padding.
          capacity: None deletes softly. A number deletes hard, with room for that many bytes per row; how many did not fit
            is `plan.overflow`.
          threshold: for hard deletion; half of the gate's scale by default.
          keep_gate: whether bytes that stay also keep their gate as a weight, as in training. The official code drops it.
          rngs: for dropout, in training.
        """
        mask = ids != jm.words.PAD if mask is None else mask
        encoder = self.t5.encoder
        x = self.t5.embed(ids, rngs)
        below, _ = encoder(x, stop=self.gate_layer, key_bias=key_bias(mask=mask), rngs=rngs)
        hidden = [x, *below]
        x, positions, plan = hidden[-1], None, None
        logits = self.gate(x)
        gate = jm.words.delete_gate(logits, mask=mask, scale=self.gate_scale)
        bias = key_bias(gate=gate, mask=mask)
        if capacity is not None:
            stay = jm.words.kept(gate, mask=mask, threshold=self.threshold if threshold is None else threshold)
            x, positions, plan = jm.tokens.pack(stay, x, capacity)
            weight = jm.merge(plan, gate, reduce="first") if keep_gate else None
            bias = key_bias(plan, gate=weight)
        above, excess = encoder(x, positions=positions, start=self.gate_layer, key_bias=bias, rngs=rngs)
        states = encoder.last(above[-1], rngs)
        seen = (*hidden, *above[:-1], states)
        return Encoded(states, bias, gate, logits, mask, plan, seen, jnp.mean(jnp.stack(excess)))

    def decode(self, ids: Int[Array, "b t"], encoded: Encoded, *, rngs: nnx.Rngs | None = None) -> t5.Decoded:
        """Logits for the id after each of `ids`. Deleted bytes weigh as little here as in the encoder."""
        return self.t5.decode(ids, encoded.states, encoded.key_bias, rngs=rngs)

    def score_penalty(self, encoded: Encoded, decoded: t5.Decoded) -> Float[Array, ""]:
        """Mean excess of attention scores over 5 where the gate acts, so that they do not grow past it (coefficient 0.5)."""
        later, cross = len(self.t5.encoder.blocks) - self.gate_layer, len(self.t5.decoder.blocks)
        return (encoded.excess * later + decoded.excess * cross) / (later + cross)


def loss(
    model: MrT5,
    ids: Int[Array, "b n"],
    labels: Int[Array, "b t"],
    alpha: Float[Array, ""] | float,
    *,
    capacity: int | None = None,
    score_weight: float = 0.0,
    rngs: nnx.Rngs | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Cross-entropy + alpha · mean gate (+ score_weight · excess of the scores), and the numbers to log.

    `metrics["rate"]` is what the controller wants after the step; `alpha` is what it gave before it. `rngs` switch dropout on;
    make them from a key inside the function that is differentiated, because they count their draws.
    """
    encoded = model.encode(ids, capacity=capacity, rngs=rngs)
    decoded = model.decode(t5.shift_right(labels), encoded, rngs=rngs)
    ce = t5.cross_entropy(decoded.logits, labels)
    gate_mean = jm.words.masked_mean(encoded.gate, encoded.mask)
    total = ce + alpha * gate_mean
    if score_weight:
        total = total + score_weight * model.score_penalty(encoded, decoded)
    rate = jm.words.deletion_rate(encoded.gate, encoded.mask, threshold=model.threshold)
    return total, {"ce": ce, "gate": gate_mean, "rate": rate}


def torch_name(path: str, *, gate_layer: int) -> str:
    """The official checkpoint's name for a parameter, for `models.load`: `functools.partial(torch_name, gate_layer=3)`."""
    if path.startswith("t5."):
        return t5.torch_name(path.removeprefix("t5."))
    leaf = {"norm.scale": "layer_norm.weight", "out.kernel": "feed_forward.weight", "out.bias": "feed_forward.bias"}
    return f"encoder.block.{gate_layer}.delete_gate.{leaf[path.removeprefix('gate.')]}"
