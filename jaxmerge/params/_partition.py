"""Different merges for different leaves, by name."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxmerge.params._names import by_name
from jaxmerge.params._transform import Match, MergeTransform, Step, Survey, atom, chain


def partition(transforms: Mapping[str, MergeTransform], label: Callable[[str], str]) -> MergeTransform:
    """Merge each leaf with the transform that its label names.

    A statistic of the whole model is one of the leaves of its label.

    Args:
      transforms: {label: chain of this package's atoms}. All must leave as many models: one, or all that came.
      label: leaf name ("layers/0/kernel") -> label.

    Law:
      With one transform for all labels it is that transform. Each label's leaves come out as if there were no others.

    Raises:
      ValueError: a label without a transform; chains that leave different numbers of models; two statistics of the whole model
        in the step that reduces the models (merge one of them with scope="tensor").

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
    """Steps to be done at once, at most one for each label: all reduce together, and one at a time looks at the whole model."""
    waiting = {key: list(steps) for key, steps in chains.items()}
    left = dict.fromkeys(chains)
    columns = []
    while any(waiting.values()):
        reduces = {key: bool(w) and w[0].models is not None and w[0].models != left[key] for key, w in waiting.items()}
        together = any(reduces.values()) and all(reduces.values())
        column: dict[str, Step] = {}
        for key, steps in waiting.items():
            surveyed = any(s.survey is not None for s in column.values())
            if not steps or reduces[key] != together or (steps[0].survey is not None and surveyed):
                continue
            column[key] = steps[0]
        if together and len(column) < len(waiting):
            raise ValueError(
                'partition: two chains look at the whole model in the step that reduces the models; use scope="tensor" in one.'
            )
        for key, step in column.items():
            waiting[key].pop(0)
            left[key] = left[key] if step.models is None else step.models
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
            x = steps[key].merge(p, x)
        return x

    models = {step.models for step in steps.values()} - {None}
    needs = tuple(dict.fromkeys(need for step in steps.values() for need in step.needs))
    survey = next((_of_label(key, step.survey) for key, step in steps.items() if step.survey is not None), None)

    def resolve(settings, x):
        return {key: find(s, x) if (find := steps[key].resolve) and steps[key].open(s) else s for key, s in settings.items()}

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
            blocks=all(step.blocks for step in steps.values()),
            resolve=resolve if any(step.resolve for step in steps.values()) else None,
            open=waits,
        )
    )


def _of_label(key: str, survey: Survey) -> Survey:
    """A survey of the leaves of one label; of none, where no leaf has it."""

    def mine(settings):
        return {name: s[key] for name, s in settings.items() if key in s}

    def back(settings, found):
        return {name: {key: found[name]} if name in found else s for name, s in settings.items()}

    def settle(settings, leaves):
        own = mine(settings)
        return back(settings, survey.settle(own, {name: leaves[name] for name in own})) if own else settings

    def start(settings):
        own = mine(settings)
        query, notes = survey.start(own) if own else (None, None)
        return query, {"leaves": sorted(own), "notes": notes}

    def read(query, x):
        return jnp.zeros(1, jnp.uint32) if query is None else survey.read(query, x)

    def step(query, notes, counts):
        if query is None:
            return query, notes
        query, inner = survey.step(query, notes["notes"], {name: counts[name] for name in notes["leaves"]})
        return query, notes | {"notes": inner}

    def finish(notes, settings):
        return back(settings, survey.finish(notes["notes"], mine(settings))) if notes["leaves"] else settings

    return Survey(settle, survey.rounds, start, read, step, finish)


# --- a chain inside an atom ------------------------------------------------------------------------------------------


def inner_steps(tx: MergeTransform, what: str) -> tuple[Step, ...]:
    """The steps of a chain that can run on one leaf at a time."""
    if not isinstance(tx.match, Match):
        raise ValueError(f"{what}: pass a chain of this package's atoms; write your own with per_leaf.")
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


def run(steps: tuple[Step, ...], settings: tuple[Any, ...], x: Array) -> Array:
    """Match and merge one leaf, step by step."""
    for step, s in zip(steps, settings, strict=True):
        x = step.merge(step.match(s, x), x)
    return x
