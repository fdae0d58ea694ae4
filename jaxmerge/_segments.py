"""How a plan touches an array: batched gathers and scatters over segment ids (*batch n) into m segments.

Each is batched by vmap, takes its layout from the array it works on, and names no mesh. So it partitions over batch and
feature axes without a collective, under Auto and Explicit axes alike. Ids outside [0, m) touch nothing.

What has more than an operation or two is compiled as one, also where nobody else does: a plan that is made or used outside
of `jax.jit` costs a program or two, not one for every operation and shape.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import ArrayLike, Bool, Int, Shaped

FEW = 32
"""How many rows a CPU adds at a time: few enough for its cache."""


def check_whole(what: str, x: Array, axis: int, along: str = "its positions") -> None:
    """A sequence lies on one device. Under Explicit axes JAX refuses one that is split, but not in words of ours."""
    spec = tuple(jax.typeof(x).sharding.spec)
    spec += (None,) * (x.ndim - len(spec))
    if spec[axis] is not None:
        whole = ", ".join(repr(part) for part in (*spec[:axis], None, *spec[axis + 1 :]))
        raise ValueError(
            f"{what} of shape {x.shape} is split along {along}, over mesh axis {spec[axis]!r}; whoever merges must see "
            f"all of them: lay it out whole, jax.reshard(x, jax.P({whole}))."
        )


@partial(jax.jit, static_argnames="m")
def sums(
    ids: Int[Array, "*batch n"],
    m: int,
    x: Shaped[Array, "..."],
    weight: Shaped[Array, "*batch n"] | None = None,
    scale: Shaped[Array, "*batch m"] | None = None,
) -> Shaped[Array, "..."]:
    """scale_s · sum of weight_i x_i over the positions i of segment s, in float32 or wider; integers stay what they are."""

    def one_hot(ids, x, weight, scale):  # scatters serialise on TPU; the matrix unit does not
        x = times(x, weight)
        x = jnp.where(like((ids >= 0) & (ids < m), x), x, jnp.zeros((), x.dtype))
        return times(matmul(jax.nn.one_hot(ids, m, axis=-2, dtype=x.dtype), x), scale)

    def scatter(ids, x, weight, scale):
        return _scatter(ids, m, x, weight, scale)

    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return scatter(ids, x, weight, scale)
    take_and_add = lambda ids, x, weight, scale: _take_and_add(ids, m, x, weight, scale)
    rows = x.ndim > ids.ndim and min(m, x.size) > 0
    return lax.platform_dependent(ids, x, weight, scale, tpu=one_hot, cpu=take_and_add if rows else scatter, default=scatter)


def _scatter(ids: Array, m: int, x: Array, weight: Array | None, scale: Array | None) -> Array:
    """The sums, in terms that JAX can transpose: x comes back by a gather."""
    x = times(x, weight)
    x = x.astype(accumulator(x.dtype))
    y = batched(lambda i, x: _blank(x, m, 0).at[_slots(i, m)].add(x, mode="drop"), ids.ndim - 1)(ids, x)
    return times(y, scale)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _take_and_add(ids: Array, m: int, x: Array, weight: Array | None, scale: Array | None) -> Array:
    """The same sums with few trips to memory: the first row of each segment is taken, weighed, scaled and written once.

    The other rows are packed to the left and added a few at a time. So a plan that merges few of many tokens costs little
    more than a copy.
    """
    n, first, owner = ids.shape[-1], firsts(ids, m), jnp.clip(ids, 0, m - 1)
    if scale is not None:
        own = take(owner, scale)
        weight = own if weight is None else weight * own
    row = lambda at: times(take(at, x), None if weight is None else take(at, weight)).astype(accumulator(x.dtype))
    empty = first == n
    y = fill(empty, row(jnp.where(empty, 0, first)), 0)

    rest = (ids >= 0) & (ids < m) & (take(owner, first) != positions(ids))
    rounds = -(-n // FEW)
    at = firsts(jnp.where(rest, jnp.cumsum(rest, axis=-1, dtype=jnp.int32) - 1, -1), rounds * FEW)
    none = at == n
    at = jnp.where(none, 0, at)
    to = jnp.where(none, m, take(at, owner))

    def add(y, some):
        at, to = some
        return batched(lambda y, i, x: y.at[i].add(x, mode="drop"), ids.ndim - 1)(y, to, row(at)), None

    split = lambda i: jnp.moveaxis(i.reshape(*i.shape[:-1], rounds, FEW), -2, 0)
    return lax.scan(add, y, (split(at), split(to)))[0]


@_take_and_add.defjvp
def _take_and_add_jvp(m: int, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    ids, given = primals[0], primals[1:]
    _, dy = jax.jvp(lambda *given: _scatter(ids, m, *given), given, tangents[1:])
    return _take_and_add(ids, m, *given), dy


@partial(jax.jit, static_argnames="m")
def counts(ids: Int[Array, "*batch n"], m: int) -> Int[Array, "*batch m"]:
    """How many positions each segment has."""
    compare = lambda ids: jnp.sum(jax.nn.one_hot(ids, m, axis=-2, dtype=bool), axis=-1, dtype=jnp.int32)
    scatter = lambda ids: sums(ids, m, jnp.ones_like(ids, jnp.int32))
    return lax.platform_dependent(ids, tpu=compare, default=scatter)


@partial(jax.jit, static_argnames="m")
def maxima(ids: Int[Array, "*batch n"], m: int, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """The elementwise maximum of each segment; of an empty one, the least value that the dtype has."""
    low = -jnp.inf if jnp.issubdtype(x.dtype, jnp.inexact) else False if x.dtype == bool else jnp.iinfo(x.dtype).min
    put = lambda i, x: _blank(x, m, low).at[_slots(i, m)].max(x, mode="drop")
    return batched(put, ids.ndim - 1)(ids, x)


@partial(jax.jit, static_argnames="m")
def firsts(ids: Int[Array, "*batch n"], m: int) -> Int[Array, "*batch m"]:
    """The lowest position in each segment; n for an empty one."""
    put = lambda i, p: _blank(p, m, ids.shape[-1]).at[_slots(i, m)].min(p, mode="drop")
    return batched(put, ids.ndim - 1)(ids, positions(ids))


@jax.jit
def take(indices: Int[Array, "*batch n"], x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """x[batch, indices[batch, i]]; the indices are known to be in bounds."""
    return batched(lambda i, x: jnp.asarray(x).at[i].get(mode="promise_in_bounds"), indices.ndim - 1)(indices, x)


@jax.jit
def matmul(a: Shaped[Array, "*batch m n"], x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """A x over the positions, accumulated in float32 or wider, features of any rank."""
    rank = a.ndim - 2
    dims = (((rank + 1,), (rank,)), (tuple(range(rank)), tuple(range(rank))))
    wide = promoted(a.dtype, x.dtype)
    return lax.dot_general(a.astype(wide), x.astype(wide), dims, precision="highest", preferred_element_type=accumulator(wide))


def times(x: Shaped[Array, "..."], w: Shaped[Array, "..."] | None) -> Shaped[Array, "..."]:
    """w x, in float32 or wider; x itself without a w."""
    if w is None:
        return x
    wide = promoted(accumulator(x.dtype), w.dtype)
    return x.astype(wide) * like(w, x).astype(wide)


def accumulator(dtype: Any) -> Any:
    """float32 or wider for floating point; exact types as they are."""
    return promoted(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.inexact) else dtype


def promoted(a: Any, b: Any) -> Any:
    """The dtype of a sum of both, also where `jax_numpy_dtype_promotion` is "strict": here it is asked for."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(a, b)


