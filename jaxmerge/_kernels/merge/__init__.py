"""Segment sums and means of a plan, and their transpose, over any batch axes and with derivatives."""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Float, Int

from jaxmerge import _segments as segments
from jaxmerge._kernels._dispatch import Implementation, folded, run
from jaxmerge._kernels.merge._linear import apply, inverse, spread


def merge(
    ids: Int[Array, "*batch n"],
    x: Float[Array, "*batch n d"],
    weight: Float[Array, "*batch n"] | None = None,
    *,
    m: int,
    mean: bool,
    implementation: Implementation | None = None,
    xla: Callable[[], Array],
) -> Float[Array, "*batch m d"]:
    """`ref.merge` without the mass; `xla` is what to run instead where no kernel is chosen."""
    call = lambda module, *arrays: differentiable(module, m, mean, *arrays)
    return run("merge", (ids, x, weight), ("n", "nd", "n"), ("md", "m"), implementation=implementation, call=call,
               xla=lambda: (xla(),), m=m, mean=mean)[0]  # fmt: skip


def unmerge(
    ids: Int[Array, "*batch n"],
    y: Float[Array, "*batch m d"],
    *,
    implementation: Implementation | None = None,
    xla: Callable[[], Array],
) -> Float[Array, "*batch n d"]:
    """`ref.unmerge` without factors; `xla` is what to run instead where no kernel is chosen."""
    call = lambda module, ids, y, before, after: (spread(module, ids, y, before, after),)
    arrays, roles = (ids, y, None, None), ("n", "md", "m", "n")
    return run("unmerge", arrays, roles, ("nd",), implementation=implementation, call=call, xla=lambda: (xla(),))[0]


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def differentiable(module: Any, m: int, mean: bool, ids: Array, x: Array, weight: Array | None) -> tuple[Array, Array]:
    """An implementation's merge, with derivatives in x and in the weights."""
    return folded(partial(module.merge, m=m, mean=mean))(ids, x, weight)


@partial(differentiable.defjvp, symbolic_zeros=True)
def _jvp(module, m, mean, primals, tangents):
    ids, x, weight = primals
    _, dx, dweight = tangents
    y, mass = differentiable(module, m, mean, ids, x, weight)
    zero = lambda t: t is None or isinstance(t, SymbolicZero)
    dy, dmass = None, jnp.zeros_like(mass)
    if not zero(dx):
        dy = apply(module, ids, dx, weight, mass if mean else None, m=m)
    if not zero(dweight):
        dmass = segments.sums(ids, m, dweight)
        by_weight = apply(module, ids, segments.times(x, dweight), None, None, m=m)
        if mean:
            by_weight = segments.times(by_weight, inverse(mass)) - segments.times(y, inverse(mass) * dmass)
        dy = by_weight.astype(y.dtype) if dy is None else dy + by_weight.astype(y.dtype)
    return (y, mass), (jnp.zeros_like(y) if dy is None else dy, dmass)


def beside(module: Any) -> Any:
    """The merge of another operation's implementation."""
    return importlib.import_module(f"{__name__}.{module.__name__.rpartition('.')[2]}")
