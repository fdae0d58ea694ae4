"""FcaFormer: pooled tokens of earlier blocks, appended as keys and values to the attention of later ones.

    merge = TokenMergeEnhance(d, rngs=rngs)
    attend = CrossTokenAttention(d, num_heads=6, grid=(14, 14), blocks_before=2, rngs=rngs)
    x = attend(x, cross)                                    cross: the tokens of two earlier blocks, one after the other
    cross = jnp.concatenate([cross, merge(x, grid)], 1)     for the next block; the paper keeps those of the last 12

Source: FcaFormer (arXiv:2211.07198), `hkzhang-git/FcaFormer`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float

STRIDE = 4


def num_cross_tokens(grid: tuple[int, int]) -> int:
    """How many tokens one block hands on: a sixteenth, rounded up along each side."""
    return -(-grid[0] // STRIDE) * -(-grid[1] // STRIDE)


class TokenMergeEnhance(nnx.Module):
    """A depthwise convolution of 7 x 7 with stride 4, which pools tokens to a sixteenth."""

    def __init__(self, d: int, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.conv = nnx.Conv(
            d, d, (7, 7), strides=STRIDE, padding=3, feature_group_count=d, use_bias=False, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: Float[Array, "b n d"], grid: tuple[int, int]) -> Float[Array, "b m d"]:
        b, _, d = x.shape
        return self.conv(x.reshape(b, *grid, d)).reshape(b, num_cross_tokens(grid), d)


class CrossTokenAttention(nnx.Module):
    """Self-attention whose keys and values go on with cross tokens: x + gamma · proj(attention).

    Cross tokens are scaled by a learned factor each, normed on their own, and share the projection of q, k and v; they have a
    bias per head and token, where the tokens of the image have one per head and distance.

    Args:
      d, num_heads: width and heads.
      grid: (height, width) of x.
      blocks_before: how many earlier blocks hand on their cross tokens; 0 for the first.
      gamma: initial layer scale.
    """

    def __init__(
        self,
        d: int,
        num_heads: int,
        grid: tuple[int, int],
        blocks_before: int,
        *,
        gamma: float = 1e-6,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        m = blocks_before * num_cross_tokens(grid)
        self.num_heads, self.grid = num_heads, grid
        self.norm = nnx.LayerNorm(d, epsilon=1e-5, dtype=jnp.float32, rngs=rngs)
        self.qkv = nnx.Linear(d, 3 * d, dtype=dtype, rngs=rngs)
        self.proj = nnx.Linear(d, d, dtype=dtype, rngs=rngs)
        self.gamma = nnx.Param(jnp.full((1, 1, d), gamma))
        self.bias = nnx.Param(jnp.zeros((num_heads, grid[0] * grid[1])))
        if m:
            self.cross_norm = nnx.LayerNorm(d, epsilon=1e-5, dtype=jnp.float32, rngs=rngs)
            self.cross_scale = nnx.Param(jnp.ones((1, m, 1)))
            self.cross_bias = nnx.Param(jnp.zeros((1, num_heads, 1, m)))
        self.num_cross = m

    def __call__(self, x: Float[Array, "b n d"], cross: Float[Array, "b m d"] | None = None) -> Float[Array, "b n d"]:
        given = 0 if cross is None else cross.shape[1]
        if given != self.num_cross:
            raise ValueError(f"CrossTokenAttention: built for {self.num_cross} cross tokens, got {given}.")
        b, n, d = x.shape
        tokens, bias = self.norm(x), self.bias[...][:, _distances(self.grid)][None]
        if cross is not None:
            cross = self.cross_norm(cross * self.cross_scale[...])
            tokens = jnp.concatenate([tokens, cross], axis=1)
            wide = jnp.broadcast_to(self.cross_bias[...], (1, self.num_heads, n, self.num_cross))
            bias = jnp.concatenate([bias, wide], axis=-1)
        qkv = self.qkv(tokens).reshape(b, -1, 3, self.num_heads, d // self.num_heads)
        out = jax.nn.dot_product_attention(qkv[:, :n, 0], qkv[:, :, 1], qkv[:, :, 2], bias=bias)
        return x + self.gamma[...] * self.proj(out.reshape(b, n, d))


def _distances(grid: tuple[int, int]) -> np.ndarray:
    """(n, n) indices into a table of (|dy|, |dx|), row-major."""
    y, x = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    return abs(y[:, None] - y[None]) * grid[1] + abs(x[:, None] - x[None])
