"""Published PyTorch layouts in and out: names by one function per family, kernels transposed, unknown keys refused.

A model whose layers are stacked (`models.fold`) loads and exports the same names, layer by layer.

Flax keeps a kernel as (in, out) or (height, width, in, out); PyTorch as (out, in) or (out, in, height, width). Everything
else has one shape in both.
"""

import json
import pathlib
from collections.abc import Callable, Iterable, Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.fold import is_stacked, layer_paths
from models.torch_file import read_torch

TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}
FROM_TORCH = {2: (1, 0), 4: (2, 3, 1, 0)}


def load(
    model: nnx.Module,
    tensors: Mapping[str, np.ndarray],
    torch_name: Callable[[str], str],
    *,
    ignore: Iterable[str] = (),
) -> None:
    """Fill a model's parameters, in place, from tensors in a PyTorch layout.

    Args:
      model: parameters keep their dtype; their path is dotted ("encoder.blocks.0.attn.q.kernel").
      tensors: the checkpoint.
      torch_name: the checkpoint's name for a path.
      ignore: checkpoint names to leave out on purpose (aliases of tied tensors).

    Raises:
      ValueError: names missing on either side, or shapes that differ; all of them in one message, nothing loaded.
    """
    leaves = _leaves(model)
    layers = {path: layer_paths(path, leaf.shape[0] if leaf.shape else 0) for path, leaf in leaves.items()}
    wanted = {torch_name(one): path for path, several in layers.items() for one in several}
    given = set(tensors) - set(ignore)
    problems = [f"  missing in the checkpoint: {n} (for {wanted[n]})" for n in sorted(wanted.keys() - given)]
    problems += [f"  unknown to the model: {n} {np.shape(tensors[n])}" for n in sorted(given - wanted.keys())]
    values = {}
    for name in sorted(wanted.keys() & given):
        path = wanted[name]
        value = np.asarray(tensors[name])
        if path.endswith("kernel") and value.ndim in FROM_TORCH:
            value = value.transpose(FROM_TORCH[value.ndim])
        shape = leaves[path].shape[1:] if is_stacked(path) else leaves[path].shape
        if value.shape != shape:
            problems.append(f"  shape of {name}: {value.shape} in our layout, the model has {shape}")
        values[name] = value
    if problems:
        raise ValueError("load: the checkpoint does not fit the model:\n" + "\n".join(problems))
    for path, several in layers.items():
        parts = [values[torch_name(one)] for one in several]
        leaves[path][...] = jnp.asarray(np.stack(parts) if is_stacked(path) else parts[0], leaves[path].dtype)


def export(model: nnx.Module, torch_name: Callable[[str], str]) -> dict[str, np.ndarray]:
    """The model's parameters in a PyTorch layout, the inverse of `load`."""
    out = {}
    for path, leaf in _leaves(model).items():
        whole = np.asarray(leaf[...])
        several = layer_paths(path, whole.shape[0] if whole.shape else 0)
        for one, value in zip(several, whole if is_stacked(path) else [whole], strict=True):
            if path.endswith("kernel") and value.ndim in TO_TORCH:
                value = value.transpose(TO_TORCH[value.ndim])
            out[torch_name(one)] = np.ascontiguousarray(value)
    return out


def read(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a published model: a safetensors or PyTorch file, or a directory with one, or with several and an index.

    Raises:
      ValueError: nothing of the kind there, files that the index names and that are missing, or files that disagree with it.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        names = sorted(p.name for p in path.iterdir())
        if any(n.endswith(".safetensors") for n in names):
            return _safetensors(path)
        if "pytorch_model.bin.index.json" in names:
            where = json.loads((path / "pytorch_model.bin.index.json").read_text())["weight_map"]
            if missing := sorted(set(where.values()) - set(names)):
                raise ValueError(f"read: {path} lacks {', '.join(missing)}, which its index names; fetch them.")
            tensors = {file: read_torch(path / file) for file in sorted(set(where.values()))}
            held = {name: file for file, found in tensors.items() for name in found}
            if wrong := sorted(n for n in held.keys() | where.keys() if held.get(n) != where.get(n)):
                raise ValueError(f"read: {path}: index and files disagree about {', '.join(wrong[:5])}.")
            return {name: tensors[file][name] for name, file in where.items()}
        if "pytorch_model.bin" in names:
            return read_torch(path / "pytorch_model.bin")
        raise ValueError(f"read: {path} has neither *.safetensors nor pytorch_model.bin; it has {names[:8]}.")
    return read_torch(path) if path.suffix in (".bin", ".pt", ".pth") else _safetensors(path)


def _safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    from jaxmerge import checkpoint

    source = checkpoint.open(path)
    return {name: source.read(name) for name in source.leaves}


def write(path: str | pathlib.Path, tensors: Mapping[str, np.ndarray], *, shard_bytes: int | None = None) -> None:
    """Write a safetensors file that PyTorch tools accept; beyond `shard_bytes`, several files and an index as on the Hub."""
    from safetensors.numpy import save_file

    path = pathlib.Path(path)
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, value in tensors.items():
        if shard_bytes and shards[-1] and sum(v.nbytes for v in shards[-1].values()) + value.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = value
    if len(shards) == 1:
        save_file(shards[0], path, metadata={"format": "pt"})
        return
    files = [f"{path.stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, path.parent / file, metadata={"format": "pt"})
    where = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": sum(v.nbytes for v in tensors.values())}, "weight_map": where}
    (path.parent / f"{path.name}.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _leaves(model: nnx.Module) -> dict[str, nnx.Param]:
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
