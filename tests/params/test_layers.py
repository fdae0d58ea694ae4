"""Hyperparameters along the layers and by filter, layers from several models, vocabularies aligned: against mergekit."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxmerge import params
from tests.hlo import collectives
from tests.rounding import assert_within, entrywise

MANIFEST = json.loads((pathlib.Path(__file__).parents[1] / "golden/params/manifest.json").read_text())
LAYERS = 4
OPERATIONS = 20  # on an entry's longest path, as in test_parity


def setting(value):
    """mergekit's notation of one parameter, for four layers."""
    if isinstance(value, list) and isinstance(value[0], dict):
        return params.by_name({v["filter"]: setting(v["value"]) for v in value[:-1]}, setting(value[-1]["value"]))
    return params.gradient(value, LAYERS) if isinstance(value, list) else value


def of_models(config, name):
    return params.by_model(*(setting(m["parameters"][name]) for m in config["models"] if "parameters" in m))


CASES = {
    "yaml_linear_gradient": lambda c: params.linear(of_models(c, "weight")),
    "yaml_slerp_gradient": lambda c: params.slerp(setting(c["parameters"]["t"])),
    "yaml_ties_gradient": lambda c: params.ties(of_models(c, "density"), weight=of_models(c, "weight"), scope="tensor"),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_and_filters_equal_mergekit(golden, case):
    vectors, p = golden(f"params/{case}_a"), MANIFEST[f"{case}_a"]["params"]
    model = lambda v: {name: v[at:][: int(np.prod(shape))].reshape(shape) for name, shape, at in p["layout_in"]}
    base = model(vectors["in/base"]) if case == "yaml_ties_gradient" else None
    models = [model(vectors[f"in/{name}"]) for name in ("math", "lang")]
    merged = jax.jit(lambda b, m: params.merge(CASES[case](p["config"]), b, m))(base, models)
    for name, expected in model(vectors["out"]).items():
        inputs = [m[name] for m in (*models, *([base] if base else []))]
        assert_within(merged[name], expected, entrywise(inputs, OPERATIONS), name)


def test_gradients_of_one_layer_of_slices_and_of_models():
    one = params.gradient([0.25, 0.75], 1)
    assert one("layers/0/w") == 0.75 and one("norm") == 0.25  # as mergekit: a single layer is the last
    part = params.gradient([0.0, 1.0], (2, 5), rest=[0.5, 0.5])
    assert [part(f"layers/{i}/w") for i in (2, 3, 4)] == [0.0, 0.5, 1.0] and part("embed") == [0.5, 0.5]
    both = params.gradient([[0.0, 1.0], [1.0, 0.0]], 3)
    np.testing.assert_array_equal(both("layers/1/w"), [0.5, 0.5])
    at = np.arange(7) / 6 * 3
    along = params.gradient([1.0, 5.0, 2.0, 4.0], 7, layer=lambda name: int(name[1:]))
    np.testing.assert_allclose(
        [along(f"h{i}") for i in range(7)], np.interp(at, np.arange(4), [1.0, 5.0, 2.0, 4.0]), rtol=1e-15
    )


def test_filters_in_order():
    at = params.by_name({"mlp": 1.0, re.compile("^layers/0/"): 2.0, "": 3.0})
    assert [at(n) for n in ("layers/0/mlp", "layers/0/attn", "x/layers/0/attn")] == [1.0, 2.0, 3.0]


def test_layers_are_taken_bit_by_bit():
    rng = np.random.default_rng(0)
    model = lambda: (
        {f"layers.{i}.w": rng.standard_normal((2, 3)).astype(np.float32) for i in range(3)}
        | {n: rng.standard_normal(3).astype(np.float32) for n in ("embed", "head")}
    )
    models = [model() for _ in range(3)]
    models[1]["layers.0.w"][:] = np.nan
    rest = lambda name: 2 if name == "embed" else [0.0, 0.25, 0.75]
    merged = params.merge(params.select_layers([2, 1, [0.5, 0.5, 0.0]], rest=rest), None, models)
    for name, k in (("layers.0.w", 2), ("layers.1.w", 1), ("embed", 2)):
        np.testing.assert_array_equal(merged[name], models[k][name])
    np.testing.assert_allclose(merged["layers.2.w"], (models[0]["layers.2.w"] + models[1]["layers.2.w"]) / 2, rtol=1e-6)
    np.testing.assert_allclose(merged["head"], 0.25 * models[1]["head"] + 0.75 * models[2]["head"], rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: params.gradient([], 3), "one value or more"),
        (lambda: params.gradient([1.0], 0), "one layer or more"),
        (lambda: params.gradient([1.0], 2)("layers/2/w"), "is of layer 2; there are values for layers 0 to 1"),
        (lambda: params.by_name({"mlp": 1.0})("attn"), "no filter of .* fits leaf 'attn'"),
        (lambda: params.merge(params.select_layers([0]), None, [{"layers/1/w": jnp.ones(2)}]), "is of layer 1, but"),
        (lambda: params.merge(params.select_layers([], rest=1), None, [{"w": jnp.ones(2)}]), "from model 1, but there are 1"),
        (lambda: params.merge(params.select_layers([], rest=[1, 2]), None, [{"w": jnp.ones(2)}]), "one per model"),
        (lambda: params.align_vocabularies([{"a": 0}], {"a": 1}), "rows must be 0 to 0"),
        (lambda: params.align_vocabularies([{"a": 0}], base=1), r"models \[1\] are not among the 1"),
        (lambda: params.align_vocabularies([{"a": 0}], sources={"b": None}), r"tokens \['b'\] are not in the union"),
        (lambda: params.align_vocabularies([{"a": 0}], force=["a"]), "forced without a source"),
        (lambda: params.align_embeddings(params.align_vocabularies([{"a": 2}]), [jnp.ones((2, 1))]), r"of \[3\] rows or more"),
        (lambda: params.align_embeddings(params.align_vocabularies([{"a": 0}]), [jnp.ones((2, 1))], size=0), "size must be 1"),
    ],
)
def test_wrong_arguments(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- vocabularies ----------------------------------------------------------------------------------------------------


def test_a_union_of_vocabularies_equals_mergekit(golden):
    vectors, p = golden("params/yaml_tokenizer_a"), MANIFEST["yaml_tokenizer_a"]["params"]
    names = ("base", "e0", "e1")
    ids = [{token: i for i, token in enumerate(p["input_vocabs"][name])} for name in names]
    plan = params.align_vocabularies(ids, p["output_vocab"])
    tx = params.linear([m["parameters"]["weight"] for m in p["config"]["models"]])
    for leaf in ("model.embed_tokens.weight", "lm_head.weight"):
        tables = params.align_embeddings(plan, [vectors[f"in/{name}/{leaf}"] for name in names])
        merged = params.merge(tx, None, [{leaf: t} for t in tables])[leaf]
        assert_within(merged, vectors[f"out/{leaf}"], entrywise(tables, OPERATIONS), leaf)
    kinds = plan.report()
    token = p["output_vocab"]
    assert sum(kinds.values()).tolist() == np.ones((3, 11), int).tolist()  # one kind each
    assert kinds["exact"][:, token["cat"]].all() and kinds["borrowed"][0, token["sun"]]
    assert kinds["averaged"][2, token["bird"]] and not kinds["zero"].any()


def test_fallbacks_by_hand():
    """The base's row, the one donor's, the mean of two, zeros, and rows by decree; rows beyond are the mean."""
    ids = [{"a": 0, "b": 1}, {"a": 1, "c": 0, "d": 2}, {"c": 1, "d": 0, "e": 2}]
    union = {t: i for i, t in enumerate("abcdef")}
    rng = np.random.default_rng(0)
    tables = [rng.standard_normal((3, 4)).astype(np.float32) for _ in ids]
    plan = params.align_vocabularies(ids, union, base=2, sources={"b": None, "a": (1, 2)}, force=["a"])
    x, y, z = (np.asarray(t) for t in params.align_embeddings(plan, tables, size=8))
    np.testing.assert_array_equal(x[0], tables[1][2])  # forced
    np.testing.assert_array_equal(y[0], tables[1][2])
    np.testing.assert_array_equal([x[1], y[1], z[1]], [tables[0][1], np.zeros(4), np.zeros(4)])  # by decree nothing
    np.testing.assert_array_equal([x[2], y[2], z[2]], [tables[2][1], tables[1][0], tables[2][1]])  # the base's
    np.testing.assert_array_equal([y[4], y[5]], [tables[2][2], np.zeros(4)])
    np.testing.assert_allclose(x[6:], np.broadcast_to(x[:6].mean(axis=0), (2, 4)), rtol=1e-6)
    plain = params.align_vocabularies(ids, union)
    x = params.align_embeddings(plain, tables)[0]
    np.testing.assert_allclose(x[3], (tables[1][2] + tables[2][0]) / 2, rtol=1e-6)
    same = params.align_vocabularies([ids[0]] * 2)
    assert same.report()["exact"].all()


def test_features_stay_where_they_are(mesh):
    """Split over the features nothing moves; split over the rows they must, which is what aligning them means."""
    rng = np.random.default_rng(0)
    tables = [rng.standard_normal((8, 4)).astype(np.float32) for _ in range(2)]
    plan = params.align_vocabularies([{str(i): i for i in range(8)}, {str(i): 7 - i for i in range(2, 8)}])
    align = jax.jit(lambda tables: params.align_embeddings(plan, tables))
    for spec, moves in ((P(None, "model"), set()), (P("model", None), {"all-gather", "all-reduce"})):
        put = [jax.device_put(t, NamedSharding(mesh, spec)) for t in tables]
        assert set(collectives(align.lower(put).compile())) <= moves
        jax.tree.map(np.testing.assert_array_equal, align(put), align(tables))
