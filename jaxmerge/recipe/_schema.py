"""What a recipe says, as plain data: mergekit 0.1.5's YAML, whole, and our own keys."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxmerge.recipe._methods import Method
from jaxmerge.recipe._settings import Settings
from jaxmerge.recipe._yaml import Mark, Mistake


class Path(NamedTuple):
    """Where a model lies: a path or a name on the Hub, and the revision there."""

    path: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path


class Reference(NamedTuple):
    """A model, and an adapter to be added to it: "model@revision+adapter"."""

    model: Path
    lora: Path | None = None

    def __str__(self) -> str:
        return f"{self.model}+{self.lora}" if self.lora else str(self.model)


class Input(NamedTuple):
    """A model as it goes into a slice: which of its layers (None is all), its own parameters, statistics of it.

    Attributes:
      mark, marks: where it is named, and where the keys beside it stand.
    """

    model: Reference
    layers: tuple[int, int] | None
    parameters: Settings
    mark: Mark
    marks: Mapping[str, Mark]
    statistics: tuple[Path, Mark] | None = None


class Slice(NamedTuple):
    """Layers of the output, and what they are merged from; `marks` are of its keys."""

    inputs: tuple[Input, ...]
    base: Reference | None
    parameters: Settings
    mark: Mark
    marks: Mapping[str, Mark]


class Module(NamedTuple):
    """A part of the output: its slices, one over another. The name "" is the whole model."""

    name: str
    slices: tuple[Slice, ...]
    parameters: Settings
    mark: Mark


class TokenSource(NamedTuple):
    """Where a token's row comes from: a model (its own token, another, or a row by number), or zeros where `model` is None."""

    model: Reference | None
    token: str | None = None
    row: int | None = None
    force: bool = False
    given: bool = True
    mark: Mark | None = None


class Tokenizer(NamedTuple):
    """Which vocabulary the output has: "union", "base", or a model's; `mark` is where that is said."""

    source: str | Reference
    tokens: dict[str, TokenSource]
    pad_to_multiple_of: int | None
    mark: Mark


class Recipe(NamedTuple):
    """One document of a recipe.

    Attributes:
      name: under which later documents use the result; None for the last one.
      method, method_name: what to do.
      base: what the models were trained from, or what the method makes of it.
      modules: what to merge.
      parameters: for all of it.
      dtype, out_dtype: of the output; arithmetic is float32.
      tokenizer, chat_template: of the output.
      own: our keys: seed, format, layout, memory, sharding, integers, nonfinite, state; rank, of adapters alone.
      text: the document as it is written.
      marks: where its keys stand.
      parts: of models that are written as mappings, where the model and its adapter stand.
      notes: what has no effect.
    """

    name: str | None
    method_name: str
    method: Method
    base: Reference | None
    modules: tuple[Module, ...]
    parameters: Settings
    dtype: str | None
    out_dtype: str | None
    tokenizer: Tokenizer | None
    chat_template: str | None
    own: dict[str, Any]
    text: str
    marks: dict[str, Mark]
    parts: dict[Reference, tuple[Mark, Mark]]
    notes: tuple[Mistake, ...]

    def references(self) -> dict[Reference, Mark]:
        """Every model, the base first, each once, and where it is named first."""
        found = {self.base: self.marks["base_model"]} if self.base else {}
        for module in self.modules:
            for part in module.slices:
                for each in part.inputs:
                    found.setdefault(each.model, each.mark)
                if part.base:
                    found.setdefault(part.base, part.marks["base_model"])
        return found

    def statistics(self) -> dict[Reference, tuple[Path, Mark]]:
        """Where the statistics of each model lie that has any."""
        inputs = [each for module in self.modules for part in module.slices for each in part.inputs]
        return {each.model: each.statistics for each in inputs if each.statistics is not None}
