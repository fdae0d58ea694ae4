"""How many units of each layer to keep apart, if the network may cost so much: an exact search over a grid of shares.

Costs couple the layers: of a kernel between two of them, n x m entries become (n + k)(m + l), for k and l units kept apart. The
search goes from layer to layer with a table of the best gain for each cost so far, over the shares of those layers that later
ones still meet (dynamic programming over the graph that the specification draws).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Array, Int, PyTree

from jaxmerge.params._transform import named_leaves
from jaxmerge.params.units._permute import Spec, permute, spec_sizes
from jaxmerge.params.units._units import units_alike


def unit_gains(
    spec: Spec, permutations: Mapping[str, Int[np.ndarray, "n"] | Int[Array, "n"]], a: PyTree, b: PyTree
) -> dict[str, np.ndarray]:
    """What is gained by keeping units apart: the squared distance of the two units that would have been merged.

    Args:
      spec, permutations, a, b: see `merge_units`.

    Returns:
      {permutation: (n,)}, the units in the order in which `merge_units` leaves them apart, the least alike first.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> spec = {"in": (None, "p"), "out": ("p", None)}
      >>> a = {"in": jnp.array([[1.0, 2.0]]), "out": jnp.array([[3.0], [4.0]])}
      >>> b = {"in": jnp.array([[1.0, -2.0]]), "out": jnp.array([[3.0], [-4.0]])}
      >>> jm.params.unit_gains(spec, {"p": jnp.arange(2)}, a, b)["p"].tolist()
      [80.0, 0.0]

    Source: ours; PLeaS (arXiv:2407.02447) measures how much accuracy each layer's merging costs.
    """
    (ours, _), (theirs, _) = named_leaves(a), named_leaves(permute(spec, permutations, b))
    found = units_alike(spec, ours, theirs, spec_sizes(spec, ours))
    return {p: distance[order[::-1]] for p, (order, distance) in found.items()}


def unit_budget(
    spec: Spec,
    model: PyTree,
    budget: float,
    gains: Mapping[str, float | Sequence[float] | np.ndarray],
    *,
    uses: Mapping[str, float] | None = None,
    count: Literal["nonzero", "stored"] = "nonzero",
    levels: int = 8,
    resolution: int = 1024,
) -> dict[str, float]:
    """Choose the share of units to merge in each layer, so that as much as can be is kept apart where it counts.

    Args:
      spec: see `match_weights`.
      model: one of the two models; shapes will do.
      budget: what the merged network may cost, in units of one model: 1 merges everything, 2 or so nothing.
      gains: for each permutation what its share kept apart is worth (a number), or what each unit is (`unit_gains`).
      uses: {leaf name: how often each of its entries is used for one input}, such as a convolution's positions: costs are then
        FLOPs. None counts parameters: each leaf that `spec` names, once.
      count: "nonzero" leaves out what would lead from one model's units to the other's, which is always 0; "stored" counts it.
      levels: shares are multiples of 1 / levels.
      resolution: costs are rounded up to the room between 1 and the budget over this number.

    Returns:
      {permutation: share to merge}, for `merge_units` and `pleas`.

    Law:
      The costs are within the budget. No other shares on the grid gain more, if their costs, rounded up leaf by leaf, are
      within the budget too. Whole numbers are not rounded where the room is `resolution` of their common divisor, or less.

    Raises:
      ValueError: a budget below 1; permutations without a gain, or with as many gains as there are no units; a specification
        that couples too many layers for so many levels.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> spec = {"in": (None, "p"), "mid": ("p", "q"), "out": ("q", None)}
      >>> model = {"in": jnp.ones((2, 8)), "mid": jnp.ones((8, 8)), "out": jnp.ones((8, 2))}
      >>> jm.params.unit_budget(spec, model, 1.5, {"p": 3.0, "q": 1.0})
      {'p': 0.5, 'q': 0.875}

    Source: PLeaS (arXiv:2407.02447), which gives Gurobi the same program over real shares; its costs are "nonzero" FLOPs, its
    gains one number per layer.
    """
    if budget < 1 or levels < 1 or resolution < 1:
        raise ValueError(
            f"unit_budget: budget must be 1 (everything merged) or more, levels and resolution 1 or more; got {budget}, "
            f"{levels} and {resolution}."
        )
    leaves, _ = named_leaves(model)
    sizes = spec_sizes(spec, leaves)
    worth = {p: _worth(p, gains.get(p), n, levels) for p, n in sizes.items()}
    kept = {p: np.array([i * n // levels for i in range(levels + 1)]) for p, n in sizes.items()}  # units apart at each level
    costs, base = [], 0.0
    for name, axes in spec.items():
        use = 1.0 if uses is None else uses[name]
        variables, table, one = _cost(np.shape(leaves[name]), axes, sizes, kept, count)
        base += use * one
        if variables:
            costs.append((variables, use * table))
    room = (budget - 1) * base
    every = np.concatenate([np.ravel(t) for _, t in costs]) if costs else np.zeros(1)
    unit = float(np.gcd.reduce(every.astype(np.int64))) if (every == np.rint(every)).all() else 0.0
    grain = max(unit, room / resolution) or 1.0
    bins = int(room / grain + 1e-9)
    chosen = _search(worth, [(v, np.ceil(t / grain - 1e-9).astype(np.int64)) for v, t in costs], bins, levels)
    return {p: 1 - float(kept[p][i]) / n for (p, n), i in ((item, chosen[item[0]]) for item in sizes.items())}


def _worth(p: str, gain: Any, n: int, levels: int) -> np.ndarray:
    """(levels + 1,): what is gained at each level."""
    if gain is None or np.ndim(gain) > 1 or (np.ndim(gain) == 1 and len(gain) != n):
        raise ValueError(f"unit_budget: permutation {p!r} needs one gain, or one for each of its {n} units; got {gain}.")
    kept = np.array([i * n // levels for i in range(levels + 1)])
    if np.ndim(gain) == 0:
        return float(gain) * kept / n
    return np.concatenate([[0.0], np.cumsum(np.asarray(gain, np.float64))])[kept]


def _cost(shape, axes, sizes, kept, count) -> tuple[tuple[str, ...], np.ndarray, float]:
    """What a leaf costs beyond one model's, over the levels of its permutations; and what one model's does."""
    moved = [p for p in axes if p is not None]
    names = tuple(dict.fromkeys(moved))
    apart = {p: kept[p].astype(np.float64).reshape([-1 if q == p else 1 for q in names]) for p in names}
    entries, one = np.ones((1,) * len(names)), float(np.prod(shape, dtype=np.float64))
    for p in moved:
        entries = entries * (sizes[p] + apart[p])
    if count == "nonzero" and len(moved) == 2:
        entries = entries - 2 * apart[moved[0]] * apart[moved[1]]
    fixed = one / np.prod([sizes[p] for p in moved], dtype=np.float64) if one else 0.0
    return names, fixed * entries - one, one


def _search(worth: dict, costs: list, bins: int, levels: int) -> dict[str, int]:
    """The level of each permutation: the most worth whose costs, added up, are `bins` or fewer."""
    frontier: list[str] = []
    table = np.zeros(bins + 1)  # over the frontier's levels and the bins taken so far: the best worth of what was settled
    left, trail = list(worth), []
    open_costs = list(costs)
    while left:
        near = {p: {q for names, _ in open_costs if p in names for q in names} | {p} for p in left}
        p = min(left, key={p: (len({*frontier} | near[p]), p) for p in left}.__getitem__)
        for q in sorted(near[p] - {*frontier}):
            if table.size * (levels + 1) > 10**7:
                raise ValueError(
                    f"unit_budget: {[*frontier, q]} are coupled, too many for {levels} levels and {bins} steps of costs; "
                    "use fewer levels, or a lower resolution."
                )
            shape = (*table.shape[:-1], levels + 1, bins + 1)
            table = np.broadcast_to(table[..., None, :], shape) + worth[q][:, None]
            frontier.append(q)
        for names, cost in [c for c in open_costs if p in c[0]]:
            where = [frontier.index(q) for q in names]
            cost = np.transpose(cost, np.argsort(where))
            cost = cost.reshape([levels + 1 if i in where else 1 for i in range(len(frontier))] + [1])
            at = np.arange(bins + 1) - cost
            taken = np.take_along_axis(table, np.broadcast_to(np.maximum(at, 0), table.shape), axis=-1)
            table = np.where(at >= 0, taken, -np.inf)
            trail.append(("cost", None, cost, tuple(frontier)))
        open_costs = [c for c in open_costs if p not in c[0]]
        axis = frontier.index(p)
        frontier.remove(p)
        left.remove(p)
        trail.append(("settle", p, np.argmax(table, axis=axis), tuple(frontier)))
        table = np.max(table, axis=axis)
    return _retrace(trail, bins)


def _retrace(trail: list, bins: int) -> dict[str, int]:
    """Back through the tables: the level that each settled permutation had, and what it left for those before."""
    chosen: dict[str, int] = {}
    for kind, what, array, frontier in reversed(trail):
        at = tuple(chosen[q] if array.shape[i] > 1 else 0 for i, q in enumerate(frontier))
        if kind == "settle":
            chosen[what] = int(array[(*at, bins)])
        else:
            bins -= int(array[(*at, 0)])
    return chosen
