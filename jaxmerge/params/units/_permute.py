"""Units of a network have no order: permute those of one model until they match another's, then merge.

A specification names the permutation of each axis: {leaf name: (name or None per axis)}. Axes that carry one name are permuted
together: a layer's outputs and the next one's inputs.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from jaxmerge.params._transform import named_leaves
from jaxmerge.params.units._assignment import assign

Spec = Mapping[str, tuple[str | None, ...]]
Permutations = dict[str, Int[np.ndarray, "n"]]


def match_weights(spec: Spec, a: PyTree, b: PyTree, *, rounds: int = 100, tolerance: float = 1e-12) -> Permutations:
    """The permutations of b's units under which its weights are most like a's: coordinate descent over the named permutations.

    Each in turn becomes the best assignment given the others, in the order of their names, until a round improves nothing.
    Runs on the host.

    Args:
      spec: {leaf name: (name of the permutation or None, per axis)}; leaves that are not named stay as they are.
      a, b: models of one structure.
      rounds: how often to go over all permutations, at most.
      tolerance: an improvement of the scalar product of the weights no larger than this counts as none.

    Returns:
      {name: indices}: unit i of the permuted b is unit indices[i] of b.

    Law:
      match_weights(spec, a, a) is the identity, if no two units of a layer are alike; the scalar product of a and the permuted
      b is never under that of a and b.

    Raises:
      ValueError: a leaf that the models lack; a specification that does not fit the axes.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> spec = {"in": (None, "p"), "out": ("p", None)}
      >>> a = {"in": jnp.array([[1.0, 2.0]]), "out": jnp.array([[3.0], [4.0]])}
      >>> b = {"in": jnp.array([[2.0, 1.0]]), "out": jnp.array([[4.0], [3.0]])}
      >>> p = jm.params.match_weights(spec, a, b)
      >>> p["p"].tolist(), jm.params.permute(spec, p, b)["in"].tolist()
      ([1, 0], [[1.0, 2.0]])

    Source: Git Re-Basin (arXiv:2209.04836), weight matching; its order of the permutations is random.
    """
    (ours, _), (theirs, _) = named_leaves(a), named_leaves(b)
    sizes = spec_sizes(spec, ours)
    ours, theirs = ({n: np.asarray(x, np.float64) for n, x in leaves.items() if n in spec} for leaves in (ours, theirs))
    found = {p: np.arange(n) for p, n in sizes.items()}
    for _ in range(rounds):
        improved = False
        for p in sorted(found):
            score = np.zeros((sizes[p], sizes[p]))
            for name, axes in spec.items():
                for axis, q in enumerate(axes):
                    if q != p:
                        continue
                    w = _permuted(theirs[name], axes, found, leave=axis)
                    rows = lambda x, axis=axis: np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)
                    score += rows(ours[name]) @ rows(w).T
            best = assign(score)
            gain = score[np.arange(len(best)), best].sum() - score[np.arange(len(best)), found[p]].sum()
            if gain > tolerance:
                found[p], improved = best, True
        if not improved:
            break
    return found


def permute(spec: Spec, permutations: Mapping[str, Int[np.ndarray, "n"] | Int[Array, "n"]], model: PyTree) -> PyTree:
    """The model with its units in another order. What it computes does not change.

    Args:
      spec: see `match_weights`.
      permutations: {name: indices}.
      model: a pytree.

    Law:
      The identity changes nothing; permuting by p, then by its inverse, changes nothing.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.params.permute({"w": ("p",)}, {"p": jnp.array([1, 0])}, {"w": jnp.array([5.0, 6.0])})["w"].tolist()
      [6.0, 5.0]

    Source: Git Re-Basin (arXiv:2209.04836).
    """
    leaves, treedef = named_leaves(model)
    spec_sizes(spec, leaves)
    for name, axes in spec.items():
        for axis, p in enumerate(axes):
            if p is not None:
                leaves[name] = jnp.take(leaves[name], jnp.asarray(permutations[p]), axis=axis)
    return jax.tree.unflatten(treedef, list(leaves.values()))


def spec_sizes(spec: Spec, leaves: Mapping[str, Any]) -> dict[str, int]:
    """How many units each permutation has; every contradiction in one message."""
    problems, sizes = [], {}
    for name, axes in spec.items():
        if name not in leaves:
            problems.append(f"  there is no leaf {name!r}")
            continue
        shape = np.shape(leaves[name])
        if len(shape) != len(axes):
            problems.append(f"  {name}: {len(axes)} axes are named, the leaf has shape {shape}")
            continue
        for n, p in zip(shape, axes, strict=True):
            if p is not None and sizes.setdefault(p, n) != n:
                problems.append(f"  {name}: permutation {p!r} is of {sizes[p]} units elsewhere, here of {n}")
    if problems:
        raise ValueError("the specification does not fit the model:\n" + "\n".join(problems))
    return sizes


def _permuted(x: np.ndarray, axes: tuple[str | None, ...], found: Permutations, leave: int) -> np.ndarray:
    for axis, p in enumerate(axes):
        if p is not None and axis != leave:
            x = np.take(x, found[p], axis=axis)
    return x
