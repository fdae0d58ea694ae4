"""Recipes planned and carried out: document by document, everything checked before a tensor is read."""

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from jaxmerge import checkpoint
from jaxmerge.checkpoint import MergeReport, Source
from jaxmerge.checkpoint._budget import parse_size
from jaxmerge.checkpoint._journal import RECEIPT, begun, check_free, gone
from jaxmerge.checkpoint._merge import check_outside
from jaxmerge.checkpoint._receipt import hashes
from jaxmerge.checkpoint._remote import Url, is_remote
from jaxmerge.checkpoint._sharding import of_mesh
from jaxmerge.recipe._document import RecipePlan, plan_document
from jaxmerge.recipe._open import Planned, pinned
from jaxmerge.recipe._read import read
from jaxmerge.recipe._schema import Recipe
from jaxmerge.recipe._yaml import Mistake, RecipeError


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
      ValueError: an option is wrong.

    Example:
      >>> import jaxmerge as jm
      >>> try:
      ...     jm.recipe.plan("merge_method: dare-ties\\nmodels: [{model: a, wieght: 1}]\\n")
      ... except jm.recipe.RecipeError as e:
      ...     print(e)
      the recipe has 2 mistakes:
        recipe:1:15: unknown merge_method 'dare-ties'; did you mean 'dare_ties'?
        recipe:2:21: unknown key 'wieght' in a model; did you mean 'weight', under parameters?
    """
    return _plans(recipe, options)


def _plans(
    recipe: str | pathlib.Path, options: dict[str, Any], out: Any = None, resume: bool = False
) -> tuple[RecipePlan, ...]:
    """As `plan`, for an output: the last document's card is headed as it is named, and what was cut off there goes on."""
    check_options(options)
    text, name = _text(recipe)
    mistakes: list[Mistake] = []
    plans: list[RecipePlan] = []
    earlier: dict[str, Source] = {}
    documents = _in_order(read(text, name), name)
    for document in documents:
        whole = out if document is documents[-1] else None
        title = whole.name if whole is not None else document.name or "A merge"
        same = _cut_off(document, whole) if whole is not None and resume else {}
        found, wrong = plan_document(document, earlier | same, options, title)
        mistakes += wrong
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
      overwrite: replace what an earlier merge has left at `out`.
      resume: go on where the same merge was cut off, and keep results of other documents that are as they would be made.
      options: see `plan`.

    Returns:
      The plan and the engine's report of each document, in order.

    Raises:
      RecipeError: as `plan`, before anything is done. Else as `checkpoint.merge`.
    """
    whole = _place(out)
    planned = _plans(recipe, options, whole, resume)
    _, name = _text(recipe)
    aside = _place(parts) if parts is not None else whole.parent / f"{whole.name}.parts"
    places = [*(aside / str(p.recipe.name) for p in planned[:-1]), whole]
    for place in places:
        _no_parent(place, planned)
    if not isinstance(whole, Url):
        check_free(whole, overwrite=overwrite)
    done: list[tuple[RecipePlan, MergeReport]] = []
    earlier: dict[str, Source] = {}
    for todo, place in zip(planned, places, strict=True):
        last, document = place == whole, todo.recipe
        if earlier:  # of what is there now
            same = _cut_off(document, place) if resume else {}
            todo, mistakes = plan_document(document, earlier | same, options, place.name)
            if todo is None or mistakes:  # what an earlier document made is not what was planned
                raise RecipeError(mistakes, name)
        tell = None if on_progress is None else lambda p, n=document.name: on_progress(n or whole.name, p)
        if not last and resume and _is_there(place, todo):
            earlier[str(document.name)] = checkpoint.open(place)
            done.append((todo, MergeReport((), todo.headers, {}, 0.0, resumed=todo.headers.bytes_written)))
            continue
        report = checkpoint.merge(
            todo.work.tx,
            todo.work.base,
            todo.work.models,
            place,
            statistics=todo.work.statistics,
            overwrite=overwrite or not last,
            resume=resume,
            recipe=document.text,
            beside=todo.beside,
            on_progress=tell,
            **todo.options,
        )
        if todo.after is not None:
            todo = todo._replace(notes=(*todo.notes, Mistake(None, todo.after(checkpoint.open(place)))))
        done.append((todo, report))
        if document.name is not None:
            earlier[document.name] = checkpoint.open(place)
    return tuple(done)


def verify(
    out: str | pathlib.Path, *, parts: str | pathlib.Path | None = None, leaves: int = 8, seed: int = 0
) -> checkpoint.Verified:
    """Is a merge what its receipt says? Its recipe is planned again, and a sample of its tensors computed from the parents.

    Args:
      out: a directory that `merge` wrote.
      parts: where the results of documents lie that it was merged from; None is `out` with ".parts" after it.
      leaves, seed: see `checkpoint.verify`.

    Raises:
      FileNotFoundError: there is no receipt. ValueError: it names no recipe. RecipeError: parents that are no longer there.
    """
    place = _place(out)
    aside = _place(parts) if parts is not None else place.parent / f"{place.name}.parts"
    receipt = checkpoint.receipt(place)
    text = receipt["recipe"]
    if not isinstance(text, str):
        raise ValueError(f"{out} was merged by a method and its options, not by a recipe; verify it with checkpoint.verify.")
    [document] = read(text, "the receipt's recipe")
    names = [n for n in (r.model.path for r in document.references()) if not (is_remote(n) or pathlib.Path(n).exists())]
    earlier = {n: checkpoint.open(aside / n) for n in names if (aside / n / RECEIPT).exists()}
    parents = [receipt["base"], *receipt["models"]] if receipt["base"] else receipt["models"]
    earlier |= pinned(document, [f for parent in parents for f in parent["files"]])
    todo, mistakes = plan_document(document, earlier, {}, place.name)
    if todo is None or mistakes:
        raise RecipeError(mistakes, "the receipt's recipe")
    parents = {"base": todo.work.base, "models": todo.work.models, "statistics": todo.work.statistics}
    return checkpoint.verify(place, todo.work.tx, leaves=leaves, seed=seed, **parents)


def check_options(options: Mapping[str, Any], call: Callable[[str], str] = str) -> None:
    """Refuse arguments that stand above a recipe's keys: what is wrong with them is no mistake of the recipe.

    Args:
      options: see `plan`.
      call: what the user knows an argument by.

    Raises:
      ValueError: a size is none, or a sharding cannot be had here.
    """
    for key in ("memory", "max_shard_bytes"):
        if options.get(key) is not None:
            parse_size(options[key], call(key))
    if isinstance(options.get("sharding"), str):
        of_mesh(options["sharding"], call("sharding"))


def _text(recipe: str | pathlib.Path) -> tuple[str, str]:
    """A recipe's text, and what messages call it."""
    if isinstance(recipe, str) and "\n" in recipe:
        return recipe, "recipe"
    path = pathlib.Path(recipe)
    if not path.exists():  # a pipe is there too
        raise FileNotFoundError(f"there is no recipe at {str(path)!r}; name a YAML file, relative to where you are.")
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


