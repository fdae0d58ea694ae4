"""What lies at a path, a URL or a name on the Hub, as a source; nothing but headers is read."""

import os
from typing import Any

from etils import epath

from jaxmerge.checkpoint import _hub, _safetensors
from jaxmerge.checkpoint._remote import SAFETENSORS, STORES, WEB, Url, is_remote, on_web
from jaxmerge.checkpoint._source import Source

GGUF = "is quantised (GGUF) and cannot be merged; merge what it was made from, in safetensors, and quantise that."


def open(path: Any) -> Source:
    """Look at a checkpoint: Orbax (v1 or the older PyTree layout), a safetensors file, or a directory of them as on the Hub.

    Args:
      path: a file or directory, local, https://, gs:// or s3:// (Orbax over https: of a commit on the Hub alone); a model's
        name on the Hub, "org/name" or "org/name@revision", where no such path is here: from the cache of its client if it is
        whole there, else by ranges at the revision's commit; or a source, which is handed back.

    Raises:
      FileNotFoundError: nothing is there. ValueError: what is there is none of these, or its headers are wrong.
    """
    if isinstance(path, Source) and not isinstance(path, str | epath.Path):
        return path
    if is_remote(path) and not str(path).startswith((*WEB, *STORES)):
        raise ValueError(f"{path}: checkpoints are read from local paths, https://, gs:// and s3://; download it first.")
    named = _hub.split(path) if isinstance(path, str) else None
    path = _hub.locate(*named) if named and not os.path.exists(str(path)) else path
    path = Url(path) if is_remote(path) else epath.Path(path).absolute()
    if isinstance(path, epath.Path) and not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}.")
    if path.is_dir():
        found = path.names() if isinstance(path, Url) else sorted(p.name for p in path.iterdir())
        if any(n.endswith((".safetensors.index.json", ".safetensors")) for n in found):
            return _safetensors.open_directory(path, found)
        if isinstance(path, Url) and not found:
            looked = f": it has none of {', '.join(SAFETENSORS)}, and only those are read over https" if on_web(path) else ""
            raise FileNotFoundError(f"no checkpoint at {path}{looked}.")
        quantised = [n for n in found if n.endswith(".gguf")]
        if quantised:
            raise ValueError(f"{path / quantised[0]} {GGUF}")
        torch = [n for n in found if n.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        if torch:
            raise ValueError(f"{path} holds PyTorch pickles ({torch[0]}), which run code when read; convert it to safetensors.")
        from jaxmerge.checkpoint import _orbax  # who merges safetensors need not wait for it

        local = str(path).startswith("file://")
        return _orbax.open_checkpoint(epath.Path(str(path).removeprefix("file://")) if local else path)
    if path.name.endswith(".safetensors"):
        return _safetensors.open_file(path)
    if path.name.endswith(".gguf"):
        raise ValueError(f"{path} {GGUF}")
    raise ValueError(f"{path} is not a checkpoint: name an Orbax directory, a .safetensors file, or a directory of such files.")
