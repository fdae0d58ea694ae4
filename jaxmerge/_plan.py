"""The algebra: a plan says where each of n positions goes; `merge`, `unmerge` and `compose` apply it.

A plan is a 0/1 matrix A with A[segment_ids[i], i] = 1, kept as the two arguments of `jax.ops.segment_sum`.

    merge(plan, x)          y = W A x      W divides by the mass of each segment (reduce="mean")
    unmerge(plan, y)        x = Aᵀ y
    compose(outer, inner)   A = A_outer A_inner
    plan.sizes              A 1

Leading axes are batch, the plan's last axis is the one that merges, trailing axes are features: no `axis=` argument.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import ArrayLike, Bool, Float, Int, PyTree, Shaped

from jaxmerge import _segments as segments
from jaxmerge._kernels import merge as kernels
from jaxmerge._kernels._dispatch import Implementation

Reduce = Literal["mean", "sum", "max", "first"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Where each of n positions goes: position i joins segment `segment_ids[i]` of `num_segments`.

    Ids below 0 are dropped on purpose; ids from `num_segments` up did not fit and are counted by `overflow`. Integers
    carry no gradient: gradients flow through what the plan is applied to. A plan is a pytree: it crosses `jit`, `vmap`,
    `scan` and `eval_shape`, and can be saved. What saves plain trees alone, such as `flax.serialization`, takes the leaves
    of `jax.tree.flatten(plan)`; `jax.tree.unflatten` makes them a plan again.

    Attributes:
      segment_ids: `Int[Array, "*batch n"]`; narrower integers become int32.
      num_segments: m, a Python int (shapes are static).

    Raises:
      ValueError: `segment_ids` has no axis, or `num_segments` is negative.
      TypeError: `segment_ids` are not integers, or `num_segments` is not a Python int.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> plan = jm.Plan(jnp.array([0, 0, 1, -1]), 2)
      >>> jm.merge(plan, jnp.array([1.0, 3.0, 5.0, 7.0])).tolist()
      [2.0, 5.0]
    """

    segment_ids: Any
    num_segments: int = dataclasses.field(metadata=dict(static=True))

    def __post_init__(self):
        try:
            m = operator.index(self.num_segments)
        except TypeError:
            raise TypeError(
                f"Plan: num_segments must be a Python int, because shapes are static; got {self.num_segments!r}. "
                "Inside jit, pass it from outside or mark it static."
            ) from None
        if m < 0:
            raise ValueError(f"Plan: num_segments must be 0 or more, got {m}.")
        object.__setattr__(self, "num_segments", m)
        ids = self.segment_ids
        if not hasattr(ids, "dtype") or not hasattr(ids, "ndim"):
            return  # a placeholder: tree_map over axes, specs or None
        if ids.ndim == 0:
            raise ValueError("Plan: segment_ids must have at least one axis, the n positions; got a scalar.")
        if not jnp.issubdtype(ids.dtype, jnp.integer) and ids.dtype != jax.dtypes.float0:  # float0: a plan's cotangent
            raise TypeError(f"Plan: segment_ids must be integers, got {ids.dtype}; cast them, or use SoftPlan for weights.")
        if jnp.issubdtype(ids.dtype, jnp.integer) and ids.dtype.itemsize < 4 and hasattr(ids, "astype"):
            object.__setattr__(self, "segment_ids", ids.astype(jnp.int32))  # they are compared with m and n, maybe above 127

    @property
    def num_positions(self) -> int:
        """n, the length of the merged axis."""
        return self.segment_ids.shape[-1]

    @property
    def kept(self) -> Bool[Array, "*batch n"]:
        """Which positions belong to a segment."""
        return (self.segment_ids >= 0) & (self.segment_ids < self.num_segments)

    @property
    def sizes(self) -> Int[Array, "*batch m"]:
        """Positions in each segment: A 1. An empty slot has size 0."""
        segments.check_whole("sizes: the plan", self.segment_ids, self.segment_ids.ndim - 1)
        return segments.counts(self.segment_ids, self.num_segments)

    @property
    def overflow(self) -> Int[Array, "*batch"]:
        """How many positions found no room: ids at or above `num_segments`."""
        return jnp.sum(self.segment_ids >= self.num_segments, axis=-1, dtype=jnp.int32)

    @property
    def matrix(self) -> Bool[Array, "*batch m n"]:
        """A itself, dense: which position is in which segment. An attention mask from segments to positions."""
        return jax.nn.one_hot(self.segment_ids, self.num_segments, axis=-2, dtype=bool)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftPlan:
    """A plan whose matrix is any row-weighted real matrix: A = `weights`. Gradients flow through the weights.

    Attributes:
      weights: `Float[Array, "*batch m n"]`.

    Raises:
      ValueError: `weights` has fewer than two axes.
      TypeError: `weights` are not floating point.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> plan = jm.SoftPlan(jnp.array([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]))
      >>> jm.merge(plan, jnp.array([1.0, 3.0, 5.0]), reduce="sum").tolist()
      [2.0, 4.0]
    """

    weights: Any

    def __post_init__(self):
        w = self.weights
        if not hasattr(w, "dtype") or not hasattr(w, "ndim"):
            return
        if w.ndim < 2:
            raise ValueError(f"SoftPlan: weights must have shape (*batch, m, n), got {w.shape}.")
        if not jnp.issubdtype(w.dtype, jnp.floating):
            raise TypeError(f"SoftPlan: weights must be floating point, got {w.dtype}; use Plan for integer segment ids.")

    @property
    def num_segments(self) -> int:
        """m, the number of rows."""
        return self.weights.shape[-2]

    @property
    def num_positions(self) -> int:
        """n, the number of columns."""
        return self.weights.shape[-1]

    @property
    def kept(self) -> Bool[Array, "*batch n"]:
        """Which positions have weight anywhere."""
        return (self.weights != 0).any(axis=-2)

    @property
    def sizes(self) -> Float[Array, "*batch m"]:
        """The mass of each row: A 1."""
        return self.weights.astype(jnp.float32).sum(axis=-1)

    @property
    def overflow(self) -> Int[Array, "*batch"]:
        """Always 0: a dense matrix has room for every position."""
        return jnp.zeros(self.weights.shape[:-2], jnp.int32)

    @property
    def matrix(self) -> Float[Array, "*batch m n"]:
        """A itself: the weights."""
        return self.weights


