"""Trim: keep the largest entries of each model's task vector, or a band below the largest."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmerge.params._transform import Hyperparameter, MergeTransform, Need, Step, Survey, atom, each, over, resolve
from jaxmerge.params.order import _host as host, _quantile as q
from jaxmerge.params.order._rows import as_rows, columns, first_in_row, kth_in_row

Scope = Literal["model", "tensor", "row"]
Counts = Callable[[np.ndarray, int], list[int]]
"""(shares (models, ...), size) -> how many of the largest entries lie above each cut, for each model."""


def trim(
    density: Hyperparameter,
    *,
    scope: Scope = "model",
    rounding: Literal["floor", "ceil"] = "floor",
    extra: int = 0,
    ties: Literal["first", "all"] = "first",
) -> MergeTransform:
    """Keep the `density` share of largest magnitude of each model, exactly; zero the rest.

    Of N entries, `max(1, int(density N)) + extra` are kept (none where density is 0). NaN counts as the largest magnitude.

    Args:
      density: the share to keep, in [0, 1]; at scope "model" it cannot depend on the leaf.
      scope: one threshold over the whole model, one per tensor, or one per row (the last axis; a vector is one row). Papers and
        libraries differ here, and the numbers do too.
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
    _check("trim", density, extra, scope=scope, rounding=rounding, ties=ties)

    def counts(shares, n):
        k = [int(d * n) if rounding == "floor" else n - int((1 - d) * n) for (d,) in shares]
        return [0 if d == 0 else min(max(1, k) + extra, n) for (d,), k in zip(shares, k, strict=True)]

    return _cut(lambda name, models: _density(density, name, models, "trim")[:, None], counts, 1, scope=scope, ties=ties)


def trim_band(
    density: Hyperparameter,
    gamma: Hyperparameter = 0.01,
    *,
    scope: Scope = "tensor",
    rounding: Literal["floor", "ceil"] = "floor",
    extra: int = 0,
    ties: Literal["first", "all"] = "first",
) -> MergeTransform:
    """Drop the `gamma` share of largest magnitude, keep the `density` share below it, drop the rest.

    Of N entries the int(gamma N) largest are dropped (fewer where gamma + density > 1), then int(density N) kept. NaN counts as
    the largest magnitude, and so is dropped: `nonfinite` reports it.

    Args:
      density: the share to keep, in [0, 1].
      gamma: the share of outliers to drop, in [0, 1]; one number, one per model, or a function of the leaf's name.
      scope, ties: see `trim`.
      rounding: "ceil" drops int((1 - density - gamma) N) from below and int((1 - density) N) in all.
      extra: entries kept beyond, at the lower end.

    Law:
      gamma = 0 is `trim`, where that keeps at least one; the result has the same bits on any sharding.

    Raises:
      ValueError: as `trim`; gamma outside [0, 1].

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> tx, stacked = jm.params.trim_band(0.5, 0.25), {"w": jnp.array([[9.0, -4.0, 2.0, 1.0]])}
      >>> tx.merge(tx.match(stacked), stacked)["w"].tolist()
      [[0.0, -4.0, 2.0, 0.0]]

    Source: Model Breadcrumbs (arXiv:2312.06795); mergekit's `breadcrumbs` (which up to 0.1.4 zeroes tensors so small that no
    outlier is to be dropped). MergeLLM: rounding="ceil", extra=1, ties="all".
    """
    _check("trim_band", density, extra, scope=scope, rounding=rounding, ties=ties)
    _check("trim_band", gamma, extra, scope=scope, rounding=rounding, ties=ties)
    if not callable(gamma):
        _between("trim_band: gamma", gamma, "the share of outliers to drop", "")

    def counts(shares, n):
        above, within = [], []
        for d, g in shares:
            if rounding == "floor":
                kept = int(d * n)
                top = min(int(g * n), n - kept)
            else:
                low = max(int((1 - d - g) * n), 0)
                top = int((1 - d) * n) - low
                kept = n - low - top
            above.append(top)
            within.append(0 if d == 0 else min(top + kept + extra, n))
        return above + within

    def shares(name, models):
        d = _density(density, name, models, "trim_band")
        g = resolve(gamma, name, models, "trim_band: gamma")
        return np.stack([d, _between("trim_band: gamma", g, "the share of outliers to drop", f" at leaf {name!r}")], axis=1)

    return _cut(shares, counts, 2, scope=scope, ties=ties)


