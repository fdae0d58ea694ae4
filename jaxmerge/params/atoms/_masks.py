"""One vector for all tasks, and for each task a mask of where it applies."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, PyTree

from jaxmerge.params._transform import MergeTransform, Need, Stacked, Step, atom, models, total


class Masked(NamedTuple):
    """A unified task vector, and what makes it each task's own: base + factor[k] * mask[k] * unified is model k.

    Attributes:
      unified: leaves (1, *shape), as a merge leaves them.
      masks: leaves (K, *shape), bool.
      factors: (K,).
    """

    unified: PyTree
    masks: PyTree
    factors: Float[Array, "K"]

    def task(self, k: int) -> Stacked:
        """The task vector of model k, leaves (1, *shape), for `params.add`."""
        return jax.tree.map(lambda u, m: self.factors[k] * jnp.where(m[k : k + 1], u, 0), self.unified, self.masks)


def elect_largest() -> MergeTransform:
    """EMR's Elect: the largest magnitude among the models that agree with the sign of the sum; a sum of 0 elects minus.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> tx, stacked = jm.params.elect_largest(), {"w": jnp.array([[1.0, 2.0, -1.0], [3.0, -2.0, -1.0]])}
      >>> tx.merge(tx.match(stacked), stacked)["w"].tolist()
      [[3.0, -2.0, -1.0]]

    Source: EMR-Merging (arXiv:2405.17461); fusion_bench.
    """

    def merge(plan, x):
        s = total(x)[0]
        top = bottom = jnp.zeros_like(s)
        for one in models(x):
            top, bottom = jnp.where(one > top, one, top), jnp.where(one < bottom, one, bottom)
        return jnp.where(jnp.isnan(s), s, jnp.where(s > 0, top, bottom))[None]

    return atom(Step(lambda name, shape: (), lambda settings, x: settings, merge, models=1, blocks=True))


def emr(stacked: Stacked) -> Masked:
    """Elect, mask, rescale: one vector, K masks of the entries whose sign each task shares, K factors that restore its size.

    A task's factor is the sum over tensors of its mean magnitude, over that of the masked unified vector.

    Args:
      stacked: task vectors, leaves (K, *shape).

    Law:
      With one model, task(0) is its task vector. A task that nothing is left of has factor 0.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> masked = jm.params.emr({"w": jnp.array([[1.0, 2.0], [3.0, -2.0]])})
      >>> masked.unified["w"].tolist(), masked.task(1)["w"].tolist()
      ([[3.0, -2.0]], [[3.0, -2.0]])

    Source: EMR-Merging (arXiv:2405.17461); fusion_bench.
    """
    tx = elect_largest()
    unified = tx.merge(tx.match(stacked), stacked)
    masks = jax.tree.map(lambda x, u: x * u > 0, stacked, unified)
    mean = lambda x: jnp.mean(jnp.abs(x), axis=tuple(range(1, x.ndim)))
    add_up = lambda tree: sum(jax.tree.leaves(tree), jnp.float32(0))
    was = add_up(jax.tree.map(mean, stacked))
    left = add_up(jax.tree.map(lambda m, u: mean(jnp.where(m, u, 0)), masks, unified))
    return Masked(unified, masks, jnp.where(left > 0, was / jnp.where(left > 0, left, 1), 0))


def tall_masks(stacked: Stacked, merged: Stacked, *, scale: float = 0.4) -> PyTree:
    """Where a task's own entry says more than what the merge makes of it: |t_k| > scale * |merged - t_k|.

    Args:
      stacked: task vectors, leaves (K, *shape).
      merged: the merged task vector, leaves (1, *shape).
      scale: the larger, the fewer entries.

    Returns:
      Masks, leaves (K, *shape), bool.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.params.tall_masks({"w": jnp.array([[1.0, 0.1]])}, {"w": jnp.array([[1.5, 2.0]])})["w"].tolist()
      [[True, False]]

    Source: TALL masks (arXiv:2405.07813); fusion_bench.
    """
    return jax.tree.map(lambda x, m: jnp.abs(x) > scale * jnp.abs(m - x), stacked, merged)


def consensus(*, scale: float = 0.4, shared: int = 2, factor: float = 0.3) -> MergeTransform:
    """Consensus task arithmetic: the sum of the task vectors, only where it speaks for several tasks.

    Args:
      scale: see `tall_masks`, which decides for each task whether an entry is its own.
      shared: keep the entries that are so for at least this many tasks.
      factor: what the sum is multiplied by.

    Raises:
      ValueError: shared under 1.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, models = {"w": jnp.zeros(2)}, [{"w": jnp.array([1.0, 1.0])}, {"w": jnp.array([1.0, 0.0])}]
      >>> jm.params.merge(jm.params.consensus(factor=1.0), base, models)["w"].tolist()
      [2.0, 0.0]

    Source: Localizing task information (arXiv:2405.07813), Consensus TA.
    """
    if shared < 1:
        raise ValueError(f"consensus: shared must be 1 or more, a number of tasks; got {shared}.")

    def merge(plan, x):
        merged = factor * total(x)[0]
        enough: list[Array] = []  # whether 1, 2, ... tasks have voted for an entry: in bits, cheaper than numbers
        for one in models(x):
            vote = jnp.abs(one) > scale * jnp.abs(merged - one)
            with_it = [vote, *(some & vote for some in enough)][: min(shared, x.shape[0])]
            enough = [some | more for some, more in zip(enough, with_it, strict=False)] + with_it[len(enough) :]
        return jnp.where(enough[-1], merged, 0 * merged)[None]  # of what is not finite a NaN is left, to be seen

    return atom(Step(lambda name, shape: (), lambda settings, x: settings, merge, models=1, blocks=True))


def mask(masks: Mapping[str, Any]) -> MergeTransform:
    """Apply masks that are given: zero the entries where a mask is 0.

    Args:
      masks: {leaf name: (K, *shape)}, bool or numbers.

    Raises:
      ValueError: a leaf without a mask, or with one of another shape.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> tx, stacked = jm.params.mask({"w": jnp.array([[1, 0]])}), {"w": jnp.array([[2.0, 3.0]])}
      >>> tx.merge(tx.match(stacked), stacked)["w"].tolist()
      [[2.0, 0.0]]
    """

    def settings(name, shape):
        if name not in masks or np.shape(masks[name]) != shape:
            found = np.shape(masks[name]) if name in masks else "none"
            raise ValueError(f"mask: leaf {name!r} needs a mask of shape {shape}; got {found}.")
        return {"mask": masks[name]}

    as_is = lambda settings, x: settings
    return atom(Step(settings, as_is, lambda plan, x: jnp.where(plan["mask"] != 0, x, 0), needs=(Need("data", "entry"),)))
