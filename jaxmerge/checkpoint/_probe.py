"""Whether a checkpoint can be read and a place written to, tried out with a few bytes: each step, what helps where it fails.

read(path)    list what is there, look at the headers, read a range of a tensor
write(place)  create an object, read it back, remove it
"""

import contextlib
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxmerge.checkpoint import _hub, _remote
from jaxmerge.checkpoint._open import open as open_source

PATIENCE = 30.0
"""Seconds that a bucket may take for an answer."""
RIGHTS = {  # what a step needs, by the kind of bucket
    "gs": {
        "list": "storage.objects.list",
        "read": "storage.objects.get",
        "create": "storage.objects.create",
        "remove": "storage.objects.delete",
    },
    "s3": {"list": "s3:ListBucket", "read": "s3:GetObject", "create": "s3:PutObject", "remove": "s3:DeleteObject"},
}
LOGIN = {
    "gs": "gcloud auth application-default login, or GOOGLE_APPLICATION_CREDENTIALS",
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile of ~/.aws, AWS_REGION, AWS_ENDPOINT_URL",
}


class Finding(NamedTuple):
    """One step of a probe.

    Attributes:
      step: what was tried.
      found: what came of it; or why it failed, and what helps.
      works: whether it did.
    """

    step: str
    found: str
    works: bool


def read(path: Any) -> list[Finding]:
    """Try to list a checkpoint, to look at its headers, and to read a range of a tensor; the first step that fails is the last.

    Args:
      path: what `checkpoint.open` takes.
    """
    findings: list[Finding] = []
    with _until_it_fails(path, findings) as step:
        if not _hub.split(str(path)):
            step("list", lambda: _names(path), lambda names: f"{len(names)} name{'s' * (len(names) != 1)}")
        source = step("headers", lambda: open_source(path), lambda s: f"{s.format}, {len(s.leaves)} tensors")
        arrays = {n: leaf for n, leaf in source.leaves.items() if leaf.dtype is not None and leaf.size}
        if arrays:
            name = min(arrays, key=lambda n: arrays[n].bytes)
            index = (slice(0, 1),) if source.granule(name) else ()
            step("read", lambda: source.read(name, index), lambda x: f"{np.asarray(x).nbytes} bytes of {name}")
    return findings


def write(place: Any) -> list[Finding]:
    """Try to create an object at a place, to read it back and to remove it; the first step that fails is the last.

    Args:
      place: a directory, whether it is there yet or not; or gs:// or s3://.
    """
    findings: list[Finding] = []
    name, data = f".jaxmerge-probe-{uuid.uuid4().hex}", os.urandom(64)
    with _until_it_fails(place, findings) as step:
        if str(place).startswith(("gs://", "s3://")):
            store = _remote._store(f"{str(place).rstrip('/')}/")
            step("create", lambda: store.write(name, data).result(PATIENCE), lambda _: f"{place} takes objects")
            step("read", lambda: _same(store.read(name).result(PATIENCE).value, data), lambda _: "what was written")
            step("remove", lambda: store.write(name, None).result(PATIENCE), lambda _: "it is gone again")
            return findings
        if _remote.is_remote(place):
            raise ValueError("outputs are written to local paths, gs:// and s3://")
        folder = next(p for p in (pathlib.Path(place).absolute(), *pathlib.Path(place).absolute().parents) if p.exists())
        file = folder / name
        free = lambda _: f"{folder} takes files; {shutil.disk_usage(folder).free / 1e9:.4g} GB are free"
        step("create", lambda: file.write_bytes(data), free)
        try:
            step("read", lambda: _same(file.read_bytes(), data), lambda _: "what was written")
        finally:
            step("remove", file.unlink, lambda _: "it is gone again")
    return findings


@contextlib.contextmanager
def _until_it_fails(path: Any, findings: list[Finding]) -> Iterator[Callable[..., Any]]:
    """A function that tries a step and notes what came of it; what fails ends the block."""

    def step(name: str, does: Callable[[], Any], says: Callable[[Any], str] = str) -> Any:
        nonlocal at
        at = name
        result = does()
        findings.append(Finding(name, says(result), True))
        return result

    at = "create"
    try:
        yield step
    except Exception as e:  # tensorstore's errors are of no one kind
        findings.append(
            Finding(at, f"{str(e).splitlines()[0][:300] if str(e) else type(e).__name__}{_remedy(path, at, e)}", False)
        )


def _names(path: Any) -> list[str]:
    if not _remote.is_remote(path):
        if not os.path.exists(path):
            raise FileNotFoundError("nothing lies there; mind the spelling, and where you are")
        return sorted(os.listdir(path)) if os.path.isdir(path) else [os.path.basename(path)]
    url = _remote.Url(path)
    if _remote.on_web(url) or not url.is_dir():
        return url.names() if url.is_dir() else [url.name]
    listed = _remote._store(f"{url}/").list().result(PATIENCE)
    if not listed:
        raise FileNotFoundError(f"nothing lies under {url}/")
    return [str(key, "utf-8") for key in listed]


def _same(found: bytes, data: bytes) -> None:
    if found != data:
        raise OSError("what was read back is not what was written")


def _remedy(path: Any, step: str, error: Exception) -> str:
    """What helps."""
    kind, text = str(path).partition("://")[0], str(error)
    if kind in LOGIN:
        if isinstance(error, TimeoutError):
            return f" no answer in {PATIENCE:.0f} s; look at the network, at proxies, and at {LOGIN[kind]}"
        if "NOT_FOUND" in text or isinstance(error, FileNotFoundError):
            return "; mind the spelling of the bucket and of the folder in it"
        right = RIGHTS[kind].get(step, RIGHTS[kind]["read"])
        return f"; it needs the right {right}, and a login: {LOGIN[kind]}"
    if isinstance(error, PermissionError):
        return f"; its owner can allow it: chmod u+{'w' if step in ('create', 'remove') else 'r'}, or choose another place"
    return ""
