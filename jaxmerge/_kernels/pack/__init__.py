"""Hard deletion: the kept rows, packed to the left. Over any batch axes, and with derivatives in x."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero, zero_from_primal
from jaxtyping import Bool, Float, Int

from jaxmerge._kernels import merge
from jaxmerge._kernels._dispatch import Implementation, folded, run
from jaxmerge._kernels.pack.ref import slots


def pack(
    keep: Bool[Array, "*batch n"],
    x: Float[Array, "*batch n d"],
    *,
    capacity: int,
    implementation: Implementation | None = None,
    xla: Callable[[], Any],
) -> tuple[Float[Array, "*batch c d"], Int[Array, "*batch c"], Int[Array, "*batch"]]:
    """`ref.pack`; `xla` is what to run instead where no kernel is chosen."""
    call = lambda module, keep, x: differentiable(module, capacity, keep, x)
    return run("pack", (keep, x), ("n", "nd"), ("md", "m", ""), implementation=implementation, call=call, xla=xla,
               capacity=capacity)  # fmt: skip


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def differentiable(module: Any, capacity: int, keep: Array, x: Array) -> tuple[Array, Array, Array]:
    """An implementation's packing, with derivatives in x: those of a merge."""
    return folded(partial(module.pack, capacity=capacity))(keep, x)


@partial(differentiable.defjvp, symbolic_zeros=True)
def _jvp(module, capacity, primals, tangents):
    keep, x = primals
    packed, positions, count = differentiable(module, capacity, keep, x)
    dx, none = tangents[1], partial(zero_from_primal, symbolic_zeros=False)
    if isinstance(dx, SymbolicZero):
        dy = jnp.zeros_like(packed)
    else:
        dy = merge.apply(merge.beside(module), slots(keep), dx, None, None, m=capacity)
    return (packed, positions, count), (dy, none(positions), none(count))
