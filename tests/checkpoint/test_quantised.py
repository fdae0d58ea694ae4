"""Quantised checkpoints: copied byte for byte, refused by merges, or read as the numbers that their codes stand for."""

import json
import pathlib
import struct

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxmerge import checkpoint, cli, params, recipe

RNG = np.random.default_rng(0)
AT = "model.layers.{}.mlp.up_proj."
KINDS = {  # {dtype: (shape, bytes)} of every dtype that the format has, and of one that it has not yet
    "BOOL": ([8], 8), "U8": ([8], 8), "I8": ([8], 8), "F8_E4M3": ([8], 8), "F8_E5M2": ([8], 8), "F8_E8M0": ([8], 8),
    "F8_E4M3FNUZ": ([8], 8), "F8_E5M2FNUZ": ([8], 8), "I16": ([3], 6), "U16": ([3], 6), "F16": ([3], 6), "BF16": ([3], 6),
    "I32": ([3, 1], 12), "U32": ([3], 12), "F32": ([5], 20), "C64": ([1], 8), "F64": ([1], 8), "I64": ([1], 8), "U64": ([1], 8),
    "F4": ([2, 4], 4), "F6_E2M3": ([4], 3), "F6_E3M2": ([8], 6), "F2_UNKNOWN": ([9, 9], 21),
}  # fmt: skip


