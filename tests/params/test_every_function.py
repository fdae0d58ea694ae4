"""What looks at task vectors and is no merge: masks, factors, analysis. The same on a mesh, finite on nothing, K = 1 to 8."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxmerge import params
from jaxmerge.params._laws import deltas, shardings
from jaxmerge.testing import collectives

SUMS, SHARES = {"all-reduce"}, {"all-reduce", "all-to-all"}
ROUNDING = 2e-5  # of factors: 1e-7 over the least gap between singular values, 0.013 of the largest, twice


def models(x):
    return [{n: v[k] for n, v in x.items()} for k in range(next(iter(x.values())).shape[0])]


def served(x):
    return params.twin_serve(*params.twin_split(x, density=0.3), jnp.ones(len(models(x))))


def soup(x):
    """Adapters of rank 1, whose features are split as leaves are."""
    factors = [{"w": params.Factors(m["a/column"], m["d/constant"][None])} for m in models(x)]
    return params.dense(params.concatenate(factors, 0.5))


# {name: (function, what moves beside nothing, how exact)}
FUNCTIONS = {
    "emr": (params.emr, SUMS, 1e-6),
    "tall_masks": (lambda x: params.tall_masks(x, {n: v.sum(axis=0, keepdims=True) for n, v in x.items()}), set(), 0),
    "tsv_compress": (lambda x: params.dense(params.tsv_compress(x)), SHARES, ROUNDING),
    "twin_split": (served, SHARES, ROUNDING),
    "concatenate": (soup, set(), 1e-6),
    "cosines": (params.cosines, SUMS, 1e-6),
    "sign_conflict": (params.sign_conflict, SUMS, 1e-6),
    "task_norms": (params.task_norms, SUMS, 1e-6),
    "add": (lambda x: params.add(models(x)[0], params.task_vectors(models(x)[0], models(x)[-1:])), set(), 0),
}
ON_THE_HOST = {"chunk_importance", "draw_tasks", "expert_coefficients"}


def test_the_table_is_complete():
    looks = {n for n, f in vars(params).items() if inspect.isfunction(f) and "stacked" in inspect.signature(f).parameters}
    assert looks <= {*FUNCTIONS, *ON_THE_HOST}


def close(got, expected, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(v).astype(np.float64) for v in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(initial=0), 1))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_same_on_a_mesh(name):
    f, moves, tolerance = FUNCTIONS[name]
    x = deltas(np.random.default_rng(0), 3)
    run = jax.jit(f)
    sharded = jax.tree.map(jax.device_put, x, shardings(8, AxisType.Explicit))
    jax.eval_shape(f, sharded)  # where no mesh is set too
    with jax.set_mesh(sharded["b/kernel"].sharding.mesh):
        program = run.lower(sharded).compile()
    assert {c.name for c in collectives(program)} <= moves
    close(program(sharded), run(x), tolerance)
    for leaf in jax.tree.leaves(run(jax.tree.map(np.zeros_like, x))):
        assert np.isfinite(leaf).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_model_and_eight(name):
    """Under Auto axes too, on 1, 2 and 4 devices, where the compiler chooses what moves."""
    f, _, tolerance = FUNCTIONS[name]
    for k, devices in ((1, 1), (8, 2), (3, 4)):
        x = deltas(np.random.default_rng(k), k)
        close(jax.jit(f)(jax.tree.map(jax.device_put, x, shardings(devices, AxisType.Auto))), jax.jit(f)(x), tolerance)
