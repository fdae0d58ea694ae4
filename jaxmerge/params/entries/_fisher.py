"""The mean of models, each entry weighted by how sure each model is of it."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmerge.params._transform import (
    IN_FILES,
    Hyperparameter,
    MergeTransform,
    Need,
    Step,
    Survey,
    atom,
    each,
    float32,
    models,
    resolve,
    total,
)
from jaxmerge.params.order._exact import as_floats, square_sums


def fisher(
    weights: Sequence[Any] | None = None, *, weight: Hyperparameter = 1.0, normalize: bool = True, floor: float = 1e-6
) -> MergeTransform:
    """The mean of the models, entry by entry, weighted by how sure each model is of it: its diagonal Fisher information.

    Args:
      weights: for each model {leaf name: array of the leaf's shape}: mean squared gradients of its log-likelihood
        (`fisher_information`). None: they lie in files, `checkpoint.merge(statistics=...)`.
      weight: one number, one per model, or a function of the leaf's name, times the Fisher information.
      normalize: divide each model's by its l2 norm over the whole model.
      floor: added to the information and to the norms.

    Law:
      Identical models give the model back.

    Raises:
      ValueError: not one mapping per model; a leaf without information, or of another shape.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> tx = jm.params.fisher([{"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 1.0])}])
      >>> models = [{"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 4.0])}]
      >>> jm.params.merge(tx, None, models)["w"].round(3).tolist()
      [1.0, 4.0]

    Source: Merging models with Fisher-weighted averaging (arXiv:2111.09832); fusion_bench.
    """
    given = None if weights is None else [{n: jnp.asarray(v, jnp.float32) for n, v in model.items()} for model in weights]
    factor: Any = 1.0
    if given is not None and normalize:
        square = jnp.stack([sum((jnp.sum(v * v) for v in model.values()), jnp.float32(0)) for model in given])
        factor = _shares(jnp.sqrt(square) + floor)

    def fits(name, shape, found):
        if len(found) != shape[0]:
            raise ValueError(f"fisher: pass the information of each of the {shape[0]} models; got {len(found)}.")
        if any(f != shape[1:] for f in found):
            raise ValueError(
                f"fisher: every model needs information of shape {shape[1:]} for leaf {name!r}; got {list(found)}."
            )

    def settings(name, shape):
        w = float32(resolve(weight, name, shape[0], "fisher: weight"))
        if given is None:
            return {"data": None, "factor": w}
        fits(name, shape, [model[name].shape if name in model else None for model in given])
        return {"data": [model[name] for model in given], "factor": w * factor}

    def merge(plan, x):
        if plan["data"] is None:
            raise ValueError(f"fisher: pass weights, the information of each model; {IN_FILES}")
        f = jnp.stack([(one + floor) * times for one, times in zip(plan["data"], models(plan["factor"]), strict=True)])
        return total(each(jnp.multiply, x, f)) / total(f)

    step = Step(settings, lambda settings, x: settings, merge, models=1, needs=(Need("data", "entry"),))
    if given is None:
        step = step._replace(data=fits, blocks=True, survey=_norms(floor) if normalize else None)
    return atom(step)


def _shares(norms: Any) -> Any:
    """What each model's information is multiplied by: 1 / norm, over their sum."""
    return (1 / norms) / (1 / norms).sum()


def _norms(floor: float) -> Survey:
    """The l2 norm of each model's information over the whole model, from the files."""

    def settle(settings, leaves):
        raise ValueError(f"fisher: pass weights, the information of each model; {IN_FILES}")

    def step(query, notes, counts):
        return query, {"squares": sum(as_floats(found) for found in counts.values())}

    def finish(notes, settings):
        factor = _shares(np.sqrt(notes["squares"]) + floor).astype(np.float32)
        return {name: s | {"factor": s["factor"] * factor} for name, s in settings.items()}

    start = lambda settings: (np.zeros(1, np.float32), {})
    return Survey(settle, 1, start, lambda query, x: square_sums(x), step, finish, of_data=True)
