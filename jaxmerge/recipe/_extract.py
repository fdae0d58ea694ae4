"""Adapters taken out of a model: the nearest low-rank update of each matrix, and what it loses."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxmerge.checkpoint import Source
from jaxmerge.checkpoint._safetensors import NAMES
from jaxmerge.recipe._adapters import PREFIX, of_ranks
from jaxmerge.recipe._names import regex
from jaxmerge.recipe._tokenizer import dump


class Extraction(NamedTuple):
    """What an adapter keeps of a model's change.

    Attributes:
      ranks: {weight: rank}.
      errors: {weight: norm of what is lost over the norm of the change}.
      left: {tensor: norm of its change}, of changes that no factors hold.
    """

    ranks: dict[str, int]
    errors: dict[str, float]
    left: dict[str, float]


def extract(
    model: Source, base: Source, *, rank: int = 32, error: float = 0.0, include: str = "", exclude: str = "embed|lm_head|head$"
) -> tuple[dict[str, np.ndarray], dict[str, str], Extraction]:
    """The difference of two models as an adapter: of each matrix its leading singular vectors, no update of the rank is nearer.

    Args:
      model, base: what was trained, and from what.
      rank: the most that a matrix keeps.
      error: a matrix keeps no more than it needs to lose at most this share of its change (Frobenius norm); 0: all of `rank`.
      include, exclude: regular expressions of names; matrices that are not taken stay behind, and are reported.

    Returns:
      The adapter's tensors, the files beside them, and what is lost.

    Raises:
      ValueError: tensors that differ in name or shape, no rank, no share, no regular expression, or no matrix to take.
    """
    import jax.numpy as jnp

    if rank < 1 or not 0 <= error < 1:
        raise ValueError(f"extract: rank must be 1 or more and error at least 0 and below 1; got {rank} and {error}.")
    wants, leaves_out = regex("include", include), regex("exclude", exclude)
    differ = sorted(n for n in model.leaves.keys() & base.leaves.keys() if model.leaves[n].shape != base.leaves[n].shape)
    lacking = sorted(base.leaves.keys() ^ model.leaves.keys())
    if differ or lacking:
        raise ValueError(
            f"{model.name} and {base.name} differ in {', '.join((differ + lacking)[:3])}; extract from models alike."
        )
    tensors, ranks, errors, left = {}, {}, {}, {}
    for name, leaf in base.leaves.items():
        if leaf.dtype is None or leaf.dtype.kind in "iub":
            continue
        change = model.read(name).astype(np.float32) - base.read(name).astype(np.float32)
        norm = float(np.linalg.norm(change))
        wanted = wants.search(name) and not (exclude and leaves_out.search(name))
        if norm == 0 or len(leaf.shape) != 2 or not name.endswith(".weight") or not wanted:
            left |= {name: norm} if norm else {}
            continue
        u, s, v = (np.asarray(x) for x in jnp.linalg.svd(jnp.asarray(change), full_matrices=False))
        squares = np.append(s.astype(np.float64) ** 2, 0)
        lost = np.sqrt(np.cumsum(squares[::-1])[-2::-1]) / norm  # beyond each rank, from 1 on
        k = min(rank, int(np.argmax(lost <= error)) + 1 if error else rank, len(s))
        root = np.sqrt(s[:k])
        module = name.removesuffix(".weight")
        tensors[f"{PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(root[:, None] * v[:k]).astype(leaf.dtype)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(u[:, :k] * root).astype(leaf.dtype)
        ranks[module], errors[name] = k, float(lost[k - 1])
    if not ranks:
        why = "none of those that changed is a matrix whose name is included" if left else "nothing changed"
        raise ValueError(f"extract: {model.name} has no update to take out of it over {base.name}: {why}.")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.path),
        "target_modules": sorted({m.rsplit(".", 1)[-1] for m in ranks}),
        "bias": "none",
        "fan_in_fan_out": False,
        "lora_dropout": 0.0,
        "inference_mode": True,
    } | of_ranks(ranks)
    return (
        tensors,
        {"adapter_config.json": dump(config)},
        Extraction({f"{m}.weight": r for m, r in ranks.items()}, errors, left),
    )


def write(out: str | pathlib.Path, tensors: Mapping[str, np.ndarray], files: Mapping[str, str]) -> None:
    """An adapter as a folder of the Hub.

    Raises:
      FileExistsError: something is there.
    """
    folder = pathlib.Path(out)
    folder.mkdir(parents=True)
    at = 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, x in tensors.items():
        header[name] = {"dtype": NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [at, at + x.nbytes]}
        at += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for x in tensors.values():
            file.write(x.tobytes())
    for name, content in files.items():
        (folder / name).write_text(content)
