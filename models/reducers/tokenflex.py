"""TokenFLEX: one projector for any number of vision tokens: adaptive average pooling, then SwiGLU.

Train it with the number drawn anew for each batch (the paper: 64, 144 or 256); each number compiles once.

Source: TokenFLEX (arXiv:2504.03154; no published code). That the norm comes first is ours.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

import jaxmerge as jm


class Projector(nnx.Module):
    """down(silu(gate(y)) · up(y)) of y = norm(pooled tokens), into a language model's width.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from models.reducers.tokenflex import Projector
      >>> project = Projector(8, 16, rngs=nnx.Rngs(0))
      >>> [project(jnp.ones((2, 64, 8)), (8, 8), out).shape for out in ((4, 4), (3, 3))]
      [(2, 16, 16), (2, 9, 16)]
    """

    def __init__(self, d: int, d_out: int, *, hidden: int | None = None, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        hidden = d_out if hidden is None else hidden
        self.norm = nnx.LayerNorm(d, epsilon=1e-6, dtype=jnp.float32, rngs=rngs)
        self.gate = nnx.Linear(d, hidden, use_bias=False, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(d, hidden, use_bias=False, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(hidden, d_out, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"], grid: tuple[int, int], out: tuple[int, int]) -> Float[Array, "b m e"]:
        """Pool the tokens of a `grid` to those of a smaller one, `out`, and project."""
        plan = jm.tokens.grid_pool(grid, out)
        y = self.norm(jax.vmap(jm.merge, in_axes=(None, 0))(plan, x))
        return self.down(jax.nn.silu(self.gate(y)) * self.up(y))
