"""The same answer as mergekit: every recipe of mergekit_cases, run by mergekit and by us on the same safetensors models.

    python -m venv .venv-mergekit && .venv-mergekit/bin/pip install mergekit==0.1.5 torch
    python -m scripts.bench.mergekit_parity --mergekit .venv-mergekit/bin/python --out runs/parity
    python -m scripts.bench.mergekit_parity --mergekit .venv-mergekit/bin/python --record-to tests/golden/recipe

Prints the largest difference for each recipe, and how many entries differ by more than rounding explains: none should. (In
larger models arcee_fusion may: mergekit takes an entry or leaves it by a divergence that is a small difference of large sums.)
dare and della draw masks: ours are merged with those that mergekit drew. `--record-to` writes mergekit's outputs on the
smallest models where the tests look for them.
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
from scripts.refusals import refusals


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
        if "tokenizer" in cases.RECIPES[name]:
            vocabulary = json.loads(tokenizer.read_text())
            entry["vocabulary"] = vocabulary["model"]["vocab"] | {a["content"]: a["id"] for a in vocabulary["added_tokens"]}
        entry["layout"] = "base" if layout == _layout(models["base"]) else layout
        manifest[name] = entry
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def _layout(model: dict[str, np.ndarray]) -> dict[str, list]:
    return {n: [list(model[n].shape), str(model[n].dtype)] for n in sorted(model)}


def with_masks(masks: dict[str, np.ndarray]) -> Any:
    """A masking atom with what mergekit drew, in place of ours."""
    import jax.numpy as jnp

    from jaxmerge.params._transform import Step, atom

    def settings(name: str, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        ones = np.ones(shape[1:], np.uint8)  # a density of 1 draws nothing
        return {"mask": np.stack([masks.get(f"{name}#{k}", ones).reshape(shape[1:]) for k in range(shape[0])])}

    return atom(Step(settings, lambda s, x: s, lambda plan, x: jnp.where(plan["mask"] != 0, x, 0)))


def merge(name: str, out: pathlib.Path) -> None:
    """Our merge of a recipe, through the engine."""
    from jaxmerge import recipe
    from jaxmerge.recipe import _methods

    method = _methods.METHODS.get(name)
    if name in cases.RANDOM and method is not None:
        with np.load(out / f"{name}.masks.npz") as z:
            masks = dict(z)
        build = _methods.arithmetic(lambda v: with_masks(masks), signs=name in ("dare_ties", "della"))
        _methods.METHODS[name] = method._replace(build=build)
    recipe.merge(out / f"{name}.yml", out / "jaxmerge" / name, overwrite=True)
    if method is not None:
        _methods.METHODS[name] = method


def words(folder: pathlib.Path) -> dict[str, int] | None:
    """{token: row} of an output that has a vocabulary of its own."""
    if "tokenizer" not in cases.RECIPES[folder.name]:
        return None
    data = json.loads((folder / "tokenizer.json").read_text())
    return data["model"]["vocab"] | {a["content"]: a["id"] for a in data["added_tokens"]}


def distance(ours: pathlib.Path, theirs: pathlib.Path) -> tuple[float, float, int, str]:
    """The largest difference of two outputs in units of what rounding allows, and as it is; how many entries are beyond; where.

    Rows of tables are compared by their tokens.
    """
    from jaxmerge import checkpoint
    from jaxmerge.recipe._names import vocabulary_axis

    a, b = checkpoint.open(ours), checkpoint.open(theirs)
    if a.leaves.keys() != b.leaves.keys():
        raise SystemExit(f"{ours} and {theirs} have other tensors: {sorted(a.leaves.keys() ^ b.leaves.keys())[:5]}")
    mine, peers = words(ours), words(theirs)
    worst, beyond = (0.0, 0.0, ""), 0
    for n, leaf in b.leaves.items():
        x, y = (np.asarray(s.read(n), np.float32) for s in (a, b))
        if mine and peers and vocabulary_axis(n) is not None:
            tokens = sorted(peers)
            rest = list(range(len(peers), len(y)))
            x, y = x[[mine[t] for t in tokens] + rest], y[[peers[t] for t in tokens] + rest]
        assert leaf.dtype is not None
        last = 2.0**-7 if leaf.dtype.itemsize == 2 else 2e-5  # one bfloat16 unit; sums of float32 in another order
        apart = np.abs(x - y)
        allowed = last * np.abs(y) + 2e-6
        worst = max(worst, (float((apart / allowed).max(initial=0)), float(apart.max(initial=0)), n))
        beyond += int(np.count_nonzero(apart > allowed))
    return worst[0], worst[1], beyond, worst[2]


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
    table = Table("recipe", "largest difference", "of what rounding allows", "entries beyond", "in")
    failed = []
    for name in cases.RECIPES:
        merge(name, out)
        share, apart, beyond, where = distance(out / "jaxmerge" / name, out / "mergekit" / name)
        table.add_row(name, f"{apart:.1e}", f"{100 * share:.3g} %", str(beyond), where)
        if beyond > (5 if name == "arcee_fusion" else 0):
            failed.append(name)
    Console().print(table)
    if failed:
        raise SystemExit(f"these differ: {', '.join(failed)}")


if __name__ == "__main__":
    with refusals():
        tyro.cli(main, prog=f"python -m {__spec__.name}", description=__doc__)
