"""A plan as a linear map: `apply` is y = S A W x, `spread` its transpose x = W Aᵀ S y, for kernels that JAX cannot see into.

Two primitives, so that derivatives of any order and mode find a kernel again: forward, reverse, and one through the other.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Float, Int

from jaxmerge import _segments as segments


def apply(
    module: Any, ids: Int[Array, "B n"], x: Float[Array, "B n d"], weight: Array | None, mass: Array | None, *, m: int
) -> Float[Array, "B m d"]:
    """merge(ids, x, weight), divided by the mass where it is given: `mass` must then be that of the weights."""
    some = [a for a in (weight, mass) if a is not None]
    return apply_p.bind(ids, x, *some, module=module, m=m, has=(weight is not None, mass is not None))


def spread(
    module: Any, ids: Int[Array, "B n"], y: Float[Array, "B m d"], before: Array | None, after: Array | None
) -> Float[Array, "B n d"]:
    """unmerge(ids, y, before, after)."""
    some = [a for a in (before, after) if a is not None]
    return spread_p.bind(ids, y, *some, module=module, has=(before is not None, after is not None))


def inverse(mass: Float[Array, "B m"]) -> Float[Array, "B m"]:
    """1 / mass; 0 where there is none."""
    return jnp.where(mass == 0, 0, 1 / jnp.where(mass == 0, 1, mass))


def _both(some: Any, has: tuple[bool, bool]) -> tuple[Any, Any]:
    """The two optional operands."""
    some = iter(some)
    return tuple(next(some) if there else None for there in has)  # pyright: ignore[reportReturnType]


def _apply(ids, x, *some, module, m, has):
    weight, _ = _both(some, has)
    return module.merge(ids, x, weight, m=m, mean=has[1])[0]


def _spread(ids, y, *some, module, has):
    return module.unmerge(ids, y, *_both(some, has))


def _apply_jvp(primals, tangents, *, module, m, has):
    ids, x, *some = primals
    _, dx, *dsome = tangents
    weight, mass = _both(some, has)
    dweight, dmass = _both(dsome, has)
    y = apply(module, ids, x, weight, mass, m=m)
    terms = []
    if not isinstance(dx, ad.Zero):
        terms.append(apply(module, ids, dx, weight, mass, m=m))
    if weight is not None and not isinstance(dweight, ad.Zero):
        dy = apply(module, ids, segments.times(x, dweight), None, None, m=m)
        terms.append(dy if mass is None else segments.times(dy, inverse(mass)))
    if mass is not None and not isinstance(dmass, ad.Zero):
        terms.append(-segments.times(y, inverse(mass) * dmass))
    return y, _total(terms, y)


def _spread_jvp(primals, tangents, *, module, has):
    ids, y, *some = primals
    _, dy, *dsome = tangents
    before, after = _both(some, has)
    dbefore, dafter = _both(dsome, has)
    x = spread(module, ids, y, before, after)
    terms = []
    if not isinstance(dy, ad.Zero):
        terms.append(spread(module, ids, dy, before, after))
    if before is not None and not isinstance(dbefore, ad.Zero):
        terms.append(spread(module, ids, segments.times(y, dbefore), None, after))
    if after is not None and not isinstance(dafter, ad.Zero):
        terms.append(segments.times(spread(module, ids, y, before, None), dafter))
    return x, _total(terms, x)


def _apply_transpose(dy, ids, x, *some, module, m, has):
    weight, mass = _both(some, has)
    nothing = (None,) * len(some)
    if isinstance(dy, ad.Zero):
        return None, ad.Zero(x.aval), *nothing
    return None, spread(module, ids, dy, None if mass is None else inverse(mass), weight), *nothing


def _spread_transpose(dx, ids, y, *some, module, has):
    before, after = _both(some, has)
    nothing = (None,) * len(some)
    if isinstance(dx, ad.Zero):
        return None, ad.Zero(y.aval), *nothing
    dy = apply(module, ids, dx, after, None, m=y.aval.shape[1])
    return None, dy if before is None else segments.times(dy, before).astype(dx.dtype), *nothing


def _total(terms: list[Array], like: Array) -> Any:
    """Their sum, in `like`'s dtype."""
    if not terms:
        return jnp.zeros_like(like)
    return sum(terms[1:], terms[0]).astype(like.dtype)


def _batched(primitive, operands, dims, **params):
    """A further batch axis joins the one that there is."""
    size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)
    front = [jnp.broadcast_to(x, (size, *x.shape)) if d is None else jnp.moveaxis(x, d, 0)
             for x, d in zip(operands, dims, strict=True)]  # fmt: skip
    rows = front[0].shape[1]
    out = primitive.bind(*(x.reshape(size * rows, *x.shape[2:]) for x in front), **params)
    return out.reshape(size, rows, *out.shape[1:]), 0


def _primitive(name, f, shape, jvp, transpose) -> Primitive:
    p = Primitive(f"jaxmerge_{name}")
    p.def_impl(f)
    p.def_abstract_eval(lambda ids, x, *_, **params: x.update(shape=shape(ids, x, **params), weak_type=False))
    mlir.register_lowering(p, mlir.lower_fun(f, multiple_results=False))
    ad.primitive_jvps[p] = jvp
    ad.primitive_transposes[p] = transpose
    batching.primitive_batchers[p] = partial(_batched, p)
    return p


apply_p = _primitive("merge", _apply, lambda ids, x, m, **_: (x.shape[0], m, x.shape[2]), _apply_jvp, _apply_transpose)
spread_p = _primitive("unmerge", _spread, lambda ids, y, **_: (*ids.shape, y.shape[2]), _spread_jvp, _spread_transpose)
