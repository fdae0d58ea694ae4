"""Merges into safetensors: equal to merging in memory, whatever the memory; formats mixed; receipts that can be checked."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file

from jaxmerge import checkpoint, params
from jaxmerge.checkpoint import _feed, _stream
from jaxmerge.params.order import _host
from tests.checkpoint.conftest import save

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")

METHODS = {
    "linear": (params.linear([1, 2, 1]), True),
    "dare": (params.dare_linear(0.5, seed=3), True),
    "ties": (params.ties([0.2, 0.5, 1.0]), True),
    "ties_official": (params.ties([0.2, 0.3, 0.0], extra=1, ties="all", tie="majority", reduce="sum"), True),
    "ties_tensor": (params.ties(0.3, scope="tensor"), True),
    "breadcrumbs": (params.breadcrumbs(0.5, 0.1), True),
    "by name": (
        params.partition(
            {"w": params.ties(0.5, scope="tensor"), "rest": params.linear([1, 0, 0])}, lambda n: "w" if "w" in n else "rest"
        ),
        True,
    ),
    "stock": (params.model_stock(), False),
    "della": (params.della(0.5, seed=3), True),
    "della_l1": (
        params.chain(params.rescale(params.rank_mask(0.5, seed=3), "l1"), params.weigh([1, 2, 1]), params.sum_experts()),
        False,
    ),
    "trimmed della": (
        params.chain(params.rank_mask(0.5, seed=3), params.trim(0.3, scope="model"), params.sum_experts()),
        True,
    ),
    "dare_l1": (params.dare_ties(0.5, seed=3, rescale="l1"), False),
}
IN_PARTS = 3 * 10**5
"""Memory in which the large leaves do not fit while their thresholds are found."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if "della" in n or "_" in n else n for n in METHODS])
def test_equals_the_merge_in_memory(models, tmp_path, name):
    (paths, trees), (tx, exact) = models, METHODS[name]
    experts = [paths[n] for n in "abc"]
    expected = params.merge(tx, trees["base"], [trees[n] for n in "abc"])
    for memory in (None, IN_PARTS):
        seen = []
        out = tmp_path / f"out{memory}"
        report = checkpoint.merge(tx, paths["base"], experts, out, memory=memory, on_progress=seen.append)
        assert memory is None or (len(report.headers.units) > 6 or not report.headers.entire)
        assert not report.headers.entire
        got = load_file(out / "model.safetensors")
        assert got.keys() == expected.keys()
        for n, value in expected.items():
            assert got[n].dtype == value.dtype and got[n].shape == value.shape
            tolerance = {} if exact and n != "odd" else {"rtol": 2.0**-7 if n != "odd" else 1e-6, "atol": 1e-9}
            compare = np.testing.assert_array_equal if not tolerance else np.testing.assert_allclose
            compare(got[n].astype(np.float32), np.asarray(value, np.float32), err_msg=n, **tolerance)
        assert seen[-1].done == seen[-1].total and seen[-1].stage == seen[-1].stages == report.headers.passes
        assert seen[-1].rate > 0 and seen[-1].left == 0 and seen[-1].peak_bytes > 0
        checked = checkpoint.verify(out, tx, leaves=3, memory=memory)
        assert len(checked.leaves) == 3 and not checked.problems and not checked.notes
    assert {p.name for p in tmp_path.iterdir()} == {"outNone", f"out{IN_PARTS}"}
    assert sorted(p.name for p in out.iterdir()) == ["jaxmerge.json", "model.safetensors"]


def test_rooms_are_let_go_before_there_are_others(models, tmp_path, monkeypatch):
    """A leaf that is looked through first has rooms of its own: those of the units before it are not in memory beside them."""
    (paths, _), made = models, []

    class Rooms(_feed._Rooms):
        def __init__(self, size: int, most: int):
            assert not any(memory.any() for memory in made)  # pages that were given back are empty, whoever refers to them
            super().__init__(size, most)
            made.append(self._memory)

        def close(self):
            used.append(self._memory.any())
            super().close()

    used = []
    monkeypatch.setattr(_feed, "_Rooms", Rooms)
    checkpoint.merge(params.ties(0.3), paths["base"], [paths[n] for n in "abc"], tmp_path / "out", memory=IN_PARTS)
    assert len(made) > 4 and sum(used) > 4


