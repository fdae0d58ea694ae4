"""Matrices by their singular vectors. A leaf of two axes is a matrix; leaves of other ranks are averaged.

Statistics: spectral. By default a matrix stays split as it is: leading singular vectors come from a sketch (`_sketch`), polar
factors and whole decompositions from Newton-Schulz (`_polar`), and what travels are sums of products. Methods that take all
singular vectors lay a matrix that is split both ways out along its longer axis: an all-to-all under Explicit axes; under Auto
axes the compiler brings the shorter axis together. The exact route, method="svd", brings whole matrices together.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxmerge.params._layout import along, einsum, like
from jaxmerge.params._partition import inner_steps, models_left, run, settings_of
from jaxmerge.params._transform import MergeTransform, Need, Step, atom, chain, total
from jaxmerge.params.atoms._scale import scale as scaled
from jaxmerge.params.spectral._polar import factors, isometry, polar, svd
from jaxmerge.params.spectral._sketch import Method, leading

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
    """work: x (K, m, n) -> (models, m, n) on leaves of two axes, after `before`; `rest` elsewhere."""

    def settings(name, shape):
        spectral = len(shape) == 3 and 0 not in shape and (select is None or select(name))
        return {"matrix": ()} if spectral else {"rest": ()}  # a static choice: the structure is part of the compilation key

    def merge(plan, x):
        return like(work(before(x)), x) if "matrix" in plan else rest(x)

    return atom(Step(settings, lambda settings, x: settings, merge, models=models, needs=(Need("spectral", "tensor"),)))


def turned(work: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """The same of matrices whose inputs are their rows, as those of Flax kernels are."""
    return lambda x: jnp.swapaxes(work(jnp.swapaxes(x, 1, 2)), 1, 2)


def truncate(
    density: float, *, select: Select = None, method: Method = "randomized", oversample: int = 16, iterations: int = 3
) -> MergeTransform:
    """Keep the leading singular vectors of each matrix: rank int(density r), at least 1, of r = min(m, n).

    Leaves of other ranks stay as they are.

    Args:
      density: the share of the rank to keep.
      select: leaf name -> whether to truncate it; None takes every matrix.
      method: "randomized" finds the leading singular vectors by subspace iteration from a random start, the same on any
        sharding: the matrix stays split, sums of products with rank + oversample columns travel. It is within a factor
        c^(1 / (4 iterations + 2)) of the best approximation, c of the order of the matrix's size over oversample, and exact up
        to rounding where rank + oversample reaches min(m, n). "svd" is exact, and brings each matrix together.
      oversample, iterations: how many columns more than the rank, and how many times over the matrix and back. Where singular
        values decay fast fewer iterations do.

    Law:
      density = 1 changes nothing but rounding.

    Raises:
      ValueError: density outside [0, 1]; an unknown method; negative oversample or iterations.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> tx, stacked = jm.params.truncate(0.5), {"w": jnp.array([[[3.0, 0.0], [0.0, 1.0]]])}
      >>> tx.merge(tx.match(stacked), stacked)["w"].round().astype(int).tolist()
      [[[3, 0], [0, 0]]]

    Source: Eckart and Young 1936, doi:10.1007/BF02288367; Twin-Merging's compression (arXiv:2406.15479); Halko,
    Martinsson and Tropp 2011, doi:10.1137/090771806.
    """
    if not 0 <= density <= 1:
        raise ValueError(f"truncate: density must be between 0 and 1, the share of the rank to keep; got {density}.")

    triplets = leading("truncate", method, oversample, iterations)

    def work(x):
        u, s, v = triplets(x, max(1, int(density * min(x.shape[1:]))))
        return einsum("kmr,krn->kmn", u * s[:, None], v)

    return per_matrix(work, select, rest=lambda x: x, models=None)


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


def iso_cts(
    common: float = 0.8,
    *,
    scale: float = 1.0,
    select: Select = None,
    method: Method = "randomized",
    oversample: int = 16,
    iterations: int = 3,
) -> MergeTransform:
    """As `iso_c`, with part of the space set aside for each task: its leading directions outside the common ones.

    Args:
      common: the share of the rank for the leading directions of the sum; the rest is divided evenly among the tasks.
      scale: a factor for the result.
      select: leaf name -> whether it is merged so; None takes every matrix. The others are averaged.
      method, oversample, iterations: see `truncate`.

    Raises:
      ValueError: common outside [0, 1]; as `truncate`.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, task = {"w": jnp.zeros((2, 2))}, {"w": jnp.array([[3.0, 0.0], [0.0, 1.0]])}
      >>> jm.params.merge(jm.params.iso_cts(0.5), base, [task])["w"].round(3).tolist()
      [[2.0, 0.0], [0.0, 2.0]]

    Source: No Task Left Behind (arXiv:2502.04959); fusion_bench.
    """
    if not 0 <= common <= 1:
        raise ValueError(f"iso_cts: common must be between 0 and 1, a share of the rank; got {common}.")

    triplets = leading("iso_cts", method, oversample, iterations)
    orthogonal = functools.partial(isometry, method=method, reach=1e3)  # bases that agree to 1e-3 count once

    def work(x):
        models, rank = x.shape[0], min(x.shape[1:])
        own = min(round((rank - int(rank * common)) / models), rank // models)
        u0, s0, v0 = triplets(total(x), rank - own * models)
        outside = x - like(einsum("mr,krn->kmn", u0[0], einsum("mr,kmn->krn", u0[0], x)), x)
        u, s, v = triplets(outside, own)
        u = orthogonal(jnp.concatenate([*u, *u0], axis=1))
        v = orthogonal(jnp.concatenate([*v, *v0]))
        return einsum("mr,rn->mn", u, v)[None] * jnp.mean(jnp.concatenate([s.reshape(-1), s0[0]]))

    return chain(per_matrix(work, select), scaled(scale))


def knots(
    tx: MergeTransform, *, floor: float = 1e-4, method: Literal["newton_schulz", "svd"] = "newton_schulz", axis: int = 1
) -> MergeTransform:
    """Merge in the basis that the task matrices share: [T_1 ... T_K] = U S [V_1 ... V_K]; `tx` merges the V_k.

    Args:
      tx: a chain of this package's atoms, such as `ties(0.2, scope="tensor")`; leaves that are not matrices are merged by it as
        they are.
      floor: singular values no larger than this have no direction.
      method: "newton_schulz" factors by way of the polar factor, whose products stay split, and one eigenproblem of the size of
        the shorter side of [T_1 ... T_K]; "svd" is exact, and brings all the matrices together.
      axis: of a matrix's two axes the one of its inputs: 1 for PyTorch's weights, as the formula has it, 0 for Flax kernels.

    Law:
      Around a linear merge it changes nothing but rounding.

    Raises:
      ValueError: `tx` is not a chain of this package's atoms, or needs a statistic of the whole model; an unknown method;
        an axis that is neither 0 nor 1.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, models = {"w": jnp.zeros((1, 2))}, [{"w": jnp.array([[2.0, 0.0]])}, {"w": jnp.array([[0.0, 4.0]])}]
      >>> jm.params.merge(jm.params.knots(jm.params.linear()), base, models)["w"].round(3).tolist()
      [[1.0, 2.0]]

    Source: Model merging with SVD to tie the Knots (arXiv:2410.19735); fusion_bench's subspace alignment.
    """
    if method not in ("newton_schulz", "svd"):
        raise ValueError(f'knots: method must be "newton_schulz" or "svd", got {method!r}.')
    if axis not in (0, 1):
        raise ValueError(f"knots: axis must be 0 or 1, the axis of a matrix's inputs; got {axis}.")
    steps = inner_steps(tx, "knots")

    def settings(name, shape):
        if len(shape) == 3 and 0 not in shape:
            models, m, n = shape if axis == 1 else (shape[0], shape[2], shape[1])
            return {"matrix": settings_of(steps, name, (models, min(m, models * n), n))}
        return {"rest": settings_of(steps, name, shape)}

    def merge(plan, x):
        if "rest" in plan:
            return run(steps, plan["rest"], x)

        def work(x):
            carry, v = shared_basis(x, floor, method)
            return einsum("mr,krn->kmn", carry, run(steps, plan["matrix"], v))

        return like((work if axis == 1 else turned(work))(x), x)

    needs = (Need("spectral", "tensor"), *(need for step in steps for need in step.needs))
    return atom(Step(settings, lambda settings, x: settings, merge, models=models_left(steps), needs=needs))


def shared_basis(
    x: Float[Array, "K m n"], floor: float = 1e-4, method: str = "newton_schulz"
) -> tuple[Float[Array, "m r"], Float[Array, "K r n"]]:
    """U S and the V_k, so that U S V_k is the k-th matrix."""
    models, m, n = x.shape
    x = along(x, 2 if n * models >= m else 1)
    tall = jnp.transpose(x, (2, 0, 1)).reshape(n * models, m)[None]
    (v,), (s,), (u,) = svd(tall) if method == "svd" else factors(tall)
    there = ~(s <= floor)  # what is not a number counts, to be seen
    v = jnp.where(there[None], v, 0).reshape(n, models, -1)
    return u.T * jnp.where(there, s, 0)[None], jnp.transpose(v, (1, 2, 0))
