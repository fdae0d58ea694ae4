"""Tokens that one model lacks: write their embeddings in another model as combinations of shared ones, and combine here.

Each method gives, for each target, the shared rows to take and their coefficients; on the base's rows of the same tokens they
make the new embeddings: `combine(indices, coefficients, base_rows)`.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmerge.params.spectral._spectral import matmul

Combination = tuple[Int[Array, "B k"], Float[Array, "B k"]]


def combine(indices: Int[Array, "B k"], coefficients: Float[Array, "B k"], rows: Float[Array, "N d"]) -> Float[Array, "B d"]:
    """The rows at the indices, times the coefficients, added up in float32.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.params.combine(jnp.array([[0, 2]]), jnp.array([[1.0, 0.5]]), jnp.array([[1.0], [9.0], [4.0]])).tolist()
      [[3.0]]
    """
    return jnp.sum(jnp.take(rows.astype(jnp.float32), indices, axis=0) * coefficients[..., None], axis=1)


def matching_pursuit(targets: Float[Array, "B d"], points: Float[Array, "N d"], k: int, *, floor: float = 1e-8) -> Combination:
    """Orthogonal matching pursuit: k times, take the point most like what is left of the target; then solve for coefficients.

    Points are not normalised in the choice, as the peer's are not: long ones are favoured.

    Args:
      targets: what to write.
      points: what to write it with.
      k: how many points for each target.
      floor: lengths that divide are at least this: a point that lies in the span of those before gets coefficient 0 or so.

    Returns:
      Indices in the order of their choice, and coefficients.

    Law:
      What is left of a target is orthogonal to the points that were chosen.

    Raises:
      ValueError: more points wanted than there are.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.params.matching_pursuit(jnp.array([[1.0, 3.0]]), jnp.eye(2), 2)[0].tolist()
      [[1, 0]]

    Source: Pati, Rezaiifar, Krishnaprasad 1993; Training-free tokenizer transplantation via orthogonal matching pursuit
    (arXiv:2506.06607), mergekit-tokensurgeon's `omp`.
    """
    if not 1 <= k <= points.shape[0]:
        raise ValueError(f"matching_pursuit: k must be between 1 and the number of points, {points.shape[0]}; got {k}.")
    t, p = targets.astype(jnp.float32), points.astype(jnp.float32)

    def one(target):
        def choose(i, state):
            basis, chosen, left = state
            score = jnp.where(jnp.isin(jnp.arange(p.shape[0]), jnp.where(jnp.arange(k) < i, chosen, -1)), -1, jnp.abs(p @ left))
            best = jnp.argmax(score)
            new = p[best]
            for _ in range(2):  # the second projection removes what rounding left of the first
                new = new - basis.T @ (basis @ new)
            basis = basis.at[i].set(new / jnp.maximum(jnp.linalg.norm(new), floor))
            return basis, chosen.at[i].set(best.astype(chosen.dtype)), target - basis.T @ (basis @ target)

        start = (jnp.zeros((k, p.shape[1])), jnp.zeros(k, jnp.int32), target)
        basis, chosen, _ = jax.lax.fori_loop(0, k, choose, start)
        upper = basis @ p[chosen].T  # the points in terms of the basis: upper triangular
        diagonal = jnp.diagonal(upper)
        upper = upper + jnp.diag(jnp.where(jnp.abs(diagonal) < floor, floor, 0))
        return chosen, jax.scipy.linalg.solve_triangular(upper, basis @ target)

    with jax.default_matmul_precision("highest"):
        return jax.vmap(one)(t)


def nearest_points(
    targets: Float[Array, "B d"],
    points: Float[Array, "N d"],
    k: int,
    *,
    metric: Literal["euclidean", "cosine"] = "euclidean",
    weights: Literal["distance", "least_squares"] = "distance",
) -> Combination:
    """The k nearest points, weighted by nearness or by least squares.

    Args:
      targets: what to write.
      points: what to write it with.
      k: how many points for each target.
      metric: "euclidean", or "cosine": 1 minus the cosine.
      weights: "distance" is in proportion to the inverse distance (to the cosine, at metric "cosine"), adding up to 1;
        "least_squares" solves for the smallest error.

    Returns:
      Indices, nearest first, and coefficients.

    Law:
      At weights "distance" a point is written as itself, to 1e-5.

    Raises:
      ValueError: more points wanted than there are; an unknown metric or weighting.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.params.nearest_points(jnp.array([[1.0]]), jnp.array([[0.0], [2.0], [9.0]]), 2)[1].tolist()
      [[0.5, 0.5]]

    Source: mergekit-tokensurgeon's `common_interpolation`.
    """
    if not 1 <= k <= points.shape[0]:
        raise ValueError(f"nearest_points: k must be between 1 and the number of points, {points.shape[0]}; got {k}.")
    if metric not in ("euclidean", "cosine") or weights not in ("distance", "least_squares"):
        raise ValueError(
            f'nearest_points: metric must be "euclidean" or "cosine" and weights "distance" or "least_squares"; got {metric!r} '
            f"and {weights!r}."
        )
    t, p = targets.astype(jnp.float32), points.astype(jnp.float32)
    if metric == "euclidean":
        distance = jnp.sqrt(jnp.maximum(jnp.sum((t[:, None] - p[None]) ** 2, axis=-1), 0))
    else:
        lengths = jnp.linalg.norm(t, axis=1)[:, None] * jnp.linalg.norm(p, axis=1)[None]
        distance = 1 - matmul(t, p.T) / jnp.maximum(lengths, 1e-6)
    near, indices = jax.lax.top_k(-distance, k)
    if weights == "least_squares":
        solve = lambda index, target: jnp.linalg.lstsq(p[index].T, target)[0]
        with jax.default_matmul_precision("highest"):
            return indices, jax.vmap(solve)(indices, t)
    w = 1 / jnp.maximum(-near, 1e-6) if metric == "euclidean" else 1 + near
    return indices, w / jnp.maximum(jnp.sum(w, axis=1, keepdims=True), 1e-6)


def rotate_points(targets: Float[Array, "B d"], points: Float[Array, "N d"], rows: Float[Array, "N e"]) -> Float[Array, "B e"]:
    """Targets in another space: centre both spaces on the shared points, keep min(d, e) principal axes, rotate, move back.

    Args:
      targets: what to write.
      points: shared tokens in the targets' space.
      rows: the same tokens in the space to write to.

    Law:
      Where `rows` are `points`, rotated and moved, the targets are rotated and moved alike. The signs of the axes, which a
      factorisation leaves open, do not matter.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> points = jnp.array([[0.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
      >>> jm.params.rotate_points(jnp.array([[2.0, 1.0]]), points, points[:, ::-1] + 5).round().tolist()
      [[6.0, 7.0]]

    Source: mergekit-tokensurgeon's `landmark_pca`, which multiplies by the transpose of the rotation, so that its result
    depends on the signs that its (random) factorisation happens to choose. Ours follows the law.
    """
    t, a, b = (x.astype(jnp.float32) for x in (targets, points, rows))
    centre, move = jnp.mean(a, axis=0, keepdims=True), jnp.mean(b, axis=0, keepdims=True)
    axes = min(a.shape[1], b.shape[1])
    of, to = (jnp.linalg.svd(x, full_matrices=False)[2][:axes] for x in (a - centre, b - move))
    u, _, v = jnp.linalg.svd(matmul(matmul(a - centre, of.T).T, matmul(b - move, to.T)), full_matrices=False)
    return matmul(matmul(matmul(t - centre, of.T), matmul(u, v)), to) + move
