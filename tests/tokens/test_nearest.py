"""Who is nearest and who is highest: the rule again in numpy, ties, masks, and many queries in rounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge._kernels.match import ref
from jaxmerge._rank import highest, ranks

B, N, M, D = 2, 11, 7, 4


@pytest.fixture(params=["at once", "in rounds"])
def sides(request, monkeypatch):
    """Queries and keys with ties (small integers), a query and a key without a direction."""
    if request.param == "in rounds":
        monkeypatch.setattr(ref, "AT_ONCE", 4)
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-1, 2, (B, n, D)).astype(np.float32) for n in (N, M))
    a[:, 2], b[:, 3] = 0, 0
    return a, b


@pytest.mark.parametrize("masked", [False, True])
def test_nearest_is_the_first_of_the_largest_cosines(sides, masked):
    a, b = sides
    mask = np.random.default_rng(1).random((N, M)) < 0.6
    mask[4] = False
    got = jax.jit(lambda a, b: jm.tokens.nearest(a, b, mask=mask if masked else None))(a, b)
    score = np.asarray(ref.cosine(jnp.asarray(a), jnp.asarray(b)))
    score = np.where(mask, score, -np.inf) if masked else score
    np.testing.assert_array_equal(got.similarity, score.max(-1))
    np.testing.assert_array_equal(got.index, score.argmax(-1))
    if masked:
        assert (got.similarity[:, 4] == -np.inf).all() and (got.index[:, 4] == 0).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_highest_are_those_of_the_lowest_ranks(dtype):
    rng = np.random.default_rng(0)
    for score in (
        rng.standard_normal((B, 37)),
        rng.integers(-2, 3, (B, 37)) * 0.5,
        rng.choice([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, 1.0], (B, 37)),
    ):
        score = jnp.asarray(score, dtype)
        for k in (0, 1, 20, 37):
            np.testing.assert_array_equal(highest(score, k), ranks(score) < k)
