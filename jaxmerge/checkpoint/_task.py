"""From a plan to what one process does of it."""

import collections
from collections.abc import Sequence
from typing import Any

import jax

from jaxmerge.checkpoint import _processes
from jaxmerge.checkpoint._feed import Unit
from jaxmerge.checkpoint._plan import CheckpointPlan
from jaxmerge.checkpoint._stream import Task
from jaxmerge.params._transform import MergeTransform

SOON = 1 << 26
"""Bytes read and written, at most, of what comes first."""


def make_task(tx: MergeTransform, headers: CheckpointPlan, cast: Any) -> Task:
    """What this process does of a merge."""
    weights = [sum(unit_bytes(headers, u) for u in group) for group in headers.units]
    units = _processes.share(headers.units, weights, jax.process_index(), jax.process_count())
    return Task(
        steps=tx.match.steps,  # type: ignore[attr-defined]
        inputs=headers.inputs,
        parents=len(headers.parents),
        has_base=headers.base is not None,
        floating=frozenset(headers.floating),
        cast=None if cast is None else jax.numpy.dtype(cast),
        out={n: leaf.dtype for n, leaf in headers.out.items() if leaf.dtype is not None},
        units=small_first(units, [unit_bytes(headers, u) for u in units]),
        entire=headers.entire,
        limit=headers.room_bytes,
    )


def unit_bytes(headers: CheckpointPlan, unit: Unit) -> int:
    """What a unit reads and writes."""
    inputs = headers.inputs if unit.name in headers.shapes else headers.inputs[:1]
    leaf = headers.reference.leaves[unit.name]
    read = sum(there.bytes for s in inputs if (there := s.leaves.get(unit.name)) is not None)
    return unit.size * read // max(leaf.size, 1) + unit.size * headers.out[unit.name].dtype.itemsize  # type: ignore[union-attr]


def small_first(units: Sequence[Unit], weights: Sequence[int]) -> tuple[Unit, ...]:
    """Where the first unit is a large one, the largest of the small leaves goes before it: there is output soon."""
    parts = collections.Counter(unit.name for unit in units)
    small = [i for i, unit in enumerate(units) if weights[i] <= SOON and parts[unit.name] == 1]
    if not small or weights[0] <= SOON:
        return tuple(units)
    i = max(small, key=lambda i: weights[i])
    return (units[i], *units[:i], *units[i + 1 :])
