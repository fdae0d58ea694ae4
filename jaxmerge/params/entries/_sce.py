"""Select, calculate, erase: weigh each expert by how much it changed, tensor by tensor."""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxmerge.params._transform import Hyperparameter, MergeTransform, Need, Step, atom, each, total
from jaxmerge.params.atoms._trim import _density
from jaxmerge.params.order import _quantile as q
from jaxmerge.params.order._sums import sums


def sce(density: float = 0.1, *, mask: Literal["coefficient", "delta"] = "coefficient", floor: float = 0.0) -> MergeTransform:
    """Average, entry by entry, the task vectors that agree with the sign of their sum, weighted by their mean square.

    Args:
      density: of the entries whose variance over the experts is not 0, the share (largest variance first) that counts.
      mask: what the selection masks: only the entries that the weights are computed from, or the task vectors themselves.
      floor: weights are equal where the mean squares sum to less than this. Real task vectors are small: mind the units.

    Law:
      One expert comes back as it is at mask="coefficient".

    Raises:
      ValueError: density outside [0, 1]; an unknown mask.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, models = {"w": jnp.zeros(2)}, [{"w": jnp.array([1.0, 1.0])}, {"w": jnp.array([3.0, -1.0])}]
      >>> jm.params.merge(jm.params.sce(density=1.0), base, models)["w"].tolist()
      [2.6666667461395264, 1.0]

    Source: FuseChat (arXiv:2408.07990), the official code: mask="coefficient"; mergekit's `sce`: mask="delta", floor=1e-6.
    """
    if mask not in ("coefficient", "delta"):
        raise ValueError(f'sce: mask must be "coefficient" or "delta", got {mask!r}.')
    return _energy(floor, erase=True, density=density, delta=mask == "delta")


def varm(*, floor: float = 0.0) -> MergeTransform:
    """The mean of the task vectors, weighted by their mean squares, tensor by tensor.

    Args:
      floor: weights are equal where the mean squares sum to less than this.

    Law:
      Identical experts give the expert back.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, models = {"w": jnp.zeros(2)}, [{"w": jnp.array([1.0, 1.0])}, {"w": jnp.array([3.0, -3.0])}]
      >>> [round(v, 4) for v in jm.params.merge(jm.params.varm(), base, models)["w"].tolist()]
      [2.8, -2.6]

    Source: FuseChat's VaRM (arXiv:2402.16107), whose code is not published; the weights are those of the official SCE.
    """
    return _energy(floor, erase=False)


def select_variance(density: float) -> MergeTransform:
    """Zero, in all models, the entries that vary little between them; keep the `density` share that varies most.

    The share is of the entries whose variance is not 0, in each tensor; equal variances keep the first by flat index.

    Args:
      density: in [0, 1].

    Law:
      density = 1 changes nothing.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> tx, stacked = jm.params.select_variance(0.5), {"w": jnp.array([[1.0, 5.0], [2.0, 1.0]])}
      >>> tx.merge(tx.match(stacked), stacked)["w"].tolist()
      [[0.0, 5.0], [0.0, 1.0]]

    Source: the Select step of FuseChat's SCE (arXiv:2408.07990), as mergekit applies it.
    """

    def merge(plan, x):
        selected = _selected(plan, x)
        return each(lambda x: jnp.where(selected, x, 0), x)

    return atom(Step(_selection_settings(density), _select, merge, needs=(Need("order", "tensor"),)))


def _selection_settings(density: Hyperparameter):
    def settings(name, shape):
        d = _density(density, name, 1, "sce")
        return {
            "fraction": np.minimum(np.ceil(d * 2.0**32), 2.0**32 - 1).astype(np.uint32),  # up: 0.1 of 10 is 1
            "all": d >= 1,
        }

    return settings


def _variance(x: Array) -> Array:
    """The same bits wherever it is computed: the maximum keeps the compiler from multiplying and adding in one rounding."""
    mean = total(x)[0] / x.shape[0]
    return total(each(lambda x: jnp.maximum((x - mean) ** 2, 0), x)) / x.shape[0]


def _select(settings: dict, x: Array) -> dict:
    spread = _variance(x)
    k = q.share(q.count(q.magnitude_bits(spread) > 0), settings["fraction"])
    t, above, tied = q.place(spread, k, q.magnitude_bits)
    cut, _ = q.first_tied(spread, t, tied, q.subtract(k, q.smaller(above, k)), q.magnitude_bits)
    return {"threshold": t, "cut": cut, "all": settings["all"]}


def _selected(plan: dict, x: Array) -> Array:
    bits = q.magnitude_bits(_variance(x))[0]
    t, cut = plan["threshold"][0], plan["cut"][:, 0]
    chosen = (bits > t) | ((bits == t) & q.before(cut, bits)) | plan["all"][0]
    return lax.optimization_barrier(chosen)  # written down once for all the models


def _energy(floor: float, *, erase: bool, density: float = 1.0, delta: bool = False) -> MergeTransform:
    """Weights in proportion to mean squares of what is selected; with `erase`, among the models that agree with the sign of the
    sum; with `delta`, of what is selected only."""

    def match(settings, x):
        selection = _select(settings, x) if density < 1 else {}
        selected = _selected(selection, x) if selection else True
        # not the squares of what is left: XLA would write that down, to read it here and in `merge`
        squares = [jnp.where(selected, jnp.square(x[k : k + 1]), 0) for k in range(x.shape[0])]
        square = jnp.stack(sums(squares, tuple(range(1, x.ndim)))).reshape(-1) / x[0].size
        mass = jnp.sum(square)
        uniform = (mass < floor) | (mass == 0)
        weight = jnp.where(uniform, 1 / x.shape[0], square / jnp.where(mass == 0, 1, mass))
        return {"weight": weight, "selection": selection if delta else {}}

    def merge(plan, x):
        if plan["selection"]:
            selected = _selected(plan["selection"], x)
            x = each(lambda x: jnp.where(selected, x, 0), x)
        if not erase:
            return total(each(jnp.multiply, x, plan["weight"]))
        sign = jnp.where(total(x)[0] >= 0, 1, -1)
        agrees = lambda x: x * sign > 0
        mass = total(each(lambda x, w: jnp.where(agrees(x), w, 0), x, plan["weight"]))[0]
        left = each(lambda x, w: jnp.where(agrees(x) | jnp.isnan(x), w * x, 0), x, plan["weight"])
        return (total(left)[0] / jnp.where(mass == 0, 1, mass))[None]

    needs = (*((Need("order", "tensor"),) if density < 1 else ()), Need("sum", "tensor"))
    return atom(Step(_selection_settings(density), match, merge, models=1, needs=needs))
