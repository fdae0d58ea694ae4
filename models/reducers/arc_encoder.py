"""ARC-Encoder: the last layer of a text encoder, whose queries are means of consecutive tokens and whose keys are all of them.

    plan = jm.tokens.sequence_pool(n, -(-n // 4), like=x)       a quarter of the tokens
    y = PooledBlock(config, rngs=rngs)(x, plan)

Source: ARC-Encoder (arXiv:2510.20535), `kyutai-labs/ARC-Encoder`, pool type "mean_pooled_queries" before the block. With a
causal encoder the official mask lets pooled query i see the keys 0 to i; here it sees those up to the end of its own run.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float

import jaxmerge as jm
from jaxmerge.virtual import rotary


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """A Llama-like block. The defaults are the official ones where it names any."""

    d: int
    num_heads: int
    num_kv_heads: int
    hidden: int
    rope_base: float = 1_000_000.0
    norm_epsilon: float = 1e-5

    def __post_init__(self):
        if self.d % (2 * self.num_heads) or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"BlockConfig: num_heads {self.num_heads} must leave an even head size of d {self.d}, and num_kv_heads "
                f"{self.num_kv_heads} must divide it."
            )


class PooledBlock(nnx.Module):
    """y = pooled x; y + wo(Attn(norm(y), norm(x))); then + w2(silu(w1) · w3) of its norm.

    Queries are turned to positions 0 to m - 1, keys to 0 to n - 1, as in the official code, whose later layers know the short
    sequence alone.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> from flax import nnx
      >>> from models.reducers.arc_encoder import BlockConfig, PooledBlock
      >>> block, x = PooledBlock(BlockConfig(16, 4, 2, 32), rngs=nnx.Rngs(0)), jnp.ones((2, 10, 16))
      >>> block(x, jm.tokens.sequence_pool(10, 3, like=x)).shape
      (2, 3, 16)
    """

    def __init__(self, c: BlockConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config, head = c, c.d // c.num_heads
        linear = lambda n, m: nnx.Linear(n, m, use_bias=False, dtype=dtype, rngs=rngs)
        norm = lambda: nnx.RMSNorm(c.d, epsilon=c.norm_epsilon, dtype=jnp.float32, rngs=rngs)
        self.attention_norm, self.ffn_norm = norm(), norm()
        self.wq, self.wo = linear(c.d, c.d), linear(c.d, c.d)
        self.wk, self.wv = linear(c.d, c.num_kv_heads * head), linear(c.d, c.num_kv_heads * head)
        self.w1, self.w3, self.w2 = linear(c.d, c.hidden), linear(c.d, c.hidden), linear(c.hidden, c.d)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        plan: jm.Plan,
        *,
        mask: Bool[Array, "b n"] | None = None,
        causal: bool = False,
    ) -> Float[Array, "b m d"]:
        """Compress x along a plan: runs from `sequence_pool`, words, any groups.

        Args:
          x: hidden states of the layer before.
          plan: n positions to m, batch (b,).
          mask: True where there is a token. Leave padding out of the plan, too.
          causal: a pooled query sees no key behind its last member.
        """
        b, n, d = x.shape
        m, c = plan.num_segments, self.config
        y = jm.merge(plan, x)
        heads = lambda z: z.reshape(*z.shape[:2], -1, d // c.num_heads)
        memory = self.attention_norm(x)
        q, k, v = heads(self.wq(self.attention_norm(y))), heads(self.wk(memory)), heads(self.wv(memory))
        place = jnp.broadcast_to(jnp.arange(n), (b, n))
        turn = lambda z, to: rotary(z, to, base=c.rope_base, interleaved=True)
        q, k = turn(q, jnp.broadcast_to(jnp.arange(m), (b, m))), turn(k, place)
        bias = None if mask is None else jm.attention.key_bias(mask=mask)
        seen = None
        if causal:
            last = jm.merge(plan, place, reduce="max")
            seen = (place[:, None, :] <= last[:, :, None])[:, None]
        out = jm.attention.proportional_attention(q, k, v, bias, mask=seen)
        y = y + self.wo(out.reshape(b, m, d))
        z = self.ffn_norm(y)
        return y + self.w2(jax.nn.silu(self.w1(z)) * self.w3(z))
