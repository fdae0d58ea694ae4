"""A merge by ranges, from the first byte to the output that appears: workplace, journal, surveys, blocks, receipt."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxmerge.checkpoint import _journal, _processes, _receipt
from jaxmerge.checkpoint._behind import Lost
from jaxmerge.checkpoint._feed import read_ahead
from jaxmerge.checkpoint._plan import CheckpointPlan
from jaxmerge.checkpoint._refusals import differing, strange
from jaxmerge.checkpoint._source import digest
from jaxmerge.checkpoint._stream import Stream
from jaxmerge.checkpoint._task import make_task, unit_bytes
from jaxmerge.params._transform import MergeTransform

CHECKPOINT = 1 << 26
"""Bytes of output after which the journal says what is done."""


def run(
    tx: MergeTransform,
    headers: CheckpointPlan,
    out: Any,
    *,
    cast: Any,
    memory: int | str | None,
    integers: str,
    nonfinite: str,
    overwrite: bool,
    resume: bool,
    recipe: Any,
    about: Mapping[str, Any],
    beside: Mapping[str, str | bytes] | None,
    tell: Callable[..., None],
) -> dict[str, Any]:
    """Merge into a local directory; fields of the report."""
    layout = headers.layout
    assert layout is not None
    place = _journal.Workplace(pathlib.Path(out).absolute(), rank=jax.process_index(), overwrite=overwrite)
    keep = False
    try:
        task = make_task(tx, headers, cast)
        options = {"integers": integers, "nonfinite": nonfinite, "dtype": _name(cast), "memory": memory}
        identity = digest(
            _journal.fingerprint(tx.match.steps),  # type: ignore[attr-defined]
            _journal.pack(list(headers.settings)),
            [s.identity() for s in headers.inputs],
            [headers.base is not None, options, jax.process_count(), headers.format, layout.identity(), task.units],
            _receipt.versions(),
        )
        lines = place.begin(identity, lambda: layout.prepare(place.directory), resume=resume, about=about)
        keep = bool(lines)
        stream = Stream(task, headers.settings, _Teller(headers, tell))
        if integers == "agree" and len(headers.parents) > 1:
            _check_exact(headers, stream)
        done = _recall(stream, lines)
        surveyed = _survey(stream, place, lines)
        stream.advance.stage = headers.passes
        resumed = sum(u.size * task.out[u.name].itemsize for u in task.units[:done])
        stream.advance.skip(sum(unit_bytes(headers, u) for u in task.units[:done]))
        buffered = _write(stream, place, headers, done)
        bad: dict[str, list[int]] = {}
        found: dict[str, Any] = {}
        for mine in _processes.everyone({"bad": stream.bad, "found": _journal.pack(stream.found)}):
            found |= _journal.unpack(mine["found"])
            for n, counts in mine["bad"].items():
                bad[n] = [a + b for a, b in zip(counts, bad.get(n, [0] * len(counts)), strict=True)]
        if bad and nonfinite == "refuse":
            keep = False
            raise strange(bad, headers)
        settings = [surveyed.get(i, s) for i, s in enumerate(headers.settings)]
        stream.advance.finish()
        files = dict(beside or {}) | layout.beside()
        names = _processes.everyone(layout.finish(place.directory) if jax.process_index() == 0 else [])[0]
        made = {name: place.directory / name for name in names}
        hashes = _receipt.hashes(headers.inputs, list(made.values()))
        if jax.process_index() == 0:
            files[_receipt.NAME] = _receipt.write(headers, made, hashes, settings, options, recipe)
        place.finish(files)
    except BaseException as e:
        if isinstance(e, Lost):
            place.forget()
        place.leave(keep=(keep or _safe(place)) and not isinstance(e, ValueError))
        raise
    by_step = tuple({n: found[n][i] for n in headers.floating if n in found} for i in range(len(task.steps)))
    return {"plan": by_step, "nonfinite": bad, "resumed": resumed, "buffered": tuple(sorted(buffered | stream.reader.buffered))}


class _Teller:
    """Counts bytes, and tells."""

    def __init__(self, headers: CheckpointPlan, tell: Callable[..., None]):
        self.stage, self.stages, self.done, self.skipped = 1, headers.passes, 0, 0
        self.total, self._tell = (headers.bytes_read + headers.bytes_written) // jax.process_count(), tell

    def __call__(self, read: int, written: int) -> None:
        self.done += read + written
        self._tell(self.stage, self.stages, self.done, max(self.total, self.done), self.skipped)

    def finish(self) -> None:
        """All is done, whatever was estimated."""
        self.total = self.done
        self(0, 0)

    def skip(self, n: int) -> None:
        self.done += n
        self.skipped += n


def _survey(stream: Stream, place: _journal.Workplace, lines: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The statistics of the whole model, as far as an earlier run did not find them: {step: its settings}."""
    noted = {tuple(line["round"]): line["state"] for line in lines if "round" in line}
    known = list(noted.items())[: min(_processes.everyone(len(noted)))]  # a round counts when all processes have noted it
    surveyed = {}
    for i, step in enumerate(stream.task.steps):
        if step.survey is None:
            continue
        rounds = [state for (which, _), state in known if which == i]
        state = _journal.unpack(rounds[-1]) if rounds else None
        first, done = stream.advance.stage, int(state[0]) if state else 0

        def note(state: Any, i: int = i, first: int = first) -> None:
            place.note({"round": [i, state[0]], "state": _journal.pack(state)})
            stream.advance.stage = first + state[0]

        stream.advance.stage = first + done
        stream.survey(i, state, note)
        surveyed[i] = dict(stream.settings[i])
    return surveyed


