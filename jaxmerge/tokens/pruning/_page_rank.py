"""AIM: a token is important if important tokens look at it: PageRank of the attention, layer by layer."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import ArrayLike, Bool, Float

from jaxmerge._plan import Plan
from jaxmerge._rank import ranks
from jaxmerge.tokens._checks import check_sequences, python_int
from jaxmerge.tokens.pruning._prune import keep


def page_rank(
    logits: Float[ArrayLike, "*batch h n n"], *, temperature: float = 0.1, steps: int = 5, teleport: float = 0.0
) -> Float[Array, "*batch n"]:
    """How often a walk along the attention is at each token: `steps` steps from the even distribution, per head.

    p <- (1 - teleport) p softmax(logits / temperature) + teleport / n, and heads are joined as sqrt(mean p²).

    Args:
      logits: of the attention, before its softmax and after its mask: query i to key j, -inf where j may not be seen.
      temperature: below 1 sharpens.
      steps: how far the walk goes.
      teleport: the chance to go anywhere instead.

    Returns:
      float32. A query that sees no key goes anywhere; NaN is not seen; +inf is the largest number.

    Cost: `steps` products of a vector and an n x n matrix per head.

    Law:
      with one head the ranks sum to 1; a token that nobody sees has rank teleport / n.

    Raises:
      ValueError: logits are not square, temperature not above 0, steps below 1, teleport outside [0, 1].

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> sees = jnp.where(jnp.array([[[0, 1, 0], [0, 1, 0], [0, 1, 1]]], bool), 0.0, -jnp.inf)
      >>> [round(p, 4) for p in jm.tokens.page_rank(sees, steps=2).tolist()]
      [0.0, 0.9167, 0.0833]

    Source: AIM (arXiv:2412.03248), `get_importance`; its d is `teleport`.
    """
    logits = jnp.asarray(logits)
    check_sequences("page_rank", axes=(-1, -2), logits=logits)
    *_, n, m = logits.shape
    if logits.ndim < 3 or n != m:
        raise ValueError(f"page_rank: logits must have shape (*batch, heads, n, n), got {logits.shape}.")
    steps = python_int("page_rank", "steps", steps)
    if temperature <= 0 or steps < 1 or not 0 <= teleport <= 1:
        raise ValueError(
            "page_rank: temperature must be above 0, steps 1 or more and teleport in [0, 1]; "
            f"got {temperature}, {steps} and {teleport}."
        )
    sharp = logits.astype(jnp.float32) / temperature
    sharp = jnp.where(jnp.isnan(sharp), -jnp.inf, jnp.minimum(sharp, jnp.finfo(jnp.float32).max))
    blind = jnp.isneginf(sharp).all(axis=-1, keepdims=True)
    to = jax.nn.softmax(jnp.where(blind, 0, sharp), axis=-1)
    at = jnp.full_like(to[..., :1, :], 1 / n)
    for _ in range(steps):
        at = jnp.matmul(at, to, precision="highest") * (1 - teleport) + teleport / n
    return jnp.sqrt(jnp.square(at[..., 0, :]).mean(axis=-2))


def page_rank_pruning(
    logits: Float[ArrayLike, "*batch h n n"],
    k: int,
    *,
    protect: Bool[Array, "*batch n"] | None = None,
    capacity: int | None = None,
    temperature: float = 0.1,
    steps: int = 5,
    teleport: float = 0.0,
) -> Plan:
    """Keep the k tokens of highest PageRank, and all that are protected, in their order.

    Args:
      logits: see `page_rank`, as `temperature`, `steps` and `teleport`.
      k: how many tokens to keep beside the protected ones; `linear_decay` gives one per layer.
      protect: True for a token that stays whatever its rank (the text), a different number in each row if need be.
      capacity: m, room for protected and kept; k by default, which is right without `protect`. What finds no room is counted
        by `plan.overflow`.

    Returns:
      A plan. To leave keys and values in place as the official code does, mask the next layer with `plan.kept`.

    Raises:
      ValueError: k outside [0, n], and see `page_rank`.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> logits = jnp.log(jnp.array([[[0.1, 0.2, 0.7], [0.1, 0.2, 0.7], [0.1, 0.2, 0.7]]]))
      >>> text = jnp.array([True, False, False])
      >>> jm.tokens.page_rank_pruning(logits, 1, protect=text, capacity=2).segment_ids.tolist()
      [0, -1, 1]

    Source: AIM (arXiv:2412.03248), which protects as many tokens in every row as the first row of the batch has text.
    """
    check_sequences("page_rank_pruning", axes=(-1, -2), logits=logits)
    check_sequences("page_rank_pruning", protect=protect)
    importance = page_rank(lax.stop_gradient(logits), temperature=temperature, steps=steps, teleport=teleport)
    n = importance.shape[-1]
    if not 0 <= k <= n:
        raise ValueError(f"page_rank_pruning: k must be between 0 and the number of tokens, {n}; got {k}.")
    if protect is None:
        return keep(ranks(importance) < k, k if capacity is None else capacity)
    kept = protect | ((ranks(jnp.where(protect, -jnp.inf, importance)) < k) & ~protect)
    return keep(kept, k if capacity is None else capacity)


def linear_decay(depth: int, tokens: int, *, start: int, step: float) -> list[int]:
    """How many tokens each layer leaves to the next: all of them up to a layer, then fewer by one share of all, down to none.

    Args:
      depth: number of layers.
      tokens: how many there are.
      start: the first layer, from 0, that prunes.
      step: the share of `tokens` that each layer removes from there on.

    Raises:
      ValueError: depth below 1, step outside [0, 1], start or tokens negative.

    Example:
      >>> import jaxmerge as jm
      >>> jm.tokens.linear_decay(8, 100, start=2, step=0.25)
      [100, 100, 75, 50, 25, 0, 0, 0]

    Source: AIM (arXiv:2412.03248): depth 28, start 14, step 1/8.
    """
    depth = python_int("linear_decay", "depth", depth)
    if depth < 1 or tokens < 0 or start < 0 or not 0 <= step <= 1:
        raise ValueError(
            "linear_decay: depth must be 1 or more, tokens and start 0 or more, step in [0, 1]; "
            f"got {depth}, {tokens}, {start} and {step}."
        )
    return [int(tokens * max(0.0, 1 - max(0, i - start + 1) * step)) for i in range(depth)]
