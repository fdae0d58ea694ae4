"""The grammar: a merge is a pair of pure functions, a chain of them is one again.

    plan = tx.match(stacked)           thresholds, signs, coefficients: small; may reduce over leaves, models, devices
    merged = tx.merge(plan, stacked)   leaf-local; keeps sharding

`stacked` is a pytree whose leaves have a leading axis K, one slice per model (`task_vectors` makes it); what comes out has a
leading axis of the models that are left, 1 after a reduction. The atoms of this package are written leaf by leaf (`Step`), so
that one and the same chain runs over a pytree in memory and streams over checkpoints.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jaxtyping import Float, PyTree

from jaxmerge.params._deferred import Deferred, Entries, defer, entries, last
from jaxmerge.params.order._host import Streamed

Stacked = PyTree[Float[Array, "_K ..."]]
Plan = Any
Hyperparameter = float | Any
"""A scalar, K numbers (one per model), or a function of the leaf's name ("layers/0/kernel") that returns either."""


class Survey(NamedTuple):
    """A statistic of the whole model, in two forms that agree bit for bit: in memory, and in rounds over the files.

    Attributes:
      settle: (settings by leaf, stacked leaves by name, in sorted order) -> settings; under jit, every leaf at hand.
      rounds: how often the streamed form must see every leaf.
      start: settings by leaf -> (query, notes): what the first round asks, small arrays; what the host remembers.
      read: (query, block of a stacked leaf) -> uint32 counts, additive over the blocks of a leaf.
      step: (query, notes, counts by leaf, uint64, in sorted order) -> (query, notes).
      finish: (notes, settings by leaf) -> settings.
      look: `read` on the host, where it is faster there: (query, the block's magnitudes as integers (K, n)) -> counts.
    """

    settle: Callable[[dict, dict], dict]
    rounds: int
    start: Callable[[dict], tuple[Any, Any]]
    read: Callable[[Any, Array], Array]
    step: Callable[[Any, Any, dict], tuple[Any, Any]]
    finish: Callable[[Any, dict], dict]
    look: Callable[[Any, np.ndarray], np.ndarray] | None = None


class Need(NamedTuple):
    """What an atom must find out before it merges an entry.

    Attributes:
      statistic: "random" bits of the entry's own; "sum" (norms, products, counts); "order" (a threshold, a rank); "spectral"
        (singular vectors, linear systems); "data" (arrays as large as the model that are passed in); "unknown": what your own
        functions look at (`per_leaf`).
      scope: over what it is taken: the entry (over the models alone), its row or column, its tensor, or the whole model.
    """

    statistic: Literal["random", "sum", "order", "spectral", "data", "unknown"]
    scope: Literal["entry", "row", "column", "tensor", "model"]


class Step(NamedTuple):
    """An atom, leaf by leaf.

    Attributes:
      settings: (name, stacked shape) -> this leaf's hyperparameters, resolved on the host; runtime values, so that leaves of
        one shape share a compilation.
      match: (settings, x) -> the leaf's plan.
      merge: (plan, x) -> x, with the models that are left on the leading axis.
      models: how many models are left; None = as many as came.
      survey: a statistic of the whole model that completes the settings, or None.
      needs: what it looks at; nothing for an atom that is pointwise.
      lazy: `match`, `survey.settle`, and `merge` where it draws or factors, take leaves `Deferred` as they may be, and read
        them (`entries`) where they look; what they leave may be deferred too.
      blocks: whether `match` and `merge` take any flat block of a leaf (K, n) for itself, given what `resolve` found, or any
        whole "rows" of its last axis (K, r, n); an entry "origin" in the settings is then the index of the block's first entry
        in the leaf, as (row, column) of `coordinates`.
      resolve: (settings, x as it streams through the host) -> settings with which `match` need not look at the tensor; None
        where nothing is to be found.
      open: settings -> whether `resolve` has still to find something.
      written: `merge` for who adds up what it leaves, the random choice in memory: XLA adds one by one, and would draw so too.
        None: as `merge`.
    """

    settings: Callable[[str, tuple[int, ...]], Any]
    match: Callable[[Any, Any], Any]
    merge: Callable[[Any, Any], Entries]
    models: int | None = None
    survey: Survey | None = None
    needs: tuple[Need, ...] = ()
    lazy: bool = False
    blocks: bool | Literal["rows"] = False
    resolve: Callable[[Any, Streamed], Any] | None = None
    open: Callable[[Any], bool] = lambda settings: True
    written: Callable[[Any, Any], Entries] | None = None


class Match(NamedTuple):
    """The `match` of a chain of steps; its plan is a tuple with one {leaf name: plan} per step."""

    steps: tuple[Step, ...]

    def __call__(self, stacked: Stacked) -> Plan:
        return fold(self.steps, stacked)[0]


