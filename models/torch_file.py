"""PyTorch's own files (`pytorch_model.bin`) without PyTorch and without trust: nothing but tensors is ever built.

A file is a zip archive that stores, uncompressed, a pickle (`data.pkl`) and the raw numbers of each storage (`data/0`, ...). A
pickle may call any function it names; this reader knows the few that build tensors and refuses every other name, so that a
file from a stranger can be opened.
"""

import pathlib
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class _Kind(NamedTuple):
    """What stands for a class of storages."""

    dtype: Any


class _Storage(NamedTuple):
    numbers: Any


class _Tensor(NamedTuple):
    """A tensor as the pickle describes it; being a tuple, it has no attributes that a pickle could set."""

    storage: _Storage
    offset: int
    size: tuple
    stride: tuple


def read_torch(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a file that `torch.save(state_dict)` wrote. Tensors that share numbers share them here too.

    Raises:
      ValueError: not such a file; a name in it that builds something else than tensors; a tensor outside its storage.
    """
    path = pathlib.Path(path)
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} is no zip archive: PyTorch before 1.6 wrote it, or it is damaged. Save it anew with torch.save, "
            "or as safetensors."
        )
    with zipfile.ZipFile(path) as archive:
        pickles = [n for n in archive.namelist() if n.split("/", 1)[-1] == "data.pkl"]
        if len(pickles) != 1:
            raise ValueError(f"{path} was not written by torch.save: it has {len(pickles)} entries named data.pkl, not one.")
        if packed := [i.filename for i in archive.infolist() if i.compress_type != zipfile.ZIP_STORED]:
            raise ValueError(f"{path}: {packed[0]} is compressed, which torch.save does not do; refused.")
        root = pickles[0].removesuffix("data.pkl")
        order = archive.read(f"{root}byteorder").decode() if f"{root}byteorder" in archive.namelist() else "little"
        if order != "little":
            raise ValueError(f"{path} has byte order {order!r}; only little-endian files can be read.")
        with archive.open(pickles[0]) as file:
            found = _Unpickler(file, archive, root, path).load()
    if not isinstance(found, Mapping) or not all(isinstance(k, str) for k in found):
        raise ValueError(f"{path} holds a {type(found).__name__}, not tensors by name; save model.state_dict().")
    if others := [k for k, v in found.items() if not isinstance(v, _Tensor)]:
        raise ValueError(f"{path} holds more than tensors: {', '.join(others[:5])}; save model.state_dict() alone.")
    return {name: _array(tensor, f"{path}: {name}") for name, tensor in found.items()}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, archive: zipfile.ZipFile, root: str, path: pathlib.Path):
        super().__init__(file)
        self.archive, self.root, self.path, self.storages = archive, root, path, {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return _Kind(np.dtype(STORAGES[name]))
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        }
        if (module, name) not in known:
            raise ValueError(
                f"{self.path} names {module}.{name}, which is no part of a tensor: loading it could run code. Refused; "
                "save model.state_dict() alone, or as safetensors."
            )
        return known[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage" or not isinstance(pid[1], _Kind):
            raise ValueError(f"{self.path} refers to {str(pid)[:200]}, which is no storage.")
        _, kind, key, _, count = pid
        if key not in self.storages:
            try:
                raw = self.archive.read(f"{self.root}data/{key}")
            except KeyError:
                raise ValueError(f"{self.path} lacks the storage data/{key}; it is damaged.") from None
            if len(raw) != count * kind.dtype.itemsize:
                raise ValueError(
                    f"{self.path}: data/{key} has {len(raw)} bytes, not {count} times {kind.dtype}; it is damaged."
                )
            self.storages[key] = _Storage(np.frombuffer(raw, kind.dtype))
        return self.storages[key]


def _rebuild_tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None) -> _Tensor:  # noqa: PLR0917
    return _Tensor(storage, offset, size, stride)


def _rebuild_parameter(tensor, requires_grad=False, hooks=None) -> _Tensor:
    return tensor


def _array(t: _Tensor, name: str) -> np.ndarray:
    ints = lambda x: isinstance(x, tuple) and all(isinstance(n, int) and n >= 0 for n in x)
    if not (
        isinstance(t.storage, _Storage)
        and ints(t.size)
        and ints(t.stride)
        and ints((t.offset,))
        and len(t.size) == len(t.stride)
    ):
        raise ValueError(f"{name} is not described as a tensor is; the file is damaged.")
    numbers = t.storage.numbers
    last = t.offset + sum((n - 1) * s for n, s in zip(t.size, t.stride, strict=True))
    if 0 in t.size:
        return np.zeros(t.size, numbers.dtype)
    if last >= numbers.size:
        raise ValueError(f"{name} reaches number {last} of a storage that has {numbers.size}; the file is damaged.")
    strides = tuple(s * numbers.itemsize for s in t.stride)
    return np.lib.stride_tricks.as_strided(numbers[t.offset :], t.size, strides, writeable=False)
