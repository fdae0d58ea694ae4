"""Inputs for kernels: shapes of real models, whole or scaled down, and numbers whose cosines are exact, so that ties are."""

import jax.numpy as jnp
import numpy as np

from jaxmerge._kernels.arg_specs import BYTES, LONG, VIT, Tokens

EVERY = (*VIT, *LONG, *BYTES)
SMALL = tuple(
    Tokens(s.name, *(max(x // by, least) for x, by, least in ((s.n, 8, 3), (s.k, 4, 8), (s.d, 16, 8), (s.r, 8, 1))), s.prefix)
    for s in (VIT[0], VIT[-1], BYTES[0])
)
"""An odd n, an even one, and bytes."""


def exact(rng, batch: int, n: int, k: int, dtype) -> jnp.ndarray:
    """Rows of four equal magnitudes, powers of two: cosines are quarters, exact in any order of summation, and often equal.

    Some rows have no direction: zeros, an infinity, a NaN.
    """
    x = np.zeros((batch, n, k), np.float32)
    for row in x.reshape(-1, k):
        row[rng.choice(min(k, 8), 4, replace=False)] = rng.choice([-1.0, 1.0], 4)
    x *= 2.0 ** rng.integers(-40, 40, (batch, n, 1))
    for at, bad in zip(rng.choice(n, 3, replace=False), (0.0, np.inf, np.nan), strict=True):
        x[:, at, :] = bad
    return jnp.asarray(x, dtype)


def whole(rng, batch: int, n: int, k: int, dtype) -> jnp.ndarray:
    """Rows of small whole numbers, some of them twins: squared distances are whole numbers too, and often equal."""
    x = rng.integers(-3, 4, (batch, n, k))
    x[:, n // 2 :: 3] = x[:, : n - n // 2 : 3]
    return jnp.asarray(x, dtype)


def tokens(rng, batch: int, n: int, d: int, dtype) -> jnp.ndarray:
    return jnp.asarray(rng.standard_normal((batch, n, d)), dtype)


def sizes(rng, batch: int, n: int) -> jnp.ndarray:
    """Whole numbers, of which some need more than the 8 bits of a bfloat16."""
    return jnp.asarray(rng.choice([1, 2, 3, 257, 333], (batch, n)), jnp.float32)


def plan(rng, batch: int, n: int, m: int, *, ordered: bool) -> jnp.ndarray:
    """Ids with some dropped, some beyond, and some segments empty."""
    ids = rng.integers(-1, m + 1, (batch, n))
    ids[ids == m // 2] = 0
    return jnp.asarray(np.sort(ids, axis=1) if ordered else ids, jnp.int32)


def merging(rng, spec: Tokens) -> jnp.ndarray:
    """Ids (1, n) as a model has them: r even positions join odd ones, the others stay in order.

    Runs, where more leave than there are even positions: so it is with bytes.
    """
    if spec.r > spec.n // 2:
        return jnp.asarray(np.sort(rng.integers(0, spec.n - spec.r, (1, spec.n))), jnp.int32)
    leave = 2 * rng.choice(spec.n // 2, spec.r, replace=False)
    stay = ~np.isin(np.arange(spec.n), leave)
    ids = np.cumsum(stay) - 1
    ids[leave] = ids[2 * rng.integers(0, spec.n // 2, spec.r) + 1]
    return jnp.asarray(ids[None], jnp.int32)


def close(found, wanted, *, terms: int, largest: float) -> None:
    """Equal within what rounding allows.

    float32: every one of `terms` summands and sums is rounded twice over in each of both, 2^-24 of the largest. bfloat16:
    sums are of 16-bit parts, 2^-17 of the largest, and each result is rounded to 8 bits, 2^-8 of itself.
    """
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    half = found.dtype == jnp.bfloat16
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    bound = (4 * terms + 8) * 2.0**-24 * largest
    bound = bound + 2.0**-16 * largest + 2.0**-7 * np.abs(wanted) if half else bound
    assert (np.abs(found - wanted) <= bound).all(), f"{np.abs(found - wanted).max()} apart"


def gradients_of_attention(found, given, bias, g, *, scale: float, unit: float, of_scores: float) -> None:
    """How a loss moves with q, k, v (B, n, heads, f), `given`, and the bias (B, s), within what each of their terms may be off.

    `unit` is what weights, their cotangents and results are rounded by, `of_scores` what the products in scores are: with w
    the weights, a score off by e makes w off by e and the mean of all e of its query, and c = w (g v - g o) by that and what
    g v and g o are off by. Sums of products are off by the sums of what these are.
    """
    q, k, v, g = (np.asarray(x, np.float64) for x in (*given, g))
    share = q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, share, axis=2) for x in (k, v))
    bias = np.zeros(k.shape[:2]) if bias is None else np.asarray(bias, np.float64)
    over = lambda form, *some: np.einsum(form, *some, optimize=True)
    size = np.abs
    score = scale * over("bqhf,bkhf->bhqk", q, k) + bias[:, None, None]  # where all are masked, scores vanish beside that
    w = np.exp(score - score.max(axis=-1, keepdims=True))
    w /= w.sum(axis=-1, keepdims=True)
    of_v = over("bqhf,bkhf->bhqk", g, v)
    c = w * (of_v - over("bhqk,bhqk->bhq", w, of_v)[..., None])
    off = of_scores * scale * over("bqhf,bkhf->bhqk", size(q), size(k))
    off = w * (off + over("bhqk,bhqk->bhq", w, off)[..., None] + 2.0**-19)  # exp2 and the logarithm, a few last places
    mean = over("bhqk,bhqk->bhq", off, size(of_v)) + unit * over("bhqk,bqhf,bkhf->bhq", w, size(g), size(v))
    off_c = off * size(of_v - over("bhqk,bhqk->bhq", w, of_v)[..., None]) + unit * size(c)
    off_c = off_c + w * (mean[..., None] + 2.0**-24 * q.shape[3] * over("bqhf,bkhf->bhqk", size(g), size(v)))
    fold = lambda x: x.reshape(*x.shape[:2], -1, share, x.shape[3]).sum(axis=3)
    wanted = (
        (scale * over("bhqk,bkhf->bqhf", c, k), scale * over("bhqk,bkhf->bqhf", off_c, size(k))),
        (fold(scale * over("bhqk,bqhf->bkhf", c, q)), fold(scale * over("bhqk,bqhf->bkhf", off_c, size(q)))),
        (fold(over("bhqk,bqhf->bkhf", w, g)), fold(over("bhqk,bqhf->bkhf", off + unit * w, size(g)))),
        (c.sum(axis=(1, 2)), off_c.sum(axis=(1, 2))),
    )
    for one, (exact, bound) in zip(found, wanted, strict=True):
        if one is not None:
            apart, bound = size(np.asarray(one, np.float64) - exact), bound + unit * size(exact) + 2.0**-20
            assert one.shape == exact.shape and (apart <= bound).all(), f"{(apart / bound).max()} of what may be"
