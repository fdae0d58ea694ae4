"""Given groups: somebody else knows what belongs together, a tokenizer, a parser, a segmentation."""

from typing import Literal

import jax.numpy as jnp
from jax import Array
from jaxtyping import ArrayLike, Bool, Float, Int

from jaxmerge import _segments as segments
from jaxmerge._plan import Plan, SoftPlan, from_parents
from jaxmerge._rank import COMPARE_ALL
from jaxmerge.tokens._checks import check_sequences


def from_groups(
    groups: Int[ArrayLike, "*batch n"],
    num_segments: int,
    *,
    mask: Bool[ArrayLike, "*batch n"] | None = None,
    rest: Literal["drop", "alone"] = "drop",
) -> Plan:
    """One segment for each group, numbered in the order in which the groups first appear.

    Args:
      groups: the group of each position: any integers, in any order, with gaps; a group need not be consecutive.
      num_segments: m, room for that many groups; positions of further groups are counted by `plan.overflow`.
      mask: True where a position belongs to its group.
      rest: what becomes of the others: "drop" them, or leave each "alone" in a segment of its own.

    Returns:
      A plan. `merge(plan, x)` averages subtokens of one identifier; with `weight=` the average is weighted, and a weight may be
      learned; `merge(plan, x, reduce="sum")` adds a phrase up.

    Law:
      the plan does not change when groups are renamed; from_groups(arange(n), n) is the identity.

    Raises:
      TypeError: groups are not integers, the mask is not boolean. ValueError: shapes differ, another `rest`.

    Cost: n² comparisons that fuse, two sorts above 4096 positions.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> words = jnp.array([7, 7, -3, 7, 5])  # "get", "Name", "(", "self", ")" with "getName" and "self" bound to one
      >>> jm.tokens.from_groups(words, 3).segment_ids.tolist()
      [0, 0, 1, 0, 2]

    Source: merging subtokens of identifiers in models of code (arXiv:2507.14423); phrases with a negation (arXiv:2510.13232).
    """
    groups, mask = _checked("from_groups", groups, mask)
    if rest not in ("drop", "alone"):
        raise ValueError(f'from_groups: rest must be "drop" or "alone", got {rest!r}.')
    n, here = groups.shape[-1], segments.positions(groups)
    leaders = _compared if n <= COMPARE_ALL else _sorted
    lead = segments.batched(leaders, groups.ndim - 1)(groups, mask)
    return from_parents(jnp.where(mask, lead, here if rest == "alone" else -1), num_segments, hops=1)


def bind(
    groups: Int[ArrayLike, "*batch n"],
    *,
    weight: Float[ArrayLike, "*batch n"] | None = None,
    head: Bool[ArrayLike, "*batch n"] | None = None,
) -> SoftPlan:
    """Gather each group in one of its positions and empty the others, so that the sequence keeps its length.

    Text encoders want all of their 77 positions: a noun takes its attributes in, "not" its adjective; what they leave is 0.

    Args:
      groups: the group of each position; a negative one leaves the position as it is.
      weight: how much each member counts, 1 by default. Gradients flow through it.
      head: positions that may hold a group; its first one does. A group without a head is left as it is.

    Returns:
      A SoftPlan of n segments: `merge(plan, x, reduce="sum")` is the weighted sum, `merge(plan, x)` the weighted mean.

    Law:
      with weight 1, columns add up to 1: the total of the tokens stays, reduce="sum".

    Raises:
      TypeError: groups are not integers, the head is not boolean. ValueError: shapes differ.

    Cost: a dense (n, n) matrix; meant for prompts.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> phrase = jnp.array([-1, 0, 0, -1])  # "a", "not", "red", "car"
      >>> plan = jm.tokens.bind(phrase, weight=jnp.array([1.0, 3.0, 1.0, 1.0]))
      >>> jm.merge(plan, jnp.array([10.0, 20.0, 60.0, 40.0])).tolist()
      [10.0, 30.0, 0.0, 40.0]

    Source: negation phrases merged with a boosted weight on the negation (arXiv:2510.13232; the published abstract, no code).
    """
    groups, head = _checked("bind", groups, head, "head")
    weight = jnp.ones_like(groups, jnp.float32) if weight is None else jnp.asarray(weight)
    if weight.shape != groups.shape:
        raise ValueError(f"bind: weight must have the groups' shape {groups.shape}, got {weight.shape}.")
    check_sequences("bind", weight=weight)

    def row(groups, weight, head):
        i, bound = jnp.arange(groups.shape[-1], dtype=jnp.int32), groups >= 0
        lead = _compared(groups, head & bound)
        bound = bound & (lead < len(i))
        lead = jnp.where(bound, lead, i)
        weight = jnp.where(bound, weight, 1).astype(weight.dtype)
        return jnp.where(lead[None, :] == i[:, None], weight[None, :], 0)

    return SoftPlan(segments.batched(row, groups.ndim - 1)(groups, weight, head))


