"""Merges that look at data beside the models, as recipes and at the command line: Fisher information, Gram matrices."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmerge import checkpoint, cli, params, recipe
from jaxmerge.recipe._layouts import to_hub
from scripts.bench import mergekit_cases as cases
from tests.recipe.test_layouts import MODELS, drawn
from tests.rounding import EPS, assert_within, backward, entrywise

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
    assert again.bytes_read == report.headers.bytes_read and again.peak_bytes == report.headers.peak_bytes < 1_000_000  # small


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


# --- layouts and vocabularies ----------------------------------------------------------------------------------------


def at(folder, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: np.ascontiguousarray(x) for n, x in tensors.items()}, folder / "model.safetensors")
    return checkpoint.open(folder)


def pair(method, root, first, second, more=""):
    one = "  - {{model: {0}, parameters: {{statistics: {0}-data}}}}\n".format
    return f"merge_method: {method}\nmodels:\n{one(root / first)}{one(root / second)}{more}"


def square(n, seed):
    """A Gram matrix."""
    x = np.random.default_rng(seed).standard_normal((2 * n, n)).astype(np.float32)
    return x.T @ x


def read(source):
    return {n: source.read(n) for n in source.leaves}


@pytest.mark.parametrize("layout", ["maxtext_llama", "maxtext_llama_stacked", "gemma3"])
def test_information_is_turned_with_its_model(tmp_path, layout):
    """A turn is linear, entry by entry: weights times s, gradients over s, information over s^2. Merges in either layout are
    one model, where nothing but the information weighs (no norms, no floor)."""
    weights = {m: drawn(MODELS[layout], seed) for seed, m in enumerate("ab")}
    info = {m: {n: x**2 + np.float32(0.1) for n, x in drawn(MODELS[layout], seed).items()} for seed, m in enumerate("cd")}
    ones = to_hub(at(tmp_path / "ones", {n: np.ones(s, np.float32) for n, s in MODELS[layout].items()}), layout)
    hub = lambda name, tensors: read(to_hub(at(tmp_path / name, tensors), layout))
    turned = [{n: f / ones.read(n) ** 3 for n, f in hub(f"{m}-turned", info[m]).items()} for m in "cd"]
    trees = [hub(m, weights[m]) for m in "ab"]
    at(tmp_path / "a-data", info["c"])
    at(tmp_path / "hub", trees[1])
    at(tmp_path / "hub-data", turned[1])
    plain = "parameters: {normalize: false, floor: 0}\n"
    [there] = recipe.plan(pair("fisher", tmp_path, "a", "hub", plain))
    [here] = recipe.plan(pair("fisher", tmp_path, "a", "hub", plain + "layout: hf\n"))
    for got, want in zip(here.work.statistics, turned, strict=True):
        for n, f in want.items():  # of a query: a power of the size of a head, rounded, and a product; here three of each
            np.testing.assert_allclose(got.read(n), f, rtol=8 * EPS, err_msg=n)
    for n, f in read(there.work.statistics[1]).items():
        np.testing.assert_allclose(f, info["d"][n], rtol=8 * EPS, err_msg=n)
    recipe.merge(pair("fisher", tmp_path, "a", "hub", plain), tmp_path / "there")
    back = to_hub(checkpoint.open(tmp_path / "there"), layout)
    for n in trees[0]:
        f = [t[n].astype(np.float64) for t in turned]
        want = (trees[0][n] * f[0] + trees[1][n] * f[1]) / (f[0] + f[1])
        assert_within(back.read(n), want, entrywise([t[n] for t in trees], 16), n)  # turns, products, sums, a quotient
    assert not recipe.verify(tmp_path / "there").problems


@pytest.mark.slow
def test_gram_matrices_take_the_names_of_their_leaves(tmp_path):
    """Of inputs they are the same in every layout; of an array of all layers there is one for each."""
    n, f, layers = 8, 12, 3
    at_mlp, hub_mlp = "params/params/decoder/layers{}/mlp/{}/kernel", "model.layers.{}.mlp.{}.weight"
    grams = {"maxtext": {}, "maxtext_stacked": {}, "hf": {}}
    for name, theirs, k in (("wi_0", "gate_proj", n), ("wi_1", "up_proj", n), ("wo", "down_proj", f)):
        each = [square(k, i) for i in range(layers)]
        grams["maxtext"] |= {at_mlp.format(f"_{i}", name): g for i, g in enumerate(each)}
        grams["maxtext_stacked"][at_mlp.format("", name)] = np.stack(each)
        grams["hf"] |= {hub_mlp.format(i, theirs): g for i, g in enumerate(each)}
    tensors = {layout: drawn(MODELS[layout], 3) for layout in ("maxtext", "maxtext_stacked")}
    tensors["hf"] = read(to_hub(at(tmp_path / "maxtext", tensors["maxtext"]), "maxtext"))
    for layout, tree in tensors.items():
        at(tmp_path / layout, tree)
        at(tmp_path / f"{layout}-data", grams[layout])
    tensors["other"] = read(to_hub(at(tmp_path / "other", drawn(MODELS["maxtext"], 4)), "maxtext"))
    at(tmp_path / "other", tensors["other"])
    at(tmp_path / "other-data", other := {name: 2 * g for name, g in grams["hf"].items()})
    for layout in ("maxtext", "maxtext_stacked"):
        [plan] = recipe.plan(pair("regmean", tmp_path, layout, "other", "parameters: {axis: 1}\nlayout: hf\n"))
        got = read(plan.work.statistics[0])
        assert got.keys() == grams["hf"].keys() and all((got[name] == g).all() for name, g in grams["hf"].items())
    [plan] = recipe.plan(pair("regmean", tmp_path, "maxtext", "other", "parameters: {axis: 0}\n"))
    got = read(plan.work.statistics[1])
    assert got.keys() == grams["maxtext"].keys() and all((got[x] == 2 * g).all() for x, g in grams["maxtext"].items())
    recipe.merge(pair("regmean", tmp_path, "maxtext", "other", "parameters: {axis: 1}\nlayout: hf\n"), tmp_path / "out")
    run = lambda trees: params.merge(params.regmean([grams["hf"], other], axis=1), None, trees)
    both = [tensors["hf"], tensors["other"]]
    expected, bound = run(both), backward(run, both, draws=1)
    for name, value in load_file(tmp_path / "out/model.safetensors").items():
        floor = entrywise([t[name] for t in both], 4)
        assert_within(value, expected[name], np.maximum(bound[name], floor), name)
    mistakes = {
        ("maxtext", "axis: 0", "layout: hf"): "in the layout hf the inputs of .* are its axis 1, .* write axis: 1",
        ("maxtext", "axis: 1", ""): "in the layout maxtext the inputs of .* write axis: 0",
        ("maxtext_stacked", "axis: 0", ""): r"has a Gram matrix, but .*layers/mlp/\w+/kernel of the layout maxtext_stacked is "
        r"\[8, 3, 12\] and not one matrix .*; merge with layout: hf",
    }
    for (layout, axis, more), says in mistakes.items():
        with pytest.raises(recipe.RecipeError, match=says):
            recipe.plan(pair("regmean", tmp_path, layout, "other", f"parameters: {{{axis}}}\n{more}\n"))
    for data, says in (
        ({at_mlp.format("", "wo"): square(f, 0)}, r"holds 3 layers, and its Gram matrices must be \(3, n, n\)"),
        ({"layers/mlp/wo/kernel": square(f, 0)}, "layers/mlp/wo/kernel is no leaf that is merged; name each array"),
    ):
        at(tmp_path / "maxtext_stacked-data", data)
        with pytest.raises(recipe.RecipeError, match=says):
            recipe.plan(pair("regmean", tmp_path, "maxtext_stacked", "other", "parameters: {axis: 1}\nlayout: hf\n"))
    at(tmp_path / "maxtext_stacked-data", {at_mlp.format("", "wo"): np.ones((2, 2), np.float32)})
    with pytest.raises(
        recipe.RecipeError, match=r"recipe:3:\d+: .*kernel is \[2, 2\]; information of maxtext_stacked has the shape"
    ):
        recipe.plan(pair("fisher", tmp_path, "maxtext_stacked", "other", "layout: hf\n"))


def test_information_follows_the_rows_of_tokens(tmp_path):
    """As by arrays whose rows were put in order by hand; none, 0, of tokens that a model lacks, and of rows beyond them all."""
    words, width = {"a": ["x", "y", "z"], "b": ["z", "w"]}, 4
    trees, info, grams = {}, {}, {}
    for seed, (m, known) in enumerate(words.items()):
        rng = np.random.default_rng(seed)
        names = {"model.embed_tokens.weight": len(known), "lm_head.weight": len(known), "model.layers.0.w": 3}
        trees[m] = {n: rng.standard_normal((rows, width)).astype(np.float32) for n, rows in names.items()}
        info[m] = {n: rng.random(x.shape, np.float32) + np.float32(0.5) for n, x in trees[m].items()}
        grams[m] = {"lm_head.weight": square(width, seed)}
        for kind, tensors in (("", trees[m]), ("-data", info[m])):
            at(tmp_path / f"{m}{kind}", tensors)
        (tmp_path / m / "tokenizer.json").write_text(json.dumps(cases.tokenizer(known)))
    more = "tokenizer: {source: union, pad_to_multiple_of: 6}\n"
    recipe.merge(pair("fisher", tmp_path, "a", "b", more), tmp_path / "out")
    got, table = load_file(tmp_path / "out/model.safetensors"), lambda n: "layers" not in n
    data = json.loads((tmp_path / "out/tokenizer.json").read_text())
    ids = data["model"]["vocab"] | {t["content"]: t["id"] for t in data["added_tokens"]}
    alignment = params.align_vocabularies([dict(zip(w, range(9), strict=False)) for w in words.values()], ids, base=0)
    rows = {n: params.align_embeddings(alignment, [trees[m][n] for m in "ab"], size=6) for n in got if table(n)}
    models = [{n: rows[n][k] if table(n) else trees[m][n] for n in got} for k, m in enumerate("ab")]
    known = [{n: f if not table(n) else np.zeros((6, width), np.float32) for n, f in info[m].items()} for m in "ab"]
    for k, (m, tokens) in enumerate(words.items()):
        for n in filter(table, got):
            for row, token in enumerate(tokens):
                known[k][n][ids[token]] = info[m][n][row]
    expected = params.merge(params.fisher(known), None, models)
    for n, value in got.items():  # information, its share of a norm (a sum of squares), products, sums, a quotient
        assert_within(value, expected[n], entrywise([m[n] for m in models], 32), n)
    only = got["lm_head.weight"][ids["w"]] - trees["b"]["lm_head.weight"][1]
    assert np.abs(only).max() < 1e-4  # a floor of 1e-6 beside information of a half and more
    for m in "ab":
        at(tmp_path / f"{m}-data", grams[m])
    [plan] = recipe.plan(pair("regmean", tmp_path, "a", "b", more + "parameters: {axis: 1}\n"))
    np.testing.assert_array_equal(plan.work.statistics[1].read("lm_head.weight"), grams["b"]["lm_head.weight"])
    for m, known in words.items():
        at(tmp_path / f"{m}-data", {"lm_head.weight": np.eye(len(known), dtype=np.float32)})
    says = "lm_head.weight has a Gram matrix of tokens, whose order the tokenizer changes; leave it out of the statistics"
    with pytest.raises(recipe.RecipeError, match=says):
        recipe.plan(pair("regmean", tmp_path, "a", "b", more + "parameters: {axis: 0}\n"))
    at(tmp_path / "b-data", {n: x[:1] for n, x in info["b"].items()})
    with pytest.raises(recipe.RecipeError, match=r"is \[1, 4\], the table of .*b \[2, 4\]; they must have one shape"):
        recipe.plan(pair("fisher", tmp_path, "a", "b", more))
