"""The laws of a merge of models, as one check to run over any transform."""

from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import PyTree

from jaxmerge._collectives import collectives
from jaxmerge.params._stack import add, merge, nonfinite
from jaxmerge.params._transform import MergeTransform, Stacked

AXES = (AxisType.Auto, AxisType.Explicit)


def assert_merge(
    tx: MergeTransform,
    *,
    models: int = 3,
    mean: bool | float = False,
    symmetric: bool = False,
    linear: bool = False,
    exact: bool = True,
    rounding: float = 1e-6,
    visible: Collection[float] = (np.nan, np.inf),
    sharding: bool | int | Collection[int] = True,
    axes: Collection[AxisType] = AXES,
    moves: Collection[str] = (),
    layout: bool = True,
    seed: int = 0,
) -> None:
    """Check the laws of merging on random task vectors with ties, zeros, constant, one-column and scalar leaves.

    Always: one model comes out, finite, of the shapes that went in; zero deltas merge to zero; each leaf of the base keeps its
    dtype, whatever the models' are; `match` then `merge` is what `params.merge` does; the result and its layout do not depend
    on the sharding.

    Args:
      tx: a transform that ends with one model.
      models: K.
      mean: identical experts give the expert back; a number says how closely, relative to the largest entry, if not to 1e-6.
      symmetric: the order of the models does not matter, but for rounding.
      linear: merge(a x + b y) = a merge(x) + b merge(y).
      exact: the result has the same bits on any sharding (pointwise, random and order-statistic atoms); otherwise (norms, dot
        products) it agrees to float32 rounding.
      rounding: how far float32 rounding goes, relative to the largest entry; more where a factorisation amplifies it.
      visible: one of these in one model makes the merge's leaf not finite, so that `nonfinite` names it.
      sharding: compare with the result on all devices; on that many; or on each of those numbers (a compilation each).
      axes: under which kinds of mesh axes.
      moves: collectives beside all-reduce that a sharded leaf may need, such as "all-gather".
      layout: the result is laid out as the leaf is; under Auto axes a compiler that brings a leaf together may do otherwise.
      seed: of the random task vectors.

    Raises:
      AssertionError: a law does not hold.

    Example:
      >>> import jaxmerge as jm
      >>> jm.testing.assert_merge(jm.params.linear(), mean=True, symmetric=True, linear=True)
    """
    rng = np.random.default_rng(seed)
    run = jax.jit(lambda stacked: tx.merge(tx.match(stacked), stacked))
    x, y = deltas(rng, models), deltas(rng, models)
    merged = run(x)
    for name, leaf in merged.items():
        if leaf.shape != (1, *x[name].shape[1:]):
            raise AssertionError(f"{name}: one model should be left, got shape {leaf.shape} from {x[name].shape}.")
    _close(
        jax.tree.map(jnp.isfinite, merged),
        jax.tree.map(lambda m: np.ones(m.shape, bool), merged),
        0.0,
        "finite results",
    )
    _close(run(jax.tree.map(np.zeros_like, x)), jax.tree.map(np.zeros_like, merged), 0.0, "zero deltas merge to zero")
    if mean:
        same = jax.tree.map(lambda v: np.repeat(v[:1], models, axis=0), x)
        _close(
            run(same),
            jax.tree.map(lambda v: v[:1], same),
            1e-6 if mean is True else mean,
            "identical experts give the expert back",
        )
    if symmetric:
        _close(run(jax.tree.map(lambda v: v[::-1], x)), merged, rounding, "symmetry in the experts")
    if linear:
        both = jax.tree.map(lambda a, b: 2 * a - 3 * b, x, y)
        expected = jax.tree.map(lambda a, b: 2 * a - 3 * b, merged, run(y))
        _close(run(both), expected, 1e-5, "linearity in the experts")
    for value in visible:
        _check_visible(run, x, value)
    _check_base(tx, x, merged)
    for count in _counts(sharding):
        for kind in axes:
            where = f"{count} devices, {kind.name} axes"
            sharded = jax.tree.map(jax.device_put, x, shardings(count, kind))
            program = run.lower(sharded).compile()
            gathered = {c.name for c in collectives(program)} - {"all-reduce", *moves}
            if gathered:
                raise AssertionError(f"nothing moves but sums ({where}): the program holds {sorted(gathered)}.")
            there = program(sharded)
            _close(there, merged, 0.0 if exact else rounding, f"invariance to sharding ({where})")
            for name, leaf in there.items() if layout else ():
                if not leaf.sharding.is_equivalent_to(sharded[name].sharding, leaf.ndim):
                    raise AssertionError(f"the layout stays ({where}): leaf {name} came out as {leaf.sharding}.")


