"""Models by their names on the Hub: the cache of its client first, then its server, by ranges, at one commit.

org/name@revision  ->  HF_HUB_CACHE/models--org--name/snapshots/COMMIT    where that is whole
                   ->  HF_ENDPOINT/org/name/resolve/COMMIT                else; the commit is asked for once in a process

A folder in it, however deep, is named after it: org/name/folder/folder@revision; or as the Hub's file system has it,
hf://org/name@revision/folder/folder.

Source: the Hub's API, GET /api/models/ORG/NAME/revision/REVISION (its fields id, sha, siblings), and the layout of the cache,
huggingface.co/docs/huggingface_hub/guides/manage-cache.
"""

import difflib
import functools
import json
import pathlib
import re
import urllib.parse
from collections.abc import Iterable
from typing import NamedTuple

from jaxmerge.checkpoint import _access, _http

SCHEME = "hf://"
NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+?(?:/[\w.-]+?)*)(?:@([^@]+))?")
INSIDE = re.compile(r"hf://(?:models/)?([^/@]+/[^/@]+)@(refs/(?:pr|convert)/[^/@]+|(?!refs/)[^/@]+)/(.+)")
FILES = (".safetensors", ".gguf", ".json", ".bin", ".pt", ".pth", ".ckpt", ".yml", ".yaml")
"""What ends like this is a path."""
FOLDER = re.compile(r"(?P<root>https?://.+)/(?P<model>[^/]+/[^/]+)/resolve/(?P<commit>[0-9a-f]{40})(?:/(?P<inside>.*))?")
SNAPSHOT = re.compile(r"(?P<root>.*)/models--(?P<model>[^/]+)/snapshots/(?P<commit>[^/]+)(?:/(?P<inside>.*))?")
PART = re.compile(r".*-\d{5}-of-(\d{5})\.safetensors")
ASKING = 10.0
"""Seconds to wait for the Hub to say anything."""


class Commit(NamedTuple):
    """A model as it was at one time.

    Attributes:
      root: the server it is on, or the cache that holds it.
      model, commit: which.
      inside: of a file or folder in it, the path from there.
    """

    root: str
    model: str
    commit: str
    inside: str


def at(path: object) -> Commit | None:
    """The commit that a path or an address lies in, of the Hub's cache or its server; None if in none.

    Example:
      >>> at("https://huggingface.co/org/name/resolve/" + 40 * "a" + "/config.json")[1::2]
      ('org/name', 'config.json')
    """
    if found := FOLDER.fullmatch(str(path)):
        return Commit(found["root"], found["model"], found["commit"], found["inside"] or "")
    if found := SNAPSHOT.fullmatch(str(path)):
        return Commit(found["root"], found["model"].replace("--", "/"), found["commit"], found["inside"] or "")
    return None


def split(text: str) -> tuple[str, str | None] | None:
    """(name, revision) of a text that may be a name on the Hub; None if it cannot.

    Example:
      >>> split("org/name@v1"), split("org/name"), split("./ckpt/base"), split("ckpt/model.safetensors")
      (('org/name', 'v1'), ('org/name', None), None, None)
      >>> split("org/name/step/items@v1"), split("hf://org/name@v1/step/items")
      (('org/name/step/items', 'v1'), ('hf://org/name/step/items', 'v1'))
    """
    if found := INSIDE.fullmatch(text):
        return f"{SCHEME}{found[1]}/{found[3]}", urllib.parse.unquote(found[2])
    scheme = SCHEME if text.startswith(SCHEME) else ""
    found = NAME.fullmatch(text.removeprefix(scheme).removeprefix("models/" if scheme else ""))
    return (scheme + found[1], found[2]) if found and (scheme or not found[1].endswith(FILES)) else None


