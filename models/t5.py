"""T5 v1.1 and ByT5: an encoder-decoder over ids, read top to bottom.

Pre-RMSNorm, no biases, gated GELU, attention without 1/sqrt(d), relative position bias in the first block of each stack and
shared by the later ones, an untied head. Parameters are float32; `dtype` is the compute dtype, while the residual stream,
softmax, norms and logits stay in float32.

Sources: T5 (arXiv:1910.10683), ByT5 (arXiv:2105.13626).
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Int

from jaxmerge import words
from jaxmerge.attention import MASKED, key_bias
from models.fold import fold, stack

BlockSize = int | Literal["auto"] | None


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The architecture. The defaults are ByT5's where its sizes agree."""

    d_model: int = 1472
    d_kv: int = 64
    d_ff: int = 3584
    num_heads: int = 6
    num_layers: int = 12
    num_decoder_layers: int = 4
    vocab_size: int = words.SIZE
    num_buckets: int = 32
    max_distance: int = 128
    softmax1: bool = False
    dropout: float = 0.1


VARIANTS = {  # table 1 of the ByT5 paper; heads from T5 v1.1
    "small": T5Config(1472, 64, 3584, 6, 12, 4),
    "base": T5Config(1536, 64, 3968, 12, 18, 6),
    "large": T5Config(1536, 64, 3840, 16, 36, 12),
    "xl": T5Config(2560, 64, 6720, 32, 36, 12),
    "xxl": T5Config(4672, 64, 12352, 64, 36, 12),
}


class Encoded(NamedTuple):
    """What the encoder hands to the decoder, and what losses and pictures ask for."""

    states: Float[Array, "b m d"]
    key_bias: Float[Array, "b m"]
    hidden: tuple[Array, ...]
    """The residual stream after the embedding and after each block, the last one normed."""
    excess: Float[Array, ""]
    """Mean by which attention scores exceed 5, over blocks: see `score_penalty` in the MrT5 recipe."""


class Decoded(NamedTuple):
    logits: Float[Array, "b t v"]
    hidden: tuple[Array, ...]
    excess: Float[Array, ""]


class RMSNorm(nnx.Module):
    """x / rms(x) · scale, in float32."""

    def __init__(self, d: int, *, dtype: Any, epsilon: float = 1e-6):
        self.scale = nnx.Param(jnp.ones(d))
        self.dtype, self.epsilon = dtype, epsilon

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return (x * self.scale[...].reshape(1, 1, -1)).astype(self.dtype)


class Relative(NamedTuple):
    """A position bias that is computed a block of queries at a time: what stands in for it where it does not fit in memory."""

    rows: Callable[[Array], Array]
    """(one, r) positions of queries to their (one, h, r, s) bias."""
    queries: Int[Array, "one t"]