def _check(what, density, extra, *, scope, rounding, ties):
    for name, value, choices in (
        ("scope", scope, ("model", "tensor", "row")),
        ("rounding", rounding, ("floor", "ceil")),
        ("ties", ties, ("first", "all")),
    ):
        if value not in choices:
            raise ValueError(f"{what}: {name} must be one of {choices}, got {value!r}.")
    if extra < 0:
        raise ValueError(f"{what}: extra must be 0 or more, got {extra}.")
    if scope == "model" and callable(density):
        raise ValueError(f'{what}: a share by leaf needs scope="tensor"; at scope "model" there is one threshold.')


def _cut(shares: Callable[[str, int], np.ndarray], counts: Counts, cuts: int, *, scope: Scope, ties: str) -> MergeTransform:
    """Keep what lies above the last cut, less what lies above the one before. A plan has the values of the first cut for every
    model, then those of the next."""

    def inside(above):
        return above[1] & ~above[0] if cuts > 1 else above[0]

    def by_model(values):
        """(cuts K, ...) as (K, cuts, ...)."""
        return jnp.swapaxes(values.reshape(cuts, -1, *values.shape[1:]), 0, 1)

    def settings(name, shape):
        found = shares(name, shape[0])  # (models, ...), the density first
        entries = shape[-1:] if scope == "row" and len(shape) > 1 else shape[1:]
        n = int(np.prod(entries, dtype=object))
        return {"density": found[:, 0].astype(np.float32), "exact": found, "size": n, "count": q.to_words(counts(found, n))}

    def select(settings, x):
        if "cut" in settings:  # `resolve` has been there
            return settings
        k = tuple(jnp.asarray(settings["count"]))
        t, *beside = q.place(x, k, q.magnitude_bits)
        return plan(jnp.asarray(settings["density"]), t, beside, q.subtract(k, q.smaller(beside[0], k)), x)

    def share(settings, x):  # the whole model has spoken: what is left is this leaf's part of the ties
        if "cut" in settings:
            return settings
        t = lax.bitcast_convert_type(jnp.asarray(settings["threshold"]), jnp.uint32)
        quota = tuple(jnp.asarray(settings["quota"]))
        return plan(jnp.asarray(settings["density"]), t, q.sides(x, t, q.magnitude_bits), quota, x)

    def plan(density, t, beside, quota, x):
        above, tied = beside
        if ties == "all":
            some = jnp.tile(density, cuts) > 0
            cut = jnp.stack([jnp.where(some, np.uint32(0xFFFFFFFF), 0), jnp.zeros_like(t)])
            kept = jnp.where(some, tied[0], 0), jnp.where(some, tied[1], 0)
        else:
            cut, kept = q.first_tied(x, t, tied, quota, q.magnitude_bits)
        threshold = lax.bitcast_convert_type(t, jnp.float32)
        kept = q.add(above, kept)
        if cuts > 1:
            (high_above, high), (low_above, low) = (w.reshape(cuts, -1) for w in kept)
            kept = q.subtract((high, low), (high_above, low_above))
        return {"threshold": threshold, "cut": cut, "kept": jnp.stack(kept), "density": density, "origin": q.ORIGIN}

    def on_host(settings, x):
        """The plan of `select` or `share`, from the magnitudes as they stream by."""
        none = np.tile(settings["density"] == 0, cuts)
        if "threshold" in settings:
            quota = q.from_words(settings["quota"]).astype(np.int64)
            found = host.locate(x, settings["threshold"].view(np.uint32), quota)
        else:
            k = q.from_words(settings["count"]).astype(np.int64)
            found = host.select(x, np.maximum(k, 1))
            quota = k - np.minimum(found.above, k)
            if (k == 0).any():
                found = host.locate(x, np.where(k == 0, q.INF, found.pattern), np.where(k == 0, 0, quota))
                quota = np.where(k == 0, 0, quota)
        tied = np.where(none, 0, found.tied) if ties == "all" else np.minimum(found.tied, quota)
        cut = q.position(x.shape, np.where(tied == 0, 0, x.size if ties == "all" else found.cut))
        kept = found.above + tied
        if cuts > 1:
            high, low = kept.reshape(cuts, -1)
            kept = low - high
        threshold = found.pattern.view(np.float32)
        return {
            "threshold": threshold,
            "cut": cut,
            "kept": q.to_words(kept),
            "density": settings["density"],
            "origin": q.ORIGIN,
        }

    def merge(plan, x):
        t = lax.bitcast_convert_type(plan["threshold"], jnp.uint32)

        def one(x, t, row, column):
            bits = q.magnitude_bits(x)
            above = [
                (bits > over(t[:, c], x))
                | ((bits == over(t[:, c], x)) & q.before(jnp.stack([row[:, c], column[:, c]]), x, plan["origin"]))
                for c in range(cuts)
            ]
            return jnp.where(inside(above), x, 0)

        return each(one, x, *map(by_model, (t, *plan["cut"])))

    def select_rows(settings, x):
        bits = as_rows(q.magnitude_bits(x))
        found = [threshold_in_rows(bits, over(k, bits)) for k in settings["count"][1].reshape(cuts, -1)]
        t, cut = (jnp.concatenate(v) for v in zip(*found, strict=True))
        return {"threshold": lax.bitcast_convert_type(t, jnp.float32), "cut": cut, "density": settings["density"]}

    def threshold_in_rows(bits, k):
        t = kth_in_row(bits, k)
        if ties == "all":
            return t, jnp.where(k > 0, jnp.uint32(bits.shape[-1]), jnp.zeros_like(t))
        above = jnp.sum(bits > t, axis=-1, keepdims=True, dtype=jnp.uint32)
        return t, first_in_row(bits == t, k - jnp.minimum(above, k))

    def merge_rows(plan, x):
        def one(x, t, cut):
            bits = as_rows(q.magnitude_bits(x))
            above = [(bits > t[:, c]) | ((bits == t[:, c]) & (columns(bits) < cut[:, c])) for c in range(cuts)]
            return jnp.where(inside(above).reshape(x.shape), x, 0)

        t = lax.bitcast_convert_type(plan["threshold"], jnp.uint32)
        return each(one, x, by_model(t), by_model(plan["cut"]))

    def leaf_settings(name, shape):
        s = settings(name, shape)
        return {"density": s["density"], "count": s["count"]}

    waits = lambda settings: "cut" not in settings
    needs = (Need("order", scope),)
    if scope == "tensor":
        return atom(Step(leaf_settings, select, merge, needs=needs, blocks=True, resolve=on_host, open=waits))
    if scope == "row":
        return atom(Step(leaf_settings, select_rows, merge_rows, needs=needs))
    survey = _survey(counts, cuts)
    return atom(Step(settings, share, merge, survey=survey, needs=needs, blocks=True, resolve=on_host, open=waits))


