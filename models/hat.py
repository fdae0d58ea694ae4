"""Hierarchical autoregressive transformers: bytes become words, a backbone reads words, bytes are written word by word.

Two architectures share the name, and this file:
  HAT       the paper's. Each word is [W] and its bytes. An encoder reads every word by itself, in both directions; the backbone
            reads what stands at [W]; a decoder writes the next word from the backbone's prediction, byte by byte, then [W].
  TFreeHAT  the released models'. The encoder reads the stream of bytes with a causal window; a learned query attends to the
            bytes of each word; the decoder goes on from the encoder's states, and each of its bytes is told the backbone's
            prediction for its word. No [W]: a word ends where the splitter says.

    starts = jm.words.starts(text, rule="whitespace", max_bytes=config.max_word)
    model = HAT(HATConfig(encoder, backbone, decoder), rngs=nnx.Rngs(0))
    total, metrics = loss(model, ids, starts, docs, capacity=512)

Bytes are 0 to 255; `docs` numbers the documents of a packed row, negative for padding, and no document sees another.
Generation is in `models/hat_decode.py`.

Sources: HAT (arXiv:2501.10322); the released form, arXiv:2603.15953.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

import jaxmerge as jm
from models.decoder import Block, Cache, DecoderConfig, Places, RMSNorm, RopeScaling, Stack, linear, llama, nats, places, rope
from models.t5 import lookup

WORD, STOP = 256, 257
"""The paper's [W] and [S]. A document that is over ends with STOP in `ids`, a word of its own."""
RELEASED_STOP = 192
"""The released models end a text with this byte, which no UTF-8 has."""


@dataclasses.dataclass(frozen=True)
class HATConfig:
    """The paper's form. The encoder sees both directions and the decoder one, each within a word, whatever they say."""

    encoder: DecoderConfig
    backbone: DecoderConfig
    decoder: DecoderConfig
    max_word: int = 100
    """Bytes in a word; a longer one is cut."""


@dataclasses.dataclass(frozen=True)
class CrossConfig:
    """Attention between bytes and words. A head's features must be as many as in the byte stack beside it (they turn alike)."""

    width: int
    num_heads: int
    num_kv_heads: int
    qk_norm: bool = False
    norm_per_head: bool = True


