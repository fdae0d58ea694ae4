"""Is a checkpoint what its receipt says? Files and inputs by their hashes, a sample of the tensors by computing them again."""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxmerge.checkpoint import _journal, _receipt
from jaxmerge.checkpoint._feed import Unit, flat_range
from jaxmerge.checkpoint._open import open as open_source
from jaxmerge.checkpoint._plan import MergeError, plan
from jaxmerge.checkpoint._stream import Stream
from jaxmerge.checkpoint._task import make_task
from jaxmerge.params._transform import MergeTransform


class Verified(NamedTuple):
    """What was found.

    Attributes:
      leaves: those of which a part was computed again, and came out bit for bit; of a merge on devices, to rounding.
      problems: what is not as the receipt says; empty if all is.
      notes: what may explain a difference: other versions, inputs without a hash.
    """

    leaves: tuple[str, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def verify(
    out: Any,
    tx: MergeTransform,
    *,
    base: Any = None,
    models: Sequence[Any] | None = None,
    statistics: Sequence[Any] | None = None,
    leaves: int = 8,
    seed: int = 0,
    memory: int | str | None = None,
) -> Verified:
    """Compare a merged checkpoint with its receipt, and compute a sample of it again from the parents.

    Args:
      out: the directory of the merge.
      tx: the transform that made it.
      base, models, statistics: the parents, and data that came with them, where they have moved or were views; None: as the
        receipt names them.
      leaves: of how many leaves, drawn at random, a part is computed again; copied ones come last.
      seed: another seed, another sample.
      memory: see `plan`; None: as the merge had.

    Raises:
      FileNotFoundError: no receipt, or a parent that is not there. MergeError: the parents do not fit together.
    """
    receipt, result = _receipt.receipt(out), open_source(out)
    memory = receipt["options"]["memory"] if memory is None else memory
    if base is None and receipt["base"] is not None:
        base = receipt["base"]["path"]
    models = [m["path"] for m in receipt["models"]] if models is None else models
    if statistics is None:
        statistics = [s["path"] for s in receipt.get("statistics", [])]
    made = receipt.get("format", "safetensors")
    headers = plan(
        tx, base, models, statistics=statistics, format=made, dtype=receipt["options"]["dtype"], memory=memory, on_devices=False
    )
    headers.check()
    problems, notes = [], []
    for file, was in receipt["files"].items():
        if _receipt.sample_hash(result.path / file) != was:
            problems.append(f"{file} is not the file that was written")
    said = ([receipt["base"]] if receipt["base"] else []) + receipt["models"] + receipt.get("statistics", [])
    if len(said) != len(headers.inputs):
        raise MergeError(f"the receipt names {len(said)} parents, {len(headers.inputs)} are given.")
    for was, source in zip(said, headers.inputs, strict=True):
        if sorted(was["files"].values()) != sorted(_receipt.hashes([source]).values()):
            problems.append(f"{source.name} is not the checkpoint that was merged")
    if receipt["options"].get("on_devices"):
        notes.append("merged on devices, computed again on this host: equal to rounding")
    if _receipt.versions() != receipt["versions"]:
        notes.append(f"merged with {receipt['versions']}, verified with {_receipt.versions()}: rounding may differ")
    wrong, missing = [], sorted(headers.out.keys() ^ result.leaves.keys())
    if missing:
        problems.append(f"leaves that only the output or only its parents have: {', '.join(missing[:5])}")
    checked = []
    settings = list(headers.settings)
    for i, (step, said) in enumerate(zip(tx.match.steps, receipt["settings"], strict=True)):  # type: ignore[attr-defined]
        if step.survey is not None:  # a statistic of the whole model is believed, or all of it would have to be read
            settings[i] = _journal.unpack(said)
        elif _journal.pack(settings[i]) != said:
            problems.append(f"step {i} of the transform has other coefficients than the receipt")
    task = make_task(tx, headers, receipt["options"]["dtype"])
    others = {n: d for n in headers.exact if n in result.leaves and (d := headers.out[n].dtype) is not None}
    cast = {n for n, d in others.items() if jnp.issubdtype(d, jnp.floating) and result.leaves[n].dtype != d}  # not copied then
    task = task._replace(floating=task.floating | cast)
    chosen: set[str] = set()
    for names in (sorted(n for n in headers.floating if n in result.leaves), sorted(others)):  # what is copied comes last
        chosen |= set(random.Random(seed).sample(names, min(leaves - len(chosen), len(names))))
    task = task._replace(out={n: leaf.dtype for n, leaf in result.leaves.items()}, units=_one_each(task.units, chosen, seed))
    stream = Stream(task, settings, lambda read, written: None)
    for unit, runs in stream.units(task.units, len(task.steps)):
        there = flat_range(result, unit)
        merged = unit.name in task.floating
        again = np.concatenate([block for _, block in stream.merged(unit, runs)]) if merged else runs[0].entries
        differ = np.flatnonzero(_bits(again) != _bits(there))
        if merged and receipt["options"].get("on_devices"):
            differ = differ[~_near(again[differ].astype(np.float32), there[differ].astype(np.float32), again.dtype)]
        if differ.size:
            at = unit.start + int(differ[0])
            wrong.append(f"{unit.name}: {differ.size} of {unit.size} entries differ, the first at flat index {at}")
        else:
            checked.append(unit.name)
    stream.reader.close()
    return Verified(tuple(sorted(checked)), (*problems, *wrong), tuple(notes))


def _bits(x: np.ndarray) -> np.ndarray:
    """Each entry's bytes, as one number or several."""
    return x.view(f"u{min(x.itemsize, 8)}")


def _near(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Whether numbers differ by no more than the rounding of their dtype, to one side and the other, and of float32 sums."""
    return np.abs(a - b) <= 2 * float(jnp.finfo(dtype).eps) * np.abs(b) + 1e-6 * np.max(np.abs(b), initial=0)


def _one_each(units: Sequence[Unit], names: set[str], seed: int) -> tuple[Unit, ...]:
    """One unit of each leaf, at random."""
    drawn: dict[str, list[Unit]] = {}
    for unit in units:
        if unit.name in names:
            drawn.setdefault(unit.name, []).append(unit)
    draw = random.Random(seed)
    return tuple(draw.choice(mine) for mine in drawn.values())
