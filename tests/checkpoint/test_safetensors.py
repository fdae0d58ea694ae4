"""Safetensors as sources: what is there, by ranges; what is wrong, said once and clearly; views."""

import errno
import json
import os
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P, SingleDeviceSharding

from jaxmerge import checkpoint
from jaxmerge.checkpoint import _remote
from tests.checkpoint.conftest import save, tree


def test_leaves_and_ranges(models):
    paths, trees = models
    source = checkpoint.open(paths["a"])
    assert source.format == "safetensors" and source.metadata == {"format": "pt"} and source.name == "a"
    assert {n: (leaf.shape, leaf.dtype) for n, leaf in source.leaves.items()} == {
        n: (v.shape, v.dtype) for n, v in trees["a"].items()
    }
    want = trees["a"]["big"]
    for index in ((), (slice(3, 9),), (slice(0, 96), slice(5, 6)), (slice(7, 8), slice(60, 64))):
        np.testing.assert_array_equal(source.read("big", index), want[index])
    assert checkpoint.open(paths["a"] / "model.safetensors").leaves == source.leaves
    assert checkpoint.open(source) is source


def test_onto_shardings(models, mesh):
    paths, trees = models
    source = checkpoint.open(paths["a"])
    placed = source.load({"big": NamedSharding(mesh, P("data", "model")), "odd": NamedSharding(mesh, P())})
    for n, x in placed.items():
        np.testing.assert_array_equal(x, trees["a"][n])


def write(path, header, data, length=None):
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