class MergeTransform(NamedTuple):
    """A merge of models: what to find out, and what to do with it.

    Attributes:
      match: stacked -> plan, a small pytree: look at it, log it, save it.
      merge: (plan, stacked) -> stacked, leaf by leaf.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> tx = jm.params.chain(jm.params.trim(0.5), jm.params.sum_experts())
      >>> stacked = {"w": jnp.array([[1.0, -4.0, 2.0, 3.0]])}
      >>> plan = tx.match(stacked)
      >>> plan[0]["w"]["threshold"].tolist(), tx.merge(plan, stacked)["w"].tolist()
      ([3.0], [[0.0, -4.0, 0.0, 3.0]])
    """

    match: Callable[[Stacked], Plan]
    merge: Callable[[Plan, Stacked], Stacked]


def atom(step: Step) -> MergeTransform:
    """One step as a transform. Leaves of one shape share a compilation, also outside jit."""
    match, survey = step.match, step.survey
    if not step.lazy:
        match = lambda settings, x: step.match(settings, entries(x))
        if survey is not None:
            settle = survey.settle
            all_of = lambda leaves: {name: entries(x) for name, x in leaves.items()}
            survey = survey._replace(settle=lambda settings, leaves: settle(settings, all_of(leaves)))
    return of_steps((step._replace(match=jax.jit(match), merge=jax.jit(step.merge), survey=survey),))


def per_leaf(
    match: Callable[[Array], Any], merge: Callable[[Any, Array], Array], *, models: int | None = None
) -> MergeTransform:
    """Your own atom, from two functions of one stacked leaf (K, *shape).

    Args:
      match: x -> plan, a small pytree.
      merge: (plan, x) -> x, float32.
      models: how many models are left on the leading axis; None if all.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> largest = jm.params.per_leaf(lambda x: None, lambda plan, x: x.max(axis=0, keepdims=True), models=1)
      >>> jm.params.merge(largest, None, [{"w": jnp.array([1.0, 5.0])}, {"w": jnp.array([3.0, 2.0])}])["w"].tolist()
      [3.0, 5.0]
    """
    needs = (Need("unknown", "tensor"),)
    return atom(Step(lambda name, shape: (), lambda settings, x: match(x), merge, models, needs=needs))


def chain(*transforms: MergeTransform) -> MergeTransform:
    """Do one transform after the other: each matches and merges what the one before left.

    Law:
      chain(a, chain(b, c)) = chain(chain(a, b), c); chain() leaves everything as it is.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> mean = jm.params.chain(jm.params.weigh(0.5), jm.params.sum_experts())
      >>> jm.params.merge(mean, None, [{"w": jnp.array(1.0)}, {"w": jnp.array(3.0)}])["w"].item()
      2.0
    """
    if all(isinstance(a_merge(tx, "chain").match, Match) for tx in transforms):
        return of_steps(tuple(step for tx in transforms for step in tx.match.steps))  # type: ignore[attr-defined]

    def match(stacked):
        plans = []
        for tx in transforms:
            plans.append(tx.match(stacked))
            stacked = tx.merge(plans[-1], stacked)
        return tuple(plans)

    def merge(plans, stacked):
        for tx, plan in zip(transforms, plans, strict=True):
            stacked = tx.merge(plan, stacked)
        return stacked

    return MergeTransform(match, merge)


def needs(tx: MergeTransform) -> tuple[Need, ...]:
    """What a merge must find out: its statistics and their scopes, in the order of the chain. Empty: every entry for itself.

    Args:
      tx: a chain of this package's atoms.

    Law:
      Without "sum", "spectral" and "unknown" among them the result has the same bits on any sharding (`pcb`, which
      exponentiates, up to the compiler's rounding).

    Raises:
      ValueError: `tx` is not made of this package's atoms. TypeError: it is no merge.

    Example:
      >>> import jaxmerge as jm
      >>> jm.params.needs(jm.params.linear())
      ()
      >>> [tuple(need) for need in jm.params.needs(jm.params.della(0.5, seed=0, rescale="l1"))]
      [('order', 'row'), ('random', 'entry'), ('sum', 'tensor')]
    """
    if not isinstance(a_merge(tx, "needs").match, Match):
        raise ValueError("needs: pass a chain of this package's atoms; what your own functions look at cannot be seen.")
    return tuple(dict.fromkeys(need for step in tx.match.steps for need in step.needs))


def of_steps(steps: tuple[Step, ...]) -> MergeTransform:
    return MergeTransform(Match(steps), functools.partial(_merge, steps))


def _merge(steps: tuple[Step, ...], plan: Plan, stacked: Stacked) -> Stacked:
    leaves, treedef = named_leaves(stacked)
    for step, plans in zip(steps, plan, strict=True):
        leaves = {name: settled(left(step, plans[name], x)) for name, x in leaves.items()}
    return jax.tree.unflatten(treedef, [last(x) for x in leaves.values()])


