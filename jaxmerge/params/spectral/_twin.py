"""What the tasks share, and what each has for itself, compressed: Twin-Merging."""

from typing import Any

import jax
from jax import Array
from jaxtyping import Float, PyTree

from jaxmerge.params._layout import like
from jaxmerge.params._transform import (
    MergeTransform,
    Need,
    Stacked,
    Step,
    atom,
    float32,
    over,
    resolve,
    total,
)
from jaxmerge.params.spectral._adapters import Factors, dense
from jaxmerge.params.spectral._sketch import Method, leading
from jaxmerge.params.spectral._spectral import Select, truncate


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
    weigh = lambda s, x: s + like(total(x * over(weights, x)), s)
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
