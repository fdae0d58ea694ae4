"""The methods that `jaxmerge plan METHOD` and `jaxmerge merge METHOD` know: what each is told, and what it then does."""

import dataclasses
import inspect
from typing import Any, Literal

from jaxmerge import params
from jaxmerge.params._transform import Hyperparameter
from jaxmerge.params.spectral._spectral import Select

Numbers = tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Linear:
    """The weighted mean of models."""

    weight: Numbers = (1.0,)
    """One weight, or one per model."""
    normalize: bool = True
    """Divide the weights by their sum."""

    def transform(self) -> params.MergeTransform:
        return params.linear(_one_or_all(self.weight), normalize=self.normalize)


@dataclasses.dataclass(frozen=True)
class TaskArithmetic:
    """Base plus scale times the weighted sum of the task vectors."""

    weight: Numbers = (1.0,)
    """One weight, or one per model."""
    scale: float = 1.0
    """A factor for the sum."""
    normalize: bool = False
    """Divide the weights by their sum."""

    def transform(self) -> params.MergeTransform:
        return params.task_arithmetic(_one_or_all(self.weight), scale=self.scale, normalize=self.normalize)


@dataclasses.dataclass(frozen=True)
class Ties:
    """Trim each task vector, elect a sign for each entry, average the models that agree."""

    density: Numbers = (0.2,)
    """The share of entries to keep: one, or one per model."""
    weight: Numbers = (1.0,)
    """One weight, or one per model."""
    scale: float = 1.0
    """A factor for the result."""
    scope: Literal["model", "tensor"] = "model"
    """One threshold over the whole model (the paper), or one per tensor (mergekit)."""
    rounding: Literal["floor", "ceil"] = "floor"
    """How the share becomes a count; see jaxmerge.params.trim."""
    extra: int = 0
    """Entries kept beyond the share; see jaxmerge.params.trim."""
    ties: Literal["first", "all"] = "first"
    """Of equal magnitudes at the threshold, keep the first, or all."""
    rescale: bool = False
    """Restore each tensor's l1 norm after trimming."""
    tie: Literal["+1", "majority"] = "+1"
    """The sign where the models' sum is exactly zero."""
    reduce: Literal["mean", "sum", "max"] = "mean"
    """How the models that agree become one."""

    def transform(self) -> params.MergeTransform:
        return params.ties(**_fields(self))


@dataclasses.dataclass(frozen=True)
class DareLinear:
    """Drop entries of the task vectors at random, rescale the rest, add them up."""

    seed: int
    """The masks are a function of it, of the leaf's name and of the model; never of the sharding."""
    density: Numbers = (0.5,)
    """The probability to keep an entry: one, or one per model."""
    weight: Numbers = (1.0,)
    """One weight, or one per model."""
    scale: float = 1.0
    """A factor for the sum."""
    rescale: Literal["inv_p", "l1"] = "inv_p"
    """By 1 / density (the paper), or to each tensor's l1 norm (mergekit)."""
    normalize: bool = False
    """Divide the weights by their sum."""

    def transform(self) -> params.MergeTransform:
        return params.dare_linear(**_fields(self))


@dataclasses.dataclass(frozen=True)
class DareTies:
    """Drop entries at random and rescale the rest; elect signs and reduce those that agree."""

    seed: int
    """The masks are a function of it, of the leaf's name and of the model; never of the sharding."""
    density: Numbers = (0.5,)
    """The probability to keep an entry: one, or one per model."""
    weight: Numbers = (1.0,)
    """One weight, or one per model."""
    scale: float = 1.0
    """A factor for the result."""
    rescale: Literal["inv_p", "l1"] = "inv_p"
    """By 1 / density (the paper), or to each tensor's l1 norm (mergekit)."""
    tie: Literal["+1", "majority"] = "+1"
    """The sign where the models' sum is exactly zero."""
    reduce: Literal["mean", "sum"] = "sum"
    """How the models that agree become one."""

    def transform(self) -> params.MergeTransform:
        return params.dare_ties(**_fields(self))


@dataclasses.dataclass(frozen=True)
class Slerp:
    """Spherical interpolation between two models, tensor by tensor."""

    t: float = 0.5
    """0 is the first model, 1 the second."""
    threshold: float = 0.9995
    """|cos| beyond which the straight line is taken."""

    def transform(self) -> params.MergeTransform:
        return params.slerp(self.t, threshold=self.threshold)


NO_OPTIONS = ("weights", "grams", "optimizer", "steps")
"""Data, which lies in files (--statistics), and an optimizer with its steps."""


def _options(alias: Any) -> type:
    """The options of a merge that is one function: its parameters, but for those that are functions or data themselves."""
    fields = []
    for p in inspect.signature(alias).parameters.values():
        kind = Numbers if p.annotation == Hyperparameter else p.annotation
        if kind == Select or p.name in NO_OPTIONS:
            continue
        if p.name == "axis":  # of square matrices nobody can tell
            fields.append((p.name, Literal[0, 1]))
            continue
        default = (p.default,) if kind is Numbers and p.default is not p.empty else p.default
        fields.append((p.name, kind) if default is p.empty else (p.name, kind, dataclasses.field(default=default)))
    options = dataclasses.make_dataclass(
        alias.__name__, fields, frozen=True, kw_only=True, namespace={"transform": lambda self: alias(**_fields(self))}
    )
    options.__doc__ = f"{alias.__doc__.splitlines()[0]}\n\nThe options: help(jaxmerge.params.{alias.__name__})."
    return options


METHODS = {
    "linear": Linear,
    "task-arithmetic": TaskArithmetic,
    "ties": Ties,
    "dare-linear": DareLinear,
    "dare-ties": DareTies,
    "slerp": Slerp,
} | {
    alias.__name__.replace("_", "-"): _options(alias)
    for alias in (
        params.arcee_fusion,
        params.breadcrumbs,
        params.breadcrumbs_ties,
        params.consensus,
        params.della,
        params.della_linear,
        params.fisher,
        params.iso_c,
        params.iso_cts,
        params.karcher,
        params.magmax,
        params.model_stock,
        params.multislerp,
        params.nearswap,
        params.nuslerp,
        params.passthrough,
        params.pcb,
        params.ram,
        params.ramplus_tl,
        params.regmean,
        params.sce,
        params.tsvm,
        params.update_selective,
        params.varm,
        params.widen,
        params.wudi,
    )
}
NEED_NO_BASE = (
    Linear,
    Slerp,
    *(METHODS[name] for name in ("arcee-fusion", "fisher", "karcher", "multislerp", "nuslerp", "passthrough")),
    *(METHODS[name] for name in ("regmean", "widen")),
)


def _fields(options: Any) -> dict[str, Any]:
    """A method's options as arguments; one number stands for all models."""
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    return {k: _one_or_all(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _one_or_all(numbers: Numbers) -> float | list[float]:
    return numbers[0] if len(numbers) == 1 else list(numbers)
