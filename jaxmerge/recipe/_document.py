"""One document of a recipe: from its words to what the engine is asked to do, with every mistake on the way."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxmerge import checkpoint, params
from jaxmerge.checkpoint import CheckpointPlan, Source, _hub
from jaxmerge.checkpoint._budget import parse_size, show_size
from jaxmerge.checkpoint._problem import Problem
from jaxmerge.checkpoint._quantised import quantised, refusal
from jaxmerge.checkpoint._sharding import of_mesh
from jaxmerge.recipe._adapters import adapted, concatenated, is_adapter
from jaxmerge.recipe._card import beside, card
from jaxmerge.recipe._dequantize import dequantized
from jaxmerge.recipe._layouts import LAYOUTS, in_one_layout
from jaxmerge.recipe._low_rank import BASE, dense, lost, low_rank, said
from jaxmerge.recipe._mistakes import blamed, mismatched, refused, stacked, strangers, weightless
from jaxmerge.recipe._names import vocabulary_axis
from jaxmerge.recipe._open import open_model
from jaxmerge.recipe._resolve import Row, resolve
from jaxmerge.recipe._schema import Recipe, Reference
from jaxmerge.recipe._state import parameters_of
from jaxmerge.recipe._statistics import statistics
from jaxmerge.recipe._tokenizer import dump
from jaxmerge.recipe._transform import Work, work
from jaxmerge.recipe._vocabulary import Vocabulary, aligned, report, vocabulary
from jaxmerge.recipe._yaml import Mistake, Wrong

ENGINE = ("format", "memory", "sharding", "integers", "nonfinite")
"""Keys of a recipe that are arguments of the engine."""


class RecipePlan(NamedTuple):
    """What one document of a recipe will do; nothing but headers has been read.

    Attributes:
      recipe: what it says.
      rows: which tensors of which models go into each tensor of the output, with which values of every parameter.
      work: the transform and the checkpoints that the engine gets.
      headers: bytes, passes, memory.
      options: the engine's other arguments.
      beside: files that go with the output: configuration, tokenizer, card, the recipe.
      vocabulary: how many rows of each model are its own, borrowed, averaged, zero; empty where vocabularies are as they are.
      notes: what should be known, but is no mistake.
      after: what can be said of the output only when it is there; None: nothing.
    """

    recipe: Recipe
    rows: tuple[Row, ...]
    work: Work
    headers: CheckpointPlan
    options: dict[str, Any]
    beside: dict[str, str | bytes]
    vocabulary: dict[str, dict[str, int]]
    notes: tuple[Mistake, ...]
    after: Callable[[Source], str] | None = None


def plan_document(
    recipe: Recipe, earlier: Mapping[str, Source], options: Mapping[str, Any], title: str
) -> tuple[RecipePlan | None, list[Mistake]]:
    """A document's plan, and its mistakes; None where they leave no plan.

    Args:
      recipe: the document.
      earlier: results of other documents, by name.
      options: arguments of the engine that stand above the recipe's keys.
      title: what the card is headed.
    """
    sources, mistakes, state = open_all(recipe, earlier)
    if mistakes or not all(source.leaves for source in sources.values()):
        return None, mistakes
    opened = dict(sources)
    alone = [m for m, source in sources.items() if is_adapter(source)]
    if alone:
        return _adapters(recipe, sources, alone, options, title)
    first = recipe.base or next(iter(sources))
    try:
        sources, layout = in_one_layout(sources, first, recipe.own.get("layout"))
    except ValueError as e:
        return None, [Mistake(recipe.marks.get("layout", recipe.references()[first]), str(e))]
    if "rank" in recipe.own:
        state.append(Mistake(recipe.marks["rank"], "rank has no effect: it is of a merge of adapters alone."))
    one_array = layout != "hf" and LAYOUTS[layout].axis is not None
    mistakes, notes = stacked(recipe) if one_array else ([], [])
    rows, wrong, more = resolve(recipe, sources)
    words, mistaken, said = vocabulary(recipe, sources)
    mistakes, notes = [*mistakes, *wrong, *mistaken], [*state, *notes, *more, *said]
    if not mistakes:
        mistakes += mismatched(recipe, rows, sources) + weightless(recipe, rows) + strangers(recipe, rows, words)
    if not mistakes and not rows:
        mistakes.append(Mistake(recipe.modules[0].mark, "there is no tensor to merge."))
    if mistakes:
        return None, mistakes
    data, mistakes = None, []
    if recipe.method.data:
        data, mistakes = statistics(recipe, rows, sources, opened, layout, words, earlier)
    if mistakes:
        return None, mistakes
    try:
        arguments = _arguments(recipe, rows, sources, options)
        todo = work(recipe.method, rows, _where(recipe, rows, sources, words), recipe.own["seed"], data)
        headers = _headers(todo, arguments)
        files, wrong = beside(recipe, rows, sources, vocabulary=words, out=headers.out, title=title)
    except ValueError as e:
        return None, [Mistake(blamed(e, recipe, rows, sources), str(e))]
    mistakes += refused(recipe, rows, options, headers.problems)
    tables = {} if words is None else report(words, list(sources), recipe.base)
    notes = (*recipe.notes, *notes, *(Mistake(None, note) for note in (*headers.notes, *on_hub(sources))))
    found = RecipePlan(recipe, rows, todo, headers, arguments, files, tables, notes)
    return found, mistakes + wrong


def open_all(recipe: Recipe, earlier: Mapping[str, Source]) -> tuple[dict[Reference, Source], list[Mistake], list[Mistake]]:
    """Every model of a document, adapters in their bases; those that cannot be opened; what is left out of training states."""
    sources: dict[Reference, Source] = {}
    mistakes, notes = [], []
    for reference, mark in recipe.references().items():
        at, of_adapter = recipe.parts.get(reference, (mark, mark))
        try:
            source = open_model(reference.model, earlier)
            if recipe.own.get("dequantize"):
                source = dequantized(source)
            elif recipe.method_name != "passthrough" and (codes := quantised(source)):
                raise ValueError(f"{refusal(source, codes)}.")
            if recipe.own["state"] == "skip":
                source, left = parameters_of(source)
                if left is not None and not notes:
                    notes.append(Mistake(mark, f"of {reference} is left out: {left}; state: keep (--state keep) merges it."))
            if reference.lora is not None and source.leaves:
                at = of_adapter
                source = adapted(source, open_model(reference.lora, earlier))
            sources[reference] = source
        except ValueError as e:
            mistakes.append(Mistake(at, str(e)))
    return sources, mistakes, notes


def on_hub(sources: Mapping[Reference, Source]) -> list[str]:
    """Which models are the Hub's, from where, and at which commit."""
    return _hub.said(file for source in sources.values() for file in source.files)


