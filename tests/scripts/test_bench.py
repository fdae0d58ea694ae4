"""The benchmarks run at tiny shapes, without their peers, and count what they say they count. No time is asserted."""

import json
import pathlib
import types

import jax
import numpy as np
import pytest

from jaxmerge._kernels.arg_specs import VIT, cases
from jaxmerge._kernels.merge import ref
from models.vit import ViTConfig
from scripts import tune
from scripts.bench import device, engine, kernels, kernels_aot, meter, opentome, tome, vit

TINY = ViTConfig(width=16, depth=2, num_heads=2, patch_size=4, image_size=16, num_classes=4)


@pytest.fixture(autouse=True)
def unpinned(monkeypatch):
    """A test must not leave the process on one core."""
    monkeypatch.setattr(meter, "pin", lambda: 0)


def test_tome_against_the_floor_alone(tmp_path):
    tome.main(out=tmp_path, rounds=2, cases=((2, 17, 8, 4, 3), (1, 16, 4, 4, 8)))
    report = json.loads((tmp_path / "tome.json").read_text())
    assert [case["case"] for case in report["cases"]] == [[2, 17, 8, 4, 3], [1, 16, 4, 4, 8]]
    first = report["cases"][0]
    assert list(first["rows"]) == [tome.OURS] and first["floor"]["ms"] > 0
    assert first["floor"]["bytes"] == 4 * (2 * 17 * (4 + 8 + 1) + 2 * 14 * 9) and first["floor"]["flops"] == 2 * 2 * 9 * 8 * 4
    assert (tmp_path / "tome.png").stat().st_size > 0


def test_groups_are_compared_whatever_their_numbers():
    np.testing.assert_array_equal(tome.firsts(np.array([[3, 1, 3, 0]])), [[0, 1, 0, 3]])
    with pytest.raises(ValueError, match="checkout of https"):
        tome.load(tome.pathlib.Path("nowhere") / "merge.py")


def test_vit_counts_what_the_compiler_counts():
    rows = vit.measure(TINY, 2, (0, 3), rounds=2)
    assert rows[0]["speedup"] == 1 and rows[1]["flop_ratio"] > 1
    for row in rows:  # the compiler counts softmax, norms and matching too
        assert row["flops"] < row["compiled_flops"] < 2 * row["flops"], row


def test_vit_on_a_device_has_a_row_for_every_way_to_lose_tokens(monkeypatch):
    """All are lowered; and what has been found is written after each of them."""
    monkeypatch.setattr(vit.device, "compile_all", lambda programs: None)
    monkeypatch.setattr(vit.device.Program, "seconds", lambda self, **_: 1.0)
    for train in (False, True):
        written = []
        options = {"train": train, "attention": None, "ways": ("kernel", "XLA", "cut")}
        rows = vit.on_device(TINY, 2, (0, 3), **options, write=lambda rows, written=written: written.append(len(rows)))
        assert [(row["r"], row["merging"]) for row in rows] == [(0, "none"), (3, "kernel"), (3, "XLA"), (3, "cut")]
        assert written == [1, 2, 3, 4]


def test_everyone_has_a_turn_every_round():
    turns = []
    times = meter.interleave({n: lambda n=n: turns.append(n) for n in "abc"}, 2, warm=1)
    assert "".join(turns) == "abc" + "abc" + "bca" and times["a"].shape == (2, 2)
    jax.block_until_ready(meter.matmul(8)[0]())


def test_opentome_without_its_peer(tmp_path):
    opentome.main(out=tmp_path, rounds=2, cases=((2, 17, 8, 4, 3),))
    (case,) = json.loads((tmp_path / "opentome.json").read_text())["cases"]
    assert list(case["rows"]) == [f"jaxmerge, {method}" for method in opentome.METHODS]
    metric = np.random.default_rng(0).standard_normal((2, 9, 4)).astype(np.float32)
    (_, ids) = opentome.ours(metric, metric, metric[..., 0] ** 2, 2)["DiffRate's merge"]
    unit = metric / np.linalg.norm(metric, axis=-1, keepdims=True)
    want = (unit[:, 7:] @ unit[:, :7].transpose(0, 2, 1)).argmax(-1)
    np.testing.assert_array_equal(ids, np.concatenate([np.tile(np.arange(7), (2, 1)), want], axis=1))