class Attention(nnx.Module):
    """Multi-head attention; the scores are not scaled, the initialisation is.

    With a `block_size`, the scores of that many queries are in memory at once and are computed again on the way back.
    """

    def __init__(self, c: T5Config, *, dtype: Any, block_size: BlockSize = None, rngs: nnx.Rngs):
        inner = c.num_heads * c.d_kv
        self.q = _linear(c.d_model, inner, (c.d_model * c.d_kv) ** -0.5, dtype, rngs)
        self.k = _linear(c.d_model, inner, c.d_model**-0.5, dtype, rngs)
        self.v = _linear(c.d_model, inner, c.d_model**-0.5, dtype, rngs)
        self.o = _linear(inner, c.d_model, inner**-0.5, dtype, rngs)
        self.num_heads, self.softmax1, self.dropout = c.num_heads, c.softmax1, c.dropout
        self.block_size: BlockSize = block_size

    def heads(self, x: Float[Array, "b n hk"]) -> Float[Array, "b n h k"]:
        return x.reshape(*x.shape[:-1], self.num_heads, -1)

    def keys_values(self, memory: Float[Array, "b s d"]) -> tuple[Float[Array, "b s h k"], Float[Array, "b s h k"]]:
        return self.heads(self.k(memory)), self.heads(self.v(memory))

    def __call__(
        self,
        x: Float[Array, "b t d"],
        keys_values: tuple[Float[Array, "b s h k"], Float[Array, "b s h k"]],
        *,
        key_bias: Float[Array, "b s"] | None = None,
        position_bias: Float[Array, "one h t s"] | Relative | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "b t d"], Float[Array, ""]]:
        """The result, and the mean excess of the scores over 5 before the keys' bias is added (masked keys count as 0)."""
        q, (k, v) = self.heads(self.q(x)), keys_values
        t, scores = q.shape[1], q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1]
        size = query_block(self.block_size, t, scores)
        if size < t:
            out, excess = self._in_blocks(size, q, k, v, key_bias=key_bias, position_bias=position_bias, rngs=rngs)
        else:
            bias = position_bias.rows(position_bias.queries) if isinstance(position_bias, Relative) else position_bias
            out, excess = self._attend(q, k, v, key_bias=key_bias, position_bias=bias, rngs=rngs)
        return self.o(out.reshape(*x.shape[:-1], -1)), jnp.sum(excess) / scores

    def _attend(self, q, k, v, *, key_bias, position_bias, rngs) -> tuple[Float[Array, "b t h k"], Float[Array, "b t"]]:
        scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
        if position_bias is not None:
            scores = scores + position_bias
        excess = jax.nn.relu(scores - 5.0)
        if key_bias is not None:
            scores = scores + key_bias[:, None, None, :]
            excess = jnp.where(key_bias[:, None, None, :] > MASKED / 2, excess, 0.0)
        weights = words.softmax1(scores) if self.softmax1 else jax.nn.softmax(scores, axis=-1)
        weights = dropout(weights.astype(v.dtype), self.dropout, rngs)
        return jnp.einsum("bhts,bshd->bthd", weights, v), jnp.sum(excess, axis=(1, 3))

    def _in_blocks(self, size, q, k, v, *, key_bias, position_bias, rngs):
        t = q.shape[1]
        blocks = -(-t // size)
        cut = lambda x: jnp.pad(x, ((0, 0), (0, blocks * size - t), *((0, 0),) * (x.ndim - 2)))
        cut_up = lambda x: jnp.moveaxis(cut(x).reshape(x.shape[0], blocks, size, *x.shape[2:]), 1, 0)
        queries = cut_up(position_bias.queries) if isinstance(position_bias, Relative) else None
        keys = None if rngs is None else jax.random.split(rngs.dropout(), blocks)

        @jax.checkpoint
        def one(block):
            q, queries, key = block
            bias = None if queries is None else position_bias.rows(queries)
            return self._attend(
                q, k, v, key_bias=key_bias, position_bias=bias, rngs=None if key is None else nnx.Rngs(dropout=key)
            )

        out, excess = jax.lax.map(one, (cut_up(q), queries, keys))
        join = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], blocks * size, *x.shape[3:])[:, :t]
        return join(out), join(excess)


class FeedForward(nnx.Module):
    """wo(gelu(wi_0 x) · wi_1 x)."""

    def __init__(self, c: T5Config, *, dtype: Any, rngs: nnx.Rngs):
        self.wi_0 = _linear(c.d_model, c.d_ff, c.d_model**-0.5, dtype, rngs)
        self.wi_1 = _linear(c.d_model, c.d_ff, c.d_model**-0.5, dtype, rngs)
        self.wo = _linear(c.d_ff, c.d_model, c.d_ff**-0.5, dtype, rngs)
        self.dropout = c.dropout

    def __call__(self, x: Float[Array, "b n d"], rngs: nnx.Rngs | None = None) -> Float[Array, "b n d"]:
        return self.wo(dropout(nnx.gelu(self.wi_0(x), approximate=True) * self.wi_1(x), self.dropout, rngs))


