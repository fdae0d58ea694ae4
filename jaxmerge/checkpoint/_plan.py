"""What a merge will do, from the headers alone: leaves, bytes, batches, passes, and every mismatch."""

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding

from jaxmerge.checkpoint._budget import parse_size
from jaxmerge.checkpoint._feed import Unit
from jaxmerge.checkpoint._layout import layout
from jaxmerge.checkpoint._open import open as open_source
from jaxmerge.checkpoint._peak import runtime
from jaxmerge.checkpoint._problem import Problem
from jaxmerge.checkpoint._quantised import quantised, refusal
from jaxmerge.checkpoint._sharding import Rule, all_devices, shards_of, split_evenly
from jaxmerge.checkpoint._source import Format, Leaf, Source
from jaxmerge.checkpoint._statistics import misfits
from jaxmerge.checkpoint._units import by_ranges
from jaxmerge.params._transform import Match, MergeTransform, Step

MEMORY = 1 << 30


class MergeError(ValueError):
    """Checkpoints, transform and target do not fit together; the message lists every reason."""


class CheckpointPlan(NamedTuple):
    """What a merge will do; nothing but headers has been read.

    Attributes:
      base, models: the checkpoints; base may be None.
      format: of the output.
      floating, exact: names of the leaves that are merged, and of those that must agree; sorted.
      out: {leaf: shape and dtype of the output}, in the order in which they are written.
      shardings: where each leaf of an Orbax output goes; nothing for safetensors.
      batches: names of the leaves that are in memory together where they are merged on devices.
      units: else the parts of leaves that are in memory together; of all processes, in groups of one process.
      entire: leaves that a method must see whole, and that therefore count against the memory.
      room_bytes: what the units of a process that are in memory at once may take.
      layout: the output's files (`Layout`), or its tree (`Tree`, which brings Orbax), by ranges; None on devices.
      settings: per step of the transform, the resolved hyperparameters by leaf.
      passes: how often the floating leaves are read, the merge itself included; 1 where one batch holds them all.
      bytes_read, bytes_written: over all passes and all processes.
      peak_bytes: what buffers and arrays take at their most: over all devices where it is merged on them, else on one process.
      runtime_bytes: what Python and JAX take of a process beside that; `_peak` says how both come about.
      problems: every reason to refuse; empty if there is none.
      notes: what is no reason to refuse but not as asked: the least `memory` that suffices, where what is given does not.
      statistics: data that comes with the models, one for each.
    """

    base: Source | None
    models: tuple[Source, ...]
    format: Format
    floating: tuple[str, ...]
    exact: tuple[str, ...]
    out: dict[str, Leaf]
    shardings: dict[str, Sharding]
    batches: tuple[tuple[str, ...], ...]
    units: tuple[tuple[Unit, ...], ...]
    entire: frozenset[str]
    room_bytes: int
    layout: Any
    settings: tuple[dict[str, Any], ...]
    passes: int
    bytes_read: int
    bytes_written: int
    peak_bytes: int
    runtime_bytes: int
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()
    statistics: tuple[Source, ...] = ()

    @property
    def reference(self) -> Source:
        """The checkpoint whose leaves and dtypes the output has: the base, or the first model."""
        return self.models[0] if self.base is None else self.base

    @property
    def parents(self) -> tuple[Source, ...]:
        """The base, if there is one, and the models."""
        return self.models if self.base is None else (self.base, *self.models)

    @property
    def inputs(self) -> tuple[Source, ...]:
        """All that is read: the parents, and data that comes with them."""
        return (*self.parents, *self.statistics)

    @property
    def shapes(self) -> frozenset[str]:
        """The floating-point leaves."""
        return frozenset(self.floating)

    def check(self) -> None:
        """Refuse, with every reason in one message."""
        if self.problems:
            raise MergeError("the merge is refused:\n" + "\n".join(self.problems))


