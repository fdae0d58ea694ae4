"""H-Net: a network that learns where its words begin, stage within stage.

A stage encodes its positions, a router begins chunks among them, the stage within reads the first state of each chunk, and what
it puts out is smoothed over chunks, handed back to the positions, and decoded. The innermost stage is one stack.

    config = HNetConfig(layout=("T2", ("T4",), "T2"), width=(64, 96), d_ff=(128, 256), num_heads=(4, 6), ratios=(4.0,))
    model = HNet(config, rngs=nnx.Rngs(0))
    total, metrics = loss(model, ids, docs, capacities=(512,))

Layouts are the official ones: "T" attention and feed-forward, "t" attention alone, "M" and "m" the same with Mamba-2.
Generation is in `models/hnet_decode.py`.

Source: H-Net (arXiv:2507.07955).
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

import jaxmerge as jm
from models.decoder import DecoderConfig, Places, RMSNorm, Stack, llama, nats, places
from models.mamba2 import MambaBlock, MambaConfig
from models.t5 import lookup

BOS, STOP = 254, 255
"""The official tokenizer begins and ends a text with these bytes, which no UTF-8 has."""
Layout = Sequence[Any]
"""("T2",), or (encoder, layout of the stage within, decoder)."""


@dataclasses.dataclass(frozen=True)
class HNetConfig:
    """The architecture; the sequences have one entry per stage, outermost first.

    Attributes:
      layout: as the official `arch_layout`.
      width: never shrinks inwards. A wider stage appends a learned vector to what comes in.
      d_ff: rounded up to a multiple of 128, as in the official code.
      rotary_dim: how many features of a head turn.
      window: how many positions back a stage sees beside its own; None for all.
      ratios: positions per chunk that each router is driven to; one fewer than stages.
      ratio_weight: of that loss.
      mamba: of the layers "m" and "M".
      block_size: of queries, in stages without a window; see `DecoderConfig`, as for scan and remat.
    """

    layout: Layout
    width: Sequence[int]
    d_ff: Sequence[int]
    num_heads: Sequence[int]
    rotary_dim: Sequence[int] | None = None
    window: Sequence[int | None] | None = None
    ratios: Sequence[float] = (6.0,)
    ratio_weight: float = 0.03
    mamba: MambaConfig = dataclasses.field(default_factory=MambaConfig)
    block_size: int | None = None
    scan: bool = False
    remat: str | None = None

    def __post_init__(self):
        frozen = lambda x: tuple(map(frozen, x)) if isinstance(x, list | tuple) else x
        for field in dataclasses.fields(self):  # lists come from JSON, and a config is a key of compiled programs
            object.__setattr__(self, field.name, frozen(getattr(self, field.name)))
        stages = depth_of(self.layout)
        for name in ("width", "d_ff", "num_heads", "rotary_dim", "window"):
            given = getattr(self, name)
            if given is not None and len(given) != stages:
                raise ValueError(f"HNetConfig: the layout has {stages} stages, but {name} has {len(given)} entries: {given}.")
        if len(self.ratios) != stages - 1:
            raise ValueError(
                f"HNetConfig: {stages} stages have {stages - 1} routers, but ratios has {len(self.ratios)} entries."
            )
        if list(self.width) != sorted(self.width):
            raise ValueError(f"HNetConfig: a stage is at least as wide as the one around it; got widths {self.width}.")

    @classmethod
    def published(cls, config: Mapping[str, Any], **changes: Any) -> "HNetConfig":
        """From an official config file's contents. What it leaves out (ratios) and what is ours (scan, remat) as keywords.

        Raises:
          ValueError: it ties the head to the embedding, which no published model does.
        """
        if config.get("tie_embeddings"):
            raise ValueError("HNetConfig.published: tie_embeddings is set, which is not supported.")
        attention = config["attn_cfg"]
        window = tuple(None if w < 0 else w for w in attention["window_size"])
        names = {"d_state": "state", "d_conv": "conv", "expand": "expand", "chunk_size": "chunk"}
        mamba = MambaConfig(**{names[name]: value for name, value in config["ssm_cfg"].items()})
        return cls(
            layout=config["arch_layout"],
            width=config["d_model"],
            d_ff=config["d_intermediate"],
            num_heads=attention["num_heads"],
            rotary_dim=attention["rotary_emb_dim"],
            window=window,
            mamba=mamba,
            **changes,
        )

    def to_published(self) -> dict[str, Any]:
        """The contents of an official config file, the inverse of `published` (which has no place for `ratios`)."""
        stages = len(self.width)
        window = (None,) * stages if self.window is None else self.window
        rotary = self.rotary_dim or tuple(w // h for w, h in zip(self.width, self.num_heads, strict=True))
        m = self.mamba
        return dict(
            arch_layout=self.layout,
            d_model=self.width,
            d_intermediate=self.d_ff,
            ssm_cfg=dict(d_state=m.state, d_conv=m.conv, expand=m.expand, chunk_size=m.chunk),
            attn_cfg=dict(
                num_heads=self.num_heads, rotary_emb_dim=rotary, window_size=[-1 if w is None else w for w in window]
            ),
            tie_embeddings=False,
        )

    def stack(self, stage: int, kind: str, depth: int, residuals: int) -> DecoderConfig:
        """Equal layers of one stage."""
        return DecoderConfig(
            self.width[stage],
            depth,
            self.num_heads[stage],
            -(-self.d_ff[stage] // 128) * 128 if kind.isupper() else 0,
            rotary_dim=None if self.rotary_dim is None else self.rotary_dim[stage],
            window=None if self.window is None else self.window[stage],
            block_size=self.block_size,
            fused=True,
            init_std=0.02,
            num_residuals=residuals,
            scan=self.scan,
            remat=self.remat,
        )


def depth_of(layout: Layout) -> int:
    """How many stages a layout has.

    Raises:
      ValueError: it is not nested as a layout is.
    """
    if isinstance(layout, str) or len(layout) not in (1, 3) or not all(isinstance(part, str) for part in layout[::2]):
        raise ValueError(
            f'HNetConfig: a layout is ("T4",) or (encoder, layout, decoder), e.g. ("T1", ("T4",), "T1"); got {layout!r}.'
        )
    return 1 if len(layout) == 1 else 1 + depth_of(layout[1])


def groups(part: str) -> list[tuple[str, int]]:
    """The runs of equal layers in a part of a layout.

    Example:
      >>> groups("T1m4")
      [('T', 1), ('m', 4)]
    """
    found = re.findall(r"([mMtT])(\d+)", part)
    if not found or "".join(kind + count for kind, count in found) != part:
        raise ValueError(f'HNetConfig: {part!r} is no part of a layout; write letters t, T, m, M with counts, e.g. "T1m4".')
    return [(kind, int(count)) for kind, count in found]


def residuals(part: str) -> int:
    """How many times a part adds to the residual stream."""
    return sum(count * (2 if kind.isupper() else 1) for kind, count in groups(part))


class Isotropic(nnx.Module):
    """A part of a layout: its layers, and a norm."""

    def __init__(self, c: HNetConfig, stage: int, part: str, residuals: int, *, dtype: Any, rngs: nnx.Rngs):
        def make(kind, depth):
            layers = c.stack(stage, kind, depth, residuals)
            if kind in "tT":
                return llama(layers, dtype=dtype, rngs=rngs)
            blocks = [MambaBlock(layers, c.mamba, dtype=dtype, rngs=rngs) for _ in range(depth)]
            return Stack(blocks, scan=c.scan, remat=c.remat)

        self.stacks = nnx.List([make(kind, depth) for kind, depth in groups(part)])
        self.norm = RMSNorm(c.width[stage], dtype=jnp.float32)

    def __call__(self, x: Float[Array, "b n d"], at: Places) -> Float[Array, "b n d"]:
        for stack in self.stacks:
            x = stack(x, at)
        return self.norm(x)


class Routed(NamedTuple):
    """What one router did: for the loss, metrics and pictures."""

    routing: jm.words.Routing
    plan: jm.Plan
    mask: Bool[Array, "b n"]


class Stage(nnx.Module):
    """A stage with all that it holds."""

    def __init__(self, c: HNetConfig, stage: int, layout: Layout, above: int, *, dtype: Any, rngs: nnx.Rngs):
        width = c.width[stage]
        if stage and (more := width - c.width[stage - 1]):
            self.pad = nnx.Param(jnp.zeros(more))
        self.grows = bool(stage and more)
        if len(layout) == 1:
            self.main = Isotropic(c, stage, layout[0], above + residuals(layout[0]), dtype=dtype, rngs=rngs)
            return
        above = above + residuals(layout[0]) + residuals(layout[2])
        self.encoder = Isotropic(c, stage, layout[0], above, dtype=dtype, rngs=rngs)
        self.main = Stage(c, stage + 1, layout[1], above, dtype=dtype, rngs=rngs)
        self.decoder = Isotropic(c, stage, layout[2], above, dtype=dtype, rngs=rngs)
        projection = lambda init, bias: nnx.Linear(width, width, use_bias=bias, kernel_init=init, rngs=rngs)
        eye = lambda key, shape, dtype: jnp.eye(*shape, dtype=dtype)
        self.q, self.k = projection(eye, False), projection(eye, False)
        self.residual = projection(nnx.initializers.zeros_init(), True)

    def widen(self, x: Float[Array, "b n d"]) -> Float[Array, "b n e"]:
        if not self.grows:
            return x
        tail = jnp.zeros_like(x[..., :1]) + self.pad[...].reshape(*[1] * (x.ndim - 1), -1)
        return jnp.concatenate([x, tail], axis=-1)

    def __call__(
        self, x: Float[Array, "b n d"], at: Places, capacities: Sequence[int | None]
    ) -> tuple[Float[Array, "b n d"], list[Routed]]:
        d, x, docs = x.shape[-1], self.widen(x), at.segment
        if isinstance(self.main, Isotropic):
            return self.main(x, at)[..., :d], []
        h, mask = self.encoder(x, at), docs >= 0
        routing = jm.words.route(self.q(h), self.k(h), mask=mask, documents=docs)
        room = x.shape[1] if capacities[0] is None else capacities[0]
        plan = jm.words.segments(routing.starts, room, mask=mask)
        chunk_docs = jnp.where(plan.sizes > 0, jm.merge(plan, docs, reduce="first"), -1)
        chunks, within = self.main(jm.merge(plan, h, reduce="first"), places(chunk_docs), capacities[1:])
        z = jm.words.dechunk(plan, chunks, routing.p, documents=docs)
        y = z * jm.words.straight_through(routing.confidence)[..., None] + self.residual(h)
        return self.decoder(y, at)[..., :d], [Routed(routing, plan, mask), *within]


class HNet(nnx.Module):
    """The language model over bytes.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from models.hnet import HNet, HNetConfig
      >>> config = HNetConfig(("t1", ("T1",), "t1"), width=(16, 24), d_ff=(0, 32), num_heads=(2, 2), ratios=(3.0,))
      >>> model, run = HNet(config, rngs=nnx.Rngs(0)), nnx.jit(HNet.__call__, static_argnames="capacities")
      >>> logits, routed = run(model, jnp.arange(6)[None], capacities=(4,))
      >>> logits.shape, routed[0].plan.num_segments
      ((1, 6, 256), 4)
    """

    def __init__(self, c: HNetConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (256, c.width[0])))
        self.backbone = Stage(c, 0, c.layout, 0, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(c.width[0], 256, use_bias=False, kernel_init=nnx.initializers.normal(0.02), rngs=rngs)
        self.c = c

    def __call__(
        self, ids: Int[Array, "b n"], docs: Int[Array, "b n"] | None = None, *, capacities: Sequence[int | None] | None = None
    ) -> tuple[Float[Array, "b n v"], list[Routed]]:
        """Logits for the byte after each, and what the routers did.

        Args:
          ids: bytes.
          docs: which document each is of, negative for padding; no document sees another.
          capacities: room for chunks in each stage but the outermost, as many as there could be by default. A byte whose chunk
            found no room hears of no chunk; how many there are is `plan.overflow`.
        """
        capacities = [None] * len(self.c.ratios) if capacities is None else capacities
        if len(capacities) != len(self.c.ratios):
            raise ValueError(f"HNet: capacities must have {len(self.c.ratios)} entries, one per router; got {capacities}.")
        docs = jnp.zeros_like(ids) if docs is None else docs
        x, routed = self.backbone(lookup(self.embedding[...], ids), places(docs), capacities)
        return self.head(x), routed


def loss(
    model: HNet,
    ids: Int[Array, "b n"],
    docs: Int[Array, "b n"] | None = None,
    *,
    capacities: Sequence[int | None] | None = None,
    ratios: Sequence[float | Float[Array, ""]] | None = None,
    rngs: nnx.Rngs | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean nats per byte (of every byte but the first of its document) and the ratio losses, weighted as the config says.

    Args:
      ids, docs, capacities: as the model takes them.
      ratios: in place of the config's; they may be traced, for a schedule.
      rngs: nothing here is random; it is taken as every family's loss takes it.

    Returns:
      The loss, and: "ce", nats per byte; "ratio", the sum of ratio losses; "rate", the share of positions that the
      innermost stage is spared; "overflow", bytes and chunks that found no room.
    """
    docs = jnp.zeros_like(ids) if docs is None else docs
    logits, routed = model(ids, docs, capacities=capacities)
    scored = (docs[:, 1:] >= 0) & (docs[:, 1:] == docs[:, :-1])
    ce = jm.words.masked_mean(nats(logits[:, :-1], jnp.where(scored, ids[:, 1:], 0)), scored)
    ratios = model.c.ratios if ratios is None else ratios
    ratio = sum(jm.words.ratio_loss(r.routing, n, mask=r.mask) for r, n in zip(routed, ratios, strict=True))
    chunks = jnp.sum(routed[-1].plan.sizes > 0) if routed else jnp.sum(docs >= 0)
    metrics = {
        "ce": ce,
        "ratio": jnp.asarray(ratio, jnp.float32),
        "rate": 1 - chunks / jnp.maximum(jnp.sum(docs >= 0), 1),
        "overflow": sum((jnp.sum(r.plan.overflow) for r in routed), jnp.int32(0)),
    }
    return ce + model.c.ratio_weight * metrics["ratio"], metrics


