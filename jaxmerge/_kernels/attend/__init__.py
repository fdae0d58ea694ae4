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
    mean_keys: bool = False,
    implementation: Implementation,
    beside: Callable[..., tuple[Array, ...]],
) -> tuple[Array, ...]:
    """`ref.attend`; `beside` is an attention of the same arguments, one batch axis before them, that has a gradient."""
    heads = "m" if mean_keys else "d"  # a mean needs them all
    roles = (f"n3{heads}k", "", "", "n", f"*3{heads}k") if k is None else ("ndk", "mdk", "mdk", "m", "")
    static = dict(scale=scale, length=length, mean_keys=mean_keys)
    return run(
        "attend", (q, k, v, bias, offset), roles, (f"n{heads}k", *(["nk"] if mean_keys else [])), implementation=implementation,
        call=lambda module, *arrays: differentiable(partial(module.attend, **static), beside, *arrays),
        xla=lambda: beside(q, k, v, bias, offset), **static,
    )  # fmt: skip


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def differentiable(call: Callable[..., Any], beside: Callable[..., Any], *arrays: Array | None) -> tuple[Array, ...]:
    """An implementation's attention."""
    return folded(call)(*arrays)


def _forward(call, beside, *arrays):
    return jax.vjp(beside, *arrays)


differentiable.defvjp(_forward, lambda call, beside, back, g: back(g))
