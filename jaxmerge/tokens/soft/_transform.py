"""Many-to-many: every token gives to several merged tokens, every merged token takes from several (Token Transforming)."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike, Float

from jaxmerge import _segments as segments
from jaxmerge._plan import Plan, SoftPlan
from jaxmerge.tokens._checks import check_plan, check_sequences
from jaxmerge.tokens._nearest import unit

Over = Literal["centers", "tokens"]


def token_transform(
    x: Float[ArrayLike, "*batch n d"],
    centers: Plan,
    *,
    temperature: Float[ArrayLike, ""] | float = 0.1,
    over: Over = "centers",
) -> SoftPlan:
    """Reduce tokens to informative ones by a matrix of similarities: X' = W X.

        S_ci = cos(x_c, x_i) / temperature        for the informative token c and every token i
        A = softmax over c                        over="centers": each token hands itself out among the centres
        A = softmax over i                        over="tokens": each centre looks over all tokens

    Args:
      x: tokens. Gradients flow through their similarities.
      centers: the informative tokens: a pruning plan, such as keep_top_k(attention to each token, m).
      temperature: how soft. Towards 0 "centers" becomes hard merging, every token into the centre most like it, and "tokens"
        becomes pruning, every centre itself; large, both take the mean of all.
      over: which way the softmax goes.

    Returns:
      A soft plan of centers.num_segments rows: W, the mean that `merge` takes, is row-stochastic either way. With "centers"
      every token's weights add up to 1: plan.sizes share out n and serve proportional attention, and `unmerge` gives each
      token a mean of its centres. With "tokens" every size is 1. Rows of empty slots are 0. A token without a direction (zero,
      NaN) is equally like all.

    Law:
      "centers": the sizes add up to n; "tokens": each is 1. Permuting the other tokens permutes columns.

    Raises:
      ValueError: centers are not over the tokens of x; an unknown `over`.

    Cost: 2 m n d multiply-adds to plan and to apply.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> x, centers = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), jm.Plan(jnp.array([0, 1, -1]), 2)
      >>> jm.tokens.token_transform(x, centers, temperature=0.01).weights.round(2).tolist()
      [[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]]

    Source: Token Transforming (arXiv:2506.05709), which states that every reduction is a matrix, pruning and merging special
    ones, and builds a many-to-many one around tokens that attention selects. Its equations are not released as code and were
    not checked: the two softmaxes, the cosine and the temperature are ours.
    """
    check_plan("token_transform", centers, "centers")
    x = jnp.asarray(x)
    if centers.segment_ids.shape != x.shape[:-1]:
        raise ValueError(f"token_transform: centers must be over {x.shape[:-1]} tokens, got {centers.segment_ids.shape}.")
    if over not in ("centers", "tokens"):
        raise ValueError(f'token_transform: over must be "centers" or "tokens", got {over!r}.')
    check_sequences("token_transform", axes=(-2,), x=x)
    u = unit(x)
    chosen = segments.matmul(centers.matrix.astype(u.dtype), u)
    logits = segments.matmul(chosen, jnp.swapaxes(u, -1, -2)) / temperature
    filled = jnp.broadcast_to((centers.sizes > 0)[..., None], logits.shape)
    if over == "tokens":
        weights = jax.nn.softmax(logits, axis=-1)
    else:
        weights = jax.nn.softmax(jnp.where(filled, logits, -1e30), axis=-2)
    return SoftPlan(jnp.where(filled, weights, 0))
