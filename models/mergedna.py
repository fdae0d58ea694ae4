"""MergeDNA: an autoencoder that merges bases into words as it reads, window by window, and learns from what it cannot restore.

    local encoder    attention within windows, then a merge within windows, several times    n bases -> m words (a plan)
    latent encoder   attention over all words                                                z
    latent decoder   attention over all words; unmerge; local decoder within windows         n bases again

Three losses (`loss`): restore every base through the merges, at a compression drawn anew each step; restore them though the
latent encoder keeps but a few words (the tokenizer held still); and guess masked bases, words that stand alone masked most.

No code is public: what the paper leaves open is settled here. Tokens are compared by keys, as in Token Merging, but of what the
block before the merge puts out, so that context counts; words weigh their sizes in merging; positions are those of the words.

    model = MergeDNA(MergeDNAConfig(local, latent, window=16, rates=((2, 2), (4, 2), (4, 4))), rngs=nnx.Rngs(0))
    total, metrics = loss(model, ids, rngs=nnx.Rngs(1))

Source: MergeDNA (arXiv:2511.14806).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int, Key

import jaxmerge as jm
from models.decoder import Block, DecoderConfig, Places, RMSNorm, linear, llama, nats
from models.t5 import lookup


@dataclasses.dataclass(frozen=True)
class MergeDNAConfig:
    """The architecture.

    Attributes:
      local: one attention block per merge in the encoder, as many in the decoder; depth is that number.
      latent: of the latent encoder. The latent decoder has `latent_decoder_depth` such layers.
      window: tokens that a local block sees, and within which it merges; each merge leaves a window `r` shorter.
      rates: tokens that leave each window in each merge, one sequence per compression that training draws from. Without a draw
        the middle one counts.
      keep: the share of words that the latent encoder keeps in the second loss, and that the third masks.
      selection_weight: of the second loss.
      vocab_size: ids below it; the mask is one more.
    """

    local: DecoderConfig
    latent: DecoderConfig
    latent_decoder_depth: int = 2
    window: int = 16
    rates: Sequence[Sequence[int]] = ((3, 2, 2), (4, 2, 2), (4, 3, 2))
    keep: float = 0.5
    selection_weight: float = 0.25
    vocab_size: int = 256

    def __post_init__(self):
        object.__setattr__(self, "rates", tuple(map(tuple, self.rates)))
        for rate in self.rates:
            left = self.window
            if len(rate) != self.local.depth:
                raise ValueError(f"MergeDNAConfig: a rate has one entry per local layer, {self.local.depth}; got {rate}.")
            for r in rate:
                if not 0 <= r <= left // 2:
                    raise ValueError(f"MergeDNAConfig: of {left} tokens in a window 0 to {left // 2} can merge; got {rate}.")
                left -= r
        if not self.rates or not 0 < self.keep < 1:
            raise ValueError(f"MergeDNAConfig: at least one rate, and keep between 0 and 1; got {self.rates}, {self.keep}.")

    @property
    def middle(self) -> tuple[int, ...]:
        return tuple(self.rates[len(self.rates) // 2])


class Read(NamedTuple):
    """What the encoders make of the bases."""

    words: Float[Array, "b m d"]
    """Of the latent encoder."""
    plan: jm.Plan | jm.SoftPlan
    """From bases to words."""


class MergeDNA(nnx.Module):
    """The model.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from models.decoder import DecoderConfig
      >>> from models.mergedna import MergeDNA, MergeDNAConfig
      >>> small = DecoderConfig(16, 1, 2, 32)
      >>> config = MergeDNAConfig(small, small, window=4, rates=((2,),), vocab_size=4)
      >>> model = MergeDNA(config, rngs=nnx.Rngs(0))
      >>> read = nnx.jit(MergeDNA.encode)(model, jnp.array([[0, 1, 2, 3, 0, 0, 1, 1]]))
      >>> read.plan.num_segments, nnx.jit(MergeDNA.decode)(model, read).shape
      (4, (1, 8, 4))
    """

    def __init__(self, c: MergeDNAConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        both = lambda stack, depth: dataclasses.replace(stack, depth=depth, causal=False)
        d = c.local.width
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (c.vocab_size + 1, d)))
        local = both(c.local, c.local.depth)
        self.local_encoder = nnx.List([Block(local, dtype=dtype, rngs=rngs) for _ in range(local.depth)])
        self.to_latent = linear(d, c.latent.width, c.latent, dtype, rngs)
        self.latent_encoder = llama(both(c.latent, c.latent.depth), dtype=dtype, rngs=rngs)
        self.latent_norm = RMSNorm(c.latent.width, dtype=jnp.float32, epsilon=c.latent.epsilon)
        self.latent_decoder = llama(both(c.latent, c.latent_decoder_depth), dtype=dtype, rngs=rngs)
        self.from_latent = linear(c.latent.width, d, c.local, dtype, rngs)
        self.local_decoder = llama(local, dtype=dtype, rngs=rngs)
        self.norm = RMSNorm(d, dtype=jnp.float32, epsilon=c.local.epsilon)
        self.head = linear(d, c.vocab_size, c.local, jnp.float32, rngs)
        self.c, self.dtype = c, dtype

    def tokenize(
        self, ids: Int[Array, "b n"], rate: Sequence[int] | None = None
    ) -> tuple[Float[Array, "b m d"], jm.Plan | jm.SoftPlan]:
        """Bases to words, by the local encoder alone; `rate` as in the config, the middle one by default."""
        size = self.c.window
        if ids.shape[1] % size:
            raise ValueError(f"MergeDNA: {ids.shape[1]} bases are no multiple of the window, {size}; cut or pad them.")
        x, plan = lookup(self.embedding[...], ids), jm.identity(ids.shape[1], like=ids[..., None])
        for block, r in zip(self.local_encoder, self.c.middle if rate is None else rate, strict=True):
            x = _windows(lambda x, at, block=block: block(x, at)[0], x, size)
            if r:
                _, keys, _ = block.attention.qkv_heads(block.attention_norm(x))
                step = jm.tokens.block_matching(keys.astype(jnp.float32).mean(axis=-2), r, block=size)
                x = jm.merge(step, x, weight=plan.sizes.astype(jnp.float32))
                plan, size = jm.compose(step, plan), size - r
        return x, plan

    def encode(self, ids: Int[Array, "b n"], rate: Sequence[int] | None = None) -> Read:
        """Words as the latent encoder sees them. The model to fine-tune reads these."""
        x, plan = self.tokenize(ids, rate)
        return Read(self.contextualise(x), plan)

    def contextualise(self, x: Float[Array, "b m d"]) -> Float[Array, "b m e"]:
        y = self.to_latent(x.astype(self.dtype)).astype(jnp.float32)
        return self.latent_norm(self.latent_encoder(y, _places(y)))

    def decode(self, read: Read) -> Float[Array, "b n v"]:
        """Logits of the bases themselves."""
        y = self.latent_decoder(read.words, _places(read.words))
        x = jm.unmerge(read.plan, self.from_latent(y.astype(self.dtype)).astype(jnp.float32))
        return self.head(self.norm(_windows(self.local_decoder, x, self.c.window)))


def loss(
    model: MergeDNA, ids: Int[Array, "b n"], *, rngs: nnx.Rngs | None = None
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The sum of the three losses, and metrics.

    Args:
      ids: n is a multiple of the window.
      rngs: stream `mask` draws the compression and the mask. Without it (evaluation) the middle rate counts, and the words in
        the smallest groups are masked.

    Returns:
      The loss, and: "ce", nats per base restored; "selected", the same through the few words kept; "masked", nats per masked
      base; "rate", the share of positions that the latent encoder is spared.
    """
    if rngs is None:
        losses, rate = _losses(model, ids, model.c.middle, None)
    else:
        key, draw = jax.random.split(rngs.mask())
        branches = [lambda key, r=rate: _losses(model, ids, r, key) for rate in model.c.rates]
        losses, rate = jax.lax.switch(jax.random.randint(draw, (), 0, len(branches)), branches, key)
    ce, selected, masked = losses
    metrics = {"ce": ce, "selected": selected, "masked": masked, "rate": rate}
    return ce + model.c.selection_weight * selected + masked, metrics


