"""DiffRate: by importance, the tail is pruned and what stands before the tail is merged; without a sort."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import ArrayLike, Float, Int

from jaxmerge._plan import Plan
from jaxmerge._rank import ranks
from jaxmerge.tokens._checks import check_rows, check_sequences, floating, protected_mask
from jaxmerge.tokens.pruning._assign import assign_by_similarity

Count = int | Int[Array, ""]


def prune_and_merge(
    importance: Float[ArrayLike, "*batch n"],
    metric: Float[ArrayLike, "*batch n d"],
    kept: Count,
    merged: Count,
    *,
    protect: Sequence[int] = (),
    capacity: int | None = None,
) -> Plan:
    """Drop all but the `kept` most important tokens, and merge the least important of those until `merged` are left.

    Each merged token joins the one of the `merged` that it is most like.

    Args:
      importance: DiffRate: the attention of the class token, averaged over heads.
      metric: DiffRate: the tokens themselves.
      kept: how many tokens pruning leaves.
      merged: how many merging leaves of those; as many or more than `kept` merges nothing.
      protect: positions that stay whatever their importance, and that nothing merges into: (0,) for a class token.
      capacity: m, room for what is left; min(kept, merged) by default. Given, both counts may be traced integers.

    Returns:
      A plan in the tokens' own order, where the official code sorts them by importance.

    Law:
      prune_and_merge(s, x, k, k) = keep_top_k(s, k); a protected token has size 1.

    Cost: one ranking of n scores and n · capacity cosines.

    Raises:
      ValueError: counts outside [0, n] or below the number of protected tokens, a protected position outside [-n, n), shapes
        that differ. TypeError: traced counts without a capacity.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> x = jnp.array([[9.0, 9.0], [1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [0.1, 0.9]])
      >>> importance = jnp.array([0.0, 0.4, 0.3, 0.2, 0.1])
      >>> jm.tokens.prune_and_merge(importance, x, 4, 3, protect=(0,)).segment_ids.tolist()
      [0, 1, 2, 1, -1]

    Source: DiffRate (arXiv:2305.17997), `get_merge_func` and its block. Its mean counts a token once however many it stands
    for; `merge(weight=sizes)` is the law.
    """
    return _prune_and_merge(importance, metric, kept, merged, protect=protect, capacity=capacity)[0]


def merged_similarity(
    importance: Float[ArrayLike, "*batch n"],
    metric: Float[ArrayLike, "*batch n d"],
    kept: Count,
    merged: Count,
    *,
    protect: Sequence[int] = (),
    capacity: int | None = None,
) -> Float[Array, "*batch n"]:
    """How like each token is to the one that `prune_and_merge` merges it into: its cosine.

    DiffRate adds `size · similarity` to the size of what a token merges into, where the law adds its size:
    `merge(plan, sizes * similarity, reduce="sum")`. It can be negative, and then its logarithm in the attention is NaN.

    Args:
      importance, metric, kept, merged, protect, capacity: as in `prune_and_merge`.

    Returns:
      float32: 1 for a token that stays, 0 for one that is dropped.

    Raises:
      ValueError: as `prune_and_merge`.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> x, importance = jnp.array([[1.0, 0.0], [3.0, 4.0], [0.0, 1.0]]), jnp.array([0.6, 0.3, 0.1])
      >>> [round(s, 3) for s in jm.tokens.merged_similarity(importance, x, 2, 1).tolist()]
      [1.0, 0.6, 0.0]

    Source: DiffRate (arXiv:2305.17997), section 3.3.
    """
    return _prune_and_merge(importance, metric, kept, merged, protect=protect, capacity=capacity)[1]


def _prune_and_merge(
    importance: Float[ArrayLike, "*batch n"],
    metric: Float[ArrayLike, "*batch n d"],
    kept: Count,
    merged: Count,
    *,
    protect: Sequence[int],
    capacity: int | None,
) -> tuple[Plan, Float[Array, "*batch n"]]:
    check_sequences("prune_and_merge", importance=importance)
    check_sequences("prune_and_merge", axes=(-2,), metric=metric)
    importance = lax.stop_gradient(floating(importance))
    n = importance.shape[-1]
    check_rows("prune_and_merge", jnp.asarray(metric), importance=importance)
    static = protected_mask("prune_and_merge", protect, n)
    for name, count in dict(kept=kept, merged=merged).items():
        if isinstance(count, int) and not static.sum() <= count <= n:
            raise ValueError(
                f"prune_and_merge: {name} must be between {static.sum()}, the protected tokens, and n={n}; got {count}."
            )
    if capacity is None:
        if not (isinstance(kept, int) and isinstance(merged, int)):
            raise TypeError("prune_and_merge: where kept or merged is traced, give a capacity: shapes are static.")
        capacity = min(kept, merged)
    fixed = jnp.expand_dims(static, tuple(range(importance.ndim - 1))) | jnp.zeros_like(importance, bool)
    rank = ranks(jnp.where(fixed, jnp.inf, jnp.minimum(importance, jnp.finfo(importance.dtype).max)))
    stay = rank < jnp.minimum(kept, merged)
    return assign_by_similarity(metric, stay, capacity, targets=stay & ~fixed, rest=rank < kept)
