"""The delete gate: an additive weight per byte, from 0 (stay) down to `scale` (gone), and what training does with it.

G = k · sigmoid(-z)       k = scale < 0; a byte is deleted where G <= k / 2, that is z <= 0
G = log sigmoid(z)        the log-sigmoid gate, whose threshold is a log-probability

Training adds one of these to its loss, times the weight that the controller gives it:

    masked_mean(gate, mask)                           the gates' mean: MrT5's, unless told otherwise
    masked_mean(logits, mask)                         the logits' mean
    masked_mean(jnp.maximum(logits, -30.0), mask)     the clamped logits' mean: of no use to push one that is gone for sure
    -masked_variance(gate, mask)                      the gates' variance: decide, either way
    a · each - b · mean of `gate_entropies`           be sure of every byte, but not the same for all
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, PRNGKeyArray


def delete_gate(
    logits: Float[Array, "*batch n"],
    *,
    mask: Bool[Array, "*batch n"] | None = None,
    scale: float = -30.0,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "*batch n"]:
    """How much each byte is deleted, softly: an additive attention weight for `attention.key_bias(gate=...)`.

    Args:
      logits: z; high keeps the byte.
      mask: True for a byte; padding is fully deleted.
      scale: k, the weight of a byte that is gone.
      key: adds Gumbel noise to the logits, -log(-log U): for training alone.

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
    gate = scale * jax.nn.sigmoid(-_noisy(logits, key))
    return _outside("delete_gate", gate, mask, scale)


def log_sigmoid_gate(
    logits: Float[Array, "*batch n"],
    *,
    mask: Bool[Array, "*batch n"] | None = None,
    padding: float = -30.0,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "*batch n"]:
    """The gate as a log-probability of staying, log sigmoid(z): it has no floor, so that deletion can always go further.

    Args:
      logits: z; high keeps the byte.
      mask: True for a byte.
      padding: the weight of what is none. (The official log-sigmoid gate raises where there is padding.)
      key: adds Gumbel noise, as in `delete_gate`.

    Returns:
      float32 below 0. A threshold of log(1/2) deletes where z <= 0; the official one is -5.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.words.log_sigmoid_gate(jnp.array([-9.0, 0.0, 9.0])).round(2).tolist()
      [-9.0, -0.6..., -0.0]

    Source: MrT5's code (arXiv:2410.20771).
    """
    gate = jax.nn.log_sigmoid(_noisy(logits, key))
    return _outside("log_sigmoid_gate", gate, mask, padding)


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


def masked_variance(x: Float[Array, "*batch n"], mask: Bool[Array, "*batch n"]) -> Float[Array, ""]:
    """The variance over everything that is not padding, in float32, as torch has it: n - 1 below the sum.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.words.masked_variance(jnp.array([-1.0, 1.0, 9.0]), jnp.array([True, True, False])).item()
      2.0

    Source: MrT5's code (arXiv:2410.20771), its `gate_var_loss`.
    """
    from_mean = jnp.where(mask, x.astype(jnp.float32) - masked_mean(x, mask), 0.0)
    return jnp.sum(from_mean**2) / jnp.maximum(jnp.sum(mask, dtype=jnp.float32) - 1, 1.0)


def gate_entropies(
    gate: Float[Array, "*batch n"], *, mask: Bool[Array, "*batch n"] | None = None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """How unsure the gates are, in nats: the mean entropy of each, and the entropy of a row's mean, averaged over rows.

    Take exp(G) for the probability that a byte stays. The regulariser a · each - b · mean wants every gate sure, and a row's
    gates different.

    Args:
      gate: from a gate, at most 0.
      mask: True for a byte. The official code counts padding too.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> each, mean = jm.words.gate_entropies(jnp.log(jnp.array([[1.0, 1e-9], [0.5, 0.5]])))
      >>> round(each.item(), 3), round(mean.item(), 3)
      (0.347, 0.693)

    Source: MrT5's code (arXiv:2410.20771), its two-entropy regulariser.
    """
    gate = gate.astype(jnp.float32)
    there = jnp.ones_like(gate, bool) if mask is None else mask
    size = jnp.maximum(jnp.sum(there, axis=-1, dtype=jnp.float32), 1.0)
    each = jnp.sum(jnp.where(there, _entropy(gate), 0.0), axis=-1) / size
    log_mean = jax.nn.logsumexp(jnp.where(there, gate, -1e30), axis=-1) - jnp.log(size)
    return jnp.mean(each), jnp.mean(_entropy(log_mean))


def _entropy(log_p: Float[Array, "..."]) -> Float[Array, "..."]:
    p = jnp.exp(log_p)
    return -(p * log_p + (1 - p) * jnp.log1p(-jnp.minimum(p, 1 - jnp.finfo(jnp.float32).eps)))


def _outside(name: str, gate: Float[Array, "*batch n"], mask: Bool[Array, "*batch n"] | None, padding: float) -> Array:
    """The gate, with padding's where the mask says that there is no byte."""
    if mask is not None and mask.shape != gate.shape:
        raise ValueError(f"{name}: mask must have the shape of logits, {gate.shape}, got {mask.shape}.")
    return gate if mask is None else jnp.where(mask, gate, padding)


def _noisy(logits: Float[Array, "*batch n"], key: PRNGKeyArray | None) -> Float[Array, "*batch n"]:
    logits = logits.astype(jnp.float32)
    return logits if key is None else logits + jax.random.gumbel(key, logits.shape)


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
