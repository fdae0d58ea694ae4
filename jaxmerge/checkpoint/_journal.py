"""A merge that can be killed: where it works, what it has finished, and how its output appears.

out.merging/            locked while someone works there
  *.safetensors         of their final sizes from the start; or a tree of Orbax, whose arrays have their shapes
  journal-0.jsonl       one line for what is done; one file per process

A process that is killed leaves what it has written with the kernel, a machine that goes down does not: to have all of it put on
the disk each time takes as long as to write it. So most lines hold for as long as this machine runs, by their "boot"; those
without hold for good, and so do all before them.
"""

import base64
import contextlib
import fcntl
import functools
import json
import os
import pathlib
import shutil
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmerge.checkpoint import _processes
from jaxmerge.checkpoint._remote import Url
from jaxmerge.checkpoint._source import digest


class Busy(OSError):
    """Another merge works at the same place."""


RECEIPT = "jaxmerge.json"
"""What marks a directory as the output of a merge."""


def check_free(out: Any, *, overwrite: bool) -> None:
    """An output takes no place but its own: where there is nothing, an empty directory, or, if asked to, an earlier output."""
    if isinstance(out, Url):
        free = all("/ocdbt.process_" in key for key in out.all_names())  # what a merge that was killed has left
    else:
        free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    if free:
        return
    if not overwrite:
        raise FileExistsError(f"{out} exists; choose another place, or pass overwrite (--overwrite).")
    if not (out / RECEIPT).exists():
        raise FileExistsError(
            f"{out} is not replaced: no merge has made it (it has no {RECEIPT}); remove it, or choose another place."
        )


class Workplace:
    """A directory beside `out` that becomes `out` when all is done.

    Args:
      out: where the output appears.
      rank: of this process.
      overwrite: replace the output of an earlier merge.
    """

    def __init__(self, out: pathlib.Path, *, rank: int, overwrite: bool):
        check_free(out, overwrite=overwrite)
        out = pathlib.Path(os.path.realpath(out))  # through links, so that it can be renamed
        self.out, self.rank = out, rank
        self.directory = out.parent / f"{out.name}.merging"
        self._lock = -1
        if rank == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as e:
                who = os.pread(self._lock, 64, 0).decode().strip() or "unknown"
                os.close(self._lock)
                raise Busy(f"another merge (process {who}) is writing {out}; wait for it, or choose another place.") from e
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, str(os.getpid()).encode(), 0)
        _processes.wait(f"workplace {out.name}")

    def begin(
        self, identity: str, prepare: Callable[[], None], *, resume: bool, about: Mapping[str, Any] = types.MappingProxyType({})
    ) -> list[dict[str, Any]]:
        """What this very merge has finished before, if `resume`; else the place is cleared and prepared.

        Args:
          identity: tells one merge from another.
          prepare: makes the files; called on all processes.
          about: what else the journal says of the merge, for `begun`.
        """
        lines = self._lines() if resume else []
        known = bool(lines) and lines[0].get("merge") == identity
        if not all(_processes.everyone(known)):
            _processes.wait("journals read")
            if self.rank == 0:
                for path in self.directory.iterdir():
                    if path.name != "lock":
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
            _processes.wait("place cleared")
            prepare()
            _processes.wait("place prepared")
            lines = [{"merge": identity, **about}]
            self.note(lines[0])
        else:
            if any("boot" in line for line in lines):  # what is put on the disk later is in files that are written to later
                for path in self.directory.iterdir():
                    sync(path)
                lines = [{k: v for k, v in line.items() if k != "boot"} for line in lines]
            self._keep(lines)
        return lines[1:]

    def note(self, line: Mapping[str, Any], *, for_good: bool = True) -> None:
        """Add a line; what it says is done is on the disk, or else with the kernel."""
        with open(self._journal(), "a") as f:
            f.write(json.dumps(line if for_good else {**line, "boot": boot()}) + "\n")
            f.flush()
            if for_good:
                os.fsync(f.fileno())

    def forget(self) -> None:
        """What is not on the disk will not be there."""
        self._keep(holding(self._lines(), None))

    def finish(self, files: Mapping[str, str | bytes]) -> None:
        """Write what goes beside the tensors, and make the output appear."""
        _processes.wait("all written")
        if self.rank == 0:
            for name, content in files.items():
                (self.directory / name).write_bytes(content.encode() if isinstance(content, str) else content)
            for path in (*self.directory.iterdir(), self.directory):
                sync(path)
            old = self.out.parent / f"{self.out.name}.replaced"
            if self.out.exists():
                if old.exists():  # killed between two renames, some other time
                    shutil.rmtree(old)
                self.out.rename(old)
            self.directory.rename(self.out)  # still locked: nobody else takes it for a place to work
            for path in (self.out / "lock", *self.out.glob("journal-*.jsonl")):
                path.unlink()
            sync(self.out.parent)
            if old.exists():
                shutil.rmtree(old)
            os.close(self._lock)
        _processes.wait("output there")

    def leave(self, *, keep: bool) -> None:
        """Go without having finished; what is done may be kept, to go on from."""
        if self.rank == 0:
            if not keep:
                with contextlib.suppress(OSError):
                    shutil.rmtree(self.directory)
            with contextlib.suppress(OSError):
                os.close(self._lock)

    def _journal(self) -> pathlib.Path:
        return self.directory / f"journal-{self.rank}.jsonl"

    def _keep(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """These lines and no others: none that is torn, none that no longer holds."""
        text, journal = "".join(json.dumps(line) + "\n" for line in lines), self._journal()
        if journal.read_text() != text:
            new = journal.with_suffix(".new")
            new.write_text(text)
            sync(new)
            new.rename(journal)

    def _lines(self) -> list[dict[str, Any]]:
        lines = []
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):  # the last line may be torn
            for line in self._journal().read_text().splitlines(keepends=True):
                if line.endswith("\n"):
                    lines.append(json.loads(line))
        return holding(lines, boot())