class Block(nnx.Module):
    """Self-attention, then (in a decoder) attention to the encoder, then feed-forward, each normed and added."""

    def __init__(self, c: T5Config, *, decoder: bool, dtype: Any, block_size: BlockSize = None, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(c.d_model, dtype=dtype)
        self.attention = Attention(c, dtype=dtype, block_size=block_size, rngs=rngs)
        if decoder:
            self.cross_norm = RMSNorm(c.d_model, dtype=dtype)
            self.cross = Attention(c, dtype=dtype, block_size=block_size, rngs=rngs)
        self.ffn_norm = RMSNorm(c.d_model, dtype=dtype)
        self.ffn = FeedForward(c, dtype=dtype, rngs=rngs)
        self.dropout, self.dtype = c.dropout, dtype

    def __call__(
        self,
        x: Float[Array, "b n d"],
        *,
        position_bias: Float[Array, "one h n s"] | Relative,
        key_bias: Float[Array, "b s"] | None = None,
        memory: tuple[Float[Array, "b m d"], Float[Array, "b m"]] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "b n d"], Float[Array, ""]]:
        h = self.attention_norm(x)
        y, excess = self.attention(h, self.attention.keys_values(h), key_bias=key_bias, position_bias=position_bias, rngs=rngs)
        x = self.add(x, y, rngs)
        if memory is not None:
            states, bias = memory
            pair = self.cross.keys_values(states.astype(self.dtype))
            y, excess = self.cross(self.cross_norm(x), pair, key_bias=bias, rngs=rngs)
            x = self.add(x, y, rngs)
        return self.add(x, self.ffn(self.ffn_norm(x), rngs), rngs), excess

    def add(self, x: Float[Array, "b n d"], y: Float[Array, "b n d"], rngs: nnx.Rngs | None = None) -> Float[Array, "b n d"]:
        """Onto the residual stream, which is float32."""
        return x + dropout(y, self.dropout, rngs).astype(jnp.float32)


