"""The rows of a recipe as what the engine takes: a transform, a base, and models that are all alike."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxmerge.checkpoint import Source
from jaxmerge.params import MergeTransform, partition
from jaxmerge.params._deferred import last
from jaxmerge.params._partition import inner_steps, models_left, settings_of
from jaxmerge.params._transform import Step, atom, left
from jaxmerge.recipe._methods import Method
from jaxmerge.recipe._mosaic import Mosaic
from jaxmerge.recipe._resolve import Row
from jaxmerge.recipe._schema import Reference
from jaxmerge.recipe._statistics import Data
from jaxmerge.recipe._yaml import Wrong

Adapt = Callable[[Reference, str, str], tuple[Source, str]]
"""(model, its tensor, the output's) -> where to read it."""


class Work(NamedTuple):
    """What the engine is asked to do: tx, and the checkpoints, whose tensors have the names of the output; statistics too."""

    tx: MergeTransform
    base: Source | None
    models: tuple[Source, ...]
    statistics: tuple[Source, ...] = ()


def work(method: Method, rows: Sequence[Row], adapt: Adapt, seed: int, statistics: Data | None = None) -> Work:
    """A recipe's transform and its inputs.

    Args:
      method: of the recipe.
      rows: what it says.
      adapt: where a model's tensor is read.
      seed: of random masks.
      statistics: of each model; None where the method takes none.
    """
    inputs = {row.name: _ordered(method, row) for row in rows}
    slots = max(len(experts) for _, experts in inputs.values())
    like = adapt(*inputs[rows[0].name][1][0], rows[0].name)[0]

    def mosaic(which: str, take: Callable[[tuple], tuple[Reference, str]]) -> Source:
        chosen = {name: take(given) for name, given in inputs.items()}
        models = dict.fromkeys(str(model) for model, _ in chosen.values())
        title = next(iter(models)) if len(models) == 1 else f"{which} ({', '.join(models)})"
        return Mosaic(title, like, {name: adapt(model, there, name) for name, (model, there) in chosen.items()})

    def beside(data: Data, k: int) -> Source:
        chosen = {name: given[1][min(k, len(given[1]) - 1)] for name, given in inputs.items()}
        parts = {n: data.where[model, there, n] for n, (model, there) in chosen.items() if (model, there, n) in data.where}
        sources = [data.sources[model] for model, _ in chosen.values()]
        names = dict.fromkeys(source.name for source in sources)
        return Mosaic(next(iter(names)) if len(names) == 1 else f"statistics {k + 1}", sources[0], parts)

    based = any(base is not None for base, _ in inputs.values())
    models = tuple(mosaic(f"input {k + 1}", lambda given, k=k: given[1][min(k, len(given[1]) - 1)]) for k in range(slots))
    data = () if statistics is None else tuple(beside(statistics, k) for k in range(slots))
    return Work(transform(method, rows, seed), mosaic("base", lambda given: given[0]) if based else None, models, data)


def _ordered(method: Method, row: Row) -> tuple[tuple[Reference, str] | None, tuple[tuple[Reference, str], ...]]:
    """(what task vectors are taken from, the models): methods of two models have the base as the first of them."""
    if method.base == "first" and row.base is not None:
        return None, (row.inputs[row.base], *row.experts)
    return None if row.base is None else row.inputs[row.base], row.experts


def transform(method: Method, rows: Sequence[Row], seed: int) -> MergeTransform:
    """One chain where all rows agree in what shapes it, else a partition of several."""
    table = {row.name: row for row in rows}
    static = [name for name, p in method.parameters.items() if p.static]
    label = {row.name: str([row.values[name] for name in static]) for row in rows}

    def build(row: Row) -> MergeTransform:
        mine = [r for r in rows if label[r.name] == label[row.name]]
        values: dict[str, Any] = {"seed": seed}
        for name in method.parameters:
            values[name] = row.values[name] if name in static else _lookup(table, name)
            if row.values.get("scope") == "model" and name not in static:
                values[name] = _same(mine, name)  # one threshold over the model has one density
        return method.build(values)

    chains = {label[row.name]: row for row in rows}
    chains = {key: build(row) for key, row in chains.items()}
    tx = next(iter(chains.values())) if len(chains) == 1 else partition(chains, label.__getitem__)
    counts = {row.name: len(_ordered(method, row)[1]) for row in rows}
    return tx if len(set(counts.values())) == 1 else _uneven(tx, counts)


def _lookup(table: Mapping[str, Row], parameter: str) -> Callable[[str], Any]:
    return lambda name: table[name].values[parameter]


def _same(rows: Sequence[Row], name: str) -> Any:
    values = rows[0].values[name]
    differs = next((r.name for r in rows if r.values[name] != values), None)
    if differs is not None:
        raise Wrong(
            rows[0].marks.get(name),
            f"scope: model looks at all tensors together and has one {name} for them, but {rows[0].name} and {differs} differ; "
            "write one number, or scope: tensor.",
        )
    return values


def _uneven(tx: MergeTransform, counts: Mapping[str, int]) -> MergeTransform:
    """A chain over tensors with fewer models than others: the surplus inputs of those repeat their last one and are cut off."""
    steps = inner_steps(tx, "slices of different numbers of models")

    def settings(name, shape):
        k = counts[name]
        return {str(k): settings_of(steps, name, (k, *shape[1:]))}  # static: how many is part of the compilation key

    def match(settings, x):
        [(k, values)] = settings.items()
        x, plans = x[: int(k)], []
        for step, s in zip(steps, values, strict=True):
            plans.append(step.match(s, x))
            x = last(left(step, plans[-1], x))
        return {k: tuple(plans)}

    def merge(plan, x):
        [(k, plans)] = plan.items()
        x = x[: int(k)]
        for step, p in zip(steps, plans, strict=True):
            x = last(left(step, p, x))
        return x

    needs = tuple(dict.fromkeys(need for step in steps for need in step.needs))
    return atom(Step(settings, match, merge, models=models_left(steps), needs=needs))
