"""Recipes planned and carried out: document by document, everything checked before a tensor is read."""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxmerge import checkpoint
from jaxmerge.checkpoint import CheckpointPlan, MergeReport, Source
from jaxmerge.recipe._card import beside
from jaxmerge.recipe._mistakes import mismatched, strangers, weightless
from jaxmerge.recipe._names import vocabulary_axis
from jaxmerge.recipe._open import Absent, Planned, open_model
from jaxmerge.recipe._read import read
from jaxmerge.recipe._resolve import Row, resolve
from jaxmerge.recipe._schema import Recipe, Reference
from jaxmerge.recipe._transform import Work, work
from jaxmerge.recipe._vocabulary import aligned, report, vocabulary
from jaxmerge.recipe._yaml import Mistake, RecipeError

ENGINE = ("format", "memory", "integers", "nonfinite")
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
    """

    recipe: Recipe
    rows: tuple[Row, ...]
    work: Work
    headers: CheckpointPlan
    options: dict[str, Any]
    beside: dict[str, str | bytes]
    vocabulary: dict[str, dict[str, int]]
    notes: tuple[Mistake, ...]


def plan(recipe: str | pathlib.Path, **options: Any) -> tuple[RecipePlan, ...]:
    """Find out what a recipe will do, and every mistake in it, before a tensor is read.

    Args:
      recipe: a file, or YAML text (anything with a line break in it).
      options: arguments of `checkpoint.plan` that stand above the recipe's own keys: format, memory, sharding, out_dtype,
        max_shard_bytes.

    Returns:
      A plan for each document, in the order in which they are carried out.

    Raises:
      RecipeError: all mistakes of all documents, each with its line and a remedy. FileNotFoundError: there is no such file.
    """
    text, name = _text(recipe)
    mistakes: list[Mistake] = []
    plans: list[RecipePlan] = []
    earlier: dict[str, Source] = {}
    for document in _in_order(read(text, name), name):
        found = _plan(document, earlier, options, mistakes)
        if found is not None:
            plans.append(found)
        if document.name is not None:
            earlier[document.name] = Planned(document.name, *((found.headers.out, found.beside) if found else ({}, {})))
    if mistakes:
        raise RecipeError(mistakes, name)
    return tuple(plans)


def merge(
    recipe: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    parts: str | pathlib.Path | None = None,
    on_progress: Callable[[str, checkpoint.Progress], None] | None = None,
    overwrite: bool = False,
    resume: bool = True,
    **options: Any,
) -> tuple[tuple[RecipePlan, MergeReport], ...]:
    """Merge as a recipe says. Documents that others refer to are merged first, into folders of their own.

    Args:
      recipe: a file, or YAML text (anything with a line break in it).
      out: the directory where the last document's result appears, when it is whole.
      parts: where the results of other documents go, each under its name; None is `out` with ".parts" after it.
      on_progress: called with a document's name and how far it is.
      overwrite, resume: see `checkpoint.merge`.
      options: see `plan`.

    Returns:
      The plan and the engine's report of each document, in order.

    Raises:
      RecipeError: as `plan`, before anything is done. Else as `checkpoint.merge`.
    """
    planned = plan(recipe, **options)
    text, name = _text(recipe)
    out = pathlib.Path(out)
    parts = pathlib.Path(parts) if parts is not None else out.with_name(f"{out.name}.parts")
    done: list[tuple[RecipePlan, MergeReport]] = []
    earlier: dict[str, Source] = {}
    for document in _in_order(read(text, name), name):
        last = len(done) + 1 == len(planned)
        mistakes: list[Mistake] = []
        todo = _plan(document, earlier, options, mistakes, out.name if last else str(document.name))
        if todo is None or mistakes:  # what an earlier document made is not what was planned
            raise RecipeError(mistakes, name)
        place = out if last else parts / str(document.name)
        tell = None if on_progress is None else lambda p, n=document.name: on_progress(n or out.name, p)
        report = checkpoint.merge(
            todo.work.tx,
            todo.work.base,
            todo.work.models,
            place,
            overwrite=overwrite or not last,
            resume=resume,
            recipe=document.text,
            beside=todo.beside if todo.headers.format == "safetensors" else None,
            on_progress=tell,
            **todo.options,
        )
        done.append((todo, report))
        if document.name is not None:
            earlier[document.name] = checkpoint.open(place)
    return tuple(done)


def _text(recipe: str | pathlib.Path) -> tuple[str, str]:
    """A recipe's text, and what messages call it."""
    if isinstance(recipe, str) and "\n" in recipe:
        return recipe, "recipe"
    path = pathlib.Path(recipe)
    return path.read_text(encoding="utf-8"), path.name