def fold(steps: tuple[Step, ...], stacked: PyTree[Entries]) -> tuple[Plan, Stacked]:
    """Match and merge in one go: each step sees what the steps before it left. The stacked leaves may be `Deferred`."""
    leaves, treedef = named_leaves(stacked, is_leaf=lambda x: isinstance(x, Deferred))
    ordered = sorted(leaves)
    plan = []
    for step in steps:
        settings = {name: step.settings(name, leaves[name].shape) for name in ordered}
        if step.survey is not None and settings:
            settings = settled(step.survey.settle(settings, {name: leaves[name] for name in ordered}))
        plans = {name: settled(step.match(settings[name], leaves[name])) for name in ordered}
        leaves = {name: settled(left(step, plans[name], x)) for name, x in leaves.items()}
        plan.append(plans)
    return tuple(plan), jax.tree.unflatten(treedef, [last(x) for x in leaves.values()])


def left(step: Step, plan: Any, x: Entries) -> Entries:
    """What a step leaves: arithmetic is deferred with what it starts from; random bits and factorisations are made once."""
    dear = any(need.statistic in ("random", "spectral") for need in step.needs)
    if dear:
        return step.merge(plan, x if step.lazy else last(x))
    return defer(step.merge, plan, x)


def settled(x: Any) -> Any:
    """x, computed where devices are virtual: XLA's CPU collectives of several programs in flight starve each other of threads,
    and the process is aborted. Accelerators queue per device and are not waited for; nor is anything inside jit."""
    concrete = not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(x))
    return jax.block_until_ready(x) if concrete and jax.default_backend() == "cpu" and jax.device_count() > 1 else x


def named_leaves(tree: PyTree, is_leaf: Callable | None = None) -> tuple[dict[str, Any], Any]:
    """{name: leaf} in the tree's order, and its structure; a name is the key path joined with "/".

    Raises:
      ValueError: two leaves have one name.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    leaves = {leaf_name(path): leaf for path, leaf in paths}
    if len(leaves) != len(paths):
        names = [leaf_name(path) for path, _ in paths]
        twice = sorted({n for n in names if names.count(n) > 1})
        raise ValueError(f"leaf names must differ, but these occur twice: {twice}; rename a key that contains '/'.")
    return leaves, treedef


def leaf_name(path: tuple) -> str:
    """A key path as a name: ("layers", 0, "kernel") is "layers/0/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def a_merge(tx: Any, what: str) -> MergeTransform:
    """tx, which was passed to `what`.

    Raises:
      TypeError: it is something else.
    """
    if not isinstance(tx, MergeTransform):
        remedy = "call it first" if callable(tx) else "make one of this package's atoms"
        raise TypeError(f"{what}: expected a merge, such as ties(0.2); got {tx!r}; {remedy}.")
    return tx


def resolve(value: Hyperparameter, name: str, models: int, what: str) -> Any:
    """A hyperparameter's value for each of the models on one leaf, shape (K,).

    Raises:
      ValueError: what is no number; as many numbers as neither 1 nor K.
    """
    if callable(value):
        value = value(name)
    if not isinstance(value, Array):  # arrays may be traced: coefficients can be learned
        given = np.asarray(value)
        numbers = np.asarray(np.nan) if given.dtype.kind in "OSUcmM" else given.astype(np.float64)
        if np.isnan(numbers).any():
            raise ValueError(f"{what} must be one number, one per model, or a function of the leaf's name; got {value!r}.")
        value = numbers
    if value.ndim > 1 or (value.ndim == 1 and value.shape[0] != models):
        raise ValueError(
            f"{what} must be one number or one per model; got shape {value.shape} for {models} models at leaf {name!r}."
        )
    return (jnp if isinstance(value, Array) else np).broadcast_to(value, (models,))


def normalized(w: Any, name: str, what: str) -> Any:
    """Resolved weights over their sum.

    Raises:
      ValueError: the sum is 0.
    """
    if isinstance(w, np.ndarray) and abs(w.sum()) < 1e-12:
        raise ValueError(
            f"{what}: the weights {w.tolist()} at leaf {name!r} sum to 0 and cannot be normalized; "
            "change them, or do not normalize."
        )
    return w / w.sum()


def float32(value: Any) -> Any:
    """A resolved hyperparameter as float32, traced or not."""
    return value.astype(np.float32)


def over(v: Any, x: Array) -> Array:
    """v (K,) with trailing axes of length 1, to broadcast over x (K, *shape)."""
    return jnp.asarray(v).reshape(-1, *(1,) * (x.ndim - 1))


def models(x: Array) -> list[Array]:
    """The models of x (K, *shape), one by one.

    What is computed of each by itself and stacked again is one loop to XLA, over arrays of the leaf's own shape: no array of
    them all is made, and the result may take the place of a leaf that is donated.
    """
    return [lax.index_in_dim(x, k, keepdims=False) for k in range(x.shape[0])]


def total(x: Array) -> Array:
    """The sum over the models, (1, *shape), added in their order: the same bits on any sharding."""
    return functools.reduce(jnp.add, models(x))[None]


def each(f: Callable[..., Array], x: Array, *values: Any) -> Array:
    """f of every model (*shape) and its part of the values (K, ...), stacked again."""
    return jnp.stack([f(*parts) for parts in zip(models(x), *(models(jnp.asarray(v)) for v in values), strict=True)])
