"""DiffRate: a ViT that learns how many tokens each block prunes and merges.

    model = DiffRate(vit)
    logits, flops = model.soft(images)                  training: masks that the rates can move, all tokens in place
    loss = cross_entropy(logits) + c * (flops / 1e9 - target) ** 2
    logits = model(images, model.counts())              inference: static shapes, tokens really gone

Each block has two rates, one to prune and one to merge. A rate is a distribution over candidates, "keep c tokens"; its mean,
rounded up, says how many stay, and what stays with which probability carries the gradient (a differentiable discrete proxy).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jaxtyping import Float, Int

import jaxmerge as jm
from models.vit import AnyPlan, Attention, ViT

EPSILON = 1e-6
"""What every key weighs at least in training, together: a row whose keys are all masked stays finite."""


class Rate(nnx.Module):
    """How many of n tokens stay: logits over the candidates n, n - granularity, ... above 0.

    Args:
      patches: n, without the tokens that always stay.
      granularity: the step from one candidate to the next; above n there is one candidate, and nothing ever goes.
      prefix: tokens that always stay (1 for a class token).

    Example:
      >>> rate = Rate(16, granularity=4)
      >>> rate.candidates.tolist(), rate.kept().item()
      ([16, 12, 8, 4], 11.0)

    Source: `DiffRate` in the official ddp.py (arXiv:2305.17997).
    """

    def __init__(self, patches: int, *, granularity: int = 1, prefix: int = 1):
        if patches < 1 or granularity < 1:
            raise ValueError(f"Rate: patches and granularity must be 1 or more, got {patches} and {granularity}.")
        self.patches, self.granularity, self.prefix = patches, granularity, prefix
        self.logits = nnx.Param(jnp.zeros(len(self.candidates), jnp.float32))

    @property
    def candidates(self) -> Int[np.ndarray, "c"]:
        """The numbers of patches that may stay, falling."""
        return np.arange(self.patches, 0, -self.granularity)

    def kept(self) -> Float[Array, ""]:
        """How many tokens stay: the mean candidate, rounded up, and the prefix. Its gradient is that of the mean."""
        mean = jnp.dot(jnp.asarray(self.candidates, jnp.float32), jax.nn.softmax(self.logits[...]), precision="highest")
        return _straight_through(jnp.ceil(mean), mean) + self.prefix

    def probability(self) -> Float[Array, "n"]:
        """For each place in the order of importance, the probability that it stays: the mass of the candidates beyond it."""
        beyond = np.arange(self.patches + self.prefix)[:, None] < self.candidates + self.prefix
        return jnp.matmul(jnp.asarray(beyond, jnp.float32), jax.nn.softmax(self.logits[...]), precision="highest")

    def mask(self, tokens: Int[Array, ""] | int) -> Float[Array, "n"]:
        """1 for a place that stays, 0 for one that goes, with the gradient of `probability`.

        Args:
          tokens: how many there are. Places from there on are gone already and stay 1, which lets gradients reach the rate
            that took them.
        """
        place = jnp.arange(self.patches + self.prefix)
        goes = (place >= self.kept()) & (place < tokens)
        return _straight_through(jnp.where(goes, 0.0, 1.0), self.probability())


class DiffRate(nnx.Module):
    """A ViT with a class token whose blocks prune and merge between attention and MLP, at rates that can be learned.

    Args:
      vit: trained; its class token's attention is what tokens are ranked by.
      prune, merge: granularity of the candidates.
      official: do with sizes what the official code does: plain means, and sizes of merged tokens times their similarity,
        where the law is size-weighted means and sums of sizes. A key whose size so becomes negative is not seen; official NaN.

    The first block has one candidate, as in the official code: it never loses a token.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from models.vit import ViT, ViTConfig
      >>> config = ViTConfig(width=32, depth=2, num_heads=2, patch_size=4, image_size=16, num_classes=10)
      >>> model = DiffRate(ViT(config, rngs=nnx.Rngs(0)))
      >>> model.counts(), model(jnp.ones((1, 16, 16, 3)), [(17, 17), (14, 9)])[1].num_segments
      ([(17, 17), (10, 10)], 9)

    Source: DiffRate (arXiv:2305.17997), the official patch of DeiT.
    """

    def __init__(self, vit: ViT, *, prune: int = 1, merge: int = 1, official: bool = False):
        if vit.config.num_prefix != 1 or vit.config.pool != "token":
            raise ValueError(
                'DiffRate: tokens are ranked by the class token; the ViT must have one, pool="token", and no other.'
            )
        patches = vit.config.grid**2
        per_block = lambda g: nnx.List([Rate(patches, granularity=g if i else patches + 1) for i in range(vit.config.depth)])
        self.vit, self.official = vit, official
        self.prune, self.merge = per_block(prune), per_block(merge)

    def counts(self) -> list[tuple[int, int]]:
        """What the rates say now, as Python ints for a static program: per block, tokens left by pruning and by merging.

        Never rising from block to block, and never below the class token.
        """
        counts, left = [], self.vit.config.num_tokens
        for prune, merge in zip(self.prune, self.merge, strict=True):
            kept = min(left, int(prune.kept()))
            left = min(kept, int(merge.kept()))
            counts.append((kept, left))
        return counts

    def __call__(
        self, images: Float[Array, "b h w c"], counts: Sequence[tuple[int, int]]
    ) -> tuple[Float[Array, "b classes"], AnyPlan, Float[Array, "b m"]]:
        """Logits, where every token went, and the size of those that are left.

        Args:
          images: as the ViT's config says.
          counts: per block, how many tokens pruning and then merging leave; `counts()`, or a published schedule.
        """
        if len(counts) != len(self.vit.blocks):
            raise ValueError(
                f"DiffRate: expected one pair of counts for each of {len(self.vit.blocks)} blocks, got {len(counts)}."
            )
        x = _embed(self.vit, images)
        plan = jm.tokens.bipartite_matching(x, 0)  # the identity, laid out as x is
        size = jnp.ones_like(x[..., 0])
        for block, (kept, merged) in zip(self.vit.blocks, counts, strict=True):
            y, importance = attend(block.attn, block.norm1(x), jm.attention.key_bias(size))
            x = x + y
            ranked = (importance, x, min(kept, x.shape[1]), min(merged, x.shape[1]))
            step = jm.tokens.prune_and_merge(*ranked, protect=(0,))
            if self.official:
                x = jm.merge(step, x)
                size = size * jm.tokens.merged_similarity(*ranked, protect=(0,))
            else:
                x = jm.merge(step, x, weight=size)
            size = jm.merge(step, size, reduce="sum")
            plan = jm.compose(step, plan)
            x = x + block.mlp(block.norm2(x))
        return self.vit.classify(x, plan), plan, size

    def soft(self, images: Float[Array, "b h w c"]) -> tuple[Float[Array, "b classes"], Float[Array, ""]]:
        """Logits and FLOPs, both with a gradient for the rates: no token goes, keys that would are masked."""
        x, flops = self.soft_features(images)[0], self.flops()
        return self.vit.head(self.vit.norm(x[:, 0])), flops

    def soft_features(
        self, images: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b n"], Float[Array, "b n"]]:
        """The tokens after the last block, all in their places; the mask, 0 for one that is gone; and their sizes."""
        x = _embed(self.vit, images)
        left = jnp.int32(x.shape[1])
        mask, size = jnp.ones_like(x[..., 0]), jnp.ones_like(x[..., 0])
        for block, prune, merge in zip(self.vit.blocks, self.prune, self.merge, strict=True):
            y, importance = attend(block.attn, block.norm1(x), jm.attention.key_bias(size), mask)
            x = x + y
            here = mask > 0.5
            place = jm.tokens.ranks(_class_first(jnp.where(here, importance, -jnp.inf)))

            kept = lax.stop_gradient(prune.kept()).astype(jnp.int32)
            mask = mask * jnp.where(kept < left, _at(prune.mask(left), place), 1)
            kept = jnp.minimum(kept, left)
            left = jnp.minimum(kept, lax.stop_gradient(merge.kept()).astype(jnp.int32))
            mask = mask * jnp.where(left < kept, _at(merge.mask(kept), place), 1)
            x, size = self._soft_merge(x, size, place, kept, left)
            x = x + block.mlp(block.norm2(x))
        return x, mask, size

    def _soft_merge(
        self, x: Float[Array, "b n d"], size: Float[Array, "b n"], place: Int[Array, "b n"], kept: Array, left: Array
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b n"]]:
        """What stays takes in what merges into it; everything else is as it was."""
        ranked, n = (-place.astype(jnp.float32), x, kept, left), x.shape[1]
        plan = jm.tokens.prune_and_merge(*ranked, protect=(0,), capacity=n)
        stays = place < left
        if self.official:
            goes = (place >= left) & (place < kept)
            similarity = jm.tokens.merged_similarity(*ranked, protect=(0,), capacity=n)
            size = jnp.where(goes, jnp.maximum(size * similarity, 1), size)
        merged = jm.merge(plan, x, weight=None if self.official else size)
        x = jnp.where(stays[..., None], jm.unmerge(plan, merged), x)
        return x, jnp.where(stays, jm.unmerge(plan, jm.merge(plan, size, reduce="sum")), size)

    def flops(self, *, mlp_ratio: float | None = None) -> Float[Array, ""]:
        """Multiply-adds of one image at the rates' counts, with their gradient.

        Args:
          mlp_ratio: the ViT's own by default. The official code counts 4 for every model.
        """
        config = self.vit.config
        d, ratio = config.width, config.mlp_ratio if mlp_ratio is None else mlp_ratio
        n = jnp.float32(config.num_tokens)
        total = n * d * config.patch_size**2 * config.channels + d * config.num_classes
        for prune, merge in zip(self.prune, self.merge, strict=True):
            total += 4 * n * d**2 + 2 * n**2 * d
            a, b = prune.kept(), merge.kept()
            n = _straight_through(jnp.minimum(n, jnp.minimum(a, b)), a + b)  # both rates hear what a token costs
            total += 2 * ratio * n * d**2
        return total


def attend(
    attn: Attention, x: Float[Array, "b n d"], bias: Float[Array, "b n"], mask: Float[Array, "b n"] | None = None
) -> tuple[Float[Array, "b n d"], Float[Array, "b n"]]:
    """A ViT's attention with a key bias, and what the class token looks at, averaged over heads.

    Args:
      attn: with its weights.
      x: tokens, the class token first.
      bias: what each key weighs.
      mask: weights that the gradient may move: keys at 0 are seen by themselves alone. None is plain attention.
    """
    b, n, d = x.shape
    qkv = attn.qkv(x).reshape(b, n, 3, attn.num_heads, d // attn.num_heads).astype(jnp.float32)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    scale = (d // attn.num_heads) ** -0.5
    if mask is None:  # any attention kernel will do; one row is computed twice
        out = jm.attention.proportional_attention(q, k, v, bias)
        first = jnp.einsum("bhd,bkhd->bhk", q[:, 0], k, precision="highest") * scale + bias[:, None]
        seen = jax.nn.softmax(first, axis=-1)
    else:
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest") * scale + bias[:, None, None]
        weights = masked_softmax(logits, mask)
        out = jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision="highest")
        seen = weights[:, :, 0]
    return attn.proj(out.reshape(b, n, d)), seen.mean(axis=1)


def masked_softmax(logits: Float[Array, "b h n n"], mask: Float[Array, "b n"]) -> Float[Array, "b h n n"]:
    """Softmax in which each key counts as much as its mask says, and every query sees itself.

    Example:
      >>> import jax.numpy as jnp
      >>> masked_softmax(jnp.zeros((1, 1, 2, 2)), jnp.array([[1.0, 0.0]])).round(2).tolist()
      [[[[1.0, 0.0], [0.5, 0.5]]]]

    Source: `softmax_with_policy` of DynamicViT (arXiv:2106.02034), as DiffRate trains with it.
    """
    n = mask.shape[-1]
    weight = mask[:, None, None, :]
    weight = weight + (1 - weight) * jnp.eye(n)[None, None]
    shifted = jnp.exp(logits - lax.stop_gradient(logits.max(axis=-1, keepdims=True))) * weight
    return (shifted + EPSILON / n) / (shifted.sum(axis=-1, keepdims=True) + EPSILON)


def _straight_through(value: Float[Array, "..."], proxy: Float[Array, "..."]) -> Float[Array, "..."]:
    """A value, exactly, with the gradient of a proxy."""
    return lax.stop_gradient(value) + (proxy - lax.stop_gradient(proxy))


def _class_first(importance: Float[Array, "b n"]) -> Float[Array, "b n"]:
    return jnp.where(jnp.arange(importance.shape[1])[None] == 0, jnp.inf, importance)


def _at(values: Float[Array, "n"], place: Int[Array, "b n"]) -> Float[Array, "b n"]:
    return values.at[place].get(mode="promise_in_bounds")


def _embed(vit: ViT, images: Float[Array, "b h w c"]) -> Float[Array, "b n d"]:
    x = vit.patch_embed(images).astype(jnp.float32)
    return jnp.concatenate([vit.cls_token[...] + jnp.zeros_like(x[:, :1]), x], axis=1) + vit.pos_embed[...]
