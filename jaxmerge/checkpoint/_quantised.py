"""Quantised checkpoints: codes whose scales lie beside them. They are copied as they are; to merge them is refused, unless they
are read as the numbers that they stand for."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from jaxmerge.checkpoint._source import Extent, Format, Index, Leaf, Source, digest, place

BESIDE = re.compile(
    r"(?:[._](?:weight|input|output|k|v|q)_scale(?:_inv|_2)?"  # FP8, compressed-tensors, ModelOpt
    r"|\.weight_(?:zero_point|packed|shape|g_idx|global_scale)"
    r"|\.(?:qweight|qzeros|scales|g_idx)"  # GPTQ, AWQ
    r"|\.(?:SCB|weight_format|(?:nested_)?(?:absmax|quant_map)|quant_state\.\w+)"  # bitsandbytes
    r"|_(?:blocks|scales))$"  # MXFP4
)
"""What stands beside codes."""
ACTIVATIONS = re.compile(r"[._](?:input|output|k|v|q)_scale$")
CODES = (np.uint8, np.int8, np.int32, np.uint32)


def is_code(name: str, leaf: Leaf, scaled: bool) -> bool:
    """Whether a leaf is part of what is quantised: codes, or what stands beside them.

    Args:
      scaled: whether scales stand in this checkpoint at all; float8 without any are numbers.
    """
    if leaf.stored is not None or leaf.dtype == jnp.float8_e8m0fnu:
        return True
    if leaf.dtype is None or not scaled:
        return False
    small = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize == 1
    return small or BESIDE.search(name) is not None or (leaf.dtype.type in CODES[:2] and len(leaf.shape) > 1)


def quantised(source: Source) -> tuple[str, ...]:
    """The leaves of a source that are quantised, or belong to such."""
    scaled = any(BESIDE.search(n) and leaf.dtype is not None for n, leaf in source.leaves.items() if _stands_beside(source, n))
    return tuple(n for n, leaf in source.leaves.items() if is_code(n, leaf, scaled))


def _stands_beside(source: Source, name: str) -> bool:
    """Whether codes are where a scale says that they are; models have scales of their own too."""
    found = BESIDE.search(name)
    if found is None:
        return False
    stem = name[: found.start()]
    kin = (
        n for n in (f"{stem}.weight", f"{stem}.qweight", f"{stem}.weight_packed", f"{stem}_blocks", stem) if n in source.leaves
    )
    return any(
        leaf.stored is not None or (leaf.dtype is not None and (leaf.dtype.type in CODES or leaf.dtype.itemsize == 1))
        for leaf in map(source.leaves.__getitem__, kin)
    )


def refusal(source: Source, names: Sequence[str]) -> str:
    """Why codes are not merged, and what to do."""
    more = f" and {len(names) - 1} more leaves" if len(names) > 1 else ""
    kind = source.leaves[names[0]]
    what = kind.stored[0] if kind.stored else kind.dtype
    return (
        f"{source.name} is quantised ({names[0]}, {what}{more}): codes have no mean without their scales; merge what it was "
        "made from, or dequantize it (dequantize: true in a recipe, --dequantize, checkpoint.dequantized), or pass it through "
        "unscaled"
    )


# --- codes as numbers --------------------------------------------------------------------------------------------------


class _Scaled(NamedTuple):
    """A weight and its scale: one for each block of rows and columns."""

    scale: str
    block: tuple[int, int]


def dequantized(source: Source, *, block: tuple[int, int] = (128, 128), dtype: Any = jnp.bfloat16) -> Source:
    """A quantised checkpoint as the numbers it stands for, computed as they are read; one that is not quantised as it is.

    Two layouts are known: weight and weight_scale_inv, float8 with a factor for each block (DeepSeek-V3); weight and
    weight_scale, int8 or float8 with one for each row or for all (compressed-tensors, symmetric). Scales of activations are
    left out.

    Args:
      source: a checkpoint.
      block: rows and columns that share a factor, in the first layout.
      dtype: of the weights.

    Law:
      Each weight is its code times its factor, float32, rounded once.

    Raises:
      ValueError: it is quantised in another way; a scale that does not fit its weight.

    Example:
      >>> import pathlib, tempfile, jaxmerge as jm, numpy as np
      >>> from safetensors.numpy import save_file
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> codes, scale = np.array([[1, -2], [3, 4]], np.int8), np.array([[0.5], [0.25]], np.float32)
      >>> save_file({"up.weight": codes, "up.weight_scale": scale}, path)
      >>> jm.checkpoint.dequantized(jm.checkpoint.open(path)).read("up.weight").tolist()
      [[0.5, -1.0], [0.75, 1.0]]
    """
    codes = quantised(source)
    if not codes:
        return source
    scaled: dict[str, _Scaled] = {}
    for name in codes:
        leaf = source.leaves[name]
        by_block = f"{name}_scale_inv" in source.leaves
        scale = f"{name}_scale_inv" if by_block else f"{name}_scale"
        small = leaf.dtype in ((jnp.float8_e4m3fn,) if by_block else (np.int8, jnp.float8_e4m3fn, jnp.float8_e5m2))
        if BESIDE.search(name) or scale not in source.leaves or not small or len(leaf.shape) != 2:
            continue
        rows, columns = leaf.shape
        shape = source.leaves[scale].shape
        fits: dict[tuple[int, ...], tuple[int, int]] = {(-(-rows // block[0]), -(-columns // block[1])): block}
        if not by_block:
            fits = {s: (rows, columns) for s in ((), (1,), (1, 1))} | {(rows,): (1, columns), (rows, 1): (1, columns)}
        if shape not in fits:
            need = " or ".join(str(list(s)) for s in fits)
            raise ValueError(f"{source.name}: {scale} is {list(shape)}; for {list(leaf.shape)} it must be {need}.")
        scaled[name] = _Scaled(scale, fits[shape])
    activations = {n for n in codes if ACTIVATIONS.search(n)}
    beside = activations | {s.scale for s in scaled.values()}
    unknown = [n for n in codes if n not in scaled and n not in beside]
    if unknown:
        raise ValueError(
            f"{source.name} is quantised in a way that cannot be read: {unknown[0]}; known are weight with weight_scale_inv, "
            "and int8 or float8 weight with weight_scale; merge what it was made from."
        )
    return _Dequantized(source, scaled, beside, np.dtype(dtype))


class _Dequantized:
    """A source whose codes are multiplied by their scales as they are read."""

    def __init__(self, source: Source, scaled: dict[str, _Scaled], beside: set[str], dtype: np.dtype):
        self.name, self.path, self.metadata, self.files = source.name, source.path, source.metadata, source.files
        self.format: Format = source.format
        self._source, self._scaled = source, scaled
        kept = {n: leaf for n, leaf in source.leaves.items() if n not in beside}
        self.leaves = {n: leaf._replace(dtype=dtype) if n in scaled else leaf for n, leaf in kept.items()}

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        found = self._scaled.get(name)
        if found is None:
            return self._source.read(name, index)
        bounds = [s.indices(n)[:2] for s, n in zip(index, self.leaves[name].shape, strict=False)]
        bounds += [(0, n) for n in self.leaves[name].shape[len(bounds) :]]
        rows, columns = (np.arange(*b) // n for b, n in zip(bounds, found.block, strict=True))
        shape = self._source.leaves[found.scale].shape
        scale = self._source.read(found.scale).astype(np.float32).reshape(shape if len(shape) == 2 else (-1, 1))
        codes = self._source.read(name, tuple(slice(*b) for b in bounds)).astype(np.float32)
        return (codes * scale[rows][:, columns]).astype(self.leaves[name].dtype)

    def load(self, shardings: Mapping[str, Sharding]) -> dict[str, Any]:
        plain = {n: s for n, s in shardings.items() if n not in self._scaled}
        others = {n: self.leaves[n] for n in shardings if n in self._scaled}
        return self._source.load(plain) | place(others, shardings, self.read)

    def extent(self, name: str) -> Extent | None:
        return None if name in self._scaled else self._source.extent(name)

    def granule(self, name: str) -> int | None:
        return self._source.granule(name)

    def identity(self) -> str:
        dtypes = {str(self.leaves[n].dtype) for n in self._scaled}
        return digest(self._source.identity(), {n: list(s) for n, s in self._scaled.items()}, sorted(dtypes))
