"""Published layouts in and out: every file format gives the same model, and what does not fit is refused by name."""

import collections
import dataclasses
import functools
import io
import json
import os
import pickle
import sys
import types
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from models import load, mrt5, published, t5, t5x
from models.torch_file import read_torch
from tests.models import test_mrt5, test_t5
from tests.models.test_t5 import state_dict


@pytest.fixture(scope="module")
def tensors(golden):
    return {k: v for k, v in state_dict(golden("bytes/byt5_a")).items() if k not in t5.ALIASES}


@pytest.fixture(scope="module")
def gated(golden):
    return {k: v for k, v in state_dict(golden("bytes/mrt5_a")).items() if k not in t5.ALIASES}


class Storage:
    """What the pickle of a torch file calls a storage: a class by name, a key, a count."""

    def __init__(self, kind, key, numbers):
        self.kind, self.key, self.numbers = kind, key, numbers


def torch_bytes(tensors, kinds=None, *, root="archive/", shift=0, extra=None):
    """A file as `torch.save` writes it, made by hand: torch is not needed here."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    utils._rebuild_tensor_v2 = type("f", (), {})  # stands for the function: pickled by its name alone
    rebuild = utils._rebuild_tensor_v2
    rebuild.__module__, rebuild.__qualname__, rebuild.__name__ = "torch._utils", "_rebuild_tensor_v2", "_rebuild_tensor_v2"
    for name in ("FloatStorage", "BFloat16Storage", "LongStorage"):
        kind = type(name, (), {"__module__": "torch"})
        setattr(torch, name, kind)

    class Tensor:
        def __init__(self, storage, size, stride, offset):
            self.args = (storage, offset, size, stride, False, collections.OrderedDict())

        def __reduce__(self):
            return rebuild, self.args

    entries, described = {}, collections.OrderedDict()
    for i, (name, value) in enumerate(tensors.items()):
        kind = {np.dtype(np.int64): "LongStorage", np.dtype(jnp.bfloat16): "BFloat16Storage"}.get(value.dtype, "FloatStorage")
        entries[str(i)] = value.tobytes()
        stride = tuple(int(np.prod(value.shape[j + 1 :])) for j in range(value.ndim))
        described[name] = Tensor(Storage(getattr(torch, kind), str(i), value), value.shape, stride, shift)
    described |= extra or {}

    class Pickler(pickle._Pickler):  # the one in Python, which can be told how to write a name
        def persistent_id(self, obj):
            return ("storage", obj.kind, obj.key, "cpu", obj.numbers.size) if isinstance(obj, Storage) else None

        def save_global(self, obj, name=None):
            if obj is rebuild or getattr(obj, "__module__", "") == "torch":
                self.write(pickle.GLOBAL + f"{obj.__module__}\n{obj.__name__}\n".encode())
                self.memoize(obj)
            else:
                super().save_global(obj, name)

    Pickler.dispatch = {**pickle._Pickler.dispatch, type: Pickler.save_global}
    data = io.BytesIO()
    Pickler(data, 2).dump(described)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(f"{root}data.pkl", data.getvalue())
        archive.writestr(f"{root}byteorder", "little")
        for key, raw in entries.items():
            archive.writestr(f"{root}data/{key}", raw)
        archive.writestr(f"{root}version", "3\n")
    return out.getvalue()


def config_json(config, **changes):
    fields = published.config_to_json(config) | changes
    return json.dumps({k: v for k, v in fields.items() if v is not ...})


def assert_holds(model, tensors, name):
    got = load.export(model, name)
    assert got.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(got[key], value, err_msg=key)


@pytest.mark.parametrize("how", ["safetensors", "sharded", "bin", "sharded bin"])
def test_byt5_in_every_file_format(tmp_path, tensors, how):
    (tmp_path / "config.json").write_text(config_json(test_t5.CONFIG))
    given = tensors | {t5.ALIASES[0]: tensors["shared.weight"]}  # as published: a name that repeats
    if how == "safetensors":
        load.write(tmp_path / "model.safetensors", given)
    elif how == "sharded":
        load.write(tmp_path / "model.safetensors", given, shard_bytes=60_000)
        assert len(list(tmp_path.glob("model-0*-of-0*.safetensors"))) > 2
    elif how == "bin":
        (tmp_path / "pytorch_model.bin").write_bytes(torch_bytes(given))
    else:
        names = list(given)
        parts = {f"pytorch_model-0000{i}-of-00002.bin": names[i - 1 :: 2] for i in (1, 2)}
        for file, part in parts.items():
            (tmp_path / file).write_bytes(torch_bytes({n: given[n] for n in part}))
        where = {n: file for file, part in parts.items() for n in part}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    config, model = published.load_byt5(tmp_path, scan=how == "bin")
    assert config == test_t5.CONFIG
    assert_holds(model, tensors, t5.torch_name)


def test_mrt5_and_back(tmp_path, gated):
    name = functools.partial(mrt5.torch_name, gate_layer=2)
    (tmp_path / "config.json").write_text(config_json(test_mrt5.CONFIG, train_language="en", deletion_type=None))
    load.write(tmp_path / "model.safetensors", gated)
    config, model = published.load_mrt5(tmp_path, scan=True)
    assert config == test_mrt5.CONFIG
    assert_holds(model, gated, name)
    published.save(tmp_path / "again", config, model, shard_bytes=100_000)
    config, again = published.load_mrt5(tmp_path / "again")
    assert config == test_mrt5.CONFIG
    assert_holds(again, gated, name)
    with pytest.raises(ValueError, match="is an MrT5; read it with load_mrt5"):
        published.load_byt5(tmp_path)


def test_configs_that_describe_another_model():
    fields = published.config_to_json(t5.VARIANTS["small"])
    assert published.config_from_json(fields) == t5.VARIANTS["small"]
    wrong = {**fields, "feed_forward_proj": "relu", "rope_theta": 10.0, "model_type": "bert"}
    del wrong["d_kv"]
    with pytest.raises(ValueError, match=r"(?s)model_type is 'bert'.*d_kv is missing.*feed_forward_proj is 'relu'.*rope_theta"):
        published.config_from_json(wrong)
    gated = published.config_to_json(test_mrt5.CONFIG)
    with pytest.raises(ValueError, match="deletion_threshold -3"):
        published.config_from_json({**gated, "deletion_threshold": -3.0})
    with pytest.raises(ValueError, match="delete_gate_layer is missing"):
        published.config_from_json({k: v for k, v in gated.items() if k != "delete_gate_layer"})


def test_a_tied_head_is_said_aloud(tensors):
    without = {k: v for k, v in tensors.items() if k != "lm_head.weight"}
    for given, text in (
        (without, "lm_head.weight is missing"),
        (without | {"lm_head.weight": tensors["shared.weight"]}, "equals shared.weight"),
    ):
        with pytest.raises(ValueError, match=text):
            published.with_head(given)
        np.testing.assert_array_equal(published.with_head(given, tied="copy")["lm_head.weight"], tensors["shared.weight"])
    with pytest.raises(ValueError, match=r"encoder\.embed_tokens\.weight differs from shared\.weight"):
        published.with_head(tensors | {"encoder.embed_tokens.weight": tensors["lm_head.weight"]})


def test_t5x_and_back(tmp_path, tensors):
    model = published.blank(t5.T5, test_t5.CONFIG)
    load.load(model, tensors, t5.torch_name)
    t5x.write_t5x(tmp_path / "checkpoint_7", load.export(model, t5x.t5x_name), step=7)
    folder = tmp_path / "checkpoint_7/target.encoder.layers_1.attention.query.kernel"
    assert json.loads((folder / ".zarray").read_text())["shape"] == [32, 24]  # (in, out), as T5X has it
    got = t5x.read_t5x(tmp_path / "checkpoint_7")
    assert got["encoder.relpos_bias.rel_embedding"].shape == (32, 2)
    config = published.t5_config_of(got, dataclasses.replace(t5.T5Config(), dropout=0.0))
    assert config == test_t5.CONFIG
    scanned = published.blank(t5.T5, config, scan=True)
    load.load(scanned, got, t5x.t5x_name)
    assert_holds(scanned, tensors, t5.torch_name)
    with pytest.raises(ValueError, match=r"(?s)unknown to the model: decoder\.surprise"):
        load.load(scanned, got | {"decoder.surprise": np.zeros(2)}, t5x.t5x_name)
    with pytest.raises(ValueError, match="is not empty"):
        t5x.write_t5x(tmp_path / "checkpoint_7", {})
    with pytest.raises(ValueError, match=r"has no arrays named target\.\*"):
        t5x.read_t5x(tmp_path)


def test_small_arrays_that_t5x_keeps_in_its_tree(tmp_path):
    from flax import serialization

    tree = {"version": 3, "optimizer": {"target": {"encoder": {"encoder_norm": {"scale": np.arange(3.0, dtype=np.float32)}}}}}
    (tmp_path / "checkpoint").write_bytes(serialization.msgpack_serialize(tree))
    assert t5x.read_t5x(tmp_path)["encoder.encoder_norm.scale"].tolist() == [0, 1, 2]


def test_torch_files_by_hand(tmp_path):
    given = {
        "w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "half": np.arange(4).astype(jnp.bfloat16),
        "count": np.array(5, np.int64),
        "none": np.zeros((0, 3), np.float32),
    }
    path = tmp_path / "x.bin"
    path.write_bytes(torch_bytes(given))
    for name, value in load.read(path).items():
        assert value.dtype == given[name].dtype and value.shape == given[name].shape
        np.testing.assert_array_equal(value, given[name])


class Evil:
    def __reduce__(self):
        return os.system, ("echo harm",)


def test_torch_files_that_are_refused(tmp_path):
    one = {"w": np.arange(6, dtype=np.float32)}
    path = tmp_path / "x.bin"

    def refused(content, text):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=text):
            read_torch(path)

    refused(torch_bytes(one, extra={"evil": Evil()}), r"names (posix|nt)\.system, which is no part of a tensor.*Refused")
    refused(torch_bytes(one, extra={"step": 3}), "holds more than tensors: step")
    refused(torch_bytes(one, shift=1), "w reaches number 6 of a storage that has 6")
    refused(b"\x80\x02}q\x00.", "no zip archive: PyTorch before 1.6")
    whole = torch_bytes(one)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name)[:8] if name.endswith("data/0") else old.read(name))
    refused(out.getvalue(), "has 8 bytes, not 6 times float32")
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        new.writestr("archive/data.pkl", b"x" * 100)
    refused(out.getvalue(), "is compressed")


def test_files_that_are_missing_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"neither \*\.safetensors nor pytorch_model\.bin"):
        load.read(tmp_path)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model-1.bin"}}))
    with pytest.raises(ValueError, match=r"lacks pytorch_model-1\.bin"):
        load.read(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        published.read_config(tmp_path)
    assert "torch" not in sys.modules
