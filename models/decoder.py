"""The Llama-style block that the byte families share, and a plain byte decoder made of it.

RMSNorm, rotary positions, grouped queries, SwiGLU; where asked for: QK-norm, soft cap, a window, no feed-forward.

A position sees its own segment (a document, a word), no later position where the stack is causal, and `window` positions back
where it has one. With a window nothing of size (n, n) is made: each block of queries meets the few blocks of keys in reach.
Parameters are float32; `dtype` is the compute dtype, while the residual stream, softmax, norms and logits stay in float32.

    stack = llama(DecoderConfig(width=64, depth=4, num_heads=4, d_ff=128), rngs=nnx.Rngs(0))
    x = stack(x, places(docs))
    x, cache = stack.step(x, at, cache=cache)           t more positions of every row, equal to the uncached

Sources: Llama (arXiv:2302.13971), grouped queries (arXiv:2305.13245), sliding window (arXiv:2310.06825), QK-norm
(arXiv:2302.05442), soft cap (arXiv:2408.00118).
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxmerge import words
from jaxmerge.attention import MASKED
from models import fold
from models.t5 import lookup

BLOCK = 256
"""Queries that share their keys, where a window limits them."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretch of the slow frequencies, so that longer texts than it was trained on can be read."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A stack of equal blocks.

    Attributes:
      d_ff: the feed-forward's width; 0 leaves it out.
      num_kv_heads: fewer than `num_heads` are shared among them.
      rotary_dim: how many features of each head turn; all by default.
      window: a position sees that many positions back (and forward, if not causal), beside itself.
      qk_norm: RMSNorm of queries and keys, per "head" or over "all" heads.
      softcap: scores become c · tanh(score / c).
      block_size: without a window, the scores of that many queries are in memory at once, and are computed again on the way
        back; None for all.
      fused: one matrix for q, k and v and one for value and gate, as H-Net has them; otherwise one each, as Llama.
      init_std: of the projections; 1/sqrt(fan in) by default.
      num_residuals: projections into the residual stream start smaller by its square root; 2 · depth by default.
      scan: keep the blocks stacked and scan over them, so that compile time does not grow with depth.
      remat: what of a block the backward pass finds in memory: None (all), "full" (nothing), "dots", see `models.fold`.
    """

    width: int
    depth: int
    num_heads: int
    d_ff: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rotary_dim: int | None = None
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    causal: bool = True
    window: int | None = None
    qk_norm: Literal["head", "all"] | None = None
    softcap: float | None = None
    block_size: int | None = None
    fused: bool = False
    epsilon: float = 1e-5
    init_std: float | None = None
    num_residuals: int | None = None
    scan: bool = False
    remat: str | None = None

    def __post_init__(self):
        if self.head_dim is None and self.width % self.num_heads:
            raise ValueError(
                f"DecoderConfig: width {self.width} is no multiple of num_heads {self.num_heads}; change one, or give head_dim."
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(f"DecoderConfig: num_kv_heads {self.num_kv_heads} must divide num_heads {self.num_heads}.")
        if self.turning % 2 or self.turning > self.features:
            raise ValueError(f"DecoderConfig: {self.turning} features cannot turn in pairs in a head of {self.features}.")
        for name in ("window", "block_size"):
            if (limit := getattr(self, name)) is not None and limit < 1:
                raise ValueError(f"DecoderConfig: {name} must be 1 or more, or None for no limit; got {limit}.")
        fold.checkpointed(lambda: None, self.remat)  # refuses an unknown name here, not in the first step

    @property
    def features(self) -> int:
        """Of one head."""
        return self.head_dim or self.width // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def turning(self) -> int:
        return self.features if self.rotary_dim is None else self.rotary_dim


class Places(NamedTuple):
    """Where each vector of a sequence stands. Positions grow by one within a segment."""

    position: Int[Array, "b n"]
    segment: Int[Array, "b n"]
    """Only one's own is seen; negative: padding."""


class Cache(NamedTuple):
    """Keys and values of one layer: slot j holds position j."""

    k: Float[Array, "b s g d"]
    v: Float[Array, "b s g d"]


def places(docs: Int[Array, "b n"]) -> Places:
    """Positions from 0 in every run of one document's number.

    Example:
      >>> places(jnp.array([[7, 7, 7, 9, 9, -1]])).position.tolist()
      [[0, 1, 2, 0, 1, 0]]
    """
    index = jnp.arange(docs.shape[1])[None] + jnp.zeros_like(docs)
    first = jax.lax.cummax(jnp.where(words.document_starts(docs), index, 0), axis=1)
    return Places(index - first, docs)