def merge(
    plan: Plan | SoftPlan,
    x: PyTree[Shaped[ArrayLike, "..."]],
    *,
    weight: Shaped[ArrayLike, "*batch n"] | None = None,
    reduce: Reduce = "mean",
    implementation: Implementation | None = None,
) -> PyTree[Shaped[Array, "..."]]:
    """Bring each segment's positions together: y = W A x, for every leaf of `x`.

    Args:
      plan: n positions to m segments, batch shape `*batch`.
      x: a pytree whose leaves have shape (*batch, n, *features).
      weight: mass of each position (ToMe's token sizes); `mean` and `sum` only.
      reduce: "mean" is sum(w x) / sum(w); "sum" is sum(w x); "max" is elementwise, its gradient shared by ties; "first"
        takes the lowest position and is a gather, so a pruning plan is cheapest with it. Empty slots are 0.
      implementation: of means and sums of a `Plan`: "xla", or a kernel ("mosaic_tpu", "mosaic_gpu"). None takes the kernel
        where it is known to run and believed to be faster; `jaxmerge doctor` says where.

    Returns:
      Leaves of shape (*batch, m, *features), of the input's dtype; sums and means are taken in float32 or wider.

    Law:
      <merge(p, x, reduce="sum"), y> = <x, unmerge(p, y)>, and
      merge(outer, merge(inner, x), weight=inner.sizes) = merge(compose(outer, inner), x).

    Raises:
      ValueError: a leaf's leading shape is not the plan's; `weight` with "max" or "first"; those two on a `SoftPlan`; the
        implementation cannot run here (all reasons are named).
      TypeError: "mean" of integers.

    On TPU sums run as one-hot matmuls, where a NaN or inf in a kept position spreads over its batch row; elsewhere they
    stay in their segment.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> plan = jm.Plan(jnp.array([0, 1, 0]), 2)
      >>> jm.merge(plan, {"a": jnp.array([1.0, 2.0, 4.0])}, weight=jnp.array([3.0, 1.0, 1.0]))["a"].tolist()
      [1.75, 2.0]

    Source: `merge_wavg` of Token Merging (arXiv:2210.09461) is `weight=sizes`; its mean, sum and amax modes are here.
    """
    if reduce not in ("mean", "sum", "max", "first"):
        raise ValueError(f'merge: reduce must be "mean", "sum", "max" or "first", got {reduce!r}.')
    if reduce in ("max", "first") and weight is not None:
        raise ValueError(f'merge: weight has no meaning for reduce="{reduce}"; leave it out, or use "mean" or "sum".')
    batch_n = (*_batch(plan, "merge"), plan.num_positions)
    summed = reduce in ("mean", "sum")
    if implementation not in (None, "xla") and not (summed and isinstance(plan, Plan)):
        raise ValueError(f'merge: {implementation} is for "mean" and "sum" of a Plan; leave implementation out.')
    mass = None
    if summed:
        mass = None if weight is None else _checked_weight(plan, weight)
        rows = functools.cache(lambda: _weighted_rows(plan, mass, mean=reduce == "mean"))
    elif isinstance(plan, Plan):
        rows = functools.cache(lambda: _chosen_rows(plan, largest=reduce == "max"))
    else:
        raise ValueError(f'merge: reduce="{reduce}" needs a Plan; a SoftPlan can be applied with "mean" or "sum".')

    def one(x):
        x = jnp.asarray(x)
        _check_leading(x, batch_n, "merge", "x")
        if (reduce == "mean" or isinstance(plan, SoftPlan)) and not jnp.issubdtype(x.dtype, jnp.inexact):
            raise TypeError(f'merge: {x.dtype} has no mean; use a Plan with reduce="sum", "max" or "first", or cast.')
        if plan.num_positions == 0 or plan.num_segments == 0:
            return segments.nothing(x, len(batch_n) - 1, plan.num_segments)
        xla = lambda: _cast(rows()(x), x.dtype)
        if not summed or not isinstance(plan, Plan) or (implementation in (None, "xla") and x.ndim != len(batch_n) + 1):
            return xla()
        return _by_kernel(plan, x, mass, mean=reduce == "mean", implementation=implementation, xla=xla)

    return jax.tree.map(one, x)