def boot() -> str | None:
    """What tells one run of this machine from the next; None where it does not say."""
    with contextlib.suppress(OSError):
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return None


def holding(lines: Sequence[dict[str, Any]], here: str | None) -> list[dict[str, Any]]:
    """The lines of a journal up to the last one that holds for good, or while this runs."""
    holds = [i for i, line in enumerate(lines) if line.get("boot", here) == here]
    return list(lines[: holds[-1] + 1]) if holds else []


def begun(out: Any, **asked: Any) -> list[list[str]]:
    """The files of each input of a merge into `out` that was cut off, if its journal says of it what was asked for now."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        if isinstance(out, Url):
            text = Url(f"{out}.merging/0/000000").read_text()
        else:
            out = pathlib.Path(os.path.realpath(out))
            text = (out.parent / f"{out.name}.merging" / "journal-0.jsonl").read_text()
        first = json.loads(text.splitlines()[0])
        if all(key in first and first[key] == json.loads(json.dumps(value)) for key, value in asked.items()):
            return first.get("inputs", [])
    return []


def gone(out: Any, what: str, error: Exception) -> str:
    """Why a merge that was cut off does not go on: it read what is no longer there."""
    return (
        f"a merge into {out} was cut off that read {what}, and that cannot be read any more: {error}; to begin anew, of what "
        "is there now, pass resume=False (--no-resume)."
    )


def sync(path: pathlib.Path) -> None:
    """Whatever was written to a file or directory is on disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# --- values as JSON, bit for bit -------------------------------------------------------------------------------------


def pack(value: Any) -> Any:
    """Nested dicts, lists, names and arrays as JSON; tuples come back as lists."""
    if value is None or isinstance(value, str):
        return {"v": value}
    if isinstance(value, dict):
        return {"d": {k: pack(v) for k, v in value.items()}}
    if isinstance(value, list | tuple):
        return {"l": [pack(v) for v in value]}
    array = np.asarray(value)
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"a": data, "t": array.dtype.name, "s": list(array.shape)}


def unpack(packed: Any) -> Any:
    """What `pack` was given."""
    if "v" in packed:
        return packed["v"]
    if "d" in packed:
        return {k: unpack(v) for k, v in packed["d"].items()}
    if "l" in packed:
        return [unpack(v) for v in packed["l"]]
    return np.frombuffer(base64.b64decode(packed["a"]), np.dtype(packed["t"])).reshape(packed["s"]).copy()


# --- which function ----------------------------------------------------------------------------------------------------


def fingerprint(value: Any, depth: int = 12) -> Any:
    """What a function does, as far as its name, its code and what it closes over tell: JSON."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if depth == 0:
        return "..."
    inner = functools.partial(fingerprint, depth=depth - 1)
    if hasattr(value, "__wrapped__"):  # jit
        return inner(value.__wrapped__)
    if isinstance(value, types.FunctionType):
        cells = []
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # not filled yet
                cells.append(inner(cell.cell_contents))
        code = value.__code__
        body = digest(code.co_code.hex(), str(code.co_names))
        return [value.__module__, value.__qualname__, body, cells, inner(value.__defaults__)]
    if isinstance(value, functools.partial):
        return ["partial", inner(value.func), inner(value.args), inner(value.keywords)]
    if isinstance(value, dict):
        return {str(k): inner(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [type(value).__name__, *(inner(v) for v in value)]
    if isinstance(value, np.ndarray | np.generic) or hasattr(value, "__jax_array__") or type(value).__name__ == "ArrayImpl":
        array = np.asarray(value)
        return [str(array.dtype), list(array.shape), digest(array.tobytes().hex())]
    return getattr(value, "__qualname__", type(value).__qualname__)
