"""`jaxmerge plan|merge`: what it prints, what it writes, and one clear error with exit code 2."""

import dataclasses
import functools
import inspect
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from orbax.checkpoint import v1 as ocp

import jaxmerge
from jaxmerge import _methods, checkpoint, cli, params, recipe
from jaxmerge.recipe import _card

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    rule = checkpoint.fsdp(jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,)))
    rng = np.random.default_rng(0)
    trees = {
        n: {"w": rng.standard_normal((16, 8)).astype(np.float32), "b": np.float32(i)} for i, n in enumerate(("base", "a", "b"))
    }
    for n, t in trees.items():
        ocp.save(root / n, jax.tree.map(lambda x: jax.device_put(x, rule("", np.shape(x))), t))
    return root, trees


METHODS = {
    "linear": ("linear", ["--weight", "1", "3"], params.linear([1.0, 3.0])),
    "task-arithmetic": ("task-arithmetic", ["--scale", "0.5"], params.task_arithmetic(scale=0.5)),
    "ties": ("ties", ["--density", "0.2", "0.4", "--mesh", "data=2,fsdp=4"], params.ties([0.2, 0.4])),
    "dare-linear": ("dare-linear", ["--seed", "1"], params.dare_linear(seed=1)),
    "dare-ties": ("dare-ties", ["--seed", "1", "--mesh", "saved"], params.dare_ties(seed=1)),
    "slerp": ("slerp", ["--t", "0.3"], params.slerp(0.3)),
    "breadcrumbs-ties": ("breadcrumbs-ties", ["--density", "0.5", "0.3"], params.breadcrumbs_ties([0.5, 0.3])),
    "pcb": ("pcb", ["--density", "0.3", "--on-devices", "True"], params.pcb(0.3)),
}


@pytest.mark.parametrize("name", METHODS)
def test_merges(saved, tmp_path, capsys, name):
    (root, trees), (method, flags, tx) = saved, METHODS[name]
    base = [] if method == "slerp" else ["--base", str(root / "base")]
    command = [
        "merge",
        method,
        *base,
        "--models",
        str(root / "a"),
        str(root / "b"),
        "--out",
        str(tmp_path / "out"),
        *flags,
    ]
    assert cli.main(command) == 0, capsys.readouterr().err
    expected = params.merge(tx, trees["base"] if base else None, [trees["a"], trees["b"]])
    for n, x in ocp.load(tmp_path / "out").items():
        np.testing.assert_allclose(x, expected[n], rtol=1e-6, atol=1e-6)
    printed = capsys.readouterr().out
    assert "seconds" in printed
    if method == "ties":
        assert "20.16 %" not in printed and "19.38 %" in printed and "threshold" in printed  # int(0.2 * 129) = 25 of 129


def test_every_method_has_the_options_of_its_function():
    """Those above by running; the others have their options from the function itself, with its defaults."""
    assert METHODS.keys() <= _methods.METHODS.keys()
    for name, options in _methods.METHODS.items():
        parameters = inspect.signature(getattr(params, name.replace("-", "_"))).parameters
        parameters = {n: p for n, p in parameters.items() if n not in ("weights", "grams", "optimizer", "steps")}
        needed = {n: 7 for n, p in parameters.items() if p.default is p.empty and n != "t"} | (
            {"t": (0.5,)} if name == "nearswap" else {"axis": 1} if "axis" in parameters else {}
        )
        chosen = options(**needed)
        assert {f.name for f in dataclasses.fields(options)} == parameters.keys() - {"select", "rows"}
        for n, p in parameters.items():
            if n not in needed and n not in ("select", "rows"):
                assert getattr(chosen, n) in (p.default, (p.default,)), (name, n)
        assert isinstance(chosen.transform(), params.MergeTransform)


def test_plan(saved, capsys):
    root, _ = saved
    assert cli.main(["plan", "ties", "--base", str(root / "base"), "--models", str(root / "a"), str(root / "b")]) == 0
    printed = capsys.readouterr().out
    for part in ("base", "129", "516 B", "float32", "peak memory", "looks at: order (model)", "nothing speaks against"):
        assert part in printed, part