def torch_name(path: str, *, layout: Layout) -> str:
    """The official checkpoint's name for a parameter, for `models.load`: `functools.partial(torch_name, layout=config.layout)`.

    Example:
      >>> torch_name("backbone.encoder.stacks.1.blocks.0.attention.qkv.kernel", layout=("t1T2", ("T1",), "t1"))
      'backbone.encoder.layers.1.mixer.Wqkv.weight'
    """
    fixed = {"embedding": "embeddings.weight", "head.kernel": "lm_head.weight"}
    if path in fixed:
        return fixed[path]
    found = re.fullmatch(r"backbone\.((?:main\.)*)(?:(encoder|decoder)\.)?(.+)", path)
    if found is None:
        raise ValueError(f"torch_name: {path!r} is no parameter of HNet.")
    depth, part, rest = found[1].count("main."), found[2], found[3]
    prefix = "backbone." + "main_network." * depth
    ends = {
        "pad": "pad_dimension",
        "q.kernel": "routing_module.q_proj_layer.weight",
        "k.kernel": "routing_module.k_proj_layer.weight",
        "residual.kernel": "residual_proj.weight",
        "residual.bias": "residual_proj.bias",
    }
    if part is None and rest in ends:
        return prefix + ends[rest]
    for _ in range(min(depth, depth_of(layout) - 1)):  # the innermost stage's own stack is one `main` deeper
        layout = layout[1]
    names = layout[0] if part != "decoder" else layout[2]
    prefix += f"{part}." if part else ""
    if rest == "norm.scale":
        return f"{prefix}rmsnorm.weight"
    found = re.fullmatch(r"stacks\.(\d+)\.blocks\.(\d+)\.(.+)", rest)
    leaf = {
        "attention_norm.scale": "norm1.weight",
        "attention.qkv.kernel": "mixer.Wqkv.weight",
        "attention.o.kernel": "mixer.out_proj.weight",
        "mixer_norm.scale": "norm1.weight",
        "mixer.in_proj.kernel": "mixer.in_proj.weight",
        "mixer.out_proj.kernel": "mixer.out_proj.weight",
        "mixer.conv": "mixer.conv1d.weight",
        "mixer.conv_bias": "mixer.conv1d.bias",
        "mixer.norm.scale": "mixer.norm.weight",
        **{f"mixer.{name}": f"mixer.{name}" for name in ("dt_bias", "A_log", "D")},
        "ffn_norm.scale": "norm2.weight",
        "ffn.up_gate.kernel": "mlp.fc1.weight",
        "ffn.down.kernel": "mlp.fc2.weight",
    }
    if found is None or found[3] not in leaf:
        raise ValueError(f"torch_name: {path!r} is no parameter of HNet.")
    layer = sum(count for _, count in groups(names)[: int(found[1])]) + int(found[2])
    return f"{prefix}layers.{layer}.{leaf[found[3]]}"