def parted(name: str) -> tuple[str, str]:
    """(model, the folder in it or "") of a name as `split` gives it.

    Example:
      >>> parted("hf://org/name/step/items"), parted("org/name")
      (('org/name', 'step/items'), ('org/name', ''))
    """
    owner, model, *inside = name.removeprefix(SCHEME).split("/")
    return f"{owner}/{model}", "/".join(inside)


def locate(name: str, revision: str | None = None) -> str:
    """Where a model of the Hub is read, or a folder in it: its snapshot in the cache, if that is whole, or the address of its
    commit.

    Raises:
      FileNotFoundError: it is in neither place, or not for us. OSError: the Hub cannot be asked.
    """
    model, inside = parted(name)
    owner = model.partition("/")[0]
    if inside and not name.startswith(SCHEME) and pathlib.Path(owner).is_dir():
        text = f"{owner} is a folder here; of a model on the Hub write {SCHEME}{name}"
        raise FileNotFoundError(f"{name!r} is no path here{near(name)}; {text}.")
    snapshot = cached(model, revision)
    here = None if snapshot is None else snapshot / inside
    if snapshot is not None and here is not None and here.exists():
        sound = lambda: here.is_file() or whole(here) or (_is_orbax(here) and complete(model, snapshot, inside))
        if _access.offline() or sound():
            return str(here)
    fetch = f"hf download {model}{f' --revision {revision}' if revision else ''}"
    if _access.offline():
        have = f"the Hub's cache {_access.cache()} has no such model, and HF_HUB_OFFLINE keeps us from asking"
        raise FileNotFoundError(f"{name!r} is no path here{near(name)}; {have}; unset it, or fetch the model: {fetch}")
    try:
        return _folder(resolve(_access.endpoint(), model, revision or "main"), inside)
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{name!r} is no path here{near(name)}; {e}") from None
    except OSError as e:
        raise OSError(f"{name!r} is no path here{near(name)}, and the Hub is out of reach: {e} Fetch it: {fetch}") from None


def _folder(address: str, inside: str) -> str:
    """The address of a folder, or a file, of a commit.

    Raises:
      FileNotFoundError: it is not there; it says where checkpoints are.
    """
    commit = at(address)
    if not inside or commit is None:
        return address
    files = listing(*commit[:3])
    if any(f"{file}/".startswith(f"{inside}/") for file in files):
        return f"{address}/{inside}"
    have = shown([f"{commit.model}/{folder}".rstrip("/") for folder in checkpoints(files)])
    raise FileNotFoundError(
        f"{commit.model} has no {inside} on the Hub; {f'its checkpoints are {have}' if have else 'it has no checkpoint'}."
    )


@functools.lru_cache(maxsize=1024)
def resolve(endpoint: str, name: str, revision: str) -> str:
    """The address of a model's commit. For as long as the process lives a revision means one commit."""
    said = _asked(f"{endpoint}/api/models/{name}/revision/{urllib.parse.quote(revision, safe='')}")
    model, commit = said.get("id", name), said.get("sha")
    if not (isinstance(commit, str) and re.fullmatch("[0-9a-f]{40}", commit) and split(str(model))):
        raise OSError(f"{endpoint} does not answer as the Hub does: it names no commit of {name}; look at HF_ENDPOINT.")
    return f"{endpoint}/{model}/resolve/{commit}"


@functools.lru_cache(maxsize=1024)
def listing(root: str, model: str, commit: str) -> frozenset[str]:
    """All files of a commit, with the folders they lie in."""
    said = _asked(f"{root}/api/models/{model}/revision/{commit}")
    return frozenset(str(entry["rfilename"]) for entry in said.get("siblings") or ())


def cached(name: str, revision: str | None) -> pathlib.Path | None:
    """The snapshot of a model in the cache of the Hub's client."""
    folder = _access.cache() / f"models--{name.replace('/', '--')}"
    named = folder / "refs" / (revision or "main")
    commit = named.read_text().strip() if named.is_file() else revision
    snapshot = folder / "snapshots" / commit if commit else folder
    return snapshot if commit and snapshot.is_dir() else None


