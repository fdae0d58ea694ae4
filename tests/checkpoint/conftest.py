"""A small model in safetensors: a base, three experts; matrices, an odd shape, one number, integers, two dtypes."""

import pathlib

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

SHAPES = {
    "model.layers.0.w": (128, 96),
    "model.layers.1.w": (128, 96),
    "odd": (5, 7),
    "scale": (1,),
    "big": (96, 500),
}


def tree(seed: int, base: dict | None = None) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    if base is not None:
        change = {n: 0.002 * rng.standard_normal(v.shape) for n, v in base.items() if n != "step"}
        return {n: (v.astype(np.float32) + change[n]).astype(v.dtype) if n in change else v for n, v in base.items()}
    weights = {n: 0.02 * rng.standard_normal(s) for n, s in SHAPES.items()}
    out = {n: v.astype(np.float32 if n == "odd" else ml_dtypes.bfloat16) for n, v in weights.items()}
    return out | {"step": np.arange(3)}


def save(path: pathlib.Path, leaves: dict[str, np.ndarray]) -> pathlib.Path:
    path.mkdir(parents=True, exist_ok=True)
    save_file(leaves, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="package")
def models(tmp_path_factory):
    """Paths and contents of base, a, b, c."""
    root = tmp_path_factory.mktemp("models")
    base = tree(0)
    trees = {"base": base, **{n: tree(i, base) for i, n in enumerate("abc", 1)}}
    return {n: save(root / n, t) for n, t in trees.items()}, trees
