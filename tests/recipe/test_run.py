"""Recipes carried out: several documents, what lies beside the tensors, the command line."""

import json

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from jaxmerge import checkpoint, cli, recipe
from scripts.bench import mergekit_cases as cases


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    cases.write(root, cases.Size())
    return root


def tensors(folder):
    return load_file(folder / "model.safetensors")


def test_documents_after_those_they_need(models, tmp_path):
    """A mean of two, and halfway from it to a third; the first document stands last in the text."""
    text = """
merge_method: slerp
base_model: first
models: [{model: first}, {model: "@c"}]
parameters: {t: 0.5}
---
name: first
merge_method: linear
models: [{model: "@a"}, {model: "@b"}]
parameters: {weight: 1}
""".replace("@", f"{models}/")
    plans = recipe.plan(text)
    assert [p.recipe.name for p in plans] == ["first", None]
    assert not (tmp_path / "out").exists()
    recipe.merge(text, tmp_path / "out")
    a, b, c, first, out = (tensors(p) for p in (*(models / n for n in "abc"), tmp_path / "out.parts/first", tmp_path / "out"))
    name = "model.layers.0.mlp.up_proj.weight"
    np.testing.assert_allclose(first[name], (a[name] + b[name]) / 2, rtol=1e-6)
    assert np.abs(out[name] - (first[name] + c[name]) / 2).max() < 0.1
    assert json.loads((tmp_path / "out/config.json").read_text())["num_hidden_layers"] == 4
    found = recipe.verify(tmp_path / "out")
    assert len(found.leaves) == 8 and not found.problems
    made = (tmp_path / "out.parts/first/model.safetensors").stat().st_mtime_ns
    recipe.merge(text, tmp_path / "out", overwrite=True)  # what is there and as it would be made is kept
    assert (tmp_path / "out.parts/first/model.safetensors").stat().st_mtime_ns == made


def test_verify_sees_another_parent(models, tmp_path, capsys):
    base = tensors(models / "base")
    save_file(base, tmp_path / "base.safetensors")
    text = cases.recipe("ties", models).replace(f"{models}/base", f"{tmp_path}/base.safetensors")
    recipe.merge(text, tmp_path / "out")
    assert cli.main(["verify", str(tmp_path / "out"), "--leaves", "39"]) == 0
    assert "is what its receipt says" in capsys.readouterr().out
    save_file(base | {"lm_head.weight": base["lm_head.weight"] + 1}, tmp_path / "base.safetensors")
    assert cli.main(["verify", str(tmp_path / "out"), "--leaves", "39"]) == 1
    printed = capsys.readouterr().out
    assert "base.safetensors" in printed and "lm_head.weight" in printed
    assert cli.main(["verify", str(models / "a")]) == 2


def test_what_lies_beside(models, tmp_path):
    text = cases.recipe("slices_stacked", models) + "dtype: bfloat16\n"
    path = tmp_path / "recipe.yml"
    path.write_text(text)
    recipe.merge(path, tmp_path / "tower")
    out = tmp_path / "tower"
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == 8 and config["torch_dtype"] == "bfloat16" and config["hidden_size"] == 8
    assert (out / "mergekit_config.yml").read_text() == text
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["tags"] == ["merge", "jaxmerge", "passthrough"] and front["base_model_relation"] == "merge"
    assert "# tower" in card and text.strip() in card and "| deep | " in card
    assert json.loads((out / "jaxmerge.json").read_text())["recipe"] == text


