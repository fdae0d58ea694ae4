"""What every planner asks of its arguments, in one wording."""

import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import ArrayLike, Bool


def checked_metric(name: str, metric: ArrayLike) -> Array:
    """The metric, at least of rank 2, without a gradient."""
    metric = jnp.asarray(metric)
    if metric.ndim < 2:
        raise ValueError(f"{name}: metric must have shape (*batch, n, d), got {metric.shape}.")
    return lax.stop_gradient(metric)


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


def protected_mask(name: str, protect: Sequence[int], n: int) -> Bool[np.ndarray, "n"]:
    """Static positions as a mask."""
    mask = np.zeros(n, bool)
    for p in protect:
        if isinstance(p, bool | np.bool_ | jax.Array):
            raise TypeError(
                f"{name}: protect takes static positions, such as (0,) or range(n - w, n), not a mask or a jax array; "
                "np.flatnonzero(mask) turns one into the other."
            )
        if not -n <= p < n:
            raise ValueError(f"{name}: protected position {p} is not among n={n} tokens.")
        mask[p] = True
    return mask
