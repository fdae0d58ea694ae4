"""Attention with one bias for every key, over any batch axes, with its gradient."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Float

from jaxmerge._kernels._dispatch import Implementation, alike, folded, run
from jaxmerge._kernels.attend import ref


class How(NamedTuple):
    """What is compiled in."""

    scale: float
    length: int | None
    mean_keys: bool


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
) -> tuple[Array, ...]:
    """`ref.attend`."""
    heads = "m" if mean_keys else "d"  # a mean needs them all
    roles = (f"n3{heads}k", "", "", "n", f"*3{heads}k") if k is None else ("ndk", "mdk", "mdk", "m", "")
    how = How(scale, length, mean_keys)
    return run(
        "attend", (q, k, v, bias, offset), roles, (f"n{heads}k", *(["nk"] if mean_keys else [])), implementation=implementation,
        call=lambda module, *arrays: differentiable(module, how, *alike(arrays)),
        xla=lambda: differentiable(ref, how, q, k, v, bias, offset), **how._asdict(),
    )  # fmt: skip


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def differentiable(module: Any, how: How, *arrays: Array | None) -> tuple[Array, ...]:
    """An implementation's attention; its gradient is of the same implementation."""
    return folded(partial(module.attend, **how._asdict()))(*arrays)


def _forward(module, how, *arrays):
    arrays = tuple(None if x is None else x.value for x in arrays)
    found = _once(partial(module.attend, **how._asdict(), for_vjp=True), *arrays)
    outputs = 2 if how.mean_keys else 1
    return found[:outputs], (arrays, found[0], found[outputs:])


def _backward(module, how, kept, cotangents):
    (q, k, v, bias, offset), out, more = kept
    g, *of_mean = (None if isinstance(c, SymbolicZero) else c for c in cotangents)
    g = jnp.zeros_like(out) if g is None else g
    dq, dk, dv, dbias = _once(
        partial(module.attend_vjp, scale=how.scale, length=how.length), q, k, v, bias, offset, g, out, *more
    )
    for mean in (mean for mean in of_mean if mean is not None):  # of the keys over heads
        if k is None:
            heads, n = dq.shape[3], out.shape[1]
            dq = dq.at[:, :n, 1].add((mean / heads)[:, :, None].astype(dq.dtype))
        else:
            dk += (mean / dk.shape[2])[:, :, None].astype(dk.dtype)
    doffset = None
    if offset is not None:  # which each row of the product was given
        doffset = dq.sum(axis=1, dtype=jnp.float32)
        doffset = doffset.reshape(len(offset), -1, *offset.shape[1:]).sum(axis=1).astype(offset.dtype)
    return dq, dk, dv, dbias if dbias is None else dbias.astype(bias.dtype), doffset


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _once(call, *arrays):
    return folded(call)(*arrays)


@_once.defjvp
def _(call, primals, tangents):
    raise ValueError(
        'attention: kernels have first derivatives alone, and second ones were asked for: use implementation="xla".'
    )


differentiable.defvjp(_forward, _backward, symbolic_zeros=True)
