"""Merge checkpoints: what is refused, which executor, and what is reported.

An output in a local directory is made by ranges (`_ranges`); Orbax on accelerators, or into a bucket, leaf by leaf on its
shardings (`_sharded`).
"""

import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jax.sharding import Sharding

from jaxmerge.checkpoint import _hub, _ranges
from jaxmerge.checkpoint._budget import peak_rss
from jaxmerge.checkpoint._journal import begun, fingerprint, gone
from jaxmerge.checkpoint._open import open as open_source
from jaxmerge.checkpoint._plan import CheckpointPlan, MergeError, plan as make_plan
from jaxmerge.checkpoint._remote import STORES, Url, is_remote
from jaxmerge.checkpoint._sharding import Rule
from jaxmerge.checkpoint._source import Format, Source, digest
from jaxmerge.params._stack import Integers
from jaxmerge.params._transform import Match, MergeTransform


class Progress(NamedTuple):
    """How far a merge is.

    Attributes:
      stage, stages: the pass over the files, of how many.
      done, total: bytes of all passes: of an Orbax output read, else read and written.
      seconds: since the beginning.
      resumed: of the bytes done, those that an earlier run did.
    """

    stage: int
    stages: int
    done: int
    total: int
    seconds: float = 0.0
    resumed: int = 0

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return (self.done - self.resumed) / self.seconds if self.seconds > 0 else 0.0

    @property
    def left(self) -> float:
        """Seconds to go, at this rate."""
        return (self.total - self.done) / self.rate if self.rate > 0 else float("inf")

    @property
    def peak_bytes(self) -> int:
        """The most memory that this process has had."""
        return peak_rss()


class MergeReport(NamedTuple):
    """What a merge did.

    Attributes:
      plan: what was found: per step of the transform, {leaf: thresholds, coefficients...} as numpy arrays.
      headers: the `CheckpointPlan` it followed.
      nonfinite: {leaf: counts}: NaN and inf per input, base first; only leaves that have any.
      seconds: wall time.
      resumed: bytes that an earlier run of the same merge had written.
      buffered: files that could not be read or written past the page cache.
      peak_bytes: the most memory that this process has had.
    """

    plan: tuple[dict[str, Any], ...]
    headers: CheckpointPlan
    nonfinite: dict[str, list[int]]
    seconds: float
    resumed: int = 0
    buffered: tuple[str, ...] = ()
    peak_bytes: int = 0


def as_begun(named: Sequence[Any], inputs: Sequence[Sequence[str]], out: Any) -> list[Any]:
    """What a merge is of, names on the Hub at the commits at which one that was cut off read them; all else as it is.

    Args:
      named: the base or None, the models, statistics.
      inputs: the files of each of them that was read; empty where none was.

    Raises:
      MergeError: a commit can no longer be read.
    """
    found = list(named)
    there = [i for i, name in enumerate(named) if name is not None]
    for i, files in zip(there, inputs, strict=False) if len(there) == len(inputs) else ():
        if not isinstance(named[i], str) or os.path.exists(named[i]) or (split := _hub.split(named[i])) is None:
            continue
        commit = next((c.commit for f in files if (c := _hub.at(f)) is not None), None)
        if commit is not None and commit != split[1]:
            found[i] = f"{split[0]}@{commit}"
            try:
                open_source(found[i])
            except (OSError, ValueError) as e:
                raise MergeError(gone(out, found[i], e)) from None
    return found


def check_outside(out: Any, inputs: Sequence[Source]) -> None:
    """Refuse an output that would be read as a part of an input: anywhere in a checkpoint of Orbax, which is all that lies in
    its folder; beside the files of one in safetensors, under a name that ends as theirs. Elsewhere in a folder it does no harm.

    Raises:
      MergeError: it lies there.
    """
    real = lambda path: pathlib.Path(os.path.realpath(str(path)))
    within = real(out).parents
    for source in inputs:
        trees = [source.path] if source.format == "orbax" else []
        trees += [os.path.dirname(f) for f in source.files if os.path.basename(f) in ("_CHECKPOINT_METADATA", "_METADATA")]
        tree = next((tree for tree in trees if real(tree) in within), None)
        if tree is not None:
            raise MergeError(
                f"{out} lies in {tree}, which is merged here and would not be the same any more; choose another place."
            )
        if real(source.path) in within:
            first = real(out).relative_to(real(source.path)).parts[0]
            if first.endswith((".safetensors", ".safetensors.index.json")):
                raise MergeError(f"{out} would be read as a part of {source.path}, which is merged here; choose another place.")