SHAPES = {"a/column": (24, 1), "b/kernel": (16, 24), "c/scalar": (), "d/constant": (8,), "e/stack": (3, 8, 5)}
SPECS = {
    "a/column": ("data",),
    "b/kernel": ("data", "model"),
    "c/scalar": (),
    "d/constant": ("model",),
    "e/stack": (None, "data"),
}


def deltas(rng: np.random.Generator, models: int) -> dict[str, np.ndarray]:
    """Coarse on purpose: many magnitudes tie, many are zero, signs cancel; one leaf is constant."""
    coarse = {n: np.round(rng.standard_normal((models, *s)) * 4) / 4 for n, s in SHAPES.items()}
    coarse["d/constant"] = np.full_like(coarse["d/constant"], 0.5)
    return {n: v.astype(np.float32) for n, v in coarse.items()}


def shardings(devices: int, kind: AxisType) -> dict[str, NamedSharding]:
    """The task vectors of `deltas` over a mesh of so many devices: rows over one axis, columns over the other."""
    shape = (devices // 2, 2) if devices % 2 == 0 else (devices, 1)
    mesh = Mesh(np.array(jax.devices()[:devices]).reshape(shape), ("data", "model"), axis_types=(kind,) * 2)
    fits = lambda n, axis: axis if axis is not None and n % mesh.shape[axis] == 0 else None
    return {n: NamedSharding(mesh, P(None, *map(fits, SHAPES[n], spec))) for n, spec in SPECS.items()}


def _counts(sharding: bool | int | Collection[int]) -> tuple[int, ...]:
    if isinstance(sharding, bool):
        return (jax.device_count(),) if sharding else ()
    return (sharding,) if isinstance(sharding, int) else tuple(sharding)


def _check_visible(run: Callable, x: dict[str, np.ndarray], value: float) -> None:
    for name in ("b/kernel", "d/constant"):
        bad = x | {name: x[name].copy()}
        bad[name][(-1, *(1,) * (x[name].ndim - 1))] = value
        found = nonfinite(run(bad))
        if name not in found:
            raise AssertionError(f"what is not finite stays visible: a {value} in leaf {name} is gone; found {found}.")


def _check_base(tx: MergeTransform, x: dict[str, np.ndarray], merged: Stacked) -> None:
    """Whole models in, each leaf of another dtype in each: the base's dtypes come out, and what `match` and `merge` say."""
    kinds = (jnp.bfloat16, jnp.float16, jnp.float32)  # all of them hold x
    dtypes = {n: kinds[i % 3] for i, n in enumerate(x)}
    zero = {n: jnp.zeros(v.shape[1:], dtypes[n]) for n, v in x.items()}
    models = [
        {n: jnp.asarray(v[k], kinds[(i + k + 1) % 3]) for i, (n, v) in enumerate(x.items())}
        for k in range(next(iter(x.values())).shape[0])
    ]
    whole = jax.jit(lambda base, models: merge(tx, base, models))(zero, models)
    for name, leaf in whole.items():
        if leaf.dtype != dtypes[name]:
            raise AssertionError(f"{name}: the base is {jnp.dtype(dtypes[name])}, the merge is {leaf.dtype}.")
    _close(whole, add(zero, merged), 2**-8, "merge is match, merge, add; one cast at the end")


def _close(got: PyTree, expected: PyTree, tolerance: float, law: str) -> None:
    for name, value in expected.items():
        a, b = np.asarray(got[name]).astype(np.float32), np.asarray(value).astype(np.float32)
        scale = max(1.0, float(np.abs(b).max(initial=0)))
        error = float(np.abs(a - b).max(initial=0))
        if not error <= tolerance * scale:
            raise AssertionError(f"{law}: leaf {name} differs by {error:.3g}, more than {tolerance * scale:.3g}.")
