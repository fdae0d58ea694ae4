"""Orbax as users have it: training states with empty parts, Python's values, older layouts, folders within folders."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as older
import pytest
from orbax.checkpoint import v1 as ocp

from jaxmerge import checkpoint, params

pytestmark = pytest.mark.filterwarnings("ignore")  # of Orbax's older interface


def state() -> dict:
    """What training leaves: optax's empty states, containers of nothing, numbers, a flag, a word."""
    weights = {"w": jnp.arange(24.0).reshape(4, 6), "list": [jnp.zeros(3), jnp.ones(3)]}
    empty = {"dict": {}, "none": None, "tuple": (), "list": []}
    return {"params": weights, "opt": optax.adam(1e-3).init(weights), **empty, "i": 3, "f": 1.5, "flag": True, "word": "hello"}


KINDS = {
    "v1": lambda path: ocp.save(path, state()),
    "older": lambda path: older.PyTreeCheckpointer().save(path, state()),
    "without OCDBT": lambda path: older.Checkpointer(older.PyTreeCheckpointHandler(use_ocdbt=False)).save(path, state()),
    "zarr3": lambda path: older.Checkpointer(older.PyTreeCheckpointHandler(use_zarr3=True)).save(path, state()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_state(tmp_path, kind):
    KINDS[kind](tmp_path / "in")
    source = checkpoint.open(tmp_path / "in")
    assert {n: source.read(n) for n in ("i", "f", "flag", "word")} == {"i": 3, "f": 1.5, "flag": True, "word": "hello"}
    assert not {n for n in source.leaves if n.partition("/")[0] in ("dict", "none", "tuple", "list")}
    for devices in (False, True):
        checkpoint.merge(params.linear(), None, [source, tmp_path / "in"], tmp_path / f"{devices}", on_devices=devices)
        got = ocp.load(tmp_path / f"{devices}")
        assert (got["i"], got["f"], got["flag"], got["word"]) == (3, 1.5, True, "hello")
        np.testing.assert_array_equal(got["params"]["w"], state()["params"]["w"])
        np.testing.assert_array_equal(got["params"]["list"][1], np.ones(3))
        assert int(got["opt"][0]["count"]) == 0
    checkpoint.merge(params.linear(), None, [source, source], f"file://{tmp_path}/bucket")
    assert jax.tree.structure(ocp.load(tmp_path / "bucket")) == jax.tree.structure(got)


def test_a_run_of_a_manager(tmp_path):
    """The folder of a step, that of its item, and that of all steps, of which one must be named."""
    with older.CheckpointManager(tmp_path / "run") as manager:
        for step in (5, 10):
            manager.save(step, args=older.args.StandardSave({"w": jnp.full(4, float(step))}))
        manager.wait_until_finished()
    run = tmp_path / "run"
    assert checkpoint.open(run / "5").name == "5" and checkpoint.open(run / "5/default").name == "5/default"
    checkpoint.merge(params.linear(), None, [run / "5", run / "10/default"], tmp_path / "out")
    np.testing.assert_array_equal(ocp.load(tmp_path / "out")["w"], np.full(4, 7.5))
    with pytest.raises(ValueError, match="several steps; name one of them: 5, 10"):
        checkpoint.open(run)