@pytest.mark.parametrize("kind", ["safetensors", "orbax"])
def test_a_plan_says_when_memory_does_not_suffice_and_what_does(saved, capsys, tmp_path, kind):
    root, _ = saved
    command = ["--models", str(root / "a"), str(root / "b"), "--format", kind, "--memory"]
    (tmp_path / "r.yml").write_text(
        f"merge_method: linear\nparameters: {{weight: 1}}\nmodels: [{{model: {root / 'a'}}}, {{model: {root / 'b'}}}]\n"
    )
    for how in (["linear", *command], [str(tmp_path / "r.yml"), "--format", kind, "--memory"]):
        assert cli.main(["plan", *how, "2kB"]) == 0
        printed = " ".join(capsys.readouterr().out.split())
        needs = re.search(r"memory=2kB is less than this merge needs; raise memory= \(--memory\) to (\d+MB)", printed)
        assert needs and "nothing else speaks against" in printed, printed
        assert cli.main(["plan", *how, needs[1]]) == 0
        assert "nothing speaks against" in capsys.readouterr().out


def test_a_wrong_flag_is_no_mistake_of_the_recipe(published, tmp_path, capsys):
    """Blamed is the flag, or the argument, that stands above the recipe's keys; a key by its line."""
    text = f"merge_method: linear\nparameters: {{weight: 1}}\nmodels: [{{model: {published}/a}}, {{model: {published}/b}}]\n"
    (tmp_path / "r.yml").write_text(text)
    for flags, message in (
        (["--memory", "lots"], """--memory='lots' is not a size; write bytes, or such as "2GB" or "512MiB"."""),
        (["--memory", "0"], "--memory must be above 0, got 0."),
        (["--max-shard-bytes", "big"], "--max-shard-bytes='big' is not a size"),
        (["--sharding", "fsdp:8"], "--sharding"),
    ):
        for command in (["plan", str(tmp_path / "r.yml")], ["merge", str(tmp_path / "r.yml"), str(tmp_path / "out")]):
            assert cli.main([*command, *flags]) == 2
            error = capsys.readouterr().err
            assert error.startswith(f"jaxmerge: error: {message}") and "recipe" not in error, error
    with pytest.raises(ValueError, match=r"^memory='lots' is not a size"):
        recipe.plan(text, memory="lots")
    with pytest.raises(recipe.RecipeError, match=r"recipe:4:9: memory is bytes, or such as 2GB; got 'lots'"):
        recipe.plan(f"{text}memory: lots\n")


def test_memory_on_devices_suffices_as_the_plan_says(saved):
    root, _ = saved
    plan = lambda memory: checkpoint.plan(params.linear(), None, [root / "a", root / "b"], memory=memory, on_devices=True)
    assert "memory=9 is less" in plan(9).notes[0] and not plan(10**6).notes