def _where(recipe: Recipe, rows: tuple[Row, ...], sources: Mapping[Reference, Source], words: Vocabulary | None) -> Any:
    """(model, its tensor, the output's) -> where to read it: tables of tokens in the order of the output's vocabulary."""
    by_name = {row.name: row for row in rows}

    def where(model: Reference, there: str, name: str) -> tuple[Source, str]:
        if words is None or vocabulary_axis(name) is None:
            return sources[model], there
        return aligned(words, by_name[name], recipe.base, sources, model)

    return where


def _arguments(
    recipe: Recipe, rows: tuple[Row, ...], sources: Mapping[Reference, Source], options: Mapping[str, Any]
) -> dict[str, Any]:
    """The engine's arguments: the recipe's keys, and options above them."""
    found: dict[str, Any] = {k: recipe.own[k] for k in ENGINE if k in recipe.own} | _dtypes(recipe, rows, sources)
    if recipe.own.get("layout") == "hf":
        found = {"format": "safetensors"} | found
    return _with_options(recipe, found, options)


def _with_options(recipe: Recipe, found: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments, options above them; a sharding in words as a rule.

    Raises:
      Wrong: the recipe's words mean none that can be had here.
    """
    found = found | {k: v for k, v in options.items() if v is not None}
    if isinstance(found.get("sharding"), str):
        try:
            found["sharding"] = of_mesh(found["sharding"], "sharding")
        except ValueError as e:
            raise Wrong(recipe.marks.get("sharding"), str(e)) from None
    return found


def _headers(todo: Work, arguments: Mapping[str, Any]) -> CheckpointPlan:
    apart = {k: v for k, v in arguments.items() if k not in ("integers", "nonfinite")}
    return checkpoint.plan(todo.tx, todo.base, todo.models, statistics=todo.statistics, **apart)


def _dtypes(recipe: Recipe, rows: tuple[Row, ...], sources: Mapping[Reference, Source]) -> dict[str, Any]:
    """The output's dtype: as the recipe says; that of the base, tensor by tensor; where inputs differ, what holds them all.

    Inputs are read as they are and cast once, at the end: mergekit casts them to `dtype` before it merges.
    """
    wanted = recipe.out_dtype or recipe.dtype
    kinds: list[set] = [{sources[model].leaves[n].dtype for model, n in row.inputs} for row in rows]
    differ = [k for k in kinds if len(k) > 1 and all(d is not None and jnp.issubdtype(d, jnp.floating) for d in k)]
    if not differ:
        return {"out_dtype": wanted}
    return {"dtype": "float32", "out_dtype": wanted or functools.reduce(jnp.promote_types, set().union(*differ)).name}


# --- adapters alone --------------------------------------------------------------------------------------------------


def _adapters(
    recipe: Recipe, sources: dict[Reference, Source], alone: list[Reference], options: Mapping[str, Any], title: str
) -> tuple[RecipePlan | None, list[Mistake]]:
    """Adapters into one adapter: their updates added up side by side, exactly; or by any method, to a rank."""
    marks, models = recipe.references(), [i.model for module in recipe.modules for part in module.slices for i in part.inputs]
    adapters = {m: sources[m] for m in alone}
    notes: list[Mistake] = []
    if recipe.method.base != "input" and recipe.base not in (None, *models, *alone) and len(adapters) + 1 == len(sources):
        notes.append(Mistake(marks.get(recipe.base), f"merged are the adapters' updates; {recipe.base} is not read."))
    elif len(adapters) < len(sources):
        text = "is an adapter and not a model; write it after the model it was trained on, as model+adapter."
        return None, [Mistake(marks.get(m), f"{m} {text}") for m in alone]
    if recipe.method.data:
        text = f"{recipe.method_name} takes statistics of whole models; merge model+adapter, each with statistics of its own."
        return None, [Mistake(recipe.marks["merge_method"], text)]
    exact = recipe.method_name == "linear" and "rank" not in recipe.own
    based = recipe
    if recipe.method.base == "required" and recipe.base not in alone:
        based = recipe._replace(base=BASE, marks={"base_model": recipe.marks["merge_method"]} | recipe.marks)
    rows: tuple[Row, ...] = ()
    try:
        updates = dense(adapters)
        rows, mistakes, more = resolve(based, updates)
        mistakes += weightless(based, rows)
        if mistakes:
            return None, mistakes
        made = None
        if exact:
            source, config = concatenated(adapters, _shares(rows))
        else:
            dense_work = work(recipe.method, rows, lambda model, there, name: (updates[model], there), recipe.own["seed"])
            made = low_rank(adapters, dense_work, recipe.own.get("rank"), recipe.out_dtype or recipe.dtype)
            source, config = made.source, made.config
        arguments: dict[str, Any] = {k: recipe.own[k] for k in ENGINE if k in recipe.own}
        arguments |= {"out_dtype": recipe.out_dtype or recipe.dtype, "stem": "adapter_model"}
        arguments = _with_options(recipe, arguments, options)
        todo = Work(params.passthrough(), None, (source,))
        headers = _headers(todo, arguments)
    except ValueError as e:
        return None, [Mistake(blamed(e, recipe, rows, sources), str(e))]
    mistakes = refused(recipe, rows, options, headers.problems)
    notes += [Mistake(None, note) for note in (*headers.notes, *on_hub(sources))]
    if made is not None:
        allowed = arguments.get("memory")
        if allowed is not None and made.bytes > parse_size(allowed, "memory"):
            text = f"a merged update takes {show_size(made.bytes)} of memory, {allowed} allowed; raise memory."
            mistakes += refused(recipe, rows, options, [Problem(text, "memory")])
        headers = headers._replace(peak_bytes=headers.peak_bytes + made.bytes)
        ranks = sorted({u.rank for u in made.low.values()})
        text = f"updates are merged dense and kept at rank {' to '.join(map(str, {ranks[0]: 0, ranks[-1]: 0}))}"
        notes.append(Mistake(recipe.marks.get("rank"), f"{text}; what is lost is measured when the adapter is there."))
    files: dict[str, str | bytes] = {"adapter_config.json": dump(config), "mergekit_config.yml": recipe.text}
    files["README.md"] = card(recipe, sources, title, False).replace("library_name: transformers", "library_name: peft")
    after = None if made is None else lambda out: said(lost(made, out))
    return RecipePlan(recipe, rows, todo, headers, arguments, files, {}, (*recipe.notes, *notes, *more), after), mistakes


def _shares(rows: tuple[Row, ...]) -> dict[str, dict[Any, float]]:
    """{weight: {adapter: its factor}} of a weighted sum."""
    weights = {}
    for row in rows:
        total = math.fsum(row.values["weight"]) if row.values["normalize"] else 1.0
        weights[row.name] = {m: w / total for (m, _), w in zip(row.inputs, row.values["weight"], strict=True)}
    return weights
