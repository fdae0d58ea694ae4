"""Attention with one bias for every key, over any batch axes; its gradient is that of another attention, which has one."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import Array
from jaxtyping import Float

from jaxmerge._kernels._dispatch import Implementation, folded, run


def attend(
    q: Float[Array, "..."],
    k: Float[Array, "*batch s g f"] | None,
    v: Float[Array, "*batch s g f"] | None,
    bias: Float[Array, "*batch s"] | None,
    offset: Float[Array, "*one three h f"] | None = None,
    *,
    scale: float,
    length: int | None = None,
    implementation: Implementation,
    beside: Callable[..., Array],
) -> Float[Array, "..."]:
    """`ref.attend`; `beside` is an attention of the same arguments, one batch axis before them, that has a gradient."""
    roles = ("n3dk", "", "", "n", "*3dk") if k is None else ("ndk", "mdk", "mdk", "m", "")
    call = lambda module, *arrays: (differentiable(module, scale, length, beside, *arrays),)
    return run("attend", (q, k, v, bias, offset), roles, ("ndk",), implementation=implementation, call=call,
               xla=lambda: (beside(q, k, v, bias, offset),), scale=scale, length=length)[0]  # fmt: skip


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def differentiable(module: Any, scale: float, length: int | None, beside: Callable[..., Array], *arrays: Array | None) -> Array:
    """An implementation's attention."""
    return folded(partial(module.attend, scale=scale, length=length))(*arrays)


def _forward(module, scale, length, beside, *arrays):
    return jax.vjp(beside, *arrays)


differentiable.defvjp(_forward, lambda module, scale, length, beside, back, g: back(g))
