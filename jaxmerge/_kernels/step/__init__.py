"""A whole step of Token Merging: add the residual, match, choose, merge, normalise. Over any batch axes, with derivatives."""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero, zero_from_primal
from jaxtyping import Float

from jaxmerge._kernels import merge
from jaxmerge._kernels._dispatch import Implementation, folded, run
from jaxmerge._kernels.step.ref import Result, in_turn, normalised, over


class How(NamedTuple):
    """What is compiled in."""

    r: int
    protected: tuple[bool, ...]
    epsilon: float = 0.0
    dtype: Any = None


def step(
    metric: Float[Array, "*batch n k"],
    x: Float[Array, "*batch n d"],
    sizes: Float[Array, "*batch n"] | None = None,
    residual: Float[Array, "*batch n d"] | None = None,
    offset: Float[Array, "d"] | None = None,
    scale: Float[Array, "d"] | None = None,
    shift: Float[Array, "d"] | None = None,
    *,
    implementation: Implementation | None = None,
    xla: Callable[[], Any],
    **how: Any,
) -> Result:
    """`ref.step`; `xla` is what to run instead where no kernel is chosen."""
    every = lambda a: None if a is None else a.reshape(*[1] * (x.ndim - 2), *a.shape)
    arrays = (
        lax.stop_gradient(metric),
        x,
        None if sizes is None else lax.stop_gradient(sizes),
        residual,
        *map(every, (offset, scale, shift)),
    )
    width = "d" if scale is None else "w"  # what is normalised lies together
    roles = ("nk", f"n{width}", "n", f"n{width}", *[f"*{width}"] * 3)
    outputs = (f"m{width}", "m", "n", *([] if scale is None else ["mw"]))
    call = lambda module, *arrays: differentiable(module, How(**how), *arrays)
    found = run("step", arrays, roles, outputs, implementation=implementation, call=call, xla=xla, **how)
    return Result(*found)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def differentiable(module: Any, how: How, *arrays: Array | None) -> tuple[Array, ...]:
    """An implementation's step, with derivatives in what is merged: those of its merge, under the plan that was found."""
    found = folded(partial(module.step, **how._asdict()))(*arrays)
    return tuple(y for y in found if y is not None)


@partial(differentiable.defjvp, symbolic_zeros=True)
def _jvp(module, how, primals, tangents):
    every = lambda some: (*some, *[None] * 5)[:7]
    moving = [None if isinstance(t, SymbolicZero) else t for t in every(tangents)]
    found = differentiable(module, how, *primals)
    dy = _merged(module, found, every(primals), moving)
    changes = (dy, jnp.zeros_like(found[1]), zero_from_primal(found[2], symbolic_zeros=False))
    if len(found) == len(changes):
        return found, changes
    behind = lambda y, scale, shift: normalised(y, in_turn(scale, y), in_turn(shift, y), how.epsilon, how.dtype)
    dvectors = [jnp.zeros_like(v) if dv is None else dv for v, dv in zip(primals[5:], moving[5:], strict=True)]
    dnormed = jax.jvp(behind, (found[0], *primals[5:]), (dy, *dvectors))[1]
    return found, (*changes, dnormed)


def _merged(module: Any, found: tuple[Array, ...], primals: Any, moving: Any) -> Array:
    """How merged x moves with x, residual and offset: as they move, merged."""
    (_, x, sizes, *_), (_, dx, _, dresidual, doffset, *_), (y, mass, ids, *_) = primals, moving, found
    some = [t.astype(x.dtype) for t in (dx, dresidual) if t is not None]
    if doffset is not None:
        some.append(jnp.broadcast_to(over(in_turn(doffset, x), x), x.shape).astype(x.dtype))
    if not some:
        return jnp.zeros_like(y)
    return merge.apply(merge.beside(module), ids, reduce(jnp.add, some), sizes, mass, m=y.shape[1])