class RMSNorm(nnx.Module):
    """x / rms(x) · scale, in float32."""

    def __init__(self, d: int, *, dtype: Any, epsilon: float = 1e-5):
        self.scale = nnx.Param(jnp.ones(d))
        self.dtype, self.epsilon = dtype, epsilon

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return (x * self.scale[...].reshape(*[1] * (x.ndim - 1), -1)).astype(self.dtype)


class Attention(nnx.Module):
    """Self-attention over `Places`, with or without a cache."""

    def __init__(self, c: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs):
        d, heads, shared = c.features, c.num_heads, c.kv_heads
        if c.fused:
            self.qkv = linear(c.width, (heads + 2 * shared) * d, c, dtype, rngs)
        else:
            self.q = linear(c.width, heads * d, c, dtype, rngs)
            self.k = linear(c.width, shared * d, c, dtype, rngs)
            self.v = linear(c.width, shared * d, c, dtype, rngs)
        self.o = linear(heads * d, c.width, c, dtype, rngs, residual=True)
        if c.qk_norm is not None:
            self.q_norm, self.k_norm = (
                RMSNorm(d if c.qk_norm == "head" else h * d, dtype=dtype, epsilon=c.epsilon) for h in (heads, shared)
            )
        self.c = c

    def qkv_heads(self, x: Float[Array, "b n d"]) -> tuple[Array, Array, Array]:
        c, d = self.c, self.c.features
        if c.fused:
            q, k, v = jnp.split(self.qkv(x), [c.num_heads * d, (c.num_heads + c.kv_heads) * d], axis=-1)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        heads = lambda y, h: y.reshape(*y.shape[:-1], h, d)
        if c.qk_norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = heads(q, c.num_heads), heads(k, c.kv_heads), heads(v, c.kv_heads)
        if c.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def __call__(
        self, x: Float[Array, "b n d"], at: Places, cache: Cache | None = None
    ) -> tuple[Float[Array, "b n d"], Cache | None]:
        c = self.c
        q, k, v = self.qkv_heads(x)
        q, k = rope(q, at.position, c), rope(k, at.position, c)
        if cache is not None:
            cache = Cache(write(cache.k, k, at), write(cache.v, v, at))
            slots = jnp.arange(cache.k.shape[1])[None] + jnp.zeros_like(at.position[:, :1])
            seen = visible(at.position, slots, causal=True, window=c.window)
            out = attend(q, cache.k.astype(q.dtype), cache.v.astype(q.dtype), seen, softcap=c.softcap)
        elif c.window is not None and x.shape[1] > (2 if c.causal else 3) * min(c.window, BLOCK):
            out = banded(q, k, v, at, c)
        else:
            out = whole(q, k, v, at, c)
        return self.o(out.reshape(*x.shape[:-1], -1)), cache


class FeedForward(nnx.Module):
    """down(silu(gate x) · up x)."""

    def __init__(self, c: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs):
        if c.fused:
            self.up_gate = linear(c.width, 2 * c.d_ff, c, dtype, rngs)
        else:
            self.gate = linear(c.width, c.d_ff, c, dtype, rngs)
            self.up = linear(c.width, c.d_ff, c, dtype, rngs)
        self.down = linear(c.d_ff, c.width, c, dtype, rngs, residual=True)
        self.fused = c.fused

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        up, gate = jnp.split(self.up_gate(x), 2, axis=-1) if self.fused else (self.up(x), self.gate(x))
        return self.down(jax.nn.silu(gate) * up)


class Block(nnx.Module):
    """Attention, then feed-forward, each normed and added."""

    def __init__(self, c: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(c.width, dtype=dtype, epsilon=c.epsilon)
        self.attention = Attention(c, dtype=dtype, rngs=rngs)
        if c.d_ff:
            self.ffn_norm = RMSNorm(c.width, dtype=dtype, epsilon=c.epsilon)
            self.ffn = FeedForward(c, dtype=dtype, rngs=rngs)
        self.c, self.dtype = c, dtype

    def __call__(
        self, x: Float[Array, "b n d"], at: Places, cache: Cache | None = None
    ) -> tuple[Float[Array, "b n d"], Cache | None]:
        h, cache = self.attention(self.attention_norm(x), at, cache)
        x = x + h.astype(jnp.float32)
        return x + self.ffn(self.ffn_norm(x)).astype(jnp.float32) if self.c.d_ff else x, cache

    def cache(self, batch: int, size: int) -> Cache:
        shape = (batch, size, self.c.kv_heads, self.c.features)
        return Cache(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))