def _losses(model: MergeDNA, ids: Array, rate: Sequence[int], key: Key[Array, ""] | None) -> tuple[tuple, Array]:
    """The three, at one compression; and what the latent encoder is spared."""
    x, plan = model.tokenize(ids, rate)
    m = plan.num_segments
    kept = max(int(model.c.keep * m), 1)
    mean = lambda read, there: jm.words.masked_mean(nats(model.decode(read), ids), there)
    everywhere = jnp.ones_like(ids, bool)
    restored = mean(Read(model.contextualise(x), plan), everywhere)

    z = model.contextualise(jax.lax.stop_gradient(x))
    select, few = jm.tokens.in_rounds(jm.tokens.bipartite_matching, z, jm.tokens.halvings(m, kept))
    selected = mean(Read(jm.unmerge(select, few), plan), everywhere)

    mask = masked_bases(plan, select, kept, key)
    guessed = mean(model.encode(jnp.where(mask, model.c.vocab_size, ids), rate), mask)
    return (restored, selected, guessed), jnp.float32(1 - m / ids.shape[1])


def masked_bases(
    plan: jm.Plan | jm.SoftPlan, select: jm.Plan | jm.SoftPlan, count: int, key: Key[Array, ""] | None
) -> Bool[Array, "b n"]:
    """The bases of `count` words, drawn without replacement with odds 1 / size of the group that the latent merge put each in.

    Words that stand alone say what no other says; they are masked most. Without a key the likeliest are taken.
    """
    odds = -jnp.log(jm.unmerge(select, select.sizes).astype(jnp.float32))
    noise = 0.0 if key is None else jax.random.gumbel(key, odds.shape)
    chosen = jm.tokens.keep_top_k(odds + noise, count).kept
    return jm.unmerge(plan, chosen)


def _windows(stack: Callable[[Array, Places], Array], x: Float[Array, "b n d"], size: int) -> Float[Array, "b n d"]:
    """A stack or block within windows of consecutive tokens: each is a row of its own."""
    rows = x.reshape(x.shape[0], -1, size, x.shape[-1])
    return jax.vmap(lambda rows: stack(rows, _places(rows)))(rows).reshape(x.shape)


def _places(x: Float[Array, "b n d"]) -> Places:
    blank = jnp.zeros_like(x[..., 0], jnp.int32)
    return Places(jnp.arange(x.shape[1])[None] + blank, blank)
