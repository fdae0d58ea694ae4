"""Byte latent transformer: patches of bytes, as long as their bytes are easy to guess.

A local encoder reads bytes and the n-grams that end at them; a few queries per patch attend to its own bytes; a global
transformer reads patches; a local decoder goes on from the encoder's bytes, each attending to what the global one says of the
patch that its next byte belongs to.

    entropy = jm.words.byte_entropy(small(ids, docs))                      a small byte model, e.g. `models.decoder.ByteDecoder`
    starts = jm.words.entropy_starts(entropy, threshold=1.3, documents=docs)
    total, metrics = loss(model, ids, starts, docs, capacity=512)

Differs from the official code: there the residual of each cross-attention is added twice; here once.

Source: BLT (arXiv:2412.09871).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

import jaxmerge as jm
from models.decoder import Block, Cache, DecoderConfig, Places, RMSNorm, Stack, linear, llama, nats, places
from models.t5 import lookup

OFFSET = 4
"""Byte b is b + 4 in BLT's tables; BOE, BOS, EOS and BPE come before."""


@dataclasses.dataclass(frozen=True)
class BLTConfig:
    """The architecture.

    Attributes:
      encoder, decoder: of equal width, with a window.
      backbone: over patches.
      queries: per patch, and states that the decoder reads of each.
      cross_heads: of the attention between bytes and patches.
      ngrams: sizes of n-grams that have embeddings.
      rows: of each n-gram's table.
      functions: hash functions, each with a table per size.
    """

    encoder: DecoderConfig
    backbone: DecoderConfig
    decoder: DecoderConfig
    queries: int = 2
    cross_heads: int = 16
    ngrams: tuple[int, ...] = (3, 4, 5, 6, 7, 8)
    rows: int = 500_002
    functions: int = 1

    def __post_init__(self):
        if self.encoder.width != self.decoder.width:
            raise ValueError(
                f"BLTConfig: the decoder goes on from the encoder's states; widths {self.encoder.width} and "
                f"{self.decoder.width} must be one."
            )
        if self.encoder.width % self.cross_heads:
            raise ValueError(
                f"BLTConfig: cross_heads {self.cross_heads} must divide the local models' width {self.encoder.width}."
            )


