"""Adapters: in their bases, on their own, and taken out of models; against dense arithmetic."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmerge import checkpoint, cli, recipe
from jaxmerge.recipe._adapters import adapted
from scripts.bench import mergekit_cases as cases


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    cases.write(root, cases.Size())
    return root


MODULES = [f"model.layers.{i}.self_attn.{n}_proj" for i in range(4) for n in "qv"]


def lora(folder, seed, rank=2, modules=MODULES, **config):
    """A PEFT adapter; what it adds, dense."""
    rng, tensors, dense = np.random.default_rng(seed), {}, {}
    alpha = config.get("lora_alpha", 4)
    for m in modules:
        a, b = (rng.standard_normal(s).astype(np.float32) * 0.1 for s in ((rank, 8), (8, rank)))
        tensors |= {f"base_model.model.{m}.lora_A.weight": a, f"base_model.model.{m}.lora_B.weight": b}
        dense[f"{m}.weight"] = b @ a * np.float32(alpha / (rank**0.5 if config.get("use_rslora") else rank))
    folder.mkdir()
    save_file(tensors | config.pop("tensors", {}), folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["q_proj", "v_proj"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return dense


def test_a_model_with_its_adapter(models, tmp_path):
    one = lora(tmp_path / "one", 0)
    two = lora(tmp_path / "two", 1, rank=3, use_rslora=True)
    base = load_file(models / "base/model.safetensors")
    text = f"""
merge_method: task_arithmetic
base_model: {models}/base
models:
  - model: {models}/base+{tmp_path}/one
    parameters: {{weight: 0.5}}
  - model: {models}/base+{tmp_path}/two
    parameters: {{weight: 2}}
"""
    recipe.merge(text, tmp_path / "out")
    out = load_file(tmp_path / "out/model.safetensors")
    for n in base:
        expected = base[n] + (0.5 * one[n] + 2 * two[n] if n in one else 0)
        np.testing.assert_allclose(out[n], expected, rtol=1e-5, atol=1e-6, err_msg=n)
    assert "base + one" in (tmp_path / "out/README.md").read_text()


def test_what_an_adapter_may_hold(models, tmp_path):
    """Whole modules, kernels stored the other way round, embeddings, scales by module; blocks of rows."""
    rng = np.random.default_rng(3)
    norm, a, b = rng.standard_normal(8), rng.standard_normal((2, 8)), rng.standard_normal((8, 2))
    more = {
        "base_model.model.model.norm.weight": norm.astype(np.float32),
        "base_model.model.model.embed_tokens.lora_embedding_A": a.astype(np.float32),
        "base_model.model.model.embed_tokens.lora_embedding_B": b.astype(np.float32),
    }
    dense = lora(tmp_path / "x", 0, tensors=more, alpha_pattern={r"layers\.1\.self_attn\.q_proj": 8})
    base = checkpoint.open(models / "base")
    both = adapted(base, checkpoint.open(tmp_path / "x"))
    np.testing.assert_array_equal(both.read("model.norm.weight"), norm.astype(np.float32))
    expected = base.read("model.embed_tokens.weight") + (b @ a).T * 2
    np.testing.assert_allclose(both.read("model.embed_tokens.weight"), expected, rtol=1e-5, atol=1e-6)
    n = "model.layers.1.self_attn.q_proj.weight"
    np.testing.assert_allclose(both.read(n), base.read(n) + 2 * dense[n], rtol=1e-5, atol=1e-6)
    part = (slice(2, 5), slice(0, 8))
    np.testing.assert_array_equal(both.read(n, part), both.read(n)[2:5])
    lora(tmp_path / "turned", 0, fan_in_fan_out=True)
    turned = adapted(base, checkpoint.open(tmp_path / "turned"))
    np.testing.assert_allclose(turned.read(n) - base.read(n), dense[n].T, rtol=1e-4, atol=1e-6)
    assert both.identity() != turned.identity() != base.identity()


def test_adapters_alone_add_up_exactly(tmp_path):
    one, two = lora(tmp_path / "one", 0), lora(tmp_path / "two", 1, rank=3, modules=MODULES[:4])
    text = f"""