def _recall(stream: Stream, lines: list[dict[str, Any]]) -> int:
    """Put back what an earlier run found; how many units it finished."""
    done = 0
    for line in lines:
        if "units" in line:
            done = line["units"]
            stream.found |= _journal.unpack(line["found"])
            stream.bad = line["bad"]
    return done


def _write(stream: Stream, place: _journal.Workplace, headers: CheckpointPlan, done: int) -> set[str]:
    """The merge itself; files that were not written past the page cache."""
    assert headers.layout is not None
    sink, where = headers.layout.sink(place.directory)
    noted, since = set(stream.found), 0
    units = stream.task.units

    def mark(n: int) -> Callable[[bool], None] | None:
        nonlocal noted, since
        since += units[n - 1].size * where[units[n - 1].name].bytes // max(headers.out[units[n - 1].name].size, 1)
        if since < CHECKPOINT and n < len(units):
            return None
        since = 0
        new = {k: v for k, v in stream.found.items() if k not in noted}
        noted |= set(new)
        line = {"units": n, "found": _journal.pack(new), "bad": {k: list(v) for k, v in stream.bad.items()}}
        return lambda for_good: place.note(line, for_good=for_good)

    try:
        stream.merge(sink, where, done, mark)
        sink.close()
    except BaseException:
        sink.abandon()
        raise
    finally:
        stream.reader.close()
    return sink.buffered


def _check_exact(headers: CheckpointPlan, stream: Stream) -> None:
    exact = frozenset(headers.exact)
    units = [u for u in stream.task.units if u.name in exact]
    others = [n for n in headers.exact if headers.reference.leaves[n].dtype is None]
    differ = {n for n in others if any(s.read(n) != headers.reference.read(n) for s in headers.parents)}
    for unit, (first, *others) in read_ahead(units, headers.parents, stream.reader, limit=headers.room_bytes):
        stream.advance(first.nbytes * len(headers.parents), 0)
        if any(not np.array_equal(first.entries.view(np.uint8), other.entries.view(np.uint8)) for other in others):
            differ.add(unit.name)
    differ = sorted(set().union(*_processes.everyone(sorted(differ))))
    if differ:
        raise differing(differ)


def _safe(place: _journal.Workplace) -> bool:
    """Whether something is there to go on from."""
    return len(place._lines()) > 1


def _name(dtype: Any) -> str | None:
    return None if dtype is None else jax.numpy.dtype(dtype).name