@jax.jit
def positions(ids: Int[Array, "*batch n"]) -> Int[Array, "*batch n"]:
    """0 to n - 1 in every row, laid out as ids are."""
    nothing = ids.astype(jnp.int32) & 0  # zeros_like forgets the layout in jax 0.11, where no mesh is set
    return lax.broadcasted_iota(jnp.int32, ids.shape, ids.ndim - 1) + nothing


def like(w: Array, x: Array) -> Array:
    """w with trailing axes of length 1, to broadcast over the features of x."""
    return w.reshape(*w.shape, *(1,) * (x.ndim - w.ndim))


def fill(where: Bool[Array, "..."], x: Array, value: Any) -> Array:
    """x with a value written where a mask over its leading axes says; x's layout wins."""
    there, values = like(where, x) | jnp.zeros_like(x, bool), jnp.full_like(x, value)
    return jnp.where(_laid_out(there, x), _laid_out(values, x), x)


def _laid_out(a: Array, x: Array) -> Array:
    """a, which is of x's shape, as x lies. (From jax 0.12 on what is made like x lies so only under `jax.set_mesh`.)"""
    layout = jax.typeof(x).sharding
    return a if jax.typeof(a).sharding == layout else jax.reshard(a, layout)


def holds(dtype: Any, value: Any) -> bool:
    """Whether a number is one of a dtype's: no NaN, fraction or overflow in integers. Of an array nothing is known."""
    boolean = jnp.issubdtype(dtype, jnp.bool_)
    if isinstance(value, Array) or jnp.ndim(value) or not (boolean or jnp.issubdtype(dtype, jnp.integer)):
        return True
    low, high = (0, 1) if boolean else (jnp.iinfo(dtype).min, jnp.iinfo(dtype).max)
    return bool(low <= value <= high and value == int(value))


def nothing(x: Shaped[Array, "..."], axis: int, size: int) -> Shaped[Array, "..."]:
    """Zeros of x's shape but for `size` along one axis, laid out as x is: what no position gives, or none receives."""
    row = jnp.zeros_like(x, jnp.int32).sum(axis=axis, keepdims=True, dtype=jnp.int32).astype(x.dtype)
    return jnp.broadcast_to(row, (*x.shape[:axis], size, *x.shape[axis + 1 :]))


@jax.jit
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