merge_method: linear
models:
  - model: {tmp_path}/one
    parameters: {{weight: [1, 2]}}
  - model: {tmp_path}/two
    parameters: {{weight: 3}}
parameters: {{normalize: false}}
"""
    recipe.merge(text, tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["r"] == 5 and config["lora_alpha"] == 5 and config["rank_pattern"][MODULES[-1]] == 2
    names = checkpoint.open(tmp_path / "out").leaves
    assert (tmp_path / "out/adapter_model.safetensors").exists() and len(names) == 2 * len(MODULES)
    zeros = {f"{m}.weight": np.zeros((8, 8), np.float32) for m in MODULES}
    save_file(zeros, tmp_path / "zeros.safetensors")
    both = adapted(checkpoint.open(tmp_path / "zeros.safetensors"), checkpoint.open(tmp_path / "out"))
    for n in zeros:
        t = int(n.split(".")[2]) / 3
        expected = (1 + t) * one[n] + (3 * two[n] if n in two else 0)
        np.testing.assert_allclose(both.read(n), expected, rtol=1e-5, atol=1e-6, err_msg=n)


METHODS = {
    "ties": "parameters: {weight: 1, density: 0.5}",
    "dare_linear": "parameters: {weight: 1, density: 0.5}\nseed: 3",
    "della": "parameters: {weight: 1, density: 0.5, epsilon: 0.2}",
    "sce": "parameters: {select_topk: 0.5}",
    "model_stock": "",
    "karcher": "",
    "linear": "parameters: {weight: 1}",
}


@pytest.mark.parametrize("method", [m if m == "ties" else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_adapters_by_any_method(tmp_path, method):
    """Whole at the full rank: the merge of the dense updates. At a lower one the nearest there is, as far as it says."""
    one = lora(tmp_path / "one", 0, rank=3)
    two = lora(tmp_path / "two", 1, rank=4, use_rslora=True)
    text = f"merge_method: {method}\nmodels: [{{model: {tmp_path}/one}}, {{model: {tmp_path}/two}}]\n{METHODS[method]}\n"
    dense = {}
    for name, updates in (("one", one), ("two", two)):
        (tmp_path / f"{name}_dense").mkdir()
        save_file(updates, tmp_path / f"{name}_dense/model.safetensors")
    (tmp_path / "base").mkdir()
    save_file({n: np.zeros_like(x) for n, x in one.items()}, tmp_path / "base/model.safetensors")
    based = method not in ("karcher", "linear")
    of_models = text.replace("/one}", "/one_dense}").replace("/two}", "/two_dense}")
    recipe.merge(of_models + (f"base_model: {tmp_path}/base\n" if based else ""), tmp_path / "dense")
    dense = load_file(tmp_path / "dense/model.safetensors")
    zeros = checkpoint.open(tmp_path / "base")
    for rank in (8, 2):
        [(plan, _)] = recipe.merge(text + f"rank: {rank}\n", tmp_path / f"out{rank}")
        assert (tmp_path / f"out{rank}/adapter_model.safetensors").exists()
        assert json.loads((tmp_path / f"out{rank}/adapter_config.json").read_text())["r"] == rank
        assert not recipe.verify(tmp_path / f"out{rank}").problems
        out = adapted(zeros, checkpoint.open(tmp_path / f"out{rank}"))
        lost = {}
        for n, x in dense.items():
            s = np.linalg.svd(x, compute_uv=False)
            best = np.sqrt(np.sum(s[rank:] ** 2))
            lost[n] = np.linalg.norm(out.read(n) - x) / np.linalg.norm(x)
            assert lost[n] * np.linalg.norm(x) <= 1.01 * best + 1e-5 * np.linalg.norm(x), (n, rank)
        mean, worst = np.sqrt(np.mean(np.square(list(lost.values())))), max(lost.values())
        said = plan.notes[-1].text
        assert (rank == 8) == (worst < 1e-4)
        if rank == 2:
            assert f"{100 * mean:.3g} %" in said and f"at most {100 * worst:.3g} %" in said


def test_adapters_beside_the_model_they_were_trained_on(models, tmp_path):
    """A base that is a model says what it always says; it is not read. Without a rank the largest of the inputs'."""
    lora(tmp_path / "one", 0)
    lora(tmp_path / "two", 1, rank=3)
    text = f"merge_method: ties\nbase_model: {models}/base\nmodels: [{{model: {tmp_path}/one}}, {{model: {tmp_path}/two}}]\n"
    text += "parameters: {weight: 1, density: 0.5}\n"
    [plan] = recipe.plan(text)
    assert "is not read" in plan.notes[0].text and "kept at rank 3" in plan.notes[1].text
    assert max(leaf.size for leaf in plan.headers.out.values()) == 24
    with pytest.raises(recipe.RecipeError, match='use scope="tensor"'):
        recipe.plan(text.replace("density: 0.5", "density: 0.5, scope: model"))
    with pytest.raises(recipe.RecipeError, match=r"a merged update takes 2\.3 kB of memory, 1kB allowed"):
        recipe.plan(text + "memory: 1kB\n")
    with pytest.raises(recipe.RecipeError, match="rank, of a merge of adapters alone, must be a whole number"):
        recipe.plan(text + "rank: 0\n")
    lora(tmp_path / "more", 2, tensors={"base_model.model.model.norm.weight": np.ones(8, np.float32)})
    with pytest.raises(recipe.RecipeError, match="as a whole, which is no update; merge model\\+adapter instead"):
        recipe.plan(text.replace("/two", "/more"))


