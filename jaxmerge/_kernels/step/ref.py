"""The spec of `step` in plain XLA: Token Merging's matching, and the mean of what it joins."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from jaxmerge._kernels.match import ref as match
from jaxmerge._kernels.merge import ref as merge
from jaxmerge._rank import highest


def step(
    metric: Float[Array, "B n k"],
    x: Float[Array, "B n d"],
    sizes: Float[Array, "B n"] | None = None,
    residual: Float[Array, "B n d"] | None = None,
    *,
    r: int,
    protected: tuple[bool, ...],
) -> tuple[Float[Array, "B m d"], Float[Array, "B m"], Int[Array, "B n"]]:
    """Merge the r even positions most like an odd one: merged x, merged sizes (float32), segment ids (int32); m = n - r.

    The groups are those of `tokens.bipartite_matching`, the rows their means weighted by `sizes`, in the order of the tokens
    that stay. Sizes are whole numbers below 2^24 and stay exact. `protected` positions neither move nor receive. What is merged
    is x + residual, rounded to x's dtype.
    """
    metric, closed = lax.stop_gradient(metric), np.array(protected)
    best, to = match.match(metric[:, ::2], metric[:, 1::2][:, np.flatnonzero(~closed[1::2])])
    ids = jax.vmap(lambda best, to: segment_ids(best, to, r, closed))(best, to)
    y, mass = merge.merge(ids, added(x, residual), sizes, m=x.shape[1] - r, mean=True)
    return y, lax.stop_gradient(mass), ids


def added(x: Float[Array, "*n d"], residual: Float[Array, "*n d"] | None) -> Float[Array, "*n d"]:
    """x + residual, in float32, rounded to x's dtype."""
    return x if residual is None else (x.astype(jnp.float32) + residual.astype(jnp.float32)).astype(x.dtype)


def segment_ids(best: Float[Array, "a"], to: Int[Array, "a"], r: int, protected: Bool[np.ndarray, "n"]) -> Int[Array, "n"]:
    """Segment ids of a row: of each even position the best odd one that is not protected, by its place among those."""
    n, closed = len(protected), np.flatnonzero(protected[1::2])
    evens, odds = len(best), n // 2
    before = closed - np.arange(len(closed))  # protected destinations were left out: count them in again
    to = to + (to[:, None] >= before[None, :]).sum(axis=-1, dtype=jnp.int32)
    source = highest(jnp.where(protected[::2], -jnp.inf, best), r)

    # Number those that stay. Before even position 2i stand i odd ones, before odd position 2j + 1 stand j.
    i = jnp.arange(evens)
    stay = jnp.cumsum(~source, dtype=jnp.int32)
    odd = stay[:odds] + i[:odds].astype(jnp.int32)
    even = jnp.where(source, odd.at[to].get(mode="promise_in_bounds"), stay - 1 + i.astype(jnp.int32))
    odd = jnp.concatenate([odd, odd[:1]]) if evens > odds else odd
    return jnp.stack([even, odd], axis=-1).reshape(-1)[:n]
