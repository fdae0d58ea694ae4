"""FlexDiT: a diffusion transformer that works on few tokens in its middle and comes back to all of them.

Its bottom blocks mix by the mean over all tokens (`PoolingBlock`). A `SparseDense` module pools the tokens to a smaller grid,
lets these read the dense ones, works on them, and recovers: each dense token takes what its place on the small grid holds,
keeps what it was, and reads the sparse tokens. All blocks are adaLN-zero, conditioned on c.

Source: FlexDiT (arXiv:2412.06028), `changsn/FlexDiT`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float

import jaxmerge as jm


class Block(nnx.Module):
    """A DiT block; with `memory` its queries read that, normed and modulated as they are, in place of themselves.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from models.reducers.flexdit import Block
      >>> x, c = jnp.ones((2, 4, 8)), jnp.ones((2, 8))
      >>> bool((Block(8, 2, rngs=nnx.Rngs(0))(x, c) == x).all())  # adaLN-zero: nothing at first
      True
    """

    def __init__(self, d: int, num_heads: int, *, mlp_ratio: float = 4.0, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.q, self.proj = (_linear(d, d, dtype, rngs) for _ in range(2))
        self.kv = _linear(d, 2 * d, dtype, rngs)
        self.adaptive = AdaptiveMLP(d, mlp_ratio, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b n d"], c: Float[Array, "b d"], memory: Float[Array, "b m d"] | None = None
    ) -> Float[Array, "b n d"]:
        def attend(x, memory):
            heads = lambda y: y.reshape(*y.shape[:2], self.num_heads, -1)
            k, v = jnp.split(self.kv(memory), 2, axis=-1)
            out = jm.attention.proportional_attention(heads(self.q(x)), heads(k), heads(v), None)
            return self.proj(out.reshape(x.shape))

        return self.adaptive(attend, x, c, x if memory is None else memory)


class PoolingBlock(nnx.Module):
    """A DiT block whose attention is uniform: every token takes the mean value over all of them."""

    def __init__(self, d: int, *, mlp_ratio: float = 4.0, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.v, self.proj = (_linear(d, d, dtype, rngs) for _ in range(2))
        self.adaptive = AdaptiveMLP(d, mlp_ratio, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"], c: Float[Array, "b d"]) -> Float[Array, "b n d"]:
        # The mean of v(x) is v of the mean, so two maps act on one token: O(n d), not O(n² d) as in the official code.
        pool = lambda x, _: jnp.broadcast_to(self.proj(self.v(x.mean(axis=1, keepdims=True))), x.shape)
        return self.adaptive(pool, x, c, x)


class RecoveryBlock(nnx.Module):
    """Sparse tokens back to dense ones: from_sparse(upsampled) + from_dense(memory), which then reads the sparse tokens.

    It starts as the identity on the dense tokens: from_sparse is 0, from_dense the identity.
    """

    def __init__(
        self,
        d: int,
        num_heads: int,
        dense: tuple[int, int],
        sparse: tuple[int, int],
        *,
        mlp_ratio: float = 4.0,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dense, self.sparse = dense, sparse
        self.from_sparse = nnx.Linear(d, d, kernel_init=nnx.initializers.zeros_init(), dtype=dtype, rngs=rngs)
        self.from_dense = nnx.Linear(
            d, d, kernel_init=lambda key, shape, dtype: jnp.eye(*shape, dtype=dtype), dtype=dtype, rngs=rngs
        )
        self.block = Block(d, num_heads, mlp_ratio=mlp_ratio, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b m d"], c: Float[Array, "b d"], memory: Float[Array, "b n d"]
    ) -> Float[Array, "b n d"]:
        up = jax.vmap(jm.unmerge, in_axes=(None, 0))(_upsampling(self.dense, self.sparse), x)
        return self.block(self.from_sparse(up) + self.from_dense(memory), c, x)


class SparseDense(nnx.Module):
    """Pool, read the dense tokens, work on the sparse ones, recover, work on the dense ones.

    Args:
      d, num_heads: width and heads.
      dense, sparse: the grids, (height, width).
      depths: how many blocks of the four kinds; the recovery is one block.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from models.reducers.flexdit import SparseDense
      >>> module = SparseDense(8, 2, (4, 4), (2, 2), rngs=nnx.Rngs(0))
      >>> module(jnp.ones((1, 16, 8)), jnp.ones((1, 8))).shape
      (1, 16, 8)
    """

    def __init__(
        self,
        d: int,
        num_heads: int,
        dense: tuple[int, int],
        sparse: tuple[int, int],
        *,
        depths: tuple[int, int, int] = (2, 2, 1),
        mlp_ratio: float = 4.0,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        blocks = lambda depth: nnx.List(
            [Block(d, num_heads, mlp_ratio=mlp_ratio, dtype=dtype, rngs=rngs) for _ in range(depth)]
        )
        self.dense, self.sparse = dense, sparse
        self.merge, self.middle, self.after = (blocks(depth) for depth in depths)
        self.recover = RecoveryBlock(d, num_heads, dense, sparse, mlp_ratio=mlp_ratio, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"], c: Float[Array, "b d"]) -> Float[Array, "b n d"]:
        memory, plan = x, jm.tokens.grid_pool(self.dense, self.sparse)
        x = jax.vmap(jm.merge, in_axes=(None, 0))(plan, x)
        for block in self.merge:
            x = block(x, c, memory)
        for block in self.middle:
            x = block(x, c)
        x = self.recover(x, c, memory)
        for block in self.after:
            x = block(x, c)
        return x


class AdaptiveMLP(nnx.Module):
    """What the blocks share: x + gate · mix(modulated norms), x + gate · mlp(modulated norm); all six maps of c start at 0."""

    def __init__(self, d: int, mlp_ratio: float, *, dtype: Any, rngs: nnx.Rngs):
        plain = lambda: nnx.LayerNorm(d, epsilon=1e-6, use_bias=False, use_scale=False, dtype=jnp.float32, rngs=rngs)
        self.norm1, self.norm2 = plain(), plain()
        self.fc1, self.fc2 = _linear(d, int(d * mlp_ratio), dtype, rngs), _linear(int(d * mlp_ratio), d, dtype, rngs)
        self.modulation = nnx.Linear(d, 6 * d, kernel_init=nnx.initializers.zeros_init(), dtype=dtype, rngs=rngs)

    def __call__(self, mix, x, c, memory):
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(self.modulation(jax.nn.silu(c))[:, None], 6, axis=-1)
        modulated = lambda y: self.norm1(y) * (1 + scale1) + shift1
        x = x + gate1 * mix(modulated(x), modulated(memory))
        y = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * self.fc2(jax.nn.gelu(self.fc1(y), approximate=True))


def _upsampling(dense: tuple[int, int], sparse: tuple[int, int]) -> jm.Plan:
    """Each place of the dense grid and the place of the sparse one that covers it: nearest neighbour, rounded down."""
    rows, columns = (np.arange(n) * m // n for n, m in zip(dense, sparse, strict=True))
    return jm.Plan(jnp.asarray((rows[:, None] * sparse[1] + columns[None]).ravel(), jnp.int32), sparse[0] * sparse[1])


def _linear(inputs: int, outputs: int, dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, dtype=dtype, kernel_init=nnx.initializers.xavier_uniform(), rngs=rngs)
