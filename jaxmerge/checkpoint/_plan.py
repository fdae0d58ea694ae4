"""What a merge will do, from the headers alone: leaves, bytes, batches, passes, and every mismatch."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding

from jaxmerge.checkpoint import _orbax
from jaxmerge.checkpoint._source import Format, open as open_source
from jaxmerge.checkpoint._sharding import Rule, all_devices, split_evenly
from jaxmerge.params._transform import Match, MergeTransform, Step

BATCH_BYTES = 1 << 28
MEMORY = "1GB"


class MergeError(ValueError):
    """Checkpoints, transform and target do not fit together; the message lists every reason."""


class CheckpointPlan(NamedTuple):
    """What a merge will do; nothing but headers has been read.

    Attributes:
      base, models: the checkpoints; base may be None.
      floating, exact: names of the leaves that are merged, and of those that must agree; sorted.
      shardings: where each leaf goes.
      batches: names of the leaves that are in memory together.
      settings: per step of the transform, the resolved hyperparameters by leaf.
      passes: how often the floating leaves are read, the merge itself included; 1 where one batch holds them all.
      bytes_read, bytes_written: over all passes and all processes.
      peak_bytes: estimate of the largest batch at work, over all devices: its inputs and output, and float32 copies of its
        largest leaf.
      problems: every reason to refuse; empty if there is none.
    """

    base: Any
    models: tuple[Any, ...]
    floating: tuple[str, ...]
    exact: tuple[str, ...]
    shardings: dict[str, Sharding]
    batches: tuple[tuple[str, ...], ...]
    settings: tuple[dict[str, Any], ...]
    passes: int
    bytes_read: int
    bytes_written: int
    peak_bytes: int
    problems: tuple[str, ...]

    @property
    def reference(self) -> Any:
        """The checkpoint whose tree, dtypes and shardings the output has: the base, or the first model."""
        return self.models[0] if self.base is None else self.base

    def check(self) -> None:
        """Refuse, with every reason in one message."""
        if self.problems:
            raise MergeError("the merge is refused:\n" + "\n".join(self.problems))


def plan(
    tx: MergeTransform,
    base: Any | None,
    models: Sequence[Any],
    *,
    format: Format | None = None,
    sharding: Sharding | Rule | None = None,
    memory: int | str = MEMORY,
    dtype: Any = None,
    out_dtype: Any = None,
    max_shard_bytes: int | str = "5GB",
    batch_bytes: int = BATCH_BYTES,
) -> CheckpointPlan:
    """Find out what a merge will do, and everything that speaks against it, before a tensor byte is read.

    Args:
      tx: what to do, such as `params.ties(density=0.2)`.
      base: directory of the checkpoint that the models were trained from; None merges the models themselves.
      models: directories of Orbax checkpoints.
      sharding: where leaves go: a sharding, or a function of (name, shape) such as `fsdp(mesh)`. None: as the base (or the
        first model) was saved, if those devices exist here, else `fsdp` over all devices.
      batch_bytes: leaves are read in batches of about so many bytes of each input; a larger leaf is a batch of its own.

    Raises:
      FileNotFoundError, ValueError: a path is not an Orbax checkpoint. All else is listed in `problems`.
    """
    opened_base = None if base is None else open_source(base)
    opened = tuple(open_source(m) for m in models)
    if not opened:
        raise MergeError("no models; name at least one checkpoint.")
    reference = opened_base or opened[0]
    leaves = reference.leaves
    problems = _mismatches(reference, [m for m in opened if m is not reference])
    for name, header in leaves.items():
        if header.dtype is not None and (header.dtype == np.float64 or header.dtype.kind == "c"):
            problems.append(f"  {name}: {header.dtype} cannot be merged exactly in float32; cast it in the checkpoint")

    shardings = _shardings(leaves, sharding)
    for name, target in shardings.items():
        problems += split_evenly(name, leaves[name].shape, target)
    floating = tuple(n for n in sorted(leaves) if _is_floating(leaves[n]))
    exact = tuple(n for n in sorted(leaves) if not _is_floating(leaves[n]))

    settings, steps = (), ()
    if not isinstance(tx.match, Match):
        problems.append("  the transform's match is a plain function of a whole model; write it with params.per_leaf")
    elif not floating:
        problems.append("  no floating-point leaf to merge")
    else:
        steps = tx.match.steps
        settings, trouble = _settings(steps, {n: (len(opened), *leaves[n].shape) for n in floating})
        problems += trouble

    batches = _batches(_orbax.groups(leaves), leaves, batch_bytes)
    inputs = len(opened) + (opened_base is not None)
    looks = 1 + sum(step.survey.rounds for step in steps if step.survey is not None)
    passes = 1 if len(batches) == 1 else looks
    size = sum(leaves[n].bytes for n in floating)
    rest = sum(leaves[n].bytes for n in exact)
    peak = 0
    for batch in batches:
        work = max((math.prod(leaves[n].shape) for n in batch if _is_floating(leaves[n])), default=0)
        peak = max(peak, sum(leaves[n].bytes for n in batch) * (inputs + 1) + 2 * 4 * len(opened) * work)
    return CheckpointPlan(
        base=opened_base,
        models=opened,
        floating=floating,
        exact=exact,
        shardings=shardings,
        batches=tuple(map(tuple, batches)),
        settings=settings,
        passes=passes,
        bytes_read=size * inputs * passes + rest * (inputs + 1),
        bytes_written=size + rest,
        peak_bytes=peak,
        problems=tuple(problems),
    )


def _is_floating(header: Any) -> bool:
    return header.dtype is not None and jnp.issubdtype(header.dtype, jnp.floating)


def _mismatches(reference: Any, others: Sequence[Any]) -> list[str]:
    """Every leaf that is missing, unexpected, or of another shape or dtype."""
    problems = []
    for other in others:
        ours, theirs = reference.leaves, other.leaves
        problems += [f"  missing in {other.name}: {n}" for n in sorted(ours.keys() - theirs.keys())]
        problems += [f"  unexpected in {other.name}: {n}" for n in sorted(theirs.keys() - ours.keys())]
        for n in sorted(ours.keys() & theirs.keys()):
            a, b = ours[n], theirs[n]
            where = f"in {other.name}, {{}} in {reference.name}"
            if a.shape != b.shape:
                problems.append(f"  shape of {n}: {b.shape} " + where.format(a.shape))
            if a.dtype != b.dtype:
                problems.append(f"  dtype of {n}: {b.dtype or 'not an array'} " + where.format(a.dtype or "not an array"))
    return problems


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
                problems.append(f"  {e}")
                break
        settings.append(found)
        if step.models is not None:
            shapes = {n: (step.models, *s[1:]) for n, s in shapes.items()}
    if next(iter(shapes.values()))[0] != 1:
        problems.append("  several models are left at the end; end the chain with sum_experts, mean_agreeing or the like")
    return tuple(settings), problems


def _batches(groups: list[list[str]], leaves: dict[str, Any], batch_bytes: int) -> list[list[str]]:
    batches, room = [], 0
    for group in groups:
        size = sum(leaves[n].bytes for n in group)
        if not batches or size > room:
            batches.append([])
            room = batch_bytes
        batches[-1] += group
        room -= size
    return batches
