"""What there is to merge: how alike the task vectors are, how often they disagree, and where they changed most."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxmerge.params._transform import Stacked, named_leaves, total
from jaxmerge.params.sphere._sphere import products

Label = Callable[[str], Any]
"""Leaf name -> the group it is counted in: `layer_of()`, or your own; leaves labelled None are a group too."""


def cosines(stacked: Stacked) -> Float[Array, "K K"]:
    """The cosines between the task vectors, each model's leaves as one vector. Near 0: the tasks use different directions.

    Law:
      Symmetric; 1 on the diagonal (0 for a model that changed nothing).

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.params.cosines({"w": jnp.array([[1.0, 0.0], [0.0, 2.0]])}).tolist()
      [[1.0, 0.0], [0.0, 1.0]]

    Source: Editing models with task arithmetic (arXiv:2212.04089), figure 5.
    """
    g = sum(products(x).reshape(x.shape[0], -1) for x in named_leaves(stacked)[0].values())
    length = jnp.sqrt(jnp.diagonal(g))
    length = jnp.where(length == 0, 1, length)
    return g / (length[:, None] * length[None])


def sign_conflict(stacked: Stacked, label: Label | None = None) -> dict[Any, Float[Array, ""]]:
    """The share of the task vectors' mass that points against the sign of its entry's sum: what TIES erases.

    Args:
      stacked: task vectors, leaves (K, *shape).
      label: leaf name -> group, such as `layer_of()`; None tells of each leaf.

    Returns:
      {leaf name or label: share}, in the order of the leaves.

    Law:
      0 where all models agree; under 1/2.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> stacked = {"w": jnp.array([[3.0, 3.0], [-1.0, 1.0]]), "b": jnp.ones((2, 4))}
      >>> jm.params.sign_conflict(stacked)["w"].item(), jm.params.sign_conflict(stacked, lambda name: "all")["all"].item()
      (0.125, 0.0625)

    Source: TIES-Merging (arXiv:2306.01708), figure 3 counts entries; weighed by magnitude, small noise does not count.
    """

    def mass(x):
        against = jnp.sum(jnp.where(x * jnp.sign(total(x)) < 0, jnp.abs(x), 0))
        return jnp.stack([against, jnp.sum(jnp.abs(x))])

    share = lambda m: m[0] / jnp.where(m[1] == 0, 1, m[1])
    return {group: share(m) for group, m in _added(stacked, mass, label).items()}


def task_norms(stacked: Stacked, label: Label | None = None) -> dict[Any, Float[Array, "K"]]:
    """The length of each model's task vector, leaf by leaf or group by group.

    Args:
      stacked: task vectors, leaves (K, *shape).
      label: leaf name -> group, such as `layer_of()`; None tells of each leaf.

    Returns:
      {leaf name or label: lengths}, in the order of the leaves.

    Law:
      The squares of all groups add up to the squared length of the whole task vector, whatever the groups.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> stacked = {"layers": [{"w": jnp.array([[3.0], [0.0]]), "b": jnp.array([[4.0], [1.0]])}]}
      >>> jm.params.task_norms(stacked)["layers/0/w"].tolist(), jm.params.task_norms(stacked, jm.params.layer_of())[0].tolist()
      ([3.0, 0.0], [5.0, 1.0])
    """
    squares = lambda x: jnp.sum(jnp.square(x.astype(jnp.float32)), axis=tuple(range(1, x.ndim)))
    return {group: jnp.sqrt(square) for group, square in _added(stacked, squares, label).items()}


def _added(stacked: Stacked, statistic: Callable[[Array], Array], label: Label | None) -> dict[Any, Array]:
    """A statistic of each leaf, added up over the leaves of a group."""
    out: dict[Any, Array] = {}
    for name, x in named_leaves(stacked)[0].items():
        group = name if label is None else label(name)
        out[group] = out[group] + statistic(x) if group in out else statistic(x)
    return out
