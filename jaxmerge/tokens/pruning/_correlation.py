"""TokenCorrCompressor: what repeats in an image says how few tokens it needs; the class token says which."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import ArrayLike, Bool, Float

from jaxmerge._plan import Plan
from jaxmerge._rank import ranks
from jaxmerge.tokens._checks import check_sequences
from jaxmerge.tokens._nearest import cosine
from jaxmerge.tokens.pruning._prune import keep


def redundant(metric: Float[ArrayLike, "*batch n d"], *, threshold: float = 0.7, repeats: int = 1) -> Bool[Array, "*batch n"]:
    """Which patches repeat a pattern: those with at least so many others that are like them.

    Args:
      metric: of the patches; keys of the encoder.
      threshold: the cosine above which two patches are alike.
      repeats: how many others make a patch redundant.

    Cost: n² cosines.

    Raises:
      ValueError: a metric of rank 1, repeats below 1.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> paper, ink = [1.0, 0.0], [0.0, 1.0]
      >>> jm.tokens.redundant(jnp.array([paper, ink, paper, paper])).tolist()
      [True, False, True, True]

    Source: the patch-patch correlation of TokenCorrCompressor (arXiv:2407.14439). Its code is not released and the paper's
    description leaves the count open: `repeats` and the default threshold are ours.
    """
    metric = jnp.asarray(metric)
    if metric.ndim < 2 or repeats < 1:
        raise ValueError(
            f"redundant: expected a metric (*batch, n, d) and repeats of 1 or more; got {metric.shape}, {repeats}."
        )
    check_sequences("redundant", axes=(-2,), metric=metric)
    metric = lax.stop_gradient(metric)
    others = jnp.expand_dims(~jnp.eye(metric.shape[-2], dtype=bool), tuple(range(metric.ndim - 2)))
    return ((cosine(metric, metric) > threshold) & others).sum(axis=-1) >= repeats


def sample_by_correlation(
    score: Float[ArrayLike, "*batch n"],
    metric: Float[ArrayLike, "*batch n d"],
    capacity: int,
    *,
    threshold: float = 0.7,
    repeats: int = 1,
    at_least: int = 1,
    key: Array | None = None,
) -> Plan:
    """Keep as many patches as an image has that do not repeat, and of all patches those that the class token looks at most.

    Args:
      score: attention of the class token to each patch.
      metric: of the patches, for `redundant`.
      capacity: m, the most to keep.
      threshold, repeats: see `redundant`.
      at_least: the fewest to keep.
      key: None keeps the highest scores. A random key draws without replacement, each patch with a chance in proportion to
        its score among those not drawn yet; of all batch rows, each draws its own.

    Returns:
      A plan; rows that need fewer than `capacity` leave empty slots.

    Law:
      with nothing redundant and capacity n it is the identity; with capacity = at_least it is keep_top_k.

    Cost: n² cosines and one ranking.

    Raises:
      ValueError: shapes that differ, not 0 <= at_least <= capacity <= n.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
      >>> score = jnp.array([0.1, 0.2, 0.4, 0.1, 0.2])
      >>> jm.tokens.sample_by_correlation(score, x, 4).segment_ids.tolist()
      [-1, 0, 1, -1, -1]

    Source: TokenCorrCompressor (arXiv:2407.14439): density = 1 - redundant / n sets the number, the correlation of class token
    and patches the sampling. README only, equations unverified; the exact number (rounded up by counting) and the
    draw without replacement are ours.
    """
    score, metric = jnp.asarray(score), jnp.asarray(metric)
    check_sequences("sample_by_correlation", score=score)
    check_sequences("sample_by_correlation", axes=(-2,), metric=metric)
    n = score.shape[-1]
    if score.shape != metric.shape[:-1]:
        raise ValueError(
            f"sample_by_correlation: expected score (*batch, n), metric (*batch, n, d); got {score.shape}, {metric.shape}."
        )
    if not 0 <= at_least <= capacity <= n:
        raise ValueError(
            f"sample_by_correlation: expected 0 <= at_least <= capacity <= n={n}; got at_least={at_least}, capacity={capacity}."
        )
    density = ~redundant(metric, threshold=threshold, repeats=repeats)
    budget = jnp.clip(density.sum(axis=-1, dtype=jnp.int32), at_least, capacity)
    score = lax.stop_gradient(score)
    if key is not None:  # the k largest of log p + Gumbel noise are k draws without replacement
        chance = score.astype(jnp.float32)
        score = jnp.log(jnp.where(chance > 0, chance, 0)) + jax.random.gumbel(key, score.shape)
    return keep(ranks(score) < budget[..., None], capacity)
