"""Learn your tokens: a word is pooled into a few learned tokens, a backbone reads those, a decoder spells the next word.

The paper's form of HAT with several marks before each word instead of one, each a backbone position of its own. What the
official code gets wrong is right here: nothing attends to padding, the loss is over real bytes (and the end of each word, in
the place of padding), and a long word is cut in two, not cut off.

    starts = jm.words.starts(text, rule="whitespace", max_bytes=config.max_word)
    total, metrics = loss(model, ids, starts, docs, capacity=128)

The layers are those of `models.decoder` (the paper's are GPT-2's and PyTorch's post-norm encoder, with learned positions).

Source: Learn Your Tokens (arXiv:2310.11628).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

import jaxmerge as jm
from models.decoder import DecoderConfig, Places, RMSNorm, linear, llama, nats
from models.hat import STOP, WORD, Stream, Words, read_words, with_marks
from models.t5 import lookup


@dataclasses.dataclass(frozen=True)
class ETokConfig:
    """The architecture. Encoder and decoder stay within a word, whatever they say; the paper has two layers in each."""

    encoder: DecoderConfig
    backbone: DecoderConfig
    decoder: DecoderConfig
    tokens: int = 4
    """Per word."""
    max_word: int = 20

    def __post_init__(self):
        if self.tokens < 1:
            raise ValueError(f"ETokConfig: tokens must be 1 or more per word, got {self.tokens}.")


class ETok(nnx.Module):
    """The model.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> from flax import nnx
      >>> from models.decoder import DecoderConfig
      >>> from models.etok import ETok, ETokConfig, loss
      >>> small = DecoderConfig(16, 1, 2, 32)
      >>> model = ETok(ETokConfig(small, DecoderConfig(24, 1, 2, 48), small, tokens=2), rngs=nnx.Rngs(0))
      >>> text = "Hello wide world"
      >>> ids, starts = jnp.array([list(text.encode())]), jnp.asarray(jm.words.starts(text, rule="whitespace"))[None]
      >>> total, metrics = nnx.jit(loss, static_argnames="capacity")(model, ids, starts, capacity=4)
      >>> round(float(metrics["rate"]), 3)  # 3 words, 2 tokens each, for 16 bytes
      0.625
    """

    def __init__(self, c: ETokConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        window = c.max_word + c.tokens - 1
        within = lambda stack, causal: dataclasses.replace(stack, causal=causal, window=window)
        encoder, backbone, decoder = within(c.encoder, False), c.backbone, within(c.decoder, True)
        normal = lambda *shape: nnx.Param(jax.random.normal(rngs.params(), shape))
        norm = lambda stack: RMSNorm(stack.width, dtype=dtype, epsilon=stack.epsilon)
        self.embedding, self.marks = normal(STOP + 1, encoder.width), normal(c.tokens, encoder.width)
        self.encoder, self.encoder_norm = llama(encoder, dtype=dtype, rngs=rngs), norm(encoder)
        self.to_backbone = linear(encoder.width, backbone.width, backbone, dtype, rngs)
        self.first = normal(c.tokens, backbone.width)
        self.backbone, self.backbone_norm = llama(backbone, dtype=dtype, rngs=rngs), norm(backbone)
        self.to_decoder = linear(backbone.width, decoder.width, decoder, dtype, rngs)
        self.decoder_embedding = normal(STOP + 1, decoder.width)
        self.decoder = llama(decoder, dtype=dtype, rngs=rngs)
        self.norm = RMSNorm(decoder.width, dtype=jnp.float32, epsilon=decoder.epsilon)
        self.head = linear(decoder.width, STOP + 1, decoder, jnp.float32, rngs)
        self.c = c

    def __call__(self, stream: Stream, words: Words) -> Float[Array, "b l v"]:
        """Logits for the symbol after each slot of the stream: a byte, the end of the word, or that of the text."""
        p, (b, m) = self.c.tokens, words.at.position.shape
        is_mark = stream.ids == WORD
        number = jnp.where(is_mark, p * stream.plan.segment_ids + stream.at.position, -1)
        tokens = jm.Plan(number, p * m)  # from marks to positions of the backbone
        mark = lookup(self.marks[...], jnp.where(is_mark, stream.at.position, 0))
        x = self.encoder(jnp.where(is_mark[..., None], mark, lookup(self.embedding[...], stream.ids)), stream.at)
        x = self.to_backbone(self.encoder_norm(jm.merge(tokens, x, reduce="first"))).astype(jnp.float32)

        each = jnp.arange(p).reshape(1, 1, p) + jnp.zeros_like(words.at.position)[..., None]
        at = Places((p * words.at.position[..., None] + each).reshape(b, -1), jnp.repeat(words.at.segment, p, axis=1))
        y = self.backbone_norm(self.backbone(x, at)).astype(jnp.float32).reshape(b, m, -1)
        y = jnp.where(
            jm.words.document_starts(words.at.segment)[..., None], self.first[...].reshape(1, 1, -1), jm.words.shift(y)
        )
        told = self.to_decoder(y.reshape(b, p * m, -1).astype(self.to_decoder.dtype)).astype(jnp.float32)
        x = jnp.where(is_mark[..., None], jm.unmerge(tokens, told), lookup(self.decoder_embedding[...], stream.ids))
        return self.head(self.norm(self.decoder(x, stream.at)))

    def nats(self, ids: Int[Array, "b n"], docs: Int[Array, "b n"], words: Words) -> tuple[Array, Array, Array]:
        """-log p of what follows each slot; whether that counts (same document, no inner mark); whether it is a byte."""
        stream = with_marks(ids, words, self.c.tokens)
        logits = self(stream, words)[:, :-1]
        owner = jm.unmerge(stream.plan, words.at.segment, fill=-1)
        inner = (stream.ids == WORD) & (stream.at.position > 0)
        scored = (owner[:, 1:] >= 0) & (owner[:, 1:] == owner[:, :-1]) & ~inner[:, 1:]
        target = jnp.where(scored, stream.ids[:, 1:], 0)
        return nats(logits, target), scored, scored & (target != WORD)


def loss(
    model: ETok,
    ids: Int[Array, "b n"],
    starts: Bool[Array, "b n"],
    docs: Int[Array, "b n"] | None = None,
    *,
    capacity: int | None = None,
    rngs: nnx.Rngs | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean nats per byte, the ends of words shared out among the bytes; arguments and metrics as in `models.hat.loss`."""
    docs = jnp.zeros_like(ids) if docs is None else docs
    words = read_words(starts, docs, capacity=capacity, max_word=model.c.max_word)
    cost, scored, byte = model.nats(ids, docs, words)
    ce = jnp.sum(jnp.where(scored, cost, 0)) / jnp.maximum(jnp.sum(byte), 1)
    spared = 1 - model.c.tokens * jnp.sum(words.plan.sizes > 0) / jnp.maximum(jnp.sum(words.plan.kept), 1)
    return ce, {"ce": ce, "rate": spared, "overflow": jnp.sum(words.plan.overflow)}
