"""Entries that are computed where they are read, and written down nowhere.

A merge reads task vectors more than once: to find a threshold, and to apply it. Inside jit, arithmetic is cheaper than memory,
so each reader subtracts the base anew, in its own loop. The compiler would notice that they compute the same, and keep it; so
what a reader starts from is told apart by a barrier, which costs nothing.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array, lax
from jax.core import Tracer


@jax.tree_util.register_pytree_node_class
class Deferred:
    """f(*args), a stacked leaf (K, *shape), to be computed by whoever reads it."""

    def __init__(self, f: Callable[..., Any], args: tuple[Any, ...]):
        self.f, self.args = f, args

    def tree_flatten(self):
        return self.args, self.f

    @classmethod
    def tree_unflatten(cls, f, args):
        return cls(f, tuple(args))

    @property
    def shape(self) -> tuple[int, ...]:
        return jax.eval_shape(_compute, self).shape

    @property
    def ndim(self) -> int:
        return len(self.shape)


Entries = Array | Deferred


def defer(f: Callable[..., Any], *args: Any) -> Entries:
    """f(*args), later; at once outside jit, where every reading would be a program of its own."""
    later = Deferred(f, args)
    return later if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(args)) else _compute(later)


def entries(x: Entries) -> Array:
    """The array, computed for this reader."""
    return _compute(lax.optimization_barrier(x)) if isinstance(x, Deferred) else x


def last(x: Entries) -> Array:
    """The array for the last of its readers, which needs no barrier: what it makes may take the place of a donated input."""
    return _compute(x)


def _compute(x: Any) -> Any:
    return x.f(*map(_compute, x.args)) if isinstance(x, Deferred) else x
