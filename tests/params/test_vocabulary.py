"""Embeddings of tokens that a model lacks, against the peer, and against least squares."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge import params
from tests.rounding import assert_within, backward


def load(golden, case):
    return {k: jnp.asarray(v) for k, v in golden(f"params/tokensurgeon_{case}_a").items()}


@pytest.mark.parametrize(("case", "write"), [("omp", params.matching_pursuit), ("common_interpolation", params.nearest_points)])
def test_equals_the_peer(golden, case, write):
    v = load(golden, case)
    inputs = [v["in/targets_donor"], v["in/shared_donor"], v["in/shared_base"]]

    @jax.jit
    def run(inputs):
        indices, coefficients = write(*inputs[:2], 6)
        return {
            "indices": indices,
            "coefficients": coefficients,
            "new_embeddings": params.combine(indices, coefficients, inputs[2]),
        }

    found, bounds = run(inputs), backward(run, inputs)
    for name in found:
        assert_within(found[name], v[f"out/{name}"], bounds[name], name)


def test_the_peers_rotation_is_one_of_many():
    """The transposed rotation: flipping the sign of a principal axis, which is free, changes it; ours stays."""
    rng = np.random.default_rng(0)
    points, rows, targets = (rng.standard_normal(s).astype(np.float32) for s in ((40, 3), (40, 4), (5, 3)))
    a, b = points - points.mean(0), rows - rows.mean(0)
    of, to = np.linalg.svd(a)[2][:3].T, np.linalg.svd(b)[2][:3].T
    ours, theirs = [], []
    for signs in itertools.product([1, -1], repeat=3):
        u, _, v = np.linalg.svd((a @ (of * signs)).T @ (b @ to))
        at = lambda r, signs=signs: (targets - points.mean(0)) @ (of * signs) @ r @ to.T + rows.mean(0)
        ours.append(at(u @ v))
        theirs.append(at((u @ v).T))
    got = params.rotate_points(jnp.asarray(targets), jnp.asarray(points), jnp.asarray(rows))
    np.testing.assert_allclose(np.stack(ours), np.broadcast_to(got, (8, 5, 4)), rtol=1e-4, atol=1e-4)
    assert np.ptp(np.stack(theirs), axis=0).max() > 0.5


def test_ours_writes_shared_tokens_better_than_the_peers_rotation(golden):
    """On the peer's own vectors: its targets are images of no rotation that maps the shared tokens well."""
    v = {k: np.asarray(x, np.float64) for k, x in load(golden, "landmark_pca").items()}
    back = lambda t: np.asarray(
        params.rotate_points(*(jnp.asarray(x, jnp.float32) for x in (t, v["in/shared_donor"], v["in/shared_base"])))
    )
    error = np.abs(back(v["in/shared_donor"]) - v["in/shared_base"]).mean()
    centred = v["in/targets_donor"] - v["in/shared_donor"].mean(0)
    linear = np.linalg.lstsq(centred, v["out/new_embeddings"] - v["in/shared_base"].mean(0), rcond=None)[0]
    shared = v["in/shared_donor"] - v["in/shared_donor"].mean(0)
    assert error < 0.5 * np.abs(shared @ linear + v["in/shared_base"].mean(0) - v["in/shared_base"]).mean()


def test_a_rotation_is_found():
    rng = np.random.default_rng(0)
    points, targets = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((20, 4), (3, 4)))
    turn = jnp.asarray(np.linalg.qr(rng.standard_normal((4, 4)))[0], jnp.float32)
    got = params.rotate_points(targets, points, points @ turn + 3)
    np.testing.assert_allclose(got, targets @ turn + 3, rtol=1e-4, atol=1e-4)


def test_what_is_left_is_orthogonal_and_duplicates_do_no_harm():
    rng = np.random.default_rng(1)
    points, targets = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((10, 6), (3, 6)))
    indices, c = params.matching_pursuit(targets, points, 4)
    left = targets - params.combine(indices, c, points)
    np.testing.assert_allclose(jnp.einsum("bkd,bd->bk", points[indices], left), 0, atol=1e-4)
    twice = jnp.concatenate([points[:2], points[:2]])
    indices, c = params.matching_pursuit(targets, twice, 4)
    assert np.isfinite(c).all() and all(len(set(row)) == 4 for row in indices.tolist())
    indices, c = params.nearest_points(points[:3], points, 1)
    assert indices[:, 0].tolist() == [0, 1, 2] and c.tolist() == [[1], [1], [1]]


def test_weightings():
    rng = np.random.default_rng(1)
    points, targets = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((10, 3), (4, 3)))
    indices, c = params.nearest_points(targets, points, 3, weights="least_squares")
    np.testing.assert_allclose(params.combine(indices, c, points), targets, rtol=1e-3, atol=1e-3)  # three points span the space
    indices, c = params.nearest_points(targets, points, 2, metric="cosine")
    unit = lambda x: np.asarray(x) / np.linalg.norm(x, axis=1, keepdims=True)
    cos = unit(targets) @ unit(points).T
    np.testing.assert_array_equal(indices, np.argsort(-cos, axis=1)[:, :2])
    np.testing.assert_allclose(c.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: params.matching_pursuit(x, x, 3), "k must be between 1 and the number of points, 2"),
        (lambda x: params.nearest_points(x, x, 0), "k must be between 1 and the number of points, 2"),
        (lambda x: params.nearest_points(x, x, 1, metric="manhattan"), "metric must be"),
    ],
)
def test_wrong_arguments(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.eye(2))
