"""Learned merges, shared and exclusive parts, layers and windows."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmerge import params
from tests.rounding import assert_within, entrywise

MANIFEST = json.loads((pathlib.Path(__file__).parents[1] / "golden/params/manifest.json").read_text())


def teachers(seed=0, classes=4, d=6):
    """Two linear classifiers that each know half of the inputs' coordinates, and inputs."""
    rng = np.random.default_rng(seed)
    w = 3 * rng.standard_normal((d, classes)).astype(np.float32)
    top = np.arange(d)[:, None] < d // 2
    base = {"w": jnp.zeros((d, classes)), "b": jnp.zeros(classes), "steps": jnp.int32(3)}
    models = [base | {"w": jnp.where(half, w, 0)} for half in (top, ~top)]
    return base, models, jnp.asarray(rng.standard_normal((32, d)), jnp.float32), jnp.asarray(w)


def test_adamerging_learns_from_unlabelled_inputs():
    base, models, x, w = teachers()
    loss = lambda model, x: params.entropy(x @ model["w"] + model["b"][None])
    start = {"w": jnp.full(2, 0.3), "b": jnp.full(2, 0.3)}
    found, losses = params.fit(
        loss, params.adamerging, start, base=base, models=models, batches=[x] * 60, optimizer=optax.adam(2e-2)
    )
    assert losses[-1] < losses[0] and (found["w"] > 0.9).all(), (losses, found)
    merged = params.merge(params.adamerging(found), base, models)
    agree = (jnp.argmax(x @ merged["w"], -1) == jnp.argmax(x @ w, -1)).mean()
    assert agree > 0.9, agree


def test_self_positioning_learns_direction_and_size():
    base, models, x, _w = teachers()
    target = x @ (0.25 * models[0]["w"] + 0.75 * models[1]["w"])
    loss = lambda model, x: jnp.mean((x @ model["w"] - target) ** 2)
    found, _losses = params.fit(
        loss,
        lambda c: params.self_positioning(c["position"], c["size"]),
        {"position": jnp.zeros(2), "size": jnp.array(0.5)},
        base=base,
        models=models,
        batches=[x] * 150,
        optimizer=optax.adam(5e-2),
    )
    np.testing.assert_allclose(jax.nn.softmax(found["position"]) * found["size"], [0.25, 0.75], atol=0.02)


def test_gradients_of_expert_merging():
    base, models = {"w": jnp.zeros(5)}, [{"w": jnp.ones(5)}]
    raw = jnp.zeros((1, 2))
    gradient = jax.grad(lambda r: params.merge(params.expert_merging({"w": r}), base, models)["w"].sum())(raw)
    np.testing.assert_allclose(gradient, [[0.75, 0.5]])  # pieces of 3 and 2 entries, sigmoid' = 1/4


def test_fit_without_batches(unchecked):
    base, models, *_ = teachers()
    with pytest.raises(ValueError, match="no batches"):
        params.fit(
            lambda m, b: 0.0, params.adamerging, jnp.zeros(2), base=base, models=models, batches=[], optimizer=optax.sgd(1.0)
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: params.adamerging([0.5], squash="tanh"), "squash must be one of"),
        (lambda: params.layer_swapping(4, bottom=3, top=2), "do not fit 4 layers"),
        (lambda: params.window_average("step"), "decay must be one of"),
        (lambda: params.truncate(1.5), "density must be between"),
        (lambda: params.iso_cts(1.5), "common must be between"),
        (lambda: params.polar(jnp.eye(2), "qr"), "method must be"),
        (lambda: params.pcb(0.0), "density must be above 0"),
        (lambda: params.pcb(tail=0.6), "tail must be between"),
        (lambda: params.pcb(scope="row"), "scope must be"),
        (lambda: params.consensus(shared=0), "shared must be 1 or more"),
        (lambda: params.regmean([], axis=2), "axis must be 0 or 1"),
        (lambda: params.widen(axis=2), "axis must be 0 or 1"),
        (lambda: params.knots(params.ties(0.2)), 'use scope="tensor"'),
        (lambda: params.knots(params.MergeTransform(lambda s: s, lambda p, s: s)), "chain of this package's atoms"),
    ],
)
def test_wrong_arguments(unchecked, make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (params.adamerging({"v": [1.0, 1.0]}), "leaf 'w' has no coefficients"),
        (params.expert_merging({"w": np.zeros((3, 1))}), r"coefficients of shape \(2, chunks\)"),
        (params.regmean([{}]), "each of the 2 models"),
        (params.regmean([{"w": np.eye(3)}] * 2), r"Gram matrices of shape \(2, 2\)"),
        (params.fisher([{"w": np.ones(3)}] * 2), r"information of shape \(2, 2\)"),
        (params.fisher([{"w": np.ones((2, 2))}]), "each of the 2 models"),
        (params.mask({"w": np.ones((2, 2))}), r"mask of shape \(2, 2, 2\)"),
        (params.window_average(window=3), "window of 3 checkpoints"),
        (params.window_average([1.0, 0.5]), "2 checkpoints need 1 multipliers"),
        (params.window_average([1.5]), "fall from at most 1"),
        (params.partition({"a": params.linear()}, lambda name: "b"), r"label 'b', but there are transforms for \['a'\]"),
        (params.update_selective(), "takes one model beside the base"),
        (params.chain(params.sum_experts(), params.widen()), "base first"),
        (params.layer_swapping(1, bottom=1, top=0, layer=lambda name: 7), "is of layer 7"),
    ],
)
def test_wrong_values(tx, message):
    with pytest.raises(ValueError, match=message):
        params.merge(tx, {"w": jnp.zeros((2, 2))}, [{"w": jnp.ones((2, 2))}] * 2)


