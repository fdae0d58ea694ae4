"""VisionZip and VisionDrop: dominant tokens stay as they are, the rest gathers in evenly spread contextual ones."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import ArrayLike, Float

from jaxmerge._plan import Plan
from jaxmerge._rank import highest
from jaxmerge.tokens._checks import check_sequences
from jaxmerge.tokens.pruning._assign import assign
from jaxmerge.tokens.pruning._prune import keep


def dominant_and_contextual(
    score: Float[ArrayLike, "*batch n"], metric: Float[ArrayLike, "*batch n d"], dominant: int, contextual: int
) -> Plan:
    """Keep the dominant tokens of highest score, and merge the rest into contextual ones, spread evenly among the rest.

    Of what is not dominant every step-th token, step = (n - dominant) // contextual, is a target; every other joins the
    target that it is most like.

    Args:
      score: attention that each token receives: from the class token in an encoder, from all visual tokens in a language
        model (`attention.mean((-3, -2))`). inf for a class token, which then counts as dominant.
      metric: to compare by: keys, averaged over heads.
      dominant: how many stay alone.
      contextual: how many gather the rest.

    Returns:
      A plan of dominant + contextual segments in the order of the tokens they are called after (the official order is
      dominant first). `merge` makes each contextual token the mean of its group. Theirs is twice as long: target + mean
      of the others, which the verbs write as

          stay = representatives(score, dominant, contextual)
          merge(stay, x, reduce="first") + merge(Plan(where(stay.kept, -1, plan.segment_ids), m), x)

    Law:
      dominant tokens have size 1; nothing is dropped unless contextual = 0.

    Cost: one ranking of n scores and n (dominant + contextual) cosines.

    Raises:
      ValueError: counts that are negative or more than n together, shapes that differ.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> x = jnp.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [5.0, 5.0]])
      >>> score = jnp.array([0.1, 0.1, 0.1, 0.1, 0.6])
      >>> jm.tokens.dominant_and_contextual(score, x, 1, 2).segment_ids.tolist()
      [0, 0, 1, 1, 2]

    Source: VisionZip (arXiv:2412.04467) and, over several stages with visual attention, VisionDrop (arXiv:2506.22283). Its
    second stage finds labels and masks of contextual tokens by their place among the rest, not in the sequence; here
    `merge(stay, labels, reduce="first")` does.
    """
    score, metric = jnp.asarray(score), jnp.asarray(metric)
    if metric.ndim < 2 or score.shape != metric.shape[:-1]:
        raise ValueError(
            "dominant_and_contextual: expected score (*batch, n) and metric (*batch, n, d); "
            f"got {score.shape} and {metric.shape}."
        )
    check_sequences("dominant_and_contextual", score=score)
    check_sequences("dominant_and_contextual", axes=(-2,), metric=metric)
    stay = _stay(score, dominant, contextual)
    target = stay & (~highest(score, dominant))
    return assign(metric, stay, dominant + contextual, targets=target)


def representatives(score: Float[ArrayLike, "*batch n"], dominant: int, contextual: int) -> Plan:
    """The tokens after which `dominant_and_contextual` calls its segments, each alone in its own slot.

    For what cannot be averaged: positions, labels, masks.

    Args:
      score, dominant, contextual: as in `dominant_and_contextual`.

    Raises:
      ValueError: counts that are negative or more than n together.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.tokens.representatives(jnp.array([0.1, 0.1, 0.1, 0.1, 0.6]), 1, 2).segment_ids.tolist()
      [0, -1, 1, -1, 2]
    """
    score = jnp.asarray(score)
    check_sequences("representatives", score=score)
    return keep(_stay(score, dominant, contextual), dominant + contextual)


def _stay(score: Float[Array, "*batch n"], dominant: int, contextual: int) -> Array:
    """True for the dominant tokens and the targets."""
    n = score.shape[-1]
    if dominant < 0 or contextual < 0 or dominant + contextual > n:
        raise ValueError(
            f"dominant_and_contextual: of n={n} tokens, dominant={dominant} and contextual={contextual} cannot stay; "
            "both must be 0 or more, and n at most together."
        )
    leads = highest(score, dominant)
    if contextual == 0:
        return leads
    step = (n - dominant) // contextual
    place = jnp.cumsum(~leads, axis=-1, dtype=jnp.int32) - 1  # among the rest
    return leads | ((place % step == 0) & (place < step * contextual))
