"""Merges by Fisher information and Gram matrices that lie in files: equal to those by arrays, whatever the memory."""

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file

from jaxmerge import checkpoint, params
from tests.checkpoint.conftest import SHAPES, save

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")
IN_PARTS = 3 * 10**5
RNG = np.random.default_rng(0)
FISHERS = [{n: (10.0**e * RNG.standard_normal(s) ** 2).astype(np.float32) for n, s in SHAPES.items()} for e in (-4, -3, -2)]
INPUTS = [
    {n: RNG.standard_normal((4 * s[1], s[1])).astype(np.float32) for n, s in SHAPES.items() if len(s) == 2} for _ in "abc"
]
GRAMS = [{n: x.T @ x for n, x in model.items() if n != "big"} for model in INPUTS]

MERGES = {  # {name: (from arrays, from files, the arrays)}
    "fisher": (params.fisher(FISHERS, weight=[1, 2, 1]), params.fisher(weight=[1, 2, 1]), FISHERS),
    "plain": (params.fisher(FISHERS, normalize=False), params.fisher(normalize=False), FISHERS),
    "regmean": (params.regmean(GRAMS, axis=1), params.regmean(axis=1), GRAMS),
    "parts": (
        params.partition({"w": params.fisher(FISHERS), "": params.linear()}, lambda n: "w" if "w" in n else ""),
        params.partition({"w": params.fisher(), "": params.linear()}, lambda n: "w" if "w" in n else ""),
        FISHERS,
    ),
}


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory):
    """{name: a path for each model}"""
    root = tmp_path_factory.mktemp("statistics")
    kinds = {"fisher": FISHERS, "regmean": GRAMS}
    return {k: [save(root / f"{k}{i}", model) for i, model in enumerate(kind)] for k, kind in kinds.items()}


@pytest.mark.parametrize("name", MERGES)
def test_equals_the_merge_by_arrays(models, saved, tmp_path, name):
    (paths, trees), (by_arrays, by_files, arrays) = models, MERGES[name]
    experts, data = [paths[n] for n in "abc"], saved["regmean" if name == "regmean" else "fisher"]
    if name == "parts":  # norms over the leaves of a label: arrays of all leaves have others
        by_arrays = params.partition(
            {"w": params.fisher([{n: v for n, v in f.items() if "w" in n} for f in FISHERS]), "": params.linear()},
            lambda n: "w" if "w" in n else "",
        )
    expected = params.merge(by_arrays, None, [trees[n] for n in "abc"])
    for memory in (None, None if name == "regmean" else IN_PARTS):
        out = tmp_path / f"out{memory}"
        report = checkpoint.merge(by_files, None, experts, out, statistics=data, memory=memory, overwrite=True)
        assert report.headers.passes == 2 - (name in ("plain", "regmean"))
        every = sum(v.nbytes for n in "abc" for v in trees[n].values()) + sum(v.nbytes for a in arrays for v in a.values())
        assert report.headers.bytes_read >= every
        got = load_file(out / "model.safetensors")
        for n, value in expected.items():
            tolerance = {"rtol": 2.0**-7 if n != "odd" else 1e-5, "atol": 1e-7}
            np.testing.assert_allclose(got[n].astype(np.float32), np.asarray(value, np.float32), err_msg=n, **tolerance)
        checked = checkpoint.verify(out, by_files, leaves=3, memory=memory)
        assert len(checked.leaves) == 3 and not checked.problems and not checked.notes
        assert [s["name"] for s in checkpoint.receipt(out)["statistics"]] == [p.name for p in data]


@pytest.mark.parametrize("name", ["fisher", "regmean"])
def test_on_devices(models, saved, tmp_path, name):
    """Leaf by leaf on their shardings, from Orbax: to rounding what ranges give; killed and run again from its journal."""
    (paths, trees), (by_arrays, by_files, arrays) = models, MERGES[name]
    for i, data in enumerate(arrays):
        ocp.save(tmp_path / f"data{i}", data)
    expected = params.merge(by_arrays, None, [trees[n] for n in "abc"])
    checkpoint.merge(
        by_files,
        None,
        [paths[n] for n in "abc"],
        tmp_path / "out",
        statistics=[tmp_path / f"data{i}" for i in range(3)],
        format="orbax",
        sharding=checkpoint.fsdp(jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))),
        on_devices=True,
        memory=IN_PARTS,
    )
    got = checkpoint.open(tmp_path / "out")
    for n, value in expected.items():
        tolerance = {"rtol": 2.0**-7 if n != "odd" else 1e-5, "atol": 1e-7}
        np.testing.assert_allclose(got.read(n).astype(np.float32), np.asarray(value, np.float32), err_msg=n, **tolerance)
    assert not checkpoint.verify(tmp_path / "out", by_files).problems


