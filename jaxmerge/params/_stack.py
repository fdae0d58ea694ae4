"""Whole models in memory: stack them, merge them, add the result to the base."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.sharding import NamedSharding
from jaxtyping import ArrayLike, PyTree

from jaxmerge.params._deferred import Deferred, defer, last
from jaxmerge.params._layout import over_explicit_axes, seen
from jaxmerge.params._transform import Match, MergeTransform, Stacked, a_merge, fold, named_leaves, of_steps

Integers = Literal["agree", "base"]


def task_vectors(base: PyTree | None, models: Iterable[PyTree]) -> Stacked:
    """What each model changed: every leaf gets a leading axis K and becomes float32; integer leaves become None.

    Args:
      base: what the models were trained from; None stacks the models themselves.
      models: K pytrees of the base's structure and shapes.

    Law:
      add(base, task_vectors(base, [m])) = m, up to float32 rounding.

    Raises:
      ValueError: no models, or trees that differ; all differing leaves in one message. TypeError: complex leaves; one tree in
        place of a list of them.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.params.task_vectors({"w": jnp.array(1.0)}, [{"w": jnp.array(3.0)}, {"w": jnp.array(0.0)}])["w"].tolist()
      [2.0, -1.0]

    Source: Editing models with task arithmetic (arXiv:2212.04089).
    """
    return _stack(base, _several(models, "task_vectors"), stack_leaf)


def add(base: PyTree, delta: Stacked) -> PyTree:
    """The base plus a merged task vector (leading axis 1), added in float32, cast once to the base's dtype.

    Raises:
      ValueError: `delta` still holds several models: end the chain with a reduction.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.params.add({"w": jnp.array(1.0, jnp.bfloat16)}, {"w": jnp.array([2.0])})["w"]
      Array(3, dtype=bfloat16)
    """
    return jax.tree.map(lambda d, b: b if d is None else add_leaf(b, d), delta, base, is_leaf=lambda d: d is None)


def merge(
    tx: MergeTransform,
    base: PyTree | None,
    models: Iterable[PyTree],
    *,
    integers: Integers = "agree",
    shardings: PyTree[NamedSharding] | None = None,
) -> PyTree:
    """Merge whole models in memory.

    Args:
      tx: what to do, such as `ties(density=0.2)`.
      base: what the models were trained from; None merges the models themselves (`linear`, `slerp`).
      models: K pytrees of the base's structure and shapes.
      integers: leaves that are not floating point must be equal in all models ("agree"), or are taken from the base ("base";
        the first model where there is none).
      shardings: how each leaf of a model is laid out, such as `jax.tree.map(lambda x: x.sharding, base)`: for arrays over Auto
        axes, whose layout cannot be seen inside jit; nothing is gathered then that the method does not need whole. Not needed
        over Explicit axes.

    Returns:
      A pytree like the base (or the first model), of its dtypes and shardings.

    Raises:
      ValueError: trees that differ; integer leaves that differ, or cannot be compared inside jit; a chain without a reduction;
        `shardings` that are not like a model, or of several meshes; with them, traced arrays over Auto axes that `tx` holds.
        TypeError: `tx` is no merge (`ties` in place of `ties()`); one tree in place of a list of them.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, models = {"w": jnp.zeros(2)}, [{"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, -1.0])}]
      >>> jm.params.merge(jm.params.task_arithmetic(), base, models)["w"].tolist()
      [4.0, 1.0]
    """
    models = _several(models, "merge")
    if shardings is not None:
        return _told(tx, base, models, integers, shardings)
    stacked = _stack(base, models, lambda *leaves: defer(stack_leaf, *leaves))
    first = models[0] if base is None else base
    _check_integers([first, *models] if base is not None else models, integers)
    if isinstance(a_merge(tx, "merge").match, Match):
        merged = fold(tx.match.steps, stacked)[1]
    else:
        stacked = jax.tree.map(last, stacked, is_leaf=lambda x: isinstance(x, Deferred))
        merged = tx.merge(tx.match(stacked), stacked)
    if base is not None:
        return add(base, merged)
    cast = lambda d, m: m if d is None else rounded(reduced(d), jnp.result_type(m))
    return jax.tree.map(cast, merged, first, is_leaf=lambda d: d is None)


def nonfinite(tree: PyTree) -> dict[str, int]:
    """How many NaN and inf each leaf holds, by name, leaves without one left out. Runs on the host: not for use inside jit.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.params.nonfinite({"a": jnp.array([1.0, jnp.nan]), "b": jnp.ones(2)})
      {'a': 1}
    """
    leaves, _ = named_leaves(tree)
    counts = {name: int(jnp.sum(~jnp.isfinite(x))) for name, x in leaves.items() if is_float(x)}
    return {name: n for name, n in counts.items() if n}


# --- one leaf --------------------------------------------------------------------------------------------------------


def is_float(x) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def _stack(base: PyTree | None, models: Sequence[PyTree], stack: Callable) -> PyTree:
    """stack(leaf of the base or None, leaves of the models), leaf by leaf; None for an integer leaf."""
    _check_trees(base, models)

    def floats(*leaves):
        if not is_float(leaves[0]):
            return None
        return stack(leaves[0], leaves[1:]) if base is not None else stack(None, leaves)

    return jax.tree.map(floats, *((base,) if base is not None else ()), *models)


def stack_leaf(base: ArrayLike | None, models: Sequence[ArrayLike]) -> Array:
    """(K, *shape) float32: the models, less the base."""
    wide = [jnp.asarray(m, jnp.float32) for m in models]
    if base is not None:
        zero = jnp.asarray(base, jnp.float32)
        wide = [m - zero for m in wide]
    return jnp.stack(wide)


def _told(tx: MergeTransform, base: PyTree | None, models: list[PyTree], integers: Integers, shardings: PyTree) -> PyTree:
    """`merge` of arrays whose layout is said: over Explicit axes."""
    trees = models if base is None else [base, *models]
    _check_trees(base, models)
    _check_integers(trees, integers)
    _check_shardings(trees[0], shardings)
    if not jax.tree.leaves(shardings):
        return merge(tx, base, models, integers="base")
    outside = jax.sharding.get_abstract_mesh()

    def settings(step, name, shape):
        with jax.sharding.use_abstract_mesh(outside), jax.ensure_compile_time_eval():
            found = step.settings(name, shape)
        return jax.tree.map(seen, found)

    if isinstance(a_merge(tx, "merge").match, Match):
        tx = of_steps(tuple(s._replace(settings=functools.partial(settings, s)) for s in tx.match.steps))

    def run(*trees):
        return merge(tx, *((None, trees) if base is None else (trees[0], trees[1:])), integers="base")

    return over_explicit_axes(run, shardings, *trees)


def reduced(delta: Array) -> Array:
    """What is left of a stacked leaf when one model is."""
    if delta.shape[0] != 1:
        raise ValueError(
            f"add: {delta.shape[0]} models are left; end the chain with sum_experts, mean_agreeing, max_agreeing or spherical."
        )
    return delta[0]


def add_leaf(base: ArrayLike, delta: Array) -> Array:
    return rounded(jnp.asarray(base, jnp.float32) + reduced(delta), jnp.result_type(base))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def rounded(x: Array, dtype: Any) -> Array:
    """x.astype(dtype), bit for bit: what XLA on a CPU rounds to bfloat16 with makes the loop around it slow, up to twice."""
    return _bfloat16(x) if x.dtype == jnp.float32 and jnp.dtype(dtype) == jnp.bfloat16 else x.astype(dtype)


@rounded.defjvp
def _rounded_jvp(dtype, primals, tangents):
    return rounded(primals[0], dtype), tangents[0].astype(dtype)


@jax.jit
def _bfloat16(x: Array) -> Array:
    def on_cpu(x):  # to the nearest, of two to the even one; of a NaN the sign is left
        bits = lax.bitcast_convert_type(x, jnp.uint32)
        nearest = bits + (0x7FFF + (bits >> 16 & 1)) >> 16
        upper = jnp.where(jnp.isnan(x), bits >> 16 & 0x8000 | 0x7FC0, nearest)
        return lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)

    return lax.platform_dependent(x, cpu=on_cpu, default=lambda x: x.astype(jnp.bfloat16))


# --- checks ----------------------------------------------------------------------------------------------------------


def _several(models: Iterable[PyTree], what: str) -> list[PyTree]:
    if isinstance(models, Mapping):
        raise TypeError(f"{what}: models must be a list of pytrees, got one pytree; pass [model] if there is one.")
    return list(models)


def _check_trees(base: PyTree | None, models: Sequence[PyTree]) -> None:
    if not models:
        raise ValueError("merge: no models; pass at least one.")
    reference, which = (models[0], "model 0") if base is None else (base, "the base")
    leaves, treedef = named_leaves(reference)
    problems = []
    for k, model in enumerate(models):
        others, other_def = named_leaves(model)
        problems += [f"  model {k} lacks {n}" for n in leaves.keys() - others.keys()]
        problems += [f"  model {k} has {n}, {which} does not" for n in others.keys() - leaves.keys()]
        for n in leaves.keys() & others.keys():
            a, b = leaves[n], others[n]
            if np.shape(a) != np.shape(b):
                problems.append(f"  {n}: {np.shape(b)} in model {k}, {np.shape(a)} in {which}")
            elif is_float(a) != is_float(b):
                problems.append(f"  {n}: {jnp.result_type(b)} in model {k}, {jnp.result_type(a)} in {which}")
        if not problems and treedef != other_def:
            problems.append(f"  model {k} is built of other containers: {other_def} against {treedef}")
    if problems:
        raise ValueError("merge: the models do not fit together:\n" + "\n".join(sorted(problems)))
    strange = [n for n, x in leaves.items() if jnp.issubdtype(jnp.result_type(x), jnp.complexfloating)]
    if strange:
        raise TypeError(f"merge: complex leaves have no merge here: {strange}; split them into real and imaginary parts.")


def _check_integers(trees: Sequence[PyTree], integers: Integers) -> None:
    if integers not in ("agree", "base"):
        raise ValueError(f'merge: integers must be "agree" or "base", got {integers!r}.')
    if integers == "base":
        return
    named = [named_leaves(tree)[0] for tree in trees]
    exact = [n for n, x in named[0].items() if not is_float(x)]
    if any(isinstance(leaves[n], Tracer) for leaves in named for n in exact):
        raise ValueError(
            f"merge: inside jit it cannot be seen whether the integer leaves agree: {exact}; "
            'merge outside jit, or pass integers="base".'
        )
    differ = [n for n in exact if any(not np.array_equal(named[0][n], leaves[n]) for leaves in named[1:])]
    if differ:
        raise ValueError(
            f"merge: integer leaves differ between the models and have no mean: {sorted(differ)}; "
            'pass integers="base" to take the base\'s.'
        )


def _check_shardings(tree: PyTree, shardings: PyTree) -> None:
    leaves, given = named_leaves(tree)[0], named_leaves(shardings)[0]
    problems = [f"  {n} has none" for n in leaves.keys() - given.keys()]
    problems += [f"  {n}: the models have no such leaf" for n in given.keys() - leaves.keys()]
    problems += [f"  {n}: got {type(s).__name__}" for n, s in given.items() if not isinstance(s, NamedSharding)]
    if not problems and len({s.mesh for s in given.values()}) > 1:
        problems = [f"  {n} lies on {s.mesh}" for n, s in given.items()]
    if problems:
        raise ValueError(
            "merge: shardings must be a pytree like a model, of NamedShardings on one mesh, such as "
            "jax.tree.map(lambda x: x.sharding, base):\n" + "\n".join(sorted(problems))
        )