@pytest.mark.parametrize("tx", [params.ties(0.5, scope="tensor"), params.breadcrumbs(0.3, 0.4)], ids=["ties", "breadcrumbs"])
def test_thresholds_among_lumps(tmp_path, monkeypatch, tx):
    """Differences of few magnitudes are counted where they lie: nothing is collected, and the cut is where it is in memory."""
    rng, shape = np.random.default_rng(0), (97, 501)
    trees = [{"w": (rng.integers(-8, 8, shape) / 64).astype(jnp.bfloat16)}]
    trees += [{"w": (trees[0]["w"] + rng.choice([-2, -1, 0, 1, 3], shape) / 64).astype(jnp.bfloat16)} for _ in range(3)]
    base, *experts = (save(tmp_path / str(i), tree) for i, tree in enumerate(trees))
    monkeypatch.setattr(_stream, "SAMPLED", shape[0] * shape[1])
    monkeypatch.setattr(_stream, "LOOK", 1 << 10)
    monkeypatch.setattr(_stream.programs, "SIZES", (1 << 14, 1 << 12))
    monkeypatch.setattr(_host, "_collect", None)
    checkpoint.merge(tx, base, experts, tmp_path / "out")
    expected = params.merge(tx, trees[0], trees[1:])
    np.testing.assert_array_equal(load_file(tmp_path / "out/model.safetensors")["w"], expected["w"])


def test_what_must_be_seen_whole_counts_against_memory(models, tmp_path):
    paths, _ = models
    with pytest.raises(
        checkpoint.MergeError, match=r"big: this method must see a tensor whole: .* 300 kB allowed; raise memory="
    ):
        checkpoint.merge(params.sce(), paths["base"], [paths["a"], paths["b"]], tmp_path / "out", memory="300KB")
    with pytest.raises(ValueError, match=r"memory='much' is not a size"):
        checkpoint.plan(params.linear(), None, [paths["a"]], memory="much")
    assert not list(tmp_path.iterdir())


def test_dtypes_and_files(models, tmp_path):
    paths, trees = models
    out = tmp_path / "deep" / "out"
    tx = params.linear()
    report = checkpoint.merge(tx, None, [paths["a"], paths["b"]], out, out_dtype="float16", max_shard_bytes="100KB")
    files = sorted(report.headers.layout.sizes)
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    merged = checkpoint.open(out)
    assert index["metadata"]["total_size"] == sum(leaf.bytes for leaf in merged.leaves.values())
    assert list(merged.leaves) == list(checkpoint.open(paths["a"]).leaves) and merged.metadata == {"format": "pt"}
    for file in files:
        assert (out / file).stat().st_size < 110_000 and load_file(out / file)
    for n, v in trees["a"].items():
        if n == "step":
            assert merged.leaves[n].dtype == v.dtype
            continue
        mean = (v.astype(np.float32) + trees["b"][n].astype(np.float32)) / 2
        np.testing.assert_array_equal(merged.read(n), mean.astype(np.float16))
    cast = checkpoint.plan(tx, None, [paths["a"], paths["b"]], dtype="bfloat16")
    assert {leaf.dtype for n, leaf in cast.out.items() if n != "step"} == {jnp.dtype("bfloat16")}
    with pytest.raises(checkpoint.MergeError, match="out_dtype: int8 is not a floating-point type"):
        checkpoint.merge(tx, None, [paths["a"]], out, out_dtype="int8")
    wide = save(tmp_path / "wide", {n: v.astype(np.float32) if n == "big" else v for n, v in trees["b"].items()})
    with pytest.raises(checkpoint.MergeError, match=r"dtype of big: float32 in wide, bfloat16 in a; pass dtype="):
        checkpoint.merge(tx, None, [paths["a"], wide], tmp_path / "mixed")
    checkpoint.merge(tx, None, [paths["a"], wide], tmp_path / "mixed", dtype="bfloat16")
    checkpoint.merge(tx, None, [paths["a"], paths["b"]], tmp_path / "same", dtype="bfloat16")
    assert (tmp_path / "mixed/model.safetensors").read_bytes() == (tmp_path / "same/model.safetensors").read_bytes()


