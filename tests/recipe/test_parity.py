"""mergekit's YAML gives mergekit's tensors: recorded runs of mergekit 0.1.5 on small Llamas, through our recipes."""

import hashlib
import json
import pathlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxmerge import params, recipe
from jaxmerge.recipe._methods import MERGEKIT, METHODS, arithmetic
from scripts.bench import mergekit_cases as cases
from tests.rounding import assert_within, entrywise

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
MANIFEST = json.loads((GOLDEN / "recipe/manifest.json").read_text())
VECTORS = json.loads((GOLDEN / "params/manifest.json").read_text())
# The longest path of an entry, as tests/params/test_parity.py counts it: less the base, times a weight, times a norm over
# another, added to two more, over their weights, scaled, added to the base.
OPERATIONS = 20
# an order statistic of every shape is a program of its own, and a second to compile
SEARCHES = ("ties_sum", "breadcrumbs", "breadcrumbs_ties", "sce", "arcee_fusion", "slices_bases", "multislerp_base")
WITH_WORDS = tuple(n for n in cases.RECIPES if "words" in cases.RECIPES[n])


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """The models that mergekit saw, as folders."""
    root = tmp_path_factory.mktemp("models")
    cases.write(root, cases.Size())
    found = cases.tensors(cases.Size())
    stamp = hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for m in found.values() for x in m.values())).hexdigest()
    assert stamp == MANIFEST["_models_sha256"], "numpy's generator draws other numbers; record the vectors anew"
    return root


def merged(text):
    """A recipe carried out in memory; and its plan."""
    [plan] = recipe.plan(text)
    tree = lambda source: {n: source.read(n) for n in source.leaves}
    base, models = plan.work.base, plan.work.models
    return params.merge(plan.work.tx, tree(base) if base else None, [tree(m) for m in models]), plan


def layout(name):
    found = MANIFEST[name]["layout"]
    base = {n: [list(s), "float32"] for n, s in sorted(cases.shapes(cases.Size()).items())}
    return base if found == "base" else found


def unpack(name, vector):
    at, found = 0, {}
    for n, (shape, dtype) in layout(name).items():
        size = int(np.prod(shape))
        found[n], at = vector[at : at + size].reshape(shape), at + size
        assert dtype in ("float32", "bfloat16")
    return found


def inputs(plan, n):
    """What goes into a tensor of the output, of every model."""
    return [np.asarray(s.read(n), np.float32) for s in (plan.work.base, *plan.work.models) if s is not None]


def agree(got, plan, name, golden, *, growth=1.0, more=lambda value: 0.0):
    """As far as float32 rounds: by entry, of what goes into it; `more` is what its own dtype adds."""
    expected = unpack(name, golden(f"recipe/{name}")["out"])
    assert got.keys() == expected.keys()
    for n, value in expected.items():
        bound = entrywise(inputs(plan, n), OPERATIONS, growth) + more(np.abs(value))
        assert_within(np.asarray(got[n], np.float32), value, bound, f"{name}: {n}")


def by_column(plan, n):
    """Of a table of tokens: a row may be the mean of others, of which none is larger than the largest of its column."""
    return [np.broadcast_to(np.abs(x).max(axis=0), x.shape) for x in inputs(plan, n)]


plain = [n for n in cases.RECIPES if n not in (*cases.RANDOM, *WITH_WORDS, "dtypes")]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SEARCHES else n for n in plain])
def test_equals_mergekit(models, golden, name):
    agree(*merged(cases.recipe(name, models)), name, golden)


def test_every_method_of_mergekit_is_recorded():
    assert {text.split()[1] for text in cases.RECIPES.values()} == MERGEKIT


@pytest.mark.parametrize("name", cases.RANDOM)
def test_equals_mergekit_with_its_masks(models, golden, monkeypatch, name):
    vectors = golden(f"recipe/{name}")
    shapes = cases.shapes(cases.Size())

    def mask(n, k):
        key = f"mask/{n}#{k}"
        bits = np.unpackbits(vectors[key])[: int(np.prod(shapes[n]))]
        return bits.reshape(shapes[n])

    def drawn(v):
        settings = lambda n, shape: {"mask": np.stack([mask(n, k) for k in range(shape[0])])}
        merge = lambda plan, x: jnp.where(plan["mask"] != 0, x, 0)
        return params._transform.atom(params._transform.Step(settings, lambda s, x: s, merge))

    method = METHODS[name]._replace(build=arithmetic(drawn, signs=name in ("dare_ties", "della")))
    monkeypatch.setitem(METHODS, name, method)
    got, plan = merged(cases.recipe(name, models))
    growth = 1.0  # the largest factor that brings a masked task vector back to its norm
    for n in shapes:
        base, *others = inputs(plan, n)
        for k, x in enumerate(others):
            change, kept = np.abs(x - base), np.abs(x - base) * mask(n, k)
            growth = max(growth, change.sum() / kept.sum() if kept.sum() else 1.0)
    agree(got, plan, name, golden, growth=growth)


