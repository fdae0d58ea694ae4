"""The delete gate: an additive weight per byte, from 0 (stay) down to `scale` (gone), and what training does with it.

G = k · sigmoid(-z)       k = scale < 0; a byte is deleted where G <= k / 2, that is z <= 0
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float


def delete_gate(
    logits: Float[Array, "*batch n"], *, mask: Bool[Array, "*batch n"] | None = None, scale: float = -30.0
) -> Float[Array, "*batch n"]:
    """How much each byte is deleted, softly: an additive attention weight for `attention.key_bias(gate=...)`.

    Args:
      logits: z; high keeps the byte.
      mask: True for a byte; padding is fully deleted.
      scale: k, the weight of a byte that is gone.

    Returns:
      float32 in (k, 0), and k at padding.

    Raises:
      ValueError: scale is not negative.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.words.delete_gate(jnp.array([-9.0, 0.0, 9.0])).round(1).tolist()
      [-30.0, -15.0, -0.0]

    Source: MrT5 (arXiv:2410.20771), section 3.
    """
    if not scale < 0:
        raise ValueError(f"delete_gate: scale must be negative, because deleted bytes must weigh less; got {scale}.")
    gate = scale * jax.nn.sigmoid(-logits.astype(jnp.float32))
    return gate if mask is None else jnp.where(mask, gate, scale)


def kept(
    gate: Float[Array, "*batch n"], *, mask: Bool[Array, "*batch n"] | None = None, threshold: float = -15.0
) -> Bool[Array, "*batch n"]:
    """Which bytes stay when deletion is hard: for `tokens.keep(kept(gate), capacity)`.

    Args:
      gate: from `delete_gate`.
      mask: padding never stays, whatever the threshold.
      threshold: a byte stays if its gate lies above; half of the gate's scale by default.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.words.kept(jnp.array([-30.0, -15.0, -2.0])).tolist()
      [False, False, True]

    Source: MrT5 (arXiv:2410.20771).
    """
    stay = gate > threshold
    return stay if mask is None else stay & mask


def deletion_rate(
    gate: Float[Array, "*batch n"], mask: Bool[Array, "*batch n"], *, threshold: float = -15.0
) -> Float[Array, ""]:
    """The fraction of bytes, padding apart, that hard deletion removes: what the controller steers.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.words.deletion_rate(jnp.array([-29.0, -1.0, -30.0]), jnp.array([True, True, False])).item()
      0.5
    """
    return masked_mean((gate <= threshold).astype(jnp.float32), mask)


def masked_mean(x: Float[Array, "*batch n"], mask: Bool[Array, "*batch n"]) -> Float[Array, ""]:
    """The mean over everything that is not padding, in float32; 0 if all is padding. The regulariser is that of the gate.

    MrT5's loss adds `alpha * masked_mean(gate, mask)`: the gate is negative, so deletion is rewarded. Over a sharded batch it
    is the global mean, not the mean of each shard's.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.words.masked_mean(jnp.array([-8.0, -2.0, -30.0]), jnp.array([True, True, False])).item()
      -5.0

    Source: MrT5 (arXiv:2410.20771), equation 4.
    """
    total = jnp.sum(jnp.where(mask, x.astype(jnp.float32), 0.0))
    return total / jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)


def softmax1(x: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
    """exp(x) / (1 + sum exp(x)): a softmax that may attend to nothing. In float32.

    It is softmax with one more key, of logit 0 and value 0. It makes the level of the gates matter, which softmax ignores.

    Law:
      softmax1(x) = softmax([x, 0])[:-1]; a row at minus infinity gives 0, where softmax gives a uniform row.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.words.softmax1(jnp.array([0.0, jnp.log(2.0), -1e30])).round(3).tolist()
      [0.25, 0.5, 0.0]

    Source: MrT5 (arXiv:2410.20771), after Miller, "Attention is off by one" (2023).
    """
    x = x.astype(jnp.float32)
    top = jax.lax.stop_gradient(jnp.maximum(jnp.max(x, axis=axis, keepdims=True), 0.0))
    e = jnp.exp(x - top)
    return e / (jnp.sum(e, axis=axis, keepdims=True) + jnp.exp(-top))