@dataclasses.dataclass(frozen=True)
class TFreeConfig:
    """The released form: encoder and decoder have a window over the stream of bytes."""

    encoder: DecoderConfig
    backbone: DecoderConfig
    decoder: DecoderConfig
    encoder_cross: CrossConfig
    decoder_cross: CrossConfig
    max_word: int = 100

    def __post_init__(self):
        for name in ("encoder", "decoder"):
            stack, cross = getattr(self, name), getattr(self, f"{name}_cross")
            if cross.width != stack.features * cross.num_heads or cross.num_heads % cross.num_kv_heads:
                raise ValueError(
                    f"TFreeConfig: {name}_cross must be {stack.features} wide per head as the {name} is, its heads shared "
                    f"in equal parts; got width {cross.width}, {cross.num_heads} heads, {cross.num_kv_heads} key heads."
                )
        if self.encoder.width != self.decoder.width:
            raise ValueError(
                f"TFreeConfig: the decoder goes on from the encoder's states; widths {self.encoder.width} and "
                f"{self.decoder.width} must be one."
            )

    @classmethod
    def published(cls, config: Mapping[str, Any], **changes: Any) -> "TFreeConfig":
        """From the contents of a released model's `config.json`; `changes` (scan, remat, block_size) go to all three stacks.

        Raises:
          ValueError: it asks for what is not here: biases, another scaling of positions, decoder layers that hear of no word.
        """
        if not config["decoder_config"]["cross_attn_every_layer"]:
            raise ValueError("TFreeConfig.published: cross_attn_every_layer is off, which is not supported.")

        def stack(c: Mapping[str, Any]) -> DecoderConfig:
            scaling: Mapping[str, Any] = c.get("rope_scaling") or {"rope_type": "default"}
            if c.get("mlp_bias") or scaling["rope_type"] not in ("default", "llama3"):
                raise ValueError(f"TFreeConfig.published: mlp_bias and rope_scaling {scaling} are not supported.")
            names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            norm = "head" if c.get("key_query_norm_per_head") else "all"
            return DecoderConfig(
                width=c["hidden_size"],
                depth=c["num_hidden_layers"],
                num_heads=c["num_attention_heads"],
                d_ff=c["intermediate_size"],
                num_kv_heads=c["num_key_value_heads"],
                rope_theta=c["rope_theta"],
                rope_scaling=RopeScaling(*(scaling[n] for n in names)) if scaling["rope_type"] == "llama3" else None,
                window=c.get("sliding_window"),
                qk_norm=norm if c.get("key_query_norm") else None,
                epsilon=c["rms_norm_eps"],
                **changes,
            )

        def cross(c: Mapping[str, Any]) -> CrossConfig:
            names = (
                "hidden_size",
                "num_attention_heads",
                "attention_num_kv_heads",
                "key_query_norm",
                "key_query_norm_per_head",
            )
            return CrossConfig(*(c["cross_attention_config"][name] for name in names))

        encoder, backbone, decoder = (config[f"{name}_config"] for name in ("encoder", "backbone", "decoder"))
        stacks = stack(encoder), stack(backbone), stack(decoder)
        return cls(*stacks, cross(encoder), cross(decoder), max_word=config.get("max_word_size", 100))

    def to_published(self) -> dict[str, Any]:
        """The contents of `config.json`, the inverse of `published`."""

        def stack(c: DecoderConfig) -> dict[str, Any]:
            scaling = {"rope_type": "default"} if c.rope_scaling is None else {"rope_type": "llama3"} | vars(c.rope_scaling)
            return dict(
                hidden_size=c.width,
                num_hidden_layers=c.depth,
                num_attention_heads=c.num_heads,
                intermediate_size=c.d_ff,
                num_key_value_heads=c.kv_heads,
                rope_theta=c.rope_theta,
                rope_scaling=scaling,
                sliding_window=c.window,
                key_query_norm=c.qk_norm is not None,
                key_query_norm_per_head=c.qk_norm == "head",
                rms_norm_eps=c.epsilon,
                mlp_bias=False,
            )

        def cross(c: CrossConfig) -> dict[str, Any]:
            return dict(
                hidden_size=c.width,
                num_attention_heads=c.num_heads,
                attention_num_kv_heads=c.num_kv_heads,
                key_query_norm=c.qk_norm,
                key_query_norm_per_head=c.norm_per_head,
            )

        return dict(
            encoder_config=stack(self.encoder) | dict(cross_attention_config=cross(self.encoder_cross)),
            backbone_config=stack(self.backbone),
            decoder_config=stack(self.decoder)
            | dict(cross_attention_config=cross(self.decoder_cross), cross_attn_every_layer=True),
            max_word_size=self.max_word,
        )


class Words(NamedTuple):
    """Which word each byte is of, and where each word stands in its document."""

    plan: jm.Plan
    at: Places


def read_words(
    starts: Bool[Array, "b n"], docs: Int[Array, "b n"], *, capacity: int | None = None, max_word: int = 100
) -> Words:
    """The words of a row: one begins at every start and with every document, and after `max_word` bytes of one.

    Args:
      starts: from `jm.words.starts`.
      docs: which document each byte is of; negative for padding.
      capacity: room for that many words in a row, all that there could be by default. What did not fit is `plan.overflow`.
    """
    starts = jm.words.limit_patches(starts | jm.words.document_starts(docs), max_word)
    plan = jm.words.segments(starts, starts.shape[1] if capacity is None else capacity, mask=docs >= 0)
    word_docs = jnp.where(plan.sizes > 0, jm.merge(plan, docs, reduce="first"), -1)
    return Words(plan, places(word_docs))