def whole(snapshot: pathlib.Path) -> bool:
    """Whether a snapshot has all its weights: those that the index names, or all parts of a number, or one file."""
    index = next(snapshot.glob("*.safetensors.index.json"), None)
    if index is not None:
        try:
            return all((snapshot / file).exists() for file in json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError):  # it has not come, or is damaged
            return False
    files = [p.name for p in snapshot.glob("*.safetensors") if p.exists()]
    parts = [int(m[1]) for f in files if (m := PART.fullmatch(f))]
    return bool(files) and (not parts or len(parts) == max(parts))


def _is_orbax(snapshot: pathlib.Path) -> bool:
    return (snapshot / "_METADATA").exists() or any(snapshot.glob("*/_METADATA"))


def complete(name: str, snapshot: pathlib.Path, inside: str = "") -> bool:
    """Whether a snapshot has all files of its commit, or of a folder in it: what Orbax has written says nowhere how many there
    are.

    Raises:
      OSError: the Hub cannot be asked.
    """
    try:
        files = listing(_access.endpoint(), name, snapshot.name)
        return all((snapshot / file).exists() for file in files if not inside or file.startswith(f"{inside}/"))
    except FileNotFoundError:  # the commit is no longer there
        return False
    except OSError as e:
        remedy = "if it was fetched whole, set HF_HUB_OFFLINE=1"
        raise OSError(
            f"whether {snapshot} has all files of {name} is for the Hub to say, and it is out of reach: {e} {remedy}."
        ) from None


def checkpoints(files: Iterable[str]) -> list[str]:
    """The folders that hold a checkpoint, by the paths of all files: of safetensors, or what Orbax saved, whole.

    Example:
      >>> checkpoints(["a/model.safetensors", "run/10/_CHECKPOINT_METADATA", "run/10/items/_METADATA", "b/c/_METADATA"])
      ['a', 'b/c', 'run/10']
    """
    files = set(files)
    found = {file.rpartition("/")[0] for file in files if file.endswith(".safetensors")}
    for folder in (file.rpartition("/")[0] for file in files if file.rpartition("/")[2] == "_METADATA"):
        above = folder.rpartition("/")[0]
        found.add(above if f"{above}/_CHECKPOINT_METADATA".lstrip("/") in files else folder)
    return sorted(found, key=lambda folder: [(len(part), part) for part in folder.split("/")])


def shown(names: list[str], most: int = 6) -> str:
    """Names in a message: a few of them."""
    return ", ".join(names if len(names) <= most else [*names[: most - 2], "...", names[-1]])


def said(files: Iterable[str]) -> list[str]:
    """Which models of the Hub files belong to, and where they are read: a sentence each."""
    commits = {c._replace(inside=""): None for file in files if (c := at(file)) is not None}
    return [
        f"{c.model} is read {'from' if '://' in c.root else 'in the cache'} {c.root}, at commit {c.commit}" for c in commits
    ]


def commits(name: str, files: Iterable[str]) -> set[str]:
    """The commits that files of a model, or of a folder in it, belong to."""
    model, inside = parted(name)
    there = (c for file in files if (c := at(file)) is not None)
    return {c.commit for c in there if c.model == model and f"{c.inside}/".startswith(f"{inside}/" if inside else "")}


def near(name: str) -> str:
    """A path that may have been meant."""
    parent = pathlib.Path(name).parent
    names = [p.name for p in parent.iterdir()] if parent.is_dir() else []
    close = difflib.get_close_matches(pathlib.Path(name).name, names, n=1)
    return f" (did you mean {str(parent / close[0])!r}?)" if close else ""


def _asked(url: str) -> dict:
    try:
        found = json.loads(_http.whole(url, ASKING))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise OSError(f"{url} does not answer as the Hub does; look at HF_ENDPOINT.")
    return found
