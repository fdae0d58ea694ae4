"""What every planner asks of its arguments, in one wording."""

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import ArrayLike, Bool, Shaped

from jaxmerge._plan import Plan
from jaxmerge._segments import check_whole


def checked_metric(name: str, metric: ArrayLike) -> Array:
    """The metric, real and at least of rank 2, without a gradient."""
    return lax.stop_gradient(checked_tokens(name, metric, "metric"))


def checked_tokens(name: str, x: ArrayLike, what: str = "x") -> Array:
    """Tokens, real and at least of rank 2."""
    x = jnp.asarray(x)
    if x.ndim < 2:
        raise ValueError(f"{name}: {what} must have shape (*batch, n, d), got {x.shape}.")
    if jnp.iscomplexobj(x):
        raise TypeError(f"{name}: {what} must be real, got {x.dtype}; put real and imaginary parts beside each other.")
    check_whole(f"{name}: {what}", x, x.ndim - 2)
    return x


def floating(x: ArrayLike) -> Array:
    """Scores as they are, whole ones in float32."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)


def check_rows(name: str, x: Shaped[Array, "*batch n d"], **rows: Any) -> None:
    """What says something of each token (a score, a mask, a plan's ids) has as many entries as there are tokens, or spreads."""
    for what, row in rows.items():
        if row is not None and not spreads(np.shape(row), x.shape[:-1]):
            raise ValueError(f"{name}: {what} must have one entry per token, shape {x.shape[:-1]}; got {np.shape(row)}.")
    check_sequences(name, **rows)


def check_sequences(name: str, *, axes: tuple[int, ...] = (-1,), **arrays: Any) -> None:
    """What has sequences along these axes (scores along the last, attention along the last two) has them whole, and is real."""
    for what, a in arrays.items():
        if a is None:
            continue
        a = jnp.asarray(a)
        if a.ndim < -min(axes):
            raise ValueError(f"{name}: {what} must have {-min(axes)} or more axes, batch axes first; got shape {a.shape}.")
        if jnp.iscomplexobj(a):
            raise TypeError(f"{name}: {what} must be real, got {a.dtype}; take its absolute value, or its real part.")
        for axis in axes:
            check_whole(f"{name}: {what}", a, a.ndim + axis)


def check_plan(name: str, plan: Any, what: str = "plan") -> None:
    """What must be a plan of segment ids is one, and whole."""
    if not isinstance(plan, Plan):
        raise TypeError(f"{name}: {what} must be a Plan of segment ids, got {type(plan).__name__}.")
    check_sequences(name, **{what: plan.segment_ids})


def spreads(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether an array of one shape broadcasts to the other."""
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))


def python_int(name: str, what: str, value: int) -> int:
    """A number that decides a shape."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: {what} must be a Python int, because shapes are static; got {value!r}.") from None


def checked_r(name: str, r: int, largest: int, why: str) -> int:
    """r as an int between 0 and the largest; `why` says what limits it."""
    r = python_int(name, "r", r)
    if not 0 <= r <= largest:
        raise ValueError(f"{name}: r must be between 0 and {largest}, got r={r}: {why}.")
    return r


def checked_capacity(name: str, capacity: int, what: str = "capacity") -> int:
    """Room for so many, as an int of 0 or more."""
    capacity = python_int(name, what, capacity)
    if capacity < 0:
        raise ValueError(f"{name}: {what} must be 0 or more, got {capacity}.")
    return capacity


def checked_sizes(name: str, what: str, sizes: Sequence[int], *, rank: int | None = None) -> tuple[int, ...]:
    """Sizes of a grid or a window, as ints of 1 or more."""
    many = "sizes" if rank is None else f"{rank} sizes"
    try:
        sizes = tuple(operator.index(s) for s in sizes)
    except TypeError:
        raise TypeError(f"{name}: {what} must be {many}, Python ints, because shapes are static; got {sizes!r}.") from None
    if not sizes or min(sizes) < 1 or (rank is not None and len(sizes) != rank):
        raise ValueError(f"{name}: {what} must be {many} of 1 or more, got {sizes if len(sizes) != 1 else sizes[0]}.")
    return sizes


def protected_mask(name: str, protect: Sequence[int], n: int) -> Bool[np.ndarray, "n"]:
    """Static positions as a mask."""
    mask = np.zeros(n, bool)
    if not isinstance(protect, Iterable):
        raise TypeError(f"{name}: protect takes several positions, such as (0,) for a class token; got {protect!r}.")
    for p in protect:
        if isinstance(p, bool | np.bool_ | jax.Array) or not hasattr(p, "__index__"):
            raise TypeError(
                f"{name}: protect takes static positions, such as (0,) or range(n - w, n), not a mask or a jax array; "
                "np.flatnonzero(mask) turns one into the other."
            )
        if not -n <= p < n:
            raise ValueError(f"{name}: protected position {p} is not among n={n} tokens.")
        mask[p] = True
    return mask