def test_cut_off_and_gone_on_with(models, saved, tmp_path):
    """Cut off after the norms were found: they are not looked for again, and the bytes are those of an undisturbed merge."""
    paths, _ = models
    experts, tx = [paths[n] for n in "abc"], params.fisher()

    def stop(p):
        if p.stage == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.merge(tx, None, experts, tmp_path / "out", statistics=saved["fisher"], memory=IN_PARTS, on_progress=stop)
    stages = []
    again = lambda p: stages.append(p.stage)
    checkpoint.merge(tx, None, experts, tmp_path / "out", statistics=saved["fisher"], memory=IN_PARTS, on_progress=again)
    assert set(stages[1:-1]) == {2}
    checkpoint.merge(tx, None, experts, tmp_path / "whole", statistics=saved["fisher"], memory=IN_PARTS)
    out, whole = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("out", "whole"))
    assert out == whole


def test_a_changed_statistic_is_seen(models, saved, tmp_path):
    paths, _ = models
    data = [save(tmp_path / f"s{i}", f) for i, f in enumerate(FISHERS)]
    tx, experts = params.fisher(normalize=False), [paths[n] for n in "abc"]
    checkpoint.merge(tx, None, experts, tmp_path / "out", statistics=data)
    save(data[1], FISHERS[1] | {"big": FISHERS[1]["big"] * 2})
    found = checkpoint.verify(tmp_path / "out", tx, leaves=6)
    assert any("s1 is not the checkpoint" in p for p in found.problems) and any("big:" in p for p in found.problems)


def test_refused_before_a_byte_is_read(models, saved, tmp_path):
    paths, _ = models
    experts = [paths[n] for n in "abc"]

    def problems(tx, statistics, **options):
        return "\n".join(checkpoint.plan(tx, None, experts, statistics=statistics, **options).problems)

    fisher, regmean = saved["fisher"], saved["regmean"]
    assert "needs statistics of each of the 3 models" in problems(params.fisher(), ())
    assert "name one for each of the 3 models, in their order; got 2" in problems(params.fisher(), fisher[:2])
    assert "this method looks at none; leave them out" in problems(params.linear(), fisher)
    assert "needs information of shape (96, 500) for leaf 'big'" in problems(params.fisher(), regmean)
    assert "needs Gram matrices of shape (128, 128) (axis=0)" in problems(params.regmean(axis=0), regmean)
    assert "(96, 96)" in problems(params.regmean(), [regmean[0], regmean[1], fisher[2]])
    assert "end the chain with it" in problems(params.chain(params.fisher(), params.trim(0.5)), fisher)
    stranger = save(tmp_path / "stranger", FISHERS[0] | {"bigger": np.zeros(1, np.float32)})
    assert "stranger: bigger is no leaf that is merged" in problems(params.fisher(), [*fisher[:2], stranger])
    summed = save(tmp_path / "summed", {f"total/{n}": v for n, v in FISHERS[0].items()} | {"count": np.full(1, 8, np.float32)})
    assert "save Information.mean()" in problems(params.fisher(), [*fisher[:2], summed])
    wide = save(tmp_path / "wide", {n: v.astype(np.float64) for n, v in FISHERS[0].items()})
    assert "is float64; save it as float32" in problems(params.fisher(), [*fisher[:2], wide])
    nan = save(tmp_path / "nan", FISHERS[0] | {"odd": np.full((5, 7), np.nan, np.float32)})
    with pytest.raises(checkpoint.MergeError, match="odd: 35 in nan"):
        checkpoint.merge(params.fisher(normalize=False), None, experts, tmp_path / "out", statistics=[*fisher[:2], nan])
    with pytest.raises(ValueError, match="where they lie in files"):
        params.merge(params.fisher(), None, [{"w": np.ones(2, np.float32)}] * 2)
    with pytest.raises(ValueError, match="where they lie in files"):
        params.merge(params.regmean(), None, [{"w": np.ones((2, 2), np.float32)}] * 2)
