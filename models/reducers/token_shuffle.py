"""Token-Shuffle: the tokens of a window travel through a transformer as one, on a fraction of its features each.

    x, y = TokenShuffle(d, window=2, rngs=rngs), TokenUnshuffle(d, window=2, rngs=rngs)
    out = y(transformer(x(tokens, grid)), grid)         a quarter of the tokens inside

Source: Token-Shuffle (arXiv:2504.17789; no official code): compress d to d / s², put s x s tokens side by side, fuse by MLP
blocks; and back. That the blocks are residual and normed first is ours.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from jaxmerge.tokens import depth_to_space, space_to_depth


class Fusion(nnx.Module):
    """Residual MLP blocks: x + fc2(gelu(fc1(norm(x))))."""

    def __init__(self, d: int, num_blocks: int, *, dtype: Any, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.LayerNorm(d, epsilon=1e-6, dtype=jnp.float32, rngs=rngs) for _ in range(num_blocks)])
        self.fc1 = nnx.List([nnx.Linear(d, d, dtype=dtype, rngs=rngs) for _ in range(num_blocks)])
        self.fc2 = nnx.List([nnx.Linear(d, d, dtype=dtype, rngs=rngs) for _ in range(num_blocks)])

    def __call__(self, x: Float[Array, "b m d"]) -> Float[Array, "b m d"]:
        for norm, fc1, fc2 in zip(self.norms, self.fc1, self.fc2, strict=True):
            x = x + fc2(jax.nn.gelu(fc1(norm(x))))
        return x


class TokenShuffle(nnx.Module):
    """(b, n, d) tokens to (b, n / window², d): compress, put side by side, fuse.

    Args:
      d: a multiple of window².
      window: side of the window.
      num_blocks: MLP blocks after shuffling.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from models.reducers.token_shuffle import TokenShuffle, TokenUnshuffle
      >>> x = TokenShuffle(8, 2, rngs=nnx.Rngs(0))(jnp.ones((1, 16, 8)), (4, 4))
      >>> x.shape, TokenUnshuffle(8, 2, rngs=nnx.Rngs(1))(x, (4, 4)).shape
      ((1, 4, 8), (1, 16, 8))
    """

    def __init__(self, d: int, window: int, *, num_blocks: int = 2, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.window = window
        self.compress = nnx.Linear(d, _part(d, window), dtype=dtype, rngs=rngs)
        self.fusion = Fusion(d, num_blocks, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"], grid: tuple[int, int]) -> Float[Array, "b m d"]:
        return self.fusion(space_to_depth(self.compress(x), grid, self.window))


class TokenUnshuffle(nnx.Module):
    """(b, n / window², d) tokens back to (b, n, d): fuse, take apart, expand. `grid` is that of the n tokens."""

    def __init__(self, d: int, window: int, *, num_blocks: int = 2, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.window = window
        self.fusion = Fusion(d, num_blocks, dtype=dtype, rngs=rngs)
        self.expand = nnx.Linear(_part(d, window), d, dtype=dtype, rngs=rngs)

    def __call__(self, y: Float[Array, "b m d"], grid: tuple[int, int]) -> Float[Array, "b n d"]:
        return self.expand(depth_to_space(self.fusion(y), grid, self.window))


def _part(d: int, window: int) -> int:
    if d % window**2:
        raise ValueError(f"Token-Shuffle: the width must be a multiple of window² = {window**2}, got {d}.")
    return d // window**2
