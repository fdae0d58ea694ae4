"""Trim: keep the largest entries of each model's task vector."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmerge.params import _quantile as q
from jaxmerge.params._transform import Hyperparameter, MergeTransform, Step, Survey, atom, over, resolve


def trim(
    density: Hyperparameter,
    *,
    scope: Literal["model", "tensor"] = "model",
    rounding: Literal["floor", "ceil"] = "floor",
    extra: int = 0,
    ties: Literal["first", "all"] = "first",
) -> MergeTransform:
    """Keep the `density` share of largest magnitude of each model, exactly; zero the rest.

    Of N entries, `max(1, int(density N)) + extra` are kept (none where density is 0). NaN counts as the largest magnitude.

    Args:
      density: the share to keep, in [0, 1]; at scope "model" it cannot depend on the leaf.
      scope: one threshold over the whole model, or one per tensor. Papers and libraries differ here, and the numbers do too.
      rounding: "ceil" keeps N - int((1 - density) N), as implementations do that speak of a mask rate.
      extra: 1 where an implementation keeps everything at or above the first entry that it drops.
      ties: of equal magnitudes at the threshold keep the first by flat index, leaves in the order of their names, so that the
        count is exact; or keep them all.

    Law:
      density = 1 changes nothing; the result has the same bits on any sharding.

    Raises:
      ValueError: density outside [0, 1]; an unknown scope, rounding or tie rule; a density by leaf at scope "model".

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> stacked = {"a": jnp.array([[1.0, 5.0]]), "b": jnp.array([[-4.0, 2.0]])}
      >>> tx = jm.params.trim(0.5, scope="model")
      >>> [x.tolist() for x in tx.merge(tx.match(stacked), stacked).values()]
      [[[0.0, 5.0]], [[-4.0, 0.0]]]

    Source: TIES-Merging (arXiv:2306.01708). The paper, fusion_bench and MergeLM: scope "model", extra=1, ties="all";
    mergekit: scope "tensor"; MergeLLM: scope "tensor", rounding="ceil", extra=1, ties="all".
    """
    for what, value, choices in (
        ("scope", scope, ("model", "tensor")),
        ("rounding", rounding, ("floor", "ceil")),
        ("ties", ties, ("first", "all")),
    ):
        if value not in choices:
            raise ValueError(f"trim: {what} must be one of {choices}, got {value!r}.")
    if extra < 0:
        raise ValueError(f"trim: extra must be 0 or more, got {extra}.")

    def to_keep(density: np.ndarray, n: int) -> np.ndarray:
        k = [int(d * n) if rounding == "floor" else n - int((1 - d) * n) for d in density]
        return np.array([0 if d == 0 else min(max(1, k) + extra, n) for d, k in zip(density, k, strict=True)], np.uint64)

    def settings(name, shape):
        d = _density(density, name, shape[0], "trim")
        n = int(np.prod(shape[1:], dtype=object))
        return {"density": d.astype(np.float32), "exact": d, "size": n, "count": q.to_words(to_keep(d, n))}

    def select(settings, x):
        bits = q.magnitude_bits(x)
        k = tuple(jnp.asarray(settings["count"]))
        t = q.kth_largest([bits], k)
        above = q.count(bits > over(t, bits))
        return plan(jnp.asarray(settings["density"]), t, above, q.subtract(k, q.smaller(above, k)), bits)

    def share(settings, x):  # the whole model has spoken: what is left is this leaf's part of the ties
        bits = q.magnitude_bits(x)
        t = lax.bitcast_convert_type(jnp.asarray(settings["threshold"]), jnp.uint32)
        return plan(
            jnp.asarray(settings["density"]),
            t,
            q.count(bits > over(t, bits)),
            tuple(jnp.asarray(settings["quota"])),
            bits,
        )

    def plan(density, t, above, quota, bits):
        tied = bits == over(t, bits)
        if ties == "all":
            cut = jnp.stack([jnp.full_like(t, 0xFFFFFFFF), jnp.zeros_like(t)])
            cut, kept = jnp.where((density > 0)[None], cut, 0), q.count(tied & over(density > 0, bits))
        else:
            cut, kept = q.first(tied, quota)
        threshold = lax.bitcast_convert_type(t, jnp.float32)
        return {"threshold": threshold, "cut": cut, "kept": jnp.stack(q.add(above, kept)), "density": density}

    def merge(plan, x):
        bits = q.magnitude_bits(x)
        t = over(lax.bitcast_convert_type(plan["threshold"], jnp.uint32), x)
        return jnp.where((bits > t) | ((bits == t) & q.before(plan["cut"], x)), x, 0)

    def leaf_settings(name, shape):
        s = settings(name, shape)
        return {"density": s["density"], "count": s["count"]}

    if scope == "tensor":
        return atom(Step(leaf_settings, select, merge))
    if callable(density):
        raise ValueError('trim: a density by leaf needs scope="tensor"; at scope "model" there is one threshold.')
    return atom(Step(settings, share, merge, survey=_survey(to_keep)))


def _density(density: Hyperparameter, name: str, models: int, what: str) -> np.ndarray:
    """Densities as concrete numbers: how many to keep is decided on the host."""
    d = np.asarray(resolve(density, name, models, f"{what}: density"), np.float64)
    if not ((d >= 0) & (d <= 1)).all():
        raise ValueError(f"{what}: density must be between 0 and 1, the share to keep; got {d.tolist()} at leaf {name!r}.")
    return d


def _survey(to_keep) -> Survey:
    """One threshold per model over all leaves, and each leaf's share of the ties at it."""

    def wanted(settings):
        any_leaf = next(iter(settings.values()))
        return to_keep(any_leaf["exact"], sum(s["size"] for s in settings.values()))

    @jax.jit
    def divide(k, leaves):
        k = tuple(k)
        bits = {name: q.magnitude_bits(x) for name, x in leaves.items()}
        t = q.kth_largest(list(bits.values()), k)
        left = k
        for b in bits.values():
            left = q.subtract(left, q.smaller(q.count(b > over(t, b)), left))
        quotas = {}
        for name in sorted(bits):
            quotas[name] = q.smaller(q.count(bits[name] == over(t, bits[name])), left)
            left = q.subtract(left, quotas[name])
        return lax.bitcast_convert_type(t, jnp.float32), {name: jnp.stack(quota) for name, quota in quotas.items()}

    def settle(settings, leaves):
        threshold, quotas = divide(q.to_words(wanted(settings)), leaves)
        return {
            name: {"density": settings[name]["density"], "threshold": threshold, "quota": quota}
            for name, quota in quotas.items()
        }

    def start(settings):
        k = wanted(settings)
        query = {"prefix": np.zeros(len(k), np.uint32), "shift": np.uint32(q.DIGIT * (q.ROUNDS - 1))}
        return query, {"left": k}

    def read(query, x):
        return q.histogram(q.magnitude_bits(x), query["prefix"], query["shift"])

    def step(query, notes, counts):
        digit, left = q.next_digit(np.sum(list(counts.values()), axis=0), notes["left"])
        prefix = (query["prefix"] << np.uint32(q.DIGIT)) | digit.astype(np.uint32)
        tied = {name: c[np.arange(len(digit)), digit] for name, c in counts.items()}
        query = {"prefix": prefix, "shift": np.uint32(max(int(query["shift"]) - q.DIGIT, 0))}
        return query, {"left": left, "tied": tied, "pattern": prefix}

    def finish(notes, settings):
        none = wanted(settings) == 0
        threshold = np.where(none, q.INF, notes["pattern"]).view(np.float32)
        left, out = np.where(none, 0, notes["left"]).astype(np.uint64), {}
        for name, tied in notes["tied"].items():
            quota = np.minimum(tied, left)
            left = left - quota
            out[name] = {"density": settings[name]["density"], "threshold": threshold, "quota": q.to_words(quota)}
        return out

    return Survey(settle, q.ROUNDS, start, read, step, finish)