def test_errors_are_one_message_and_exit_code_2(saved, tmp_path, capsys):
    root, _ = saved
    models = ["--models", str(root / "a"), str(root / "b")]
    base, out = ["--base", str(root / "base")], ["--out", str(tmp_path / "out")]
    ocp.save(tmp_path / "wrong", {"w": jnp.zeros((2, 2)), "b": jnp.float32(0)})
    for command, message in (
        (["merge", "ties", *models, *out], "--base"),
        (["merge", "ties", *models, *base, *out, "--density", "2"], "density must be between 0 and 1"),
        (["merge", "ties", *models, *base, *out, "--density", "0.1", "0.2", "0.3"], "one number or one per model"),
        (["merge", "ties", *models, *base, *out, "--mesh", "fsdp=16"], "device_count=16"),
        (["merge", "ties", *models, *base, *out, "--mesh", "data=8"], "must have an axis fsdp"),
        (["merge", "ties", *models, *base, *out, "--mesh", "fsdp:8"], "not of the form"),
        (["merge", "linear", "--models", str(root / "nothing"), *out], "no checkpoint at"),
        (["merge", "linear", "--models", str(root), *out], "is not an Orbax checkpoint"),
        (["merge", "linear", *models, *out, "--weight", "nan", "1"], "got [nan, 1.0]"),
        (["merge", "linear", *models, "--out", str(root / "base")], "--overwrite"),
        (
            ["merge", "linear", "--models", str(root / "a"), str(tmp_path / "wrong"), *out],
            "shape of w: (2, 2) in wrong",
        ),
        (["plan", "linear", "--models", str(root / "a"), str(tmp_path / "wrong")], "shape of w: (2, 2) in wrong"),
        (["merge", "slerp", "--models", str(root / "a"), *out], "between two models, got 1"),
        (["merge", "linear", *models], "--out"),
        (["merge", "averag"], "'averag' is neither a recipe (a file) nor a method; `jaxmerge --help` lists the methods."),
        (["plan", "tiess"], "neither a recipe (a file) nor a method; did you mean 'ties'?"),
        (["plan", "nope.yml"], "there is no recipe at 'nope.yml'; name a YAML file"),
        (["merg", "ties"], "there is no command 'merg'; did you mean 'merge'?"),
        (["inspect", str(root / "a"), "--leaves", "("], "--leaves: '(' is no regular expression: missing )"),
        (["frobnicate"], "there is no command 'frobnicate'; there are plan, merge, "),
        (["mergekit-yaml", "r.yml", "out"], "there is no command 'mergekit-yaml'; write jaxmerge merge RECIPE.yml OUT."),
        (["merge", "r.yml", "out", "--cuda"], "--cuda is a flag of mergekit; leave it out."),
        (["merge", "r.yml", "out", "--out-shard-size=1B"], "--out-shard-size is a flag of mergekit; write --max-shard-bytes."),
        (["merge", "linear", *models, "--out", "/proc/x"], "/proc/x.merging: No such file or directory"),
        ([], "usage: jaxmerge {plan|merge} METHOD"),
    ):
        assert cli.main(command) == 2, command
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error, (command, error)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Two models and two adapters, as the Hub keeps them."""
    from safetensors.numpy import save_file

    root, rng = tmp_path_factory.mktemp("published"), np.random.default_rng(0)
    names = ["model.embed_tokens.weight", *(f"model.layers.{i}.mlp.down_proj.weight" for i in range(12))]
    for model, rows in (("a", 6), ("b", 6), ("wider", 7)):
        (root / model).mkdir()
        tensors = {n: rng.standard_normal((rows if "embed" in n else 4, 4)).astype(np.float32) for n in names}
        save_file(tensors, root / model / "model.safetensors")
        (root / model / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "float32", "of": model}))
        (root / model / "tokenizer.json").write_text(json.dumps({"of": model}))
        (root / model / "README.md").write_text("---\nlicense: mit\n---\n")
    (root / "math").mkdir()
    save_file({"lone": np.ones((4, 4), np.float32)}, root / "math" / "model.safetensors")
    for adapter in ("one", "two"):
        (root / adapter).mkdir()
        factors = {f"base_model.model.model.layers.0.mlp.down_proj.lora_{f}.weight": np.ones((4, 4), np.float32) for f in "AB"}
        save_file(factors, root / adapter / "adapter_model.safetensors")
        (root / adapter / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 4}))
    return root


def test_a_merge_by_method_can_be_loaded(published, tmp_path, capsys):
    """Configuration and tokenizer of the base, or the first model, lie beside the tensors; the dtype is the output's."""
    models = ["--models", str(published / "a"), str(published / "b")]
    assert cli.main(["merge", "linear", *models, "--out", str(tmp_path / "out"), "--out-dtype", "bfloat16"]) == 0
    assert json.loads((tmp_path / "out/config.json").read_text()) == {
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "of": "a",
    }
    assert json.loads((tmp_path / "out/tokenizer.json").read_text()) == {"of": "a"}
    assert cli.main(["verify", str(tmp_path / "out")]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("kind", ["safetensors", "orbax"])
def test_a_merge_by_method_has_a_card(published, tmp_path, kind):
    """What was merged, with which options, by which command; and what the Hub reads of it."""
    (tmp_path / "fine tuned").symlink_to(published / "b")
    parents = ["--base", str(published / "a"), "--models", str(tmp_path / "fine tuned"), str(published / "b")]
    command = ["merge", "dare-ties", *parents, "--out", str(tmp_path / "out"), "--format", kind, "--seed", "7"]
    assert cli.main([*command, "--density", "0.5", "0.25"]) == 0
    _, front, text = (tmp_path / "out/README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": [],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "jaxmerge", "dare_ties"],
        "license": "mit",
    }
    for line in (
        "# out",
        "| a (base) |  | mit |",
        "| fine tuned |  | mit |",
        f"jaxmerge {shlex.join(command)} --density 0.5 0.25",
        "density:\n- 0.5\n- 0.25",
        "rescale: inv_p",
        "Masks were drawn with seed 7; they do not depend on devices or order.",
    ):
        assert f"{line}\n" in text, line
    assert "Merged with [DARE" in text and " from a.\n" in text


def test_a_card_of_every_method(published):
    """Names on the Hub are linked, with the revision that was asked for."""
    source = checkpoint.open(published / "a")
    for method in _methods.METHODS:
        parents = [("org/name@v1", source), ("org/other", source)]
        told = {"based": False, "statistics": ["fisher/math"], "command": "jaxmerge", "title": "t"}
        card = _card.card_of_method(method, {}, parents, **told)
        assert "base_model:\n- org/name\n- org/other\n" in card and f"- {method.replace('-', '_')}\n" in card
        assert "| [org/name@v1](https://huggingface.co/org/name) | v1 | mit |" in card
        assert "statistics of the models: math." in card and "Merged with " in card, method


