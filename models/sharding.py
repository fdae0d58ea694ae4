"""Where parameters live, decided from outside: a rule from a parameter's path to a `PartitionSpec`. Models know no mesh.

    rule = by_pattern({r"\\.(q|k|v|wi_0|wi_1)\\.kernel$": P("fsdp", "tensor"), r"\\.(o|wo)\\.kernel$": P("tensor", "fsdp")})
    place(model, mesh, rule)

A path is dotted and names one layer's parameter ("encoder.blocks.each.attention.q.kernel"); where layers are stacked
(`models.fold`), the axis of layers is put before the spec and stays whole.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from models.fold import is_stacked

Rule = Callable[[str], P]


def by_pattern(patterns: Mapping[str, P]) -> Rule:
    """The rule of the first regular expression that is found in a path; whole everywhere where none is.

    Example:
      >>> from jax.sharding import PartitionSpec as P
      >>> from models.sharding import by_pattern
      >>> by_pattern({r"wo[.]kernel$": P("tensor", None)})("encoder.blocks.0.ffn.wo.kernel") == P("tensor", None)
      True
    """
    compiled = [(re.compile(pattern), spec) for pattern, spec in patterns.items()]
    return lambda path: next((spec for pattern, spec in compiled if pattern.search(path)), P())


def specs(params: Any, rule: Rule) -> Any:
    """The `PartitionSpec` of every parameter of an `nnx` state, in its form."""

    def one(path, leaf):
        name = ".".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path).removesuffix(".value")
        spec = rule(name)
        spec = P(None, *spec) if is_stacked(name) else spec
        if len(spec) > leaf.ndim:
            raise ValueError(f"specs: {name} of shape {leaf.shape} has too few axes for the rule's {spec}.")
        return spec

    return jax.tree_util.tree_map_with_path(one, params)


def shardings(params: Any, mesh: Mesh, rule: Rule) -> Any:
    """The same as `NamedSharding`s: for `jax.device_put`, or `out_shardings=` of a jitted initialisation."""

    def one(spec):
        unknown = {axis for axes in spec if axes is not None for axis in (axes if isinstance(axes, tuple) else (axes,))}
        if unknown - set(mesh.axis_names):
            raise ValueError(
                f"shardings: the rule names {sorted(unknown - set(mesh.axis_names))}; the mesh has {mesh.axis_names}."
            )
        return NamedSharding(mesh, spec)

    return jax.tree.map(one, specs(params, rule), is_leaf=lambda x: isinstance(x, P))


def place(model: nnx.Module, mesh: Mesh, rule: Rule) -> None:
    """Move a model's parameters, in place, to where the rule says."""
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.device_put(params, shardings(params, mesh, rule)))


T5_RULE = by_pattern(
    {
        r"(^|\.)embedding$": P("tensor", None),
        r"(^|\.)(q|k|v|wi_0|wi_1|head)\.kernel$": P(None, "tensor"),
        r"(^|\.)(o|wo)\.kernel$": P("tensor", None),
    }
)
"""Megatron's split of T5's heads and feed-forward over an axis `tensor`, one all-reduce after each (arXiv:1909.08053)."""