def before(words: Float[Array, "b m d"], first: Float[Array, "..."], at: Places) -> Float[Array, "b m d"]:
    """What the words before each put out; for the first word of a document, a learned vector."""
    return jnp.where(jm.words.document_starts(at.segment)[..., None], first.reshape(1, 1, -1), jm.words.shift(words))


class Stream(NamedTuple):
    """The row with a [W] before each word."""

    ids: Int[Array, "b l"]
    plan: jm.Plan
    """From slots to words; each word's first slot is its [W]."""
    at: Places
    """Position in the word, and which word; negative where nothing is."""


def with_marks(ids: Int[Array, "b n"], words: Words, marks: int = 1) -> Stream:
    """Put [W] before each word, or several: byte t of word w, both counted from 0, goes to slot t + marks · (w + 1)."""
    plan, capacity = words.plan, words.plan.num_segments
    length = ids.shape[1] + marks * capacity
    rank = jnp.cumsum(plan.kept, axis=1, dtype=jnp.int32) - 1
    spread = jm.Plan(jnp.where(plan.kept, rank + marks * (plan.segment_ids + 1), -1), length)
    byte = spread.sizes > 0
    slot = jnp.arange(length)[None] + jnp.zeros_like(ids[:, :1])
    used = slot < jnp.sum(plan.kept, axis=1, keepdims=True) + marks * jnp.sum(plan.sizes > 0, axis=1, keepdims=True)
    mark = used & ~byte
    word = jnp.where(used, (jnp.cumsum(mark, axis=1, dtype=jnp.int32) - 1) // marks, -1)
    position = slot - jax.lax.cummax(jnp.where(mark & jm.words.document_starts(word), slot, 0), axis=1)
    filled = jnp.where(mark, WORD, jm.merge(spread, ids, reduce="sum"))
    return Stream(filled, jm.Plan(word, capacity), Places(jnp.where(used, position, 0), word))


class HAT(nnx.Module):
    """The paper's form.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> from flax import nnx
      >>> from models.decoder import DecoderConfig
      >>> from models.hat import HAT, HATConfig, loss
      >>> small, large = DecoderConfig(16, 1, 2, 32), DecoderConfig(32, 2, 2, 64)
      >>> model = HAT(HATConfig(small, large, small, max_word=16), rngs=nnx.Rngs(0))
      >>> text = "Hello wide world"
      >>> ids, starts = jnp.array([list(text.encode())]), jnp.asarray(jm.words.starts(text, rule="whitespace"))[None]
      >>> total, metrics = nnx.jit(loss, static_argnames="capacity")(model, ids, starts, capacity=4)
      >>> round(float(metrics["rate"]), 3)
      0.812
    """

    def __init__(self, c: HATConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        within = lambda stack, causal: dataclasses.replace(stack, causal=causal, window=c.max_word)
        encoder, backbone, decoder = within(c.encoder, False), c.backbone, within(c.decoder, True)
        norm = lambda stack: RMSNorm(stack.width, dtype=dtype, epsilon=stack.epsilon)
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (STOP + 1, encoder.width)))
        self.encoder, self.encoder_norm = llama(encoder, dtype=dtype, rngs=rngs), norm(encoder)
        self.to_backbone = linear(encoder.width, backbone.width, backbone, dtype, rngs)
        self.first = nnx.Param(jax.random.normal(rngs.params(), (backbone.width,)))
        self.backbone, self.backbone_norm = llama(backbone, dtype=dtype, rngs=rngs), norm(backbone)
        self.to_decoder = linear(backbone.width, decoder.width, decoder, dtype, rngs)
        self.decoder_embedding = nnx.Param(jax.random.normal(rngs.params(), (STOP + 1, decoder.width)))
        self.decoder = llama(decoder, dtype=dtype, rngs=rngs)
        self.norm = RMSNorm(decoder.width, dtype=jnp.float32, epsilon=decoder.epsilon)
        self.head = linear(decoder.width, STOP + 1, decoder, jnp.float32, rngs)
        self.c = c

    def encode(self, stream: Stream) -> Float[Array, "b m d"]:
        """The embedding of each word: the encoder's state at its [W]."""
        x = self.encoder(lookup(self.embedding[...], stream.ids), stream.at)
        x = self.to_backbone(self.encoder_norm(jm.merge(stream.plan, x, reduce="first")))
        return x.astype(jnp.float32)

    def decoder_input(self, stream: Stream, predicted: Float[Array, "b m d"]) -> Float[Array, "b l d"]:
        """Bytes, and in place of [W] what the backbone predicted for the word."""
        told = jm.unmerge(stream.plan, self.to_decoder(predicted.astype(self.to_decoder.dtype)).astype(jnp.float32))
        return jnp.where((stream.ids == WORD)[..., None], told, lookup(self.decoder_embedding[...], stream.ids))

    def predict(self, x: Float[Array, "b l d"]) -> Float[Array, "b l v"]:
        return self.head(self.norm(x))

    def __call__(self, stream: Stream, words: Words) -> Float[Array, "b l v"]:
        """Logits for the symbol after each slot of the stream: a byte, [W] or [S]."""
        predicted = self.backbone_norm(self.backbone(self.encode(stream), words.at))
        told = self.decoder_input(stream, before(predicted.astype(jnp.float32), self.first[...], words.at))
        return self.predict(self.decoder(told, stream.at))

    def nats(self, ids: Int[Array, "b n"], docs: Int[Array, "b n"], words: Words) -> tuple[Array, Array, Array]:
        """-log p of what follows each slot; whether that is of the same document; whether it is a byte (and not [W])."""
        stream = with_marks(ids, words)
        logits = self(stream, words)[:, :-1]
        owner = jm.unmerge(stream.plan, words.at.segment, fill=-1)
        scored = (owner[:, 1:] >= 0) & (owner[:, 1:] == owner[:, :-1])
        target = jnp.where(scored, stream.ids[:, 1:], 0)
        return nats(logits, target), scored, scored & (target != WORD)


