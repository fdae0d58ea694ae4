"""Adapters that stay factors: low-rank updates, merged, compressed, learned, and only at the end added to a model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PyTree

from jaxmerge.params._layout import whole
from jaxmerge.params._transform import Hyperparameter, float32, leaf_name, named_leaves, resolve
from jaxmerge.params.learned._learned import descend
from jaxmerge.params.spectral._spectral import matmul


class Factors(NamedTuple):
    """A low-rank update b a of a matrix (out, in), or several on a leading axis.

    Attributes:
      b: (*batch, out, rank).
      a: (*batch, rank, in).
    """

    b: Float[Array, "*batch m r"]
    a: Float[Array, "*batch r n"]


def dense(update: PyTree) -> PyTree:
    """Every `Factors` of a pytree multiplied out, everything else as it is.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.params.dense({"w": jm.params.Factors(jnp.array([[2.0]]), jnp.array([[1.0, 3.0]]))})["w"].tolist()
      [[2.0, 6.0]]
    """
    is_factors = lambda x: isinstance(x, Factors)
    return jax.tree.map(lambda x: matmul(x.b, x.a) if is_factors(x) else x, update, is_leaf=is_factors)


def concatenate(adapters: Sequence[PyTree], weight: Hyperparameter = 1.0) -> PyTree:
    """LoRA Soups' CAT: the weighted sum of low-rank updates, kept as factors of the summed rank. Exact, without cross terms.

    Args:
      adapters: K pytrees of `Factors`, of one structure; ranks may differ.
      weight: one number, one per adapter, or a function of the leaf's name; include alpha / rank. May be traced (learned).

    Law:
      dense(concatenate(adapters, w)) is the weighted sum of the dense updates.

    Raises:
      ValueError: no adapters.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> one = {"w": jm.params.Factors(jnp.array([[1.0], [0.0]]), jnp.array([[1.0, 1.0]]))}
      >>> two = {"w": jm.params.Factors(jnp.array([[0.0], [1.0]]), jnp.array([[2.0, 0.0]]))}
      >>> jm.params.dense(jm.params.concatenate([one, two], [1.0, 0.5]))["w"].tolist()
      [[1.0, 1.0], [1.0, 0.0]]

    Source: LoRA Soups (arXiv:2410.13025); PEFT's add_weighted_adapter with combination_type="cat". Its "linear", "ties",
    "dare_linear", "dare_ties" and "magnitude_prune" merge factor by factor: `merge(chain(trim(...), weigh(sqrt(w)), ...), None,
    adapters)`. Its "svd" is `compress(concatenate(adapters, w), rank)`; its "ties_svd" and the like merge
    `[dense(a) for a in adapters]`, then `compress`.
    """
    if not adapters:
        raise ValueError("concatenate: no adapters; pass at least one.")

    def cat(path, *leaves):
        w = jnp.asarray(float32(resolve(weight, leaf_name(path), len(leaves), "concatenate: weight")))
        b = [leaf.b.astype(jnp.float32) * w[k] for k, leaf in enumerate(leaves)]
        return Factors(jnp.concatenate(b, axis=-1), jnp.concatenate([leaf.a.astype(jnp.float32) for leaf in leaves], axis=-2))

    return jax.tree_util.tree_map_with_path(cat, *adapters, is_leaf=lambda x: isinstance(x, Factors))


def compress(update: PyTree, rank: int | Callable[[str], int]) -> PyTree:
    """The nearest update of a lower rank, as factors: of `Factors` without multiplying them out, of a matrix as it is.

    The factors' own small factors are decomposed: b = Q R, a^T = P S, and R S^T, which is no larger than the rank there is.
    The singular values go to b. Leaves that are neither stay as they are. What is split is brought together for it.

    Args:
      update: a pytree of `Factors` and arrays: an adapter, or a task vector.
      rank: the most that a leaf keeps, or a function of its name.

    Law:
      Least squares: no update of that rank is nearer. A rank that is large enough changes nothing but the factors.

    Raises:
      ValueError: a rank under 1.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> update = {"w": jm.params.Factors(jnp.eye(2), jnp.array([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))}
      >>> small = jm.params.compress(update, 1)
      >>> small["w"].b.shape, small["w"].a.shape, jm.params.dense(small)["w"].round().astype(int).tolist()
      ((2, 1), (1, 3), [[3, 0, 0], [0, 0, 0]])

    Source: PEFT's "svd", there by way of the dense update; mergekit-extract-lora, for a task vector.
    """

    def one(path, x):
        name = leaf_name(path)
        k = rank(name) if callable(rank) else rank
        if k < 1:
            raise ValueError(f"compress: the rank of leaf {name!r} must be 1 or more, got {k}.")
        if isinstance(x, Factors):
            b, a = (whole(v.astype(jnp.float32), (-2, -1)) for v in x)
            (q, r), (p, s) = jnp.linalg.qr(b), jnp.linalg.qr(jnp.swapaxes(a, -1, -2))
            u, values, v = jnp.linalg.svd(matmul(r, jnp.swapaxes(s, -1, -2)), full_matrices=False)
            u, v = matmul(q, u), matmul(v, jnp.swapaxes(p, -1, -2))
        elif x.ndim == 2:
            u, values, v = jnp.linalg.svd(whole(x.astype(jnp.float32), (-2, -1)), full_matrices=False)
        else:
            return x
        return Factors(u[..., :k] * values[..., None, :k], v[..., :k, :])

    return jax.tree_util.tree_map_with_path(one, update, is_leaf=lambda x: isinstance(x, Factors))


def adapt(base: PyTree, adapter: PyTree) -> PyTree:
    """The model with an adapter's updates in it, multiplied out and added in float32, cast once.

    Args:
      base: a pytree.
      adapter: `Factors`, or arrays of the leaves' shapes, in a pytree whose leaves are named as the base's; leaves that it does
        not name stay as they are. Of a kernel (in, out) the update is (in, out) too: b has `in` rows.

    Law:
      adapt(base, concatenate(adapters, w)) adds the weighted sum of what each adapter adds.

    Raises:
      ValueError: updates of leaves that are not there, or of other shapes; all in one message.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
      >>> adapter = {"w": jm.params.Factors(jnp.array([[1.0], [0.0]]), jnp.array([[2.0, 3.0]]))}
      >>> jm.params.adapt(base, adapter)["w"].tolist()
      [[3.0, 4.0], [1.0, 1.0]]

    Source: LoRA (arXiv:2106.09685).
    """
    leaves, treedef = named_leaves(base)
    updates, _ = named_leaves(adapter, is_leaf=lambda x: isinstance(x, Factors))
    shape = lambda x: (*x.b.shape[:-1], x.a.shape[-1]) if isinstance(x, Factors) else x.shape
    problems = [f"  there is no leaf {n}" for n in updates if n not in leaves]
    problems += [
        f"  {n}: an update of shape {shape(x)} for a leaf of shape {leaves[n].shape}"
        for n, x in updates.items()
        if n in leaves and shape(x) != leaves[n].shape
    ]
    if problems:
        raise ValueError("adapt: the adapter does not fit the model:\n" + "\n".join(sorted(problems)))
    added = {n: (leaves[n].astype(jnp.float32) + dense(x)).astype(leaves[n].dtype) for n, x in updates.items()}
    return jax.tree.unflatten(treedef, list((leaves | added).values()))


def fit_adapters(
    loss: Callable[[PyTree, Any], Array],
    start: Any,
    *,
    base: PyTree,
    adapters: Sequence[PyTree],
    batches: Iterable[Any],
    optimizer: Any,
) -> tuple[Any, Float[Array, "steps"]]:
    """Learn how much each adapter counts, in each leaf if you like: descend the loss of the adapted model.

    Args:
      loss: (adapted model, batch) -> scalar.
      start: coefficients to start from: (K,), one per adapter, or {leaf name: (K,)}; alpha / rank included.
      base: the model that the adapters were trained on.
      adapters: K pytrees of `Factors`, of one structure; ranks may differ.
      batches: what `loss` takes; all of one shape, so that there is one compilation.
      optimizer: optax-like: `init(params)` and `update(gradients, state, params)` -> (updates, state).

    Returns:
      The coefficients, for `concatenate`, and the loss at each step, before it.

    Raises:
      ValueError: no batches; a leaf without coefficients.

    Example:
      >>> import types, jax, jax.numpy as jnp, jaxmerge as jm
      >>> adapter = lambda row: {"w": jm.params.Factors(jnp.ones((1, 1)), jnp.array([row]))}
      >>> descent = types.SimpleNamespace(
      ...     init=lambda p: (), update=lambda g, state, p: (jax.tree.map(lambda v: -0.5 * v, g), state)
      ... )
      >>> found, losses = jm.params.fit_adapters(
      ...     lambda model, batch: jnp.sum((model["w"] - batch) ** 2),
      ...     jnp.array([0.5, 0.5]),
      ...     base={"w": jnp.zeros((1, 2))},
      ...     adapters=[adapter([1.0, 0.0]), adapter([0.0, 1.0])],
      ...     batches=[jnp.array([[0.25, 0.75]])] * 20,
      ...     optimizer=descent,
      ... )
      >>> [round(v, 3) for v in found.tolist()]
      [0.25, 0.75]

    Source: LoRA Soups (arXiv:2410.13025), learned CAT: one coefficient per layer and adapter, all equal at the start.
    """

    def weight(coefficients):
        if not isinstance(coefficients, Mapping):
            return coefficients

        def of(name):
            if name not in coefficients:
                raise ValueError(f"fit_adapters: leaf {name!r} has no coefficients; there are some for {sorted(coefficients)}.")
            return coefficients[name]

        return of

    def objective(coefficients, given, batch):
        base, adapters = given
        return loss(adapt(base, concatenate(adapters, weight(coefficients))), batch)

    return descend(objective, start, (base, list(adapters)), batches, optimizer, what="fit_adapters")
