"""The spec of `step` in plain XLA: Token Merging's matching, the mean of what it joins, and the norm behind."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from jaxmerge._kernels.match import ref as match
from jaxmerge._kernels.merge import ref as merge
from jaxmerge._rank import highest


class Result(NamedTuple):
    """Merged x, merged sizes, segment ids; merged x normalised, where that is asked for."""

    x: Float[Array, "B m d"]
    sizes: Float[Array, "B m"]
    ids: Int[Array, "B n"]
    normed: Float[Array, "B m d"] | None = None


def step(
    metric: Float[Array, "B n k"],
    x: Float[Array, "B n d"],
    sizes: Float[Array, "B n"] | None = None,
    residual: Float[Array, "B n d"] | None = None,
    offset: Float[Array, "one d"] | None = None,
    scale: Float[Array, "one d"] | None = None,
    shift: Float[Array, "one d"] | None = None,
    *,
    r: int,
    protected: tuple[bool, ...],
    epsilon: float = 0.0,
    dtype: Any = None,
) -> Result:
    """Merge the r even positions most like an odd one: merged x, merged sizes (float32), segment ids (int32); m = n - r.

    The groups are those of `tokens.bipartite_matching`, the rows their means weighted by `sizes`, in the order of the tokens
    that stay. Sizes are whole numbers below 2^24 and stay exact. `protected` positions neither move nor receive. What is merged
    is x + residual + offset, rounded to x's dtype. `normed` is the layer norm of the rows that are left, as they were rounded,
    where `scale` and `shift` are given.
    """
    metric, closed = lax.stop_gradient(metric), np.array(protected)
    best, to = match.match(metric[:, ::2], metric[:, 1::2][:, np.flatnonzero(~closed[1::2])])
    ids = jax.vmap(lambda best, to: segment_ids(best, to, r, protected))(best, to)
    y, mass = merge.merge(ids, added(x, residual, offset), sizes, m=x.shape[1] - r, mean=True)
    normed = None if scale is None or shift is None else normalised(y, scale, shift, epsilon, dtype)
    return Result(y, lax.stop_gradient(mass), ids, normed)


def added(
    x: Float[Array, "*n d"], residual: Float[Array, "*n d"] | None, offset: Float[Array, "*one d"] | None = None
) -> Float[Array, "*n d"]:
    """x + residual + offset, in float32, rounded to x's dtype."""
    wide = lambda a: a.astype(jnp.float32)
    some = [wide(residual)] if residual is not None else []
    some += [wide(over(offset, x))] if offset is not None else []
    return sum(some, wide(x)).astype(x.dtype) if some else x


def normalised(
    x: Float[Array, "*n d"], scale: Float[Array, "*one d"], shift: Float[Array, "*one d"], epsilon: float, dtype: Any
) -> Float[Array, "*n d"]:
    """The layer norm of rows, in float32: (x - E x) / sqrt(E x^2 - (E x)^2 + epsilon) times scale, plus shift."""
    x, scale, shift = (a.astype(jnp.float32) for a in (x, over(scale, x), over(shift, x)))
    mean = x.mean(axis=-1, keepdims=True)
    variance = jnp.maximum((x * x).mean(axis=-1, keepdims=True) - mean * mean, 0)
    return ((x - mean) * (lax.rsqrt(variance + epsilon) * scale) + shift).astype(dtype)


def over(a: Float[Array, "*one d"], x: Float[Array, "*n d"]) -> Float[Array, "..."]:
    """A vector for all tokens of x, or of each of its rows; as it is, where x is one token."""
    return a if x.ndim == a.ndim else lax.expand_dims(a, (*range(x.ndim - a.ndim - 1), -2))


def in_turn(a: Float[Array, "some d"], x: Float[Array, "B n d"]) -> Float[Array, "_ d"]:
    """A vector for each row of the batch, of as many as there are, in turn; one as it is."""
    return a if len(a) == 1 else jnp.repeat(a, len(x) // len(a), axis=0)


@partial(jax.jit, static_argnames=("r", "protected"))
def segment_ids(best: Float[Array, "a"], to: Int[Array, "a"], r: int, protected: tuple[bool, ...]) -> Int[Array, "n"]:
    """Segment ids of a row: of each even position the best odd one that is not protected, by its place among those."""
    n, closed = len(protected), np.flatnonzero(protected[1::2])
    evens, odds = len(best), n // 2
    before = closed - np.arange(len(closed))  # protected destinations were left out: count them in again
    to = to + (to[:, None] >= before[None, :]).sum(axis=-1, dtype=jnp.int32)
    source = highest(jnp.where(np.array(protected[::2]), -jnp.inf, best), r)

    # Number those that stay. Before even position 2i stand i odd ones, before odd position 2j + 1 stand j.
    i = jnp.arange(evens)
    stay = jnp.cumsum(~source, dtype=jnp.int32)
    odd = stay[:odds] + i[:odds].astype(jnp.int32)
    even = jnp.where(source, odd.at[to].get(mode="promise_in_bounds"), stay - 1 + i.astype(jnp.int32))
    odd = jnp.concatenate([odd, odd[:1]]) if evens > odds else odd
    return jnp.stack([even, odd], axis=-1).reshape(-1)[:n]
