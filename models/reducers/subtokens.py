"""Subtokens of one identifier pooled by attention: which part of a name carries its meaning is learned.

Source: merging subtokens in models of code (arXiv:2507.14423; no published code). It describes an average, which is
`jm.merge(plan, x)`, and a learned merge; the score below, one linear map, is ours.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

import jaxmerge as jm


class AttentionPool(nnx.Module):
    """sum_i a_i x_i over each segment, a = softmax of score(x) within the segment. At first the scores are 0: the mean.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> from flax import nnx
      >>> from models.reducers.subtokens import AttentionPool
      >>> words = jnp.array([[5, 5, 9, 5]])  # the tokenizer's word of each subtoken
      >>> x = jnp.array([0.0, 1.0, 2.0, 5.0]).reshape(1, 4, 1)
      >>> AttentionPool(1, rngs=nnx.Rngs(0))(x, jm.tokens.from_groups(words, 2)).tolist()
      [[[2.0], [2.0]]]
    """

    def __init__(self, d: int, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.score = nnx.Linear(d, 1, kernel_init=nnx.initializers.zeros_init(), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"], plan: jm.Plan) -> Float[Array, "b m d"]:
        score = self.score(x)[..., 0].astype(jnp.float32)
        peak = jm.unmerge(plan, jm.merge(plan, jax.lax.stop_gradient(score), reduce="max"))
        weight = jnp.exp(jnp.where(plan.kept, score - peak, 0))  # at most 1, and 1 somewhere in each segment
        return jm.merge(plan, x, weight=weight)