def merge(
    tx: MergeTransform,
    base: Any | None,
    models: Sequence[Any],
    out: Any,
    *,
    statistics: Sequence[Any] = (),
    format: Format | None = None,
    sharding: Sharding | Rule | None = None,
    memory: int | str | None = None,
    dtype: Any = None,
    out_dtype: Any = None,
    integers: Integers = "agree",
    nonfinite: Literal["refuse", "allow"] = "refuse",
    overwrite: bool = False,
    resume: bool = True,
    max_shard_bytes: int | str = "5GB",
    stem: str = "model",
    on_devices: bool | None = None,
    recipe: Any = None,
    beside: Mapping[str, str | bytes] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> MergeReport:
    """Merge checkpoints into a new one, in bounded memory; no leaf is ever gathered.

    Arithmetic is float32 with one cast at the end; the output has the leaves, dtypes and (Orbax) by default the shardings of
    the base. With several processes every one of them calls this with the same arguments, and touches only its own part.

    Args:
      tx: what to do, such as `params.ties(density=0.2)`.
      base: the checkpoint that the models were trained from, a path or a `Source`; None merges the models themselves.
      models: checkpoints, paths or sources; formats may be mixed.
      out: the directory where the output appears, when it is whole.
      statistics: data that a method takes of each model, as large as they are: see `plan`.
      format, sharding, memory, dtype, out_dtype, max_shard_bytes, stem, on_devices: see `plan`; Orbax into a bucket is made on
        devices.
      integers: leaves that are not floating point must agree ("agree"), or are taken from the base ("base"; the first model
        where there is none).
      nonfinite: refuse a model with NaN or inf, naming leaf and model, or merge it all the same.
      overwrite: replace what an earlier merge has left at `out`.
      resume: go on where the same merge was cut off, of the Hub's models at the commits that it read; False begins anew.
      recipe: what the receipt says was asked for, as JSON.
      beside: files that appear with the output, {name: contents}: configurations, tokenizers, a card.
      on_progress: called as the merge goes on.

    Law:
      The output equals `params.merge` of the loaded models: the same entries are kept and the same signs elected; sums agree to
      float32 rounding (a compiler may fuse a multiplication with an addition). A merge that was killed and run again writes
      the bytes of one that was not.

    Raises:
      MergeError: the plan has problems (all in one message), integer leaves differ, or values are not finite.
      FileExistsError: `out` exists. FileNotFoundError, ValueError: an input is not a checkpoint, or is damaged. OSError:
      another merge writes to `out`, the disk is full, a file cannot be read or written.
    """
    began = time.monotonic()
    bucket = is_remote(out)
    named = (base, *models, *statistics)
    steps = tx.match.steps if isinstance(tx.match, Match) else ()
    asked = digest(fingerprint(steps), [str(n) if isinstance(n, str | os.PathLike) else None for n in named])
    if resume:
        inputs = begun(Url(out) if bucket else out, asked=asked, recipe=recipe)
        base, *others = as_begun(named, inputs, out)
        models, statistics = others[: len(models)], others[len(models) :]
    if bucket and not str(out).startswith(STORES):
        raise MergeError(f"out is {out}; checkpoints are written to local paths, gs:// and s3://.")
    headers = make_plan(
        tx,
        base,
        models,
        statistics=statistics,
        format=format,
        sharding=sharding,
        memory=memory,
        dtype=dtype,
        out_dtype=out_dtype,
        max_shard_bytes=max_shard_bytes,
        stem=stem,
        on_devices=True if bucket else on_devices,
    )
    headers.check()
    if integers not in ("agree", "base"):
        raise MergeError(f'integers must be "agree" or "base", got {integers!r}.')
    if nonfinite not in ("refuse", "allow"):
        raise MergeError(f'nonfinite must be "refuse" or "allow", got {nonfinite!r}.')
    if bucket and headers.format == "safetensors":
        raise MergeError(f"safetensors are written to local directories, not to {out}; merge, then copy, or write Orbax.")
    real = lambda path: pathlib.Path(os.path.realpath(str(path)))
    for c in headers.inputs:
        if real(out) == real(c.path):
            raise MergeError(f"out is one of the inputs, {out}; choose another place.")
        if real(out) in real(c.path).parents:
            raise MergeError(f"{c.path}, which is merged here, lies in {out}; choose another place for the output.")
    check_outside(out, headers.inputs)
    common = {"integers": integers, "nonfinite": nonfinite, "overwrite": overwrite, "resume": resume}
    common |= {"recipe": recipe, "beside": beside}
    common["about"] = {"recipe": recipe, "asked": asked, "inputs": [list(source.files) for source in headers.inputs]}

    def tell(stage: int, stages: int, done: int, total: int, resumed: int = 0) -> None:
        if on_progress is not None:
            on_progress(Progress(stage, stages, done, total, time.monotonic() - began, resumed))

    if headers.layout is not None:
        found = _ranges.run(tx, headers, out, cast=dtype, memory=memory, tell=tell, **common)
    else:
        from jaxmerge.checkpoint import _sharded  # brings Orbax

        found = _sharded.run(tx, headers, out, cast=dtype, tell=tell, **common)
    return MergeReport(headers=headers, seconds=time.monotonic() - began, peak_bytes=peak_rss(), **found)