def _density(density: Hyperparameter, name: str, models: int, what: str) -> np.ndarray:
    """Densities as concrete numbers: how many to keep is decided on the host."""
    d = resolve(density, name, models, f"{what}: density")
    return _between(f"{what}: density", d, "the share to keep", f" at leaf {name!r}")


def _between(what: str, share: Any, meaning: str, where: str) -> np.ndarray:
    share = np.asarray(share, np.float64)
    if not ((share >= 0) & (share <= 1)).all():
        raise ValueError(f"{what} must be between 0 and 1, {meaning}; got {share.tolist()}{where}.")
    return share


def _survey(counts: Counts, cuts: int) -> Survey:
    """One threshold per cut and model over all leaves, and each leaf's share of the ties at it."""

    def wanted(settings):
        any_leaf = next(iter(settings.values()))
        return np.array(counts(any_leaf["exact"], sum(s["size"] for s in settings.values())), np.uint64)

    @jax.jit
    def divide(k, leaves):
        k = tuple(k)
        t = q.kth_largest(list(leaves.values()), k, q.magnitude_bits)
        beside = {name: q.sides(x, t, q.magnitude_bits) for name, x in leaves.items()}
        left = k
        for above, _ in beside.values():
            left = q.subtract(left, q.smaller(above, left))
        quotas = {}
        for name in sorted(beside):
            quotas[name] = q.smaller(beside[name][1], left)
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
        return q.histogram(jnp.concatenate([q.magnitude_bits(x)] * cuts), query["prefix"], query["shift"])

    def look(query, bits):
        return host.histogram(bits, query["prefix"], int(query["shift"]), q.DIGIT)

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

    return Survey(settle, q.ROUNDS, start, read, step, finish, look)
