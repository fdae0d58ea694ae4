"""What a plan says of memory is what the merge takes, in a process of its own."""

import os
import pathlib
import re
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxmerge import recipe

ROOT = pathlib.Path(__file__).parents[2]
LARGE = (2048, 4096)
"""A leaf whose four inputs take 67 MB, which is a quarter of all: too much to go unseen within a fifth."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("models"), np.random.default_rng(0)
    shapes = {"up": LARGE, "down": LARGE[::-1], "norm": LARGE[:1]}
    for name in ("base", "a", "b", "c"):
        (root / name).mkdir()
        leaves = {n: rng.standard_normal(s, np.float32).astype(ml_dtypes.bfloat16) for n, s in shapes.items()}
        save_file(leaves, root / name / "model.safetensors")
    return root


def taken(cache: pathlib.Path, *arguments: str) -> float:
    """Bytes that a command says it had at its most."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache), "COLUMNS": "160"}
    command = [sys.executable, "-m", "jaxmerge.cli", *arguments]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    found = re.search(r"([\d.]+) MB +│$", said, re.MULTILINE)
    assert found is not None, said
    return 1e6 * float(found[1])


@pytest.mark.skipif(sys.platform != "linux", reason="measured on Linux")
@pytest.mark.parametrize(
    ("method", "memory", "form"),
    [
        ("linear", None, "safetensors"),
        ("linear", None, "orbax"),
        ("ties", None, "safetensors"),
        ("ties", "40MB", "safetensors"),
    ],
)
def test_the_memory_that_is_stated_is_taken(models, tmp_path, method, memory, form):
    base = f'base_model: "{models}/base"\n' if method == "ties" else ""
    each = ", ".join(f'{{model: "{models}/{m}"}}' for m in "abc")
    density = ", density: 0.5" if method == "ties" else ""
    path = tmp_path / "recipe.yml"
    path.write_text(f"merge_method: {method}\n{base}models: [{each}]\nparameters: {{weight: 1{density}}}\n")
    [plan] = recipe.plan(path, memory=memory, format=form)
    stated = plan.headers.peak_bytes + plan.headers.runtime_bytes
    options = ["--format", form, *(["--memory", memory] if memory else [])]
    measured = taken(models, "merge", str(path), str(tmp_path / "out"), *options)
    assert abs(measured / stated - 1) < 0.2, (measured, stated)
    if method == "ties" and memory is None:  # else it would pass without the buffers
        assert abs(measured / plan.headers.runtime_bytes - 1) > 0.3 and abs(measured / plan.headers.peak_bytes - 1) > 0.3
