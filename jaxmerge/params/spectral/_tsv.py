"""Task singular vectors: the leading ones of each task matrix, made orthogonal across tasks, weighed, or kept as they are."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PyTree

from jaxmerge.params._layout import einsum
from jaxmerge.params._transform import Hyperparameter, MergeTransform, Stacked, chain
from jaxmerge.params.atoms._scale import scale as scaled, weigh
from jaxmerge.params.spectral._adapters import Factors
from jaxmerge.params.spectral._polar import isometry
from jaxmerge.params.spectral._sketch import Method, leading
from jaxmerge.params.spectral._spectral import Select, per_matrix


def tsvm(
    *,
    weight: Hyperparameter = 1.0,
    scale: float = 1.0,
    density: float | None = None,
    select: Select = None,
    method: Method = "randomized",
    oversample: int = 16,
    iterations: int = 3,
) -> MergeTransform:
    """Keep the leading singular vectors of each task matrix, make them orthogonal across tasks, put the matrices together.

    Args:
      weight: one number, one per model, or a function of the leaf's name.
      scale: a factor for the result.
      density: the share of the rank that each task keeps, at least one vector; None is 1 / K.
      select: leaf name -> whether it is merged so; None takes every matrix. The others are averaged.
      method, oversample, iterations: see `truncate`. What is made orthogonal by Newton-Schulz (`polar`) travels as sums of
        (K rank, K rank) products; "svd" is exact for both, and brings each matrix together.

    Law:
      One model comes back as it is (density=None).

    Raises:
      ValueError: as `truncate`.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, a, b = (jnp.zeros((2, 2)), jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.array([[0.0, 0.0], [0.0, 1.0]]))
      >>> jm.params.merge(jm.params.tsvm(), {"w": base}, [{"w": a}, {"w": b}])["w"].round(3).tolist()
      [[2.0, 0.0], [0.0, 1.0]]

    Source: Task Singular Vectors (arXiv:2412.00081); fusion_bench and the official code.
    """

    merged = _orthogonal_sum("tsvm", density, method, oversample, iterations)
    return chain(weigh(weight), per_matrix(merged, select), scaled(scale))


def r_tsvm(
    *,
    scale: float = 1.0,
    density: float | None = None,
    outlier: float = 3.0,
    nearly_zero: float = 0.1,
    select: Select = None,
    method: Method = "randomized",
    oversample: int = 16,
    iterations: int = 3,
) -> MergeTransform:
    """TSV merging with each task weighted by its outliers, and of a rank that follows its sparsity, layer by layer.

    A task's weight in a layer is the share of its l1 norm that lies in outliers, entries further from the mean than `outlier`
    standard deviations; the weights of a layer average to 1, and are 1 where no task has outliers. Its rank is `tsvm`'s times
    the share of its entries that are not nearly zero: no larger in magnitude than `nearly_zero` standard deviations.

    Args:
      scale: a factor for the result.
      density: the share of the rank that each task keeps at most; None is 1 / K.
      outlier, nearly_zero: in standard deviations of the task matrix; outlier=inf and nearly_zero=-1.0 make it `tsvm`.
      select: leaf name -> whether it is merged so; None takes every matrix. The others are averaged.
      method, oversample, iterations: see `tsvm`.

    Law:
      Tasks that differ by signs and by orders of rows and columns weigh 1 each; a factor for one task scales its part alone.

    Raises:
      ValueError: as `tsvm`.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, a, b = (jnp.zeros((2, 2)), jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.array([[0.0, 0.0], [0.0, 1.0]]))
      >>> jm.params.merge(jm.params.r_tsvm(), {"w": base}, [{"w": a}, {"w": b}])["w"].round(3).tolist()
      [[2.0, 0.0], [0.0, 1.0]]

    Source: the idea is that of R-TSVM, later RESM (arXiv:2502.06876): outlier-aware weights and sparsity-adaptive ranks. No
    code is published; the two formulas here are ours.
    """
    merged = _orthogonal_sum("r_tsvm", density, method, oversample, iterations)

    def work(x):
        axes = (1, 2)
        off = jnp.abs(x - jnp.mean(x, axis=axes, keepdims=True))
        deviation = jnp.sqrt(jnp.mean(off * off, axis=axes, keepdims=True))
        size = jnp.abs(x)
        norm = jnp.sum(size, axis=axes)
        heavy = jnp.sum(jnp.where(off > outlier * deviation, size, 0), axis=axes) / jnp.where(norm == 0, 1, norm)
        mean = jnp.mean(heavy)
        weight = jnp.where(mean == 0, 1, heavy / jnp.where(mean == 0, 1, mean))
        return merged(x * weight[:, None, None], jnp.mean(size > nearly_zero * deviation, axis=axes))

    return chain(per_matrix(work, select), scaled(scale))


def tsv_compress(
    stacked: Stacked,
    *,
    density: float | None = None,
    method: Method = "randomized",
    oversample: int = 16,
    iterations: int = 3,
) -> PyTree:
    """Each task matrix by its leading singular vectors, kept as factors: all tasks in the size of one.

    Args:
      stacked: task vectors, leaves (K, *shape).
      density: the share of the rank that each task keeps, at least one vector; None is 1 / K.
      method, oversample, iterations: see `truncate`.

    Returns:
      `Factors` of K matrices, b (K, m, rank) and a (K, rank, n), split as the matrices are (where all vectors are found, the
      longer over all devices); other leaves as they are.

    Law:
      density = 1 keeps each task up to rounding.

    Raises:
      ValueError: as `truncate`.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> own = jm.params.tsv_compress({"w": jnp.ones((2, 4, 6))})
      >>> own["w"].b.shape, own["w"].a.shape, jm.params.dense(own)["w"][1, 0].round(3).tolist()
      ((2, 4, 2), (2, 2, 6), [1.0, 1.0, 1.0, 1.0, 1.0, 1.0])

    Source: Task Singular Vectors (arXiv:2412.00081), TSV-Compress.
    """
    triplets = leading("tsv_compress", method, oversample, iterations)

    def compress(x):
        if x.ndim != 3:
            return x
        u, s, v = triplets(x, _rank(density, x))
        return Factors(u * s[:, None], v)

    return jax.tree.map(compress, stacked)


def _rank(density: float | None, x: Float[Array, "K m n"]) -> int:
    r = min(x.shape[1:])
    return max(1, r // x.shape[0] if density is None else int(r * density))


def _orthogonal_sum(what: str, density: float | None, method: Method, oversample: int, iterations: int):
    triplets = leading(what, method, oversample, iterations)
    orthogonal = functools.partial(isometry, method=method, reach=1e3)  # bases that agree to 1e-3 count once

    def merged(x: Float[Array, "K m n"], share: Float[Array, "K"] | float = 1.0) -> Float[Array, "1 m n"]:
        """`share` of each task's rank is used, at least one vector."""
        models = x.shape[0]
        rank = _rank(density, x)
        u, s, v = triplets(x, rank)
        most = jnp.maximum(1, jnp.floor(rank * jnp.broadcast_to(share, (models,))))[:, None]
        used = ~(jnp.arange(rank)[None] >= most)
        u, s, v = jnp.where(used[:, None], u, 0), jnp.where(used, s, 0), jnp.where(used[:, :, None], v, 0)
        u, v = orthogonal(jnp.concatenate([*u], axis=1)), orthogonal(jnp.concatenate([*v]))
        return einsum("mr,rn->mn", u * s.reshape(1, -1), v)[None]

    return merged