def test_mistakes_with_adapters_name_their_lines(models, tmp_path):
    lora(tmp_path / "one", 0)
    lora(tmp_path / "two", 1, rank=3)
    (tmp_path / "two/adapter_config.json").write_text('{"r": 3}')
    wide = {
        f"base_model.model.{MODULES[0]}.lora_{n}.weight": np.ones(s, np.float32) for n, s in {"A": (2, 9), "B": (8, 2)}.items()
    }
    lora(tmp_path / "wide", 2, modules=[], tensors=wide)
    base, one, two, wide = f"{models}/base", *(str(tmp_path / n) for n in ("one", "two", "wide"))
    form = "merge_method: linear\nmodels:\n  - model: {}\n  - model: {}\nparameters: {{weight: 1}}\n"
    recipe.plan(form.format(f"{base} + {one}", base))  # as people write sums
    for first, second, message in (
        (base, f"{one}+{base}", "recipe:4:12: one is an adapter; write base\\+one\\."),
        (base, f"{base}+{models}/a", "recipe:4:12: a is no adapter \\(LoRA\\); write model\\+adapter\\."),
        (base, f"{base}+{two}", "recipe:4:12: two has no adapter_config.json with lora_alpha, which scales its updates"),
        (one, two, "recipe:4:12: two has no adapter_config.json with lora_alpha, which scales its updates"),
        (base, f"{base}+{wide}", "recipe:4:12: wide updates .* as .8, 9., base has .8, 8.; name the model it was trained on"),
        (one, wide, "recipe:4:12: wide updates .* as .8, 9., another adapter as .8, 8.; merge adapters of one model"),
    ):
        with pytest.raises(recipe.RecipeError, match=message):
            recipe.plan(form.format(first, second))
    lines = form.partition("  - model")[0] + "  - model: {}\n"
    lines += "  - model:\n      lora:\n        revision: null\n        path: {}\n      model: {}\n"
    for model, adapter, message in (
        (base, f"{models}/a", "recipe:7:15: a is no adapter"),
        (base, wide, "recipe:7:15: wide updates"),
        (base, f"{tmp_path}/none", "recipe:7:15: there is nothing at"),
        (f"{tmp_path}/none", one, "recipe:8:14: there is nothing at"),
    ):
        with pytest.raises(recipe.RecipeError, match=message):
            recipe.plan(lines.format(base, adapter, model) + "parameters: {weight: 1}\n")
    [plan] = recipe.plan(form.format(base, f"{base}+{one}") + "rank: 2\n")
    assert [note.text for note in plan.notes] == ["rank has no effect: it is of a merge of adapters alone."]