class Stack(nnx.Module):
    """Equal blocks, one after another, each from (x, *others, cache) to (x, cache); `scan` and `remat` as in `models.fold`."""

    def __init__(self, blocks: list[Any], *, scan: bool = False, remat: str | None = None):
        self.blocks, self.remat = fold.stack(blocks, scan=scan), remat

    def __call__(self, x: Float[Array, "b n d"], *others: Any) -> Float[Array, "b n d"]:
        return fold.fold(self.blocks, lambda block, x, _: (block(x, *others)[0], None), x, remat=self.remat)[0]

    def step(self, x: Float[Array, "b t d"], *others: Any, cache: Any) -> tuple[Float[Array, "b t d"], Any]:
        """The same for t more positions of every row, with what earlier ones left in the cache.

        Padding (a segment below 0) may stand anywhere; it is not written.
        """
        if isinstance(self.blocks, fold.Scanned):
            graph, params = nnx.split(self.blocks.each)
            return jax.lax.scan(lambda x, layer: nnx.merge(graph, layer[0])(x, *others, layer[1]), x, (params, cache))
        caches = []
        for block, kept in zip(self.blocks, cache, strict=True):
            x, kept = block(x, *others, kept)
            caches.append(kept)
        return x, caches

    def cache(self, batch: int, size: int) -> Any:
        """Room for `size` positions of every row, in every block."""
        if not isinstance(self.blocks, fold.Scanned):
            return [block.cache(batch, size) for block in self.blocks]
        stacked = lambda leaf: jnp.zeros((len(self.blocks), *leaf.shape), leaf.dtype)
        return jax.tree.map(stacked, self.blocks.each.cache(batch, size))


def llama(c: DecoderConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs) -> Stack:
    """The stack of blocks that a config describes."""
    return Stack([Block(c, dtype=dtype, rngs=rngs) for _ in range(c.depth)], scan=c.scan, remat=c.remat)


class ByteDecoder(nnx.Module):
    """A plain causal language model over bytes.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from models.decoder import ByteDecoder, DecoderConfig
      >>> model = ByteDecoder(DecoderConfig(width=16, depth=1, num_heads=2, d_ff=32), rngs=nnx.Rngs(0))
      >>> model(jnp.array([[72, 101, 108]])).shape
      (1, 3, 256)
    """

    def __init__(self, c: DecoderConfig, *, vocab_size: int = 256, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (vocab_size, c.width)))
        self.stack = llama(c, dtype=dtype, rngs=rngs)
        self.norm = RMSNorm(c.width, dtype=jnp.float32, epsilon=c.epsilon)
        self.head = linear(c.width, vocab_size, c, jnp.float32, rngs)

    def __call__(self, ids: Int[Array, "b n"], docs: Int[Array, "b n"] | None = None) -> Float[Array, "b n v"]:
        """Logits for the byte after each. `docs`: which document each byte is of; negative for padding."""
        docs = jnp.zeros_like(ids) if docs is None else docs
        return self.head(self.norm(self.stack(lookup(self.embedding[...], ids), places(docs))))

    def step(self, ids: Int[Array, "b t"], at: Places, cache: Any) -> tuple[Float[Array, "b t v"], Any]:
        """The same with a cache, from `model.stack.cache(batch, size)`."""
        x, cache = self.stack.step(lookup(self.embedding[...], ids), at, cache=cache)
        return self.head(self.norm(x)), cache


