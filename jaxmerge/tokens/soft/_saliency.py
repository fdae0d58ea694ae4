"""Gather foreground and background into a few soft tokens each, and scatter them back (Isomer)."""

import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike, Bool, Float

from jaxmerge import _segments as segments
from jaxmerge._plan import SoftPlan
from jaxmerge.tokens._checks import check_sequences


def soft_gather(
    logits: Float[ArrayLike, "*batch k n"],
    mask: Bool[ArrayLike, "*batch n"] | None = None,
    *,
    temperature: Float[ArrayLike, ""] | float = 1.0,
) -> SoftPlan:
    """k soft tokens, each a softmax over the tokens that a mask names; `unmerge` scatters them back.

    Args:
      logits: how much each soft token wants each token: learned, or similarities to queries.
      mask: True for tokens to gather from, (*batch, n). None: all.
      temperature: divides the logits.

    Returns:
      A row-stochastic soft plan; rows are 0 where the mask names nobody.

    Law:
      positions outside the mask neither give nor, in `unmerge`, receive.

    Raises:
      ValueError: the mask does not fit the logits.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> plan = jm.tokens.soft_gather(jnp.zeros((1, 4)), jnp.array([True, True, False, False]))
      >>> jm.merge(plan, jnp.array([1.0, 3.0, 5.0, 7.0])).tolist()
      [2.0]

    Source: the gathering of Isomer's SGST (arXiv:2308.06693).
    """
    logits = jnp.asarray(logits)
    check_sequences("soft_gather", logits=logits, mask=mask)
    logits = logits.astype(segments.accumulator(logits.dtype)) / temperature
    if mask is None:
        return SoftPlan(jax.nn.softmax(logits, axis=-1))
    mask = jnp.asarray(mask)
    if mask.shape != (*logits.shape[:-2], logits.shape[-1]):
        raise ValueError(f"soft_gather: mask must have shape {(*logits.shape[:-2], logits.shape[-1])}, got {mask.shape}.")
    mask = jnp.broadcast_to(mask[..., None, :], logits.shape)
    return SoftPlan(jnp.where(mask, jax.nn.softmax(jnp.where(mask, logits, -1e30), axis=-1), 0))


def saliency_gather(
    foreground: Float[ArrayLike, "*batch k n"],
    background: Float[ArrayLike, "*batch k n"],
    saliency: Float[ArrayLike, "*batch n"],
    *,
    threshold: float = 0.5,
) -> SoftPlan:
    """k soft tokens of the foreground, then k of the background, each gathered from its own side.

    Args:
      foreground, background: logits of each soft token for every position.
      saliency: the heat of each position, from 0 to 1.
      threshold: foreground is saliency >= threshold, background saliency < 1 - threshold; above one half some positions
        belong to neither.

    Returns:
      A soft plan of 2 k rows.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> zero = jnp.zeros((1, 3))
      >>> jm.tokens.saliency_gather(zero, zero, jnp.array([0.9, 0.2, 0.1])).weights.tolist()
      [[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]]

    Source: Isomer's SGST (arXiv:2308.06693). The official weights are a convolution's output as it is, over all positions,
    features scaled by the heat; `models.reducers.isomer` does that. The softmax over each side is what the method describes.
    """
    saliency = jnp.asarray(saliency)
    check_sequences("saliency_gather", foreground=foreground, background=background, saliency=saliency)
    sides = soft_gather(foreground, saliency >= threshold), soft_gather(background, saliency < 1 - threshold)
    return SoftPlan(jnp.concatenate([side.weights for side in sides], axis=-2))