def test_extraction_keeps_what_it_says(models, tmp_path, capsys):
    """Of a change of rank 2 all; of one of full rank no more is lost than the bound says, at the smallest rank that does it."""
    lora(tmp_path / "one", 0)
    base, low = checkpoint.open(models / "base"), None
    low = adapted(base, checkpoint.open(tmp_path / "one"))
    tensors, _, found = recipe.extract(low, base, rank=4)
    assert len(tensors) == 16 and max(found.errors.values()) < 1e-5 and not found.left
    _, _, found = recipe.extract(low, base, rank=4, error=1e-4)
    assert set(found.ranks.values()) == {2}
    full = checkpoint.open(models / "a")
    _, _, found = recipe.extract(full, base, rank=8, error=0.3)
    for n, k in found.ranks.items():
        s = np.linalg.svd(full.read(n) - base.read(n), compute_uv=False)
        lost = np.sqrt(np.cumsum(s[::-1] ** 2)[::-1] / np.sum(s**2))  # of what is left from each rank on
        np.testing.assert_allclose(found.errors[n], lost[k] if k < len(s) else 0, atol=1e-4)
        assert found.errors[n] <= 0.3 and (k == 1 or lost[k - 1] > 0.3)
    for wrong, message in (
        (dict(rank=0), "rank must be 1 or more"),
        (dict(error=-0.1), "error at least 0 and below 1; got 32 and -0.1"),
        (dict(include="("), r"include: '\(' is no regular expression"),
        (dict(include="nowhere"), "none of those that changed is a matrix whose name is included"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe.extract(full, base, **wrong)
    with pytest.raises(ValueError, match="nothing changed"):
        recipe.extract(base, base)
    assert "lm_head.weight" in found.left and "model.norm.weight" in found.left
    assert cli.main(["extract", str(models / "a"), str(models / "base"), str(tmp_path / "out"), "--rank", "8"]) == 0
    printed = capsys.readouterr().out
    assert "of rank 8 to 8" in printed and "left behind: lm_head.weight" in printed
    back = adapted(base, checkpoint.open(tmp_path / "out"))
    n = "model.layers.2.mlp.up_proj.weight"
    np.testing.assert_allclose(back.read(n), full.read(n), atol=1e-6)


@pytest.mark.parametrize(
    ("recipe_text", "message"),
    [
        ("merge_method: linear\nmodels: [{model: MODELS/a+HERE/none}, {model: MODELS/b}]\n", "there is nothing at"),
        (
            "merge_method: linear\nmodels: [{model: MODELS/a}, {model: HERE/one}]\n",
            "is an adapter and not a model; .* model\\+adapter",
        ),
        ("merge_method: karcher\nmodels: [{model: HERE/one}, {model: HERE/one}]\n", "listed twice in a slice"),
        ("merge_method: linear\nmodels: [{model: MODELS/words0+HERE/one}]\n", "does not fit .* model it was trained on"),
        ("merge_method: linear\nmodels: [{model: MODELS/a+HERE/one+HERE/one}]\n", "is not model\\+adapter"),
        ("merge_method: linear\nmodels: [{model: MODELS/a+HERE/dora}]\n", "is a DoRA adapter"),
    ],
)
def test_mistakes_with_adapters(models, tmp_path, recipe_text, message):
    lora(tmp_path / "one", 0)
    lora(tmp_path / "dora", 0, use_dora=True)
    text = recipe_text.replace("MODELS", str(models)).replace("HERE", str(tmp_path))
    if "linear" in text:
        text += "parameters: {weight: 1}\n"
    with pytest.raises(recipe.RecipeError, match=message):
        recipe.plan(text)
