"""CrossLMM: few pooled visual tokens go through a language model and, every few layers, read all of them again.

After a layer's self-attention both the pooled visual tokens and the text look at the original visual tokens, each by an
attention of its own behind a gate: h + tanh(gamma) · Attn(W_q h, W_k v, W_v v). Gates start at 0, so that a pretrained model is
unchanged at first. Pool with `jm.tokens.grid_pool`.

Source: CrossLMM (arXiv:2505.17020; the repository `shilinyan99/CrossLMM` holds the paper, no code): equations 5 to 10, and the
tanh of its figure 3. The text names pooling 27 x 27 to 3 x 3 and a ratio of 9 at once; choose the grid you mean.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float

import jaxmerge as jm


class GatedCrossAttention(nnx.Module):
    """h + tanh(gamma) · Attn(W_q h, W_k memory, W_v memory)."""

    def __init__(self, d: int, num_heads: int, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.q, self.k, self.v = (nnx.Linear(d, d, use_bias=False, dtype=dtype, rngs=rngs) for _ in range(3))
        self.gamma = nnx.Param(jnp.zeros((1, 1, 1)))

    def __call__(
        self, h: Float[Array, "b t d"], memory: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None = None
    ) -> Float[Array, "b t d"]:
        heads = lambda y: y.reshape(*y.shape[:2], self.num_heads, -1)
        bias = None if mask is None else jm.attention.key_bias(mask=mask)
        out = jm.attention.proportional_attention(heads(self.q(h)), heads(self.k(memory)), heads(self.v(memory)), bias)
        return h + jnp.tanh(self.gamma[...]) * out.reshape(h.shape)


class DualCrossAttention(nnx.Module):
    """Visual tokens first, then text: each re-reads the full visual tokens with weights of its own.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from models.reducers.crosslmm import DualCrossAttention
      >>> read = DualCrossAttention(8, 2, rngs=nnx.Rngs(0))
      >>> read(jnp.ones((1, 4 + 3, 8)), jnp.ones((1, 64, 8)), num_visual=4).shape
      (1, 7, 8)
    """

    def __init__(self, d: int, num_heads: int, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.visual = GatedCrossAttention(d, num_heads, dtype=dtype, rngs=rngs)
        self.text = GatedCrossAttention(d, num_heads, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        h: Float[Array, "b t d"],
        memory: Float[Array, "b n d"],
        *,
        num_visual: int,
        mask: Bool[Array, "b n"] | None = None,
    ) -> Float[Array, "b t d"]:
        """h: pooled visual tokens, then text. memory: the visual tokens before pooling, in the model's width."""
        if not 0 <= num_visual <= h.shape[1]:
            raise ValueError(f"DualCrossAttention: num_visual must be between 0 and the {h.shape[1]} tokens, got {num_visual}.")
        visual, text = h[:, :num_visual], h[:, num_visual:]
        return jnp.concatenate([self.visual(visual, memory, mask), self.text(text, memory, mask)], axis=1)
