"""Soft temporal merging: each frame takes in what the others say of the same place (SimVLG)."""

import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike, Float

from jaxmerge import _segments as segments
from jaxmerge._plan import SoftPlan
from jaxmerge.tokens._checks import check_sequences


def frame_attention(
    queries: Float[ArrayLike, "*batch frames d"],
    keys: Float[ArrayLike, "*batch frames d"],
    *,
    alpha: Float[ArrayLike, ""] | float = 1.0,
    scale: float | None = None,
) -> SoftPlan:
    """Let every frame take in what the others say of the same place: I + alpha · softmax(q kᵀ scale), over frames.

    Args:
      queries, keys: of each frame, at one place (and in one head): put places and heads into the batch.
      alpha: how much of it arrives; learned, and 0 at the start. Gradients flow through it and the attention.
      scale: of the logits; None is 1 / sqrt(d). SimVLG takes 1 / sqrt(d · heads).

    Returns:
      A soft plan from frames to frames, for reduce="sum". To end with one frame: compose(mean, plan) with
      mean = SoftPlan(jnp.full((*batch, 1, frames), 1 / frames)).

    Law:
      with alpha=0.0 it is the identity; every row adds up to 1 + alpha.

    Raises:
      ValueError: queries and keys differ in shape.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> same = jnp.ones((2, 4))
      >>> jm.tokens.frame_attention(same, same, alpha=0.5).weights.tolist()
      [[1.25, 0.25], [0.25, 1.25]]

    Source: the soft attentive temporal token contextualiser of SimVLG / EVLGen (arXiv:2310.03291), `TemporalTokenMerge`; the
    official network then takes the mean over frames.
    """
    q, k = jnp.asarray(queries), jnp.asarray(keys)
    if q.shape != k.shape:
        raise ValueError(f"frame_attention: queries {q.shape} and keys {k.shape} must have one shape (*batch, frames, d).")
    check_sequences("frame_attention", axes=(-2,), queries=q, keys=k)
    by = q.shape[-1] ** -0.5 if scale is None else scale
    attention = jax.nn.softmax(segments.matmul(q, jnp.swapaxes(k, -1, -2)) * by, axis=-1)
    eye = jnp.broadcast_to(jnp.eye(q.shape[-2], dtype=attention.dtype), attention.shape)
    return SoftPlan(eye + alpha * attention)
