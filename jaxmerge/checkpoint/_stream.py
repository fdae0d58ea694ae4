"""The executor of merges that end in files: by ranges of bytes, in bounded memory, reading, computing and writing at once.

A leaf whose entries are merged one by one streams through in blocks. One whose threshold must be found first is held while
numpy finds it, or, where it does not fit, read again. One that a method must see whole (singular vectors, say) is held,
and counts against the memory. Every process has units of its own; only counts travel.
"""

import collections
import concurrent.futures
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmerge.checkpoint import _direct, _processes, _programs as programs
from jaxmerge.checkpoint._behind import SIDE_BY_SIDE, Sink, WriteBehind
from jaxmerge.checkpoint._feed import Unit, read_ahead
from jaxmerge.checkpoint._source import Extent, Source
from jaxmerge.checkpoint._windows import Run, Window, copied, windows
from jaxmerge.params._transform import Step, Survey
from jaxmerge.params.order._host import Held, Streamed
from jaxmerge.params.order._quantile import position, row_size

LOOK = 1 << 17
"""Entries of which magnitudes are looked at together: they stay in the processor's cache. As many make a sample."""
SAMPLED = 8 * LOOK
"""Entries from which on a leaf is worth one."""


class Task(NamedTuple):
    """A merge, as the executor sees it.

    Attributes:
      steps, inputs: the chain; the base, if there is one, the models, and data that comes with them.
      parents: how many inputs are no data.
      has_base: whether the first input is one.
      floating: leaves that are merged, in the order of the output; the others are copied from the first input.
      cast, out: {leaf: dtype} of the arithmetic's inputs (None: as they are) and of the output.
      units: all leaves' parts, in the order of the output; this process's own.
      entire: leaves that must be seen whole.
      limit: bytes for the units that are in memory at once.
    """

    steps: tuple[Step, ...]
    inputs: tuple[Source, ...]
    parents: int
    has_base: bool
    floating: frozenset[str]
    cast: Any
    out: Mapping[str, np.dtype]
    units: tuple[Unit, ...]
    entire: frozenset[str]
    limit: int