def test_a_card_names_the_hub_and_the_licences(models, tmp_path, monkeypatch):
    """A model in the Hub's cache, by its name; the parents' licences, where they differ."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    for org in ("one", "two"):
        folder = tmp_path / f"hub/models--{org}--llama"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs/main").write_text("abc123")
        (folder / "snapshots").mkdir()
        (folder / "snapshots/abc123").symlink_to(models / ("a" if org == "one" else "b"))
    for name, licence in (("a", "mit"), ("b", "apache-2.0")):
        (models / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n# A model\n")
    text = "merge_method: linear\nmodels: [{model: one/llama}, {model: two/llama}]\nparameters: {weight: 1}\n"
    [plan] = recipe.plan(text)
    card = plan.beside["README.md"]
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == ["one/llama", "two/llama"] and "license" not in front
    assert "[one/llama](https://huggingface.co/one/llama)" in card and "licences differ" in card
    assert "| abc123 | mit |" in card
    for name in "ab":
        (models / name / "README.md").unlink()


def test_chat_templates(models):
    text = cases.recipe("vocabulary_of_base", models)
    [plan] = recipe.plan(text)
    assert json.loads(plan.beside["tokenizer_config.json"]) == cases.TOKENIZER_CONFIG
    [plan] = recipe.plan(text + "chat_template: chatml\n")
    assert "<|im_start|>" in plan.beside["chat_template.jinja"]
    assert json.loads(plan.beside["tokenizer_config.json"])["chat_template"] == plan.beside["chat_template.jinja"]
    [plan] = recipe.plan(text + "chat_template: auto\n")
    assert plan.beside["chat_template.jinja"] == cases.TOKENIZER_CONFIG["chat_template"]
    [plan] = recipe.plan(text + 'chat_template: "{{ messages }}"\n')
    assert plan.beside["chat_template.jinja"] == "{{ messages }}"
    with pytest.raises(recipe.RecipeError, match="did you mean 'chatml'"):
        recipe.plan(text + "chat_template: chatlm\n")


def test_tied_embeddings_that_come_apart(models):
    [plan] = recipe.plan(cases.recipe("tied", models).replace("/a", "/x").replace("/tied", "/a").replace("/x", "/tied"))
    assert "lm_head.weight" in plan.headers.out
    assert json.loads(plan.beside["config.json"])["tie_word_embeddings"] is False
    assert any("head of its own" in note.text for note in plan.notes)


def test_parts_of_a_model_and_regular_expressions(models):
    """Our own conditions: embeddings and head by name of the part, tensors by regex."""
    text = """
merge_method: linear
models:
  - model: "@a"
    parameters:
      weight:
        - {part: embeddings, value: 0.25}
        - {part: head, value: 0.75}
        - {regex: 'layers\\.[01]\\.', value: [1, 0]}
        - value: 0.5
  - model: "@b"