def unmerge(
    plan: Plan | SoftPlan,
    y: PyTree[Shaped[ArrayLike, "..."]],
    *,
    fill: float | int | bool = 0,
    implementation: Implementation | None = None,
) -> PyTree[Shaped[Array, "..."]]:
    """Give each position the value of its segment: x = Aᵀ y, for every leaf of `y`.

    Args:
      plan: n positions to m segments, batch shape `*batch`.
      y: a pytree whose leaves have shape (*batch, m, *features).
      fill: the value of positions that belong to no segment.
      implementation: of a `Plan`, see `merge`.

    Returns:
      Leaves of shape (*batch, n, *features), of the input's dtype.

    Law:
      merge(p, unmerge(p, y)) = y on every slot that is not empty.

    Raises:
      ValueError: a leaf's leading shape is not (*batch, m); integers that cannot hold `fill`; the implementation cannot run
        here.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.unmerge(jm.Plan(jnp.array([0, 1, 0, -1]), 2), jnp.array([5.0, 7.0]), fill=9).tolist()
      [5.0, 7.0, 5.0, 9.0]

    Source: Token Merging's `unmerge` (arXiv:2210.09461), also right with a distillation token, where the official one is not.
    """
    batch_m = (*_batch(plan, "unmerge"), plan.num_segments)
    kept = plan.kept
    plain = implementation in (None, "xla")
    if not plain and not isinstance(plan, Plan):
        raise ValueError(f"unmerge: {implementation} is for a Plan; leave implementation out.")

    def one(y):
        y = jnp.asarray(y)
        _check_leading(y, batch_m, "unmerge", "y")
        if not segments.holds(y.dtype, fill):
            raise ValueError(f"unmerge: fill must be a value of y's {y.dtype}, got {fill}; cast y, or fill with another.")
        if isinstance(plan, SoftPlan):
            x = segments.matmul(jnp.swapaxes(plan.weights, -1, -2), y)
        elif plan.num_segments == 0:
            x = segments.nothing(y, kept.ndim - 1, plan.num_positions)
        else:
            ids = plan.segment_ids
            xla = lambda: segments.take(jnp.where(kept, ids, 0), y)
            x = xla() if plain and y.ndim != kept.ndim + 1 else _spread_by_kernel(plan, y, implementation, xla)
        return segments.fill(~kept, _cast(x, y.dtype), fill)

    return jax.tree.map(one, y)


