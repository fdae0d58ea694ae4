"""Polar factors, and all singular vectors from them: products of matrices that stay split, and one small eigenproblem.

x = U S V has the polar factor W = U V, and x W^T = U S U^T is symmetric: its eigenvectors are U, and V = U^T W. Nothing is
squared on the way, so that small singular values are as good as a direct factorisation leaves them.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from jaxmerge.params._layout import along, einsum, like, locally, longer, whole

EPS = float(np.finfo(np.float32).eps)
Triplets = tuple[Float[Array, "K m r"], Float[Array, "K r"], Float[Array, "K r n"]]


def polar(
    x: Float[Array, "*batch m n"], method: Literal["newton_schulz", "svd"] = "newton_schulz"
) -> Float[Array, "*batch m n"]:
    """The nearest partial isometry: U V^T of the singular value decomposition, over the directions that x has at all.

    Args:
      x: matrices.
      method: "newton_schulz" iterates x (3 - x^T x) / 2, scaled, some 24 times: products of matrices, which stay split. What
        travels is the sum x^T x, of the smaller side squared, once each time; a matrix that is split both ways is laid out
        along its longer side first (an all-to-all). The error is that of float32, about 1e-7 times the ratio of the largest
        singular value to the smallest, for ratios up to 1e5; values under 1e-6 of the largest come out below 1. "svd" is exact,
        and brings each matrix together.

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
        raise ValueError(f'polar: method must be "newton_schulz" or "svd", got {method!r}.')
    return isometry(x, method, 1e5)


def isometry(x: Float[Array, "*batch m n"], method: str, reach: float) -> Float[Array, "*batch m n"]:
    """`polar`, for ratios of singular values up to `reach`; Newton-Schulz leaves what is far beneath it small."""
    batch = x.reshape(-1, *x.shape[-2:]) if x.ndim != 3 else x
    if method == "svd":
        u, s, v = svd(batch)
        return like(einsum("kmr,krn->kmn", u * present(s, x.shape)[:, None], v).reshape(x.shape), x)
    wide = longer(x) == -1
    y = jnp.swapaxes(batch, 1, 2) if wide else batch
    y = newton_schulz(along(y, 1), reach)
    return like((jnp.swapaxes(y, 1, 2) if wide else y).reshape(x.shape), x)


def newton_schulz(y: Float[Array, "K m n"], reach: float = 1e5) -> Float[Array, "K m n"]:
    """The polar factor of tall matrices; m may be split. Values under 1 / reach of the largest may come out below 1."""
    size = jnp.sqrt(jnp.sum(y * y, axis=(1, 2), keepdims=True))
    y = y / jnp.where(size == 0, 1, size)

    def step(a):
        def improve(_, y):
            square = einsum("kmi,kmj->kij", y, y)
            return a * (1.5 * y - 0.5 * a * a * einsum("kmi,kij->kmj", y, square))

        return improve

    # at a^2 = 2 small values more than double and large ones stay within [0.7, 1]; a^2 = 3 would be faster, but sends 1 to 0
    lifts = math.ceil(math.log(reach * y.shape[2] ** 0.5) / math.log(1.5 * 2**0.5))
    y = jax.lax.fori_loop(0, lifts, step(np.float32(2**0.5)), y)
    return jax.lax.fori_loop(0, 6, step(np.float32(1)), y)


def factors(x: Float[Array, "K m n"]) -> Triplets:
    """The singular value decomposition by way of the polar factor; of the larger of m and n is split what was.

    A matrix that is split both ways is laid out along the larger first (an all-to-all).
    """
    tall = longer(x) == -2
    x = along(jnp.swapaxes(x, 1, 2) if tall else x, 2)
    w = jnp.swapaxes(newton_schulz(jnp.swapaxes(x, 1, 2)), 1, 2)
    s, u = locally(jnp.linalg.eigh, einsum("kmn,kpn->kmp", x, w))
    s, u = jnp.maximum(s[:, ::-1], 0), u[:, :, ::-1]
    v = einsum("kmr,kmn->krn", u, w)
    return (jnp.swapaxes(v, 1, 2), s, jnp.swapaxes(u, 1, 2)) if tall else (u, s, v)


def svd(x: Float[Array, "K m n"]) -> Triplets:
    """The singular value decomposition of matrices that are brought together for it."""
    return locally(functools.partial(jnp.linalg.svd, full_matrices=False), whole(x, (1, 2)))


def present(s: Float[Array, "K r"], shape: tuple[int, ...]) -> Bool[Array, "K r"]:
    """Which singular values are more than rounding: directions without one have no sign to keep. NaN is."""
    return ~(s <= 4 * EPS * max(shape[-2:]) ** 0.5 * s[..., :1])
