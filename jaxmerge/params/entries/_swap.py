"""Between a base and one other model: what to take over from it, entry by entry."""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxmerge.params._deferred import Entries, defer, entries
from jaxmerge.params._transform import Hyperparameter, MergeTransform, Need, Step, atom, chain, each, float32, models, resolve
from jaxmerge.params.atoms._scale import scale as scaled
from jaxmerge.params.order import _quantile as q
from jaxmerge.params.order._blocks import by_rows
from jaxmerge.params.order._devices import fastest


def one_model(what: str) -> MergeTransform:
    """Refuses more than one model."""

    def settings(name, shape):
        if shape[0] != 1:
            raise ValueError(f"{what}: takes one model beside the base, got {shape[0]}; merge them first, or one at a time.")
        return ()

    return atom(Step(settings, lambda settings, x: settings, lambda plan, x: x, models=1, blocks=True, copies=lambda _: True))


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


def arcee_fusion(*, spread: float = 1.5, floor: float = 1e-8, sample: int | None = None) -> MergeTransform:
    """Take over the entries whose change matters most: those at or above median + spread * (upper - lower quartile).

    An entry matters by its change times the divergence KL(softmax(model row) || softmax(base row)) of its row. Merge without a
    base and name it first: `merge(arcee_fusion(), None, [base, model])`. Quartiles are exact order statistics of each tensor.

    Args:
      spread: how many quartile distances above the median the threshold lies.
      floor: added to the probabilities.
      sample: from about how many entries of a tensor to take the quartiles, evenly spaced; from all of them where None.

    Raises:
      ValueError: not two models, or a sample without entries.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, model = {"w": jnp.zeros((2, 2))}, {"w": jnp.array([[3.0, 0.1], [0.1, 0.1]])}
      >>> jm.params.merge(jm.params.arcee_fusion(), None, [base, model])["w"].tolist()
      [[3.0, 0.0], [0.0, 0.0]]

    Source: mergekit's `arcee_fusion`, which takes the quartiles of tensors beyond 10^6 entries from as many, drawn without a
    seed: `sample=10**6` costs and scatters as that does, but is the same every time.
    """
    if sample is not None and sample < 1:
        raise ValueError(f"arcee_fusion: sample={sample}; quartiles need entries: pass 1 or more, or None for all of them.")

    def step(shape: tuple[int, ...]) -> int:
        return 1 if sample is None else max(-(-math.prod(shape) // sample), 1)

    def settings(name, shape):
        if shape[0] != 2:
            raise ValueError(f"arcee_fusion: pass the base first and one model, [base, model]; got {shape[0]} models.")
        n = q.how_many(step(shape[1:]), shape[1:])
        return {"ranks": q.to_words([n - (n - 1) * quarter // 4 for quarter in (1, 2, 3)])}  # from the largest

    def match(settings, x):
        moved = _divergence(x, floor)
        order = lambda importance: q.magnitude_bits(entries(importance))
        ranks = tuple(jnp.asarray(settings["ranks"]))
        quartiles = q.kth_of_every(step(x.shape[1:]), defer(_importance, moved, x), ranks, order)
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


NEAR = 0.03
"""Up to which square of (p - base) / (p + base) five terms of a series are exact in float32."""


def _divergence(x: Entries, floor: float) -> Array:
    """(*rows, 1): KL(p || base) of each row's softmax.

    p log(p / base) is of one digit where the two are near, and p - base sums to 0: with it every term is of the size of the
    sum, t (p - base) + 2 p (t^3 / 3 + t^5 / 5 + ...), where t = (p - base) / (p + base). On one CPU device exponentials are
    taken as they are, which nearly all rows allow; a row that does not, or that has moved far, is done again with care.
    """

    def terms(base, p, far):
        change = p - base
        t = change / (p + base)
        s = t * t
        series = 1 / 3 + s * (1 / 5 + s * (1 / 7 + s * (1 / 9 + s * (1 / 11))))
        return jnp.where(s < NEAR, t * (change + 2 * p * s * series), far(p, base))

    def sums(terms):
        return jnp.sum(jnp.atleast_1d(terms), axis=-1, keepdims=True)

    def careful(x):
        def begin(x, start):
            return tuple(jax.nn.softmax(jnp.atleast_1d(v), axis=-1) for v in models(x))

        def far(p, base):
            return jnp.maximum(p * jnp.log(p / base) - (p - base), 0)

        def divergences(both):
            base, p = (share + floor for share in both)
            return terms(base, p, far)

        return by_rows(x, begin, divergences, sums)

    def quick(x):
        def begin(x, start):
            return tuple(jnp.exp(v) for v in models(x))

        def share(v):
            whole = sums(v)
            return v * jnp.where((whole > 1e-30) & (whole < 1e30), 1 / whole, jnp.nan) + floor

        def divergences(both):
            base, p = map(share, both)
            return terms(base, p, lambda p, base: jnp.nan)

        moved = by_rows(x, begin, divergences, sums)
        again = lambda: jnp.where(jnp.isnan(moved), careful(x), moved)
        return lax.cond(jnp.any(jnp.isnan(moved)), again, lambda: moved)

    return fastest(quick, careful)(x)