def test_orbax_and_safetensors_mixed(models, tmp_path, unchecked):
    paths, trees = models
    ocp.save(tmp_path / "b", trees["b"])
    tx = params.ties(0.3, scope="tensor")
    checkpoint.merge(tx, paths["base"], [paths["a"], paths["b"]], tmp_path / "want")
    checkpoint.merge(tx, paths["base"], [paths["a"], tmp_path / "b"], tmp_path / "files")
    want = load_file(tmp_path / "want/model.safetensors")
    checkpoint.merge(tx, paths["base"], [paths["a"], tmp_path / "b"], tmp_path / "orbax", format="orbax")
    for got in (load_file(tmp_path / "files/model.safetensors"), ocp.load(tmp_path / "orbax")):
        assert got.keys() == want.keys()
        for n, v in want.items():
            np.testing.assert_array_equal(np.asarray(got[n]), v)
    refused = checkpoint.plan(tx, paths["base"], [paths["a"]], sharding=lambda name, shape: None).problems
    assert len(refused) == 1 and "sharding: safetensors are written by ranges of bytes" in refused[0]
    with pytest.raises(checkpoint.MergeError, match='format must be "orbax" or "safetensors", got'):
        checkpoint.plan(tx, paths["base"], [paths["a"]], format="gguf")


def test_integers_and_nonfinite(models, tmp_path):
    paths, trees = models
    later = save(tmp_path / "later", trees["b"] | {"step": np.arange(3) + 1})
    tx, out = params.linear(), tmp_path / "out"
    with pytest.raises(checkpoint.MergeError, match=r"not floating point differ.*\['step'\]"):
        checkpoint.merge(tx, paths["base"], [paths["a"], later], out)
    hurt = {n: v.copy() for n, v in trees["b"].items()}
    hurt["big"][3, 4:6], hurt["scale"][0] = np.nan, np.inf
    broken = save(tmp_path / "broken", hurt)
    with pytest.raises(checkpoint.MergeError, match=r"(?s)nothing was written:\n  big: 2 in broken\n  scale: 1 in broken"):
        checkpoint.merge(tx, paths["base"], [paths["a"], broken], out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "later"]
    report = checkpoint.merge(tx, paths["base"], [paths["a"], broken, later], out, integers="base", nonfinite="allow")
    assert report.nonfinite == {"big": [0, 0, 2, 0], "scale": [0, 0, 1, 0]}
    got = load_file(out / "model.safetensors")
    assert np.isnan(got["big"].astype(np.float32)).sum() == 2 and got["step"].tolist() == [0, 1, 2]


def test_a_receipt_that_does_not_hold(models, tmp_path):
    paths, _ = models
    tx, out = params.dare_linear(0.5, seed=1), tmp_path / "out"
    checkpoint.merge(tx, paths["base"], [paths["a"]], out, recipe={"method": "dare_linear", "seed": 1})
    receipt = json.loads((out / "jaxmerge.json").read_text())
    assert receipt["recipe"]["seed"] == 1 and receipt["base"]["name"] == "base" and len(receipt["models"]) == 1
    other = checkpoint.verify(out, params.dare_linear(0.5, seed=2), leaves=2)
    assert not other.leaves and "other coefficients" in other.problems[0] and "entries differ" in other.problems[1]
    moved = checkpoint.verify(out, tx, models=[paths["b"]])
    assert "b is not the checkpoint that was merged" in moved.problems[0] and not set(moved.leaves) & {"big", "odd"}
    extent = checkpoint.open(out).extent("odd")
    with open(extent.file, "r+b") as f:
        f.seek(extent.offset + 8)
        f.write(b"\x7f")
    damaged = checkpoint.verify(out, tx, leaves=5)
    assert [p.split(":")[0] for p in damaged.problems] == ["model.safetensors is not the file that was written", "odd"]
    assert "1 of 35 entries differ, the first at flat index 2" in damaged.problems[1] and len(damaged.leaves) == 4
    with pytest.raises(FileNotFoundError, match="has no receipt"):
        checkpoint.verify(paths["a"], tx)


def test_rooms_take_what_reading_ahead_needs():
    """Four small units; two of a typical leaf; the largest, and what is small beside it; never more than the limit else."""
    mb = 1 << 20
    assert _feed.rooms_bytes([], mb) == 0
    assert _feed.rooms_bytes([12 * mb] * 50, 1024 * mb) == 48 * mb
    layer, ends = [92, 92, 92, 33, 33, 8, 8], [262, 262]
    assert _feed.rooms_bytes([n * mb for n in layer * 9 + ends], 1024 * mb) == (262 + 64) * mb
    assert _feed.rooms_bytes([n * mb for n in layer * 9 + ends], 300 * mb) == 300 * mb
    assert _feed.rooms_bytes([n * mb for n in layer * 9], 1024 * mb) == 184 * mb
    assert _feed.rooms_bytes([n * mb for n in layer * 9], 100 * mb) == 100 * mb
    assert _feed.rooms_bytes([n * mb for n in layer * 9], 50 * mb) == 92 * mb
