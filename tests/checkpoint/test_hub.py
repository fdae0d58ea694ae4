"""Models by their names on the Hub: read at a commit by ranges, the token shown to it alone, the cache first, refusals."""

import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmerge import checkpoint, cli, params, recipe
from jaxmerge.checkpoint import _access, _http, _hub, _ranges
from tests.checkpoint.hub import FIRST, SECOND, serving
from tests.rounding import assert_within, entrywise

LINEAR = "merge_method: linear\nmodels: [{model: org/a}, {model: org/b}]\nparameters: {weight: 1}\n"


@pytest.fixture
def hub(models, tmp_path, monkeypatch):
    """Two commits of a and of b (whose tensors lie in two files), an adapter, a gated and a private model."""
    paths, trees = models
    root, rng = tmp_path / "served", np.random.default_rng(0)
    for commit, pair in ((FIRST, "ab"), (SECOND, "ba")):
        for name, whose in zip("ab", pair, strict=True):
            shutil.copytree(paths[whose], root / commit / "org" / name)
    for name in ("gated", "private"):
        shutil.copytree(paths["a"], root / FIRST / "org" / name)
    (root / FIRST / "org/a/config.json").write_text('{"model_type": "llama"}')
    (root / FIRST / "org/a/README.md").write_text("---\nlicense: mit\n---\n")
    b, names = root / FIRST / "org/b", sorted(trees["b"])
    (b / "model.safetensors").unlink()
    for i, part in enumerate((names[:3], names[3:]), 1):
        save_file({n: trees["b"][n] for n in part}, b / f"model-{i:05d}-of-00002.safetensors")
    where = {n: f"model-{1 + (n in names[3:]):05d}-of-00002.safetensors" for n in names}
    (b / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    lora = root / FIRST / "org/lora"
    lora.mkdir()
    (root / FIRST / "org/llama").mkdir()
    save_file({"model.layers.0.w.weight": trees["a"]["model.layers.0.w"]}, root / FIRST / "org/llama/model.safetensors")
    factors = {"A": rng.standard_normal((2, 96)), "B": rng.standard_normal((128, 2))}
    save_file(
        {f"model.layers.0.w.lora_{n}.weight": v.astype(np.float32) for n, v in factors.items()},
        lora / "adapter_model.safetensors",
    )
    (lora / "adapter_config.json").write_text('{"lora_alpha": 2, "r": 2}')
    with serving(root) as (url, kind, store):
        monkeypatch.setattr(_http, "PAUSE", 0.001)
        monkeypatch.chdir(tmp_path)
        for name, value in {
            "HF_ENDPOINT": url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": "good",
            "HF_HUB_OFFLINE": "0",
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_HUB_CACHE", raising=False)
        yield url, kind, store


def cache(commit: str, source: pathlib.Path, name: str = "a") -> pathlib.Path:
    """Put a model into the cache of the Hub's client, as main."""
    folder = _access.cache() / f"models--org--{name}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(commit)
    return pathlib.Path(shutil.copytree(source, folder / "snapshots" / commit))


def test_a_merge_of_names(models, hub, tmp_path, capsys):
    """As of local parents; the card and the receipt name the commits, and headers alone are read to plan it."""
    (url, kind, store), (paths, _) = hub, models
    (tmp_path / "r.yml").write_text(LINEAR)
    assert cli.main(["plan", "r.yml"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"note: org/a is read from {url}, at commit {FIRST}" in printed and "nothing speaks against" in printed
    assert store.sent < 0.1 * (paths["a"] / "model.safetensors").stat().st_size
    assert cli.main(["merge", "r.yml", "out"]) == 0
    checkpoint.merge(params.linear(), None, [paths["a"], paths["b"]], tmp_path / "want")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "want/model.safetensors").read_bytes()
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "llama"
    card = (tmp_path / "out/README.md").read_text()
    assert f"| {FIRST} | mit |" in card and "[org/a](https://huggingface.co/org/a)" in card
    parents = checkpoint.receipt(tmp_path / "out")["models"]
    assert [p["name"] for p in parents] == ["org/a", "org/b"]
    assert sorted(parents[0]["files"]) == [f"{url}/org/a/resolve/{FIRST}/model.safetensors"]
    assert all(f.startswith(f"{url}/org/b/resolve/{FIRST}/model-0000") for f in parents[1]["files"])
    assert {p.partition("/revision/")[2] for p, _, _ in kind.asked if "/api/" in p} == {"main", FIRST}
    kind.refs["main"] = SECOND  # it goes on being trained: the receipt says what was merged
    _hub.resolve.cache_clear()
    assert cli.main(["verify", "out"]) == 0, capsys.readouterr()


def test_one_method_and_a_revision(models, hub, tmp_path):
    """`checkpoint.open`, and with it every command, knows names; a revision may have a slash; a model may have moved."""
    (url, _, store), (_, trees) = hub, models
    source = checkpoint.open("org/a@refs/pr/1")
    assert source.name == "a" and str(source.path) == f"{url}/org/a/resolve/{SECOND}"
    np.testing.assert_array_equal(source.read("big"), trees["b"]["big"])
    before = store.sent
    np.testing.assert_array_equal(source.read("big", (slice(3, 4), slice(10, 90))), trees["b"]["big"][3:4, 10:90])
    assert store.sent - before == 160  # bfloat16: no byte beyond
    assert str(checkpoint.open("old/name").path) == f"{url}/org/a/resolve/{FIRST}"
    assert cli.main(["merge", "linear", "--models", "org/a", f"org/b@{FIRST}", "--out", str(tmp_path / "out")]) == 0
    want = params.merge(params.linear(), None, [{"odd": trees[n]["odd"]} for n in "ab"])["odd"]
    np.testing.assert_allclose(load_file(tmp_path / "out/model.safetensors")["odd"], want, rtol=1e-6)


def test_an_adapter_on_a_model(hub):
    text = "merge_method: passthrough\nmodels: [{model: org/llama+org/lora}]\n"
    [plan] = recipe.plan(text)
    assert [n.text.split()[0] for n in plan.notes] == ["org/llama", "org/lora"]
    a, f = checkpoint.open("org/llama").read("model.layers.0.w.weight"), checkpoint.open("org/lora")
    change = f.read("model.layers.0.w.lora_B.weight") @ f.read("model.layers.0.w.lora_A.weight")
    [source] = plan.work.models
    np.testing.assert_array_equal(source.read("model.layers.0.w.weight"), (a.astype(np.float32) + change).astype(a.dtype))


def test_the_token_is_shown_to_the_hub_alone(hub, monkeypatch):
    _, kind, store = hub
    checkpoint.open("org/private").read("odd")
    assert {shown for _, shown, _ in kind.asked} == {"Bearer good"} and {shown for _, shown, _ in store.asked} == {None}
    kind.asked.clear()
    checkpoint.open("old/name")  # a move within the Hub keeps it
    assert {shown for _, shown, _ in kind.asked} == {"Bearer good"}
    monkeypatch.delenv("HF_TOKEN")
    (_access.home()).mkdir()
    (_access.home() / "token").write_text("good\n")  # as `hf auth login` leaves it
    assert _access.token() == "good"
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    assert _access.token() is None


def test_few_questions_and_patience(hub, monkeypatch):
    """The Hub says once where a file lies; when that has run out it is asked again; it may ask for time."""
    _, kind, store = hub
    source = checkpoint.open("org/a")
    resolves = lambda: sum(p.endswith(".safetensors") for p, _, _ in kind.asked)
    for i in range(5):
        source.read("big", (slice(i, i + 1),))
    assert resolves() == 1
    store.expired = 1
    source.read("big", (slice(5, 6),))
    assert resolves() == 2 and store.expired == 0
    kind.slow = 2
    checkpoint.open("org/b@main").read("odd")
    assert kind.slow == 0
    wanted = lambda **headers: _http._wanted({k.replace("_", "-"): v for k, v in headers.items()})
    assert (wanted(RateLimit='"api";r=0;t=55'), wanted(Retry_After="7"), wanted(Retry_After="99999"), wanted()) == (
        55,
        7,
        300,
        0,
    )


def test_the_cache_comes_first(models, hub, monkeypatch, capsys, tmp_path):
    """Where it has all weights; `@commit` too; offline what is there is all there is."""
    (url, kind, _), (paths, trees) = hub, models
    snapshot = cache(SECOND, paths["c"])
    for name in ("org/a", f"org/a@{SECOND}", "org/a@main"):
        assert str(checkpoint.open(name).path) == str(snapshot)
    assert not kind.asked
    [plan] = recipe.plan(LINEAR)
    assert plan.notes[0].text == f"org/a is read in the cache {_access.cache()}, at commit {SECOND}"
    file = snapshot / "model.safetensors"
    file.rename(snapshot / "model-00001-of-00002.safetensors")  # the rest has not come yet
    assert str(checkpoint.open("org/a").path) == f"{url}/org/a/resolve/{FIRST}"
    where = {n: "model-00001-of-00002.safetensors" for n in trees["c"]} | {"more": "model-00002-of-00002.safetensors"}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert not _hub.whole(snapshot)
    (snapshot / "model.safetensors.index.json").write_text("[]")
    assert not _hub.whole(snapshot)
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = len(kind.asked)
    with pytest.raises(ValueError, match="lacks 1 of the 2 files"):
        checkpoint.open("org/a")
    with pytest.raises(
        FileNotFoundError, match=r"HF_HUB_OFFLINE keeps us from asking; unset it, or .* hf download org/b --revision v1"
    ):
        checkpoint.open("org/b@v1")
    with pytest.raises(OSError, match="is not read: HF_HUB_OFFLINE is set"):
        checkpoint.open(f"{url}/org/b/resolve/main")
    assert len(kind.asked) == asked


REFUSALS = [
    (
        "org/nothing",
        "",
        r"'org/nothing' is no path here; http://localhost:\d+ shows no model org/nothing \(401\): .* set HF_TOKEN",
    ),
    ("org/nothing", "good", r"shows no model org/nothing .* the token that is used does not open it"),
    ("org/private", "bad", "shows no model org/private"),
    ("org/a@v7", "", r"org/a has no revision 'v7'; name a branch, a tag or a commit that http://localhost:\d+/org/a has"),
    ("org/gated", "", r"org/gated is gated: ask for access at http://localhost:\d+/org/gated; then set HF_TOKEN"),
    ("org/gated", "bad", "org/gated is gated: .* the account whose token is used has none yet"),
    ("runs/math", "", r"'runs/math' is no path here \(did you mean 'runs/math2'\?\)"),
]


def test_refusals(hub, monkeypatch, tmp_path, capsys):
    (tmp_path / "runs/math2").mkdir(parents=True)
    for name, token, message in REFUSALS:
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(recipe.RecipeError, match=message) as error:
            recipe.plan(LINEAR.replace("org/b", f'"{name}"'))
        assert len(str(error.value).splitlines()) == 2  # the first says how many there are
        assert cli.main(["inspect", name]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_out_of_reach(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://localhost:9")
    with pytest.raises(OSError, match=r"'org/a' is no path here, and the Hub is out of reach: .*refused.* hf download org/a"):
        checkpoint.open("org/a")
    monkeypatch.setattr(_http, "whole", lambda url, timeout: b"<html>")
    with pytest.raises(OSError, match="does not answer as the Hub does; look at HF_ENDPOINT"):
        checkpoint.open("org/a")


@pytest.mark.parametrize("rest", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_merge_that_was_cut_off_reads_the_same_commit(models, hub, tmp_path, monkeypatch, capsys, rest):  # noqa: PLR0917
    """Although the branch has moved on: by ranges and from the cache, by recipe, by method and by call, on devices, in a
    bucket, dequantised. Where a commit is gone, or which is which is not known, it says so."""
    (_, kind, _), (paths, _) = hub, models
    checkpoint.merge(params.linear(), None, [paths["a"], paths["b"]], tmp_path / "want")
    want = checkpoint.open(tmp_path / "want")
    monkeypatch.setattr(_ranges, "CHECKPOINT", 1)

    def stop(p):
        if p.done > 1e5:
            raise KeyboardInterrupt

    def cut(begin):
        """Killed at FIRST; then the branch moves."""
        for known in (_hub.resolve, _hub.listing):
            known.cache_clear()
        kind.refs["main"] = FIRST
        with pytest.raises(KeyboardInterrupt):
            begin(stop)
        kind.refs["main"] = SECOND
        _hub.resolve.cache_clear()

    def merges(out, **options):
        def run(tell):
            return checkpoint.merge(params.linear(), None, ["org/a", "org/b"], out, on_progress=tell, **options)

        return run

    def by_method(out, *flags):
        def run(tell):
            plain = checkpoint.merge
            with monkeypatch.context() as patch:
                patch.setattr(checkpoint, "merge", lambda *a, **k: plain(*a, **k | {"on_progress": tell}))
                code = cli.main(["merge", "linear", "--models", "org/a", "org/b", "--out", str(out), *flags])
            if code == 130:
                raise KeyboardInterrupt
            assert code == 0

        return run

    devices: dict[str, Any] = {"format": "orbax", "on_devices": True, "memory": 10**5}
    cases = {
        "recipe": lambda out: lambda tell: recipe.merge(LINEAR, out, on_progress=lambda name, p: tell(p)),
        "call": merges,
        "devices": lambda out: merges(out, **devices),
        "method": by_method,
        "numbers": lambda out: by_method(out, "--dequantize"),
    }
    for name in cases.keys() - {"recipe", "method"} if rest else ("recipe", "method"):
        case = cases[name]
        out = tmp_path / name
        cut(case(out))
        assert (tmp_path / f"{name}.merging").exists(), name
        case(out)(lambda p: None)
        parents = checkpoint.receipt(out)["models"]
        assert {_hub.at(f).commit for p in parents for f in p["files"]} == {FIRST}, name
        got = checkpoint.open(out)
        assert all((got.read(n) == want.read(n)).all() for n in want.leaves), name
    if rest:
        cut(merges(f"file://{tmp_path}/bucket", **devices))
        merges(f"file://{tmp_path}/bucket", **devices)(lambda p: None)
        assert (checkpoint.open(tmp_path / "bucket").read("big") == want.read("big")).all()
        snapshot = cache(FIRST, paths["a"])
        cut(cases["call"](tmp_path / "cached"))
        (snapshot.parents[1] / "refs/main").write_text(SECOND)
        shutil.copytree(paths["c"], snapshot.parent / SECOND)
        cases["call"](tmp_path / "cached")(lambda p: None)
        assert str(snapshot / "model.safetensors") in checkpoint.receipt(tmp_path / "cached")["models"][0]["files"]
        return

    two = LINEAR.replace("{model: org/b}", "{model: org/a@refs/pr/1}")
    two_at = lambda tell: recipe.merge(two, tmp_path / "two", on_progress=lambda name, p: tell(p))
    cut(two_at)
    with pytest.raises(
        checkpoint.MergeError, match=r"org/a, org/a@refs/pr/1 were read at 1+, 2+, .* write commits; .*--no-resume"
    ):
        two_at(lambda p: None)
    [(done, _)] = recipe.merge(two, tmp_path / "two", resume=False)
    assert {_hub.at(s.files[0]).commit for s in done.headers.inputs} == {SECOND}
    cut(cases["method"](tmp_path / "gone"))
    shutil.rmtree(tmp_path / "served" / FIRST / "org/a")
    _hub.listing.cache_clear()
    with pytest.raises(AssertionError):
        cases["method"](tmp_path / "gone")(lambda p: None)
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"was cut off that read org/a@{FIRST}, and that cannot be read any more" in said and "--no-resume" in said


def save_orbax(folder, tree, ocdbt=True):
    """As older programs save it; what it holds."""
    import orbax.checkpoint as older

    older.Checkpointer(older.PyTreeCheckpointHandler(use_ocdbt=ocdbt)).save(folder.absolute(), tree)
    found = checkpoint.open(folder)
    return {n: found.read(n) for n in found.leaves}


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
@pytest.mark.parametrize("ocdbt", [True, False])
def test_orbax(models, hub, tmp_path, monkeypatch, ocdbt):
    """By ranges at one commit, through any mix with safetensors; large files lie on another host, which sees no token."""
    (url, kind, store), (_, trees) = hub, models
    here = save_orbax(tmp_path / "served" / FIRST / "org/orbax", trees["c"], ocdbt)
    source = checkpoint.open("org/orbax")
    assert source.format == "orbax" and source.name == "orbax"
    assert str(source.path) == f"{url}/org/orbax/resolve/{FIRST}"
    before = store.sent
    for n, value in here.items():
        np.testing.assert_array_equal(source.read(n), value, err_msg=n)
    assert {shown for _, shown, _ in store.asked} <= {None} and {shown for _, shown, _ in kind.asked} == {"Bearer good"}
    assert store.sent - before <= 1.1 * sum(v.nbytes for v in here.values())
    asked = len(kind.asked) + len(store.asked)
    source.read("big", (slice(3, 5), slice(10, 90)))
    assert len(kind.asked) + len(store.asked) - asked <= 2
    recipe.merge(LINEAR.replace("org/b", "org/orbax") + "format: safetensors\n", tmp_path / "out")
    want = params.merge(params.linear(), None, [trees["a"], trees["c"]])
    for n, value in load_file(tmp_path / "out/model.safetensors").items():
        bound = entrywise([trees[m][n] for m in "ac"], 4) + 2.0**-8 * np.abs(np.asarray(want[n], np.float32))  # one bfloat16
        assert_within(np.asarray(value, np.float32), np.asarray(want[n], np.float32), bound, n)
    files = checkpoint.receipt(tmp_path / "out")["models"][1]["files"]
    assert f"{url}/org/orbax/resolve/{FIRST}/_METADATA" in files
    assert not recipe.verify(tmp_path / "out").problems
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    np.testing.assert_array_equal(source.load({"big": sharding})["big"], here["big"])


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_orbax_that_cannot_be_read(models, hub, tmp_path, monkeypatch):
    """A failure is told in words that show no token; what lies in the cache must be whole, which the Hub says."""
    (url, _, store), (_, trees) = hub, models
    folder = tmp_path / "served" / FIRST / "org/orbax"
    here = save_orbax(folder, {"big": trees["c"]["big"]})
    source = checkpoint.open("org/orbax")
    store.expired = 10**6
    _http._MOVED.clear()
    with pytest.raises(OSError, match=r"shows no model org/orbax \(403\): .* the token that is used does not open it") as error:
        source.read("big")
    assert "good" not in str(error.value)
    store.expired = 0
    np.testing.assert_array_equal(source.read("big"), here["big"])
    snapshot = cache(FIRST, folder, "orbax")
    assert str(checkpoint.open("org/orbax").path) == str(snapshot)
    lost = next(p for p in snapshot.rglob("d/*"))
    lost.rename(tmp_path / "lost")
    assert str(checkpoint.open("org/orbax").path).startswith(url)
    (tmp_path / "lost").rename(lost)
    _hub.listing.cache_clear()
    monkeypatch.setenv("HF_ENDPOINT", "http://localhost:9")
    with pytest.raises(OSError, match=r"has all files of org/orbax is for the Hub to say, .* set HF_HUB_OFFLINE=1"):
        checkpoint.open("org/orbax")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    np.testing.assert_array_equal(checkpoint.open("org/orbax").read("big"), here["big"])


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_folders_of_a_model(models, hub, tmp_path, monkeypatch, capsys):
    """Checkpoints however deep in a model, by the folder's name after the model's; where none is, it is said where some are."""
    (url, _, _), (paths, trees) = hub, models
    runs = tmp_path / "served" / FIRST / "org/runs"
    shutil.copytree(paths["a"], runs / "hf/exported")
    here = save_orbax(runs / "math/late/items", trees["c"])
    shutil.copytree(tmp_path / "served" / FIRST, tmp_path / "served" / SECOND, dirs_exist_ok=True)
    for name, commit in (
        ("org/runs/math/late/items", FIRST),
        ("org/runs/math/late", FIRST),  # a tree one below is found
        ("org/runs/math/late@refs/pr/1", SECOND),
        ("hf://org/runs/math/late/items", FIRST),
        (f"hf://org/runs@{SECOND}/math/late/items", SECOND),
        ("hf://org/runs@refs/pr/1/math/late/items", SECOND),
    ):
        source = checkpoint.open(name)
        assert str(source.path).startswith(f"{url}/org/runs/resolve/{commit}/math/late"), name
    np.testing.assert_array_equal(source.read("big"), here["big"])
    for name in ("org/runs/hf/exported", "hf://org/runs/hf/exported/model.safetensors"):
        assert set(checkpoint.open(name).leaves) == set(trees["a"]), name
    for name, message in (
        ("org/runs", r"holds no checkpoint itself, there are hf/exported, math/late/items in it; name one of them"),
        ("org/runs/math", r"org/runs/resolve/1+/math holds no checkpoint itself, there are late/items in it"),
        (
            "org/runs/maths",
            r"org/runs has no maths on the Hub; its checkpoints are org/runs/hf/exported, org/runs/math/late/items",
        ),
        ("org/nothing/x", r"'org/nothing/x' is no path here; .* shows no model org/nothing \(401\)"),
        (str(runs), r"holds no checkpoint itself, there are hf/exported, math/late/items in it"),
    ):
        with pytest.raises((OSError, ValueError), match=message):
            checkpoint.open(name)
    (tmp_path / "org/runs/math").mkdir(parents=True)  # folders of that name here: what is meant must be said
    with pytest.raises(FileNotFoundError, match=r"org is a folder here; of a model on the Hub write hf://org/runs/math/late"):
        checkpoint.open("org/runs/math/late")
    one, two = "hf://org/runs/hf/exported", "hf://org/runs@main/math/late/items"
    text = f'merge_method: linear\nmodels: [{{model: "{one}"}}, {{model: "{two}"}}]\nparameters: {{weight: 1}}\n'
    [(plan, _)] = recipe.merge(text + "format: safetensors\n", tmp_path / "out")
    assert f"org/runs is read from {url}, at commit {FIRST}" in {note.text for note in plan.notes}
    card = (tmp_path / "out/README.md").read_text()
    assert "base_model:\n- org/runs\n" in card and "](https://huggingface.co/org/runs)" in card
    assert not recipe.verify(tmp_path / "out").problems
    snapshot = cache(FIRST, runs, "runs")
    assert str(checkpoint.open(two).path) == str(snapshot / "math/late/items")
    (snapshot / "hf/exported/model.safetensors").unlink()
    assert str(checkpoint.open(one).path).startswith(url)
    assert cli.main(["inspect", one]) == 0 and "exported" in capsys.readouterr().out