class Stack(nnx.Module):
    """The encoder or the decoder: blocks, the position bias they share, and the last norm. `cross`: it reads an encoder."""

    def __init__(
        self,
        c: T5Config,
        *,
        decoder: bool,
        cross: bool = True,
        dtype: Any,
        scan: bool = False,
        remat: str | None = None,
        block_size: BlockSize = None,
        rngs: nnx.Rngs,
    ):
        depth = c.num_decoder_layers if decoder else c.num_layers
        make = lambda: Block(c, decoder=decoder and cross, dtype=dtype, block_size=block_size, rngs=rngs)
        self.blocks = stack([make() for _ in range(depth)], scan=scan)
        self.position = nnx.Param(jax.random.normal(rngs.params(), (c.num_buckets, c.num_heads)) * c.d_model**-0.5)
        self.norm = RMSNorm(c.d_model, dtype=dtype)
        self.decoder, self.max_distance, self.dropout = decoder, c.max_distance, c.dropout
        self.shape, self.remat, self.block_size = c, remat, block_size

    def position_bias(
        self,
        positions: Int[Array, "one n"],
        keys: Int[Array, "one s"] | None = None,
        *,
        table: Float[Array, "buckets h"] | None = None,
    ) -> Float[Array, "one h n s"]:
        """The bias between tokens that stand at `positions` of the text, one row per example or one for all.

        A decoder's queries see no later key. `keys`: where the keys stand, if elsewhere than the queries. `table`: the
        parameter, if it comes from elsewhere.
        """
        table = jnp.asarray(self.position[...] if table is None else table)
        keys = positions if keys is None else keys
        distance = keys[:, None, :] - positions[:, :, None]
        buckets = relative_buckets(distance, num_buckets=table.shape[0], max_distance=self.max_distance, causal=self.decoder)
        bias = jnp.moveaxis(lookup(table, buckets), -1, 1)
        return jnp.where(distance[:, None] <= 0, bias, MASKED) if self.decoder else bias

    def __call__(
        self,
        x: Float[Array, "b n d"],
        *,
        positions: Int[Array, "one n"] | None = None,
        start: int = 0,
        stop: int | None = None,
        key_bias: Float[Array, "b n"] | None = None,
        memory: tuple[Float[Array, "b m d"], Float[Array, "b m"]] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[list[Float[Array, "b n d"]], list[Float[Array, ""]]]:
        """The residual stream after each block from `start` to before `stop`, and each block's excess of scores over 5."""
        positions = jnp.arange(x.shape[1])[None] if positions is None else positions
        depth = len(self.blocks)
        keys = None if rngs is None else jax.random.split(rngs.dropout(), depth)
        every = place = None
        if self.block_size is None:
            every = self.position_bias(positions)  # once for all layers
        else:  # handed to each layer: what does not change from layer to layer, a scan would compute once and keep
            place = jax.tree.map(lambda a: jnp.broadcast_to(a, (depth, *a.shape)), (positions, self.position[...]))

        def one(block, x, given):
            key, place = given
            rngs = None if key is None else nnx.Rngs(dropout=key)
            bias: Any = every
            if place is not None:
                at, table = place
                bias = Relative(lambda queries: self.position_bias(queries, at, table=table), at)
            x, excess = block(x, position_bias=bias, key_bias=key_bias, memory=memory, rngs=rngs)
            return x, (x, excess)

        _, seen = fold(self.blocks, one, x, (keys, place), start=start, stop=stop, remat=self.remat)
        return [h for h, _ in seen], [e for _, e in seen]

    def last(self, x: Float[Array, "b n d"], rngs: nnx.Rngs | None = None) -> Float[Array, "b n d"]:
        """What leaves the stack: the residual stream, normed."""
        return dropout(self.norm(x), self.dropout, rngs)


class T5(nnx.Module):
    """The model. `T5(VARIANTS["small"], rngs=nnx.Rngs(0))`.

    Args:
      c: the architecture.
      dtype: what matrices are multiplied in.
      scan: keep the blocks stacked and scan over them, so that compile time does not grow with depth; the parameters are the
        same numbers, and `models.load` reads and writes either form.
      remat: what the backward pass finds in memory: None (all), "dots", "full" (nothing), or a name of
        `jax.checkpoint_policies`.
      block_size: how many queries attend at once. None: all, with scores of (b, h, n, n) in memory. "auto": so many that the
        scores in memory stay below 256 MiB. The result is the same.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> from flax import nnx
      >>> from models.t5 import T5, T5Config
      >>> model = T5(T5Config(d_model=16, d_kv=4, d_ff=32, num_heads=2, num_layers=2, num_decoder_layers=1), rngs=nnx.Rngs(0))
      >>> encoded = nnx.jit(T5.encode)(model, jnp.asarray(jm.words.to_ids("Hello"))[None])
      >>> nnx.jit(T5.decode)(model, jnp.zeros((1, 1), int), encoded.states, encoded.key_bias).logits.shape
      (1, 1, 384)
    """

    def __init__(
        self,
        c: T5Config,
        *,
        dtype: Any = jnp.float32,
        scan: bool = False,
        remat: str | None = None,
        block_size: BlockSize = None,
        rngs: nnx.Rngs,
    ):
        how: Any = dict(dtype=dtype, scan=scan, remat=remat, block_size=block_size, rngs=rngs)
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (c.vocab_size, c.d_model)))
        self.encoder = Stack(c, decoder=False, **how)
        self.decoder = Stack(c, decoder=True, **how)
        self.head = _linear(c.d_model, c.vocab_size, c.d_model**-0.5, jnp.float32, rngs)
        self.dropout = c.dropout

    def embed(self, ids: Int[Array, "b n"], rngs: nnx.Rngs | None = None) -> Float[Array, "b n d"]:
        return dropout(lookup(self.embedding[...], ids), self.dropout, rngs)

    def encode(
        self, ids: Int[Array, "b n"], mask: Bool[Array, "b n"] | None = None, *, rngs: nnx.Rngs | None = None
    ) -> Encoded:
        """States for the decoder to read. `mask` is True where there is a byte; without it, where the id is not padding."""
        bias, x = key_bias(mask=ids != words.PAD if mask is None else mask), self.embed(ids, rngs)
        hidden, excess = self.encoder(x, key_bias=bias, rngs=rngs)
        states = self.encoder.last(hidden[-1], rngs)
        return Encoded(states, bias, (x, *hidden[:-1], states), jnp.mean(jnp.stack(excess)))

    def decode(
        self,
        ids: Int[Array, "b t"],
        states: Float[Array, "b m d"],
        key_bias: Float[Array, "b m"],
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Decoded:
        """Logits for the id after each of `ids`. The keys' bias says what each state weighs: padding, deletion, size."""
        x = self.embed(ids, rngs)
        hidden, excess = self.decoder(x, memory=(states, key_bias), rngs=rngs)
        last = self.decoder.last(hidden[-1], rngs)
        return Decoded(self.head(last.astype(jnp.float32)), (x, *hidden[:-1], last), jnp.mean(jnp.stack(excess)))


def query_block(block_size: BlockSize, queries: int, scores: int) -> int:
    """How many queries attend at once. "auto": as many, a power of two from 16 up, as leave at most 2^26 scores in memory."""
    if block_size is None:
        return queries
    if block_size != "auto":
        if block_size < 1:
            raise ValueError(f'query_block: block_size must be 1 or more, "auto" or None for all queries; got {block_size}.')
        return min(block_size, queries)
    size = 1 << max((2**26 * queries // max(scores, 1)).bit_length() - 1, 4)
    return min(size, queries)


def relative_buckets(distance: Int[Array, "..."], *, num_buckets: int, max_distance: int, causal: bool) -> Int[Array, "..."]:
    """The bucket of each distance (key minus query): one each for short ones, logarithmic up to `max_distance`.

    Edges are found in whole numbers on the host: a logarithm rounds differently from one accelerator to the next.
    """
    half = num_buckets if causal else num_buckets // 2
    exact = half // 2
    far = half - exact
    # The first distance of bucket exact + j is the least d with d >= exact · (max_distance / exact)^(j / far).
    edges = [d for d in range(1, exact + 1)]
    for j in range(1, far):
        least = exact**far * max_distance**j
        edges.append(next(d for d in range(edges[-1], max_distance + 1) if d**far * exact**j >= least))
    size = jnp.maximum(-distance, 0) if causal else jnp.abs(distance)
    bucket = jnp.zeros_like(size)
    for edge in edges:
        bucket = bucket + (size >= edge)
    return bucket if causal else bucket + jnp.where(distance > 0, half, 0)


def lookup(table: Float[Array, "v d"], ids: Int[Array, "*batch"]) -> Float[Array, "*batch d"]:
    """table[ids], laid out as the ids are where axes are Explicit."""
    layout = getattr(jax.typeof(ids).sharding, "spec", ())
    return table.at[ids].get(out_sharding=P(*layout, None) if any(axis is not None for axis in layout) else None)


def shift_right(labels: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """What the decoder reads to predict `labels`: a pad, then all but the last. Labels below 0 (not scored) become pads."""
    return jnp.pad(jnp.maximum(labels, 0)[:, :-1], ((0, 0), (1, 0)), constant_values=words.PAD)


def cross_entropy(logits: Float[Array, "b t v"], labels: Int[Array, "b t"]) -> Float[Array, ""]:
    """Mean nats per label; labels below 0 are not scored."""
    scored = labels >= 0
    picked = jnp.take_along_axis(logits, jnp.where(scored, labels, 0)[..., None], axis=-1)[..., 0]
    return words.masked_mean(jax.nn.logsumexp(logits, axis=-1) - picked, scored)


def dropout(x: Array, rate: float, rngs: nnx.Rngs | None) -> Array:
    """Dropout where `rngs` are given (training), nothing otherwise."""
    if rngs is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(rngs.dropout(), 1 - rate, x.shape), x / (1 - rate), jnp.zeros_like(x))


def torch_name(path: str) -> str:
    """The name that Hugging Face's T5 has for a parameter, for `models.load`."""
    fixed = {"embedding": "shared.weight", "head.kernel": "lm_head.weight"}
    if path in fixed:
        return fixed[path]
    stack, rest = path.split(".", 1)
    if rest == "position":
        return f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    if rest == "norm.scale":
        return f"{stack}.final_layer_norm.weight"
    found = re.fullmatch(r"blocks\.(\d+)\.(\w+?)(_norm)?\.(.+)", rest)
    if found is None:
        raise ValueError(f"torch_name: {path!r} is no parameter of T5.")
    block, part, norm, leaf = found.groups()
    layer = {"attention": 0, "cross": 1, "ffn": 2 if stack == "decoder" else 1}[part]
    inner = {"attention": "SelfAttention", "cross": "EncDecAttention", "ffn": "DenseReluDense"}[part]
    name = "layer_norm.weight" if norm else f"{inner}.{leaf.removesuffix('.kernel')}.weight"
    return f"{stack}.block.{block}.layer.{layer}.{name}"


ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
"""Names in published checkpoints that repeat `shared.weight`: `load(..., ignore=ALIASES)`."""


def _linear(d_in: int, d_out: int, std: float, dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
    init = nnx.initializers.normal(std)
    return nnx.Linear(d_in, d_out, use_bias=False, dtype=dtype, kernel_init=init, rngs=rngs)