def write(path: pathlib.Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> pathlib.Path:
    """A file of any dtypes."""
    head, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        head[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(head).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def read(path: pathlib.Path) -> dict[str, tuple[str, list[int], bytes]]:
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    head = json.loads(content[8:begin])
    head.pop("__metadata__", None)
    part = lambda e: content[begin + e["data_offsets"][0] : begin + e["data_offsets"][1]]
    return {n: (e["dtype"], e["shape"], part(e)) for n, e in head.items()}


def tensor(x: np.ndarray) -> tuple[str, list[int], bytes]:
    names = {"float8_e4m3fn": "F8_E4M3", "int8": "I8", "float32": "F32", "bfloat16": "BF16", "int32": "I32"}
    return names[x.dtype.name], list(x.shape), x.tobytes()


def through(path: pathlib.Path, out: pathlib.Path, more: str = "") -> dict[str, tuple[str, list[int], bytes]]:
    recipe.merge(f"merge_method: passthrough\nmodels: [{{model: {path}}}]\n{more}", out)
    return read(out / "model.safetensors")


def test_every_dtype_passes_through(tmp_path):
    """Subnormal numbers too, which arithmetic may take for zero; of float8 even NaN, as they are codes."""
    tensors = {n: (n, shape, RNG.integers(0, 0x3F, size, np.uint8).tobytes()) for n, (shape, size) in KINDS.items()}
    tensors["F32"] = ("F32", [5], np.array([1e-45, -1e-40, 0.0, -0.0, 3e38], np.float32).tobytes())
    tensors["F8_E5M2"] = ("F8_E5M2", [8], bytes(range(0xF8, 0x100)))
    path = write(tmp_path / "in/model.safetensors", tensors)
    assert through(path, tmp_path / "out") == tensors
    found = checkpoint.verify(tmp_path / "out", params.passthrough(), models=[path], leaves=99)
    assert len(found.leaves) == len(KINDS) and not found.problems
    leaf = checkpoint.open(tmp_path / "out").leaves["F4"]
    assert leaf.stored == ("F4", (2, 4)) and leaf.bytes == 4
    with pytest.raises(recipe.RecipeError, match="is F4, which Orbax cannot hold; write safetensors"):
        recipe.plan(f"merge_method: passthrough\nformat: orbax\nmodels: [{{model: {path}}}]\n")


def fp8(seed: int) -> dict[str, np.ndarray]:
    """Two layers as DeepSeek-V3 stores them; blocks that are not full."""
    rng = np.random.default_rng(seed)
    found: dict[str, np.ndarray] = {"model.norm.weight": rng.standard_normal(140).astype(ml_dtypes.bfloat16)}
    for i in range(2):
        found[AT.format(i) + "weight"] = rng.standard_normal((260, 140)).astype(ml_dtypes.float8_e4m3fn)
        found[AT.format(i) + "weight_scale_inv"] = rng.random((3, 2), np.float32) + 0.5
    return found


def int8(seed: int) -> dict[str, np.ndarray]:
    """As compressed-tensors stores it: a factor for each row, and one of the activations."""
    rng = np.random.default_rng(seed)
    return {
        "model.norm.weight": rng.standard_normal(12).astype(ml_dtypes.bfloat16),
        AT.format(0) + "weight": rng.integers(-128, 128, (10, 12)).astype(np.int8),
        AT.format(0) + "weight_scale": rng.random((10, 1), np.float32).astype(ml_dtypes.bfloat16),
        AT.format(0) + "input_scale": np.ones(1, np.float32),
    }


def numbers(model: dict[str, np.ndarray], block: int = 128) -> dict[str, np.ndarray]:
    """Entry by entry, from the definition."""
    found = {}
    for n, x in model.items():
        scale = next((model[n + s].astype(np.float32) for s in ("_scale_inv", "_scale") if n + s in model), None)
        if scale is not None:
            rows, columns = (block, block) if n + "_scale_inv" in model else (1, x.shape[1])
            each = [[scale[i // rows, j // columns] for j in range(x.shape[1])] for i in range(x.shape[0])]
            found[n] = (x.astype(np.float32) * np.array(each, np.float32)).astype(ml_dtypes.bfloat16)
        elif "scale" not in n:
            found[n] = x
    return found


KINDS_OF_MODEL = {"fp8": fp8, "int8": int8}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("quantised")
    config = {"torch_dtype": "bfloat16", "num_hidden_layers": 2}
    fp8_config = config | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    int8_config = config | {"quantization_config": {"quant_method": "compressed-tensors", "format": "int-quantized"}}
    for kind, words in (("fp8", fp8_config), ("int8", int8_config)):
        for seed, name in enumerate("ab"):
            model = {n: tensor(x) for n, x in KINDS_OF_MODEL[kind](seed).items()}
            write(root / kind / name / "model.safetensors", model)
            (root / kind / name / "config.json").write_text(json.dumps(words))
    return root


def test_layers_of_a_quantised_model(saved, tmp_path):
    """Codes and scales of slices are copied, and are not cast with the rest."""
    text = "merge_method: passthrough\ndtype: float32\nslices:\n" + "".join(
        f"  - sources: [{{model: {saved}/fp8/a, layer_range: [{i}, {i + 1}]}}]\n" for i in (1, 0, 1)
    )
    recipe.merge(text, tmp_path / "out")
    got, was = read(tmp_path / "out/model.safetensors"), {n: tensor(x) for n, x in fp8(0).items()}
    for here, there in enumerate((1, 0, 1)):
        for part in ("weight", "weight_scale_inv"):
            assert got[AT.format(here) + part] == was[AT.format(there) + part]
    assert got["model.norm.weight"][0] == "F32"
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["num_hidden_layers"] == 3 and config["quantization_config"]["quant_method"] == "fp8"
    assert not recipe.verify(tmp_path / "out", leaves=99).problems


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_merging_codes_is_refused(saved, tmp_path, capsys, kind):
    a, b = saved / kind / "a", saved / kind / "b"
    says = rf"a is quantised \({AT.format(0)}.*more leaves\): codes have no mean .* dequantize it"
    with pytest.raises(checkpoint.MergeError, match=says):
        checkpoint.merge(params.linear(), None, [a, b], tmp_path / "out")
    with pytest.raises(checkpoint.MergeError, match=says):
        checkpoint.merge(params.passthrough(0.5), None, [a], tmp_path / "out")
    assert cli.main(["plan", "linear", "--models", str(a), str(b)]) == 2
    assert "is quantised" in capsys.readouterr().err
    plain = write(tmp_path / "plain/model.safetensors", {n: tensor(x) for n, x in numbers(KINDS_OF_MODEL[kind](0)).items()})
    assert any("b is quantised" in p for p in checkpoint.plan(params.linear(), None, [plain, b]).problems)
    models = f"[{{model: {plain}}}, {{model: {b}}}]"
    with pytest.raises(recipe.RecipeError, match=r"2:\d+: b is quantised .*dequantize: true in a recipe"):
        recipe.plan(f"merge_method: linear\nmodels: {models}\nparameters: {{weight: 1}}\n")


@pytest.mark.parametrize(("kind", "make"), KINDS_OF_MODEL.items())
def test_dequantised(saved, tmp_path, kind, make):
    """The same as merging the numbers, in blocks of any size; the configuration says that it is quantised no more."""
    text = (
        f"merge_method: linear\nmodels: [{{model: {saved}/{kind}/a}}, {{model: {saved}/{kind}/b}}]\nparameters: {{weight: 1}}\n"
    )
    recipe.merge(text + "dequantize: true\n", tmp_path / "out")
    trees = [numbers(make(seed)) for seed in (0, 1)]
    expected = params.merge(params.linear(), None, trees)
    got = checkpoint.open(tmp_path / "out")
    assert got.leaves.keys() == expected.keys()
    for n, value in expected.items():
        np.testing.assert_array_equal(got.read(n), np.asarray(value), err_msg=n)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert not recipe.verify(tmp_path / "out").problems
    source = checkpoint.dequantized(checkpoint.open(saved / kind / "a"))
    name = AT.format(0) + "weight"
    for index in ((), (slice(3, 9),), (slice(9, 10), slice(2, 11))):
        np.testing.assert_array_equal(source.read(name, index), trees[0][name][index])
    assert checkpoint.dequantized(checkpoint.open(tmp_path / "out")).identity() == got.identity()


def test_dequantised_by_a_method(saved, tmp_path, capsys):
    """The bytes of the recipe; a base that is not quantised is read as it is; verify reads as the merge did."""
    a, b = (str(saved / "fp8" / n) for n in "ab")
    assert cli.main(["plan", "linear", "--models", a, b, "--dequantize"]) == 0
    assert "nothing speaks against this merge" in capsys.readouterr().out
    assert cli.main(["merge", "linear", "--models", a, b, "--dequantize", "--out", str(tmp_path / "out")]) == 0
    text = f"merge_method: linear\nmodels: [{{model: {a}}}, {{model: {b}}}]\nparameters: {{weight: 1}}\ndequantize: true\n"
    recipe.merge(text, tmp_path / "by_recipe")
    assert read(tmp_path / "out/model.safetensors") == read(tmp_path / "by_recipe/model.safetensors")
    assert checkpoint.receipt(tmp_path / "out")["recipe"]["dequantize"] is True
    assert cli.main(["verify", str(tmp_path / "out")]) == 0 and "bit for bit" in capsys.readouterr().out
    base = write(tmp_path / "base/model.safetensors", {n: tensor(x) for n, x in numbers(fp8(2)).items()})
    files = ["--base", str(base), "--models", a, b, "--dequantize", "--out", str(tmp_path / "sum")]
    assert cli.main(["merge", "task-arithmetic", *files]) == 0
    expected = params.merge(params.task_arithmetic(), numbers(fp8(2)), [numbers(fp8(seed)) for seed in (0, 1)])
    got = checkpoint.open(tmp_path / "sum")
    for n, value in expected.items():
        np.testing.assert_array_equal(got.read(n), np.asarray(value), err_msg=n)
    other = write(tmp_path / "other/model.safetensors", {AT.format(0) + "weight_packed": tensor(np.ones((2, 2), np.int32))})
    capsys.readouterr()
    assert cli.main(["plan", "linear", "--models", str(other), "--dequantize"]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_float8_without_scales_are_numbers(tmp_path):
    x = [RNG.standard_normal((4, 6)).astype(ml_dtypes.float8_e4m3fn) for _ in "ab"]
    paths = [write(tmp_path / f"{i}/model.safetensors", {"w": tensor(v)}) for i, v in enumerate(x)]
    checkpoint.merge(params.linear(), None, paths, tmp_path / "out")
    mean = (x[0].astype(np.float32) + x[1].astype(np.float32)) / 2
    np.testing.assert_array_equal(checkpoint.open(tmp_path / "out").read("w"), np.asarray(jnp.asarray(mean).astype(x[0].dtype)))


def test_scales_of_a_model_are_none_of_codes(tmp_path):
    """CLIP's logit_scale, a layer's scales: numbers like any other."""
    tensors = {n: tensor(np.ones((2, 2), np.float32)) for n in ("logit_scale", "block.scales", "k_scale", "block.weight")}
    paths = [write(tmp_path / f"{i}/model.safetensors", tensors) for i in range(2)]
    assert not checkpoint.plan(params.linear(), None, paths).problems


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weight_scale": np.ones((3, 1), np.float32)}, r"weight_scale is \[3, 1\]; for \[10, 12\] it must be"),
        ({"weight_zero_point": np.ones((10, 1), np.int8)}, r"cannot be read: .*zero_point; known are"),
        ({"weight_packed": np.ones((10, 3), np.int32)}, r"cannot be read: .*weight_packed; known are"),
    ],
)
def test_unknown_layouts(tmp_path, change, says):
    model = int8(0) | {AT.format(0) + n: x for n, x in change.items()}
    path = write(tmp_path / "model.safetensors", {n: tensor(x) for n, x in model.items()})
    with pytest.raises(ValueError, match=says):
        checkpoint.dequantized(checkpoint.open(path))
    with pytest.raises(recipe.RecipeError, match=r"recipe:2:18: .*(must be|known are)"):
        recipe.plan(f"merge_method: linear\nmodels: [{{model: {path}, parameters: {{weight: 1}}}}]\ndequantize: true\n")