def test_no_output_lies_where_it_would_be_read_as_a_part_of_a_parent(saved, published, tmp_path, capsys):
    """All that lies in a checkpoint of Orbax is a part of it; in a folder of safetensors, what is called like them."""
    trees, files = tmp_path / "trees", tmp_path / "files"
    shutil.copytree(saved[0] / "a", trees)
    shutil.copytree(published / "a", files)
    (tmp_path / "link").symlink_to(trees)
    before = {p for p in tmp_path.rglob("*")}
    for parent, other, outs, message in (
        (trees, saved[0] / "b", ("trees/merged", "trees/state/merged", "link/merged"), "which is merged here and would not"),
        (files, published / "b", ("files/x.safetensors", "files/x.safetensors/y"), "would be read as a part of"),
    ):
        words = f"merge_method: linear\nparameters: {{weight: 1}}\nmodels: [{{model: {parent}}}, {{model: {other}}}]\n"
        text = tmp_path.with_suffix(f".{parent.name}.yml")
        text.write_text(words)
        for out in outs:
            for how in (["linear", "--models", str(parent), str(other), "--out"], [str(text)]):
                assert cli.main(["merge", *how, str(tmp_path / out)]) == 2
                error = capsys.readouterr().err
                assert error.startswith(f"jaxmerge: error: {tmp_path / out}") and message in error, error
    assert {p for p in tmp_path.rglob("*")} == before
    one = ["--models", str(files / "model.safetensors"), str(published / "b/model.safetensors")]
    for models, out in (
        (["--models", str(files), str(published / "b")], files / "merged"),  # no part of a folder of safetensors
        (one, files / "x.safetensors"),  # a file is no folder
    ):
        assert cli.main(["merge", "linear", *models, "--out", str(out)]) == 0, capsys.readouterr().err
        assert cli.main(["verify", str(out)]) == 0 and list(checkpoint.open(files).files) == [str(files / "model.safetensors")]


def test_what_a_method_cannot_merge_it_says_how_a_recipe_does(published, tmp_path, capsys):
    at, out = lambda *names: [str(published / n) for n in names], ["--out", str(tmp_path / "out")]
    for models, message in (
        (at("one", "two"), "one, two: of adapters (LoRA) the products are merged, not one factor with another; a recipe does"),
        ([f"{published}/a+{published}/one", *at("b")], "means a model with an adapter, which a recipe reads"),
        (at("a", "wider"), "(7, 4) in wider, (6, 4) in a; a recipe with tokenizer: {source: union} aligns vocabularies"),
        (at("a", "math"), "missing in math"),
    ):
        assert cli.main(["merge", "linear", "--models", *models, *out]) == 2
        printed = capsys.readouterr().err
        if "missing" in message:  # of many mismatches of one kind, a few
            assert printed.count("missing in math") == 7 and "  and 6 more like it\n" in printed
        else:
            assert message in printed
    assert not (tmp_path / "out").exists()