def plan(
    tx: MergeTransform,
    base: Any | None,
    models: Sequence[Any],
    *,
    statistics: Sequence[Any] = (),
    format: Format | None = None,
    sharding: Sharding | Rule | None = None,
    memory: int | str | None = None,
    dtype: Any = None,
    out_dtype: Any = None,
    max_shard_bytes: int | str = "5GB",
    stem: str = "model",
    on_devices: bool | None = None,
) -> CheckpointPlan:
    """Find out what a merge will do, and everything that speaks against it, before a tensor byte is read.

    Args:
      tx: what to do, such as `params.ties(density=0.2)`.
      base: the checkpoint that the models were trained from, a path or a `Source`; None merges the models themselves.
      models: checkpoints, paths or sources; formats may be mixed.
      statistics: for `params.fisher()` and `params.regmean()`, one checkpoint for each model: arrays under the names of the
        model's leaves, diagonal Fisher information in their shapes, or Gram matrices (n, n) of their inputs. They are read
        block by block as the models are.
      format: "orbax" or "safetensors"; None: as the base (or the first model) is stored.
      sharding: where the leaves of an Orbax output go: a sharding, or a function of (name, shape) such as `fsdp(mesh)`. None:
        as the base (or the first model) was saved, if those devices exist here, else `fsdp` over all devices.
      memory: bytes, or such as "2GB", that buffers and arrays may take; None: 1 GiB, and for leaves that a method must see
        whole up to half of what is free.
      dtype: cast inputs to it before anything else; arithmetic is float32 all the same.
      out_dtype: of the output's floating-point leaves; None: `dtype`, or what each leaf of the base has.
      max_shard_bytes: safetensors files larger than this are split.
      stem: what safetensors files are called, before .safetensors.
      on_devices: how an Orbax output is made: leaf by leaf on its shardings, several leaves in memory at once, which is for
        devices whose memory holds them; or by ranges like safetensors, which is for hosts: bounded by `memory`, each process a
        part. None: on accelerators.

    Raises:
      FileNotFoundError, ValueError: a path is not a checkpoint, or is damaged. All else is listed in `problems`.
    """
    opened_base = None if base is None else open_source(base)
    opened = tuple(open_source(m) for m in models)
    data = tuple(open_source(s) for s in statistics)
    if not opened:
        raise MergeError("no models; name at least one checkpoint.")
    reference = opened_base or opened[0]
    format = reference.format if format is None else format
    if format not in ("orbax", "safetensors"):
        raise MergeError(f'format must be "orbax" or "safetensors", got {format!r}.')
    leaves = reference.leaves
    inputs = (reference, *(m for m in opened if m is not reference))
    problems = _mismatches(reference, inputs[1:], cast=dtype is not None)
    devices = format == "orbax" and (jax.default_backend() != "cpu" if on_devices is None else on_devices)
    numbers = [n for n in sorted(leaves) if _is_floating(leaves[n])]
    others = frozenset(n for n, leaf in leaves.items() if leaf.dtype is not None and leaf.dtype.kind == "c")
    others |= frozenset(codes := quantised(reference))
    settings, steps, copied = (), (), frozenset()
    if not isinstance(tx.match, Match):
        problems.append("  the transform's match is a plain function of a whole model; write it with params.per_leaf")
    elif not numbers and not others:
        problems.append("  no floating-point leaf to merge")
    else:
        steps = tx.match.steps
        shapes = {n: (len(opened), *leaves[n].shape) for n in (*numbers, *sorted(others.difference(numbers)))}
        settings, trouble = _settings(steps, shapes)
        problems += trouble
        if len(inputs) == 1 and not trouble:
            wanted = {dtype if out_dtype is None else out_dtype, dtype} - {None}
            kept = lambda n: n in others or (not devices and all(leaves[n].dtype == d for d in wanted))
            copied = frozenset(n for n in _left_alone(steps, settings, shapes) if kept(n))
        settings = tuple({n: s[n] for n in numbers if n in s} for s in settings)
        misfit = misfits(steps, data, {n: shapes[n] for n in numbers}) if numbers else []
        problems += [Problem(p, "statistics") for p in misfit]
    if not copied.issuperset(codes):
        problems.append(f"  {refusal(reference, codes)}")
    problems += [f"  {refusal(other, found)}" for other in inputs[1:] if (found := quantised(other))]
    for name, header in leaves.items():
        wide = header.dtype is not None and (header.dtype == np.float64 or header.dtype.kind == "c")
        if wide and name not in copied:
            problems.append(f"  {name}: {header.dtype} cannot be merged exactly in float32; cast it in the checkpoint")
    if format == "orbax" and (alien := next((n for n, leaf in leaves.items() if leaf.stored), None)):
        text = f"  {alien} is {leaves[alien].stored[0]}, which Orbax cannot hold; write safetensors"  # type: ignore[index]
        problems.append(Problem(text, "format"))
    floating = tuple(n for n in numbers if n not in copied)
    exact = tuple(n for n in sorted(leaves) if n in copied or not _is_floating(leaves[n]))
    result, trouble = _result(leaves, floating, dtype, out_dtype)
    problems += trouble
    surveys = [step.survey for step in steps if step.survey is not None]
    looks = 1 + sum(survey.rounds for survey in surveys)
    bytes_of = lambda sources, names: sum(s.leaves[n].bytes for s in sources for n in names if n in s.leaves)
    both = (*inputs, *data)
    size, rest = bytes_of(both, floating), bytes_of((reference,), exact)
    again = sum(survey.rounds * (bytes_of(data, floating) if survey.of_data else size) for survey in surveys)
    common = {
        "base": opened_base,
        "models": opened,
        "format": format,
        "floating": floating,
        "exact": exact,
        "out": result,
        "settings": settings,
        "bytes_written": sum(leaf.bytes for leaf in result.values()),
        "statistics": data,
    }
    if format == "safetensors" and sharding is not None:
        text = "  sharding: safetensors are written by ranges of bytes, on any number of processes; leave it out"
        problems.append(Problem(text, "sharding"))
    shardings = _shardings(leaves, sharding) if format == "orbax" else {}
    for name, target in shardings.items():
        problems += [Problem(p, "sharding") for p in split_evenly(name, leaves[name].shape, target)]
    agree = rest * len(inputs) if len(inputs) > 1 else 0
    if devices:
        from jaxmerge.checkpoint import _orbax

        budget = parse_size(memory, "memory") if memory is not None else MEMORY
        in_memory = lambda budget: _batches(_orbax.groups(leaves), leaves, max(budget // (2 * len(both)), 1))

        def peak(batches: list[list[str]]) -> int:
            most = 0
            for batch in batches:
                work = max((leaves[n].size for n in batch if _is_floating(leaves[n])), default=0)
                held = bytes_of((*both, reference), batch)
                most = max(most, held + 2 * 4 * (len(opened) + len(data)) * work)
            return most

        batches = in_memory(budget)
        passes = 1 if len(batches) == 1 else looks
        return CheckpointPlan(
            **common,
            shardings=shardings,
            batches=tuple(map(tuple, batches)),
            units=(),
            entire=frozenset(),
            room_bytes=budget,
            layout=None,
            passes=passes,
            bytes_read=size + (again if passes > 1 else 0) + agree + rest,
            peak_bytes=peak(batches),
            runtime_bytes=runtime(orbax=True, whole=False),
            problems=tuple(problems),
            notes=_short(memory, peak(batches), lambda m: peak(in_memory(m))),
        )
    cut = functools.partial(
        by_ranges,
        inputs=both,
        floating=floating,
        steps=steps,
        settings=settings,
        shards=None if format == "safetensors" else {n: shards_of(s, len(leaves[n].shape)) for n, s in shardings.items()},
    )
    ways = cut(memory=memory)
    problems += [Problem(p, "memory") for p in ways.problems]
    twice = 2 * bytes_of(inputs, ways.again)
    files = None
    if format == "orbax":
        from jaxmerge.checkpoint._tree import Tree

        files = Tree(result, shardings, ways.spans, reference, ways.group)
    else:
        try:
            files = layout(result, parse_size(max_shard_bytes, "max_shard_bytes"), stem)
        except ValueError as e:
            problems.append(Problem(f"  {e}", "max_shard_bytes"))
    return CheckpointPlan(
        **common,
        shardings=shardings,
        batches=(),
        units=ways.units,
        entire=ways.entire,
        room_bytes=ways.room_bytes,
        layout=files,
        passes=looks,
        bytes_read=size + again + twice + agree + rest,
        peak_bytes=ways.peak.total,
        runtime_bytes=runtime(orbax="orbax" in (format, *(s.format for s in both)), whole=bool(ways.entire)),
        problems=tuple(problems),
        notes=() if ways.problems else _short(memory, ways.peak.total, lambda m: cut(memory=m).peak.total),
    )


def _short(memory: int | str | None, peak: int, peak_with: Callable[[int], int]) -> tuple[str, ...]:
    """That memory does not suffice, and what does: the first that is no less than what a merge with it takes."""
    if memory is None or peak <= (least := parse_size(memory, "memory")):
        return ()
    while peak > least:
        least, peak = peak, peak_with(peak)
    return (
        f"memory={memory} is less than this merge needs; raise memory= (--memory) to {-(-least // 10**6)}MB, or it takes more "
        "than it may",
    )


def _result(leaves: dict[str, Leaf], floating: Sequence[str], dtype: Any, out_dtype: Any) -> tuple[dict[str, Leaf], list[str]]:
    """The output's leaves, and what is wrong with the dtypes."""
    wanted = dtype if out_dtype is None else out_dtype
    problems = []
    for what, d in (("dtype", dtype), ("out_dtype", out_dtype)):
        if d is not None and not jnp.issubdtype(jnp.dtype(d), jnp.floating):
            problems.append(Problem(f"  {what}: {jnp.dtype(d)} is not a floating-point type", what))
    if problems or wanted is None:
        return dict(leaves), problems
    change = frozenset(floating)
    return {n: leaf._replace(dtype=jnp.dtype(wanted)) if n in change else leaf for n, leaf in leaves.items()}, problems


def _is_floating(header: Any) -> bool:
    return header.dtype is not None and jnp.issubdtype(header.dtype, jnp.floating)


def _mismatches(reference: Source, others: Sequence[Source], *, cast: bool) -> list[str]:
    """Every leaf that is missing, unexpected, or of another shape or dtype; what is cast may differ if it is floating point."""
    problems = []
    for other in others:
        ours, theirs = reference.leaves, other.leaves
        shapes, dtypes = [], []
        problems += _few([f"  missing in {other.name}: {n}" for n in sorted(ours.keys() - theirs.keys())])
        problems += _few([f"  unexpected in {other.name}: {n}" for n in sorted(theirs.keys() - ours.keys())])
        for n in sorted(ours.keys() & theirs.keys()):
            a, b = ours[n], theirs[n]
            where = f"in {other.name}, {{}} in {reference.name}"
            if a.shape != b.shape:
                shapes.append(f"  shape of {n}: {b.shape} " + where.format(a.shape) + _vocabulary_remedy(n, a.shape, b.shape))
            if a.dtype != b.dtype and not (cast and _is_floating(a) and _is_floating(b)):
                remedy = "; pass dtype= (--dtype) to cast" if _is_floating(a) and _is_floating(b) else ""
                dtypes.append(
                    f"  dtype of {n}: {b.dtype or 'not an array'} " + where.format(a.dtype or "not an array") + remedy
                )
        problems += _few(shapes) + _few(dtypes)
    return problems


def _few(problems: list[str], most: int = 8) -> list[str]:
    """The first of many problems of one kind, and how many there are."""
    return problems if len(problems) <= most else [*problems[: most - 1], f"  and {len(problems) - most + 1} more like it"]


def _vocabulary_remedy(name: str, ours: tuple[int, ...], theirs: tuple[int, ...]) -> str:
    """What helps where tables of tokens have other rows."""
    rows = len(ours) == 2 and ours[1:] == theirs[1:] and re.search(r"embed|lm_head|wte|shared\.weight", name)
    return "; a recipe with tokenizer: {source: union} aligns vocabularies" if rows else ""


def _shardings(leaves: dict[str, Any], sharding: Sharding | Rule | None) -> dict[str, Sharding]:
    if sharding is None:
        saved = {n: h.sharding for n, h in leaves.items() if h.dtype is not None}
        here = all(s is not None and (isinstance(s, NamedSharding) or jax.process_count() == 1) for s in saved.values())
        if here and saved:
            any_saved = next(iter(saved.values()))
            return {n: saved.get(n) or any_saved for n in leaves}
        sharding = all_devices()
    rule = sharding if callable(sharding) else lambda name, shape: sharding
    return {n: rule(n, h.shape) for n, h in leaves.items()}


def _settings(steps: Sequence[Step], shapes: dict[str, tuple[int, ...]]) -> tuple[tuple, list[str]]:
    """Each step's resolved hyperparameters by leaf, and what is wrong with them."""
    settings, problems = [], []
    for step in steps:
        found = {}
        for name, shape in shapes.items():
            try:
                found[name] = step.settings(name, shape)
            except ValueError as e:
                problems.append(Problem(f"  {e}", "tx"))
                break
        settings.append(found)
        if step.models is not None:
            shapes = {n: (step.models, *s[1:]) for n, s in shapes.items()}
    if next(iter(shapes.values()))[0] != 1:
        problems.append("  several models are left at the end; end the chain with sum_experts, mean_agreeing or the like")
    return tuple(settings), problems


def _left_alone(steps: Sequence[Step], settings: Sequence[dict[str, Any]], names: Iterable[str]) -> list[str]:
    """Leaves that the steps leave as they are, of one model without a base."""
    return [n for n in names if all(step.copies(s[n]) for step, s in zip(steps, settings, strict=True))]


def _batches(groups: list[list[str]], leaves: dict[str, Any], batch_bytes: int) -> list[list[str]]:
    batches, room = [], 0
    for group in groups:
        size = sum(leaves[n].bytes for n in group if n in leaves)
        if not batches or size > room:
            batches.append([])
            room = batch_bytes
        batches[-1] += group
        room -= size
    return batches
