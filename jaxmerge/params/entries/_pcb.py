"""Parameter competition balancing: entries compete within their task and with the other tasks."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, UInt32

from jaxmerge.params._deferred import entries
from jaxmerge.params._transform import Hyperparameter, MergeTransform, Need, Step, Survey, atom, chain, each, total
from jaxmerge.params.atoms._scale import scale as scaled
from jaxmerge.params.order import _quantile as q

ROUNDS = 3
"""Of histograms over all 32 bits, for each of the two pairs of order statistics."""


def pcb(
    density: float = 0.1,
    *,
    tail: float = 1e-4,
    scale: Hyperparameter = 1.0,
    scope: Literal["model", "tensor"] = "model",
) -> MergeTransform:
    """The mean of the task vectors, weighted entry by entry by how large each is in its task and how well the tasks agree.

    With a = |task vector| clipped to its tails, normalised to [0, 1], the balance is b = exp(K a^2) tanh(entry * sum of the
    entries over the tasks); the weight is b clipped to its `density` largest and normalised to [0, 1]. A NaN in a model makes
    everything NaN that shares its quantiles; an infinity is clipped like any outlier.

    Args:
      density: the share of entries of each task that count.
      tail: the share of smallest and of largest magnitudes that is clipped.
      scale: a factor for the result.
      scope: whether tails and shares are of the whole model or of each tensor.

    Raises:
      ValueError: density outside (0, 1], tail outside [0, 0.5); an unknown scope.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, models = {"w": jnp.zeros(3)}, [{"w": jnp.array([3.0, 1.0, 0.0])}, {"w": jnp.array([1.0, 1.0, 4.0])}]
      >>> jm.params.merge(jm.params.pcb(0.4, tail=0.0), base, models)["w"].round().tolist()
      [3.0, 0.0, 4.0]

    Source: PCB-Merging (arXiv:2410.02396), the official pcb-merging.py. Its quantiles are elements of the sorted list, not
    interpolated; so are ours.
    """
    if not 0 < density <= 1:
        raise ValueError(f"pcb: density must be above 0 and at most 1, the share of entries that count; got {density}.")
    if not 0 <= tail < 0.5:
        raise ValueError(f"pcb: tail must be between 0 and 0.5, the share that is clipped at each end; got {tail}.")
    if scope not in ("model", "tensor"):
        raise ValueError(f'pcb: scope must be "model" or "tensor", got {scope!r}.')

    def ranks(n: int, low: float, high: float) -> list[int]:
        """From the largest, of the elements at index int(n low) and int(n (1 - high) - 1) from the smallest."""
        return [n - min(int(n * low), n - 1), n - max(int(n * (1 - high) - 1), 0)]

    def wanted(n: int, models: int) -> UInt32[np.ndarray, "2 2 _"]:
        """(tails, balance) x (words) x (lower of each model, upper of each model)."""
        return np.stack([q.to_words(np.repeat(r, models)) for r in (ranks(n, tail, tail), ranks(n, 1 - density, 0.0))])

    def settings(name, shape):
        n = int(np.prod(shape[1:], dtype=object))
        return {"count": wanted(n, shape[0])}

    def sizes(name, shape):
        return {"size": int(np.prod(shape[1:], dtype=object)), "models": shape[0]}

    def order_statistics(count, leaves):
        tails = q.kth_largest(leaves, tuple(count[0]), lambda x: each(q.magnitude_bits, entries(x)))
        low, high = lax.bitcast_convert_type(tails, jnp.float32).reshape(2, -1)
        balances = [_ordered(_balance(entries(x), low, high)) for x in leaves]
        balance = q.kth_largest(balances, tuple(count[1]), bits=32)
        cut, top = _value(balance).reshape(2, -1)
        return {"low": low, "high": high, "cut": cut, "top": top}

    def match(settings, x):
        return order_statistics(jnp.asarray(settings["count"]), [x]) if scope == "tensor" else settings

    def merge(plan, x):
        def weight(b, cut, top):
            # Where only one task has weight, however little, its entry is taken whole. So entries as good as at the cut count
            # as at it: two programs may round exp and tanh differently.
            b = jnp.where(b <= cut + 32 * jnp.finfo(jnp.float32).eps * jnp.abs(cut), cut, b)
            spread = top - cut
            return (jnp.clip(b, cut, top) - cut) / jnp.where(spread == 0, 1, spread)

        w = each(weight, _balance(x, plan["low"], plan["high"]), plan["cut"], plan["top"])
        clipped = each(lambda x, low, high: jnp.sign(x) * jnp.clip(jnp.abs(x), low, high), x, plan["low"], plan["high"])
        return (total(each(jnp.multiply, clipped, w))[0] / jnp.maximum(total(w)[0], 1e-12))[None]

    needs = (Need("order", scope),)
    if scope == "tensor":
        return chain(atom(Step(settings, match, merge, models=1, needs=needs, lazy=True)), scaled(scale))

    settle_leaves = jax.jit(order_statistics)

    def all_wanted(settings):
        any_leaf = next(iter(settings.values()))
        return wanted(sum(s["size"] for s in settings.values()), any_leaf["models"])

    def settle(settings, leaves):
        found = settle_leaves(all_wanted(settings), list(leaves.values()))
        return {name: found for name in settings}

    def start(settings):
        count = all_wanted(settings)
        many = count.shape[-1]
        zero = np.zeros(many // 2, np.float32)
        query = {"prefix": np.zeros(many, np.uint32), "shift": _SHIFT, "low": zero, "high": zero, "balance": np.bool_(False)}
        return query, {"left": q.from_words(count[0]), "next": q.from_words(count[1]), "round": 0}

    def read(query, x):
        value = jnp.where(query["balance"], _balance(x, query["low"], query["high"]), jnp.abs(x))
        return q.histogram(_twice(_ordered(value)), query["prefix"], query["shift"])

    def step(query, notes, counts):
        digit, left = q.next_digit(np.sum(list(counts.values()), axis=0), notes["left"])
        prefix = (query["prefix"] << np.uint32(q.DIGIT)) | digit.astype(np.uint32)
        query = query | {"prefix": prefix, "shift": np.uint32(max(int(query["shift"]) - q.DIGIT, 0))}
        notes = notes | {"left": left, "round": notes["round"] + 1}
        if notes["round"] == ROUNDS:
            low, high = np.asarray(_value(jnp.asarray(prefix))).reshape(2, -1)
            query |= {"prefix": np.zeros_like(prefix), "shift": _SHIFT, "low": low, "high": high, "balance": np.bool_(True)}
            notes |= {"left": notes["next"], "tails": (low, high)}
        return query, notes | {"pattern": prefix}

    def finish(notes, settings):
        cut, top = np.asarray(_value(jnp.asarray(notes["pattern"]))).reshape(2, -1)
        low, high = notes["tails"]
        return {name: {"low": low, "high": high, "cut": cut, "top": top} for name in settings}

    survey = Survey(settle, 2 * ROUNDS, start, read, step, finish)
    return chain(atom(Step(sizes, match, merge, models=1, survey=survey, needs=needs, lazy=True)), scaled(scale))


_SHIFT = np.uint32(q.DIGIT * (ROUNDS - 1))


def _balance(x: Float[Array, "K ..."], low: Float[Array, "K"], high: Float[Array, "K"]) -> Float[Array, "K ..."]:
    """exp(K a^2) tanh(x sum(x)), a in [0, 1] between the tails."""
    together = total(x)[0]

    def one(x, low, high, many):
        a = (jnp.clip(jnp.abs(x), low, high) - low) / jnp.where(high == low, 1, high - low)
        return jnp.exp(many * a * a) * jnp.tanh(x * together)

    return each(functools.partial(one, many=x.shape[0]), x, low, high)


def _ordered(x: Float[Array, "..."]) -> UInt32[Array, "..."]:
    """Floats as integers of the same order."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _value(ordered: UInt32[Array, "..."]) -> Float[Array, "..."]:
    bits = jnp.where(ordered >> 31 == 1, ordered ^ jnp.uint32(1 << 31), ~ordered)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _twice(x: Any) -> Array:
    """Two order statistics of each model at once."""
    return jnp.concatenate([x, x])