def bind_attributes(
    groups: Int[ArrayLike, "*batch n"],
    is_attribute: Bool[ArrayLike, "*batch n"],
    *,
    noun_weight: float = 1.1,
    attribute_weight: float = 1.2,
) -> SoftPlan:
    """Bind nouns to their attributes in a prompt: 1.1 · sum of noun tokens + 1.2 · sum of attributes, in the noun's place.

    Args:
      groups: one number for a noun and what belongs to it; negative for all other tokens, which stay.
      is_attribute: which members are attributes. The group gathers at its first token that is not one.
      noun_weight, attribute_weight: the factors.

    Returns:
      A SoftPlan of n segments, for `merge(plan, embeddings, reduce="sum")`. Tokens taken in leave 0 behind. Cost as `bind`.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> groups, red = jnp.array([-1, 0, 0, -1]), jnp.array([False, True, False, False])  # "a", "red", "car", "."
      >>> plan = jm.tokens.bind_attributes(groups, red)
      >>> jm.merge(plan, jnp.array([1.0, 10.0, 100.0, 1.0]), reduce="sum").tolist()
      [1.0, 0.0, 122.0, 1.0]

    Source: Token Merging for training-free semantic binding (arXiv:2411.07132), `token_merge` of `hutaiHang/ToMe`.
    """
    groups, is_attribute = _checked("bind_attributes", groups, is_attribute, "is_attribute")
    weight = jnp.where(is_attribute, jnp.float32(attribute_weight), jnp.float32(noun_weight))
    return bind(groups, weight=weight, head=~is_attribute)


def _checked(who: str, groups, mask, name: str = "mask") -> tuple[Array, Array]:
    groups = jnp.asarray(groups)
    if not jnp.issubdtype(groups.dtype, jnp.integer):
        raise TypeError(f"{who}: groups must be integers, got {groups.dtype}; number your groups.")
    if groups.ndim == 0:
        raise ValueError(f"{who}: groups must have at least one axis, the n positions; got a scalar.")
    mask = jnp.ones_like(groups, bool) if mask is None else jnp.asarray(mask)
    if mask.dtype != bool:
        raise TypeError(f"{who}: {name} must be boolean, got {mask.dtype}.")
    if mask.shape != groups.shape:
        raise ValueError(f"{who}: {name} must have the groups' shape {groups.shape}, got {mask.shape}.")
    check_sequences(who, groups=groups, mask=mask)
    return groups, mask


def _compared(groups: Int[Array, "n"], mask: Bool[Array, "n"]) -> Int[Array, "n"]:
    """The first position of each position's group among those in the mask; n if there is none."""
    n = groups.shape[-1]
    i = jnp.arange(n, dtype=jnp.int32)
    same = (groups[:, None] == groups[None, :]) & mask[None, :]
    return jnp.min(jnp.where(same, i[None, :], n), axis=-1, initial=n)


def _sorted(groups: Int[Array, "n"], mask: Bool[Array, "n"]) -> Int[Array, "n"]:
    """The same where n² comparisons are too many; positions outside the mask get any answer."""
    i = jnp.arange(groups.shape[-1], dtype=jnp.int32)
    order = jnp.lexsort((~mask, groups))  # stable: in each group the mask's positions first, in their order
    starts = jnp.concatenate([jnp.ones(1, bool), jnp.diff(groups[order]) != 0])
    start = jnp.maximum.accumulate(jnp.where(starts, i, 0))
    return order[start][jnp.argsort(order)].astype(jnp.int32)
