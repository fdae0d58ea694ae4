"""Leading singular vectors by randomized subspace iteration: the matrix stays where it is, and small products travel."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jaxmerge.params._layout import einsum, locally
from jaxmerge.params.atoms._random import threefry
from jaxmerge.params.spectral._polar import Triplets, factors, newton_schulz, present, svd

Method = Literal["randomized", "svd"]
KEY = (0x9E3779B9, 0x7F4A7C15)  # any


def leading(what: str, method: Method, oversample: int, iterations: int) -> Callable[[Float[Array, "K m n"], int], Triplets]:
    """(x, rank) -> the leading singular triplets of each matrix; directions that it does not have are 0."""
    if method not in ("randomized", "svd"):
        raise ValueError(f'{what}: method must be "randomized" or "svd", got {method!r}.')
    if oversample < 0 or iterations < 0:
        raise ValueError(f"{what}: oversample and iterations must be 0 or more, got {oversample} and {iterations}.")

    def triplets(x, rank):
        u, s, v = svd(x) if method == "svd" else sketched(x, rank, oversample, iterations)
        u, s, v = u[:, :, :rank], s[:, :rank], v[:, :rank]
        there = present(s, x.shape)
        return jnp.where(there[:, None], u, 0), jnp.where(there, s, 0), jnp.where(there[:, :, None], v, 0)

    return triplets


def sketched(x: Float[Array, "K m n"], rank: int, oversample: int, iterations: int) -> Triplets:
    """At least `rank` singular triplets: those of x within the range of (x x^T)^iterations x G, for a random G.

    With l = rank + oversample columns, P the projection on that range, and x = U S V, V split after `rank` rows,

        |x - P x| <= s[rank] (1 + |G2 G1^+|^2)^(1 / (4 iterations + 2)),    G1 = V1 G, G2 = V2 G,

    within a small factor of the best; a singular vector itself is as good as (s[l] / s_i)^(2 iterations + 1). Where l reaches
    min(m, n) nothing is random: all triplets are found (`factors`).

    It costs 2 iterations + 2 products of x with l columns. Of x (m, n) split over both axes travel, each time, the sums
    (m / rows, l) and (n / columns, l), and sums (l, l) to keep columns independent; a matrix never moves.
    """
    columns = rank + oversample
    if columns >= min(x.shape[1:]):
        return factors(x)
    y = einsum("kmn,nl->kml", x, gaussian(x.shape[2], columns))

    def iterate(_, y):
        z = einsum("kmn,kml->knl", x, independent(y))
        return einsum("kmn,knl->kml", x, independent(z))

    q = newton_schulz(jax.lax.fori_loop(0, iterations, iterate, y))
    u, s, v = factors(einsum("kml,kmn->kln", q, x))
    return einsum("kml,klr->kmr", q, u), s, v


def independent(y: Float[Array, "K m l"]) -> Float[Array, "K m l"]:
    """Columns of the same span, nearly orthonormal: one Cholesky QR, shifted so that it cannot fail.

    Source: Fukaya et al. 2020, doi:10.1137/18M1218212.
    """
    square = einsum("kmi,kmj->kij", y, y)
    size = jnp.trace(square, axis1=1, axis2=2)[:, None, None]
    eye = jnp.eye(y.shape[2])[None]

    def inverse_root(square):
        r = jnp.linalg.cholesky(square)
        return jax.scipy.linalg.solve_triangular(r, jnp.broadcast_to(jnp.eye(r.shape[-1]), r.shape), lower=True)

    return einsum("kmi,kji->kmj", y, locally(inverse_root, square / jnp.where(size == 0, 1, size) + 1e-6 * eye))


def gaussian(rows: int, columns: int) -> Float[Array, "rows columns"]:
    """Independent normal numbers, a function of their indices alone: the same on any sharding."""
    row = jnp.arange(rows, dtype=jnp.uint32)[:, None]
    column = jnp.arange(columns, dtype=jnp.uint32)[None]
    bits, _ = threefry((jnp.uint32(KEY[0]), jnp.uint32(KEY[1])), (row + 0 * column, column + 0 * row))
    uniform = ((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-23
    return np.float32(2**0.5) * jax.lax.erf_inv(2 * uniform - 1)
