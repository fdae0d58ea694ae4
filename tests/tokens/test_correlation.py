"""TokenCorrCompressor: redundancy and budget by the rule, the draw without replacement, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge.tokens import keep_top_k, redundant, sample_by_correlation

B, N, D = 3, 21, 8


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (B, N, D))


@pytest.fixture(scope="module")
def score():
    return jax.nn.softmax(jax.random.normal(jax.random.key(1), (B, N)))


@pytest.mark.parametrize("threshold, repeats", [(0.3, 1), (0.3, 4), (0.6, 1)])
def test_equals_the_rule(x, score, threshold, repeats):
    unit = np.asarray(x) / np.linalg.norm(x, axis=-1, keepdims=True)
    alike = np.einsum("bid,bjd->bij", unit, unit) > threshold
    want = alike.sum(-1) - 1 >= repeats
    np.testing.assert_array_equal(redundant(x, threshold=threshold, repeats=repeats), want)
    plan = sample_by_correlation(score, x, 12, threshold=threshold, repeats=repeats, at_least=3)
    for b in range(B):
        budget = min(max((~want[b]).sum(), 3), 12)
        assert set(np.flatnonzero(plan.kept[b])) == set(np.argsort(-np.asarray(score[b]))[:budget].tolist())


def test_a_blank_page_needs_one_token_and_noise_needs_all(score):
    blank = sample_by_correlation(score, jnp.ones((B, N, D)), N)
    np.testing.assert_array_equal(blank.sizes.sum(-1), 1)
    full = sample_by_correlation(score[:, :D], jnp.broadcast_to(jnp.eye(D), (B, D, D)), D)
    np.testing.assert_array_equal(full.segment_ids, jnp.broadcast_to(jnp.arange(D), (B, D)))


def test_a_fixed_number_is_keep_top_k(x, score):
    plan = sample_by_correlation(score, x, 6, at_least=6)
    np.testing.assert_array_equal(plan.segment_ids, keep_top_k(score, 6).segment_ids)


def test_draws_in_proportion_and_never_what_has_no_chance():
    score = jnp.array([4.0, 2.0, 1.0, 1.0, 0.0, jnp.nan])
    rows = jnp.broadcast_to(score, (4000, 6))
    draw = jax.jit(lambda key: sample_by_correlation(rows, jnp.ones((4000, 6, 2)), 1, key=key).kept)
    frequency = np.asarray(draw(jax.random.key(0))).mean(0)
    chance = np.array([0.5, 0.25, 0.125, 0.125, 0, 0])
    # five standard deviations of a binomial
    assert (abs(frequency - chance) <= 5 * np.sqrt(chance * (1 - chance) / 4000)).all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, s: redundant(x, repeats=0), r"repeats of 1 or more; got \(3, 21, 8\), 0"),
        (lambda x, s: sample_by_correlation(s[:, :4], x, 3), r"got \(3, 4\), \(3, 21, 8\)"),
        (lambda x, s: sample_by_correlation(s, x, 22), "capacity <= n=21; got at_least=1, capacity=22"),
        (lambda x, s: sample_by_correlation(s, x, 3, at_least=4), "got at_least=4, capacity=3"),
    ],
)
def test_bad_input(call, message, x, score, unchecked):
    with pytest.raises(ValueError, match=message):
        call(x, score)
