"""Zonkey's probabilistic attention: the products and conditional probabilities, attention by hand, words in a row, faults."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge import words

B = jax.random.uniform(jax.random.key(0), (2, 9), minval=0.01, maxval=0.9)


def test_existence_is_the_product():
    want = np.cumprod(np.concatenate([np.ones((2, 1)), 1 - B[:, 1:]], axis=1), axis=1)
    np.testing.assert_allclose(np.exp(words.log_existence(B)), want, rtol=1e-5)
    mask = jnp.arange(9)[None] < jnp.array([[9], [5]])
    masked = words.log_existence(B, mask=mask)
    np.testing.assert_array_equal(masked == jm.attention.MASKED, ~mask)
    extreme = jax.grad(lambda b: words.log_existence(b).sum())(jnp.array([[0.0, 1.0, 0.5]]))
    assert bool(jnp.isfinite(extreme).all())


def test_the_bias_is_a_conditional_probability():
    """P(key | query) is 1 for what lies before, the ratio for what lies after; padding is no key."""
    mask = jnp.arange(9)[None] < jnp.array([[9], [5]])
    log_p = words.log_existence(B, mask=mask)
    bias = words.existence_bias(log_p)
    p = np.exp(np.asarray(words.log_existence(B), np.float64))
    ratio = np.where(np.arange(9)[None] > np.arange(9)[:, None], p[:, None, :] / p[:, :, None], 1.0)
    want = np.where(np.asarray(mask)[:, None, :], ratio, 0.0)
    np.testing.assert_allclose(np.exp(bias)[0], want[0], rtol=2e-5)
    np.testing.assert_allclose(np.exp(bias)[1, :5], want[1, :5], rtol=2e-5)
    q, k, v = jax.random.normal(jax.random.key(1), (3, 2, 9, 1, 4))
    got = jax.nn.dot_product_attention(q, k, v, bias=bias[:, None])
    weight = np.exp(np.einsum("bqhd,bkhd->bqk", q, k) / 2) * want
    np.testing.assert_allclose(got[0, :, 0], (weight / weight.sum(-1, keepdims=True) @ v[:, :, 0])[0], atol=1e-5)


def test_words_in_a_row_are_words_alone():
    starts = jnp.array([[1, 0, 0, 1, 0, 0, 0, 1, 0]], bool)
    got = jax.jit(words.word_existence)(B[:1], starts)
    alone = [jax.jit(words.log_existence)(B[:1, i:j]) for i, j in ((0, 3), (3, 7), (7, 9))]
    np.testing.assert_allclose(got, jnp.concatenate(alone, axis=1), atol=1e-6)
    grad = jax.jit(jax.grad(lambda b: words.word_existence(b, starts)[0, 3:7].sum()))(B[:1])
    assert (np.flatnonzero(grad[0]) == [4, 5, 6]).all()


def test_starts_are_drawn_and_cut():
    begins = jnp.full((400, 50), 0.1)
    starts = words.sample_starts(begins, 8, key=jax.random.key(2))
    assert starts[:, 0].all() and words.place_in_word(starts).max() == 7
    drawn = words.sample_starts(begins, 50, key=jax.random.key(2))[:, 1:]
    np.testing.assert_allclose(drawn.mean(), 0.1, atol=5 * 0.3 / np.sqrt(drawn.size))
    likely = words.sample_starts(B, 9, mask=jnp.arange(9)[None] < jnp.array([[9], [5]]))
    np.testing.assert_array_equal(likely[0, 1:], B[0, 1:] > 0.5)
    assert not likely[1, 5:].any()


def test_no_start_probability_by_hand():
    mask = jnp.arange(9)[None] < jnp.array([[9], [5]])
    runs = [np.prod(1 - B[row, s : s + 3]) for row, n in ((0, 9), (1, 5)) for s in range(n - 3)]
    np.testing.assert_allclose(words.no_start_probability(B, 3, mask=mask), np.mean(runs), rtol=1e-5)
    assert words.no_start_probability(B, 9) == 0


def test_bad_arguments(unchecked):
    with pytest.raises(ValueError, match="length must be 1 or more, got 0"):
        words.no_start_probability(B, 0)
    with pytest.raises(ValueError, match="longest must be 1 or more"):
        words.sample_starts(B, 0)
