"""Token Merging's bipartite soft matching: even positions look for the odd position most like them."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import ArrayLike, Bool, Float

from jaxmerge import _segments as segments
from jaxmerge._kernels.step.ref import segment_ids
from jaxmerge._plan import Plan, identity
from jaxmerge.tokens._checks import checked_metric, checked_r, protected_mask, python_int
from jaxmerge.tokens._nearest import nearest


def bipartite_matching(metric: Float[ArrayLike, "*batch n d"], r: int, *, protect: Sequence[int] = ()) -> Plan:
    """Merge the r even positions that are most like an odd one, each into the odd position that it is most like.

    Likeness is the cosine; of equal ones the first position wins. A source joins its destination's segment, and
    segments keep the order of the positions that stay, so a class token at 0 stays at 0 and nobody has to permute.

    Args:
      metric: what to compare tokens by (ToMe: the keys of the attention just computed, averaged over heads). Any
        floating dtype: similarities are taken in float32, and a row without a direction (zero, inf, NaN) has
        similarity 0 to every other.
      r: how many tokens to remove, a Python int, at most the smaller of the two sides.
      protect: positions that neither move nor receive: (0,) for a class token, (0, 1) with a distillation token,
        range(n - w, n) for a window. Static, because how many tokens are left to merge decides which r is legal, and r
        decides a shape.

    Returns:
      A plan of n - r segments. No gradient flows through it.

    Law:
      each segment holds at most one odd position, and no protected position shares one; bipartite_matching(x, 0) is
      the identity; the plan does not change when rows of the metric are scaled by powers of two.

    Raises:
      ValueError: r is negative or larger than what can merge, a protected position outside [-n, n), a metric of rank 1.
      TypeError: r is not a Python int; `protect` is a mask.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> x = jnp.array([[9.0, 9.0], [1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.8]])
      >>> jm.tokens.bipartite_matching(x, 2, protect=(0,)).segment_ids.tolist()
      [0, 1, 1, 2, 2]

    Source: Token Merging (arXiv:2210.09461), `bipartite_soft_matching`. The official tokens come out as [even, odd] (by
    rank where there is no class token); the groups are the same.
    """
    name = "bipartite_matching"
    metric = checked_metric(name, metric)
    *_, n, _ = metric.shape
    fixed = protected_mask(name, protect, n)
    r = checked_r(name, r, largest(n, fixed), why_not(n, fixed))
    if r == 0:
        return identity(n, like=metric)
    odd = metric[..., 1::2, :]
    best, to = nearest(metric[..., ::2, :], odd[..., np.flatnonzero(~fixed[1::2]), :] if fixed[1::2].any() else odd)
    number = segments.batched(lambda best, to: segment_ids(best, to, r, tuple(fixed.tolist())), metric.ndim - 2)
    return Plan(number(best, to), n - r)


def schedule(depth: int, r: int | tuple[int, float] | Sequence[int], *, n: int | None = None, protected: int = 0) -> list[int]:
    """How many tokens each layer removes, as Token Merging writes it.

    Args:
      depth: number of layers.
      r: an int, the same in every layer; a pair (r, inflect), changing linearly from r (1 - inflect) to
        r (1 + inflect), so that -1 removes most at the start, 0 evenly, 1 most at the end; or a list with one int per
        layer, where missing ones are 0.
      n: tokens at the start. Given, each layer removes no more than the tokens that are left allow.
      protected: how many tokens at the front never merge (1 for a class token, 2 with a distillation token).

    Returns:
      One Python int per layer; a list longer than `depth` passes whole.

    Law:
      schedule(depth, (r, 0.0)) = schedule(depth, r); each r is legal for `bipartite_matching` where its layer stands.

    Raises:
      ValueError: a negative r, an inflect outside [-1, 1], depth below 1.

    Example:
      >>> import jaxmerge as jm
      >>> jm.tokens.schedule(4, (8, -1.0))
      [16, 10, 5, 0]
      >>> jm.tokens.schedule(4, 8, n=17, protected=1)
      [8, 4, 2, 1]

    Source: `parse_r` of Token Merging (arXiv:2210.09461).
    """
    if python_int("schedule", "depth", depth) < 1:
        raise ValueError(f"schedule: depth must be 1 or more, got {depth}.")
    if isinstance(r, tuple):
        if len(r) != 2 or not -1 <= r[1] <= 1:
            raise ValueError(f"schedule: a tuple is (r, inflect) with inflect in [-1, 1], got {r}; use a list for layers.")
        low = int(r[0] * (1 - r[1]))
        high = 2 * r[0] - low
        layers = [int(low + (high - low) / (depth - 1) * i) for i in range(depth)] if depth > 1 else [int(r[0])]
    elif isinstance(r, Sequence):
        layers = [python_int("schedule", "r of a layer", x) for x in r] + [0] * (depth - len(r))
    else:
        layers = [python_int("schedule", "r", r)] * depth
    if min(layers) < 0:
        raise ValueError(f"schedule: r must be 0 or more in every layer, got {layers}.")
    if n is None:
        return layers
    left, clamped = n, []
    for layer in layers:
        clamped.append(min(layer, largest(left, np.arange(left) < protected)))
        left -= clamped[-1]
    return clamped


def largest(n: int, protected: Bool[np.ndarray, "n"]) -> int:
    """The most that can merge: ToMe's (n - protected) // 2 where the protected tokens come first."""
    return min((~protected[::2]).sum().item(), (~protected[1::2]).sum().item())


def why_not(n: int, protected: Bool[np.ndarray, "n"]) -> str:
    """Why no more can merge."""
    return (
        f"of n={n} tokens, {protected.sum()} of them protected, no more can merge than the smaller of the even and odd sides "
        f"hold. tokens.schedule(depth, r, n={n}, protected={protected.sum()}) clamps r layer by layer"
    )
