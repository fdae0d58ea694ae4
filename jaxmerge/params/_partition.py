"""Different merges for different leaves, by name."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmerge.params._deferred import Entries, entries, last
from jaxmerge.params._names import by_name
from jaxmerge.params._transform import Match, MergeTransform, Step, Survey, atom, chain, left


def partition(transforms: Mapping[str, MergeTransform], label: Callable[[str], str]) -> MergeTransform:
    """Merge each leaf with the transform that its label names.

    A statistic of the whole model is one of the leaves of its label.

    Args:
      transforms: {label: chain of this package's atoms}. All must leave as many models: one, or all that came.
      label: leaf name ("layers/0/kernel") -> label.

    Law:
      With one transform for all labels it is that transform. Each label's leaves come out as if there were no others.

    Raises:
      ValueError: a label without a transform; chains that leave different numbers of models.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> tx = jm.params.partition(
      ...     {"norm": jm.params.linear(), "rest": jm.params.linear([1, 0])}, lambda name: "norm" if "norm" in name else "rest"
      ... )
      >>> models = [{"norm": jnp.array(v), "w": jnp.array(v)} for v in (0.0, 2.0)]
      >>> merged = jm.params.merge(tx, None, models)
      >>> merged["norm"].item(), merged["w"].item()
      (1.0, 0.0)

    Source: the form is optax's `partition`; mergekit's filters and slices.
    """
    chains = {}
    for key, tx in transforms.items():
        if not isinstance(tx.match, Match):
            raise ValueError(f"partition: {key!r}: pass a chain of this package's atoms; write your own with per_leaf.")
        chains[key] = tx.match.steps
    left = {key: _reductions(steps) for key, steps in chains.items()}
    if len(set(left.values())) > 1:
        raise ValueError(f"partition: all chains must leave as many models; these leave {left} (none: as many as came).")

    def labelled(name: str) -> str:
        key = label(name)
        if key not in chains:
            raise ValueError(f"partition: leaf {name!r} has the label {key!r}, but there are transforms for {sorted(chains)}.")
        return key

    return chain(*(_column(steps, labelled) for steps in _columns(chains)))


def exclude(
    tx: MergeTransform, names: str | re.Pattern | Sequence[str | re.Pattern], *, rest: MergeTransform
) -> MergeTransform:
    """Merge all leaves but some with one transform, those with another.

    Args:
      tx: for the leaves that are not excluded; a statistic of the whole model is theirs alone.
      names: parts of the names of the leaves to exclude, or compiled patterns that are found in them.
      rest: for these, such as `linear()`; or `keep_base()`, where there is a base.

    Raises:
      ValueError: see `partition`.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base = {"embed": jnp.zeros(2), "mlp": jnp.zeros(2)}
      >>> models = [{"embed": jnp.ones(2), "mlp": jnp.array([1.0, 3.0])}, {"embed": 3 * jnp.ones(2), "mlp": jnp.zeros(2)}]
      >>> tx = jm.params.exclude(jm.params.ties(0.5), ["embed", "head"], rest=jm.params.linear())
      >>> merged = jm.params.merge(tx, base, models)
      >>> merged["embed"].tolist(), merged["mlp"].tolist()
      ([2.0, 2.0], [0.0, 3.0])

    Source: MergeLM's and fusion_bench's lists of excluded parameters, which keep the base (`keep_base`).
    """
    filters = [names] if isinstance(names, str | re.Pattern) else names
    return partition({"in": tx, "out": rest}, by_name(dict.fromkeys(filters, "out"), "in"))


def keep_base() -> MergeTransform:
    """Whatever the models changed is dropped: the base's leaf stays. Only for merges that have a base.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.params.merge(jm.params.keep_base(), {"w": jnp.array(1.0)}, [{"w": jnp.array(jnp.nan)}])["w"].item()
      1.0

    Source: MergeLM's excluded parameters.
    """
    zeros = lambda plan, x: jnp.where(x[:1] == 0, x[:1], 0)  # laid out as x, which a constant would not be
    return atom(Step(lambda name, shape: (), lambda settings, x: (), zeros, models=1, blocks=True))


# --- chains side by side ---------------------------------------------------------------------------------------------


def _reductions(steps: Iterable[Step]) -> tuple[int, ...]:
    """The numbers of models that a chain comes down to, one after the other."""
    left: list[int] = []
    for step in steps:
        if step.models is not None and left[-1:] != [step.models]:
            left.append(step.models)
    return tuple(left)


def _columns(chains: Mapping[str, tuple[Step, ...]]) -> list[dict[str, Step]]:
    """Steps to be done at once, at most one for each label; all labels reduce together."""
    waiting = {key: list(steps) for key, steps in chains.items()}
    left = dict.fromkeys(chains)
    columns = []
    while any(waiting.values()):
        reduces = {key: bool(w) and w[0].models is not None and w[0].models != left[key] for key, w in waiting.items()}
        column = {key: w.pop(0) for key, w in waiting.items() if w and reduces[key] == all(reduces.values())}
        left |= {key: step.models for key, step in column.items() if step.models is not None}
        columns.append(column)
    return columns


def _column(steps: Mapping[str, Step], label: Callable[[str], str]) -> MergeTransform:
    """One step, in which each leaf does what its label says, or waits."""

    def settings(name, shape):
        key = label(name)  # a static choice: the structure is part of the compilation key
        return {key: steps[key].settings(name, shape)} if key in steps else {}

    def match(settings, x):
        return {key: steps[key].match(s, x) for key, s in settings.items()}

    def merge(plan, x):
        for key, p in plan.items():
            x = left(steps[key], p, x)
        return last(x)

    models = {step.models for step in steps.values()} - {None}
    needs = tuple(dict.fromkeys(need for step in steps.values() for need in step.needs))
    surveys = {key: step.survey for key, step in steps.items() if step.survey is not None}
    survey = _of_labels(surveys, {key: step.lazy for key, step in steps.items()}) if surveys else None

    def resolve(settings, x):
        return {key: find(s, x) if (find := steps[key].resolve) and steps[key].open(s) else s for key, s in settings.items()}

    def fits(name, shape, found):
        if (data := steps[key].data if (key := label(name)) in steps else None) is not None:
            data(name, shape, found)

    def waits(settings):
        return any(steps[key].resolve is not None and steps[key].open(s) for key, s in settings.items())

    return atom(
        Step(
            settings,
            match,
            merge,
            models=models.pop() if models else None,
            survey=survey,
            needs=needs,
            lazy=True,
            blocks=_blocks(steps.values()),
            resolve=resolve if any(step.resolve for step in steps.values()) else None,
            open=waits,
            copies=lambda settings: all(steps[key].copies(s) for key, s in settings.items()),
            data=fits if any(step.data for step in steps.values()) else None,
        )
    )


def _blocks(steps: Iterable[Step]) -> bool | Literal["rows"]:
    """What blocks all of them take."""
    kinds = {step.blocks for step in steps}
    return False if False in kinds else "rows" if "rows" in kinds else True


def _of_labels(surveys: Mapping[str, Survey], lazy: Mapping[str, bool]) -> Survey:
    """Surveys one after the other, each of the leaves of its label; of none, where no leaf has it."""

    def of(key, settings):
        return {name: s[key] for name, s in sorted(settings.items()) if key in s}

    def back(key, settings, found):
        return {name: {key: found[name]} if name in found else s for name, s in settings.items()}

    def settle(settings, leaves):
        for key, survey in surveys.items():
            see = (lambda x: x) if lazy[key] else entries
            if own := of(key, settings):
                settings = back(key, settings, survey.settle(own, {name: see(leaves[name]) for name in own}))
        return settings

    def begin(key, notes):
        own = of(key, notes["settings"])
        query, notes[key] = surveys[key].start(own) if own else (None, None)
        return {key: query}, notes | {"round": 0}

    def start(settings):
        return begin(next(iter(surveys)), {"settings": settings})

    def read(query, x):
        ((key, asked),) = query.items()
        return jnp.zeros(1, jnp.uint32) if asked is None else surveys[key].read(asked, x)

    def step(query, notes, counts):
        ((key, asked),) = query.items()
        notes = notes | {"round": notes["round"] + 1}
        if own := of(key, notes["settings"]):
            asked, notes[key] = surveys[key].step(asked, notes[key], {name: counts[name] for name in own})
        following = list(surveys)[list(surveys).index(key) + 1 :]
        done = notes["round"] == surveys[key].rounds
        return begin(following[0], notes) if done and following else ({key: asked}, notes)

    def finish(notes, settings):
        for key, survey in surveys.items():
            if own := of(key, settings):
                settings = back(key, settings, survey.finish(notes[key], own))
        return settings

    def look(query, bits):
        ((key, asked),) = query.items()
        found = surveys[key].look
        return np.zeros(1, np.uint64) if asked is None or found is None else found(asked, bits)

    if len({survey.of_data for survey in surveys.values()}) > 1:
        raise ValueError("partition: statistics of the model and of data that lies in files cannot be taken side by side.")
    all_look = all(survey.look is not None for survey in surveys.values())
    rounds = sum(survey.rounds for survey in surveys.values())
    of_data = any(survey.of_data for survey in surveys.values())
    return Survey(settle, rounds, start, read, step, finish, look if all_look else None, of_data)


# --- a chain inside an atom ------------------------------------------------------------------------------------------


def inner_steps(tx: MergeTransform, what: str) -> tuple[Step, ...]:
    """The steps of a chain that can run on one leaf at a time."""
    if not isinstance(tx.match, Match):
        raise ValueError(f"{what}: pass a chain of this package's atoms; write your own with per_leaf.")
    if any(step.data is not None for step in tx.match.steps):
        raise ValueError(f"{what}: data that lies in files cannot be taken inside; pass arrays.")
    if any(step.survey is not None for step in tx.match.steps):
        raise ValueError(f'{what}: a statistic of the whole model cannot be taken inside; use scope="tensor".')
    return tx.match.steps


def settings_of(steps: tuple[Step, ...], name: str, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Each step's hyperparameters for one leaf."""
    found = []
    for step in steps:
        found.append(step.settings(name, shape))
        shape = shape if step.models is None else (step.models, *shape[1:])
    return tuple(found)


def models_left(steps: tuple[Step, ...]) -> int | None:
    left = [step.models for step in steps if step.models is not None]
    return left[-1] if left else None


def run(steps: tuple[Step, ...], settings: tuple[Any, ...], x: Entries) -> Array:
    """Match and merge one leaf, step by step."""
    for step, s in zip(steps, settings, strict=True):
        x = left(step, step.match(s, x), x)
    return last(x)