def compose(outer: Plan | SoftPlan, inner: Plan | SoftPlan) -> Plan | SoftPlan:
    """The plan that does `inner` first and `outer` to its result: A_outer A_inner.

    Two hard plans give a hard plan; a soft one on either side gives a soft plan. What either plan drops stays dropped, and
    what overflowed stays counted.

    Law:
      merge(compose(outer, inner), x, reduce="sum") = merge(outer, merge(inner, x, reduce="sum"), reduce="sum").

    Raises:
      ValueError: `outer` does not read what `inner` writes, or their batch shapes differ.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> inner, outer = jm.Plan(jnp.array([0, 0, 1, 2]), 3), jm.Plan(jnp.array([0, 1, 0]), 2)
      >>> jm.compose(outer, inner).segment_ids.tolist()
      [0, 0, 1, 0]
    """
    batches = _batch(outer, "compose"), _batch(inner, "compose")
    if outer.num_positions != inner.num_segments:
        swapped = inner.num_positions == outer.num_segments
        remedy = " Are the arguments swapped? compose(outer, inner) applies inner first." if swapped else ""
        raise ValueError(
            f"compose: outer reads {outer.num_positions} positions but inner writes {inner.num_segments} segments.{remedy}"
        )
    if batches[0] != batches[1]:
        raise ValueError(f"compose: batch shapes differ, outer has {batches[0]} and inner {batches[1]}; broadcast one.")
    if isinstance(outer, SoftPlan) or isinstance(inner, SoftPlan):
        return SoftPlan(segments.matmul(outer.matrix.astype(_dtype(outer)), inner.matrix.astype(_dtype(inner))))
    ids = inner.segment_ids
    beyond = jnp.where(ids < 0, -1, outer.num_segments)
    if inner.num_segments == 0:
        return Plan(beyond.astype(jnp.int32), outer.num_segments)
    onward = segments.take(jnp.where(inner.kept, ids, 0), outer.segment_ids)
    return Plan(jnp.where(inner.kept, onward, beyond).astype(jnp.int32), outer.num_segments)


def identity(n: int, batch: tuple[int, ...] = (), *, like: Shaped[ArrayLike, "*batch n d"] | None = None) -> Plan:
    """The plan that leaves n positions as they are, where a stack of plans begins.

    Args:
      n: how many positions.
      batch: batch axes.
      like: the tokens that it is for, instead of `batch`: it takes their batch axes and, on a mesh, their layout.

    Law:
      merge(identity(n), x) = x; compose(p, identity(n)) = p.

    Raises:
      ValueError: `like` does not hold n tokens, or `batch` is given too.

    Example:
      >>> import jaxmerge as jm
      >>> jm.identity(3).segment_ids.tolist()
      [0, 1, 2]
    """
    here = jnp.arange(n, dtype=jnp.int32)
    if like is None:
        return Plan(jnp.broadcast_to(here, (*batch, n)), n)
    like = jnp.asarray(like)
    if batch or like.ndim < 2 or like.shape[-2] != n:
        raise ValueError(f"identity: like must be the tokens, (*batch, {n}, d), and batch left out; got {like.shape}, {batch}.")
    segments.check_whole("identity: like", like, like.ndim - 2)
    return Plan(segments.rows_like(here, like), n)


