"""The engine: stream leaves through a transform, on their shardings, in as many passes as its statistics need.

A statistic of one tensor is computed when the tensor is at hand. A statistic of the whole model (TIES' threshold) takes passes
of its own over the files: 3 for an exact threshold, 1 for a majority sign; then one pass merges. Where all leaves fit into one
batch they are read once.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P, Sharding

from jaxmerge.checkpoint import _orbax
from jaxmerge.checkpoint._plan import BATCH_BYTES, MEMORY, CheckpointPlan, MergeError, plan as make_plan
from jaxmerge.checkpoint._sharding import Rule
from jaxmerge.checkpoint._source import Format
from jaxmerge.params._stack import Integers, add_leaf, reduced, stack_leaf
from jaxmerge.params._transform import MergeTransform, Step, settled


class Progress(NamedTuple):
    """How far a merge is: the pass, of how many, and the bytes of all passes done, of how many."""

    stage: int
    stages: int
    done: int
    total: int


class MergeReport(NamedTuple):
    """What a merge did.

    Attributes:
      plan: what was found: per step of the transform, {leaf: thresholds, coefficients...} as numpy arrays.
      headers: the `CheckpointPlan` it followed.
      nonfinite: {leaf: counts}: NaN and inf per input, base first; only leaves that have any.
      seconds: wall time.
    """

    plan: tuple[dict[str, Any], ...]
    headers: CheckpointPlan
    nonfinite: dict[str, list[int]]
    seconds: float


def merge(
    tx: MergeTransform,
    base: Any | None,
    models: Sequence[Any],
    out: Any,
    *,
    format: Format | None = None,
    sharding: Sharding | Rule | None = None,
    memory: int | str = MEMORY,
    dtype: Any = None,
    out_dtype: Any = None,
    integers: Integers = "agree",
    nonfinite: Literal["refuse", "allow"] = "refuse",
    overwrite: bool = False,
    resume: bool = True,
    max_shard_bytes: int | str = "5GB",
    recipe: Any = None,
    on_progress: Callable[[Progress], None] | None = None,
    batch_bytes: int = BATCH_BYTES,
) -> MergeReport:
    """Merge Orbax checkpoints into a new one, leaf by leaf, on the target sharding; no leaf is ever gathered.

    Arithmetic is float32 with one cast at the end; the output has the tree, dtypes and (by default) shardings of the base. With
    several processes every one of them calls this with the same arguments, and touches only the shards of its devices.

    Args:
      tx: what to do, such as `params.ties(density=0.2)`.
      base: the checkpoint that the models were trained from, a path or a `Source`; None merges the models themselves.
      models: checkpoints, paths or sources; formats may be mixed.
      out: where the output appears, when it is whole.
      format: "orbax" or "safetensors"; None: as the base (or the first model) is stored.
      sharding: where leaves go; see `plan`.
      memory: bytes, or such as "2GB": what buffers and arrays of the merge may take on this host.
      dtype: cast inputs to it before anything else; arithmetic is float32 all the same.
      out_dtype: of the output's floating-point leaves; None: `dtype`, or what each leaf of the base has.
      integers: leaves that are not floating point must agree ("agree"), or are taken from the base ("base"; the first model
        where there is none).
      nonfinite: refuse a model with NaN or inf, naming leaf and model, or merge it all the same.
      overwrite: replace what is at `out`.
      resume: go on where the same merge was cut off; False begins anew.
      max_shard_bytes: safetensors files larger than this are split; bytes, or such as "5GB".
      recipe: what the receipt says was asked for, as JSON; see `Receipt`.
      on_progress: called after each batch.

    Law:
      The output equals `params.merge` of the loaded models: the same entries are kept and the same signs elected; sums agree to
      float32 rounding (a compiler may fuse a multiplication with an addition).

    Raises:
      MergeError: the plan has problems (all in one message), integer leaves differ, or values are not finite.
      FileExistsError: `out` exists. FileNotFoundError, ValueError: an input is not an Orbax checkpoint.
    """
    began = time.monotonic()
    headers = make_plan(tx, base, models, sharding=sharding, batch_bytes=batch_bytes)
    headers.check()
    if integers not in ("agree", "base"):
        raise MergeError(f'integers must be "agree" or "base", got {integers!r}.')
    inputs = ((headers.base,) if headers.base is not None else ()) + headers.models
    if _orbax.epath.Path(out).absolute() in [c.path for c in inputs]:
        raise MergeError(f"out is one of the inputs, {out}; choose another place.")
    writer = _orbax.Writer(out, headers.reference.leaves, overwrite=overwrite)
    if integers == "agree":
        _check_exact(headers, inputs)

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
            if on_progress is not None:
                on_progress(Progress(stage, stages, done, stage_bytes * stages))

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
                    read = _reader(steps[:i], survey.read, headers.shardings[n], has_base)
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
                work = _merger(steps, headers.shardings[n], has_base)
                written[n], *small[n] = settled(work([s[n] for s in settings], leaves))
            for n, (plans, strange) in small.items():
                found[n] = jax.tree.map(np.asarray, plans)
                if np.any(strange):
                    bad[n] = np.asarray(strange).tolist()
            if bad and nonfinite == "refuse":
                continue  # look through all of them, so that one message names every leaf
            rest = [n for n in batch if n not in floating]
            if rest:
                written |= headers.reference.load({n: headers.shardings[n] for n in rest})
            writer.write(written)
        if bad and nonfinite == "refuse":
            raise MergeError(_strange(bad, inputs))
        held = {}
        writer.finish()
    except BaseException:
        writer.discard(wait=False)
        raise
    by_step = tuple({n: found[n][i] for n in headers.floating} for i in range(len(steps)))
    return MergeReport(by_step, headers, bad, time.monotonic() - began)


# --- one leaf on its devices -----------------------------------------------------------------------------------------
# Cached, so that leaves of one shape, dtype and sharding share a compilation; what differs by name is in the settings.


def _stack(arrays: Sequence[jax.Array], has_base: bool) -> jax.Array:
    return stack_leaf(arrays[0], arrays[1:]) if has_base else stack_leaf(None, arrays)


@functools.lru_cache(maxsize=64)
def _reader(steps: tuple[Step, ...], read: Callable, sharding: Sharding, has_base: bool) -> Callable:
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
        x = _stack(arrays, has_base)
        for step, s in zip(steps, settings, strict=True):
            x = step.merge(step.match(s, x), x)
        if not axes:
            return block(query, x)
        return jax.shard_map(block, mesh=mesh, in_specs=(P(), P(None, *spec)), out_specs=P())(query, x)

    return jax.jit(survey, out_shardings=_replicated(sharding))


@functools.lru_cache(maxsize=64)
def _merger(steps: tuple[Step, ...], sharding: Sharding, has_base: bool) -> Callable:
    """(settings, inputs) -> the merged leaf on its sharding, the plans, and how many values of each input are not finite."""

    def merge(settings, arrays):
        x = _stack(arrays, has_base)
        plans = []
        for step, s in zip(steps, settings, strict=True):
            plans.append(step.match(s, x))
            x = step.merge(plans[-1], x)
        leaf = add_leaf(arrays[0], x) if has_base else reduced(x).astype(arrays[0].dtype)
        strange = jnp.stack([jnp.sum(~jnp.isfinite(a), dtype=jnp.uint32) for a in arrays])
        return leaf, plans, strange

    small = _replicated(sharding)
    return jax.jit(merge, out_shardings=(sharding, small, small))


def _replicated(sharding: Sharding) -> Sharding:
    return NamedSharding(sharding.mesh, P()) if isinstance(sharding, NamedSharding) else sharding


def _from_halves(counts: jax.Array) -> np.ndarray:
    high, low = np.asarray(counts).astype(np.uint64)
    return (high << np.uint64(16)) + low


# --- what is refused after reading -----------------------------------------------------------------------------------


def _check_exact(headers: CheckpointPlan, inputs: Sequence[Any]) -> None:
    targets = {n: headers.shardings[n] for n in headers.exact}
    if not targets:
        return
    parts = [c.load(targets) for c in inputs]
    differ = [n for n in headers.exact if not _orbax.same([part[n] for part in parts])]
    if differ:
        raise MergeError(
            f"leaves that are not floating point differ between the checkpoints and have no mean: {differ}; "
            'pass integers="base" (--integers base) to take the base\'s.'
        )


def _strange(bad: dict[str, list[int]], inputs: Sequence[Any]) -> str:
    lines = [
        f"  {n}: {count} in {c.name}"
        for n, counts in sorted(bad.items())
        for c, count in zip(inputs, counts, strict=True)
        if count
    ]
    return (
        "values that are not finite (NaN or inf); nothing was written:\n"
        + "\n".join(lines)
        + '\nrepair the checkpoint, or pass nonfinite="allow" (--nonfinite allow).'
    )
