"""Which entries did one expert change, which did several: reinforced agents overlap little."""

import jax.numpy as jnp
from jax import Array

from jaxmerge.params._transform import MergeTransform, Need, Step, atom, each, total
from jaxmerge.params.order import _quantile as q


def ram(*, threshold: float = 1e-5) -> MergeTransform:
    """Entries that one expert changed are taken as they are; entries that several changed are averaged over those.

    Args:
      threshold: an entry is changed where its task vector is larger than this.

    Law:
      Identical experts give the expert back, up to the threshold.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, models = {"w": jnp.zeros(2)}, [{"w": jnp.array([1.0, 1.0])}, {"w": jnp.array([0.0, 3.0])}]
      >>> jm.params.merge(jm.params.ram(), base, models)["w"].tolist()
      [1.0, 2.0]

    Source: Reinforced Agent Merging (arXiv:2601.13572); mergekit's `ram`.
    """
    return _overlap(threshold, 0.0, 0.0)


def ramplus_tl(*, boost: float = 0.1, limit: float = 0.2, threshold: float = 1e-5) -> MergeTransform:
    """As `ram`, and what only one expert changed is enlarged by 1 + boost * min(shared / unique, limit).

    Args:
      boost: how strongly to enlarge.
      limit: the largest ratio that counts. shared and unique are the numbers of entries of the expert, in each tensor, that
        others changed too, and that no other did.
      threshold: an entry is changed where its task vector is larger than this.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, models = {"w": jnp.zeros(2)}, [{"w": jnp.array([1.0, 1.0])}, {"w": jnp.array([0.0, 3.0])}]
      >>> [round(v, 4) for v in jm.params.merge(jm.params.ramplus_tl(), base, models)["w"].tolist()]
      [1.02, 2.0]

    Source: Reinforced Agent Merging (arXiv:2601.13572); mergekit's `ramplus_tl` (r is boost, alpha is limit).
    """
    return _overlap(threshold, boost, limit)


def _overlap(threshold: float, boost: float, limit: float) -> MergeTransform:
    def match(settings, x):
        if not boost:
            return {}
        several = _how_many(x) > 1
        of_several = [each(lambda x, mask=mask: _changed(x) & mask, x) for mask in (several, ~several)]
        shared, unique = map(q.number, q.counts(*of_several))
        ratio = shared / jnp.maximum(unique, threshold)
        return {"factor": 1 + boost * jnp.clip(ratio, 0, limit)}

    def merge(plan, x):
        many = _how_many(x)
        changes = each(lambda x: jnp.where(_changed(x), x, 0), x)
        mean = total(changes)[0] / jnp.where(many > 1, many, 1)
        if plan:
            mean = jnp.where(many > 1, mean, total(each(jnp.multiply, changes, plan["factor"]))[0])
        return mean[None]

    def _changed(x: Array) -> Array:
        return ~(jnp.abs(x) <= threshold)  # a NaN is a change, to be seen

    def _how_many(x: Array) -> Array:
        return total(each(lambda x: jnp.where(_changed(x), 1.0, 0.0), x))[0]

    needs = (Need("sum", "tensor"),) if boost else ()
    return atom(Step(lambda name, shape: {}, match, merge, models=1, needs=needs))
