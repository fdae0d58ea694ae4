"""What a merge was made of, beside its output: inputs and their hashes, what was asked for, what was found, versions."""

import concurrent.futures
import hashlib
import json
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmerge.checkpoint import _journal, _processes, _remote
from jaxmerge.checkpoint._plan import CheckpointPlan
from jaxmerge.checkpoint._source import Source

NAME = _journal.RECEIPT
HEAD, PAGES, PAGE = 1 << 16, 64, 4096


def versions() -> dict[str, str]:
    """Of what a result depends on."""
    import importlib.metadata

    ours = importlib.metadata.version("jaxmerge")
    return {"jaxmerge": ours, "jax": jax.__version__, "numpy": np.__version__, "python": platform.python_version()}


def hashes(inputs: Sequence[Source], made: Sequence[Any] = ()) -> dict[str, str]:
    """The hash of every file of the inputs, and of those that were made; each process reads a part of them."""
    files = list(dict.fromkeys((*(f for source in inputs for f in source.files), *map(str, made))))
    mine = {f: sample_hash(f) for f in files[jax.process_index() :: jax.process_count()]}
    return {f: h for part in _processes.everyone(mine) for f, h in part.items()}


def write(  # noqa: PLR0917
    headers: CheckpointPlan,
    files: Mapping[str, Any],
    hashes: Mapping[str, str],
    settings: Sequence[dict[str, Any]],
    options: dict[str, Any],
    recipe: Any,
) -> str:
    """The receipt of an output, as JSON text.

    Args:
      files: of the output, {name: where it lies now}.
      hashes: of these, and of the inputs' files.
    """
    out = {n: leaf.dtype.name for n, leaf in headers.out.items() if leaf.dtype is not None}
    content = {
        "versions": versions(),
        "recipe": recipe,
        "options": options,
        "base": None if headers.base is None else describe(headers.base, hashes),
        "models": [describe(m, hashes) for m in headers.models],
        "statistics": [describe(s, hashes) for s in headers.statistics],
        "format": headers.format,
        "files": {name: hashes[str(path)] for name, path in files.items()},
        "dtypes": {d: sum(1 for v in out.values() if v == d) for d in sorted(set(out.values()))},
        "settings": [_journal.pack(s) for s in settings],
    }
    return json.dumps(content, indent=1) + "\n"


def describe(source: Source, hashes: Mapping[str, str]) -> dict[str, Any]:
    """A source as a receipt has it."""
    return {
        "name": source.name,
        "path": str(source.path),
        "format": source.format,
        "files": {f: hashes[f] for f in source.files},
    }


def sample_hash(path: Any) -> str:
    """SHA-256 of a file's size, its beginning and 64 pages from all over it: a fingerprint in milliseconds.

    It sees a file that was exchanged, cut or trained further; not one byte changed on purpose between the pages.
    """
    size = _remote.stat(path)[0]
    h = hashlib.sha256(size.to_bytes(8, "little"))
    h.update(_remote.read(path, 0, min(size, HEAD)))
    if size > HEAD:
        pages = range(HEAD, size, max((size - HEAD) // PAGES, PAGE))
        read = lambda at: _remote.read(path, at, min(PAGE, size - at))
        with concurrent.futures.ThreadPoolExecutor(16 if _remote.is_remote(path) else 1) as threads:
            for page in threads.map(read, pages):
                h.update(page)
    return h.hexdigest()


def receipt(out: Any) -> dict[str, Any]:
    """What a merge says it was made of: inputs, hashes, what was asked for, versions; read from its directory.

    Raises:
      FileNotFoundError: there is none.
    """
    path = _remote.Url(out) / NAME if _remote.is_remote(out) else pathlib.Path(out) / NAME
    if not path.exists():
        raise FileNotFoundError(f"{out} has no receipt {NAME}: it was not merged by jaxmerge, or by an older one.")
    return json.loads(path.read_text())
