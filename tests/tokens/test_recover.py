"""Recoverable Compression: outlier factors against scikit-learn and the rule, the recovery written down again, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.tokens import assign, local_outlier_factor, recover

B, N, D = 3, 48, 8


@pytest.fixture(scope="module")
def scores():
    """Attention and text similarity with a heavy tail, as in trained encoders."""
    return tuple(jnp.exp(2 * jax.random.normal(jax.random.key(i), (B, N))) for i in (0, 1))


@pytest.fixture(scope="module")
def metric():
    return jax.random.normal(jax.random.key(2), (B, N, D))


def factors(points, k):
    """The SIGMOD 2000 paper's rule, with exactly k neighbours."""
    p = np.asarray(points, np.float64)
    away = np.sqrt(((p[:, None] - p[None]) ** 2).sum(-1))
    np.fill_diagonal(away, np.inf)
    k = min(k, len(p) - 1)
    near = np.argsort(away, axis=1, kind="stable")[:, :k]
    radius = np.take_along_axis(away, near, 1).max(1)
    reach = np.maximum(np.take_along_axis(away, near, 1), radius[near])
    density = 1 / (reach.mean(1) + 1e-10)
    return density[near].mean(1) / density


@pytest.mark.parametrize("k", [1, 5, 20, 100])
@pytest.mark.parametrize("d", [1, 3])
def test_factors_equal_the_rule(k, d):
    points = np.random.default_rng(k).standard_normal((B, N, d)).astype(np.float32)
    want = np.stack([factors(row, k) for row in points])
    np.testing.assert_allclose(local_outlier_factor(points, k), want, rtol=1e-4)


def test_factors_equal_scikit_learn(scores):
    neighbors = pytest.importorskip("sklearn.neighbors")
    for row, ours in zip(np.asarray(scores[0]), jax.jit(local_outlier_factor)(scores[0][..., None]), strict=True):
        lof = neighbors.LocalOutlierFactor(n_neighbors=20)
        outliers = lof.fit_predict(row[:, None].astype(np.float64)) == -1
        np.testing.assert_allclose(ours, -lof.negative_outlier_factor_, rtol=1e-4)
        np.testing.assert_array_equal(ours > 1.5, outliers)
        assert outliers.any()


def test_a_mask_hides_points(scores):
    points = scores[0][..., None]
    mask = jnp.ones((B, N), bool).at[:, 30:].set(False)
    hidden = local_outlier_factor(points, 5, mask=mask)
    np.testing.assert_allclose(hidden[:, :30], local_outlier_factor(points[:, :30], 5), rtol=1e-6)
    np.testing.assert_array_equal(hidden[:, 30:], 1)


@pytest.mark.parametrize("value", [0.0, jnp.nan, jnp.inf])
def test_no_value_breaks_a_factor(value):
    np.testing.assert_array_equal(local_outlier_factor(jnp.full((6, 1), value), 3), 1)  # twins: densities of 1e10, alike
    assert jnp.isfinite(local_outlier_factor(jnp.arange(6.0)[:, None].at[2].set(value), 3)).all()
    np.testing.assert_array_equal(local_outlier_factor(jnp.ones((1, 1)), 3), 1)


def counts(score, text, k):
    """How many the official code keeps and recovers of one row, and which."""
    n = len(score)
    kept = np.argsort(-score, kind="stable")[: (factors(score[:, None], k) > 1.5).sum()]
    text = text.copy()
    text[kept] = text.min()
    share = (factors(text[:, None], k) > 1.5).sum()
    asked = [i for i in np.argsort(-text, kind="stable") if i not in kept][: (n - len(kept)) * share // n]
    return set(kept.tolist()), set(int(i) for i in asked)


@pytest.mark.parametrize("k", [4, 20])
def test_equals_the_rule(scores, metric, k):
    plan = jax.jit(lambda *args: recover(*args, N, neighbours=k))(*scores, metric)
    for b in range(B):
        kept, asked = counts(*(np.asarray(s[b]) for s in scores), k)
        assert asked and kept
        stay = np.isin(np.arange(N), [*(kept | asked)])
        want = assign(metric[b], jnp.asarray(stay), N)
        np.testing.assert_array_equal(plan.segment_ids[b], want.segment_ids)


def test_no_room_drops_the_recovered_first_and_the_lowest_first(scores, metric):
    kept, asked = counts(np.asarray(scores[0][0]), np.asarray(scores[1][0]), 20)
    for capacity in (len(kept) + 1, len(kept) - 1):
        nothing = lambda x, mask: jm.Plan(jnp.full_like(x[..., 0], -1, jnp.int32), 0)
        plan = jax.jit(lambda *args: recover(*args, capacity, rest=nothing))(*scores, metric)  # noqa: B023
        order = [*sorted(kept, key=lambda i: -scores[0][0, i]), *sorted(asked, key=lambda i: -scores[1][0, i])]
        assert set(np.flatnonzero(plan.kept[0]).tolist()) == set(order[:capacity])
        assert (plan.overflow == 0).all()


def test_the_rest_may_have_its_own_planner(scores, metric):
    """Here: left and right half. Kept tokens are alone, whatever that plan says about them."""
    halves = lambda x, mask: jm.Plan(jnp.where(jnp.arange(N)[None] < N // 2, 0, 1) * jnp.ones_like(mask, jnp.int32), 2)
    plan = recover(*scores, metric, 30, rest=halves)
    assert plan.num_segments == 32
    assert (np.asarray(plan.sizes[:, :30]) <= 1).all()
    np.testing.assert_array_equal(plan.sizes.sum(-1), N)
    alone = np.asarray(plan.segment_ids) < 30
    np.testing.assert_array_equal(plan.sizes[:, 30], (~alone)[:, : N // 2].sum(-1))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda s, x: recover(s, s[:, :4], x, 3), r"got \(3, 48\), \(3, 4\) and \(3, 48, 8\)"),
        (lambda s, x: recover(s, s, x, 49), "between 0 and the number of tokens, 48; got 49"),
        (lambda s, x: recover(s, s, x, 3, rest=lambda x, mask: jm.identity(4)), r"plan of shape \(3, 48\), got \(4,\)"),
        (lambda s, x: local_outlier_factor(s, 0), "k=0"),
    ],
)
def test_bad_input(call, message, scores, metric, unchecked):
    with pytest.raises(ValueError, match=message):
        call(scores[0], metric)