def test_dtypes(models, golden):
    """Parents of two dtypes; the output is rounded once, to bfloat16: half a unit of its last place from mergekit's at most."""
    found, plan = merged(cases.recipe("dtypes", models))
    got = {n: np.asarray(x, ml_dtypes.bfloat16) for n, x in found.items()}
    agree(got, plan, "dtypes", golden, more=lambda value: 2.0**-8 * value)  # of 8 bits, half the last


RECORDED = [n for n in VECTORS if n.startswith("yaml_") and "tokenizer" not in n]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if "ties" in n else n for n in RECORDED])
def test_equals_the_recorded_yaml(tmp_path, golden, name):
    from safetensors.numpy import save_file

    vectors, p = golden(f"params/{name}"), VECTORS[name]["params"]
    model = lambda v: {n: np.ascontiguousarray(v[at:][: int(np.prod(s))].reshape(s)) for n, s, at in p["layout_in"]}
    for k in ("base", "math", "lang"):
        save_file(model(vectors[f"in/{k}"]), tmp_path / f"{k}.safetensors")
    text = json.dumps(p["config"], indent=1).replace("@", f"{tmp_path}/")  # JSON is YAML
    for k in ("base", "math", "lang"):
        text = text.replace(f'/{k}"', f'/{k}.safetensors"')
    got, plan = merged(text)
    for n, value in model(vectors["out"]).items():
        assert_within(got[n], value, entrywise(inputs(plan, n), OPERATIONS), n)


# --- vocabularies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_WORDS)
def test_vocabularies_equal_mergekit(models, golden, name):
    """Row by row: mergekit numbers new tokens in the order of a hash table, we in that of the models and their rows."""
    got, plan = merged(cases.recipe(name, models))
    theirs = MANIFEST[name]["vocabulary"]
    data = json.loads(plan.beside["tokenizer.json"])
    ours = data["model"]["vocab"] | {a["content"]: a["id"] for a in data["added_tokens"]}
    assert ours.keys() == theirs.keys() and sorted(ours.values()) == list(range(len(ours)))
    config = json.loads(plan.beside["config.json"])
    assert config["vocab_size"] == MANIFEST[name]["config"]["vocab_size"] == got["lm_head.weight"].shape[0]
    order = [ours[t] for t in sorted(ours)] + list(range(len(ours), config["vocab_size"]))
    same = [theirs[t] for t in sorted(ours)] + list(range(len(ours), config["vocab_size"]))
    expected = unpack(name, golden(f"recipe/{name}")["out"])
    for n, value in expected.items():
        words = n in ("lm_head.weight", "model.embed_tokens.weight")
        a, b = (got[n][np.array(order)], value[np.array(same)]) if words else (got[n], value)
        bound = entrywise(by_column(plan, n) if words else inputs(plan, n), OPERATIONS)
        assert_within(a, b, bound, f"{name}: {n}")


def test_the_recorded_vocabulary(tmp_path, golden):
    from safetensors.numpy import save_file

    vectors, p = golden("params/yaml_tokenizer_a"), VECTORS["yaml_tokenizer_a"]["params"]
    for k, words in p["input_vocabs"].items():
        (tmp_path / k).mkdir()
        leaves = {n: vectors[f"in/{k}/{n}"] for n in ("model.embed_tokens.weight", "lm_head.weight")}
        save_file(leaves, tmp_path / k / "model.safetensors")
        (tmp_path / k / "tokenizer.json").write_text(json.dumps(cases.tokenizer(words)))
    got, plan = merged(json.dumps(p["config"], indent=1).replace("@", f"{tmp_path}/"))
    data, theirs = json.loads(plan.beside["tokenizer.json"]), p["output_vocab"]
    ours = data["model"]["vocab"] | {a["content"]: a["id"] for a in data["added_tokens"]}
    assert ours.keys() == theirs.keys()
    for n in got:
        rows = np.array([[ours[t], theirs[t]] for t in theirs]).T
        assert_within(got[n][rows[0]], vectors[f"out/{n}"][rows[1]], entrywise(by_column(plan, n), OPERATIONS)[rows[0]], n)
    assert plan.vocabulary[f"{tmp_path}/base"] == {"exact": 7, "borrowed": 2, "averaged": 2, "zero": 0}


def test_tables_in_blocks_are_the_table(models):
    """Whatever rows and columns are read together: own rows, donors', decrees, padding."""
    [plan] = recipe.plan(cases.recipe("union_tokens", models))
    for source in (plan.work.base, *plan.work.models):
        whole = source.read("model.embed_tokens.weight")
        blocks = [source.read("model.embed_tokens.weight", (slice(i, i + 5), slice(0, 8))) for i in range(0, 16, 5)]
        np.testing.assert_array_equal(np.concatenate(blocks), whole)
        np.testing.assert_array_equal(source.read("model.embed_tokens.weight", (slice(3, 11), slice(2, 6))), whole[3:11, 2:6])