def _in_order(recipes: tuple[Recipe, ...], name: str) -> list[Recipe]:
    """Documents after those that they refer to; the one without a name last.

    Raises:
      RecipeError: documents that need each other.
    """
    named = {r.name: r for r in recipes if r.name is not None}
    needs = lambda r: [named[m.model.path] for m in r.references() if m.model.path in named]
    found: list[Recipe] = []
    waiting = sorted(recipes, key=lambda r: r.name is None)
    while waiting:
        ready = [r for r in waiting if all(n in found for n in needs(r))]
        if not ready:
            circle = ", ".join(str(r.name) for r in waiting)
            mark = waiting[0].marks.get("name")
            raise RecipeError([Mistake(mark, f"these documents need each other: {circle}; one must come first.")], name)
        found.append(ready[0])
        waiting.remove(ready[0])
    return found


def _plan(
    recipe: Recipe, earlier: Mapping[str, Source], options: Mapping[str, Any], mistakes: list[Mistake], title: str = "A merge"
) -> RecipePlan | None:
    """One document's plan; None, and mistakes, where there can be none."""
    sources: dict[Reference, Source] = {}
    for reference, mark in recipe.references().items():
        try:
            sources[reference] = open_model(reference.model, earlier)
        except Absent as e:
            mistakes.append(Mistake(mark, str(e)))
    if any(reference not in sources or not sources[reference].leaves for reference in recipe.references()):
        return None
    rows, wrong, notes = resolve(recipe, sources)
    words, mistaken, more = vocabulary(recipe, sources)
    wrong, notes = wrong + mistaken, notes + more
    if not wrong:
        wrong += mismatched(recipe, rows, sources) + weightless(recipe, rows) + strangers(recipe, rows, words)
    if not wrong and not rows:
        wrong.append(Mistake(recipe.marks[""], "there is no tensor to merge."))
    if wrong:
        mistakes += wrong
        return None
    arguments = {k: recipe.own[k] for k in ENGINE if k in recipe.own} | _dtypes(recipe, rows, sources)
    arguments |= {k: v for k, v in options.items() if v is not None}
    by_name = {row.name: row for row in rows}

    def adapt(model: Reference, there: str, name: str) -> tuple[Source, str]:
        if words is None or vocabulary_axis(name) is None:
            return sources[model], there
        return aligned(words, by_name[name], recipe.base, sources, model)

    try:
        todo = work(recipe.method, rows, adapt, recipe.own["seed"])
        apart = {k: v for k, v in arguments.items() if k not in ("integers", "nonfinite")}
        headers = checkpoint.plan(todo.tx, todo.base, todo.models, **apart)
    except ValueError as e:
        mistakes.append(Mistake(recipe.marks[""], str(e)))
        return None
    mistakes += [Mistake(None, problem.strip()) for problem in headers.problems]
    found, wrong = beside(recipe, rows, sources, vocabulary=words, out=headers.out, title=title)
    mistakes += wrong
    tables = {} if words is None else report(words, list(sources), recipe.base)
    return RecipePlan(recipe, rows, todo, headers, arguments, found, tables, (*recipe.notes, *notes))


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