def test_kernels_ahead_of_time_know_the_floor():
    spec = VIT[0]
    arrays, static = cases(spec, 2, np.dtype("float32"))["step"]
    flops, moved = kernels_aot.floor("step", arrays, static)
    assert flops == 2 * 197 * 197 / 2 * 64  # each even position with each odd one
    assert moved == 4 * 2 * (197 * (64 + 384 + 1) + 184 * 384 + 2 * 197)
    flops, moved = kernels_aot.floor("match", *cases(spec, 2, np.dtype("float32"))["match"])
    assert flops == 2 * 2 * 99 * 98 * 64 and moved == 4 * 2 * (197 * 64 + 2 * 99)


@pytest.mark.tpu
@pytest.mark.slow
def test_kernels_ahead_of_time(tmp_path):
    """Every operation of a layer that has it, none below its floor."""
    layers = ("ViT-B/16@224", "ByT5-small 1024")
    ops = ("step", "match", "energy", "merge", "unmerge", "pack", "attend", "attend_vjp")
    kernels_aot.main(chips=("v5e",), layers=layers, ops=ops, out=tmp_path)
    rows = json.loads((tmp_path / "kernels_aot.json").read_text())
    assert {row["op"] for row in rows} == set(ops) and {row["layer"] for row in rows} == set(layers)
    assert all(row["floor_us"] < row["kernel_us"] for row in rows)


def test_tune_needs_an_accelerator():
    with pytest.raises(ValueError, match="no kernels for cpu"):
        tune.main()


@pytest.mark.slow
def test_what_is_tuned_is_equal_and_fastest(monkeypatch, capsys):
    """Of three settings the fastest is wrong: it is named, and the next is written."""
    scales = {8: 1.1, 16: 1.0, 32: 1.0}

    def merge(ids, x, weight, *, m, mean, tile):
        return tuple(y * scales[tile] for y in ref.merge(ids, x, weight, m=m, mean=mean))

    module = types.SimpleNamespace(merge=merge, CANDIDATES={"merge": tuple({"tile": tile} for tile in scales)})
    monkeypatch.setattr(tune.dispatch, "implementation", lambda op, name: ref if name == "ref" else module)
    seconds = iter([3e-6, 2e-6, 4e-6])  # 16, 32, XLA
    monkeypatch.setattr(device.Program, "seconds", lambda self: next(seconds))
    shapes, static = cases(VIT[0]._replace(n=40, d=16, r=8), 2, np.dtype("float32"))["merge"]
    arrays = [tune.filled(i, s, 32) for i, s in enumerate(shapes)]
    assert tune.tune("merge", "a kernel", arrays, static) == {"us": 2.0, "xla_us": 4.0, "tile": 32}
    assert "{'tile': 8} is passed over: its result is not XLA's, but" in capsys.readouterr().out


def test_what_rounding_may_choose_is_not_compared():
    near, far, index = np.array([1.0, 8.0]), np.array([1.2, 8.0]), np.array([3, 4])
    assert tune.difference([far], [near]) == "0.2 off, where the largest is 8"
    assert tune.difference([far, index[::-1]], [near, index]) == ""


def test_what_is_said_of_a_kernel():
    shapes, static = cases(VIT[2], 64, np.dtype("float32"))["merge"]
    taken = {"xla": 9e-6, "kernel": 4e-6}
    ways = {name: types.SimpleNamespace(seconds=lambda t=t: t) for name, t in taken.items()}
    chip = device.Ceilings(bandwidth=kernels.work("merge", shapes, static)[0] / 2e-6, rate=1.0)
    row = kernels.measure("merge", VIT[2], shapes, static, chip=chip, ways=ways, why="")
    assert kernels.described(row) == ["merge", "ViT-B/16@224", "64", "4.0", "9.0", "2.2", "50%", ""]


@pytest.mark.slow
def test_merges_on_disk(tmp_path, monkeypatch):
    """Models as large as they say, and every run's figures, of the floor's process and of ours."""
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parents[2]))
    engine.build(tmp_path, 0.0001)
    engine.run(tmp_path, 0.0001, ("linear", "ties"), rounds=1, out=tmp_path / "figures.json")
    runs = json.loads((tmp_path / "figures.json").read_text())["runs"]
    size = (tmp_path / "0.0001/base/model.safetensors").stat().st_size
    for method in ("linear", "ties"):
        for (taken,) in runs[method].values():
            assert taken["wall"] > 0 and taken["cpu"] > 0 and taken["faults"] > 0
        assert runs[method]["ours"][0]["anonymous"] > 20
    assert 2 * sum(np.prod(s) for s in engine.shapes(0.0001).values()) < size < 300_000
