"""Merging checkpoints on disk: equal to merging in memory, bounded, atomic, and refused with every reason at once."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from jaxmerge import checkpoint, params
from jaxmerge.checkpoint import _sharded
from tests.hlo import collectives

# Orbax says so whenever a checkpoint is read without a target; only tests do that.
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")


def tree(seed, base=None):
    """A small model: nested, a list, a bfloat16 leaf, a scalar, one dimension that 8 does not divide, integers."""
    rng = np.random.default_rng(seed)
    f = lambda *s: rng.standard_normal(s).astype(np.float32)
    t = {"blocks": {str(i): {"w": f(16, 8), "b": f(8)} for i in range(3)}, "list": [f(3, 5), f(16, 8)], "s": f()}
    t["head"] = f(8, 24).astype(jnp.bfloat16)
    return t if base is None else jax.tree.map(lambda b, x: (b + x.astype(b.dtype) / 64).astype(b.dtype), base, t)


def save(path, t, mesh, step=7):
    rule = checkpoint.fsdp(mesh, mesh.axis_names)
    ocp.save(path, {**jax.tree.map(lambda x: jax.device_put(x, rule("", np.shape(x))), t), "step": jnp.int32(step)})
    return path


def flat(t):
    return {
        jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(t)
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """base, a, b, sharded over 8 devices on two axes."""
    root = tmp_path_factory.mktemp("checkpoints")
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    base = tree(0)
    trees = {"base": base, "a": tree(1, base), "b": tree(2, base)}
    return {n: save(root / n, t, mesh) for n, t in trees.items()}, trees


METHODS = {
    "linear": (params.linear(), True),
    "ties": (params.ties(0.2), True),
    "ties_official": (params.ties([0.2, 0.3], extra=1, ties="all", tie="majority", reduce="sum"), True),
    "ties_tensor": (params.ties(0.2, scope="tensor", rescale=True), False),
    "dare": (params.dare_linear(0.5, seed=3), True),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if "_" in n else n for n in METHODS])
def test_equals_the_merge_in_memory(saved, tmp_path, name):
    (paths, trees), (tx, exact) = saved, METHODS[name]
    expected = flat(params.merge(tx, trees["base"], [trees["a"], trees["b"]]))
    seen = []
    # a batch holds a leaf or two: thresholds of the whole model are found in passes over the files
    report = checkpoint.merge(
        tx, paths["base"], [paths["a"], paths["b"]], tmp_path / "out", memory=4200, on_devices=True, on_progress=seen.append
    )
    assert len(report.headers.batches) > 3
    assert report.headers.passes == {"ties": 4, "ties_official": 5}.get(name, 1) == seen[-1].stages
    assert seen[-1].done == seen[-1].total
    loaded = ocp.load(tmp_path / "out")
    got, base = flat(loaded), ocp.load(paths["base"])
    assert got.pop("step") == 7
    for n, value in expected.items():
        assert got[n].dtype == value.dtype
        compare = (
            np.testing.assert_array_equal if exact else lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
        )
        compare(got[n].astype(np.float32), value.astype(np.float32))
    jax.tree.map(lambda a, b: (a.sharding == b.sharding) or pytest.fail(f"{a.sharding} is not {b.sharding}"), loaded, base)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["linear", "ties", "dare"])
def test_leaves_larger_than_the_memory(saved, tmp_path, name, monkeypatch):
    """Leaves are read, merged and written some rows at a time; nothing else about the output changes."""
    monkeypatch.setattr("jaxmerge.checkpoint._programs.SIZES", (64, 16))
    (paths, trees), (tx, _) = saved, METHODS[name]
    report = checkpoint.merge(tx, paths["base"], [paths["a"], paths["b"]], tmp_path / "out", memory=1900)
    units = [u.name for group in report.headers.units for u in group]
    assert {n for n in units if units.count(n) > 2} == {f"blocks/{i}/w" for i in range(3)} | {"list/1"}
    expected, loaded = flat(params.merge(tx, trees["base"], [trees["a"], trees["b"]])), ocp.load(tmp_path / "out")
    for n, value in expected.items():
        np.testing.assert_array_equal(flat(loaded)[n].astype(np.float32), value.astype(np.float32))
    base = ocp.load(paths["base"])
    jax.tree.map(lambda a, b: (a.sharding == b.sharding) or pytest.fail(f"{a.sharding} is not {b.sharding}"), loaded, base)
    again = checkpoint.merge(tx, tmp_path / "out", [paths["a"], tmp_path / "out"], tmp_path / "next", memory=1900)
    assert again.headers.units and [p.name for p in tmp_path.glob("*.merging*")] == []
    strange = {**trees["a"], "list": [trees["a"]["list"][0], np.full((16, 8), np.nan, np.float32)]}
    save(tmp_path / "strange", strange, jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,)))
    with pytest.raises(checkpoint.MergeError, match=r"list/1: 128 in strange"):
        checkpoint.merge(tx, paths["base"], [paths["a"], tmp_path / "strange"], tmp_path / "no", memory=1900)
    assert not list(tmp_path.glob("no*"))


def test_no_base_other_sharding_and_one_batch(saved, tmp_path):
    paths, trees = saved
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Explicit,))
    out = tmp_path / "deep" / "out"
    options = {"sharding": checkpoint.fsdp(mesh), "on_devices": True}
    report = checkpoint.merge(params.slerp(0.25), None, [paths["a"], paths["b"]], out, **options)
    assert report.headers.passes == 1 and len(report.headers.batches) == 1
    loaded = ocp.load(out)
    assert loaded["blocks"]["0"]["w"].sharding.spec == P("fsdp")
    expected = flat(params.merge(params.slerp(0.25), None, [trees["a"], trees["b"]]))
    for n, value in expected.items():
        np.testing.assert_allclose(
            flat(loaded)[n].astype(np.float32), value.astype(np.float32), rtol=2**-7 if n == "head" else 1e-5, atol=1e-6
        )


def test_compiled_programs_gather_nothing(mesh):
    """The programs of both passes, on a leaf split over both axes."""
    sharding = NamedSharding(mesh, P("data", "model"))
    arrays = [jax.device_put(np.ones((8, 4), np.float32), sharding)] * 3
    tx = params.ties(0.2)
    settings, *rest = (s.settings("w", (2, 8, 4)) for s in tx.match.steps[:4])
    survey = tx.match.steps[0].survey
    query, notes = survey.start({"w": settings})
    read = _sharded._reader((), survey.read, sharding, True).lower(query, [], arrays).compile()
    assert set(collectives(read)) == {"all-reduce"}
    query, notes = survey.step(query, notes, {"w": np.full((2, 2048), 1, np.uint64)})
    settings = [survey.finish(notes, {"w": settings})["w"], *rest, tx.match.steps[4].settings("w", (1, 8, 4))]
    merge = _sharded._merger(tx.match.steps, sharding, True).lower(settings, arrays).compile()
    assert set(collectives(merge)) == {"all-reduce"}


def test_layouts_are_visible_to_a_merge_on_devices(saved, tmp_path, monkeypatch):
    """On a mesh of Auto axes too: left to itself the compiler would gather the matrices of Iso-C."""
    paths, trees = saved
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    both = lambda shape: len(shape) == 2 and shape[0] % 4 == shape[1] % 2 == 0
    rule = lambda name, shape: NamedSharding(mesh, P("data", "model") if both(shape) else P())
    moved, merger = set(), _sharded._merger

    def noted(*args):
        work = merger(*args)

        def run(settings, arrays):
            moved.update(collectives(work.lower(settings, arrays).compile()))
            return work(settings, arrays)

        return run

    monkeypatch.setattr(_sharded, "_merger", noted)
    models = [paths["a"], paths["b"]]
    report = checkpoint.merge(params.iso_c(), paths["base"], models, tmp_path / "out", sharding=rule, on_devices=True)
    assert any(both(leaf.shape) for leaf in report.headers.out.values())
    assert "all-reduce" in moved and moved <= {"all-reduce", "all-to-all"}, moved
    loaded = ocp.load(tmp_path / "out")
    for n, value in flat(params.merge(params.iso_c(), trees["base"], [trees["a"], trees["b"]])).items():
        there, value = flat(loaded)[n].astype(np.float32), value.astype(np.float32)
        rounding = 2**-7 if n == "head" else 0  # bfloat16; factors are true to 1e-5 of the largest, as the laws have it
        np.testing.assert_allclose(there, value, rtol=rounding, atol=1e-5 * np.abs(value).max())
    assert loaded["head"].sharding == rule("head", (8, 24))


def test_every_mismatch_in_one_message(saved, tmp_path):
    paths, trees = saved
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    wrong = {
        **trees["a"],
        "s": np.zeros(2, np.float32),
        "head": trees["a"]["head"].astype(np.float32),
        "new": np.zeros(3, np.float32),
    }
    wrong["blocks"] = {k: v for k, v in wrong["blocks"].items() if k != "1"}
    save(tmp_path / "wrong", wrong, mesh)
    models = [tmp_path / "wrong", paths["b"]]
    plan = checkpoint.plan(params.ties(0.2), paths["base"], models)
    with pytest.raises(checkpoint.MergeError) as error:
        checkpoint.merge(params.ties(0.2), paths["base"], models, tmp_path / "out")
    for part in (
        "missing in wrong: blocks/1/b",
        "missing in wrong: blocks/1/w",
        "unexpected in wrong: new",
        "shape of s: (2,) in wrong, () in base",
        "dtype of head: float32 in wrong, bfloat16 in base",
    ):
        assert part in str(error.value) and any(part in p for p in plan.problems)
    assert not (tmp_path / "out").exists()


def test_a_mesh_axis_that_does_not_divide(saved, tmp_path):
    paths, _ = saved
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    args = (params.linear(), None, [paths["a"], paths["b"]], tmp_path / "out")
    rule = lambda name, shape: NamedSharding(mesh, P("fsdp") if name == "list/0" else P())
    with pytest.raises(
        checkpoint.MergeError, match=r"list/0: mesh axis fsdp of size 8 does not divide dimension 0 of \(3, 5\); shard"
    ):
        checkpoint.merge(*args, sharding=rule)
    with pytest.raises(checkpoint.MergeError, match=r"(?s)blocks/0/b: .*names 2 dimensions.* s: the spec"):
        checkpoint.merge(*args, sharding=NamedSharding(mesh, P(None, "fsdp")))
    with pytest.raises(ValueError, match=r"no axis \['tensor'\]"):
        checkpoint.fsdp(mesh, "tensor")


def test_what_else_is_refused(saved, tmp_path, monkeypatch):
    paths, trees = saved
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    models, out = [paths["a"], paths["b"]], tmp_path / "out"
    tx = params.ties(0.2)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        checkpoint.merge(tx, tmp_path / "nothing", models, out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no weights: it is empty"):
        checkpoint.merge(tx, tmp_path / "empty", models, out)
    with pytest.raises(checkpoint.MergeError, match="out is one of the inputs"):
        checkpoint.merge(tx, paths["base"], models, paths["a"], overwrite=True)
    with pytest.raises(checkpoint.MergeError, match="no models"):
        checkpoint.merge(tx, paths["base"], [], out)
    with pytest.raises(checkpoint.MergeError, match="density must be between 0 and 1"):
        checkpoint.merge(params.ties(2.0), paths["base"], models, out)
    with pytest.raises(checkpoint.MergeError, match="several models are left"):
        checkpoint.merge(params.weigh(1.0), paths["base"], models, out)
    with pytest.raises(checkpoint.MergeError, match="per_leaf"):
        checkpoint.merge(params.MergeTransform(lambda s: None, lambda p, s: s), paths["base"], models, out)
    save(tmp_path / "later", trees["a"], mesh, step=9)
    with pytest.raises(checkpoint.MergeError, match=r"not floating point differ.*\['step'\].*--integers base"):
        checkpoint.merge(tx, paths["base"], [tmp_path / "later"], out)
    strange = {**trees["a"], "s": np.float32(np.nan)}
    save(tmp_path / "strange", strange, mesh)
    with pytest.raises(checkpoint.MergeError, match=r"(?s)not finite.*s: 1 in strange.*--nonfinite allow"):
        checkpoint.merge(tx, paths["base"], [tmp_path / "strange"], out)
    assert not out.exists() and not list(tmp_path.glob("out*"))
    report = checkpoint.merge(
        params.linear(),
        paths["base"],
        [tmp_path / "strange", tmp_path / "later"],
        out,
        integers="base",
        nonfinite="allow",
    )
    assert report.nonfinite == {"s": [0, 1, 0]} and np.isnan(ocp.load(out)["s"]) and ocp.load(out)["step"] == 7
    with pytest.raises(FileExistsError, match="--overwrite"):
        checkpoint.merge(tx, paths["base"], models, out)
    beside = {"README.md": "a card"}
    checkpoint.merge(params.linear(), paths["base"], models, out, overwrite=True, on_devices=True, beside=beside)
    receipt = checkpoint.receipt(out)
    assert receipt["options"]["on_devices"] and "_CHECKPOINT_METADATA" in receipt["files"] and (out / "README.md").exists()
    assert np.isfinite(ocp.load(out)["s"]) and [p.name for p in tmp_path.glob("out*")] == ["out"]


WORKER = """
import sys, jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
rank, port, root = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=rank)
from jaxmerge import checkpoint, params
assert jax.device_count() == 4 and jax.local_device_count() == 2
for name, tx in {"ties": params.ties(0.2, tie="majority"), "dare": params.dare_linear(0.5, seed=3)}.items():
    report = checkpoint.merge(tx, f"{root}/base", [f"{root}/a", f"{root}/b"], f"{root}/two_{name}", memory=4200)
    assert report.headers.shardings["blocks/0/w"].spec == jax.P("fsdp"), report.headers.shardings
    checkpoint.merge(tx, f"{root}/base", [f"{root}/a", f"{root}/b"], f"file://{root}/store_{name}", memory=4200)
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Each process holds half of the devices and reads and writes its shards; the bytes are those of one process."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    base = tree(0)
    for n, t in {"base": base, "a": tree(1, base), "b": tree(2, base)}.items():
        save(tmp_path / n, t, mesh)
    flags = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(pathlib.Path(__file__).parents[1]),
    }
    command = [sys.executable, "-c", WORKER]
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])
    workers = [
        subprocess.Popen(
            [*command, str(rank), port, str(tmp_path)],
            env={**os.environ, **flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [w.communicate(timeout=300)[0] for w in workers]
    assert [w.returncode for w in workers] == [0, 0], "\n".join(outputs)
    for name, tx in {"ties": params.ties(0.2, tie="majority"), "dare": params.dare_linear(0.5, seed=3)}.items():
        checkpoint.merge(tx, tmp_path / "base", [tmp_path / "a", tmp_path / "b"], tmp_path / f"one_{name}")
        one = flat(ocp.load(tmp_path / f"one_{name}"))
        for several in ("two", "store"):  # in files here, and as buckets are written
            two = flat(_load_here(tmp_path / f"{several}_{name}"))
            assert one.keys() == two.keys()
            for n in one:
                np.testing.assert_array_equal(one[n], two[n])


def _load_here(path):
    target = jax.tree.map(
        lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])),
        ocp.metadata(path).metadata,
    )
    return ocp.load(path, target)
