"""Several processes: who does what, and what little they tell each other."""

import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxmerge.checkpoint._feed import Unit


def everyone(value: Any) -> list[Any]:
    """What each process has to say (as JSON), by rank."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.array([text.size], np.int32))).reshape(-1)
    room = np.zeros(int(sizes.max()), np.uint8)
    room[: text.size] = text
    rows = np.asarray(multihost_utils.process_allgather(room)).reshape(len(sizes), -1)
    return [json.loads(row[:n].tobytes().decode()) for row, n in zip(rows, sizes, strict=True)]


def wait(what: str) -> None:
    """Until all processes are here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"jaxmerge: {what}")


def summed(counts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Counts by leaf, over all processes."""
    if jax.process_count() == 1:
        return counts
    total: dict[str, np.ndarray] = {}
    for mine in everyone({n: [list(c.shape), c.reshape(-1).tolist()] for n, c in counts.items()}):
        for n, (shape, flat) in mine.items():
            c = np.array(flat, np.uint64).reshape(shape)
            total[n] = total[n] + c if n in total else c
    return total


def share(groups: Sequence[tuple[Unit, ...]], weights: Sequence[int], rank: int, processes: int) -> tuple[Unit, ...]:
    """The units of one process, in their order: large groups to whoever has least, then runs of small ones to fill up.

    Args:
      groups, weights: what must stay together, and how much each is.
    """
    if processes == 1:
        return tuple(unit for group in groups for unit in group)
    total, loads = sum(weights), [0] * processes
    owner: dict[int, int] = {}
    large = total // (64 * processes)
    for i in sorted((i for i, w in enumerate(weights) if w > large), key=lambda i: (-weights[i], i)):
        owner[i] = min(range(processes), key=lambda p: loads[p])
        loads[owner[i]] += weights[i]
    at, fair = 0, total / processes
    for i, w in enumerate(weights):
        if i not in owner:
            while at < processes - 1 and loads[at] + w / 2 > fair:
                at += 1
            owner[i] = at
            loads[at] += w
    return tuple(unit for i, group in enumerate(groups) if owner[i] == rank for unit in group)
