"""Published PyTorch layouts in and out: names by one function per family, kernels transposed, unknown keys refused.

A model whose layers are stacked (`models.fold`) loads and exports the same names, layer by layer.

Flax keeps a kernel as (in, out) or (height, width, in, out); PyTorch as (out, in) or (out, in, height, width). Everything
else has one shape in both.
"""

import pathlib
from collections.abc import Callable, Iterable, Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.fold import is_stacked, layer_paths

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
    """The tensors of a safetensors file."""
    from safetensors.numpy import load_file

    return load_file(path)


def write(path: str | pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file that PyTorch tools accept."""
    from safetensors.numpy import save_file

    save_file(dict(tensors), path, metadata={"format": "pt"})


def _leaves(model: nnx.Module) -> dict[str, nnx.Param]:
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
