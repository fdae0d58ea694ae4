"""mergekit's YAML gives mergekit's tensors: recorded runs of mergekit 0.1.5 on small Llamas, through our recipes."""

import hashlib
import json
import pathlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxmerge import checkpoint, params
from jaxmerge.recipe._methods import MERGEKIT, METHODS, arithmetic
from jaxmerge.recipe._read import read
from jaxmerge.recipe._resolve import resolve
from jaxmerge.recipe._transform import work
from scripts.bench import mergekit_cases as cases

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
MANIFEST = json.loads((GOLDEN / "recipe/manifest.json").read_text())
VECTORS = json.loads((GOLDEN / "params/manifest.json").read_text())
TOLERANCE = dict(rtol=2e-5, atol=2e-6)  # float32 sums of a few terms of order one, in another order
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


def merged(text, method=None, adapt=None):
    """A recipe carried out in memory."""
    [recipe] = read(text)
    sources = {reference: checkpoint.open(reference.model.path) for reference in recipe.references()}
    rows, mistakes, _ = resolve(recipe, sources)
    assert not mistakes, mistakes
    todo = work(method or recipe.method, rows, adapt or (lambda model, there, _: (sources[model], there)), recipe.own["seed"])
    tree = lambda source: {n: source.read(n) for n in source.leaves}
    return params.merge(todo.tx, tree(todo.base) if todo.base else None, [tree(m) for m in todo.models])


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


def agree(got, name, golden, **tolerance):
    expected = unpack(name, golden(f"recipe/{name}")["out"])
    assert got.keys() == expected.keys()
    for n, value in expected.items():
        np.testing.assert_allclose(np.asarray(got[n], np.float32), value, **(tolerance or TOLERANCE), err_msg=f"{name}: {n}")


plain = [n for n in cases.RECIPES if n not in (*cases.RANDOM, *WITH_WORDS, "dtypes")]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SEARCHES else n for n in plain])
def test_equals_mergekit(models, golden, name):
    agree(merged(cases.recipe(name, models)), name, golden)


def test_every_method_of_mergekit_is_recorded():
    assert {text.split()[1] for text in cases.RECIPES.values()} == MERGEKIT


@pytest.mark.parametrize("name", cases.RANDOM)
def test_equals_mergekit_with_its_masks(models, golden, name):
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
    agree(merged(cases.recipe(name, models), method), name, golden)


def test_dtypes(models, golden):
    """Parents of two dtypes; the output is rounded once, to bfloat16: half a unit of its last place from mergekit's at most."""
    got = {n: np.asarray(x, ml_dtypes.bfloat16) for n, x in merged(cases.recipe("dtypes", models)).items()}
    agree(got, "dtypes", golden, rtol=2.0**-8, atol=0)


@pytest.mark.parametrize("name", [n for n in VECTORS if n.startswith("yaml_") and "tokenizer" not in n])
def test_equals_the_recorded_yaml(tmp_path, golden, name):
    from safetensors.numpy import save_file

    vectors, p = golden(f"params/{name}"), VECTORS[name]["params"]
    model = lambda v: {n: np.ascontiguousarray(v[at:][: int(np.prod(s))].reshape(s)) for n, s, at in p["layout_in"]}
    for k in ("base", "math", "lang"):
        save_file(model(vectors[f"in/{k}"]), tmp_path / f"{k}.safetensors")
    text = json.dumps(p["config"]).replace("@", f"{tmp_path}/")  # JSON is YAML
    for k in ("base", "math", "lang"):
        text = text.replace(f'/{k}"', f'/{k}.safetensors"')
    got = merged(text)
    for n, value in model(vectors["out"]).items():
        np.testing.assert_allclose(got[n], value, **TOLERANCE, err_msg=n)