def test_where_a_shell_does_nothing(published, tmp_path, monkeypatch, capsys):
    """~ in quotes and after =, a recipe from a pipe; and 80 columns are enough."""
    monkeypatch.setenv("HOME", str(published))
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["inspect", "~/a", "~/b"]) == 0
    printed = capsys.readouterr().out
    assert "safetensors" in printed and "model.layers 12" in printed and max(map(len, printed.splitlines())) <= 80
    recipe = f"merge_method: linear\nparameters: {{weight: 1}}\nmodels: [{{model: {published}/a}}, {{model: {published}/b}}]"
    monkeypatch.setattr(sys, "stdin", io.StringIO(recipe))
    assert cli.main(["merge", "-", "--out-dtype=bfloat16", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    assert (tmp_path / "out/mergekit_config.yml").read_text().strip() == recipe
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert cli.main(["plan", "-"]) == 2 and "it is empty" in capsys.readouterr().err
    assert cli._at_home("--out=~/x") == f"--out={published}/x" and cli._at_home("gs://a/~") == "gs://a/~"


def test_it_goes_quietly_when_nobody_reads_and_when_it_is_broken_off(saved, monkeypatch, capsys, tmp_path):
    """`| head` prints no error; Ctrl-C says what comes next."""
    root, _ = saved
    code = "import sys; from jaxmerge import cli; sys.exit(cli.main(sys.argv[1:]))"
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-c", code, "inspect", str(root / "a"), "--leaves", "."]
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1 and "rror" not in done.stderr
    monkeypatch.setattr(checkpoint, "merge", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(["merge", "linear", "--models", str(root / "a"), "--out", str(tmp_path / "x")]) == 130
    assert "interrupted; a merge goes on" in capsys.readouterr().err


def test_a_process_of_its_own_ends_with_all_it_said_and_its_status(saved, tmp_path):
    """It takes nothing down when it ends; plain words it reads without tyro, as tyro would."""
    root, _ = saved
    command = [sys.executable, "-m", "jaxmerge.cli", "inspect", str(root / "a")]
    run = functools.partial(subprocess.run, stderr=subprocess.PIPE, text=True, check=False)
    code = "import sys; from jaxmerge import cli; print(cli.main(sys.argv[1:]), 'tyro' in sys.modules)"
    plain = run([sys.executable, "-c", code, *command[3:]], stdout=subprocess.PIPE)
    parsed = run([*command, "--leaves", "^$"], stdout=subprocess.PIPE)
    assert parsed.returncode == 0 and "516 B" in parsed.stdout, parsed.stderr
    assert plain.stdout == f"{parsed.stdout}0 False\n"
    reads, writes = os.pipe()
    os.close(reads)
    cut = run([*command, "--leaves", "."], stdout=writes)
    os.close(writes)
    assert cut.stderr == "" and cut.returncode in (0, 1)
    wrong = run([*command[:-1], str(tmp_path / "none")], stdout=subprocess.PIPE)
    assert (wrong.stdout, wrong.returncode) == ("", 2) and "no checkpoint at" in wrong.stderr


def test_help(capsys):
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out == f"jaxmerge {jaxmerge.__version__}\n"
    assert cli.main(["doctor", "--help"]) == 0 and "JAX_COORDINATOR_ADDRESS" in capsys.readouterr().out
    assert cli.main(["merge", "-h"]) == 0 and "RECIPE OUT" in capsys.readouterr().out
    assert cli.main(["--help"]) == 0 and "jaxmerge merge ties" in capsys.readouterr().out
    assert cli.main(["merge", "ties", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "--density" in printed and "--scope" in printed and "--models" in printed


def test_starts_without_the_heavy_rooms():
    """What a process sets for itself it sets before there is anything to be set up: numpy's threads, the collector."""
    code = """
import sys, jaxmerge.cli
print([m for m in ("jax", "numpy") if m in sys.modules])
jaxmerge.cli._settle()
print([m for m in ("orbax", "tyro", "rich", "flax") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]


def test_the_bar_is_drawn_now_and_then_and_for_a_terminal_alone(monkeypatch, capsys):
    from rich import console, progress

    from jaxmerge._commands.progress import bar

    drawn = []
    monkeypatch.setattr(
        progress.Progress, "update", lambda *a, description, completed, **k: drawn.append((description, completed))
    )
    for terminal in (True, False):
        monkeypatch.setattr(console.Console, "is_terminal", terminal)
        with bar("merging") as show:
            for seconds in (0.0, 0.05, 0.11, 0.12, 0.9, 0.02):
                show(checkpoint.Progress(1, 2, done=int(100 * seconds), total=100, seconds=seconds), "r: ")
    assert drawn == [("r: pass 1/2", done) for done in (0, 11, 90, 2)]
    assert "merging" in capsys.readouterr().out


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "mosaic_tpu" in said and "nearest_k" in said and "jaxlib" in said
    assert "not asked (HF_HUB_OFFLINE)" in said


def test_verify(saved, tmp_path, capsys):
    root, _ = saved
    out, parents = tmp_path / "out", ["--base", str(root / "base"), "--models", str(root / "a"), str(root / "b")]
    command = ["merge", "ties", *parents, "--out", str(out), "--format", "safetensors", "--density", "0.5"]
    assert cli.main(command) == 0, capsys.readouterr().err
    assert "peak memory" in capsys.readouterr().out
    assert cli.main(["verify", str(out)]) == 0 and "bit for bit:\n  b\n  w\n" in capsys.readouterr().out
    file = out / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-2] + b"\x00\x7f")
    assert cli.main(["verify", str(out)]) == 1
    assert "w: 1 of 128 entries differ, the first at flat index 127" in capsys.readouterr().out
    assert cli.main(["verify", str(root / "a")]) == 2 and "has no receipt" in capsys.readouterr().err
