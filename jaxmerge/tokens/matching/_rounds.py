"""Merging in rounds: match, merge, and match again what came of it."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array
from jaxtyping import ArrayLike, Float

from jaxmerge._plan import Plan, SoftPlan, compose, identity, merge
from jaxmerge.tokens._checks import checked_tokens, python_int
from jaxmerge.tokens.matching._bipartite import schedule


def in_rounds(
    planner: Callable[[Array, int], Plan | SoftPlan],
    x: Float[ArrayLike, "*batch n d"],
    rs: Sequence[int],
    *,
    metric: Callable[[Array], Array] = lambda x: x,
    sizes: bool = True,
) -> tuple[Plan | SoftPlan, Float[Array, "*batch m d"]]:
    """Remove tokens in several rounds, each matching the tokens that the round before left.

    A token takes part once per round at most, so halving a length needs one round and a quarter needs two; and a group can
    grow over rounds along tokens that are alike pairwise.

    Args:
      planner: from (what to compare tokens by, r) to a plan: `bipartite_matching`, or a lambda around any other.
      x: the tokens; those between rounds are their means.
      rs: how many tokens each round removes. `halvings` and `schedule` write such lists.
      metric: what to compare tokens by, of the tokens of a round; the tokens themselves unless told otherwise.
      sizes: weigh each token by how many it stands for. False takes plain means of means.

    Returns:
      The plan of all rounds together, and the merged tokens.

    Law:
      with sizes, the tokens are merge(plan, x); in_rounds(f, x, [r]) = (f(x, r), merge(f(x, r), x)).

    Raises:
      what the planner raises.

    Cost: that of the rounds, each over fewer tokens; halving costs 4/3 of its first round.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> x = jnp.array([[1.0, 0.0], [1.0, 0.1], [0.9, 0.1], [0.0, 1.0]])
      >>> plan, y = jm.tokens.in_rounds(jm.tokens.bipartite_matching, x, [1, 1, 1])
      >>> plan.segment_ids.tolist(), y.shape
      ([0, 0, 0, 0], (1, 2))

    Source: LongVLM (arXiv:2404.03384): r = 1280, 640, 320, 160, 80, 40, 10 per clip, metric=lambda x: head_mean(x, 16).
    AIM (arXiv:2412.03248): n / 2, then n / 4, sizes=False. B-VLLM (arXiv:2412.09919): halvings(n, m), sizes=False.
    """
    y = checked_tokens("in_rounds", x)
    whole: Plan | SoftPlan = identity(y.shape[-2], like=y)
    for r in rs:
        plan = planner(metric(y), r)
        y = merge(plan, y, weight=whole.sizes if sizes else None)
        whole = compose(plan, whole)
    return whole, y


def head_mean(x: Float[ArrayLike, "*batch n c"], heads: int) -> Float[Array, "*batch n d"]:
    """The mean over heads, where channels are head by head: Token Merging's metric, of keys or of features.

    Raises:
      ValueError: the channels are no multiple of the heads.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.tokens.head_mean(jnp.array([[1.0, 2.0, 3.0, 6.0]]), 2).tolist()
      [[2.0, 4.0]]

    Source: Token Merging (arXiv:2210.09461), `k.mean(1)`; LongVLM (arXiv:2404.03384) takes 16 groups of the features.
    """
    x = jnp.asarray(x)
    *lead, c = x.shape
    if heads < 1 or c % heads:
        raise ValueError(f"head_mean: {c} channels do not divide into {heads} heads.")
    return x.reshape(*lead, heads, c // heads).mean(axis=-2)


def halvings(n: int, m: int) -> list[int]:
    """How many tokens each round removes on the way from n to m, each round as many as it can: half.

    Raises:
      ValueError: m below 1 or above n.

    Example:
      >>> import jaxmerge as jm
      >>> jm.tokens.halvings(576, 100)
      [288, 144, 44]

    Source: B-VLLM (arXiv:2412.09919), `multi_layer_merge`; where its last round would remove more than half, m + 1 of 2 m + 1,
    ours takes one round more.
    """
    if not 1 <= m <= n:
        raise ValueError(f"halvings: m must be between 1 and n={n}, got {m}.")
    rs = []
    while n > m:
        rs.append(min(n // 2, n - m))
        n -= rs[-1]
    return rs


def keep_schedule(depth: int, keep: float, *, n: int, protected: int = 0) -> list[int]:
    """How many tokens each layer removes so that about a ratio of them is left after the last.

    Args:
      depth: number of layers.
      keep: the ratio, of the tokens that are not protected.
      n: tokens at the start, with the protected ones.
      protected: how many tokens at the front never merge.

    Returns:
      int((n - protected) (1 - keep) / depth) for each layer, or what is left to merge if that is less.

    Raises:
      ValueError: keep outside [0, 1], depth below 1.

    Example:
      >>> import jaxmerge as jm
      >>> sum(jm.tokens.keep_schedule(24, 0.4, n=577, protected=1)), jm.tokens.keep_schedule(4, 0.1, n=65, protected=1)
      (336, [14, 14, 14, 11])

    Source: AuroraCap (arXiv:2410.03051), `visual_token_merge_ratio`. TinyChart (arXiv:2404.16635) and SimVLG (arXiv:2310.03291)
    give the r of each layer, 84 and 19: `schedule(depth, r, n=n)`.
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"keep_schedule: keep is a ratio between 0 and 1, got {keep}.")
    depth = python_int("keep_schedule", "depth", depth)
    return schedule(depth, int((n - protected) * (1 - keep) / depth) if depth > 0 else 0, n=n, protected=protected)
