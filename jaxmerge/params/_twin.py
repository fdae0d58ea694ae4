"""What the tasks share, and what each has for itself, compressed: Twin-Merging, and adapters that stay factors."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PyTree

from jaxmerge.params._sketch import Method, leading
from jaxmerge.params._spectral import Select, matmul, truncate
from jaxmerge.params._transform import (
    Hyperparameter,
    MergeTransform,
    Need,
    Stacked,
    Step,
    atom,
    float32,
    leaf_name,
    over,
    resolve,
    total,
)


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

    Source: LoRA Soups (arXiv:2410.13025); PEFT's add_weighted_adapter with combination_type="cat". Its "linear",
    "ties" and "magnitude_prune" merge factor by factor: `merge(chain(trim(...), weigh(sqrt(w)), ...), None, adapters)`.
    """
    if not adapters:
        raise ValueError("concatenate: no adapters; pass at least one.")

    def cat(path, *leaves):
        w = jnp.asarray(float32(resolve(weight, leaf_name(path), len(leaves), "concatenate: weight")))
        b = [leaf.b.astype(jnp.float32) * w[k] for k, leaf in enumerate(leaves)]
        return Factors(jnp.concatenate(b, axis=-1), jnp.concatenate([leaf.a.astype(jnp.float32) for leaf in leaves], axis=-2))

    return jax.tree_util.tree_map_with_path(cat, *adapters, is_leaf=lambda x: isinstance(x, Factors))


def twin_split(
    stacked: Stacked,
    *,
    scale: float = 0.3,
    density: float = 0.5,
    method: Method = "randomized",
    oversample: int = 16,
    iterations: int = 3,
) -> tuple[Stacked, PyTree]:
    """What the tasks share, and what is left of each, as low-rank factors: to be served with a router (`twin_serve`).

    Args:
      stacked: task vectors, leaves (K, *shape).
      scale: the shared part is so much of their sum.
      density: the share of a matrix's rank to keep, at least 1; leaves that are not matrices are kept whole.
      method, oversample, iterations: see `truncate`.

    Returns:
      The shared task vector, leaves (1, *shape), and the exclusive ones: `Factors` of K matrices, or (K, *shape).

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> shared, own = jm.params.twin_split({"w": jnp.ones((2, 4, 4))}, density=0.5)
      >>> shared["w"].shape, own["w"].b.shape, own["w"].a.shape
      ((1, 4, 4), (2, 4, 2), (2, 2, 4))

    Source: Twin-Merging (arXiv:2406.15479).
    """
    shared = jax.tree.map(lambda x: scale * total(x), stacked)

    triplets = leading("twin_split", method, oversample, iterations)

    def compress(x, s):
        if x.ndim != 3:
            return x - s
        u, values, v = triplets(x - s, max(1, int(density * min(x.shape[1:]))))
        return Factors(u * values[:, None, :], v)

    return shared, jax.tree.map(compress, stacked, shared)


def twin_serve(shared: Stacked, own: PyTree, weights: Float[Array, "K"]) -> Stacked:
    """The task vector for one input: what is shared, plus what is each task's own, as a router weighs the tasks.

    Args:
      shared, own: what `twin_split` made.
      weights: (K,), such as the softmax of a router's logits. May be traced.

    Returns:
      Leaves (1, *shape), for `params.add`.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> shared, own = jm.params.twin_split({"w": jnp.arange(8.0).reshape(2, 2, 2)}, density=1.0)
      >>> jm.params.twin_serve(shared, own, jnp.array([0.0, 1.0]))["w"].round().astype(int).tolist()
      [[[4, 5], [6, 7]]]
    """
    weigh = lambda s, x: s + total(x * over(weights, x))
    return jax.tree.map(weigh, shared, dense(own))


def twin_merging(
    weight: Any,
    *,
    scale: float = 0.3,
    density: float = 0.5,
    select: Select = None,
    method: Method = "randomized",
    oversample: int = 16,
    iterations: int = 3,
) -> MergeTransform:
    """Twin-Merging for one input: the shared part, plus the compressed rest of each task by the router's weights.

    Args:
      weight: (K,), one per model, such as the softmax of a router's logits.
      scale, density: see `twin_split`.
      select: leaf name -> whether a matrix is compressed; None compresses them all.
      method, oversample, iterations: see `truncate`.

    Law:
      density = 1 and all weight on one model give it back, up to rounding.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, models = {"w": jnp.zeros((2, 2))}, [{"w": jnp.ones((2, 2))}, {"w": 2 * jnp.ones((2, 2))}]
      >>> jm.params.merge(jm.params.twin_merging([0.0, 1.0]), base, models)["w"].round(3).tolist()
      [[2.0, 2.0], [2.0, 2.0]]

    Source: Twin-Merging (arXiv:2406.15479).
    """
    (compress,) = truncate(density, select=select, method=method, oversample=oversample, iterations=iterations).match.steps

    def settings(name, shape):
        w = float32(resolve(weight, name, shape[0], "twin_merging: weight"))
        return {"weight": w, "compress": compress.settings(name, shape)}

    def merge(plan, x):
        shared = scale * total(x)
        return shared + total(compress.merge(plan["compress"], x - shared) * over(plan["weight"], x))

    needs = (Need("spectral", "tensor"),)
    return atom(Step(settings, lambda settings, x: settings, merge, models=1, needs=needs))
