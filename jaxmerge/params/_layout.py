"""Where a merge moves values: sums over a split axis, a matrix laid out anew, an axis sorted, a matrix brought together.

Under Explicit axes every move is visible here. Under Auto axes nothing is said, and the compiler chooses, unless the layout is
said by who knows it (`over_explicit_axes`).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P, Sharding


def whole(x: Array, axes: tuple[int, ...]) -> Array:
    """x with these axes on every device.

    Law:
      like(whole(x, axes), x) is x, laid out as x.
    """
    split = _split(x)
    axes = tuple(a % x.ndim for a in axes)
    if not any(split[a] for a in axes):
        return x
    return _laid(x, tuple(() if a in axes else s for a, s in enumerate(split)))


def like(y: Array, x: Array) -> Array:
    """y (models, *shape), or of the shape of x, laid out as x (K, *shape)."""
    split = _split(x)
    return _laid(y, split if y.shape == x.shape else ((), *split[1:]), of=x) if any(split) else y


def longer(x: Array) -> int:
    """The longer of the last two axes of x, -2 or -1; of equal ones the one that is split, if one is."""
    m, n = x.shape[-2:]
    return -2 if m > n or (m == n and (_split(x)[-2] or not _split(x)[-1])) else -1


def along(x: Array, axis: int) -> Array:
    """x (*batch, m, n), `axis` of whose last two is split over all devices that hold either, the other whole: an all-to-all.

    Every device keeps its share. Where the axis does not divide evenly, only the other is made whole.
    """
    split = _split(x)
    axis = axis % x.ndim
    other = 2 * x.ndim - 3 - axis
    if not split[other]:
        return x
    both = split[axis] + split[other]
    sizes = jax.typeof(x).sharding.mesh.shape
    even = x.shape[axis] % math.prod(sizes[a] for a in both) == 0
    return _laid(x, tuple(() if a == other else both if a == axis and even else s for a, s in enumerate(split)))


def with_whole_rows(x: Array, batch: int = 0) -> Array:
    """x (*batch, *rows, n), each row on one device: an all-to-all in which every device keeps its share.

    A vector is brought together, and rows are that do not divide evenly.
    """
    return along(x, -2) if x.ndim > batch + 1 else whole(x, (-1,))


def einsum(formula: str, *xs: Array) -> Array:
    """jnp.einsum in float32: an axis that is summed over may be split (an all-reduce), the others stay split as they are."""
    names, out = formula.split("->")
    where = {}
    for labels, x in zip(names.split(","), xs, strict=True):
        where = {label: axes for label, axes in zip(labels, _split(x), strict=True) if axes} | where
    if not where:
        return jnp.einsum(formula, *xs, precision=jax.lax.Precision.HIGHEST)
    split, taken = [], set()
    for label in out:
        axes = where.get(label, ())
        split.append(() if taken & set(axes) else axes)
        taken |= set(axes)
    mesh = next(m for x in xs if not (m := jax.typeof(x).sharding.mesh).empty)
    return jnp.einsum(formula, *xs, precision=jax.lax.Precision.HIGHEST, out_sharding=NamedSharding(mesh, _spec(split)))


def locally(f: Callable[..., Any], x: Array) -> Any:
    """f(x) of an x that every device has, by each for itself: factorisations are not written for Explicit axes.

    f makes what else it needs: an array from outside would say where it lies.
    """
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty or AxisType.Explicit not in mesh.axis_types:
        return f(x)
    return jax.shard_map(f, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)(x)


def over_explicit_axes(f: Callable[..., Any], shardings: Any, *trees: Any) -> Any:
    """f(*trees), its arrays, laid out as `shardings` say, over Explicit axes; what comes out is as it was before.

    Args:
      shardings: a pytree like each of the trees, of NamedShardings on one mesh.
    """
    mesh, specs = jax.tree.leaves(shardings)[0].mesh, jax.tree.map(lambda s: s.spec, shardings)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        if set(mesh.axis_types) == {AxisType.Explicit}:
            return f(*(jax.tree.map(jax.reshard, tree, specs) for tree in trees))
        return jax.sharding.explicit_axes(f, axes=mesh.axis_names, in_sharding=(specs,) * len(trees))(*trees)


def visible(sharding: Sharding) -> Sharding:
    """The same layout over Explicit axes: what a merge brings together is then the merge's to say, not the compiler's."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    axes = sharding.mesh.axis_names
    mesh = Mesh(np.asarray(sharding.mesh.devices), axes, axis_types=(AxisType.Explicit,) * len(axes))
    return NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)


def seen(x: Any) -> Any:
    """x, if it is an array over Auto axes laid out as it is over Explicit axes.

    Raises:
      ValueError: x is traced: its layout is not known.
    """
    mesh = jax.typeof(x).sharding.mesh if isinstance(x, Array) else None
    if mesh is None or set(mesh.axis_types) <= {AxisType.Explicit}:
        return x
    if isinstance(x, Tracer):
        raise ValueError(
            f"merge: with shardings=, an array that the method holds, {x.aval}, must say its layout too, and inside jit one "
            "over Auto axes cannot; jax.reshard it to a mesh of Explicit axes, or do not trace it."
        )
    return jax.device_put(x, visible(x.sharding))


def _split(x: Array) -> tuple[tuple[str, ...], ...]:
    """For each axis of x the mesh axes that it is split over, as far as its type says: none under Auto axes."""
    spec = jax.typeof(x).sharding.spec
    named = tuple(() if s is None else s if isinstance(s, tuple) else (s,) for s in spec)
    return named + ((),) * (x.ndim - len(named))


def _spec(split) -> P:
    return P(*(axes or None for axes in split))


def _laid(x: Array, split: tuple[tuple[str, ...], ...], of: Array | None = None) -> Array:
    """x on its mesh, or on that of another array."""
    return jax.reshard(x, NamedSharding(jax.typeof(x if of is None else of).sharding.mesh, _spec(split)))
