"""Parameters of a recipe: scalars, gradients along the layers, and conditions on a tensor's name, as mergekit reads them."""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxmerge.recipe._methods import Parameter
from jaxmerge.recipe._yaml import Mark, Mistake, Node, suggest

PARTS = ("embeddings", "head", "layers", "rest")
CONDITION = ("value", "filter", "regex", "part")


class Condition(NamedTuple):
    """A value for some tensors: one scalar, or several along the layers.

    Attributes:
      values: one, or a gradient.
      filter: part of the name of the tensor that is read; None and "*" fit every name. mergekit's.
      regex: found in that name. Ours.
      part: "embeddings", "head", "layers" or "rest". Ours.
      mark: where it stands.
    """

    values: tuple[Any, ...]
    filter: str | None
    regex: re.Pattern | None
    part: str | None
    mark: Mark

    def fits(self, name: str, part: str) -> bool:
        return (
            (self.filter in (None, "*") or self.filter in name)
            and (self.regex is None or self.regex.search(name) is not None)
            and self.part in (None, part)
        )

    @property
    def always(self) -> bool:
        return self.filter in (None, "*") and self.regex is None and self.part is None


Setting = tuple[Condition, ...]
Settings = Mapping[str, Setting]


def deciding(setting: Setting, name: str, part: str) -> Condition | None:
    """The condition that decides at a tensor: the first that fits. None where none does, and the next level is asked.

    Args:
      setting: conditions, in order.
      name: the tensor that is read.
      part: which part of the model it belongs to.
    """
    return next((condition for condition in setting if condition.fits(name, part)), None)


def along(values: tuple[Any, ...], t: float) -> Any:
    """The value at t, how far along the layers a tensor lies, from 0 to 1; 0 for tensors that are in no layer.

    Numbers stand at even distances with lines between them; of flags and words it is the one that t has reached.
    """
    place = t * (len(values) - 1)
    low = int(place)
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return values[low]
    high = min(low + 1, len(values) - 1)
    return (1 - (place - low)) * values[low] + (place - low) * values[high]


def read_setting(node: Node, name: str, p: Parameter, method: str, mistakes: list[Mistake]) -> Setting:
    """A parameter's value, and what is wrong with it."""
    entries = node.value if isinstance(node.value, list) else [node]
    if not entries:
        mistakes.append(Mistake(node.mark, f"{name} is an empty list; a gradient needs one value or more."))
    conditional = [isinstance(e.value, dict) for e in entries]
    if any(conditional) and not all(conditional):
        mistakes.append(Mistake(node.mark, f"{name} mixes numbers and conditions; write every entry as {{filter, value}}."))
        return ()
    if not any(conditional):
        return (Condition(_values(node, name, p, method, mistakes), None, None, None, node.mark),)
    found = []
    for i, entry in enumerate(entries):
        for key, mark in entry.keys.items():
            if key not in CONDITION:
                mistakes.append(Mistake(mark, f"{name}: unknown key {key!r}{suggest(key, CONDITION)}"))
        if "value" not in entry.value:
            mistakes.append(Mistake(entry.mark, f"{name}: a condition needs a value, such as {{filter: mlp, value: 0.5}}."))
            continue
        fields = {k: v.value for k, v in entry.value.items() if k in CONDITION}
        for key in ("filter", "regex", "part"):
            if fields.get(key) is not None and not isinstance(fields[key], str):
                mistakes.append(Mistake(entry.value[key].mark, f"{name}: {key} must be a word, got {fields[key]!r}."))
                fields[key] = None
        if fields.get("part") not in (None, *PARTS):
            where = entry.value["part"].mark
            mistakes.append(Mistake(where, f"{name}: unknown part {fields['part']!r}{suggest(fields['part'], PARTS)}"))
        regex = None
        if fields.get("regex") is not None:
            try:
                regex = re.compile(fields["regex"])
            except re.error as e:
                mistakes.append(Mistake(entry.value["regex"].mark, f"{name}: {fields['regex']!r} is not a regex: {e}."))
                continue
        values = _values(entry.value["value"], name, p, method, mistakes)
        condition = Condition(values, fields.get("filter"), regex, fields.get("part"), entry.mark)
        if condition.always and i + 1 < len(entries) and all(key in CONDITION for key in entry.keys):
            text = f"{name}: this condition fits every tensor, so those below never count; put it last."
            mistakes.append(Mistake(entry.mark, text))
        found.append(condition)
    return tuple(found)


def _values(node: Node, name: str, p: Parameter, method: str, mistakes: list[Mistake]) -> tuple[Any, ...]:
    scalars = node.value if isinstance(node.value, list) else [node]
    values = []
    for scalar in scalars:
        try:
            values.append(_scalar(scalar.value, p))
        except ValueError as e:
            text = f"{name} of {method} must be {e}, got {scalar.plain!r}{_percent(scalar.value, p)}."
            mistakes.append(Mistake(scalar.mark, text))
    if isinstance(node.value, list) and not scalars:
        mistakes.append(Mistake(node.mark, f"{name} is an empty list; a gradient needs one value or more."))
    return tuple(values) or (0.0,)


def _percent(value: Any, p: Parameter) -> str:
    """Of a share that is written as a percentage: how it is written."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%?", str(value))
    if found is None or p.high != 1 or not 1 < float(found[1]) <= 100:
        return ""
    return f"; {found[1]} % is {float(found[1]) / 100:g}"


def _scalar(value: Any, p: Parameter) -> Any:
    """A scalar of the parameter's kind. YAML reads 1e-5 as a word: it is a number where one is wanted.

    Raises:
      ValueError: what it must be.
    """
    if p.words and value in p.words:
        return value
    if p.kind is str:
        raise ValueError(f"one of {', '.join(p.words)}")
    if p.kind is bool:
        wanted = " or ".join(["true or false", *p.words])
        known = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
        if isinstance(value, str):
            value = known.get(value.lower())
        if value not in (True, False):
            raise ValueError(wanted)
        return bool(value)
    wanted = "a whole number" if p.kind is int else "a number"
    if p.low is not None or p.high is not None:
        wanted += f" of at least {p.low:g}" if p.high is None else f" between {p.low or 0:g} and {p.high:g}"
    if isinstance(value, bool) or value is None or isinstance(value, list | dict):
        raise ValueError(wanted)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(wanted) from None
    inside = (p.low is None or number >= p.low) and (p.high is None or number <= p.high)
    if not math.isfinite(number) or not inside or (p.kind is int and number != int(number)):
        raise ValueError(wanted)
    return int(number) if p.kind is int else number
