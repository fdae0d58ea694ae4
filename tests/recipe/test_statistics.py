"""Merges that look at data beside the models, as recipes and at the command line: Fisher information, Gram matrices."""

import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmerge import checkpoint, cli, params, recipe

RNG = np.random.default_rng(0)
SHAPES: dict[str, tuple[int, ...]] = {
    f"model.layers.{i}.mlp.{n}.weight": s for i in range(3) for n, s in (("up_proj", (6, 4)), ("down_proj", (4, 6)))
}
SHAPES |= {"model.embed_tokens.weight": (9, 4), "model.norm.weight": (4,)}
draw = lambda f: {n: np.asarray(f(s), np.float32) for n, s in SHAPES.items()}
TREES = {m: draw(RNG.standard_normal) for m in "ab"}
FISHERS = {m: draw(lambda s: RNG.standard_normal(s) ** 2) for m in "ab"}
GRAMS = {
    m: {n: x.T @ x for n, s in SHAPES.items() if "mlp" in n for x in [RNG.standard_normal((20, s[1])).astype(np.float32)]}
    for m in "ab"
}
TEXT = """
merge_method: METHOD
models:
  - model: ROOT/a.safetensors
    parameters: {statistics: ROOT/KIND-a.safetensors}
  - model: ROOT/b.safetensors
    parameters: {statistics: ROOT/KIND-b.safetensors}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("statistics")
    for m in "ab":
        for kind, tensors in (("", TREES), ("fisher-", FISHERS), ("gram-", GRAMS)):
            save_file(tensors[m], root / f"{kind}{m}.safetensors")
    return root


def text(root, method, kind, more=""):
    return TEXT.replace("METHOD", method).replace("KIND", kind).replace("ROOT", str(root)) + more


def equal(got, expected):
    assert got.keys() == expected.keys()
    for n, value in expected.items():
        np.testing.assert_allclose(got[n], value, rtol=1e-5, atol=1e-6, err_msg=n)


def test_fisher(root, tmp_path):
    """A gradient of weights beside the information; receipt and card name the statistics, verify reads them."""
    words = text(root, "fisher", "fisher").replace("fisher-b.safetensors}", "fisher-b.safetensors, weight: [1, 2]}")
    [(plan, report)] = recipe.merge(words, tmp_path / "out")
    weight = {row.name: row.values["weight"] for row in plan.rows}
    tx = params.fisher([FISHERS["a"], FISHERS["b"]], weight=lambda name: weight[name])
    assert weight["model.layers.1.mlp.up_proj.weight"] == [1.0, 1.5]
    equal(load_file(tmp_path / "out/model.safetensors"), params.merge(tx, None, [TREES["a"], TREES["b"]]))
    assert report.headers.passes == 2 and [s.name for s in plan.headers.statistics] == [f"fisher-{m}.safetensors" for m in "ab"]
    assert len(recipe.verify(tmp_path / "out").leaves) == 8 and not recipe.verify(tmp_path / "out").problems
    assert "fisher-a.safetensors" in (tmp_path / "out/README.md").read_text()
    files = [f for s in checkpoint.receipt(tmp_path / "out")["statistics"] for f in s["files"]]
    assert files == [str(root / f"fisher-{m}.safetensors") for m in "ab"]
    again = recipe.plan(words, memory="1MB")[0].headers
    assert again.bytes_read == report.headers.bytes_read and again.peak_bytes < report.headers.peak_bytes


def test_regmean_and_slices(root, tmp_path):
    """Layers of a tower: each with the Gram matrix of the layer that it came from."""
    recipe.merge(text(root, "regmean", "gram", "parameters: {axis: 1}\n"), tmp_path / "out")
    expected = params.merge(params.regmean([GRAMS["a"], GRAMS["b"]], axis=1), None, [TREES["a"], TREES["b"]])
    equal(load_file(tmp_path / "out/model.safetensors"), expected)
    one = "      - {model: ROOT/M.safetensors, layer_range: [L], parameters: {statistics: ROOT/gram-M.safetensors}}\n"
    part = lambda a, b: "  - sources:\n" + one.replace("M", "a").replace("L", a) + one.replace("M", "b").replace("L", b)
    words = "merge_method: regmean\nparameters: {axis: 1}\nslices:\n" + part("0, 2", "1, 3") + part("2, 3", "0, 1")
    recipe.merge(words.replace("ROOT", str(root)), tmp_path / "tower")
    got = load_file(tmp_path / "tower/model.safetensors")
    at = "model.layers.{}.mlp.up_proj.weight".format
    for i, (j, k) in enumerate([(0, 1), (1, 2), (2, 0)]):
        pairs = [(TREES["a"][at(j)], GRAMS["a"][at(j)]), (TREES["b"][at(k)], GRAMS["b"][at(k)])]
        tx = params.regmean([{"w": g} for _, g in pairs], axis=1)
        np.testing.assert_allclose(got[at(i)], params.merge(tx, None, [{"w": w} for w, _ in pairs])["w"], rtol=1e-5, atol=1e-6)


MISTAKES = {
    "none": (lambda t: re.sub(r"\n    parameters: .*-b.*", "", t), "6:12", "needs statistics of", "write parameters"),
    "misspelt": (lambda t: t.replace("{statistics", "{statistic"), "5:18", "no parameter 'statistic'", "'statistics'"),
    "beside": (lambda t: t.replace("parameters: {statistics: ", "statistics: ").replace("}", ""), "5:5", "stands beside model",
               "under parameters"),
    "for all": (lambda t: t + "parameters: {statistics: here}\n", "8:14", "are those of one model", "of each model"),
    "a list": (lambda t: re.sub(r"(statistics: )\S*-a.safetensors", r"\1[1, 2]", t), "5:30", "the path of a checkpoint",
               "one for each"),
    "nowhere": (lambda t: t.replace("fisher-b", "fishers-b"), "7:30", "there is nothing at", "fisher-b.safetensors"),
    "the same twice": (lambda t: t.replace("fisher-b", "fisher-a"), "7:30", "each model has its own", "named as"),
    "of another kind": (lambda t: t.replace("fisher-", "gram-"), "5:30", "needs information of shape", "fisher"),
    "of other names": (lambda t: t.replace("fisher-a", "other"), "5:30", "model.nrom.weight is no leaf", "name each array"),
    "no axis": (lambda t: t.replace("method: fisher", "method: regmean"), "", "axis is missing", "under parameters"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(root, name):
    changed, where, says, advises = MISTAKES[name]
    save_file({"model.nrom.weight": np.ones(4, np.float32)}, root / "other.safetensors")
    with pytest.raises(recipe.RecipeError) as e:
        recipe.plan(changed(text(root, "fisher", "fisher")))
    lines = [line for line in str(e.value).splitlines() if says in line]
    assert lines and f"recipe:{where}" in lines[0] and advises in lines[0], str(e.value)


def test_without_effect(root):
    [plan] = recipe.plan(text(root, "linear", "fisher").replace("{statistics", "{weight: 1, statistics"))
    assert "statistics has no effect on linear." in [note.text for note in plan.notes] and not plan.headers.statistics


def test_at_the_command_line(root, tmp_path, capsys):
    paths = lambda kind: [str(root / f"{kind}{m}.safetensors") for m in "ab"]
    for method, kind, flags in (("fisher", "fisher-", ["--weight", "1", "3"]), ("regmean", "gram-", ["--axis", "1"])):
        files = ["--models", *paths(""), "--statistics", *paths(kind)]
        assert cli.main(["plan", method, *files, *flags]) == 0
        printed = capsys.readouterr().out
        assert f"{kind}a.safetensors" in printed and "looks at: data" in printed
        assert cli.main(["merge", method, *files, *flags, "--out", str(tmp_path / method)]) == 0
        assert cli.main(["verify", str(tmp_path / method)]) == 0
        assert "bit for bit" in capsys.readouterr().out
    tx = params.fisher([FISHERS["a"], FISHERS["b"]], weight=[1, 3])
    equal(load_file(tmp_path / "fisher/model.safetensors"), params.merge(tx, None, [TREES["a"], TREES["b"]]))
    assert cli.main(["merge", "fisher", "--models", *paths(""), "--out", str(tmp_path / "none")]) == 2
    assert "needs statistics of each of the 2 models; pass statistics= (--statistics)" in capsys.readouterr().err
    assert cli.main(["merge", "linear", *files, "--out", str(tmp_path / "none")]) == 2
    assert "this method looks at none" in capsys.readouterr().err and not (tmp_path / "none").exists()
