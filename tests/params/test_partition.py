"""Leaves apart by name: each label as if alone, statistics of the whole model included, in memory and from files."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from jaxmerge import checkpoint, params

SHAPES = {"embed": (7, 4), "head": (4, 7), "layers/0/w": (6, 4), "layers/0/b": (4,), "layers/1/w": (6, 4), "layers/1/b": (4,)}
OFFICIAL = dict(extra=1, ties="all", tie="majority")


def model(seed):
    rng = np.random.default_rng(seed)  # coarse, so that magnitudes tie
    return {n: jnp.asarray(np.round(rng.standard_normal(s) * 4) / 4, jnp.float32) for n, s in SHAPES.items()}


# Orbax says so whenever a checkpoint is read without a target; only tests do that.
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")

BASE, MODELS = model(0), [model(1), model(2), model(3)]
TRANSFORMS = {
    "table": params.ties(0.3, **OFFICIAL),  # trim and elect_sign look at the whole model
    "kernel": params.pcb(0.4),  # as it reduces
    "bias": params.linear([0.2, 0.3, 0.5]),
    "second": params.pcb(0.3),  # looks at its whole model in the same step
}
LABEL = params.by_name({"embed": "table", "head": "table", "0/w": "kernel", "1/w": "second"}, "bias")


@pytest.fixture(scope="module")
def merged():
    return jax.jit(lambda base, models: params.merge(params.partition(TRANSFORMS, LABEL), base, models))(BASE, MODELS)


@pytest.mark.parametrize("label", TRANSFORMS)
def test_each_label_as_if_alone(merged, label):
    own = lambda tree: {n: x for n, x in tree.items() if LABEL(n) == label}
    alone = jax.jit(lambda base, models: params.merge(TRANSFORMS[label], base, models))(own(BASE), [own(m) for m in MODELS])
    for name, expected in alone.items():
        np.testing.assert_array_equal(merged[name], expected)


def test_from_files_as_in_memory(merged, tmp_path):
    for n, tree in (("base", BASE), *((str(k), m) for k, m in enumerate(MODELS))):
        ocp.save(tmp_path / n, tree)
    tx = params.partition(TRANSFORMS, LABEL)
    paths = [tmp_path / str(k) for k in range(3)]
    checkpoint.merge(tx, tmp_path / "base", paths, tmp_path / "out", memory=800, on_devices=True)
    got = ocp.load(tmp_path / "out")
    for name, expected in merged.items():
        np.testing.assert_allclose(got[name], expected, rtol=1e-6, atol=1e-7, err_msg=name)


def test_a_plan_is_found_and_used_again(merged):
    tx, stacked = params.partition(TRANSFORMS, LABEL), params.task_vectors(BASE, MODELS)
    plan = tx.match(stacked)
    again = params.add(BASE, tx.merge(plan, stacked))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), again, merged)
    assert sum("threshold" in str(step["embed"]) for step in plan) == 1


def test_what_is_excluded():
    tx = params.exclude(params.ties(0.3), ["embed", re.compile("^head")], rest=params.keep_base())
    got = jax.jit(lambda base, models: params.merge(tx, base, models))(BASE, MODELS)
    rest = lambda tree: {n: x for n, x in tree.items() if n.startswith("layers")}
    alone = jax.jit(lambda base, models: params.merge(params.ties(0.3), base, models))(rest(BASE), [rest(m) for m in MODELS])
    jax.tree.map(np.testing.assert_array_equal, got, alone | {n: BASE[n] for n in ("embed", "head")})


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        ({"a": params.linear(), "b": params.weigh(1.0)}, "must leave as many models"),
        ({"a": params.MergeTransform(lambda s: s, lambda p, s: s)}, "chain of this package's atoms"),
    ],
)
def test_what_cannot_be_apart(unchecked, transforms, message):
    with pytest.raises(ValueError, match=message):
        params.partition(transforms, str)


def test_a_label_that_no_leaf_has(tmp_path):
    """Its statistic is of nothing, in memory and in rounds over the files."""
    tx = params.partition({"a": params.ties(0.3), "b": params.linear()}, lambda name: "b")
    base, models = {"w": jnp.zeros(2)}, [{"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 0.0])}]
    assert params.merge(tx, base, models)["w"].tolist() == [2.0, 1.0]
    for n, tree in (("base", base), ("0", models[0]), ("1", models[1])):
        ocp.save(tmp_path / n, tree)
    checkpoint.merge(tx, tmp_path / "base", [tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    assert ocp.load(tmp_path / "out")["w"].tolist() == [2.0, 1.0]
