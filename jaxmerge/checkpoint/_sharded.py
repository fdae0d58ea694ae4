"""The executor of merges on devices, which end in Orbax: leaves on their shardings, in as many passes as statistics need.

A statistic of one tensor is computed when the tensor is at hand. A statistic of the whole model (TIES' threshold) takes passes
of its own over the files: 3 for an exact threshold, 1 for a majority sign; then one pass merges. Where all leaves fit into one
batch they are read once.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P, Sharding

from jaxmerge.checkpoint import _orbax, _receipt
from jaxmerge.checkpoint._plan import CheckpointPlan
from jaxmerge.checkpoint._programs import after, stacked
from jaxmerge.checkpoint._refusals import differing, strange
from jaxmerge.params._deferred import last
from jaxmerge.params._stack import Integers, reduced
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
    recipe: Any,
    beside: Mapping[str, str | bytes] | None,
    tell: Callable[..., None],
) -> dict[str, Any]:
    """Merge into an Orbax checkpoint; fields of the report."""
    inputs = headers.inputs
    writer = _orbax.Writer(out, headers.out, overwrite=overwrite)
    if integers == "agree":
        _check_exact(headers)

    steps = tx.match.steps  # type: ignore[attr-defined]
    surveys = [i for i, step in enumerate(steps) if step.survey is not None]
    stages = 1 + sum(steps[i].survey.rounds for i in surveys)
    stage_bytes = sum(headers.reference.leaves[n].bytes for n in headers.floating) * len(inputs)
    held: dict[str, list[Any]] = {}
    stage = done = 0

    def stream():
        """(batch, {leaf: inputs}) for each batch; a single batch stays in memory between passes."""
        nonlocal done, stage, held
        stage += 1
        for batch in headers.batches:
            names = [n for n in batch if n in floating]
            if held:
                arrays = held
            else:
                targets = {n: headers.shardings[n] for n in names}
                parts = [c.load(targets) for c in inputs] if names else []
                arrays = {n: [part[n] for part in parts] for n in names}
                if len(headers.batches) == 1:
                    held = arrays
            yield batch, arrays
            done += sum(headers.reference.leaves[n].bytes for n in names) * len(inputs)
            tell(stage, stages, done, stage_bytes * stages)

    floating = frozenset(headers.floating)
    settings = list(headers.settings)
    has_base = headers.base is not None
    for i in surveys:
        survey = steps[i].survey
        query, notes = survey.start(settings[i])
        for _ in range(survey.rounds):
            counts = {}
            for _, arrays in stream():
                for n, leaves in arrays.items():
                    read = _reader(steps[:i], survey.read, headers.shardings[n], has_base, cast)
                    counts[n] = settled(read(query, [s[n] for s in settings[:i]], leaves))
                counts = {n: c if isinstance(c, np.ndarray) else _from_halves(c) for n, c in counts.items()}
            query, notes = survey.step(query, notes, {n: counts[n] for n in sorted(counts)})
        settings[i] = survey.finish(notes, settings[i])

    found: dict[str, Any] = {}
    bad: dict[str, list[int]] = {}
    try:
        for batch, arrays in stream():
            written, small = {}, {}
            for n, leaves in arrays.items():
                work = _merger(steps, headers.shardings[n], has_base, cast, headers.out[n].dtype)
                written[n], *small[n] = settled(work([s[n] for s in settings], leaves))
            for n, (plans, counts) in small.items():
                found[n] = jax.tree.map(np.asarray, plans)
                if np.any(counts):
                    bad[n] = np.asarray(counts).tolist()
            if bad and nonfinite == "refuse":
                continue  # look through all of them, so that one message names every leaf
            rest = [n for n in batch if n not in floating]
            if rest:
                written |= headers.reference.load({n: headers.shardings[n] for n in rest})
            writer.write(written)
        held = {}
        if not (bad and nonfinite == "refuse"):
            writer.finalize()
        if bad and nonfinite == "refuse":
            raise strange(bad, headers)
        files = dict(beside or {})
        if jax.process_index() == 0:
            dtype = None if cast is None else jnp.dtype(cast).name
            options = {"integers": integers, "nonfinite": nonfinite, "dtype": dtype, "memory": None, "on_devices": True}
            files[_receipt.NAME] = _receipt.write(headers, writer.files(), settings, options, recipe)
        writer.finish(files)
    except BaseException:
        writer.discard(wait=False)
        raise
    by_step = tuple({n: found[n][i] for n in headers.floating} for i in range(len(steps)))
    return {"plan": by_step, "nonfinite": bad}


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
        x = after(steps, settings, stacked(arrays, has_base, cast)[1])
        if not axes:
            return block(query, x)
        return jax.shard_map(block, mesh=mesh, in_specs=(P(), P(None, *spec)), out_specs=P())(query, x)

    return jax.jit(survey, out_shardings=_replicated(sharding))


@functools.lru_cache(maxsize=64)
def _merger(steps: tuple[Step, ...], sharding: Sharding, has_base: bool, cast: Any = None, out: Any = None) -> Callable:
    """(settings, inputs) -> the merged leaf on its sharding, the plans, and how many values of each input are not finite."""

    def merge(settings, arrays):
        zero, x = stacked(arrays, has_base, cast)
        plans = []
        for step, s in zip(steps, settings, strict=True):
            plans.append(step.match(s, x))
            x = left(step, plans[-1], x)
        x = reduced(last(x))
        leaf = (x if zero is None else zero + x).astype(arrays[0].dtype if out is None else out)
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
    targets = {n: headers.shardings[n] for n in headers.exact}
    if not targets:
        return
    parts = [c.load(targets) for c in headers.inputs]
    differ = [n for n in headers.exact if not _orbax.same([part[n] for part in parts])]
    if differ:
        raise differing(differ)
