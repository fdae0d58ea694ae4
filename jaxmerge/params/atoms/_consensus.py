"""Consensus: from K models to one."""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxmerge.params._transform import (
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
from jaxmerge.params.order import _quantile as q


def elect_sign(*, tie: Literal["+1", "majority"] = "+1", scope: Literal["model", "tensor"] = "model") -> MergeTransform:
    """Elect a sign for each entry, that of the models' sum, and zero the models that disagree.

    Args:
      tie: which sign wins where the sum is exactly 0: plus, or the sign that most entries have.
      scope: where "majority" looks: the whole model, or each tensor.

    Law:
      Where all models agree nothing changes; the result has the same bits on any sharding.

    Raises:
      ValueError: an unknown tie rule or scope.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> tx, stacked = jm.params.elect_sign(), {"w": jnp.array([[1.0, -2.0], [3.0, 1.0]])}
      >>> tx.merge(tx.match(stacked), stacked)["w"].tolist()
      [[1.0, -2.0], [3.0, 0.0]]

    Source: TIES-Merging (arXiv:2306.01708); the official code and fusion_bench: tie="majority", MergeLLM the same by tensor;
    mergekit: tie="+1", after weighing.
    """
    if tie not in ("+1", "majority"):
        raise ValueError(f'elect_sign: tie must be "+1" or "majority", got {tie!r}.')
    if scope not in ("model", "tensor"):
        raise ValueError(f'elect_sign: scope must be "model" or "tensor", got {scope!r}.')

    def merge(plan, x):
        s = jnp.sign(total(x)[0])
        s = jnp.where(s == 0, plan["sign"][0], s)
        return each(lambda x: jnp.where(x * s <= 0, 0, x), x)  # a NaN stays, to be seen

    def settings(name, shape):
        return {"sign": np.ones(1, np.float32)} if tie == "+1" else {}

    def majority(settings, x):
        up, down = _ups_and_downs(x)
        return {"sign": _sign(up, down)}

    def settle(settings, leaves):
        counts = [_ups_and_downs(x) for x in leaves.values()]
        up, down = counts[0]
        for u, d in counts[1:]:
            up, down = q.add(up, u), q.add(down, d)
        return {name: {"sign": _sign(up, down)} for name in leaves}

    def read(query, x):
        s = total(x).reshape(-1)
        return jnp.stack([jnp.sum(s > 0, dtype=jnp.uint32), jnp.sum(s < 0, dtype=jnp.uint32)])

    def finish(notes, settings):
        up, down = notes
        sign = np.sign(np.float32(int(up) > int(down)) - np.float32(int(down) > int(up)))
        return {name: {"sign": np.full(1, sign, np.float32)} for name in settings}

    as_is = lambda settings, x: settings
    if tie == "+1":
        return atom(Step(settings, as_is, merge, blocks=True))
    if scope == "tensor":
        return atom(Step(settings, majority, merge, needs=(Need("order", "tensor"),)))
    survey = Survey(settle, 1, lambda settings: ((), None), read, lambda *state: ((), sum(state[2].values())), finish)
    return atom(Step(settings, as_is, merge, survey=survey, needs=(Need("order", "model"),), blocks=True))


def _ups_and_downs(x: Array) -> list[q.Words]:
    s = total(x)
    return q.counts(s > 0, s < 0)


def _sign(up: q.Words, down: q.Words) -> Array:
    return q.at_least(up, down).astype(jnp.float32) - q.at_least(down, up).astype(jnp.float32)


def sum_experts() -> MergeTransform:
    """Add the models up, in their order.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> tx, stacked = jm.params.sum_experts(), {"w": jnp.array([[1.0], [2.0]])}
      >>> tx.merge(tx.match(stacked), stacked)["w"].tolist()
      [[3.0]]
    """
    return atom(Step(_nothing, lambda settings, x: settings, lambda plan, x: total(x), models=1, blocks=True))


def mean_agreeing(weight: Hyperparameter = 1.0) -> MergeTransform:
    """Average the models that are not zero, entry by entry: TIES' disjoint mean. After `weigh(w)`, pass the same weights.

    Args:
      weight: what to divide by: the sum of the weights of the models that are not zero there (a sum of 0 divides by 1).

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> tx, stacked = jm.params.mean_agreeing(), {"w": jnp.array([[1.0, 4.0], [3.0, 0.0]])}
      >>> tx.merge(tx.match(stacked), stacked)["w"].tolist()
      [[2.0, 4.0]]
    """

    def settings(name, shape):
        return {"weight": float32(resolve(weight, name, shape[0], "mean_agreeing: weight"))}

    def merge(plan, x):
        mass = total(each(lambda x, w: jnp.where(x != 0, w, 0), x, plan["weight"]))[0]
        return (total(x)[0] / jnp.where(mass == 0, 1, mass))[None]

    return atom(Step(settings, lambda settings, x: settings, merge, models=1, blocks=True))


def max_agreeing(*, tie: Literal["first", "last"] = "first") -> MergeTransform:
    """Take the entry of largest magnitude; after `elect_sign` all that are left have one sign.

    Args:
      tie: of equal magnitudes, the first model's or the last's.

    Raises:
      ValueError: an unknown tie rule.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> tx, stacked = jm.params.max_agreeing(), {"w": jnp.array([[-1.0, 4.0], [-3.0, 0.0]])}
      >>> tx.merge(tx.match(stacked), stacked)["w"].tolist()
      [[-3.0, 4.0]]
    """

    if tie not in ("first", "last"):
        raise ValueError(f'max_agreeing: tie must be "first" or "last", got {tie!r}.')
    beats = jnp.greater if tie == "first" else jnp.greater_equal

    def size(x):  # as patterns, of which that of a NaN is the largest
        return lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32)

    def merge(plan, x):
        best, *rivals = models(x)
        for rival in rivals:
            best = jnp.where(beats(size(rival), size(best)), rival, best)
        return best[None]

    return atom(Step(_nothing, lambda settings, x: settings, merge, models=1, blocks=True))


def _nothing(name, shape):
    return ()
