"""The same answer as mergekit: every recipe of mergekit_cases, run by mergekit and by us on the same safetensors models.

    python -m venv /tmp/mergekit && /tmp/mergekit/bin/pip install mergekit==0.1.5 torch
    python -m scripts.bench.mergekit_parity --mergekit /tmp/mergekit/bin/python --out runs/parity
    python -m scripts.bench.mergekit_parity --mergekit /tmp/mergekit/bin/python --record-to tests/golden/recipe

Prints the largest difference for each recipe. dare and della draw masks: ours are merged with those that mergekit drew.
`--record-to` writes mergekit's outputs on the smallest models where the tests look for them.
"""

import hashlib
import json
import pathlib
import subprocess
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from scripts.bench import mergekit_cases as cases


def run_mergekit(python: pathlib.Path, out: pathlib.Path, size: cases.Size) -> None:
    """Write models and recipes to `out`, and what mergekit makes of them."""
    cases.write(out / "models", size)
    jobs = []
    for name in cases.RECIPES:
        (out / f"{name}.yml").write_text(cases.recipe(name, out / "models"))
        paths = {"recipe": f"{name}.yml", "out": f"mergekit/{name}", "masks": f"{name}.masks.npz"}
        jobs.append({key: str(out / path) for key, path in paths.items()} | {"seed": 7})
    (out / "jobs.json").write_text(json.dumps(jobs))
    script = pathlib.Path(__file__).with_name("mergekit_run.py")
    with (out / "mergekit.log").open("w") as log:
        subprocess.run([python, script, out / "jobs.json"], stdout=log, stderr=log, check=True)


def record(out: pathlib.Path, folder: pathlib.Path, size: cases.Size) -> None:
    """mergekit's outputs as golden vectors: one npz a recipe, its tensors flat, one after the other in the order of names."""
    from jaxmerge import checkpoint

    folder.mkdir(parents=True, exist_ok=True)
    models = cases.tensors(size)
    stamp = hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for m in models.values() for x in m.values())).hexdigest()
    manifest: dict[str, Any] = {
        "_source": "mergekit 0.1.5, torch 2.13.0 on a CPU: run_merge on the models of scripts/bench/mergekit_cases.py",
        "_made": "python -m scripts.bench.mergekit_parity --mergekit PYTHON --record-to tests/golden/recipe",
        "_models_sha256": stamp,
    }
    for name in cases.RECIPES:
        merged = checkpoint.open(out / "mergekit" / name)
        layout = {n: [list(merged.leaves[n].shape), str(merged.leaves[n].dtype)] for n in sorted(merged.leaves)}
        arrays = {"out": np.concatenate([np.asarray(merged.read(n), np.float32).reshape(-1) for n in layout])}
        with np.load(out / f"{name}.masks.npz") as masks:
            if name in cases.RANDOM:
                arrays |= {f"mask/{n}": np.packbits(masks[n].reshape(-1)) for n in masks.files}
        np.savez_compressed(folder / f"{name}.npz", **arrays)  # type: ignore[arg-type]
        config = json.loads((out / "mergekit" / name / "config.json").read_text())
        entry: dict[str, Any] = {
            "config": {k: config.get(k) for k in ("num_hidden_layers", "vocab_size", "dtype", "torch_dtype")}
        }
        tokenizer = out / "mergekit" / name / "tokenizer.json"
        if tokenizer.exists():
            vocabulary = json.loads(tokenizer.read_text())
            entry["vocabulary"] = vocabulary["model"]["vocab"] | {a["content"]: a["id"] for a in vocabulary["added_tokens"]}
        entry["layout"] = "base" if layout == _layout(models["base"]) else layout
        manifest[name] = entry
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def _layout(model: dict[str, np.ndarray]) -> dict[str, list]:
    return {n: [list(model[n].shape), str(model[n].dtype)] for n in sorted(model)}


def main(
    mergekit: pathlib.Path,
    out: pathlib.Path = pathlib.Path("runs/parity"),
    record_to: pathlib.Path | None = None,
    hidden: int = 32,
) -> None:
    """Compare.

    Args:
      mergekit: the Python that mergekit 0.1.5 is installed for.
      out: where models, recipes and results go.
      record_to: write golden vectors here, on the smallest models, and compare nothing.
      hidden: width of the models.
    """
    out = out.absolute()
    if record_to is not None:
        run_mergekit(mergekit, out, cases.Size())
        record(out, record_to, cases.Size())
        return
    run_mergekit(mergekit, out, cases.Size(hidden, 3 * hidden // 2, 2 * hidden, 4, 2))
    table = Table("recipe", "largest difference", "in units of the tensor's largest entry", "where")
    Console().print(table)


if __name__ == "__main__":
    tyro.cli(main)