def from_parents(parents: Int[ArrayLike, "*batch n"], num_segments: int, *, hops: int | None = None) -> Plan:
    """The plan in which every position follows its parent to a root; segments are numbered in the roots' order.

    This is how most planners speak: "token i merges into token j". A position that is its own parent is a root. Chains are
    followed to their end; positions on a cycle, or with a parent outside [0, n), lead to no root and are dropped.

    Args:
      parents: the position that each position merges into.
      num_segments: m, room for that many roots. What hangs on further roots is counted by `overflow`.
      hops: the longest chain to follow, if it is known: 1 where every parent is a root. None follows all.

    Raises:
      ValueError: `parents` has no axis; hops below 1. TypeError: `parents` are not integers.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.from_parents(jnp.array([0, 0, 2, 1]), 2).segment_ids.tolist()
      [0, 0, 1, 0]
    """
    to = Plan(jnp.asarray(parents), num_segments).segment_ids  # one place checks rank and dtype
    segments.check_whole("from_parents: parents", to, to.ndim - 1)
    if hops is not None and (hops := operator.index(hops)) < 1:
        raise ValueError(f"from_parents: hops must be 1 or more, got {hops}.")
    longest = to.shape[-1] - 1 if hops is None else min(hops, to.shape[-1] - 1)
    return Plan(_roots(to, longest), num_segments)


@functools.partial(jax.jit, static_argnames="longest")
def _roots(to: Int[Array, "*batch n"], longest: int) -> Int[Array, "*batch n"]:
    """The rank of the root that each position's chain, at most so long, ends at; -1 where it leads nowhere."""
    n, here = to.shape[-1], segments.positions(to)
    inside = (to >= 0) & (to < n)
    is_root = inside & (to == here)
    to = jnp.where(inside, to, here)
    for _ in range(max(longest - 1, 0).bit_length()):  # pointer jumping: a chain of h needs log2 h doublings
        to = segments.take(to, to)
    rank = jnp.cumsum(is_root, axis=-1, dtype=jnp.int32) - 1
    return jnp.where(segments.take(to, is_root), segments.take(to, rank), -1) if n else rank


def _batch(plan: Plan | SoftPlan, verb: str) -> tuple[int, ...]:
    """The plan's batch shape; every verb asks for it first, so what is no plan is refused here."""
    held = plan.segment_ids if isinstance(plan, Plan) else plan.weights if isinstance(plan, SoftPlan) else None
    if held is None or not hasattr(held, "shape"):
        got = f"one that holds a {type(held).__name__}" if isinstance(plan, Plan | SoftPlan) else type(plan).__name__
        raise TypeError(
            f"{verb}: a Plan of an array of segment ids or a SoftPlan of an array of weights comes first; got {got}."
        )
    if isinstance(plan, SoftPlan):
        return held.shape[:-2]
    segments.check_whole(f"{verb}: the plan", held, held.ndim - 1)
    return held.shape[:-1]


def _cast(x: Array, dtype: Any) -> Array:
    return x if x.dtype == dtype else x.astype(dtype)  # keys of jax.random have no astype


def _dtype(plan: Plan | SoftPlan) -> Any:
    return jnp.float32 if isinstance(plan, Plan) else plan.weights.dtype


def _check_leading(x: Array, expected: tuple[int, ...], verb: str, name: str) -> None:
    if x.shape[: len(expected)] != expected:
        raise ValueError(
            f"{verb}: {name} must begin with the plan's shape {expected} (batch, then positions), got {x.shape}. "
            "Plans carry their own batch axes; use jax.vmap or broadcast the plan to share one."
        )
    segments.check_whole(f"{verb}: {name}", x, len(expected) - 1)


