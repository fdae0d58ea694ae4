"""What lies at a path, a URL or a name on the Hub, as a source; nothing but headers is read."""

import errno
import os
from typing import Any

from etils import epath

from jaxmerge.checkpoint import _hub, _safetensors
from jaxmerge.checkpoint._remote import SAFETENSORS, STORES, WEB, Url, is_remote, on_web
from jaxmerge.checkpoint._source import Source

GGUF = "is quantised (GGUF) and cannot be merged; merge what it was made from, in safetensors, and quantise that."

DEEP, MANY = 4, 10_000
"""Folders below one, and files in them, among which checkpoints are looked for on a disk."""

UNREADABLE = {
    errno.ENOENT: "is not there, or is a link that leads nowhere; fetch it again",
    errno.EACCES: "may not be read by this user; have its mode or owner changed (chmod, chown), or name a copy of it",
    errno.EISDIR: "is a folder where a file should be; fetch it again",
}
"""What helps where the operating system does not let a file be read."""


def open(path: Any) -> Source:
    """Look at a checkpoint: Orbax (v1 or the older PyTree layout), a safetensors file, or a directory of them as on the Hub.

    Args:
      path: a file, an index of files or a directory, local, https://, gs:// or s3:// (Orbax over https: of a commit on the Hub
        alone); a model's name on the Hub, "org/name" or "org/name@revision", or a folder's in it, "org/name/folder/folder",
        where no such path is here: from the cache of its client if it is whole there, else by ranges at the revision's commit;
        or a source, which is handed back.

    Raises:
      FileNotFoundError, PermissionError: nothing is there, or it may not be read.
      ValueError: what is there is none of these, or two of them, or its headers are wrong.
    """
    try:
        return _open(path)
    except OSError as e:
        if e.errno not in UNREADABLE or e.filename is None:
            raise
        raise type(e)(f"{e.filename} {UNREADABLE[e.errno]}.") from e


def _open(path: Any) -> Source:
    if isinstance(path, Source) and not isinstance(path, str | epath.Path):
        return path
    named = _hub.split(path) if isinstance(path, str) else None
    if is_remote(path) and not named and not str(path).startswith((*WEB, *STORES)):
        where = "local paths, the Hub (org/name), https://, gs:// and s3://"
        raise ValueError(f"{path}: checkpoints are read from {where}; download it first.")
    path = _hub.locate(*named) if named and not os.path.exists(str(path)) else path
    path = Url(path) if is_remote(path) else epath.Path(path).absolute()
    if isinstance(path, epath.Path) and not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}.")
    if path.is_dir():
        found = _names(path)
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
            how = "load it where you trust it and save it with save_pretrained (Transformers, PEFT), which writes safetensors"
            raise ValueError(f"{path} holds PyTorch pickles ({torch[0]}), which run code when read; {how}.")
        if deeper := _below(path):
            text = f"holds no checkpoint itself, there are {_hub.shown(deeper)} in it; name one of them"
            raise ValueError(f"{path} {text}.")
        if isinstance(path, epath.Path) and not any(n == "_METADATA" or (path / n).is_dir() for n in found):
            has = f"it has {_hub.shown(found)}" if found else "it is empty"
            raise ValueError(f"{path} holds no weights: {has}; safetensors are read, and what Orbax saved. Fetch it again.")
        from jaxmerge.checkpoint import _orbax  # who merges safetensors need not wait for it

        local = str(path).startswith("file://")
        return _orbax.open_checkpoint(epath.Path(str(path).removeprefix("file://")) if local else path)
    if path.name.endswith(".safetensors"):
        return _safetensors.open_file(path)
    if path.name.endswith(".safetensors.index.json"):
        return _safetensors.open_indexed(path.parent, path.name, _names(path.parent), named=True)
    if path.name.endswith(".gguf"):
        raise ValueError(f"{path} {GGUF}")
    raise ValueError(f"{path} is not a checkpoint: name an Orbax directory, a .safetensors file, or a directory of such files.")


def _names(folder: Url | epath.Path) -> list[str]:
    return folder.names() if isinstance(folder, Url) else sorted(p.name for p in folder.iterdir())


def _below(path: Url | epath.Path) -> list[str]:
    """The folders deep in one that hold checkpoints, where it is none itself; [] where they cannot be listed.

    An Orbax checkpoint has its tree at the top, or one below; those of several steps are its reader's to tell of.
    """
    files: list[str] = []
    if isinstance(path, Url):
        if (commit := _hub.at(path)) is None:
            return []
        within = f"{commit.inside}/" if commit.inside else ""
        files += [f.removeprefix(within) for f in _hub.listing(*commit[:3]) if f.startswith(within)]
    else:
        for folder, inner, here in os.walk(path):
            at = os.path.relpath(folder, path)
            files += [os.path.normpath(f"{at}/{file}") for file in here]
            if at.count(os.sep) + 2 > DEEP or len(files) > MANY:
                inner.clear()
    if any(f.count("/") < 2 and f.endswith(("_METADATA", "_CHECKPOINT_METADATA")) for f in files):
        return []
    return [folder for folder in _hub.checkpoints(files) if folder]
