"""T5X checkpoints of T5 v1.1 and ByT5: one zarr array per parameter, beside a msgpack file that holds the small rest.

    checkpoint_1000000/checkpoint                                                  the tree, arrays left out
    checkpoint_1000000/target.encoder.layers_0.attention.query.kernel/.zarray 0.0 ...

T5X has kernels as Flax does, (in, out), and the position table as (heads, buckets). `read_t5x` hands them over in PyTorch's
orientation, as `models.load` expects, under T5X's names.

Source: T5X (arXiv:2203.17189) and the layout of its public checkpoints.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

LEAVES = {"q": "query", "k": "key", "v": "value", "o": "out"}


def t5x_name(path: str) -> str:
    """T5X's name for a parameter, dotted, for `models.load.load`.

    Example:
      >>> from models.t5x import t5x_name
      >>> t5x_name("decoder.blocks.3.cross.q.kernel"), t5x_name("head.kernel")
      ('decoder.layers_3.encoder_decoder_attention.query.kernel', 'decoder.logits_dense.kernel')
    """
    fixed = {"embedding": "token_embedder.embedding", "head.kernel": "decoder.logits_dense.kernel"}
    if path in fixed:
        return fixed[path]
    stack, rest = path.split(".", 1)
    if rest == "position":
        return f"{stack}.relpos_bias.rel_embedding"
    if rest == "norm.scale":
        return f"{stack}.{stack}_norm.scale"
    found = re.fullmatch(r"blocks\.(\d+)\.(attention|cross|ffn)(_norm\.scale|\.(\w+)\.kernel)", rest)
    if stack not in ("encoder", "decoder") or found is None:
        raise ValueError(f"t5x_name: {path!r} is no parameter of T5.")
    block, part, tail, leaf = found.groups()
    own = "attention" if stack == "encoder" else "self_attention"
    if tail == "_norm.scale":
        norm = {"attention": f"pre_{own}_layer_norm", "cross": "pre_cross_attention_layer_norm", "ffn": "pre_mlp_layer_norm"}
        return f"{stack}.layers_{block}.{norm[part]}.scale"
    inner = {"attention": own, "cross": "encoder_decoder_attention", "ffn": "mlp"}[part]
    return f"{stack}.layers_{block}.{inner}.{LEAVES.get(leaf, leaf)}.kernel"


def read_t5x(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """The parameters of a T5X checkpoint, by T5X's names, in PyTorch's orientation. The optimiser's state is not read.

    Raises:
      ValueError: no parameters there, or a layout of scanned layers, whose names have no number.
    """
    import tensorstore as ts

    path = pathlib.Path(path)
    tree = _flat(_msgpack(path / "checkpoint").get("optimizer", {}).get("target", {}))
    found = {k: v for k, v in tree.items() if isinstance(v, np.ndarray)}  # small ones may lie in the tree itself
    for folder in sorted(path.glob("target.*")):
        if (folder / ".zarray").exists():
            spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(folder.absolute())}}
            found[folder.name.removeprefix("target.")] = np.asarray(ts.open(spec, read=True).result().read().result())
    if not found:
        raise ValueError(f"read_t5x: {path} has no arrays named target.*; name a directory such as .../checkpoint_1000000.")
    if scanned := [n for n in found if re.search(r"\.layers?\.", n)]:
        raise ValueError(
            f"read_t5x: {scanned[0]} holds scanned layers, which ByT5's public checkpoints do not; unstack them first."
        )
    return {name: _turned(name, value) for name, value in found.items()}


def write_t5x(path: str | pathlib.Path, tensors: Mapping[str, np.ndarray], *, step: int = 0) -> None:
    """Write parameters, by T5X's names and in PyTorch's orientation, as a T5X checkpoint without optimiser state."""
    import tensorstore as ts
    from flax import serialization

    path = pathlib.Path(path)
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"write_t5x: {path} is not empty; choose another place.")
    path.mkdir(parents=True, exist_ok=True)
    target: dict[str, Any] = {}
    for name, value in tensors.items():
        value = np.ascontiguousarray(_turned(name, np.asarray(value)))
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str((path / f"target.{name}").absolute())}}
        store = ts.open(
            spec,
            create=True,
            dtype=ts.dtype(value.dtype.name),
            shape=value.shape,
            chunk_layout=ts.ChunkLayout(chunk_shape=value.shape),
        ).result()
        store.write(value).result()
        *parents, leaf = name.split(".")
        node = target
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"target.{name}"},
            "metadata": {"shape": list(value.shape)},
        }
    tree = {"version": 3, "optimizer": {"target": target, "state": {"step": np.int32(step), "param_states": {}}}}
    (path / "checkpoint").write_bytes(serialization.msgpack_serialize(tree))


def _turned(name: str, value: np.ndarray) -> np.ndarray:
    return value.T if name.endswith((".kernel", ".rel_embedding")) and value.ndim == 2 else value


def _msgpack(path: pathlib.Path) -> Any:
    from flax import serialization

    return serialization.msgpack_restore(path.read_bytes()) if path.exists() else {}


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    out = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return out