def _checked_weight(plan: Plan | SoftPlan, weight: ArrayLike) -> Array:
    weight, shape = jnp.asarray(weight), (*_batch(plan, "merge"), plan.num_positions)
    if weight.shape != shape:
        raise ValueError(f"merge: weight must have the plan's shape {shape}, got {weight.shape}.")
    segments.check_whole("merge: weight", weight, weight.ndim - 1)
    return weight


def _by_kernel(
    plan: Plan, x: Array, weight: Array | None, *, mean: bool, implementation: Implementation | None, xla: Callable[[], Array]
) -> Array:
    """Sums or means of rows of any features by whatever implementation is chosen."""
    rank = plan.segment_ids.ndim
    rows = x if x.ndim == rank + 1 else x.reshape(*x.shape[:rank], -1)
    weight = None if weight is None else weight.astype(jnp.float32)
    shaped = lambda y: y.reshape(*y.shape[:rank], *x.shape[rank:])
    y = kernels.merge(
        plan.segment_ids, rows, weight, m=plan.num_segments, mean=mean, implementation=implementation,
        xla=lambda: xla().reshape(*x.shape[: rank - 1], plan.num_segments, *rows.shape[rank:]),
    )  # fmt: skip
    return shaped(y)


def _spread_by_kernel(plan: Plan, y: Array, implementation: Implementation | None, xla: Callable[[], Array]) -> Array:
    """Rows given back by whatever implementation is chosen."""
    rank = plan.segment_ids.ndim
    rows = y if y.ndim == rank + 1 else y.reshape(*y.shape[:rank], -1)
    x = kernels.unmerge(
        plan.segment_ids, rows, implementation=implementation,
        xla=lambda: xla().reshape(*plan.segment_ids.shape, *rows.shape[rank:]),
    )  # fmt: skip
    return x.reshape(*plan.segment_ids.shape, *y.shape[rank:])


def _weighted_rows(plan: Plan | SoftPlan, weight: Any, *, mean: bool) -> Callable[[Array], Array]:
    """x -> sum(w x), or sum(w x) / sum(w), in each segment."""
    mass = plan.sizes
    if weight is not None:
        weight = weight.astype(segments.promoted(weight.dtype, jnp.float32))
        weight = weight * plan.kept.astype(weight.dtype)  # and so laid out as the plan is
        mass = _sums(plan, weight) if mean else mass
    if not mean:
        return lambda x: _sums(plan, x, weight)
    empty = mass == 0
    scale = 1 / jnp.where(empty, 1, mass).astype(segments.promoted(mass.dtype, jnp.float32))
    if isinstance(plan, SoftPlan):
        return lambda x: segments.fill(empty, _sums(plan, x, weight, scale), 0)
    filled = Plan(jnp.where(unmerge(plan, empty), -1, plan.segment_ids), plan.num_segments)  # 0 x NaN is no 0
    return lambda x: _sums(filled, x, weight, scale)


def _sums(plan: Plan | SoftPlan, x: Array, weight: Array | None = None, scale: Array | None = None) -> Array:
    """scale · A (w x), accumulated in float32 or wider."""
    if isinstance(plan, Plan):
        return segments.sums(plan.segment_ids, plan.num_segments, x, weight, scale)
    return segments.times(segments.matmul(plan.weights, segments.times(x, weight)), scale)


def _chosen_rows(plan: Plan, *, largest: bool) -> Callable[[Array], Array]:
    """x -> the elementwise maximum of each segment, or its first row."""
    ids, m = plan.segment_ids, plan.num_segments
    empty = plan.sizes == 0
    if largest:
        return lambda x: segments.fill(empty, segments.maxima(ids, m, x), 0)
    first = jnp.where(empty, 0, segments.firsts(ids, m))
    return lambda x: segments.fill(empty, segments.take(first, x), 0)
