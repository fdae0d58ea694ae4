"""What a recipe says of data beside its models: Fisher information, Gram matrices; one checkpoint for each."""

from collections.abc import Mapping, Sequence

from jaxmerge.checkpoint import Source
from jaxmerge.checkpoint._statistics import HOW, stranger
from jaxmerge.recipe._open import open_model
from jaxmerge.recipe._resolve import Row
from jaxmerge.recipe._schema import Path, Recipe, Reference
from jaxmerge.recipe._yaml import Mistake


def statistics(
    recipe: Recipe,
    rows: Sequence[Row],
    sources: Mapping[Reference, Source],
    opened: Mapping[Reference, Source],
    earlier: Mapping[str, Source],
) -> tuple[dict[Reference, Source], list[Mistake]]:
    """The statistics of each model that is merged, and what is wrong with them.

    Args:
      recipe, rows: a document, resolved.
      sources: its models, in one layout.
      opened: them as they lie on disk.
      earlier: results of other documents, by name.
    """
    named, marks = recipe.statistics(), recipe.references()
    read: dict[Reference, set[str]] = {}
    for row in rows:
        for model, there in row.experts if recipe.method.base != "input" else row.inputs:
            read.setdefault(model, set()).add(there)
    found: dict[Reference, Source] = {}
    mistakes = []
    first: dict[Path, Reference] = {}
    for model, names in read.items():
        if model not in named:
            text = f"{recipe.method_name} needs statistics of {model}; write parameters: {{statistics: path}} beside it"
            mistakes.append(Mistake(marks.get(model), f"{text} ({HOW})."))
            continue
        path, mark = named[model]
        if first.setdefault(path, model) != model:
            text = f"{path} is named as the statistics of {first[path]} and of {model}; each model has its own."
            mistakes.append(Mistake(mark, text))
        try:
            found[model] = open_model(path, earlier)
        except ValueError as e:
            mistakes.append(Mistake(mark, str(e)))
            continue
        if sources[model] is not opened[model]:
            text = f"statistics are named as the tensors of {model}, which are turned into another layout here"
            mistakes.append(Mistake(mark, f"{text}; merge models of one layout, without layout."))
        elif wrong := stranger(found[model], names):
            mistakes.append(Mistake(mark, wrong + "."))
    return found, mistakes
