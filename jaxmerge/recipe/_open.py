"""From the names in a recipe to checkpoints: paths, models of the Hub, results of earlier documents."""

import difflib
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jax.sharding import Sharding

from jaxmerge import checkpoint
from jaxmerge.checkpoint import Leaf, Source, _hub
from jaxmerge.checkpoint._remote import Place, Url, is_remote, on_web
from jaxmerge.checkpoint._source import Extent, Format, Index
from jaxmerge.recipe._schema import Path, Recipe

WINDOW = re.compile(r"\{(\d+)\.\.(\d+)(?:\.\.(\d+))?\}")


class Absent(ValueError):
    """A model that is not here, or cannot be read; the message says what to do."""


def locate(path: Path) -> str:
    """Where a model lies: its path, its snapshot in the cache of the Hub's client, or its commit's address on the Hub.

    Raises:
      Absent: none of them is there.
    """
    if named := _hub.split(str(path)) if not os.path.exists(path.path) else None:
        return _hub.locate(*named)
    if "://" in path.path or os.path.exists(path.path):
        return path.path
    parent = pathlib.Path(path.path).expanduser()
    if path.path.startswith("~") and parent.exists():
        return str(parent)
    near = difflib.get_close_matches(parent.name, _names(parent.parent), n=1)
    other = "" if "/" in path.path else ", and no document of the recipe has this name"
    hint = f"; did you mean {str(parent.parent / near[0])!r}?" if near else f"; paths are relative to where you are{other}."
    if (filled := os.path.expandvars(path.path)) != path.path:
        hint = f"; variables are not filled in here, write {filled!r}."
    raise Absent(f"there is nothing at {path.path!r}{hint}")


def window(pattern: str) -> list[str]:
    """Every checkpoint of a run whose number lies in run/{1000..2000}, or {1000..2000..500}, in the order of the numbers; what
    has no braces is itself.

    Raises:
      Absent: there is none, or the folder cannot be listed.
    """
    found = WINDOW.search(pattern)
    if found is None:
        return [pattern]
    before, after = pattern[: found.start()], pattern[found.end() :]
    folder, _, prefix = before.rpartition("/")
    if on_web(folder):
        raise Absent(f"{found[0]}: folders cannot be listed over https; name every checkpoint.")
    parent = Url(folder) if is_remote(folder) else pathlib.Path(folder or ("/" if before.startswith("/") else "."))
    names = parent.names() if isinstance(parent, Url) else _names(parent)
    steps = {int(m[1]): m[0] for n in names if (m := re.fullmatch(rf"{re.escape(prefix)}(\d+)", n))}
    first, last, stride = int(found[1]), int(found[2]), int(found[3] or 1) or 1
    inside = sorted(step for step in steps if first <= step <= last and (step - first) % stride == 0)
    if not inside:
        there = f"; there are {min(steps)} to {max(steps)}" if steps else f"; {parent} has none"
        raise Absent(f"no checkpoint lies in {found[0]}{there}.")
    return [f"{before.removesuffix(prefix)}{steps[i]}{after}" for i in inside]


def open_model(path: Path, earlier: Mapping[str, Source]) -> Source:
    """A checkpoint, or what an earlier document makes.

    Raises:
      Absent: it is not there, or cannot be read.
    """
    if str(path) in earlier:
        return earlier[str(path)]
    try:
        return checkpoint.open(locate(path))
    except (OSError, ValueError) as e:
        raise e if isinstance(e, Absent) else Absent(str(e)) from e


def pinned(recipe: Recipe, files: Sequence[str]) -> dict[str, Source]:
    """Models of the Hub at the commits that files belong to: those of an earlier merge by the same recipe.

    Raises:
      OSError, ValueError: a commit is no longer there, or cannot be read; one model was read at several commits, and its
        revisions are others now.
    """
    paths = [p for r in recipe.references() for p in (r.model, r.lora) if p is not None]
    paths += [path for path, _ in recipe.statistics().values()]
    asked: dict[str, dict[Path, str | None]] = {}
    for path in paths:
        if not os.path.exists(path.path) and (named := _hub.split(str(path))):
            asked.setdefault(named[0], {})[path] = named[1]
    found: dict[str, Source] = {}
    for name, revisions in asked.items():
        commits = _hub.commits(name, files)
        moving = [path for path, revision in revisions.items() if revision not in commits]
        left = commits - set(revisions.values())
        if len(left) == 1:
            found |= {str(path): checkpoint.open(f"{name}@{min(left)}") for path in moving}
        elif left and left != {commit.commit for path in moving if (commit := _hub.at(locate(path)))}:
            shown = ", ".join(map(str, moving))
            raise ValueError(f"{shown} were read at {', '.join(sorted(left))}, and are elsewhere now; write commits")
    return found


def _names(folder: pathlib.Path) -> list[str]:
    return [p.name for p in folder.iterdir()] if folder.is_dir() else []


class Planned:
    """What an earlier document will make: a source whose headers are known and whose tensors are not there yet."""

    def __init__(self, name: str, leaves: Mapping[str, Leaf], beside: Mapping[str, str | bytes]):
        self.beside = dict(beside)
        self.path: Place = epath.Path(name)
        self.name, self.metadata, self.files = name, {}, ()
        self.format: Format = "safetensors"
        self.leaves = dict(leaves)

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        raise RuntimeError(f"{self.name} is not merged yet.")

    def load(self, shardings: Mapping[str, Sharding]) -> dict[str, Any]:
        raise RuntimeError(f"{self.name} is not merged yet.")

    def extent(self, name: str) -> Extent | None:
        return Extent(self.name, 0, self.leaves[name].bytes)

    def granule(self, name: str) -> int | None:
        return 1

    def identity(self) -> str:
        return self.name
