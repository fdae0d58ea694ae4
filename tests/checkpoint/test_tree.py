"""Orbax written by ranges: blocks that are runs of the flat array, every kind of leaf, few files."""

import math

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import save_file

from jaxmerge import checkpoint, params
from jaxmerge.checkpoint import _journal, _tree
from jaxmerge.checkpoint._feed import Unit
from jaxmerge.checkpoint._stream import split
from jaxmerge.checkpoint._units import span

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")


@pytest.mark.parametrize(
    "shape", [(), (1,), (7,), (16, 8), (3, 50, 4), (1, 1, 9), (2, 3, 4, 5), (1000, 3), (70_000, 70_000), (0, 3)]
)
@pytest.mark.parametrize("most", [1, 4, 30, 1 << 20])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_blocks(shape, most, shards):
    """At most so many entries, or one row of the last axis's entries; a device's part is whole blocks where it can be."""
    counts = [shards if i == 0 and shape[0] % shards == 0 else 1 for i in range(len(shape))]
    s = span(shape, most, counts)
    assert s.entries(shape) <= most or not shape
    if shape and shape[s.axis] and s.axis == 0 and most >= math.prod(shape[1:]) and shape[0] // counts[0] <= most:
        per = shape[0] // counts[0]
        assert s.rows % per == 0 or per % s.rows == 0 or s.rows > per // 2
    size = math.prod(shape)
    if not 0 < size <= 10**5:
        return
    parts = list(split(Unit("x", 0, size), s.entries(shape), math.prod(shape[s.axis :])))
    x, found = np.arange(size).reshape(shape), []
    for part in parts:
        rows = part.size // math.prod(shape[s.axis + 1 :])
        index = ()
        if shape:
            *lead, row = np.unravel_index(part.start // math.prod(shape[s.axis + 1 :]), shape[: s.axis + 1])
            index = (*map(int, lead), slice(int(row), int(row) + rows))
        found.append(np.ravel(x[index]))
    np.testing.assert_array_equal(np.concatenate(found), np.arange(size))


def test_rows_that_are_stored_together():
    assert span((100, 6), 50, (), 18).rows % 3 == 0 and span((100, 6), 1, (), 18).rows == 3


@pytest.mark.parametrize("on_devices", [False, True])
def test_every_kind_of_leaf(tmp_path, on_devices):
    """Zeros are stored as they are, 64 bits stay 64, one number and none at all; many leaves are few files."""
    leaves = {
        "zeros": np.zeros((4, 3), np.float32),
        "number": np.array(2, np.float32),
        "none": np.zeros((0, 3), np.float32),
        "large": np.array([2**40, 1], np.int64),
        "flags": np.array([True, False]),
    }
    leaves |= {f"layers.{i}": np.full((2, 2), i, np.float32) for i in range(50)}
    save_file(leaves, tmp_path / "m.safetensors")
    options = {"format": "orbax", "on_devices": on_devices}
    checkpoint.merge(params.linear(), None, [tmp_path / "m.safetensors"], tmp_path / "out", **options)
    source, loaded = checkpoint.open(tmp_path / "out"), ocp.load(tmp_path / "out")
    for n, x in leaves.items():
        assert source.leaves[n].dtype == x.dtype and source.leaves[n].shape == x.shape
        np.testing.assert_array_equal(source.read(n), x)
        if n != "large":  # JAX has no 64 bits here
            np.testing.assert_array_equal(loaded[n], x)
    assert len([p for p in (tmp_path / "out").rglob("*") if p.is_file()]) < 20
    assert not checkpoint.verify(tmp_path / "out", params.linear()).problems


def test_a_group_is_written_while_the_next_is_made(models, tmp_path, monkeypatch):
    """And what it makes safe is noted when it is there, not before; in order, each once."""
    for module, size in (("_units.GROUP", 1 << 13), ("_ranges.CHECKPOINT", 1 << 13)):
        monkeypatch.setattr(f"jaxmerge.checkpoint.{module}", size)
    events, add, send, note = [], _tree.Blocks._add, _tree.Blocks._send, _journal.Workplace.note

    class Late:
        """What is never there before it is waited for."""

        def __init__(self, future):
            self.future, self.done = future, lambda: False

        def exception(self):
            events.append("there")
            return self.future.exception()

    def sent(self):
        made = self._made is not None
        send(self)
        if made:
            events.append("sent")
            self._under_way = Late(self._under_way)

    monkeypatch.setattr(_tree.Blocks, "_add", lambda self, *block: (events.append("made"), add(self, *block)))
    monkeypatch.setattr(_tree.Blocks, "_send", sent)
    monkeypatch.setattr(
        _journal.Workplace, "note", lambda self, line, **how: (events.extend(line.keys() & {"units"}), note(self, line, **how))
    )
    checkpoint.merge(params.linear(), None, [models[0]["a"], models[0]["b"]], tmp_path / "out", format="orbax")
    said = " ".join(events)
    groups = said.count("sent")
    assert groups == said.count("there units") == said.count("there") == said.count("units") > 3, said
    assert said.count("sent made") == groups - 1, said  # the next is begun while one is under way, all but after the last


@pytest.mark.parametrize("kind", ["safetensors", "orbax"])
def test_leaves_without_entries_and_an_output_that_is_replaced(tmp_path, kind):
    """Methods that wait for a statistic have none of nothing; what is opened again is what is there now."""
    files, options = [tmp_path / f"{n}.safetensors" for n in "abc"], {"format": kind, "overwrite": True}
    for i, file in enumerate(files):
        save_file({"none": np.zeros((0, 3), np.float32), "x": np.arange(12, dtype=np.float32).reshape(3, 4) * (i + 1)}, file)
    for tx in (params.ties(0.5, scope="tensor"), params.model_stock()):
        checkpoint.merge(tx, files[0], files[1:], tmp_path / "out", **options)
        assert not checkpoint.verify(tmp_path / "out", tx).problems
        assert checkpoint.open(tmp_path / "out").read("none").shape == (0, 3)
        checkpoint.merge(tx, tmp_path / "out", [tmp_path / "out"] * 2, tmp_path / "again", **options)  # read by what comes next
        np.testing.assert_array_equal(
            checkpoint.open(tmp_path / "again").read("x"), checkpoint.open(tmp_path / "out").read("x")
        )