def test_windows_are_decayed_updates():
    """Checkpoint plus decayed updates, written down again; a linear decay is the plain mean."""
    rng = np.random.default_rng(0)
    run = [{"w": jnp.asarray(rng.standard_normal(3), jnp.float32)} for _ in range(5)]
    w = np.stack([m["w"] for m in run])
    u = np.arange(1, 4) / 4
    for decay, f in (("linear", 1 - u), ("cosine", (1 + np.cos(np.pi * u)) / 2), ("minus_sqrt", 1 - np.sqrt(u))):
        merged = params.merge(params.window_average(decay, window=4), None, run)["w"]
        np.testing.assert_allclose(merged, w[1] + f @ np.diff(w[1:], axis=0), rtol=1e-5, atol=1e-6)
        if decay == "linear":
            np.testing.assert_allclose(merged, w[1:].mean(axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("case", "transition"), [("yaml_layer_swap", 0), ("yaml_layer_swap_transition", (0, 1))])
def test_layer_swapping_equals_mergekit(golden, case, transition):
    vectors, layout = golden(f"params/{case}_a"), MANIFEST[f"{case}_a"]["params"]["layout_in"]
    model = lambda v: {name: v[at:][: int(np.prod(shape))].reshape(shape) for name, shape, at in layout}
    tx = params.layer_swapping(4, bottom=1, top=1, transition=transition, rest=(1.0, 0.0))
    models = [model(vectors["in/lang"]), model(vectors["in/math"])]
    merged = params.merge(tx, None, models)
    for name, expected in model(vectors["out"]).items():
        assert_within(merged[name], expected, entrywise([m[name] for m in models], 3), name)  # two products, a sum


def test_twins_are_served_as_they_merge():
    rng = np.random.default_rng(0)
    base = {"w": jnp.zeros((6, 4)), "b": jnp.zeros(4)}
    models = [{n: jnp.asarray(rng.standard_normal(v.shape), jnp.float32) for n, v in base.items()} for _ in range(3)]
    shared, own = params.twin_split(params.task_vectors(base, models), scale=0.3, density=0.5)
    assert own["w"].b.shape == (3, 6, 2) and own["b"].shape == (3, 4)
    for weights in (jnp.array([0.2, 0.5, 0.3]), jnp.array([0.0, 1.0, 0.0])):
        served = params.add(base, params.twin_serve(shared, own, weights))
        merged = params.merge(params.twin_merging(weights, scale=0.3, density=0.5), base, models)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), served, merged)
    whole = params.merge(params.twin_merging(jnp.array([0.0, 1.0, 0.0]), density=1.0), base, models)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), whole, models[1])


def test_emr_gives_one_model_back():
    stacked = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((1, 5, 3)), jnp.float32)}
    np.testing.assert_allclose(params.emr(stacked).task(0)["w"], stacked["w"], rtol=1e-6)


@pytest.mark.parametrize("ratio", [1.0, 1e2, 1e4])
def test_newton_schulz_is_as_good_as_float32(ratio):
    """Against float64; the error of any float32 route grows with the ratio of singular values, 4 ulps times it allowed."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((n, 16)))[0] for n in (24, 16))
    x = jnp.asarray((u * np.geomspace(1, 1 / ratio, 16)) @ v.T, jnp.float32)
    left, _, right = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    for method in ("svd", "newton_schulz"):
        np.testing.assert_allclose(params.polar(x, method), left @ right, atol=4 * 2**-23 * max(ratio, 8))
        np.testing.assert_allclose(params.polar(x.T, method), (left @ right).T, atol=4 * 2**-23 * max(ratio, 8))


def test_wudi_is_where_the_descent_leads():
    """The closed form has a loss no larger than 2000 steps of the official descent, from the same start."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((3, 5, 8)), jnp.float32)
    base, models = {"w": jnp.zeros((5, 8))}, [{"w": t} for t in x]

    def interference(t):
        return sum(float(jnp.sum(((t - v) @ v.T) ** 2) / jnp.sum(v * v)) for v in x)

    solved = params.merge(params.wudi(), base, models)["w"]
    descended = params.merge(params.wudi(optax.adam(1e-2), steps=2000), base, models)["w"]
    start = x.sum(axis=0)
    assert interference(solved) <= interference(descended) + 1e-4 and interference(descended) < interference(start)
