"""A recipe, tensor by tensor: which tensor of which model goes into it, with which value of every parameter.

The result is a table. A gradient, a filter or a slice is nothing but what it says in the rows.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jaxmerge.checkpoint import Source
from jaxmerge.recipe._methods import REQUIRED
from jaxmerge.recipe._names import BUFFERS, embeddings_of, in_module, place, stacks
from jaxmerge.recipe._schema import Input, Module, Recipe, Reference, Slice
from jaxmerge.recipe._settings import Settings, along, deciding
from jaxmerge.recipe._yaml import Mark, Mistake


class Row(NamedTuple):
    """One tensor of the output.

    Attributes:
      name: of the output.
      inputs: (model, tensor) each, in the order of the recipe; the base among them.
      base: which of them is the base, or None.
      t: how far along the layers of its slice it lies.
      values: parameters: one value, or one for each input that has it.
      marks: where those that are written stand; of several values the first.
    """

    name: str
    inputs: tuple[tuple[Reference, str], ...]
    base: int | None
    t: float
    values: dict[str, Any]
    marks: dict[str, Mark]

    @property
    def experts(self) -> tuple[tuple[Reference, str], ...]:
        """The inputs, less the base."""
        return tuple(x for i, x in enumerate(self.inputs) if i != self.base)


class Line(NamedTuple):
    """A row before its values: what is read, under which settings."""

    name: str
    names: tuple[str, ...]
    t: float
    part: Slice
    module: Module


def resolve(recipe: Recipe, sources: Mapping[Reference, Source]) -> tuple[tuple[Row, ...], list[Mistake], list[Mistake]]:
    """The rows of a recipe, what is wrong with it, and what should be known.

    Args:
      recipe: a document.
      sources: its models, opened.
    """
    return _Resolver(recipe, sources).rows()


class _Resolver:
    def __init__(self, recipe: Recipe, sources: Mapping[Reference, Source]):
        self.recipe, self.method, self.sources = recipe, recipe.method, sources
        self.mistakes: list[Mistake] = []
        self.notes: list[Mistake] = []
        self.fitted: set[int] = set()  # conditions that fit a tensor
        self.unmet: dict[tuple[str, Mark], dict[str, None]] = {}  # (parameter, where): tensors that no condition fits
        self.missing: dict[tuple[Reference, Reference], list[str]] = {}  # (who lacks tensors, who has them)

    def wrong(self, mark: Mark | None, text: str) -> None:
        mistake = Mistake(mark, text)
        if mistake not in self.mistakes:
            self.mistakes.append(mistake)

    def note(self, mark: Mark | None, text: str) -> None:
        if Mistake(mark, text) not in self.notes:
            self.notes.append(Mistake(mark, text))

    def rows(self) -> tuple[tuple[Row, ...], list[Mistake], list[Mistake]]:
        rows = []
        for module in self.recipe.modules:
            whole = [self.with_base(part) for part in module.slices]
            sound = [self.inputs_fit(part, module) for part in whole]  # all of them, for all their mistakes
            if all(sound):
                rows += [self.row(line) for line in self.lines(module._replace(slices=tuple(whole)))]
        for (name, mark), tensors in self.unmet.items():
            many = f"{len(tensors)} tensors, such as {next(iter(tensors))}" if len(tensors) > 1 else next(iter(tensors))
            self.wrong(mark, f"no condition of {name} fits {many}; end the list with a value that has no filter.")
        if not self.mistakes:
            self.nothing_is_lost(rows)
            self.conditions_count()
        return tuple(rows), self.mistakes, self.notes

    # --- inputs ---

    def base_of(self, part: Slice) -> Reference | None:
        return part.base or self.recipe.base

    def with_base(self, part: Slice) -> Slice:
        """mergekit's rule: a base that is not among whole models joins them, last."""
        base = self.base_of(part)
        whole = all(i.layers is None for i in part.inputs)
        if base is None or not whole or any(i.model == base for i in part.inputs):
            return part
        return part._replace(inputs=(*part.inputs, Input(base, None, {}, self.recipe.marks["base_model"], {})))

    def inputs_fit(self, part: Slice, module: Module) -> bool:
        """Whether the method can merge these inputs."""
        before, name, m = len(self.mistakes), self.recipe.method_name, self.method
        base, models = self.base_of(part), [i.model for i in part.inputs]
        for k, i in enumerate(part.inputs):
            if i.model in models[:k]:
                self.wrong(i.mark, f"{i.model} is listed twice in a slice; list it once, with the sum of its weights.")
        if m.base in ("required", "first") and base is None:
            self.wrong(
                part.mark,
                f"{name} merges what models changed, and needs what they were trained from: name base_model."
                if m.base == "required"
                else f"{name} needs base_model: the first of its two models (t = 0, what stays).",
            )
        elif m.base != "input" and base is not None and base not in models:
            self.wrong(part.mark, f"base_model {base} is not among the sources of this slice; add it with its layer_range.")
        beside = len(models) - (m.base != "input" and base in models)
        known = base is not None or m.base in ("input", "optional")
        if known and (beside < m.least or (m.most is not None and beside > m.most)):
            many = f"{m.least}" if m.most == m.least else f"{m.least} or more"
            what = ("model" if many == "1" else "models") + ("" if m.base == "input" else " beside the base")
            more = "; base_model is one of them, remove it" if m.base == "input" and base in models and m.most else ""
            more = "; the base alone gives the base" if m.base == "required" and not beside else more
            self.wrong(part.mark, f"{name} takes {many} {what}, got {beside}{more}.")
        for i in part.inputs:
            layers = stacks(n for n in self.sources[i.model].leaves if in_module(n, module.name))
            deepest = max(layers.values(), default=0)
            if i.layers and i.layers[1] > deepest:
                self.wrong(
                    i.marks["layer_range"], f"layer_range {list(i.layers)} of {i.model} ends beyond its {deepest} layers."
                )
        lengths = [(i.layers[1] - i.layers[0], i) for i in part.inputs if i.layers]
        if other := next((i for n, i in lengths if n != lengths[0][0]), None):
            found = ", ".join(f"{i.model} {list(i.layers or ())}" for i in part.inputs)
            self.wrong(
                other.marks["layer_range"], f"the sources of a slice must have as many layers as each other; got {found}."
            )
        return len(self.mistakes) == before

    # --- tensors ---

    def lines(self, module: Module) -> Iterator[Line]:
        """Every tensor of a module, before its parameters."""
        first = module.slices[0]
        if any(i.layers for part in module.slices for i in part.inputs):
            yield from self.sliced(module)
            return
        leaves = {i.model: [n for n in self.sources[i.model].leaves if in_module(n, module.name)] for i in first.inputs}
        depths = {model: stacks(names) for model, names in leaves.items()}
        base = self.base_of(first)
        reference = base if base in leaves and base else first.inputs[0].model
        for i in first.inputs:
            for stack, n in depths[i.model].items():
                ours = depths[reference].get(stack, 0)
                if ours and n != ours:
                    where = f"{stack.rstrip('./_')}: {i.model} has {n} layers, {reference} has {ours}"
                    self.wrong(i.mark, f"{where}; merge with slices of as many layers, or models of one depth.")
        for name in self.in_any(leaves, reference):
            at = place(name)
            layers = depths[reference].get(at.stack or "", 1)
            t = 0.0 if at.stack is None else at.layer / (layers - 1) if layers > 1 else 1.0
            names = [self.find(name, i) for i in first.inputs]
            yield from self.line(name, names, t, first, module)

    def sliced(self, module: Module) -> Iterator[Line]:
        """Slices of one stack, one over another; what comes before the layers is of the first, what comes after of the last."""
        first = self.sources[module.slices[0].inputs[0].model]
        names = [n for n in first.leaves if in_module(n, module.name)]
        depths = stacks(names)
        if len(depths) != 1:
            found = ", ".join(f"{s.rstrip('./_')} ({n})" for s, n in depths.items()) or "none"
            self.wrong(module.mark, f"slices need one stack of layers, here are {found}; write modules, with slices for each.")
            return
        [stack] = depths
        last = [self.sources[i.model].leaves for i in module.slices[-1].inputs]
        heads = {n for leaves in last for n in leaves if place(n).part == "head" and in_module(n, module.name)}
        for name in (*names, *sorted(heads - set(names))):
            at = place(name)
            if at.stack is None:
                part = module.slices[0 if at.part == "embeddings" else -1]
                yield from self.line(name, [self.find(name, i) for i in part.inputs], 0.0, part, module)
        out = 0
        for part in module.slices:
            start, stop = part.inputs[0].layers or (0, 0)
            source = self.sources[part.inputs[0].model]
            by_layer: dict[int, list[str]] = {}
            for name in source.leaves:
                if place(name).stack == stack:
                    by_layer.setdefault(place(name).layer, []).append(name)
            for step in range(stop - start):
                t = step / (stop - start - 1) if stop - start > 1 else 1.0
                for name in by_layer.get(start + step, []):
                    at = place(name)
                    reads = [self.find(at.at((i.layers or (0, 0))[0] + step), i) for i in part.inputs]
                    yield from self.line(at.at(out), reads, t, part, module)
                out += 1

    def in_any(self, leaves: Mapping[Reference, list[str]], reference: Reference) -> Iterator[str]:
        """The tensors of the reference; heads that others have beside it; what else is only elsewhere is a mistake."""
        ours = set(leaves[reference])
        yield from leaves[reference]
        for model, names in leaves.items():
            for name in names:
                if name in ours or BUFFERS.search(name):
                    continue
                if place(name).part == "head" and embeddings_of(ours):
                    ours.add(name)
                    self.note(None, f"{name}: {reference} ties it to its embeddings; the output has a head of its own.")
                    yield name
                elif place(name).stack in stacks(ours) or place(name).stack is None:
                    self.missing.setdefault((reference, model), []).append(name)

    def find(self, name: str, i: Input) -> str | None:
        """The tensor of a model under a name; of a tied head, the embeddings."""
        leaves = self.sources[i.model].leaves
        if name in leaves:
            return name
        return embeddings_of(leaves) if place(name).part == "head" else None

    def line(self, name: str, names: list[str | None], t: float, part: Slice, module: Module) -> Iterator[Line]:
        if None not in names:
            yield Line(name, tuple(n for n in names if n is not None), t, part, module)
        elif BUFFERS.search(name):
            self.note(None, f"{name} is left out: it is a constant that not all models carry.")
        else:
            has = next(i.model for i, n in zip(part.inputs, names, strict=True) if n is not None)
            for i, n in zip(part.inputs, names, strict=True):
                if n is None:
                    self.missing.setdefault((i.model, has), []).append(name)

    def nothing_is_lost(self, rows: list[Row]) -> None:
        """Tensors that not all have, and tensors that no module takes."""
        for (model, has), names in self.missing.items():
            named = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            self.wrong(
                self.recipe.references().get(model),
                f"{model} lacks tensors that {has} has: {named}; merge models of one architecture.",
            )
        if self.recipe.modules and self.recipe.modules[0].name not in ("", "default"):
            taken = {there for row in rows for _, there in row.inputs}
            first = self.sources[self.recipe.modules[0].slices[0].inputs[0].model]
            left = [n for n in first.leaves if n not in taken and not any(in_module(n, m.name) for m in self.recipe.modules)]
            if left:
                names = [m.name for m in self.recipe.modules]
                text = f"{len(left)} tensors belong to none of the modules {', '.join(names)}, such as {left[0]}; add theirs."
                self.wrong(self.recipe.marks["modules"], text)

    # --- parameters ---

    def row(self, line: Line) -> Row:
        """mergekit's precedence: a model's own parameters, the slice's, the module's, the recipe's, the method's default."""
        base = self.base_of(line.part)
        models = [i.model for i in line.part.inputs]
        at = models.index(base) if self.method.base != "input" and base and base in models else None
        above = (line.part.parameters, line.module.parameters, self.recipe.parameters)
        values: dict[str, Any] = {}
        marks: dict[str, Mark] = {}
        for name, p in self.method.parameters.items():
            if p.scope == "shared":
                values[name] = self.value(name, above, line.name, line, marks)
                continue
            each = []
            for k, (i, tensor) in enumerate(zip(line.part.inputs, line.names, strict=True)):
                if k != at or p.scope == "input":
                    each.append(self.value(name, (i.parameters, *above), tensor, line, marks, i))
                elif name in i.parameters:
                    self.note(i.parameters[name][0].mark, f"{name} of {i.model} has no effect: it is the base.")
            values[name] = each
        return Row(line.name, tuple(zip(models, line.names, strict=True)), at, line.t, values, marks)

    def value(  # noqa: PLR0917
        self, name: str, levels: tuple[Settings, ...], tensor: str, line: Line, marks: dict[str, Mark], i: Input | None = None
    ) -> Any:
        """The value of a parameter at a tensor; where it is written goes into `marks`."""
        part, p = place(tensor).part, self.method.parameters[name]
        for settings in levels:
            if name in settings:
                self.fitted.update(id(c) for c in settings[name] if c.fits(tensor, part))
                found = deciding(settings[name], tensor, part)
                if found is not None:
                    marks.setdefault(name, found.mark)
                    value = along(found.values, line.t)
                    return self.whole(value, name, found.mark) if p.kind is int else value
        if p.default is not REQUIRED:
            return p.default
        given = any(name in settings for settings in levels)
        who = f" for {i.model}" if i else ""
        if given:
            mark = next(s[name][0].mark for s in levels if name in s)
            self.unmet.setdefault((name, mark), {})[tensor] = None
            return 1.0
        if i and self.method.base == "input" and i.model == self.recipe.base and not i.parameters:
            text = (
                f"{name} is missing for {i.model}: base_model is an input of {self.recipe.method_name} like any other; list it "
                f"among the models with a {name}, or remove base_model."
            )
        else:
            where = "beside the model, or for all" if i else "for the recipe"
            text = f"{name} is missing{who}: {self.recipe.method_name} needs it; write it under parameters, {where}."
        top = self.recipe.marks
        beside = (part.parameters[name][0].mark for part in line.part.inputs if name in part.parameters)
        self.wrong(i.mark if i else next(beside, top.get("parameters", top["merge_method"])), text)
        return 1.0

    def whole(self, value: float, name: str, mark: Mark) -> int:
        if value != int(value):
            self.wrong(mark, f"{name} is a whole number; its gradient gives {value:g}.")
        return int(value)

    def conditions_count(self) -> None:
        """Conditions that fit no tensor do nothing, which nobody wants."""
        for settings in self.all_settings():
            for name, setting in settings.items():
                for c in setting:
                    if id(c) not in self.fitted and not c.always:
                        what = c.filter if c.filter is not None else c.regex.pattern if c.regex else c.part
                        self.wrong(c.mark, f"{name}: {what!r} fits no tensor{self.near(str(what))}")

    def all_settings(self) -> Iterator[Settings]:
        """Every block of parameters that a row may look at."""
        shared = {n for n, p in self.method.parameters.items() if p.scope == "shared"}
        yield self.recipe.parameters
        for module in self.recipe.modules:
            yield module.parameters
            for part in module.slices:
                yield part.parameters
                base = self.base_of(part)
                for i in part.inputs:
                    if self.method.base == "input" or i.model != base:
                        yield {n: s for n, s in i.parameters.items() if n not in shared}

    def near(self, what: str) -> str:
        """Parts of names that are like it."""
        import difflib

        any_source = next(iter(self.sources.values()))
        with contextlib.suppress(re.error):
            if any(re.search(what, name) for name in any_source.leaves):
                return "; a filter is a part of a name as it is, for a regular expression write regex in its place."
        words = {w for name in any_source.leaves for w in name.replace("/", ".").split(".") if not w.isdigit()}
        close = difflib.get_close_matches(what, words, n=2, cutoff=0.5)
        return (
            f"; did you mean {' or '.join(map(repr, close))}?"
            if close
            else "; names are made of: " + ", ".join(sorted(words)[:12])
        )
