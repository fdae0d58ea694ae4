"""Weigh, scale and rescale: coefficients."""

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmerge.params._deferred import entries, last
from jaxmerge.params._transform import (
    Hyperparameter,
    Match,
    MergeTransform,
    Need,
    Step,
    a_merge,
    atom,
    each,
    float32,
    left,
    models,
    normalized,
    resolve,
)
from jaxmerge.params.order._sums import sums


def weigh(weight: Hyperparameter, *, normalize: bool = False) -> MergeTransform:
    """Multiply each model by its weight.

    Args:
      weight: one number, one per model, or a function of the leaf's name; a traced array is welcome (learned coefficients).
      normalize: divide the weights by their sum.

    Raises:
      ValueError: normalize, and the weights sum to 0.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> tx, stacked = jm.params.weigh([1.0, 3.0], normalize=True), {"w": jnp.array([[4.0], [8.0]])}
      >>> tx.merge(tx.match(stacked), stacked)["w"].tolist()
      [[1.0], [6.0]]
    """

    def settings(name, shape):
        w = resolve(weight, name, shape[0], "weigh: weight")
        return {"weight": float32(normalized(w, name, "weigh") if normalize else w)}

    return atom(Step(settings, _as_is, _times("weight"), blocks=True))


def scale(factor: Hyperparameter) -> MergeTransform:
    """Multiply what is there by one factor (after a reduction there is one model left).

    Args:
      factor: one number, or a function of the leaf's name.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> tx, stacked = jm.params.scale(lambda name: 2.0 if "mlp" in name else 1.0), {"mlp": jnp.ones((1, 1))}
      >>> tx.merge(tx.match(stacked), stacked)["mlp"].item()
      2.0
    """

    def settings(name, shape):
        return {"factor": float32(resolve(factor, name, shape[0], "scale: factor"))}

    one = lambda settings: not isinstance(settings["factor"], Array) and bool(np.all(settings["factor"] == 1))
    return atom(Step(settings, _as_is, _times("factor"), blocks=True, copies=one))


def rescale(tx: MergeTransform, norm: Literal["inv_p", "l1", "l2", "linf"]) -> MergeTransform:
    """Make up for what a mask removed: apply `tx` (`trim` or `random_mask`), then enlarge what it left.

    Args:
      tx: one atom.
      norm: "inv_p" divides by the density, which keeps the expectation; "l1", "l2" and "linf" restore that norm of every
        tensor (a tensor with a norm under 1e-7, before or after, is left as it is).

    Raises:
      ValueError: an unknown norm; `tx` is not one atom of this package, or has no density to divide by.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> tx, stacked = jm.params.rescale(jm.params.trim(0.5), "l1"), {"w": jnp.array([[1.0, -3.0]])}
      >>> tx.merge(tx.match(stacked), stacked)["w"].tolist()
      [[0.0, -4.0]]

    Source: DARE (arXiv:2311.03099), MergeLM and fusion_bench divide by the density; mergekit >= 0.1 matches the l1 norm
    (its sparsifiers know l2 and linf too).
    """
    if norm not in ("inv_p", *NORMS):
        raise ValueError(f"rescale: norm must be one of {('inv_p', *NORMS)}, got {norm!r}.")
    if not isinstance(a_merge(tx, "rescale").match, Match) or len(tx.match.steps) != 1 or tx.match.steps[0].models is not None:
        raise ValueError("rescale: wrap one masking atom, such as rescale(random_mask(0.5, seed=0), 'inv_p'); got a chain.")
    (step,) = tx.match.steps
    of, combine, finish = NORMS.get(norm, (None, None, None))

    def match(settings, x):
        if "ratio" in settings:  # `on_host` has been there
            return {"mask": step.match(settings["mask"], x), "factor": settings["ratio"]}
        plan = step.match(settings, x)
        if norm == "inv_p":
            if not isinstance(plan, dict) or "density" not in plan:
                raise ValueError("rescale: this atom has no density to divide by; use norm='l1', or scale.")
            density = jnp.asarray(plan["density"])
            return {"mask": plan, "factor": jnp.where(density > 0, 1 / jnp.where(density > 0, density, 1), 1)}
        return {"mask": plan, "factor": ratio(finish(part(plan, x)), jnp)}

    def part(plan, x):
        """Of every model before, and of every model after, what its norm is made of."""
        seen = step._replace(merge=step.written or step.merge)
        return of([*models(entries(x)), *models(entries(left(seen, plan, x)))])

    def ratio(norms, np):
        was, now = norms.reshape(2, -1)
        usable = (was >= 1e-7) & (now >= 1e-7)
        return np.where(usable, was / np.where(usable, now, 1), 1)

    def on_host(settings, x):
        if step.resolve is not None and step.open(settings):
            settings = step.resolve(settings, x)
        norms = np.asarray(finish(x.total(of_block, settings, combine)))
        return {"mask": settings, "ratio": ratio(norms, np).astype(np.float32)}

    def of_block(settings, x):
        return part(step.match(settings, x), x)

    def merge(plan, x):
        return _times("factor")(plan, last(left(step, plan["mask"], x)))

    needs = step.needs if norm == "inv_p" else (*step.needs, Need("sum", "tensor"))
    if norm == "inv_p":
        return atom(step._replace(match=match, merge=merge, needs=needs, lazy=True))
    more = {"resolve": on_host, "open": lambda settings: "ratio" not in settings} if step.blocks else {}
    return atom(step._replace(match=match, merge=merge, needs=needs, lazy=True, **more))


def _sums_of(f: Callable[[Array], Array]) -> Callable[[list[Array]], Array]:
    return lambda xs: jnp.stack(sums(list(map(f, xs)), tuple(range(xs[0].ndim)))).reshape(-1)


NORMS = {
    "l1": (_sums_of(jnp.abs), np.add, lambda total: total),
    "l2": (_sums_of(jnp.square), np.add, lambda total: total**0.5),
    "linf": (lambda xs: jnp.stack([jnp.max(jnp.abs(x), initial=0) for x in xs]), np.maximum, lambda total: total),
}
"""(what is added up of some arrays, how, the norm that it makes)."""


def _times(name: str):
    def merge(plan, x):
        return each(jnp.multiply, x, jnp.broadcast_to(plan[name], x.shape[:1]))

    return merge


def _as_is(settings, x):
    return settings