class Cross(nnx.Module):
    """The projections of an attention between bytes and words, as the released models have them."""

    def __init__(self, c: CrossConfig, d_q: int, d_kv: int, stack: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs):
        d = c.width // c.num_heads
        self.q = linear(d_q, c.width, stack, dtype, rngs)
        self.k = linear(d_kv, c.num_kv_heads * d, stack, dtype, rngs)
        self.v = linear(d_kv, c.num_kv_heads * d, stack, dtype, rngs)
        self.o = linear(c.width, d_q, stack, dtype, rngs, residual=True)
        if c.qk_norm:
            width = lambda heads: d if c.norm_per_head else heads * d
            self.norm_query = RMSNorm(width(c.num_heads), dtype=dtype, epsilon=stack.epsilon)
            self.norm_key = RMSNorm(width(c.num_kv_heads), dtype=dtype, epsilon=stack.epsilon)
        self.c, self.stack = c, stack

    def heads(self, y: Float[Array, "b n d"], count: int, norm: str = "") -> Float[Array, "b n h d"]:
        normed = self.c.qk_norm and norm != ""
        if normed and not self.c.norm_per_head:
            y = getattr(self, norm)(y)
        y = y.reshape(*y.shape[:-1], count, -1)
        return getattr(self, norm)(y) if normed and self.c.norm_per_head else y

    def pool(self, query: Float[Array, "one one d"], x: Float[Array, "b n d"], at: Places, words: Words) -> Array:
        """One query for every word, over the word's own bytes: a softmax over each segment.

        The query turns with the word's number, a key with the byte's. What counts is the difference: the key turns by it.
        """
        c = self.c
        q = self.heads(self.q(query), c.num_heads, "norm_query")[0, 0].reshape(c.num_kv_heads, -1, c.width // c.num_heads)
        k, v = self.heads(self.k(x), c.num_kv_heads, "norm_key"), self.heads(self.v(x), c.num_kv_heads)
        k = rope(k, at.position - jm.unmerge(words.plan, words.at.position), self.stack)
        scores = jnp.einsum("grd,bngd->bngr", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        top = jm.unmerge(words.plan, jm.merge(words.plan, jax.lax.stop_gradient(scores), reduce="max"))
        weight = jnp.exp(scores - top)[..., None]
        mass = jm.merge(words.plan, weight, reduce="sum")
        sums = jm.merge(words.plan, weight * v[..., None, :].astype(jnp.float32), reduce="sum")
        out = sums / jnp.where(mass > 0, mass, 1)
        return self.o(out.reshape(*out.shape[:2], -1).astype(v.dtype)).astype(jnp.float32)

    def tell(self, word: Float[Array, "b m d"]) -> Float[Array, "b m d"]:
        """What a byte hears of the one word it may attend to: with one key the weight is 1, so that q and k do not matter."""
        shared = self.c.num_heads // self.c.num_kv_heads
        v = jnp.repeat(self.heads(self.v(word), self.c.num_kv_heads), shared, axis=2)
        return self.o(v.reshape(*word.shape[:2], -1)).astype(jnp.float32)


class ToldBlock(nnx.Module):
    """The released decoder's block: hear the word's prediction, then a block over the stream of bytes.

    `query_norm`, and q and k of `cross`, change nothing (see `Cross.tell`); they are there because checkpoints have them.
    """

    def __init__(self, c: TFreeConfig, *, dtype: Any, rngs: nnx.Rngs):
        norm = lambda width: RMSNorm(width, dtype=dtype, epsilon=c.decoder.epsilon)
        self.query_norm, self.kv_norm = norm(c.decoder.width), norm(c.backbone.width)
        self.cross = Cross(c.decoder_cross, c.decoder.width, c.backbone.width, c.decoder, dtype=dtype, rngs=rngs)
        self.block = Block(c.decoder, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b n d"], at: Places, plan: jm.Plan, word: Float[Array, "b m d"], cache: Cache | None = None
    ) -> tuple[Float[Array, "b n d"], Cache | None]:
        x = x + jm.unmerge(plan, self.cross.tell(self.kv_norm(word)))
        return self.block(x, at, cache)

    def cache(self, batch: int, size: int) -> Cache:
        return self.block.cache(batch, size)


class TFreeHAT(nnx.Module):
    """The released form. `load.load(model, tensors, hat.torch_name)` reads the published weights."""

    def __init__(self, c: TFreeConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        d, wide = c.encoder.width, c.backbone.width
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (256, d)))
        self.encoder = llama(c.encoder, dtype=dtype, rngs=rngs)
        self.latent_query = nnx.Param(jax.random.normal(rngs.params(), (1, 1, wide)))
        self.connector = Cross(c.encoder_cross, wide, d, c.encoder, dtype=dtype, rngs=rngs)
        self.backbone = llama(c.backbone, dtype=dtype, rngs=rngs)
        self.first = nnx.Param(jax.random.normal(rngs.params(), (1, 1, wide)))
        blocks = [ToldBlock(c, dtype=dtype, rngs=rngs) for _ in range(c.decoder.depth)]
        self.decoder = Stack(blocks, scan=c.decoder.scan, remat=c.decoder.remat)
        self.norm = RMSNorm(c.decoder.width, dtype=jnp.float32, epsilon=c.decoder.epsilon)
        self.head = linear(c.decoder.width, 256, c.decoder, jnp.float32, rngs)
        self.c = c

    def encode(self, x: Float[Array, "b n d"], at: Places, words: Words) -> Float[Array, "b m d"]:
        """The embedding of each word, from the encoder's states."""
        dtype = self.connector.q.dtype
        return self.connector.pool(self.latent_query[...].astype(dtype), x.astype(dtype), at, words)

    def predict(self, x: Float[Array, "b n d"]) -> Float[Array, "b n v"]:
        return self.head(self.norm(x))

    def __call__(self, ids: Int[Array, "b n"], docs: Int[Array, "b n"], words: Words) -> Float[Array, "b n v"]:
        """Logits for the byte after each."""
        at = places(docs)
        x = self.encoder(lookup(self.embedding[...], ids), at)
        predicted = self.backbone(self.encode(x, at, words), words.at)
        return self.predict(self.decoder(x, at, words.plan, before(predicted, self.first[...], words.at)))

    def nats(self, ids: Int[Array, "b n"], docs: Int[Array, "b n"], words: Words) -> tuple[Array, Array, Array]:
        """-log p of the byte after each; whether that is of the same document (twice, as `HAT.nats` tells bytes from [W])."""
        docs = jnp.where(words.plan.kept, docs, -1)
        scored = (docs[:, 1:] >= 0) & (docs[:, 1:] == docs[:, :-1])
        return nats(self(ids, docs, words)[:, :-1], jnp.where(scored, ids[:, 1:], 0)), scored, scored


def loss(
    model: HAT | TFreeHAT,
    ids: Int[Array, "b n"],
    starts: Bool[Array, "b n"],
    docs: Int[Array, "b n"] | None = None,
    *,
    capacity: int | None = None,
    rngs: nnx.Rngs | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean nats per byte, and metrics.

    Args:
      ids, starts, docs, capacity: as `read_words` takes them.
      rngs: nothing here is random; it is taken as every family's loss takes it.

    Returns:
      The loss, and: "ce", the same; "rate", the share of positions that the backbone is spared; "overflow", bytes that found no
      room. In the paper's form [W] is paid for too, and shared out among the bytes.
    """
    docs = jnp.zeros_like(ids) if docs is None else docs
    words = read_words(starts, docs, capacity=capacity, max_word=model.c.max_word)
    cost, scored, byte = model.nats(ids, docs, words)
    ce = jnp.sum(jnp.where(scored, cost, 0)) / jnp.maximum(jnp.sum(byte), 1)
    spared = 1 - jnp.sum(words.plan.sizes > 0) / jnp.maximum(jnp.sum(words.plan.kept), 1)
    return ce, {"ce": ce, "rate": spared, "overflow": jnp.sum(words.plan.overflow)}


def torch_name(path: str) -> str:
    """The name that the published weights have for a parameter of `TFreeHAT`, for `models.load`.

    Example:
      >>> torch_name("encoder.blocks.0.attention.q.kernel"), torch_name("head.kernel")
      ('encoder.layers.0.self_attn.q_proj.weight', 'lm_head.weight')
    """
    fixed = {
        "embedding": "encoder.embedding_layer.weight",
        "latent_query": "encoder_connector.latent_query",
        "first": "decoder_connector.first_word_embedding",
        "norm.scale": "layer_norm.weight",
        "head.kernel": "lm_head.weight",
    }
    if path in fixed:
        return fixed[path]
    if found := re.fullmatch(r"connector\.(.+)", path):
        return f"encoder_connector.cross_attention_encoder_connector.{_leaf(found[1])}"
    if found := re.fullmatch(r"(encoder|backbone)\.blocks\.(\d+)\.(.+)", path):
        return f"{found[1]}.layers.{found[2]}.{_leaf(found[3])}"
    if found := re.fullmatch(r"decoder\.blocks\.(\d+)\.(block\.|cross\.)?(.+)", path):
        inner = {"block.": "llama_layer.", "cross.": "cross_attention.", None: ""}[found[2]]
        return f"decoder.decoder_layers.{found[1]}.{inner}{_leaf(found[3])}"
    raise ValueError(f"torch_name: {path!r} is no parameter of TFreeHAT.")


def _leaf(path: str) -> str:
    """Llama's name for a part of a block."""
    part, last = path.rsplit(".", 1)
    if last == "scale":
        norms = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
        inner = {"attention.q_norm": "self_attn.norm_query", "attention.k_norm": "self_attn.norm_key"}
        return f"{(norms | inner).get(part, part)}.weight"
    part = part.replace("attention.", "self_attn.").replace("ffn.", "mlp.")
    return f"{part}_proj.weight"
