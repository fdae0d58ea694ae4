"""Operations of a program's matrix products, counted in its jaxpr: what papers call FLOPs.

    operations(model_loss, params, batch)

Exact for static shapes, loops included; XLA's own count (`compiled.cost_analysis()`) adds what is pointwise and counts the
body of a loop once.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def operations(f: Callable[..., Any], *args: Any) -> int:
    """Two per multiply-add of every `dot_general` that f(*args) runs; of a conditional, the dearest branch.

    Raises:
      ValueError: a while loop holds a product, because nobody knows how often it runs.

    Example:
      >>> import jax.numpy as jnp
      >>> operations(lambda a, b: a @ b, jnp.ones((2, 3)), jnp.ones((3, 4)))
      48
    """
    return _count(jax.make_jaxpr(f)(*args).jaxpr)


def xla_operations(f: Callable[..., Any], *args: Any) -> float:
    """XLA's count of the compiled program."""
    return float((jax.jit(f).lower(*args).compile().cost_analysis() or {})["flops"])


def _count(jaxpr: core.Jaxpr) -> int:
    return sum(_one(eqn) for eqn in jaxpr.eqns)


def _one(eqn: core.JaxprEqn) -> int:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left, out = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
        return 2 * math.prod(out) * math.prod(left[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel, out = _shape(eqn.invars[1]), _shape(eqn.outvars[0])
        return 2 * math.prod(out) * math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
    inner = [_count(j) for j in _jaxprs(params)]
    if name == "while" and any(inner):
        raise ValueError("operations: a while loop holds a matrix product; use scan, whose length is known.")
    if name == "cond":
        return max(inner)
    return sum(inner) * params.get("length", 1) if name == "scan" else sum(inner)


def _shape(of: Any) -> tuple[int, ...]:
    return of.aval.shape


def _jaxprs(params: dict[str, Any]):
    for value in params.values():
        for leaf in value if isinstance(value, tuple | list) else (value,):
            if isinstance(leaf, core.ClosedJaxpr):
                yield leaf.jaxpr
            elif isinstance(leaf, core.Jaxpr):
                yield leaf
