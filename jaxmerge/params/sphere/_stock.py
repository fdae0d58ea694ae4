"""Model stock: how far to trust the mean of the experts, from the angle between them."""

from typing import Literal

import jax.numpy as jnp

from jaxmerge.params._transform import MergeTransform
from jaxmerge.params.sphere._sphere import combination, norms


def model_stock(
    *, average: Literal["cosine", "angle"] = "cosine", scope: Literal["tensor", "row"] = "tensor", floor: float = 0.0
) -> MergeTransform:
    """The mean of the task vectors times t = K c / (1 + (K - 1) c), where c is the cosine between two of them.

    Args:
      average: with more than two experts, c is the mean of the cosines, or the cosine of the mean angle.
      scope: one c per tensor, or per row (the last axis).
      floor: divide by no less than this product of lengths.

    Law:
      Identical experts give the expert back; orthogonal ones the base. One expert comes back as it is. Where 1 + (K - 1) c is 0
      the base is taken.

    Raises:
      ValueError: an unknown average or scope.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, models = {"w": jnp.zeros(2)}, [{"w": jnp.array([2.0, 0.0])}, {"w": jnp.array([2.0, 2.0])}]
      >>> [round(v, 3) for v in jm.params.merge(jm.params.model_stock(), base, models)["w"].tolist()]
      [1.657, 0.828]

    Source: Model Stock (arXiv:2403.19522); mergekit's `model_stock`: floor=1e-6, filter_wise=True is scope="row"; fusion_bench:
    average="angle".
    """
    if average not in ("cosine", "angle"):
        raise ValueError(f'model_stock: average must be "cosine" or "angle", got {average!r}.')
    if scope == "column":
        raise ValueError('model_stock: scope must be "tensor" or "row", got "column".')

    def coefficients(settings, g):
        models = g.shape[0]
        if models == 1:
            return jnp.ones_like(g[0])
        length = norms(g)
        i, j = jnp.triu_indices(models, 1)
        both = jnp.maximum(length[i] * length[j], floor)
        cos = jnp.clip(g[i, j] / jnp.where(both == 0, 1, both), -1, 1)
        c = jnp.mean(cos, axis=0) if average == "cosine" else jnp.cos(jnp.mean(jnp.arccos(cos), axis=0))
        singular = 1 + (models - 1) * c
        t = jnp.where(singular == 0, 0, models * c / jnp.where(singular == 0, 1, singular))
        return jnp.stack([t / models] * models)

    return combination(coefficients, scope=scope, what="model_stock")