DAMAGE = {
    "empty": (None, b"", None, "fewer than the 8"),
    "not one": (b"PK\x03\x04 zip archive", b"", 1 << 40, "not a safetensors file, or is damaged"),
    "header cut": ({}, b"", 400, "cut short: its header ends at byte 408"),
    "no json": (b"{nothing}", b"", None, "header that cannot be read"),
    "not an object": (b"[1, 2]", b"", None, "it is not an object"),
    "name twice": (b'{"a": {"dtype": "U8"}, "a": {"dtype": "U8"}}', b"", None, "'a' occurs twice"),
    "tensor cut": ({"a": entry([4], 0, 16)}, b"\0" * 9, None, "cut short: its tensors end at byte"),
    "too long": ({"a": entry([1], 0, 4)}, b"\0" * 9, None, "damaged: its tensors end at byte"),
    "overlap": ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"\0" * 12, None, "a and b overlap"),
    "hole": ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"\0" * 12, None, "leave 4 bytes between them"),
    "wrong size": ({"a": entry([3], 0, 8)}, b"\0" * 8, None, "needs 12 bytes and has 8"),
    "backwards": ({"a": entry([1], 4, 0)}, b"\0" * 4, None, "a is described as"),
    "no dtype": ({"a": {"shape": [1]}}, b"", None, "a is described as"),
    "dtype": ({"a": entry([3], 0, 1, "F4")}, b"\0", None, "needs 2 bytes and has 1"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files(tmp_path, name):
    header, data, length, message = DAMAGE[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"") if header is None else write(path, header, data, length)
    with pytest.raises(ValueError, match=message):
        checkpoint.open(tmp_path)


def test_directories_of_several_files(models, tmp_path):
    _, trees = models
    names = list(trees["a"])
    parts = [{n: trees["a"][n] for n in names[:3]}, {n: trees["a"][n] for n in names[3:]}]
    files = [f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    for file, part in zip(files, parts, strict=True):
        shutil.move(save(tmp_path / "part", part) / "model.safetensors", tmp_path / file)
    (tmp_path / "part").rmdir()
    assert checkpoint.open(tmp_path).leaves.keys() == trees["a"].keys()  # without an index

    index = tmp_path / "model.safetensors.index.json"
    where = {n: files[i] for i, part in enumerate(parts) for n in part}
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    source = checkpoint.open(tmp_path)
    for n, v in trees["a"].items():
        np.testing.assert_array_equal(source.read(n), v)

    index.write_text(json.dumps({"weight_map": {**where, names[0]: files[1], "ghost": files[0]}}))
    with pytest.raises(ValueError, match=rf"disagree: ghost is not in model-00001.*; {names[0]} is not in model-00002"):
        checkpoint.open(tmp_path)
    index.write_text("{")
    with pytest.raises(ValueError, match="cannot be read as an index"):
        checkpoint.open(tmp_path)
    index.write_text(json.dumps({"weight_map": where}))
    shutil.copy(tmp_path / files[0], tmp_path / "kept.safetensors")
    assert checkpoint.open(tmp_path).leaves.keys() == where.keys()  # what the index does not name does not count
    index.unlink()
    with pytest.raises(ValueError, match="is in two files"):
        checkpoint.open(tmp_path)
    (tmp_path / "kept.safetensors").unlink()
    (tmp_path / files[1]).unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of its 2 files: model-00002-of-00002\.safetensors"):
        checkpoint.open(tmp_path)
    index.write_text(json.dumps({"weight_map": where}))
    with pytest.raises(ValueError, match="lacks 1 of the 2 files that its index names: model-00002"):
        checkpoint.open(tmp_path)


def test_two_models_in_one_folder(models, tmp_path):
    """A file of the whole and an index of others: Transformers reads the one, mergekit the other; here it is asked which."""
    paths, trees = models
    parts = {"model-00001-of-00002.safetensors": ["odd"], "model-00002-of-00002.safetensors": ["big", "scale"]}
    for file, names in parts.items():
        shutil.move(save(tmp_path / "part", {n: trees["a"][n] for n in names}) / "model.safetensors", tmp_path / file)
    (tmp_path / "part").rmdir()
    index, whole = tmp_path / "model.safetensors.index.json", tmp_path / "model.safetensors"
    index.write_text(json.dumps({"weight_map": {n: file for file, names in parts.items() for n in names}}))
    shutil.copy(paths["b"] / "model.safetensors", whole)
    message = r"holds two models: it has model.safetensors, and model.safetensors.index.json of 2 other files; name the one"
    with pytest.raises(ValueError, match=f"{message} that is meant, {whole} or {index}"):
        checkpoint.open(tmp_path)
    for path, name, names in ((whole, "b", trees["b"].keys()), (index, "a", {"odd", "big", "scale"})):
        source = checkpoint.open(path)
        assert source.leaves.keys() == names
        np.testing.assert_array_equal(source.read("odd"), trees[name]["odd"])
    index.write_text(json.dumps({"weight_map": dict.fromkeys(trees["b"], "model.safetensors")}))
    assert checkpoint.open(tmp_path).leaves.keys() == trees["b"].keys()  # an index of the one file is no other model


def test_what_may_not_be_read(models, tmp_path, monkeypatch):
    path = save(tmp_path / "a", models[1]["a"]) / "model.safetensors"

    def refuse(file, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    with monkeypatch.context() as m:
        m.setattr(_remote, "open", refuse, raising=False)
        with pytest.raises(PermissionError, match=rf"{path} may not be read by this user; have its mode"):
            checkpoint.open(path.parent)
    path.unlink()
    path.symlink_to(tmp_path / "blobs/gone")  # as the cache of the Hub's client has it, cleaned up by hand
    with pytest.raises(FileNotFoundError, match=rf"{path} is not there, or is a link that leads nowhere; fetch it again"):
        checkpoint.open(path.parent)
    path.unlink()
    path.mkdir()
    with pytest.raises(IsADirectoryError, match=rf"{path} is a folder where a file should be"):
        checkpoint.open(path.parent)


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        checkpoint.open(tmp_path / "nothing")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"PyTorch pickles.*save it with save_pretrained"):
        checkpoint.open(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no weights: it is empty; safetensors are read, and what Orbax saved"):
        checkpoint.open(tmp_path / "empty")
    (tmp_path / "empty/config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds no weights: it has config\.json; .* Fetch it again"):
        checkpoint.open(tmp_path / "empty")
    for begins, message in (
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a pointer of Git LFS .* git lfs pull"),
        ("<!DOCTYPE html><html></html>", "is a web page and not a safetensors file"),
        ("nothing of the kind", "or is damaged: its header would have [0-9]+ bytes; fetch it again"),
        ("", "it has 0 bytes, .*; fetch it again"),
    ):
        (tmp_path / "model.safetensors").write_text(begins)
        with pytest.raises(ValueError, match=message):
            checkpoint.open(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"local paths, the Hub .org/name., https://, gs:// and s3://; download it first"):
        checkpoint.open("ftp://example.org/model.safetensors")
    with pytest.raises(ValueError, match=r"name an Orbax directory, a \.safetensors file"):
        checkpoint.open(tmp_path / "pytorch_model.bin")


def test_views(models):
    paths, trees = models
    source = checkpoint.open(paths["a"])
    view = checkpoint.renamed(source, {"layers/0": "model.layers.0.w", "layers/1": "model.layers.1.w", "odd": "odd"})
    np.testing.assert_array_equal(view.read("layers/1", (slice(2, 4),)), trees["a"]["model.layers.1.w"][2:4])
    assert view.extent("layers/0") == source.extent("model.layers.0.w")
    with pytest.raises(KeyError, match="a has no leaf"):
        checkpoint.renamed(source, {"x": "y"})
    assert checkpoint.subset(source, lambda n: "layers" in n).leaves.keys() == {n for n in trees["a"] if "layers" in n}

    stack = checkpoint.Derived(
        checkpoint.Leaf((2, 128, 96), np.dtype(ml_dtypes.bfloat16)),
        ((view, "layers/0"), (view, "layers/1")),
        lambda *layers: np.stack(layers),
        "stacked",
    )
    stacked = checkpoint.derived(checkpoint.subset(view, ["odd"]), {"layers": stack})
    want = np.stack([trees["a"][f"model.layers.{i}.w"] for i in range(2)])
    np.testing.assert_array_equal(stacked.read("layers", (slice(1, 2),)), want[1:])
    placed = stacked.load(dict.fromkeys(("layers", "odd"), SingleDeviceSharding(jax.devices()[0])))
    np.testing.assert_array_equal(placed["layers"], want)
    assert stacked.extent("layers") is None and stacked.files == source.files
    other = checkpoint.derived(checkpoint.subset(view, ["odd"]), {"layers": stack._replace(note="another")})
    assert len({s.identity() for s in (source, view, stacked, other)}) == 4
    wrong = checkpoint.derived(view, {"layers": stack._replace(leaf=checkpoint.Leaf((2, 96, 128), stack.leaf.dtype))})
    with pytest.raises(ValueError, match=r"layers \(stacked\) came out as"):
        wrong.read("layers")


def test_a_changed_file_is_another_source(tmp_path):
    before = checkpoint.open(save(tmp_path, tree(0))).identity()
    assert checkpoint.open(tmp_path).identity() == before
    save(tmp_path, tree(1))
    assert checkpoint.open(tmp_path).identity() != before


def test_ranges_through_tensorstore(models, monkeypatch):
    """Remote files are read by the same ranges; tensorstore's file driver stands in for a bucket."""
    paths, trees = models
    path = paths["a"] / "model.safetensors"
    monkeypatch.setattr(_remote, "is_remote", lambda path: True)
    monkeypatch.setattr(_remote, "stat", lambda path: (os.stat(path).st_size, 0))
    source = checkpoint.open(path)
    assert source.extent("big") is None
    np.testing.assert_array_equal(source.read("big", (slice(3, 5), slice(2, 9))), trees["a"]["big"][3:5, 2:9])
    np.testing.assert_array_equal(source.read("odd"), trees["a"]["odd"])
    with pytest.raises(OSError, match=r"asked for 10 bytes from .* on, got"):
        _remote.read(path, path.stat().st_size - 4, 10)
