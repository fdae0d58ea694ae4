"""How a plan touches an array: batched gathers and scatters over segment ids (*batch n) into m segments.

Each is batched by vmap, takes its layout from the array it works on, and names no mesh. So it partitions over batch and
feature axes without a collective, under Auto and Explicit axes alike. Ids outside [0, m) touch nothing.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import ArrayLike, Bool, Int, Shaped


def sums(ids: Int[Array, "*batch n"], m: int, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """The sum of each segment, in float32 or wider; integers stay what they are."""

    def scatter(ids, x):
        x = x.astype(accumulator(x.dtype))
        return batched(lambda i, x: _blank(x, m, 0).at[_slots(i, m)].add(x, mode="drop"), ids.ndim - 1)(ids, x)

    def one_hot(ids, x):  # scatters serialise on TPU; the matrix unit does not
        x = jnp.where(like((ids >= 0) & (ids < m), x), x, jnp.zeros((), x.dtype))
        return matmul(jax.nn.one_hot(ids, m, axis=-2, dtype=x.dtype), x)

    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return scatter(ids, x)
    return lax.platform_dependent(ids, x, tpu=one_hot, default=scatter)


def counts(ids: Int[Array, "*batch n"], m: int) -> Int[Array, "*batch m"]:
    """How many positions each segment has."""
    compare = lambda ids: jnp.sum(jax.nn.one_hot(ids, m, axis=-2, dtype=bool), axis=-1, dtype=jnp.int32)
    scatter = lambda ids: sums(ids, m, jnp.ones_like(ids, jnp.int32))
    return lax.platform_dependent(ids, tpu=compare, default=scatter)


def maxima(ids: Int[Array, "*batch n"], m: int, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """The elementwise maximum of each segment; of an empty one, the least value that the dtype has."""
    low = -jnp.inf if jnp.issubdtype(x.dtype, jnp.inexact) else False if x.dtype == bool else jnp.iinfo(x.dtype).min
    put = lambda i, x: _blank(x, m, low).at[_slots(i, m)].max(x, mode="drop")
    return batched(put, ids.ndim - 1)(ids, x)


def firsts(ids: Int[Array, "*batch n"], m: int) -> Int[Array, "*batch m"]:
    """The lowest position in each segment; n for an empty one."""
    put = lambda i, p: _blank(p, m, ids.shape[-1]).at[_slots(i, m)].min(p, mode="drop")
    return batched(put, ids.ndim - 1)(ids, positions(ids))


def take(indices: Int[Array, "*batch n"], x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """x[batch, indices[batch, i]]; the indices are known to be in bounds."""
    return batched(lambda i, x: x.at[i].get(mode="promise_in_bounds"), indices.ndim - 1)(indices, x)


def matmul(a: Shaped[Array, "*batch m n"], x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """A x over the positions, accumulated in float32 or wider, features of any rank."""
    rank = a.ndim - 2
    dims = (((rank + 1,), (rank,)), (tuple(range(rank)), tuple(range(rank))))
    wide = jnp.promote_types(a.dtype, x.dtype)
    return lax.dot_general(a.astype(wide), x.astype(wide), dims, precision="highest", preferred_element_type=accumulator(wide))


def accumulator(dtype: Any) -> Any:
    """float32 or wider for floating point; exact types as they are."""
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.inexact) else dtype


def positions(ids: Int[Array, "*batch n"]) -> Int[Array, "*batch n"]:
    """0 to n - 1 in every row, laid out as ids are."""
    return lax.broadcasted_iota(jnp.int32, ids.shape, ids.ndim - 1) + jnp.zeros_like(ids, jnp.int32)


def like(w: Array, x: Array) -> Array:
    """w with trailing axes of length 1, to broadcast over the features of x."""
    return w.reshape(*w.shape, *(1,) * (x.ndim - w.ndim))


def fill(where: Bool[Array, "..."], x: Array, value: Any) -> Array:
    """x with a value written where a mask over its leading axes says; x's layout wins."""
    return jnp.where(like(where, x) | jnp.zeros_like(x, bool), jnp.full_like(x, value), x)


def rows_like(constant: Shaped[ArrayLike, "..."], x: Shaped[Array, "*batch n d"]) -> Shaped[Array, "..."]:
    """A constant (..., n) for every row of x (*batch, n, d), laid out as x's batch is."""
    # The compiler knows this sum of zeros: nothing of x is read, and its features may be sharded.
    constant = jnp.asarray(constant)
    blank = jnp.zeros_like(x, constant.dtype).sum(axis=-1, dtype=constant.dtype)
    blank = blank.reshape(*blank.shape[:-1], *[1] * (constant.ndim - 1), blank.shape[-1])
    return blank + constant.reshape(*[1] * (x.ndim - 2), *constant.shape)


def batched(f: Callable[..., Any], rank: int) -> Callable[..., Any]:
    """f over `rank` leading batch axes."""
    for _ in range(rank):
        f = jax.vmap(f)
    return f


def _slots(ids: Int[Array, "n"], m: int) -> Int[Array, "n"]:
    """Ids with every drop sent past the end, where scatters ignore it; a negative one would count from there."""
    return jnp.where(ids < 0, m, ids)


def _blank(x: Array, m: int, value: Any) -> Array:
    """(m, *features) of one value, laid out as x (n, *features) is."""
    row = jnp.full_like(x[:1], value) if x.shape[0] else jnp.full((1, *x.shape[1:]), value, x.dtype)
    return jnp.broadcast_to(row, (m, *x.shape[1:]))