class Stream:
    """One merge under way."""

    def __init__(self, task: Task, settings: Sequence[dict[str, Any]], advance: Callable[[int, int], None]):
        """`advance` is told of every unit's bytes: read and written."""
        self.task, self.settings = task, [dict(s) for s in settings]
        self.reader, self.advance = _direct.Reader(), advance
        self.found: dict[str, list[Any]] = {}
        self.bad: dict[str, list[int]] = {}
        self._on_device: tuple[Any, Any] = (None, None)
        self._ahead = programs.Ahead(())

    # --- statistics of the whole model ---

    def survey(self, i: int, state: Any, note: Callable[[Any], None]) -> None:
        """Complete the settings of step i with a statistic of the whole model.

        Args:
          i: which step.
          state: [rounds done, query, notes] of an earlier run, or None.
          note: is told the state after each round.
        """
        survey = self.task.steps[i].survey
        assert survey is not None
        done, query, notes = state or [0, *survey.start(self.settings[i])]
        for n in range(int(done), survey.rounds):
            counts = _processes.summed(self.counts(i, survey, query))
            query, notes = survey.step(query, notes, {name: counts[name] for name in sorted(counts)})
            note([n + 1, query, notes])
        self.settings[i] = survey.finish(notes, self.settings[i])

    def counts(self, i: int, survey: Survey, query: Any) -> dict[str, np.ndarray]:
        """What a round of a survey counts in this process's units, by leaf."""
        counts: dict[str, np.ndarray] = {}
        units = [u for u in self.task.units if u.name in self.task.floating]
        data = self.task.inputs[self.task.parents :]
        read = read_ahead(units, data, self.reader, limit=self.task.limit) if survey.of_data else self.units(units, i)
        for unit, runs in read:
            found = self._counts(i, survey, query, unit, runs)
            counts[unit.name] = counts[unit.name] + found if unit.name in counts else found
            self.advance(sum(run.nbytes for run in runs), 0)
        return counts

    def _counts(self, i: int, survey: Any, query: Any, unit: Unit, runs: list[Run]) -> np.ndarray:
        task, name = self.task, unit.name
        if survey.of_data:
            look, total = programs.surveyor((), survey.read, False, None), np.zeros(1, np.uint64)
            for start, stop, _ in programs.pieces(min((run.size for run in runs), default=0)):
                counts = look(query, [], np.zeros(2, np.uint32), windows(runs, start, stop, (stop - start,)))
                total = total + np.asarray(counts).astype(np.uint64)
            return total
        runs = runs[: task.parents]
        settings = self._placed(i, name)
        total: Any = np.uint64(0)
        if survey.look is not None and name not in task.entire:
            for _, bits in self._magnitudes(i, settings, unit, runs):
                total = total + survey.look(query, bits)
            return total
        look = programs.surveyor(task.steps[:i], survey.read, task.has_base, task.cast)
        for start, _, seen in self._windows(unit, runs, fill=False):
            total = total + np.asarray(look(query, settings, self._origin(unit, start), seen)).astype(np.uint64)
        return total

    # --- the merge ---

    def merge(self, sink: Sink, where: Mapping[str, Extent], done: int, mark: Callable[[int], Any]) -> None:
        """Write every unit from the `done`-th on; `mark(n)`, when n are handed over, says what to do once they are safe."""
        task, units = self.task, self.task.units[done:]
        blockwise = task.floating - task.entire
        flat = {u: None for u in units if u.name in blockwise and row_of(task.steps, self._shape(u.name)) == 1}
        self._ahead = programs.Ahead(dict.fromkeys(size for u in flat for _, _, size in programs.pieces(u.size)))
        n = done
        for unit, runs in self.units(units, len(task.steps)):
            width = task.out[unit.name].itemsize
            here = Extent(where[unit.name].file, where[unit.name].offset + unit.start * width, unit.size * width)
            if unit.name not in task.floating:
                if count := programs.unfinite(runs[0].entries):
                    self.bad[unit.name] = [count + self.bad.get(unit.name, [0])[0]]
                sink.write(here.file, here.offset, runs[0].entries.view(np.uint8))
            elif isinstance(sink, WriteBehind) and sink.fills and unit in flat and here.offset % width == 0:
                self._fill(unit, runs, sink, here)
            else:
                for start, block in self.merged(unit, runs):
                    sink.write(here.file, here.offset + start * width, block.view(np.uint8))
            self.advance(sum(run.nbytes for run in runs), unit.size * width)
            n += 1
            if (note := mark(n)) is not None:
                sink.mark(note)

    def merged(self, unit: Unit, runs: list[Run]) -> Iterator[tuple[int, np.ndarray]]:
        """(offset in the unit, block) of the output."""
        task, name = self.task, unit.name
        look, settings = programs.merger(*self._program(name)), self._placed(len(task.steps), name)
        for start, stop, seen in self._windows(unit, runs):
            block, plans, strange = self._ahead.run(look, settings, self._origin(unit, start), seen)
            block = np.asarray(block).reshape(-1)
            part = [(run if name in task.entire else run.part(start, stop)).entries for run in runs]
            self._note(name, plans, strange, part)
            yield start, block[: stop - start]

    def _fill(self, unit: Unit, runs: list[Run], sink: WriteBehind, where: Extent) -> None:
        """Merge a unit into a sink's rooms, several blocks side by side; the inputs are let go when all are there."""
        name, dtype = unit.name, self.task.out[unit.name]
        look, settings, width = programs.placer(*self._program(name)), self._placed(len(self.task.steps), name), dtype.itemsize
        under_way: collections.deque[tuple[Any, Any, list[np.ndarray]]] = collections.deque()
        page, lead = _direct.PAGE // width, where.offset // width
        for start, stop, seen in self._pieces(unit, runs, programs.SIZES, page=page, lead=lead):
            front = settings, self._origin(unit, start)
            program = lambda room, at, front=front, seen=seen: self._ahead.run(look, room, at, *front, seen)
            part = Extent(where.file, where.offset + start * width, (stop - start) * width)
            found = sink.fill(part, math.prod(seen[0].shape) * width, dtype, program)
            under_way.append((*found, [run.part(start, stop).entries for run in runs]))
            if len(under_way) == SIDE_BY_SIDE:
                self._note(name, *under_way.popleft())
        for found in under_way:
            self._note(name, *found)

    def _program(self, name: str) -> tuple[Any, ...]:
        """What `programs.merger` is to be given for a leaf."""
        task = self.task
        return task.steps, task.has_base, task.cast, task.out[name], task.parents if len(task.inputs) > task.parents else None

    def _windows(self, unit: Unit, runs: Sequence[Run], *, fill: bool = True) -> Iterator[tuple[int, int, list[Window]]]:
        """`_pieces` for all steps; of a leaf that must be seen whole, the one."""
        if unit.name in self.task.entire:
            shapes = [s.leaves[unit.name].shape for s in self.task.inputs if unit.name in s.leaves]
            return iter([(0, unit.size, [run.window(shape) for run, shape in zip(runs, shapes, strict=False)])])
        return self._pieces(unit, runs, programs.SIZES, fill=fill)

    def _pieces(
        self, unit: Unit, runs: Sequence[Run], sizes: Sequence[int], *, fill: bool = True, page: int = 1, lead: int = 0
    ) -> Iterator[tuple[int, int, list[Window]]]:
        """(start, stop, that piece of each input), the last filled up with zeros; in rows where a step looks at those."""
        row = row_of(self.task.steps, self._shape(unit.name))
        for start, stop, size in programs.pieces(unit.size, [max(size // row, 1) * row for size in sizes], page, lead):
            size = size if fill else stop - start
            seen = min(start + size, unit.size)  # beyond `stop` where the next one begins within a page
            yield start, stop, windows(runs, start, seen, (size,) if row == 1 else (size // row, row))

    def _note(self, name: str, plans: Any, strange: Any, arrays: Sequence[np.ndarray]) -> None:
        if name not in self.found:
            self.found[name] = jax.tree.map(np.asarray, plans)
        counts = programs.strange(strange, arrays)
        if any(counts):
            self.bad[name] = [a + b for a, b in zip(counts, self.bad.get(name, [0] * len(counts)), strict=True)]

    # --- thresholds of a leaf ---

    def _waits(self, name: str, before: int) -> bool:
        """Whether a step before this one must find something out about the leaf first."""
        steps = zip(self.task.steps[:before], self.settings, strict=False)
        return any(self._finds(i) and step.open(s[name]) for i, (step, s) in enumerate(steps))

    def _finds(self, i: int) -> bool:
        """Whether step i finds something out, and the steps before it show it blocks."""
        steps = self.task.steps
        return steps[i].resolve is not None and all(step.blocks for step in steps[:i])

    def _resolve(self, before: int, unit: Unit, runs: list[Run] | None) -> None:
        """Find out all that the steps before this one must know of a leaf: from memory, or (None) from the files."""
        name, models = unit.name, self.task.parents - self.task.has_base
        runs = None if runs is None else runs[: self.task.parents]
        for i, step in enumerate(self.task.steps[:before]):
            if self._finds(i) and name in self.task.floating and step.open(s := self.settings[i][name]):
                held, of = None, (i, unit, runs)
                if runs is not None and unit.size >= SAMPLED and row_of(self.task.steps[:i], self._shape(name)) == 1:
                    part = functools.partial
                    held = Held(part(self._sample, *of), part(self._tally, *of), part(self._part, *of))
                blocks = functools.partial(self._magnitudes, i, None, unit, runs)
                total = functools.partial(self._total, i, unit, runs)
                assert step.resolve is not None
                self.settings[i][name] = step.resolve(s, Streamed(models, self._shape(name), blocks, held, total))
            models = step.models or models

    def _placed(self, before: int, name: str) -> Any:
        """A leaf's settings of the steps before this one, on the device."""
        if self._on_device[0] != (name, before):
            self._on_device = ((name, before), jax.device_put([s[name] for s in self.settings[:before]]))
        return self._on_device[1]

    def _magnitudes(self, i: int, settings: Any, unit: Unit, runs: list[Run] | None) -> Iterator[tuple[int, np.ndarray]]:
        """Of what the steps before i leave of a unit, from memory or from the files."""
        task = self.task
        look = programs.patterns(task.steps[:i], task.has_base, task.cast)
        if settings is None:
            settings = jax.device_put([s[unit.name] for s in self.settings[:i]])
        for part, held in self._parts(unit, runs):
            for start, stop, seen in self._pieces(part, held, (LOOK, programs.SIZES[-1])):
                bits = np.asarray(look(settings, self._origin(part, start), seen))
                yield part.start - unit.start + start, bits.reshape(len(bits), -1)[:, : stop - start]

    def _total(self, i: int, unit: Unit, runs: list[Run] | None, f: Any, mine: Any, combine: np.ufunc) -> np.ndarray:  # noqa: PLR0917
        """What f comes to over a unit, of what the steps before i leave; added up alike whatever is in memory together."""
        look = programs.adder(self.task.steps[:i], f, self.task.has_base, self.task.cast)
        mine, settings = jax.device_put((mine, [s[unit.name] for s in self.settings[:i]]))
        total: Any = None
        for part, held in self._parts(unit, runs):
            pieces = list(self._pieces(part, held, programs.SIZES))
            of_piece = lambda p, part=part: np.asarray(self._ahead.run(look, mine, settings, self._origin(part, p[0]), p[2]))
            for found in in_halves(of_piece, pieces):
                found = found.astype(np.float64)
                total = found if total is None else combine(total, found)
        return total

    def _parts(self, unit: Unit, runs: list[Run] | None) -> Iterator[tuple[Unit, list[Run]]]:
        """A unit that is held, or its parts from the files."""
        if runs is not None:
            yield unit, runs
            return
        most, parents = max(u.size for u in self.task.units if u.name == unit.name), self.task.inputs[: self.task.parents]
        for part, held in read_ahead(list(split(unit, most)), parents, self.reader, limit=self.task.limit):
            self.advance(sum(run.nbytes for run in held), 0)
            yield part, held

    def _sample(self, i: int, unit: Unit, runs: list[Run]) -> np.ndarray:
        look = programs.patterns(self.task.steps[:i], self.task.has_base, self.task.cast)
        step = unit.size // LOOK
        some = [copied(run.entries[step // 2 :: step][:LOOK], LOOK).window((LOOK,)) for run in runs]
        return np.asarray(look([s[unit.name] for s in self.settings[:i]], np.zeros(2, np.uint32), some))

    def _tally(self, i: int, unit: Unit, runs: list[Run], patterns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`Held.tally` of what the steps before i leave of a unit that is held."""
        look = programs.tally(self.task.steps[:i], self.task.has_base, self.task.cast)
        asked, settings = jax.device_put((patterns, [s[unit.name] for s in self.settings[:i]]))
        above, at = np.zeros(patterns.shape, np.int64), []
        for start, stop, size in programs.pieces(unit.size, programs.SIZES):
            seen = windows(runs, start, stop, (size,))
            counts = look(asked, settings, self._origin(unit, start), seen, np.int32(stop - start))
            above = above + np.asarray(counts[0]).astype(np.int64)
            at.append(np.asarray(counts[1]))
        return above, np.concatenate(at, axis=-1)

    def _part(self, i: int, unit: Unit, runs: list[Run], start: int, stop: int) -> np.ndarray:
        part = Unit(unit.name, unit.start + start, unit.start + stop)
        some = [run.part(start, stop) for run in runs]
        return np.concatenate([u for _, u in self._magnitudes(i, None, part, some)], axis=1)

    # --- units ---

    def units(self, units: Sequence[Unit], before: int) -> Iterator[tuple[Unit, list[Run]]]:
        """Units with their entries, read ahead; a leaf in parts whose thresholds are open is looked through first."""
        run: list[Unit] = []
        for unit in units:
            size = self._size(unit.name)
            if unit.size < size and unit.name in self.task.floating and self._waits(unit.name, before):
                yield from self._read(run, before)
                run = []
                self._resolve(before, Unit(unit.name, 0, size), None)
            run.append(unit)
        yield from self._read(run, before)

    def _read(self, units: Sequence[Unit], before: int) -> Iterator[tuple[Unit, list[Run]]]:
        task = self.task
        alone = frozenset(u.name for u in units) - task.floating
        waits = any(self._waits(name, before) for name in {u.name for u in units} & task.floating)
        prepare = functools.partial(self._resolve, before) if waits else None
        return read_ahead(units, task.inputs, self.reader, limit=task.limit, alone=alone, prepare=prepare)

    def _origin(self, unit: Unit, start: int) -> np.ndarray:
        return position(self._shape(unit.name), unit.start + start)

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.task.inputs[0].leaves[name].shape

    def _size(self, name: str) -> int:
        return self.task.inputs[0].leaves[name].size


def in_halves(f: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """f of each, in order; half of them in a thread of its own."""
    half = len(items) - len(items) // 2
    with concurrent.futures.ThreadPoolExecutor(1, "jaxmerge-half") as other:
        rest = other.submit(lambda: [f(item) for item in items[half:]]) if half < len(items) else None
        yield from map(f, items[:half])
        if rest is not None:
            yield from rest.result()


def row_of(steps: Sequence[Step], shape: tuple[int, ...]) -> int:
    """How many entries no block may cut through: a row of the last axis, where a step looks at those."""
    return shape[-1] if len(shape) > 1 and any(step.blocks == "rows" for step in steps) else 1


def split(unit: Unit, most: int, row: int = 0) -> Iterator[Unit]:
    """A unit in parts of at most so many entries; none goes on from one `row` into the next."""
    start = unit.start
    while start < unit.stop:
        stop = min(start + most, unit.stop)
        if row:
            stop = min(stop, (start // row + 1) * row)
        yield Unit(unit.name, start, stop)
        start = stop


def parts_of(name: str, shape: tuple[int, ...], most: int) -> Iterator[Unit]:
    """A leaf in parts, as `split`; each within one row of its coordinates."""
    size = int(np.prod(shape, dtype=object))
    return split(Unit(name, 0, size), most, row_size(shape))
