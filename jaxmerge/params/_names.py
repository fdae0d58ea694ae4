"""Hyperparameters by the name of the leaf: along the layers, by filter, one for each model."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmerge.params._transform import Hyperparameter

Layer = Callable[[str], int | None]


def layer_of(pattern: str = r"(?:^|/|\.)layers?[/._](\d+)(?:/|\.|$)") -> Layer:
    """Leaf name -> number of its layer, or None.

    Example:
      >>> import jaxmerge as jm
      >>> of = jm.params.layer_of()
      >>> of("layers/3/mlp/kernel"), of("model.layers.12.mlp.weight"), of("embed")
      (3, 12, None)
    """
    found = re.compile(pattern)

    def of(name: str) -> int | None:
        match = found.search(name)
        return int(match.group(1)) if match else None

    return of


def gradient(
    values: Sequence[Any], layers: int | tuple[int, int], *, rest: Any = None, layer: Layer | None = None
) -> Callable[[str], Any]:
    """A hyperparameter that changes along the layers: values at even distances, lines between them.

    Args:
      values: numbers, or one number per model each; the first is for the first layer, the last for the last. Of a single layer
        it is the last.
      layers: how many there are; or (first, stop), where values are spread over the layers from first to stop - 1 alone.
      rest: for leaves that are in no layer (embeddings, final norm, head); None is the first value.
      layer: leaf name -> number of its layer or None; None is `layer_of()`.

    Returns:
      A function of the leaf's name.

    Raises:
      ValueError: no values or no layers; a leaf of a layer that is not there.

    Example:
      >>> import jaxmerge as jm
      >>> weight = jm.params.gradient([0.0, 1.0, 0.0], layers=5)
      >>> [float(weight(f"layers/{i}/kernel")) for i in range(5)]
      [0.0, 0.5, 1.0, 0.5, 0.0]

    Source: mergekit's gradients; `layers` as a pair is the `layer_range` of a slice.
    """
    first, stop = layers if isinstance(layers, tuple) else (0, layers)
    if not len(values) or stop <= first:
        raise ValueError(f"gradient: pass one value or more, and one layer or more; got {values} for layers {first} to {stop}.")
    of = layer_of() if layer is None else layer
    table = np.asarray(values, np.float64)

    def at(name: str) -> Any:
        i = of(name)
        if i is None:
            return table[0] if rest is None else rest
        if not first <= i < stop:
            raise ValueError(f"gradient: leaf {name!r} is of layer {i}; there are values for layers {first} to {stop - 1}.")
        place = ((i - first) / (stop - first - 1) if stop - first > 1 else 1.0) * (len(table) - 1)
        low = int(place)
        high = min(low + 1, len(table) - 1)
        return (1 - (place - low)) * table[low] + (place - low) * table[high]

    return at


def by_name(filters: Mapping[str | re.Pattern, Hyperparameter], default: Hyperparameter = None) -> Callable[[str], Any]:
    """A hyperparameter by filter: the first that is part of the leaf's name decides.

    Args:
      filters: {part of a name, or a compiled pattern that is found in it: value}; values may be functions of the name.
      default: for names that no filter fits; None refuses them.

    Returns:
      A function of the leaf's name.

    Raises:
      ValueError: a name that no filter fits, where there is no default.

    Example:
      >>> import re, jaxmerge as jm
      >>> t = jm.params.by_name({"attn": 0.25, re.compile(r"mlp/(up|gate)"): 0.5}, 1.0)
      >>> t("layers/0/attn/q"), t("layers/0/mlp/up"), t("norm")
      (0.25, 0.5, 1.0)

    Source: mergekit's filters.
    """

    def at(name: str) -> Any:
        for part, value in filters.items():
            if part.search(name) if isinstance(part, re.Pattern) else part in name:
                return _at(value, name)
        if default is None:
            raise ValueError(f"by_name: no filter of {list(filters)} fits leaf {name!r}; add one, or a default.")
        return _at(default, name)

    return at


def by_model(*values: Hyperparameter) -> Callable[[str], list]:
    """One hyperparameter for each model, each a number or a function of the leaf's name.

    Example:
      >>> import jaxmerge as jm
      >>> jm.params.by_model(jm.params.by_name({"norm": 0.0}, 1.0), 0.5)("norm")
      [0.0, 0.5]

    Source: mergekit's parameters under each of its `models`.
    """
    return lambda name: [_at(value, name) for value in values]


def _at(value: Hyperparameter, name: str) -> Any:
    return value(name) if callable(value) else value
