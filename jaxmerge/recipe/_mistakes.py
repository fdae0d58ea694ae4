"""What speaks against a merge, seen from the headers: shapes, vocabularies, weights; each with what to do about it."""

import math
import re
from collections.abc import Mapping, Sequence

from jaxmerge.checkpoint import Source
from jaxmerge.checkpoint._problem import about
from jaxmerge.recipe._names import vocabulary_axis
from jaxmerge.recipe._resolve import Row
from jaxmerge.recipe._schema import Recipe, Reference
from jaxmerge.recipe._tokenizer import Unfit
from jaxmerge.recipe._vocabulary import Vocabulary
from jaxmerge.recipe._yaml import Mark, Mistake, Wrong

POINTWISE = ("linear", "task_arithmetic", "passthrough", "nearswap", "ram")


def mismatched(recipe: Recipe, rows: Sequence[Row], sources: Mapping[Reference, Source]) -> list[Mistake]:
    """Tensors of other shapes or kinds than the rest; one mistake for each model, vocabularies by themselves."""
    found: dict[tuple[Reference, Reference, str], list[str]] = {}
    marks = recipe.references()
    for row in rows:
        (first, name), *others = row.inputs
        ours = sources[first].leaves[name]
        for model, there in others:
            theirs = sources[model].leaves[there]
            axis = vocabulary_axis(row.name)
            kind = "shapes"
            if axis is not None and recipe.tokenizer is not None:
                a, b = (leaf.shape[:axis] + leaf.shape[axis + 1 :] for leaf in (ours, theirs))
                differs = a != b
            else:
                differs = ours.shape != theirs.shape
                if axis is not None and differs and len(ours.shape) == len(theirs.shape):
                    rest = zip(ours.shape, theirs.shape, strict=True)
                    if all(x == y for i, (x, y) in enumerate(rest) if i != axis):
                        kind = f"vocabularies: {theirs.shape[axis]} rows against {ours.shape[axis]}"
            if differs:
                found.setdefault((model, first, kind), []).append(f"{there} {list(theirs.shape)} against {list(ours.shape)}")
    mistakes = []
    for (model, first, kind), tensors in found.items():
        if kind == "shapes":
            named = ", ".join(tensors[:2]) + (f" and {len(tensors) - 2} more" if len(tensors) > 2 else "")
            text = f"{model} has tensors of other shapes than {first}: {named}; merge models of one architecture and width."
        else:
            text = f"{model} and {first} have other {kind}; add tokenizer: {{source: union}}, or {{source: base}}."
        mistakes.append(Mistake(marks.get(model), text))
    return mistakes


def weightless(recipe: Recipe, rows: Sequence[Row]) -> list[Mistake]:
    """Weights whose sum is to be divided by, and is zero; probabilities out of bounds."""
    found: dict[str, Mistake] = {}
    name = recipe.method_name
    for row in rows:
        v = row.values
        sums = {"linear": v.get("normalize"), "multislerp": v.get("normalize_weights")}.get(name)
        if sums and abs(math.fsum(v["weight"])) < 1e-8:
            which = "normalize" if name == "linear" else "normalize_weights"
            text = f"the weights {v['weight']} at {row.name} sum to 0 and {which} divides by their sum"
            found.setdefault("sum", Mistake(row.marks.get("weight"), f"{text}; change them, or set {which}: false."))
        if "epsilon" in v and isinstance(v["epsilon"], list):
            for d, e in zip(v["density"], v["epsilon"], strict=True):
                if 0 < d < 1 and not (d - e > 0 and d + e < 1):
                    text = f"density {d:g} +- epsilon {e:g} at {row.name} leaves the range of probabilities (0, 1)"
                    largest = min(d, 1 - d)
                    mark = row.marks.get("epsilon", row.marks.get("density"))
                    found.setdefault("epsilon", Mistake(mark, f"{text}; choose an epsilon below {largest:g}."))
    return list(found.values())


def refused(recipe: Recipe, rows: Sequence[Row], options: Mapping[str, object], problems: Sequence[str]) -> list[Mistake]:
    """What the engine has against a merge: each reason where the recipe says what it is about, unless an option does."""
    data = next((mark for _, mark in recipe.statistics().values()), None)
    found = []
    for problem in problems:
        text, what = problem.strip(), about(problem)
        if what == "tx":
            mark = of_method(recipe, rows, text)
        else:
            mark = data if what == "statistics" else recipe.marks.get(what or "no key")
        found.append(Mistake(mark if what is None or options.get(what) is None else None, text))
    return found


def blamed(error: ValueError, recipe: Recipe, rows: Sequence[Row], sources: Mapping[Reference, Source]) -> Mark | None:
    """Where what an error is about stands."""
    if isinstance(error, Wrong):
        return error.mark
    if isinstance(error, Unfit):
        return next((mark for m, mark in recipe.references().items() if sources.get(m) is error.source), None)
    return of_method(recipe, rows, str(error))


def of_method(recipe: Recipe, rows: Sequence[Row], text: str) -> Mark:
    """Where a parameter stands that a method's refusal names; where it names none that is written, the method."""
    words = re.findall(r"\w+", text)
    marks = {name: mark for row in reversed(rows) for name, mark in row.marks.items()}
    return next((marks[word] for word in words if word in marks), recipe.marks["merge_method"])


def strangers(recipe: Recipe, rows: Sequence[Row], words: Vocabulary | None) -> list[Mistake]:
    """Tokens whose rows are to come from a model that is not merged where its table would be."""
    found = {}
    for token, source in (words.sources if words else {}).items():
        for row in rows:
            if source is not None and vocabulary_axis(row.name) is not None and source[0] not in [m for m, _ in row.inputs]:
                text = f"token {token!r} is to come from {source[0]}, which is no input of {row.name}; name one that is."
                found.setdefault(token, Mistake(recipe.tokenizer.tokens[token].mark if recipe.tokenizer else None, text))
    return list(found.values())


def stacked(recipe: Recipe) -> tuple[list[Mistake], list[Mistake]]:
    """What cannot be done where one array holds all layers, and what it means there."""
    blocks = [recipe.parameters, *(m.parameters for m in recipe.modules)]
    blocks += [p for m in recipe.modules for part in m.slices for p in (part.parameters, *(i.parameters for i in part.inputs))]
    how = "layers are stacked in one array"
    mistakes = [
        Mistake(c.mark, f"{how}, {name} cannot change along them; write layout: hf, which takes them apart.")
        for block in blocks
        for name, setting in block.items()
        for c in setting
        if len(c.values) > 1
    ]
    sliced = [part.mark for m in recipe.modules for part in m.slices if any(i.layers for i in part.inputs)]
    mistakes += [Mistake(mark, f"{how}, slices need them apart; write layout: hf.") for mark in sliced[:1]]
    note = f"{how}: what a method finds out of a tensor (a threshold, a norm) it finds out of all layers; layout: hf for each."
    return mistakes, [] if recipe.method_name in POINTWISE else [Mistake(None, note)]
