"""Between a base and one other model: what to take over from it, entry by entry."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxmerge.params._deferred import defer, entries
from jaxmerge.params._transform import Hyperparameter, MergeTransform, Need, Step, atom, chain, each, float32, models, resolve
from jaxmerge.params.atoms._scale import scale as scaled
from jaxmerge.params.order import _quantile as q
from jaxmerge.params.order._blocks import by_rows


def one_model(what: str) -> MergeTransform:
    """Refuses more than one model."""

    def settings(name, shape):
        if shape[0] != 1:
            raise ValueError(f"{what}: takes one model beside the base, got {shape[0]}; merge them first, or one at a time.")
        return ()

    return atom(Step(settings, lambda settings, x: settings, lambda plan, x: x, models=1, blocks=True))


def passthrough(scale: Hyperparameter = 1.0) -> MergeTransform:
    """One model, unchanged or scaled. With a base, its task vector is scaled; without, the model itself.

    Args:
      scale: one factor, or a function of the leaf's name.

    Raises:
      ValueError: more than one model.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.params.merge(jm.params.passthrough(0.5), None, [{"w": jnp.array(4.0)}])["w"].item()
      2.0

    Source: mergekit's `passthrough`.
    """
    return chain(one_model("passthrough"), scaled(scale))


def nearswap(t: Hyperparameter) -> MergeTransform:
    """Move each entry to the other model's, but by no more than t: what is near is swapped, what is far is nudged.

    Args:
      t: the largest change of an entry; may be a function of the leaf's name. Changes under 1e-6 count as 1e-6.

    Raises:
      ValueError: more than one model beside the base.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, other = {"w": jnp.zeros(2)}, {"w": jnp.array([0.5, -3.0])}
      >>> jm.params.merge(jm.params.nearswap(1.0), base, [other])["w"].tolist()
      [0.5, -1.0]

    Source: mergekit's `nearswap`.
    """

    def settings(name, shape):
        return {"t": float32(resolve(t, name, shape[0], "nearswap: t"))}

    def merge(plan, x):
        def near(x, t):
            t = jnp.maximum(t, 0)
            small = x * jnp.minimum(t / 1e-6, 1)
            small = jnp.where(small < -t, -t, small)
            return jnp.where(jnp.isinf(x), x, jnp.where(small > t, t, small))  # an infinity stays, to be seen

        return each(near, x, plan["t"])

    return chain(one_model("nearswap"), atom(Step(settings, lambda settings, x: settings, merge, blocks=True)))


def arcee_fusion(*, spread: float = 1.5, floor: float = 1e-8) -> MergeTransform:
    """Take over the entries whose change matters most: those at or above median + spread * (upper - lower quartile).

    An entry matters by its change times the divergence KL(softmax(model row) || softmax(base row)) of its row. Merge without a
    base and name it first: `merge(arcee_fusion(), None, [base, model])`. Quartiles are exact order statistics of each tensor.

    Args:
      spread: how many quartile distances above the median the threshold lies.
      floor: added to the probabilities.

    Raises:
      ValueError: not two models.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, model = {"w": jnp.zeros((2, 2))}, {"w": jnp.array([[3.0, 0.1], [0.1, 0.1]])}
      >>> jm.params.merge(jm.params.arcee_fusion(), None, [base, model])["w"].tolist()
      [[3.0, 0.0], [0.0, 0.0]]

    Source: mergekit's `arcee_fusion`, which takes the quartiles of tensors beyond 10^6 entries from an unseeded sample.
    """

    def settings(name, shape):
        if shape[0] != 2:
            raise ValueError(f"arcee_fusion: pass the base first and one model, [base, model]; got {shape[0]} models.")
        n = int(np.prod(shape[1:], dtype=object))
        return {"ranks": q.to_words([n - (n - 1) * quarter // 4 for quarter in (1, 2, 3)])}  # from the largest

    def divergence(x, start):
        base, p = (jax.nn.softmax(jnp.atleast_1d(v), axis=-1) + floor for v in models(x))
        # p - base sums to 0; with it every term is of the size of the sum, and none is negative but for rounding
        return jnp.maximum(jnp.sum(p * jnp.log(p / base) - (p - base), axis=-1, keepdims=True), 0)

    def match(settings, x):
        moved = by_rows(x, divergence)
        order = lambda importance: q.magnitude_bits(entries(importance))
        quartiles = q.kth_largest([defer(_importance, moved, x)], tuple(jnp.asarray(settings["ranks"])), order)
        low, median, high = lax.bitcast_convert_type(quartiles, jnp.float32)
        return {"threshold": median + spread * (high - low), "divergence": moved}

    def merge(plan, x):
        base, model = models(x)
        # not the other way round: a row with a NaN is taken over, to be seen
        return jnp.where(_importance(plan["divergence"], x)[0] < plan["threshold"], base, model)[None]

    return atom(Step(settings, match, merge, models=1, needs=(Need("sum", "row"), Need("order", "tensor")), lazy=True))


def _importance(divergence: Array, x: Array) -> Array:
    """(1, *shape): the change of each entry, times how far its row has moved."""
    base, model = models(x)
    return (jnp.abs(model - base) * divergence).reshape(1, *base.shape)