class Cross(nnx.Module):
    """Attention between bytes and patches, without positions; what it adds is normed first, on both sides."""

    def __init__(self, c: BLTConfig, stack: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs):
        width = stack.width
        self.query_norm, self.key_norm = (RMSNorm(width, dtype=dtype, epsilon=stack.epsilon) for _ in range(2))
        self.q, self.k, self.v = (linear(width, width, stack, dtype, rngs) for _ in range(3))
        self.o = linear(width, width, stack, dtype, rngs, residual=True)
        self.num_heads = c.cross_heads

    def heads(self, y: Float[Array, "... d"]) -> Float[Array, "... h f"]:
        return y.reshape(*y.shape[:-1], self.num_heads, -1)

    def pool(self, patches: Float[Array, "b m k d"], x: Float[Array, "b n d"], plan: jm.Plan) -> Float[Array, "b m k d"]:
        """The queries of each patch attend to its own bytes: a softmax over each segment, and no (n, m) in memory."""
        x = self.key_norm(x)
        q, k, v = self.heads(self.q(self.query_norm(patches))), self.heads(self.k(x)), self.heads(self.v(x))
        told = jm.unmerge(plan, q)
        scores = jnp.einsum("bnkhf,bnhf->bnkh", told, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        top = jm.unmerge(plan, jm.merge(plan, jax.lax.stop_gradient(scores), reduce="max"))
        weight = jnp.exp(scores - top)[..., None]
        mass = jm.merge(plan, weight, reduce="sum")
        sums = jm.merge(plan, weight * v[:, :, None].astype(jnp.float32), reduce="sum")
        out = sums / jnp.where(mass > 0, mass, 1)
        return self.o(out.reshape(*patches.shape).astype(v.dtype)).astype(jnp.float32)

    def read(self, x: Float[Array, "b n d"], patches: Float[Array, "b m k d"], plan: jm.Plan) -> Float[Array, "b n d"]:
        """Each byte attends to the states of the one patch that the plan names; to none where it names none."""
        states = self.key_norm(patches)
        q, k, v = self.heads(self.q(self.query_norm(x))), self.heads(self.k(states)), self.heads(self.v(states))
        k, v = jm.unmerge(plan, k), jm.unmerge(plan, v)
        scores = jnp.einsum("bnhf,bnkhf->bnkh", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        weight = jax.nn.softmax(scores, axis=2).astype(v.dtype)
        return self.o(jnp.einsum("bnkh,bnkhf->bnhf", weight, v).reshape(x.shape)).astype(jnp.float32)


class ReadingBlock(nnx.Module):
    """The local decoder's: attend to a patch, then a block over the bytes."""

    def __init__(self, c: BLTConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.cross = Cross(c, c.decoder, dtype=dtype, rngs=rngs)
        self.block = Block(c.decoder, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b n d"], at: Places, patches: Float[Array, "b m k d"], plan: jm.Plan, cache: Cache | None = None
    ) -> tuple[Float[Array, "b n d"], Cache | None]:
        return self.block(x + self.cross.read(x, patches, plan), at, cache)


class BLT(nnx.Module):
    """The model.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from models.decoder import DecoderConfig
      >>> from models.blt import BLT, BLTConfig
      >>> local = DecoderConfig(16, 1, 2, 32, window=8)
      >>> config = BLTConfig(local, DecoderConfig(24, 1, 2, 32), local, cross_heads=2, ngrams=(3,), rows=100)
      >>> model = BLT(config, rngs=nnx.Rngs(0))
      >>> run = nnx.jit(BLT.__call__, static_argnames="capacity")
      >>> run(model, jnp.arange(6)[None], jnp.array([[1, 0, 0, 1, 0, 0]], bool), capacity=4).shape
      (1, 6, 260)
    """

    def __init__(self, c: BLTConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        width, normal = c.encoder.width, lambda rows: jax.random.normal(rngs.params(), (rows, c.encoder.width))
        self.embedding = nnx.Param(normal(256 + OFFSET))
        tables = range(len(c.ngrams) * c.functions)
        self.tables = nnx.List([nnx.Param(normal(c.rows) * (len(tables) + 1) ** -0.5) for _ in tables])
        self.encoder = llama(c.encoder, dtype=dtype, rngs=rngs)
        self.spread = linear(width, c.queries * width, c.encoder, dtype, rngs)
        self.pool = Cross(c, c.encoder, dtype=dtype, rngs=rngs)
        self.to_backbone = linear(c.queries * width, c.backbone.width, c.backbone, dtype, rngs)
        self.backbone = llama(c.backbone, dtype=dtype, rngs=rngs)
        self.from_backbone = linear(c.backbone.width, c.queries * width, c.decoder, dtype, rngs)
        blocks = [ReadingBlock(c, dtype=dtype, rngs=rngs) for _ in range(c.decoder.depth)]
        self.decoder = Stack(blocks, scan=c.decoder.scan, remat=c.decoder.remat)
        self.norm = RMSNorm(width, dtype=jnp.float32, epsilon=c.decoder.epsilon)
        self.head = linear(width, 256 + OFFSET, c.decoder, jnp.float32, rngs)
        self.c, self.dtype = c, dtype

    def embed(self, ids: Int[Array, "b n"], docs: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        """A byte's own embedding and those of the n-grams that end with it."""
        ids = ids + OFFSET
        x = lookup(self.embedding[...], ids)
        kinds = [(function, size) for function in range(self.c.functions) for size in self.c.ngrams]
        for table, (function, size) in zip(self.tables, kinds, strict=True):
            at = jm.words.ngram_hash(ids, size, self.c.rows, function=function, documents=docs)
            x = x + lookup(table[...], at)
        return x

    def __call__(
        self,
        ids: Int[Array, "b n"],
        starts: Bool[Array, "b n"],
        docs: Int[Array, "b n"] | None = None,
        *,
        capacity: int | None = None,
    ) -> Float[Array, "b n v"]:
        """Logits for the byte after each, of BLT's numbering (byte + 4); arguments as in `loss`."""
        docs = jnp.zeros_like(ids) if docs is None else docs
        at, plan = places(docs), patches(starts, docs, capacity)
        b, m, k = len(ids), plan.num_segments, self.c.queries
        x = self.encoder(self.embed(ids, docs), at)
        first = self.spread(jm.merge(plan, x, reduce="max").astype(self.dtype)) * (plan.sizes > 0)[..., None]
        pooled = first.astype(jnp.float32).reshape(b, m, k, -1)
        pooled = pooled + self.pool.pool(pooled, x, plan)
        patch_docs = jnp.where(plan.sizes > 0, jm.merge(plan, docs, reduce="first"), -1)
        y = self.to_backbone(pooled.reshape(b, m, -1).astype(self.dtype)).astype(jnp.float32)
        y = self.from_backbone(self.backbone(y, places(patch_docs)).astype(self.dtype))
        x = self.decoder(x, at, y.reshape(b, m, k, -1).astype(jnp.float32), next_patch(plan))
        return self.head(self.norm(x))


def patches(starts: Bool[Array, "b n"], docs: Int[Array, "b n"], capacity: int | None = None) -> jm.Plan:
    """Bytes to patches. The first byte of a document is a patch of its own, so that every other has a patch before it."""
    place = places(docs).position
    room = starts.shape[1] if capacity is None else capacity
    return jm.words.segments(starts | (place <= 1), room, mask=docs >= 0)


def next_patch(plan: jm.Plan) -> jm.Plan:
    """For each byte the patch that is complete when its next byte is to be guessed: the one before the next byte's own."""
    ids = plan.segment_ids
    return jm.Plan(jnp.concatenate([ids[:, 1:], ids[:, -1:]], axis=1) - 1, plan.num_segments)


def loss(
    model: BLT,
    ids: Int[Array, "b n"],
    starts: Bool[Array, "b n"],
    docs: Int[Array, "b n"] | None = None,
    *,
    capacity: int | None = None,
    rngs: nnx.Rngs | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean nats per byte, of every byte but the first of its document, and metrics.

    Args:
      ids: bytes 0 to 255 (and -3 and -2, BLT's marks for the beginning and end of a text).
      starts: where patches begin, e.g. from `jm.words.entropy_starts`.
      docs: which document each byte is of, negative for padding; no document sees another.
      capacity: room for patches in a row. What did not fit is not scored, and counted.
      rngs: nothing here is random; it is taken as every family's loss takes it.

    Returns:
      The loss, and: "ce", the same; "rate", the share of positions that the global transformer is spared; "overflow".
    """
    docs = jnp.zeros_like(ids) if docs is None else docs
    plan = patches(starts, docs, capacity)
    logits = model(ids, starts, docs, capacity=capacity)
    kept = jnp.where(plan.kept, docs, -1)
    scored = (kept[:, 1:] >= 0) & (kept[:, 1:] == kept[:, :-1])
    ce = jm.words.masked_mean(nats(logits[:, :-1], jnp.where(scored, ids[:, 1:] + OFFSET, 0)), scored)
    spared = 1 - jnp.sum(plan.sizes > 0) / jnp.maximum(jnp.sum(plan.kept), 1)
    return ce, {"ce": ce, "rate": spared, "overflow": jnp.sum(plan.overflow)}
