"""Isomer's semantic gathering-scattering: each side of an image attends to a few soft tokens of its own side.

    block = SGST(width=256, num_heads=8, hidden=2048, layers=2, tokens=64, rngs=nnx.Rngs(0))
    y, saliency = block(appearance, motion)             (*batch, n, width) each; saliency are logits (*batch, n)

Source: arXiv:2308.06693, `SemanticGatheringScatteringTransformer`. The official scatter writes into a copy that it throws
away, so the official block returns `block.project([appearance, motion])` whatever it computed; this one scatters.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float

import jaxmerge as jm


class CrossAttention(nnx.Module):
    """Queries attend to soft tokens; residual, then norm. Dropout is left out."""

    def __init__(self, width: int, num_heads: int, *, dtype: Any = None, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = (nnx.Linear(width, width, dtype=dtype, rngs=rngs) for _ in range(4))
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"], tokens: Float[Array, "b k d"]) -> Float[Array, "b n d"]:
        heads = lambda a: a.reshape(*a.shape[:-1], self.num_heads, -1)
        y = jax.nn.dot_product_attention(heads(self.query(x)), heads(self.key(tokens)), heads(self.value(tokens)))
        return self.norm(x + self.out(y.reshape(x.shape)))


class PackedMLP(nnx.Module):
    """Two layers with a depthwise convolution between, over the packed sequence of one side; residual, then norm.

    Officially a 3 x 3 convolution over an image of width 1: only the middle column of its kernel meets anything.
    """

    def __init__(self, width: int, hidden: int, *, dtype: Any = None, rngs: nnx.Rngs):
        self.fc1, self.fc2 = (
            nnx.Linear(width, hidden, dtype=dtype, rngs=rngs),
            nnx.Linear(hidden, width, dtype=dtype, rngs=rngs),
        )
        self.conv = nnx.Conv(hidden, hidden, (3,), feature_group_count=hidden, dtype=dtype, rngs=rngs)
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"], there: Bool[Array, "b n"]) -> Float[Array, "b n d"]:
        h = jnp.where(there[..., None], self.fc1(x), 0)  # beyond the end is the convolution's zero padding
        return self.norm(x + self.fc2(jax.nn.relu(self.conv(h))))


class Side(nnx.Module):
    """One side of the image: its soft tokens, and the layers in which its positions attend to them."""

    def __init__(self, width: int, num_heads: int, hidden: int, layers: int, tokens: int, *, dtype: Any = None, rngs: nnx.Rngs):
        self.weights = nnx.Linear(width, tokens, dtype=dtype, rngs=rngs)
        self.attention = nnx.List([CrossAttention(width, num_heads, dtype=dtype, rngs=rngs) for _ in range(layers)])
        self.mlp = nnx.List([PackedMLP(width, hidden, dtype=dtype, rngs=rngs) for _ in range(layers)])

    def __call__(self, x: Float[Array, "b n d"], heat: Float[Array, "b n"], mask: Bool[Array, "b n"]) -> Float[Array, "b n d"]:
        scaled = x * heat[..., None].astype(x.dtype)
        gather = jm.SoftPlan(jnp.swapaxes(self.weights(scaled), -1, -2))  # as they are: neither masked nor normalised
        tokens = jm.merge(gather, scaled, reduce="sum")
        pack = jm.tokens.keep(mask, x.shape[-2])
        there = pack.sizes > 0
        y = jm.merge(pack, x, reduce="first")
        for attention, mlp in zip(self.attention, self.mlp, strict=True):
            y = mlp(attention(y, tokens), there)
        return jm.unmerge(pack, y)


class SGST(nnx.Module):
    """Fuse two streams, find what is salient, and let each side talk to its own soft tokens.

    Args:
      width: features of each stream.
      num_heads, hidden, layers: of the two transformers.
      tokens: soft tokens of each side.
      threshold: foreground is heat >= threshold, background heat < 1 - threshold.

    Returns:
      Fused features (b, n, width) and the saliency logits (b, n). Positions on neither side, and images with one side only,
      keep the projected features.
    """

    def __init__(
        self,
        *,
        width: int,
        num_heads: int,
        hidden: int,
        layers: int,
        tokens: int,
        threshold: float = 0.5,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        self.threshold = threshold
        self.project = nnx.Linear(2 * width, width, dtype=dtype, rngs=rngs)
        self.saliency = nnx.Linear(width, 1, dtype=dtype, rngs=rngs)
        self.foreground = Side(width, num_heads, hidden, layers, tokens, dtype=dtype, rngs=rngs)
        self.background = Side(width, num_heads, hidden, layers, tokens, dtype=dtype, rngs=rngs)

    def __call__(
        self, appearance: Float[Array, "b n d"], motion: Float[Array, "b n d"]
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b n"]]:
        x = self.project(jnp.concatenate([appearance, motion], axis=-1))
        logits = self.saliency(x)[..., 0]
        heat = jax.nn.sigmoid(logits)
        front, back = heat >= self.threshold, heat < 1 - self.threshold
        both = (front.any(axis=-1) & back.any(axis=-1))[..., None]
        y = jnp.where((front & both)[..., None], self.foreground(x, heat, front), x)
        return jnp.where((back & both)[..., None], self.background(x, 1 - heat, back), y), logits
