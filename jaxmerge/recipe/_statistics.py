"""What a recipe says of data beside its models: Fisher information, Gram matrices; one checkpoint for each.

They are named, turned and ordered as the model that they belong to. Where it is turned into another layout they are too, by the
same table; where the rows of its tables of tokens move, information moves with them.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxmerge.checkpoint import Source
from jaxmerge.checkpoint._statistics import HOW, stranger
from jaxmerge.recipe._layouts import INFORMATION, from_hub, grams_from_hub, grams_to_hub, layout_of, to_hub
from jaxmerge.recipe._names import vocabulary_axis
from jaxmerge.recipe._open import open_model
from jaxmerge.recipe._resolve import Row
from jaxmerge.recipe._schema import Path, Recipe, Reference
from jaxmerge.recipe._vocabulary import Vocabulary, aligned, followed
from jaxmerge.recipe._yaml import Mark, Mistake


class Data(NamedTuple):
    """Statistics of models.

    Attributes:
      sources: each model's, in the layout of the output.
      where: {(model, its tensor, the output's): where the tensor's are read}, as far as there are any.
    """

    sources: dict[Reference, Source]
    where: dict[tuple[Reference, str, str], tuple[Source, str]]


def statistics(  # noqa: PLR0917
    recipe: Recipe,
    rows: Sequence[Row],
    sources: Mapping[Reference, Source],
    opened: Mapping[Reference, Source],
    layout: str,
    words: Vocabulary | None,
    earlier: Mapping[str, Source],
) -> tuple[Data, list[Mistake]]:
    """The statistics of each model that is merged, and what is wrong with them.

    Args:
      recipe, rows: a document, resolved.
      sources: its models, in one layout, which is `layout`.
      opened: them as they lie on disk.
      words: the output's vocabulary, where it is made anew.
      earlier: results of other documents, by name.
    """
    named, marks = recipe.statistics(), recipe.references()
    read: dict[Reference, list[tuple[str, Row]]] = {}
    for row in rows:
        for model, there in row.experts if recipe.method.base != "input" else row.inputs:
            read.setdefault(model, []).append((there, row))
    found = Data({}, {})
    mistakes = []
    first: dict[Path, Reference] = {}
    for model, tensors in read.items():
        if model not in named:
            text = f"{recipe.method_name} needs statistics of {model}; write parameters: {{statistics: path}} beside it"
            mistakes.append(Mistake(marks.get(model), f"{text} ({HOW})."))
            continue
        path, mark = named[model]
        if first.setdefault(path, model) != model:
            text = f"{path} is named as the statistics of {first[path]} and of {model}; each model has its own."
            mistakes.append(Mistake(mark, text))
        try:
            data = open_model(path, earlier)
            if sources[model] is not opened[model]:
                data = _moved(recipe, data, opened[model], sources[model], layout, tensors)
            if wrong := stranger(data, {there for there, _ in tensors}):
                raise ValueError(wrong)
            found.sources[model] = data
            for there, row in tensors:
                if there in data.leaves:
                    found.where[model, there, row.name] = _in_order(recipe, words, row, sources, model, data, there)
        except ValueError as e:
            mistakes.append(_at(mark, e))
    return found, mistakes


def _at(mark: Mark, error: ValueError) -> Mistake:
    return Mistake(mark, str(error).rstrip(".") + ".")


def _moved(  # noqa: PLR0917
    recipe: Recipe, data: Source, parent: Source, like: Source, layout: str, tensors: Sequence[tuple[str, Row]]
) -> Source:
    """Statistics that are named and turned as the leaves of their model, as the layout has these.

    Raises:
      ValueError: names or shapes that the model has not; Gram matrices that have no place there.
    """
    if wrong := stranger(data, parent.leaves):
        raise ValueError(wrong)
    was = layout_of(parent)
    if recipe.method.data == "grams":
        moved, inputs = grams_from_hub(grams_to_hub(data, was, parent), layout, like), int(layout == "hf")
        other = next((there for there, row in tensors if there in moved.leaves and row.values["axis"] != inputs), None)
        if other is not None:
            text = f"statistics {data.name}: in the layout {layout} the inputs of {other} are its axis {inputs}"
            raise ValueError(f"{text}, and Gram matrices of inputs alone are taken from {was} there; write axis: {inputs}")
        return moved
    for name, leaf in data.leaves.items():
        if leaf.shape != parent.leaves[name].shape:
            need = f"information of {parent.name} has the shape of its leaf, {list(parent.leaves[name].shape)}"
            raise ValueError(f"statistics {data.name}: {name} is {list(leaf.shape)}; {need}")
    return from_hub(to_hub(data, was, INFORMATION), layout, like, INFORMATION)


def _in_order(  # noqa: PLR0917
    recipe: Recipe,
    words: Vocabulary | None,
    row: Row,
    sources: Mapping[Reference, Source],
    model: Reference,
    data: Source,
    there: str,
) -> tuple[Source, str]:
    """Where a tensor's statistics are read: those of a table of tokens in the order of the output's vocabulary.

    Raises:
      ValueError: they cannot follow its rows.
    """
    axis = vocabulary_axis(row.name)
    if words is None or axis is None or aligned(words, row, recipe.base, sources, model)[0] is sources[model]:
        return data, there
    if recipe.method.data == "grams":
        if row.values["axis"] == axis:
            text = f"statistics {data.name}: {there} has a Gram matrix of tokens, whose order the tokenizer changes"
            raise ValueError(f"{text}; leave it out of the statistics (its mean is taken), or leave the tokenizer out")
        return data, there
    if data.leaves[there].shape != sources[model].leaves[there].shape:
        shapes = f"{list(data.leaves[there].shape)}, the table of {model} {list(sources[model].leaves[there].shape)}"
        raise ValueError(f"statistics {data.name}: {there} is {shapes}; they must have one shape")
    return followed(words, row, recipe.base, model, data)
