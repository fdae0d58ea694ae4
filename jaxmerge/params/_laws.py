"""The laws of a merge of models, as one check to run over any transform."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import PyTree

from jaxmerge.params._stack import add, merge
from jaxmerge.params._transform import MergeTransform, Stacked


def assert_merge(
    tx: MergeTransform,
    *,
    models: int = 3,
    mean: bool = False,
    linear: bool = False,
    exact: bool = True,
    rounding: float = 1e-6,
    sharding: bool = True,
    seed: int = 0,
) -> None:
    """Check the laws of merging on random task vectors with ties, zeros, one-column and scalar leaves.

    Always: one model comes out, finite, of the shapes that went in; zero deltas merge to zero; the base keeps its dtype;
    `match` then `merge` is what `params.merge` does; the result does not depend on the sharding.

    Args:
      tx: a transform that ends with one model.
      models: K.
      mean: identical experts give the expert back.
      linear: merge(a x + b y) = a merge(x) + b merge(y).
      exact: the result has the same bits on any sharding (pointwise, random and order-statistic atoms); otherwise (norms, dot
        products) it agrees to float32 rounding.
      rounding: how far float32 rounding goes, relative to the largest entry; more where a factorisation amplifies it.
      sharding: compare with the result on all devices, under Auto and Explicit axes (a compilation each).
      seed: of the random task vectors.

    Raises:
      AssertionError: a law does not hold.

    Example:
      >>> import jaxmerge as jm
      >>> jm.testing.assert_merge(jm.params.linear(), mean=True, linear=True)
    """
    rng = np.random.default_rng(seed)
    run = jax.jit(lambda stacked: tx.merge(tx.match(stacked), stacked))
    x, y = _deltas(rng, models), _deltas(rng, models)
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
        _close(run(same), jax.tree.map(lambda v: v[:1], same), 1e-6, "identical experts give the expert back")
    if linear:
        both = jax.tree.map(lambda a, b: 2 * a - 3 * b, x, y)
        expected = jax.tree.map(lambda a, b: 2 * a - 3 * b, merged, run(y))
        _close(run(both), expected, 1e-5, "linearity in the experts")
    _check_base(tx, x, merged)
    for kind in (AxisType.Auto, AxisType.Explicit) if sharding else ():
        mesh = Mesh(np.array(jax.devices()), ("shard",), axis_types=(kind,))
        sharded = {n: jax.device_put(v, NamedSharding(mesh, _spec(v, mesh))) for n, v in x.items()}
        _close(run(sharded), merged, 0.0 if exact else rounding, f"invariance to sharding ({kind.name} axes)")


def _deltas(rng: np.random.Generator, models: int) -> dict[str, np.ndarray]:
    """Coarse on purpose: many magnitudes tie, many are zero, signs cancel."""
    shapes = {"a/column": (24, 1), "b/kernel": (16, 24), "c/scalar": ()}
    coarse = {n: np.round(rng.standard_normal((models, *s)) * 4) / 4 for n, s in shapes.items()}
    return {n: v.astype(np.float32) for n, v in coarse.items()}


def _spec(x: np.ndarray, mesh: Mesh) -> P:
    fits = [d for d in range(1, x.ndim) if x.shape[d] % mesh.size == 0]
    return P(*[None] * fits[-1], "shard") if fits else P()


def _check_base(tx: MergeTransform, x: dict[str, np.ndarray], merged: Stacked) -> None:
    """Whole models in: the base's dtype comes out, and what `match` and `merge` say."""
    zero = jax.tree.map(lambda v: jnp.zeros(v.shape[1:], jnp.bfloat16), x)
    models = [jax.tree.map(lambda v, k=k: jnp.asarray(v[k]), x) for k in range(next(iter(x.values())).shape[0])]
    whole = jax.jit(lambda base, models: merge(tx, base, models))(zero, models)
    for name, leaf in whole.items():
        if leaf.dtype != jnp.bfloat16:
            raise AssertionError(f"{name}: the base is bfloat16, the merge is {leaf.dtype}.")
    _close(whole, add(zero, merged), 2**-8, "merge is match, merge, add; one cast at the end")


def _close(got: PyTree, expected: PyTree, tolerance: float, law: str) -> None:
    for name, value in expected.items():
        a, b = np.asarray(got[name]).astype(np.float32), np.asarray(value).astype(np.float32)
        scale = max(1.0, float(np.abs(b).max(initial=0)))
        error = float(np.abs(a - b).max(initial=0))
        if not error <= tolerance * scale:
            raise AssertionError(f"{law}: leaf {name} differs by {error:.3g}, more than {tolerance * scale:.3g}.")
