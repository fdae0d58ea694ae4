"""A whole step of Token Merging: add the residual, match, choose, merge. Over any batch axes, with derivatives in both."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero, zero_from_primal
from jaxtyping import Float, Int

from jaxmerge._kernels import merge
from jaxmerge._kernels._dispatch import Implementation, folded, run


def step(
    metric: Float[Array, "*batch n k"],
    x: Float[Array, "*batch n d"],
    sizes: Float[Array, "*batch n"] | None = None,
    residual: Float[Array, "*batch n d"] | None = None,
    *,
    r: int,
    protected: tuple[bool, ...],
    implementation: Implementation | None = None,
    xla: Callable[[], Any],
) -> tuple[Float[Array, "*batch m d"], Float[Array, "*batch m"], Int[Array, "*batch n"]]:
    """`ref.step`; `xla` is what to run instead where no kernel is chosen."""
    call = lambda module, *arrays: differentiable(module, r, protected, *arrays)
    stopped = (lax.stop_gradient(metric), x, None if sizes is None else lax.stop_gradient(sizes), residual)
    return run("step", stopped, ("nk", "nd", "n", "nd"), ("md", "m", "n"), implementation=implementation, call=call, xla=xla,
               r=r, protected=protected)  # fmt: skip


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def differentiable(
    module: Any,
    r: int,
    protected: tuple[bool, ...],
    metric: Array,
    x: Array,
    sizes: Array | None,
    residual: Array | None = None,
) -> tuple[Array, Array, Array]:
    """An implementation's step, with derivatives in what is merged: those of its merge, under the plan that was found."""
    return folded(partial(module.step, r=r, protected=protected))(metric, x, sizes, residual)


@partial(differentiable.defjvp, symbolic_zeros=True)
def _jvp(module, r, protected, primals, tangents):
    metric, x, sizes, residual = primals
    y, mass, ids = differentiable(module, r, protected, metric, x, sizes, residual)
    some = [t.astype(x.dtype) for t in (tangents[1], tangents[3]) if t is not None and not isinstance(t, SymbolicZero)]
    if not some:
        dy = jnp.zeros_like(y)
    else:
        dx = sum(some[1:], some[0])
        dy = merge.apply(merge.beside(module), ids, dx, sizes, mass, m=y.shape[1])
    return (y, mass, ids), (dy, jnp.zeros_like(mass), zero_from_primal(ids, symbolic_zeros=False))