parameters: {weight: 1, normalize: false}
""".replace("@", f"{models}/")
    [plan] = recipe.plan(text)
    weight = {row.name: row.values["weight"][0] for row in plan.rows}
    assert weight["model.embed_tokens.weight"] == 0.25 and weight["lm_head.weight"] == 0.75
    assert weight["model.layers.0.mlp.up_proj.weight"] == 1 and weight["model.layers.3.mlp.up_proj.weight"] == 0.5
    assert weight["model.layers.1.mlp.up_proj.weight"] == pytest.approx(2 / 3) and weight["model.norm.weight"] == 0.5


def test_constants_that_not_all_carry_are_left_out(models, tmp_path):
    a = tensors(models / "a")
    save_file(a | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}, tmp_path / "old.safetensors")
    text = f"merge_method: linear\nmodels: [{{model: {tmp_path}/old.safetensors}}, {{model: {models}/b}}]\n"
    [plan] = recipe.plan(text + "parameters: {weight: 1}\n")
    assert set(plan.headers.out) == set(a) and "is left out" in plan.notes[0].text


def test_settings_without_effect_are_said(models):
    text = cases.recipe("ties", models) + "parameters: {t: 0.5}\n"
    text = text.replace("weight: 0.5,", "weight: 0.5, normalize: true,")
    [plan] = recipe.plan(text)
    said = [note.text for note in plan.notes]
    assert any("t has no effect on ties" in s for s in said) and any("one value for all models" in s for s in said)


def test_no_parent_is_overwritten(models, tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
        save_file(tensors(models / name), tmp_path / name / "model.safetensors")
    text = f"merge_method: linear\nmodels: [{{model: {tmp_path}/a}}, {{model: {tmp_path}/b}}]\nparameters: {{weight: 1}}\n"
    with pytest.raises(FileExistsError, match=r"holds model\.safetensors, which is merged here"):
        recipe.merge(text, tmp_path / "b", overwrite=True)
    monkeypatch.chdir(tmp_path / "b")
    for here in (".", ".."):
        with pytest.raises(FileExistsError, match=r"holds model\.safetensors, which is merged here"):
            recipe.merge(text, here, overwrite=True)
    assert tensors(tmp_path / "b").keys() == tensors(models / "b").keys()


def test_a_window_of_a_run(tmp_path):
    """Every checkpoint whose number lies in the window, oldest first; weights as if the learning rate had decayed."""
    for step in (8, 90, 100, 110, 200):
        (tmp_path / f"run/{step}").mkdir(parents=True)
        save_file({"w": np.full(4, step, np.float32)}, tmp_path / f"run/{step}/model.safetensors")
    text = 'merge_method: window_average\nmodels: [{model: "RUN/{90..110}"}]\n'.replace("RUN", f"{tmp_path}/run")
    [plan] = recipe.plan(text)
    assert [str(m).rsplit("/", 1)[-1] for m, _ in plan.rows[0].inputs] == ["90", "100", "110"]
    recipe.merge(text, tmp_path / "out")
    np.testing.assert_allclose(tensors(tmp_path / "out")["w"], 100)  # linear is the mean
    with pytest.raises(recipe.RecipeError, match=r"no checkpoint lies in \{300\.\.400\}; there are 8 to 200"):
        recipe.plan(text.replace("{90..110}", "{300..400}"))


# --- the command line ------------------------------------------------------------------------------------------------


def test_commands(models, tmp_path, capsys):
    path = tmp_path / "recipe.yml"
    path.write_text(cases.recipe("linear_sum", models))
    assert cli.main(["plan", str(path), "--coefficients", "layers.0.mlp.down"]) == 0
    printed = capsys.readouterr().out
    assert "model.layers.0.mlp.down_proj.weight at=0 weight=[0.2, 0.9, 0.1] normalize=False" in printed
    assert f"# a value each of [{models}/a, {models}/b, {models}/c]\n" in printed
    assert "nothing speaks against this recipe" in printed and "peak memory" in printed
    assert cli.main(["merge", str(path), str(tmp_path / "out")]) == 0
    assert "B/s" in capsys.readouterr().out and (tmp_path / "out/config.json").exists()
    assert cli.main(["merge", str(path), str(tmp_path / "out")]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main(["inspect", str(models / "a"), str(tmp_path / "out"), "--by-layer", "--leaves", "norm"]) == 0
    printed = capsys.readouterr().out
    assert "model.norm.weight float32 [8]" in printed and "ratio" in printed
    assert cli.main(["inspect", str(models / "a"), str(models / "tied")]) == 0
    assert "only in a: lm_head.weight" in capsys.readouterr().out


def test_into_orbax(models, tmp_path, capsys):
    """All that lies beside safetensors lies beside a tree too; verify sees a file that is not the one that was written."""
    path, out = tmp_path / "recipe.yml", tmp_path / "out"
    path.write_text(cases.recipe("ties", models) + "format: orbax\n")
    assert cli.main(["merge", str(path), str(out)]) == 0
    cli.main(["merge", str(path), str(tmp_path / "files"), "--format", "safetensors"])
    beside = {p.name for p in (tmp_path / "files").iterdir()} - {"model.safetensors"}
    assert beside <= {p.name for p in out.iterdir()} and {"README.md", "mergekit_config.yml", "jaxmerge.json"} <= beside
    found = checkpoint.open(out)
    for n, x in tensors(tmp_path / "files").items():
        np.testing.assert_array_equal(found.read(n), x)
    assert cli.main(["verify", str(out)]) == 0
    assert "computed again, bit for bit" in capsys.readouterr().out
    data = max((p for p in out.glob("state/**/d/*") if p.is_file()), key=lambda p: p.stat().st_size)
    data.write_bytes(data.read_bytes() + b"x")
    assert cli.main(["verify", str(out)]) == 1
    assert f"{data.name} is not the file that was written" in capsys.readouterr().out
    method = ["merge", "linear", "--models", str(models / "a"), str(models / "b"), "--format", "orbax"]
    assert cli.main([*method, "--out", str(tmp_path / "apart"), "--on-devices", "True"]) == 0
    capsys.readouterr()
    assert cli.main(["verify", str(tmp_path / "apart")]) == 0
    assert "equal to rounding" in capsys.readouterr().out


def test_a_wrong_recipe_is_exit_code_2(models, tmp_path, capsys):
    path = tmp_path / "recipe.yml"
    path.write_text("merge_method: linaer\nmodels: []\n")
    assert cli.main(["plan", str(path)]) == 2
    error = capsys.readouterr().err
    assert "recipe.yml:1:15: unknown merge_method 'linaer'; did you mean 'linear'?" in error and "Traceback" not in error
    assert cli.main(["plan", str(tmp_path / "none.yml")]) == 2
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert cli.main(["merge", str(path)]) == 2


def test_distance_of_a_model_to_itself(models):
    a, b = checkpoint.open(models / "a"), checkpoint.open(models / "b")
    assert all(d.apart == 0 and d.changed == 0 for d in recipe.differences(a, a).values())
    x, y = tensors(models / "a"), tensors(models / "b")
    names = [n for n in x if n.startswith("model.layers.2.")]
    expected = np.sqrt(sum(np.sum((x[n] - y[n]).astype(np.float64) ** 2) for n in names))
    assert recipe.differences(a, b)["model.layers.2"].apart == pytest.approx(expected, rel=1e-6)