def _cut_off(document: Recipe, out: Any) -> dict[str, Source]:
    """Models of the Hub as a merge by the same words read them that was cut off: to go on, it must read the same bytes.

    Raises:
      MergeError: they can no longer be read, or which of them was read at which commit cannot be told.
    """
    files = [f for files in begun(out, recipe=document.text) for f in files]
    try:
        return pinned(document, files)
    except (OSError, ValueError) as e:
        raise checkpoint.MergeError(gone(out, "models of the Hub at commits", e)) from None


def _place(path: Any) -> Any:
    """Where something is to lie: with a name, and a folder that it is in."""
    if is_remote(path):
        return Url(path)
    return pathlib.Path(path) if pathlib.Path(path).name not in ("", "..") else pathlib.Path(os.path.abspath(path))


def _no_parent(place: Any, plans: tuple[RecipePlan, ...]) -> None:
    """Refuse to write where something is read, or would be."""
    files = [f for plan in plans for source in plan.headers.inputs for f in source.files]
    real = lambda path: pathlib.Path(os.path.realpath(str(path)))
    for plan in plans:
        check_outside(place, plan.headers.inputs)
    inside = next((f for f in files if real(place) in real(f).parents), None)
    if inside is not None:
        raise FileExistsError(f"{place} holds {pathlib.Path(inside).name}, which is merged here; choose another place.")


def _is_there(place: Any, todo: RecipePlan) -> bool:
    """Whether an earlier run has made a document's result: the same words, and parents with the same fingerprints."""
    if not (place / RECEIPT).exists():
        return False
    receipt = checkpoint.receipt(place)
    parents = [*([receipt["base"]] if receipt["base"] else []), *receipt["models"], *receipt.get("statistics", [])]
    now = [hashes([source]) for source in todo.headers.inputs]
    return receipt["recipe"] == todo.recipe.text and [p["files"] for p in parents] == now