def loss(
    model: ByteDecoder, ids: Int[Array, "b n"], docs: Int[Array, "b n"] | None = None, *, rngs: nnx.Rngs | None = None
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean nats per byte, of every byte but the first of its document. Nothing here is random: `rngs` is not read."""
    docs = jnp.zeros_like(ids) if docs is None else docs
    ce = next_byte(model(ids, docs), ids, docs)
    return ce, {"ce": ce}


def next_byte(logits: Float[Array, "b n v"], ids: Int[Array, "b n"], docs: Int[Array, "b n"]) -> Float[Array, ""]:
    """Mean nats of the byte after each, where that is of the same document."""
    scored = (docs[:, 1:] >= 0) & (docs[:, 1:] == docs[:, :-1])
    return words.masked_mean(nats(logits[:, :-1], jnp.where(scored, ids[:, 1:], 0)), scored)


def nats(logits: Float[Array, "b n v"], targets: Int[Array, "b n"]) -> Float[Array, "b n"]:
    """-log p(target)."""
    picked = jnp.sum(jnp.where(jax.nn.one_hot(targets, logits.shape[-1], dtype=bool), logits, 0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - picked


def attend(
    q: Float[Array, "... t h d"],
    k: Float[Array, "... s g d"],
    v: Float[Array, "... s g d"],
    seen: Bool[Array, "... t s"],
    *,
    softcap: float | None,
) -> Float[Array, "... t h d"]:
    """softmax(q k / sqrt(d)) v over what is seen; query heads share key heads in order."""
    *batch, t, h, d = q.shape
    g = k.shape[-2]
    scores = jnp.einsum("...tgrd,...sgd->...grts", q.reshape(*batch, t, g, h // g, d), k, preferred_element_type=jnp.float32)
    scores = scores * d**-0.5
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    weights = jax.nn.softmax(jnp.where(seen[..., None, None, :, :], scores, MASKED), axis=-1)
    return jnp.einsum("...grts,...sgd->...tgrd", weights.astype(v.dtype), v).reshape(q.shape)


def whole(q: Array, k: Array, v: Array, at: Places, c: DecoderConfig) -> Float[Array, "b n h d"]:
    """`attend` over the whole row, some queries at a time where the config says how many."""

    def some(q, position, segment):
        seen = visible(position, at.position, causal=c.causal, window=c.window)
        seen &= segment[:, :, None] == at.segment[:, None, :]
        return attend(q, k, v, seen, softcap=c.softcap)

    n, size = q.shape[1], c.block_size
    if size is None or size >= n:
        return some(q, at.position, at.segment)

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, -n % size)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    out = jax.lax.map(lambda block: jax.checkpoint(some)(*block), (cut(q), cut(at.position), cut(at.segment)))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], -1, *q.shape[2:])[:, :n]


def banded(q: Array, k: Array, v: Array, at: Places, c: DecoderConfig) -> Float[Array, "b n h d"]:
    """`attend` within a window: a block of queries meets the blocks of keys in reach, and no others."""
    n, size = q.shape[1], min(c.window or 1, BLOCK)
    count, back = -(-n // size), -(-(c.window or 1) // size)
    forth = 0 if c.causal else back

    def cut(x, fill, before, after):
        pad = [(0, 0), (before * size, (count + after) * size - n)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, pad, constant_values=fill).reshape(x.shape[0], -1, size, *x.shape[2:])

    def reach(x, fill):
        blocks = cut(x, fill, back, forth)
        return jnp.concatenate([blocks[:, i : i + count] for i in range(back + 1 + forth)], axis=2)

    segment, position = cut(at.segment, -1, 0, 0), cut(at.position, 0, 0, 0)
    seen = visible(position, reach(at.position, 0), causal=c.causal, window=c.window)
    seen &= segment[..., :, None] == reach(at.segment, -2)[..., None, :]
    out = attend(cut(q, 0, 0, 0), reach(k, 0), reach(v, 0), seen, softcap=c.softcap)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :n]


def visible(
    queries: Int[Array, "... t"], keys: Int[Array, "... s"], *, causal: bool, window: int | None
) -> Bool[Array, "... t s"]:
    """Which positions see which, segments apart."""
    back = queries[..., :, None] - keys[..., None, :]
    seen = back >= 0 if causal else jnp.ones_like(back, bool)
    return seen if window is None else seen & (jnp.abs(back) <= window)


def write(slots: Float[Array, "b s g d"], x: Float[Array, "b t g d"], at: Places) -> Float[Array, "b s g d"]:
    """x into the slots of its positions; padding is dropped."""
    where = jnp.where(at.segment >= 0, at.position, slots.shape[1])
    return jax.vmap(lambda slots, x, i: slots.at[i].set(x, mode="drop"))(slots, x.astype(slots.dtype), where)


def rope(x: Float[Array, "b n h d"], position: Int[Array, "b n"], c: DecoderConfig) -> Float[Array, "b n h d"]:
    """Turn feature i with i + half of those that turn, by an angle that grows with the position."""
    half = c.turning // 2
    if not half:
        return x
    angle = position.astype(jnp.float32)[..., None, None] * frequencies(c).reshape(1, 1, 1, half)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b, rest = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(x.dtype)


def frequencies(c: DecoderConfig) -> Float[Array, "half"]:
    """theta^(-2i / d), the slow ones divided by the scaling's factor, with a smooth passage between."""
    frequency = c.rope_theta ** (-jnp.arange(0, c.turning, 2, dtype=jnp.float32) / c.turning)
    if (s := c.rope_scaling) is None:
        return frequency
    turns = s.original_length * frequency / (2 * math.pi)  # in the length it was trained on
    smooth = jnp.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0, 1)
    return frequency * ((1 - smooth) / s.factor + smooth)


def linear(d_in: int, d_out: int, c: DecoderConfig, dtype: Any, rngs: nnx.Rngs, *, residual: bool = False) -> nnx.Linear:
    """A projection without bias, initialised as the config says."""
    std = d_in**-0.5 if c.init_std is None else c.init_std
    if residual:
        std *= (2 * c.depth if c.num_residuals is None else c.num_residuals) ** -0.5
    return nnx.Linear(d_in, d_out, use_bias=False, dtype=dtype, kernel_init=nnx.initializers.normal(std), rngs=rngs)
