"""The executor of merges on devices, which end in Orbax: leaves on their shardings, in as many passes as statistics need.

A statistic of one tensor is computed when the tensor is at hand. A statistic of the whole model (TIES' threshold) takes passes
of its own over the files: 3 for an exact threshold, 1 for a majority sign; then one pass merges. Where all leaves fit into one
batch they are read once.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P, Sharding

from jaxmerge.checkpoint import _orbax, _receipt
from jaxmerge.checkpoint._bucket import Bucket
from jaxmerge.checkpoint._journal import fingerprint, pack, unpack
from jaxmerge.checkpoint._plan import CheckpointPlan
from jaxmerge.checkpoint._processes import everyone
from jaxmerge.checkpoint._programs import after, stacked, with_data
from jaxmerge.checkpoint._refusals import differing, strange
from jaxmerge.checkpoint._remote import is_remote
from jaxmerge.checkpoint._sharding import shards_of
from jaxmerge.checkpoint._source import digest
from jaxmerge.checkpoint._tree import Leafwise, Tree
from jaxmerge.checkpoint._units import GROUP, Span
from jaxmerge.params._deferred import last
from jaxmerge.params._layout import visible
from jaxmerge.params._stack import Integers, reduced, rounded
from jaxmerge.params._transform import MergeTransform, Step, left, settled


def run(
    tx: MergeTransform,
    headers: CheckpointPlan,
    out: Any,
    *,
    cast: Any,
    integers: Integers,
    nonfinite: str,
    overwrite: bool,
    resume: bool,
    recipe: Any,
    about: Mapping[str, Any],
    beside: Mapping[str, str | bytes] | None,
    tell: Callable[..., None],
) -> dict[str, Any]:
    """Merge into an Orbax checkpoint; fields of the report."""
    inputs, steps = headers.inputs, tx.match.steps  # type: ignore[attr-defined]
    dtype = None if cast is None else jnp.dtype(cast).name
    options = {"integers": integers, "nonfinite": nonfinite, "dtype": dtype, "memory": None, "on_devices": True}
    if integers == "agree" and len(headers.parents) > 1:
        _check_exact(headers)
    tree = Tree(headers.out, headers.shardings, _shards(headers), headers.reference, GROUP)
    identity = digest(
        fingerprint(steps),
        pack(list(headers.settings)),
        [s.identity() for s in inputs],
        [headers.base is not None, options, jax.process_count(), headers.batches, tree.identity()],
        _receipt.versions(),
    )
    writer = (Bucket if is_remote(out) else Leafwise)(out, tree, identity, overwrite=overwrite, resume=resume, about=about)
    surveys = [i for i, step in enumerate(steps) if step.survey is not None]
    stages = 1 + sum(steps[i].survey.rounds for i in surveys)
    stage_bytes = sum(s.leaves[n].bytes for s in inputs for n in headers.floating if n in s.leaves)
    held: dict[str, list[Any]] = {}
    stage = done = 0
    floating = frozenset(headers.floating)
    layouts = {n: visible(headers.shardings[n]) for n in headers.floating}
    has_base, parents = headers.base is not None, len(headers.parents)

    def where(source: Any, n: str) -> Sharding:
        """As the output; data of another shape whole on every device."""
        same = source.leaves[n].shape == headers.reference.leaves[n].shape
        return layouts[n] if same else _replicated(layouts[n])

    def stream(first: int = 0):
        """(number, batch, {leaf: inputs}) for each batch from the first on; a single one stays in memory between passes."""
        nonlocal done, stage, held
        stage += 1
        for number, batch in enumerate(headers.batches):
            names = [n for n in batch if n in floating]
            if number >= first:
                if held:
                    arrays = held
                else:
                    parts = [c.load({n: where(c, n) for n in names if n in c.leaves}) for c in inputs] if names else []
                    arrays = {n: [part[n] for part in parts if n in part] for n in names}
                    if len(headers.batches) == 1:
                        held = arrays
                yield number, batch, arrays
            done += sum(s.leaves[n].bytes for s in inputs for n in names if n in s.leaves)
            tell(stage, stages, done, stage_bytes * stages)

    try:
        batches, rounds, found, bad = _recall(writer.lines)
        settings = list(headers.settings)
        for i in surveys:
            survey = steps[i].survey
            over, query, notes = rounds.get(i) or [0, *survey.start(settings[i])]
            done, stage = done + int(over) * stage_bytes, stage + int(over)
            for n in range(int(over), survey.rounds):
                counts = {}
                for _, _, arrays in stream():
                    for name, leaves in arrays.items():
                        if survey.of_data:
                            read, before, leaves = _reader((), survey.read, layouts[name], False), [], leaves[parents:]
                        else:
                            read = _reader(steps[:i], survey.read, layouts[name], has_base, cast)
                            before, leaves = [s[name] for s in settings[:i]], leaves[:parents]
                        counts[name] = settled(read(query, before, leaves)) if leaves else np.zeros(1, np.uint64)
                    counts = {name: c if isinstance(c, np.ndarray) else _from_halves(c) for name, c in counts.items()}
                query, notes = survey.step(query, notes, {name: counts[name] for name in sorted(counts)})
                writer.note({"round": i, "state": pack([n + 1, query, notes])})
            settings[i] = survey.finish(notes, settings[i])
        for number, batch, arrays in stream(batches):
            written, small = {}, {}
            for n, leaves in arrays.items():
                work = _merger(steps, layouts[n], has_base, cast, headers.out[n].dtype, parents if headers.statistics else None)
                written[n], *small[n] = settled(work([s[n] for s in settings], leaves))
            new = {n: jax.tree.map(np.asarray, plans) for n, (plans, _) in small.items()}
            strangers = {n: np.asarray(counts).tolist() for n, (_, counts) in small.items() if np.any(counts)}
            found, bad = found | new, bad | strangers
            if bad and nonfinite == "refuse":
                continue  # look through all of them, so that one message names every leaf
            writer.write(written | {n: headers.reference.read(n) for n in batch if n not in floating})
            writer.note({"batch": number + 1, "found": pack(new), "bad": strangers})
        held = {}
        if bad and nonfinite == "refuse":
            raise strange(bad, headers)
        made = writer.finalize()
        files, hashes = dict(beside or {}), _receipt.hashes(inputs, list(made.values()))
        if jax.process_index() == 0:
            files[_receipt.NAME] = _receipt.write(headers, made, hashes, settings, options, recipe)
        writer.finish(files)
    except BaseException as e:
        writer.discard(e)
        raise
    resumed = sum(headers.out[n].bytes for batch in headers.batches[:batches] for n in batch)
    by_step = tuple({n: found[n][i] for n in headers.floating} for i in range(len(steps)))
    return {"plan": by_step, "nonfinite": bad, "resumed": resumed}


def _recall(lines: Sequence[Mapping[str, Any]]) -> tuple[int, dict[int, Any], dict[str, Any], dict[str, Any]]:
    """What an earlier run did: batches, {step: the state of its statistic}, plans by leaf, counts of what is not finite.

    Only what all processes have noted counts.
    """
    rounds, batches = ([line for line in lines if kind in line] for kind in ("round", "batch"))
    counts = everyone([len(rounds), len(batches)])
    rounds, batches = rounds[: min(n for n, _ in counts)], batches[: min(n for _, n in counts)]
    found: dict[str, Any] = {}
    bad: dict[str, Any] = {}
    for line in batches:
        found, bad = found | unpack(line["found"]), bad | line["bad"]
    return len(batches), {line["round"]: unpack(line["state"]) for line in rounds}, found, bad


def _shards(headers: CheckpointPlan) -> dict[str, Span]:
    """What is written at once: a device's part."""
    shards = {n: shards_of(headers.shardings[n], len(leaf.shape)) for n, leaf in headers.out.items()}
    return {n: Span(0, max(leaf.shape[0] // shards[n][0], 1) if leaf.shape else 1) for n, leaf in headers.out.items()}


# --- one leaf on its devices -----------------------------------------------------------------------------------------
# Cached, so that leaves of one shape, dtype and sharding share a compilation; what differs by name is in the settings.


@functools.lru_cache(maxsize=64)
def _reader(steps: tuple[Step, ...], read: Callable, sharding: Sharding, has_base: bool, cast: Any = None) -> Callable:
    """(query, settings, inputs) -> counts of one leaf over all its shards, as two halves of 16 bits."""
    axes, spec, mesh = (), P(), None
    if isinstance(sharding, NamedSharding):
        mesh, spec = sharding.mesh, sharding.spec
        axes = tuple(a for entry in spec if entry is not None for a in (entry if isinstance(entry, tuple) else (entry,)))

    def block(query, x):
        counts = read(query, x)
        halves = jnp.stack([counts >> 16, counts & 0xFFFF])  # each sum fits 32 bits on up to 65536 devices
        return jax.lax.psum(halves, axes) if axes else halves

    def survey(query, settings, arrays):
        x = last(after(steps, settings, stacked(arrays, has_base, cast)[1]))
        if not axes:
            return block(query, x)
        return jax.shard_map(block, mesh=mesh, in_specs=(P(), P(None, *spec)), out_specs=P())(query, x)

    return jax.jit(survey, out_shardings=_replicated(sharding))


@functools.lru_cache(maxsize=64)
def _merger(  # noqa: PLR0917
    steps: tuple[Step, ...],
    sharding: Sharding,
    has_base: bool,
    cast: Any = None,
    out: Any = None,
    parents: int | None = None,
) -> Callable:
    """(settings, inputs) -> the merged leaf on its sharding, the plans, and how many values of each input are not finite."""

    def merge(settings, arrays):
        zero, x = stacked(arrays[:parents], has_base, cast)
        settings = settings if parents is None else with_data(settings, arrays[parents:])
        plans = []
        for step, s in zip(steps, settings, strict=True):
            plans.append(step.match(s, x))
            x = left(step, plans[-1], x)
        x = reduced(last(x))
        plans = plans if parents is None else with_data(plans, None)
        leaf = rounded(x if zero is None else zero + x, arrays[0].dtype if out is None else out)
        counts = jnp.stack([jnp.sum(~jnp.isfinite(a), dtype=jnp.uint32) for a in arrays])
        return leaf, plans, counts

    small = _replicated(sharding)
    return jax.jit(merge, out_shardings=(sharding, small, small))


def _replicated(sharding: Sharding) -> Sharding:
    return NamedSharding(sharding.mesh, P()) if isinstance(sharding, NamedSharding) else sharding


def _from_halves(counts: jax.Array) -> np.ndarray:
    high, low = np.asarray(counts).astype(np.uint64)
    return (high << np.uint64(16)) + low


# --- what is refused after reading -----------------------------------------------------------------------------------


def _check_exact(headers: CheckpointPlan) -> None:
    """As they are in the files: on devices without 64 bits they would be others."""
    differ = [n for n in headers.exact if not _orbax.same([c.read(n) for c in headers.parents])]
    if differ:
        raise differing(differ)
