"""What Hopper's sweep holds for a query while it walks over the keys, a value for each of its columns; and what that comes to.

`start` is what a thread holds at first, `fold` what it holds after the products with one more group of keys: of the queries'
numbers it is given what each key brings, -inf where it is closed. `finish` takes it over all columns.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxmerge._kernels import _mosaic_gpu as mgpu

NONE = 1 << 30


class Best(NamedTuple):
    """The best key of each query: its cosine and its position."""

    scaled = True
    """Whether it is made of cosines, or else of distances."""
    outputs: tuple[Any, ...] = (jnp.float32, jnp.int32)
    start: tuple[Any, ...] = ((-jnp.inf, jnp.float32), (0, jnp.int32))
    """What a thread holds for each query and each of its columns, at first."""

    def fold(self, found: Any, dot: Array, of_key: Array, add: Array | None, of_query: Any, group: Any, near: Any) -> Any:
        """What it holds after the products with one more group of keys: what each key brings, -inf where it is closed."""
        best, at = found
        score = dot * mgpu.by_column(of_key, dot.shape)
        score = score if add is None else score + mgpu.by_column(add, dot.shape)
        score = score if near is None else jnp.where(near, score, -jnp.inf)
        better = score > best
        return jnp.where(better, score, best), jnp.where(better, group, at)

    def finish(self, found: Any, of_query: Any) -> tuple[Array, ...]:
        """What it comes to."""
        best, group = found
        highest, slots = jnp.max(best, axis=1), best.shape[1]
        key = group * slots + mgpu.iota(best.shape, 1)
        key = jnp.min(jnp.where(best == mgpu.by_row(highest, best.shape), key, NONE), axis=1)
        return highest * of_query, jnp.where(highest > -jnp.inf, key, 0)


class Sums(NamedTuple):
    """The sum of f of a query's cosines."""

    scaled = True
    f: Callable[[Array], Array]
    outputs: tuple[Any, ...] = (jnp.float32,)
    start: tuple[Any, ...] = ((0, jnp.float32),)

    def fold(self, found: Any, dot: Array, of_key: Array, add: Array | None, of_query: Any, group: Any, near: Any) -> Any:
        one = self.f(dot * mgpu.by_column(of_key, dot.shape) * of_query)
        return (found[0] + (one if add is None else jnp.where(mgpu.by_column(add, dot.shape) == 0, one, 0.0)),)

    def finish(self, found: Any, of_query: Any) -> tuple[Array, ...]:
        return (jnp.sum(found[0], axis=1),)


class Least(NamedTuple):
    """The `count` least squared distances of a query, in order: |b|² - 2 a·b, and |a|² at the end."""

    scaled = False
    count: int

    @property
    def outputs(self) -> tuple[Any, ...]:
        return (jnp.float32,) * self.count

    @property
    def start(self) -> tuple[Any, ...]:
        return ((jnp.inf, jnp.float32),) * self.count

    def fold(self, found: Any, dot: Array, of_key: Array, add: Array | None, of_query: Any, group: Any, near: Any) -> Any:
        score = mgpu.by_column(of_key if add is None else of_key - add, dot.shape) - 2 * dot
        kept = []
        for one in found:  # an insertion into an ordered list
            kept.append(jnp.minimum(score, one))
            score = jnp.maximum(score, one)
        return tuple(kept)

    def finish(self, found: Any, of_query: Any) -> tuple[Array, ...]:
        lists, least, shape = list(found), [], found[0].shape
        column = mgpu.iota(shape, 1)
        for _ in range(self.count):  # the least of all heads; the first list that has it moves up
            low = jnp.min(lists[0], axis=1)
            least.append(jnp.maximum(low + of_query, 0.0))
            first = jnp.min(jnp.where(lists[0] == mgpu.by_row(low, shape), column, NONE), axis=1)
            here, behind = column == mgpu.by_row(first, shape), [*lists[1:], jnp.full_like(lists[0], jnp.inf)]
            lists = [jnp.where(here, after, one) for one, after in zip(lists, behind, strict=True)]
        return tuple(least)


class Ahead(NamedTuple):
    """The nearest key ahead of a query: its squared distance and its position; and the largest distance of all."""

    scaled = False
    outputs: tuple[Any, ...] = (jnp.float32, jnp.int32, jnp.float32)
    start: tuple[Any, ...] = ((jnp.inf, jnp.float32), (0, jnp.int32), (-jnp.inf, jnp.float32))

    def fold(self, found: Any, dot: Array, of_key: Array, add: Array | None, of_query: Any, group: Any, near: Any) -> Any:
        least, at, most = found
        away = mgpu.by_column(of_key, dot.shape) - 2 * dot
        bias = None if add is None else mgpu.by_column(add, dot.shape)
        most = jnp.maximum(most, away if bias is None else away + bias)
        away = away if bias is None else away - bias
        away = away if near is None else jnp.where(near, away, jnp.inf)
        nearer = away < least
        return jnp.where(nearer, away, least), jnp.where(nearer, group, at), most

    def finish(self, found: Any, of_query: Any) -> tuple[Array, ...]:
        least, group, most = found
        low, high, slots = jnp.min(least, axis=1), jnp.max(most, axis=1), least.shape[1]
        key = group * slots + mgpu.iota(least.shape, 1)
        key = jnp.min(jnp.where(least == mgpu.by_row(low, least.shape), key, NONE), axis=1)
        most = jnp.where(high > -jnp.inf, jnp.maximum(high + of_query, 0.0), high)
        return jnp.maximum(low + of_query, 0.0), jnp.where(low < jnp.inf, key, 0), most
