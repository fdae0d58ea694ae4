"""Matrices by their singular vectors. A leaf of two axes is a matrix; leaves of other ranks are averaged.

Statistics: spectral. The exact route factors each matrix whole: a leaf that is split over devices is brought together for it
(under Explicit axes by a visible reshard) and laid out as before. Newton-Schulz, where a method needs nothing but a polar
factor, is matrix products alone: under Auto axes a matrix that is split by rows stays so, and only products (n, n) travel.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jaxmerge.params._layout import like, whole
from jaxmerge.params._partition import inner_steps, models_left, run, settings_of
from jaxmerge.params._scale import scale as scaled, weigh
from jaxmerge.params._transform import Hyperparameter, MergeTransform, Need, Step, atom, chain, total

EPS = float(np.finfo(np.float32).eps)
Select = Callable[[str], bool] | None

matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def per_matrix(
    work: Callable[[Array], Array],
    select: Select = None,
    *,
    before: Callable[[Array], Array] = lambda x: x,
    rest: Callable[[Array], Array] = lambda x: total(x) / x.shape[0],
    models: int | None = 1,
) -> MergeTransform:
    """work: x (K, m, n) -> (models, m, n) on leaves of two axes, brought together after `before`; `rest` elsewhere."""

    def settings(name, shape):
        spectral = len(shape) == 3 and 0 not in shape and (select is None or select(name))
        return {"matrix": ()} if spectral else {"rest": ()}  # a static choice: the structure is part of the compilation key

    def merge(plan, x):
        if "matrix" in plan:
            return like(work(whole(before(x), (1, 2))), x)
        return rest(x)

    return atom(Step(settings, lambda settings, x: settings, merge, models=models, needs=(Need("spectral", "tensor"),)))


# --- factors ---------------------------------------------------------------------------------------------------------


def polar(x: Float[Array, "*batch m n"], method: Literal["svd", "newton_schulz"] = "svd") -> Float[Array, "*batch m n"]:
    """The nearest partial isometry: U V^T of the singular value decomposition, over the directions that x has at all.

    Args:
      x: matrices.
      method: "svd" is exact. "newton_schulz" iterates x (3 - x^T x) / 2, scaled, 28 times: matrix products alone, which
        stay split. Its error is that of float32, about 1e-7 times the ratio of the largest singular value to the smallest, for
        ratios up to 1e5; values under 1e-6 of the largest come out below 1.

    Law:
      polar(c x) = polar(x) for c > 0; polar(0) = 0; polar(x) x^T is symmetric.

    Raises:
      ValueError: an unknown method.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.params.polar(jnp.array([[3.0, 0.0], [0.0, -2.0]])).round().astype(int).tolist()
      [[1, 0], [0, -1]]

    Source: Higham 2008, Functions of Matrices, section 8.3, doi:10.1137/1.9780898717778.
    """
    if method not in ("svd", "newton_schulz"):
        raise ValueError(f'polar: method must be "svd" or "newton_schulz", got {method!r}.')
    if method == "svd":
        u, s, v = jnp.linalg.svd(x, full_matrices=False)
        return matmul(u * _present(s, x.shape)[..., None, :], v)
    wide = x.shape[-2] < x.shape[-1]
    y = jnp.swapaxes(x, -1, -2) if wide else x
    size = jnp.sqrt(jnp.sum(y * y, axis=(-1, -2), keepdims=True))
    y = y / jnp.where(size == 0, 1, size)

    def step(a):
        return lambda _, y: a * (1.5 * y - 0.5 * a * a * matmul(y, matmul(jnp.swapaxes(y, -1, -2), y)))

    # at a^2 = 2 small values more than double and large ones stay within [0.7, 1]; a^2 = 3 would be faster, but sends 1 to 0
    y = jax.lax.fori_loop(0, 22, step(np.float32(2**0.5)), y)
    y = jax.lax.fori_loop(0, 6, step(np.float32(1)), y)
    return jnp.swapaxes(y, -1, -2) if wide else y


def _present(s: Array, shape: tuple[int, ...]) -> Array:
    """Which singular values are more than rounding: directions without one have no sign to keep."""
    return s > 4 * EPS * max(shape[-2:]) * s[..., :1]


def truncated(x: Float[Array, "*batch m n"], rank: int) -> tuple[Array, Array, Array]:
    """The leading `rank` singular triplets: u (*batch, m, rank), s (*batch, rank), v (*batch, rank, n)."""
    u, s, v = jnp.linalg.svd(x, full_matrices=False)
    return u[..., :rank], s[..., :rank], v[..., :rank, :]


# --- atoms and aliases -----------------------------------------------------------------------------------------------


def truncate(density: float, *, select: Select = None) -> MergeTransform:
    """Keep the leading singular vectors of each matrix: rank int(density r), at least 1, of r = min(m, n).

    Leaves of other ranks stay as they are.

    Args:
      density: the share of the rank to keep.
      select: leaf name -> whether to truncate it; None takes every matrix.

    Law:
      density = 1 changes nothing but rounding.

    Raises:
      ValueError: density outside [0, 1].

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> tx, stacked = jm.params.truncate(0.5), {"w": jnp.array([[[3.0, 0.0], [0.0, 1.0]]])}
      >>> tx.merge(tx.match(stacked), stacked)["w"].round().astype(int).tolist()
      [[[3, 0], [0, 0]]]

    Source: Eckart and Young 1936, doi:10.1007/BF02288367; Twin-Merging's compression (arXiv:2406.15479).
    """
    if not 0 <= density <= 1:
        raise ValueError(f"truncate: density must be between 0 and 1, the share of the rank to keep; got {density}.")

    def work(x):
        u, s, v = truncated(x, max(1, int(density * min(x.shape[1:]))))
        return matmul(u * s[..., None, :], v)

    return per_matrix(work, select, rest=lambda x: x, models=None)


def tsvm(
    *,
    weight: Hyperparameter = 1.0,
    scale: float = 1.0,
    density: float | None = None,
    select: Select = None,
    method: Literal["svd", "newton_schulz"] = "svd",
) -> MergeTransform:
    """Keep the leading singular vectors of each task matrix, make them orthogonal across tasks, put the matrices together.

    Args:
      weight: one number, one per model (R-TSVM's outlier-aware weights go here), or a function of the leaf's name.
      scale: a factor for the result.
      density: the share of the rank that each task keeps, at least one vector; None is 1 / K.
      select: leaf name -> whether it is merged so; None takes every matrix. The others are averaged.
      method: how singular vectors are made orthogonal; see `polar`.

    Law:
      One model comes back as it is (density=None).

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, a, b = (jnp.zeros((2, 2)), jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.array([[0.0, 0.0], [0.0, 1.0]]))
      >>> jm.params.merge(jm.params.tsvm(), {"w": base}, [{"w": a}, {"w": b}])["w"].round(3).tolist()
      [[2.0, 0.0], [0.0, 1.0]]

    Source: Task Singular Vectors (arXiv:2412.00081); fusion_bench and the official code.
    """

    def work(x):
        models, m, n = x.shape
        rank = max(1, int(min(m, n) * density)) if density is not None else max(1, min(m, n) // models)
        u, s, v = truncated(x, rank)
        u = jnp.moveaxis(u, 0, 1).reshape(m, models * rank)
        return matmul(polar(u, method) * s.reshape(1, -1), polar(v.reshape(models * rank, n), method))[None]

    return chain(weigh(weight), per_matrix(work, select), scaled(scale))


def iso_c(
    *, scale: float = 1.0, select: Select = None, method: Literal["svd", "newton_schulz"] = "newton_schulz"
) -> MergeTransform:
    """The sum of the task matrices with all its singular values replaced by their mean.

    Args:
      scale: a factor for the result.
      select: leaf name -> whether it is merged so; None takes every matrix. The others are averaged.
      method: see `polar`. The default needs products of matrices alone.

    Law:
      With method="svd" directions that no task has stay empty (the official code fills them with arbitrary ones);
      Newton-Schulz may leave rounding in them.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, task = {"w": jnp.zeros((2, 2))}, {"w": jnp.array([[3.0, 0.0], [0.0, 1.0]])}
      >>> jm.params.merge(jm.params.iso_c(), base, [task])["w"].round(3).tolist()
      [[2.0, 0.0], [0.0, 2.0]]

    Source: No Task Left Behind (arXiv:2502.04959); fusion_bench.
    """

    def work(x):
        q = polar(x, method)
        mean = jnp.sum(q * x, axis=(1, 2), keepdims=True) / min(x.shape[1:])  # <U V^T, x> is the sum of singular values
        return q * mean

    return chain(per_matrix(work, select, before=total), scaled(scale))


def iso_cts(common: float = 0.8, *, scale: float = 1.0, select: Select = None) -> MergeTransform:
    """As `iso_c`, with part of the space set aside for each task: its leading directions outside the common ones.

    Args:
      common: the share of the rank for the leading directions of the sum; the rest is divided evenly among the tasks.
      scale: a factor for the result.
      select: leaf name -> whether it is merged so; None takes every matrix. The others are averaged.

    Raises:
      ValueError: common outside [0, 1].

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, task = {"w": jnp.zeros((2, 2))}, {"w": jnp.array([[3.0, 0.0], [0.0, 1.0]])}
      >>> jm.params.merge(jm.params.iso_cts(0.5), base, [task])["w"].round(3).tolist()
      [[2.0, 0.0], [0.0, 2.0]]

    Source: No Task Left Behind (arXiv:2502.04959); fusion_bench.
    """
    if not 0 <= common <= 1:
        raise ValueError(f"iso_cts: common must be between 0 and 1, a share of the rank; got {common}.")

    def work(x):
        models, m, n = x.shape
        rank = min(m, n)
        own = min(round((rank - int(rank * common)) / models), rank // models)
        u0, s0, v0 = truncated(total(x)[0], rank - own * models)
        u, s, v = truncated(x - matmul(u0, matmul(u0.T, x)), own)
        u = jnp.concatenate([jnp.moveaxis(u, 0, 1).reshape(m, -1), u0], axis=1)
        v = jnp.concatenate([v.reshape(-1, n), v0])
        return (matmul(polar(u), polar(v)) * jnp.mean(jnp.concatenate([s.reshape(-1), s0])))[None]

    return chain(per_matrix(work, select), scaled(scale))


def knots(tx: MergeTransform, *, floor: float = 1e-4) -> MergeTransform:
    """Merge in the basis that the task matrices share: [T_1 ... T_K] = U S [V_1 ... V_K]; `tx` merges the V_k.

    Args:
      tx: a chain of this package's atoms, such as `ties(0.2, scope="tensor")`; leaves that are not matrices are merged by it as
        they are.
      floor: singular values no larger than this have no direction.

    Law:
      Around a linear merge it changes nothing but rounding.

    Raises:
      ValueError: `tx` is not a chain of this package's atoms, or needs a statistic of the whole model.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, models = {"w": jnp.zeros((1, 2))}, [{"w": jnp.array([[2.0, 0.0]])}, {"w": jnp.array([[0.0, 4.0]])}]
      >>> jm.params.merge(jm.params.knots(jm.params.linear()), base, models)["w"].round(3).tolist()
      [[1.0, 2.0]]

    Source: Model merging with SVD to tie the Knots (arXiv:2410.19735); fusion_bench's subspace alignment.
    """
    steps = inner_steps(tx, "knots")

    def settings(name, shape):
        if len(shape) == 3 and 0 not in shape:
            models, m, n = shape
            return {"matrix": settings_of(steps, name, (models, min(m, models * n), n))}
        return {"rest": settings_of(steps, name, shape)}

    def merge(plan, x):
        if "rest" in plan:
            return run(steps, plan["rest"], x)
        w = whole(x, (1, 2))
        carry, v = shared_basis(w, floor)
        return like(matmul(carry, run(steps, plan["matrix"], v)), x)

    needs = (Need("spectral", "tensor"), *(need for step in steps for need in step.needs))
    return atom(Step(settings, lambda settings, x: settings, merge, models=models_left(steps), needs=needs))


def shared_basis(x: Float[Array, "K m n"], floor: float = 1e-4) -> tuple[Float[Array, "m r"], Float[Array, "K r n"]]:
    """U S and the V_k, so that U S V_k is the k-th matrix."""
    models, m, n = x.shape
    u, s, v = jnp.linalg.svd(jnp.moveaxis(x, 0, 1).reshape(m, models * n), full_matrices=False)
    there = s > floor
    v = jnp.where(there[:, None], v, 0)
    return u * jnp.where(there, s, 0)[None], jnp.moveaxis(v.reshape(-1, models, n), 1, 0)
