"""The two places where a merge must move values: along an axis that a method sorts, and where a matrix is factored whole."""

import jax
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec as P


def whole(x: Array, axes: tuple[int, ...]) -> Array:
    """x with these axes on every device. Under Explicit axes this is a visible reshard; Auto axes leave it to the compiler.

    Law:
      like(whole(x, axes), x) is x, laid out as x.
    """
    sharding = jax.typeof(x).sharding
    spec = tuple(sharding.spec) + (None,) * (x.ndim - len(sharding.spec))
    axes = tuple(a % x.ndim for a in axes)
    if all(spec[a] is None for a in axes):
        return x
    return jax.reshard(x, NamedSharding(sharding.mesh, P(*(None if a in axes else s for a, s in enumerate(spec)))))


def like(y: Array, x: Array) -> Array:
    """y (models, *shape) laid out as x (K, *shape)."""
    sharding = jax.typeof(x).sharding
    if all(s is None for s in sharding.spec):
        return y
    return jax.reshard(y, NamedSharding(sharding.mesh, P(None, *tuple(sharding.spec)[1:])))
