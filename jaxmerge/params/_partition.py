"""Different merges for different leaves, by name."""

from collections.abc import Callable, Mapping
from typing import Any

from jax import Array

from jaxmerge.params._transform import Match, MergeTransform, Step, atom


def partition(transforms: Mapping[str, MergeTransform], label: Callable[[str], str]) -> MergeTransform:
    """Merge each leaf with the transform that its label names.

    Args:
      transforms: {label: chain of this package's atoms}. All must leave as many models: one, or all that came.
      label: leaf name ("layers/0/kernel") -> label.

    Law:
      With one transform for all labels it is that transform.

    Raises:
      ValueError: a label without a transform; chains that leave different numbers of models; a chain with a statistic of the
        whole model (use scope="tensor": it is not clear of which leaves the statistic would be).

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
    chains = {key: inner_steps(tx, f"partition: {key!r}") for key, tx in transforms.items()}
    left = {key: models_left(steps) for key, steps in chains.items()}
    if len(set(left.values())) > 1:
        raise ValueError(f"partition: all chains must leave as many models; these leave {left} (None: as many as came).")

    def settings(name, shape):
        key = label(name)
        if key not in chains:
            raise ValueError(f"partition: leaf {name!r} has the label {key!r}, but there are transforms for {sorted(chains)}.")
        return {key: settings_of(chains[key], name, shape)}  # a static choice: the structure is part of the compilation key

    def merge(plan, x):
        ((key, s),) = plan.items()
        return run(chains[key], s, x)

    inner = dict.fromkeys(need for steps in chains.values() for step in steps for need in step.needs)
    return atom(Step(settings, lambda settings, x: settings, merge, models=next(iter(left.values()), None), needs=tuple(inner)))


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
