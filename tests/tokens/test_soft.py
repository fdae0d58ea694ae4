"""Soft plans: many-to-many transforms and their limits, soft gathering, attention over frames; gradients, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.tokens import frame_attention, keep_top_k, nearest, saliency_gather, soft_gather, token_transform

B, N, D, M = 3, 16, 8, 5


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (B, N, D))


@pytest.fixture(scope="module")
def centers(x):
    return keep_top_k(x.sum(-1), M)


def slope_agrees(loss, at, seed=0, h=1e-2):
    grad = jax.grad(loss)(at)
    assert jnp.isfinite(grad).all()
    v = jax.random.normal(jax.random.key(seed), jnp.shape(at))
    np.testing.assert_allclose((loss(at + h * v) - loss(at - h * v)) / (2 * h), jnp.vdot(grad, v), rtol=2e-2, atol=1e-3)


# --- Token Transforming


@pytest.mark.parametrize("over", ["centers", "tokens"])
def test_equals_the_equation(x, centers, over):
    plan = token_transform(x, centers, temperature=0.2, over=over)
    for row, ids, got in zip(np.asarray(x, np.float64), np.asarray(centers.segment_ids), plan.weights, strict=True):
        u = row / np.linalg.norm(row, axis=1, keepdims=True)
        e = np.exp(u[ids >= 0] @ u.T / 0.2)
        np.testing.assert_allclose(got, e / e.sum(0 if over == "centers" else 1, keepdims=True), rtol=1e-5)


def test_mass_is_shared_out(x, centers):
    plan = token_transform(x, centers)
    np.testing.assert_allclose(plan.weights.sum(-2), 1, rtol=1e-6)
    np.testing.assert_allclose(plan.sizes.sum(-1), N, rtol=1e-6)
    np.testing.assert_allclose(token_transform(x, centers, over="tokens").sizes, 1, rtol=1e-6)


def test_cold_it_is_merging_or_pruning(x, centers):
    best = jax.vmap(lambda c, x: nearest(x, jm.merge(jm.Plan(c, M), x, reduce="first")).index)(centers.segment_ids, x)
    hard = token_transform(x, centers, temperature=1e-4)
    np.testing.assert_allclose(hard.weights, jm.Plan(best, M).matrix, atol=1e-6)
    np.testing.assert_allclose(jm.merge(hard, x), jm.merge(jm.Plan(best, M), x), rtol=1e-5, atol=1e-5)
    pruned = token_transform(x, centers, temperature=1e-4, over="tokens")
    np.testing.assert_allclose(pruned.weights, centers.matrix, atol=1e-6)


@pytest.mark.parametrize("over", ["centers", "tokens"])
def test_hot_it_is_the_mean(x, centers, over):
    y = jm.merge(token_transform(x, centers, temperature=1e6, over=over), x)
    np.testing.assert_allclose(y, np.tile(x.mean(1, keepdims=True), (1, M, 1)), atol=1e-5)


def test_empty_centres_and_broken_tokens(x):
    few = jm.Plan(jnp.where(jnp.arange(N) < 2, jnp.arange(N), -1), 4)
    for over in ("centers", "tokens"):
        plan = token_transform(x[0].at[3].set(0).at[5].set(jnp.nan), few, over=over)
        assert jnp.isfinite(plan.weights).all() and (plan.weights[2:] == 0).all()
    grad = jax.grad(lambda x: jnp.sum(jm.merge(token_transform(x, few), jnp.ones((N, 2)) * jnp.arange(N)[:, None])))(
        x[0].at[3].set(0)
    )
    assert jnp.isfinite(grad).all()


@pytest.mark.parametrize("over", ["centers", "tokens"])
def test_gradients_flow_through_likeness(x, centers, over):
    loss = lambda m: jnp.sum(jnp.sin(jm.merge(token_transform(m, centers, temperature=0.5, over=over), x)))
    slope_agrees(loss, x)
    by_temperature = lambda t: jnp.sum(jnp.sin(jm.merge(token_transform(x, centers, temperature=t, over=over), x)))
    slope_agrees(by_temperature, jnp.float32(0.5))


# --- Isomer's gathering


def test_gathering_is_a_softmax_over_the_side(x):
    logits = jax.random.normal(jax.random.key(1), (2, B, M, N))
    heat = jax.nn.sigmoid(x[..., 0])
    plan = saliency_gather(logits[0], logits[1], heat, threshold=0.6)
    for side, mask in ((0, np.asarray(heat) >= 0.6), (1, np.asarray(heat) < 0.4)):
        e = np.exp(np.asarray(logits[side], np.float64)) * mask[:, None, :]
        rows = np.asarray(plan.weights)[:, side * M : (side + 1) * M]
        np.testing.assert_allclose(rows, e / e.sum(-1, keepdims=True), rtol=1e-5, atol=1e-7)
    scattered = jm.unmerge(plan, jnp.ones((B, 2 * M)))
    neither = (np.asarray(heat) >= 0.4) & (np.asarray(heat) < 0.6)
    assert (np.asarray(scattered)[neither] == 0).all() and (np.asarray(scattered)[~neither] > 0).all()


def test_an_empty_side_gathers_nothing():
    plan = soft_gather(jnp.ones((2, 4)), jnp.zeros(4, bool))
    assert (plan.weights == 0).all() and (jm.merge(plan, jnp.ones(4)) == 0).all()


def test_gradients_flow_through_gathering(x):
    mask = x[..., 0] > 0
    loss = lambda logits: jnp.sum(jnp.sin(jm.merge(soft_gather(logits, mask, temperature=0.7), x)))
    slope_agrees(loss, jax.random.normal(jax.random.key(1), (B, M, N)))


# --- SimVLG's frames


def test_frames_take_in_frames():
    """`TemporalTokenMerge`: values are the tokens, head by head; logits over sqrt of the whole hidden width."""
    frames, places, width, heads, hidden = 4, 6, 8, 2, 4
    rng = np.random.default_rng(0)
    x = rng.standard_normal((B, frames, places, width)).astype(np.float32)
    query, key = rng.standard_normal((2, width, hidden)).astype(np.float32)
    by_head = lambda a: a.reshape(B, frames, places, heads, -1).transpose(0, 2, 3, 1, 4)  # batch, place, head, frame
    plan = frame_attention(by_head(x @ query), by_head(x @ key), alpha=0.3, scale=hidden**-0.5)
    y = jm.merge(plan, by_head(x), reduce="sum").transpose(0, 3, 1, 2, 4).reshape(x.shape)
    want = np.zeros_like(x)
    for b, p, h in np.ndindex(B, places, heads):
        d, v = slice(h * 2, h * 2 + 2), slice(h * 4, h * 4 + 4)
        attention = jax.nn.softmax((x[b, :, p] @ query)[:, d] @ (x[b, :, p] @ key)[:, d].T / 2)
        want[b, :, p, v] = x[b, :, p, v] + 0.3 * np.asarray(attention) @ x[b, :, p, v]
    np.testing.assert_allclose(y, want, rtol=0, atol=2e-5)
    mean = jm.SoftPlan(jnp.full((B, places, heads, 1, frames), 1 / frames))
    one = jm.merge(jm.compose(mean, plan), by_head(x), reduce="sum")
    np.testing.assert_allclose(one[..., 0, :].reshape(B, places, width), want.mean(1), rtol=0, atol=2e-5)


def test_at_the_start_frames_stay(x):
    np.testing.assert_array_equal(frame_attention(x, x, alpha=0.0).weights, np.tile(np.eye(N), (B, 1, 1)))
    slope_agrees(lambda q: jnp.sum(jnp.sin(jm.merge(frame_attention(q, x, alpha=0.5), x, reduce="sum"))), x)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: token_transform(x, jm.identity(4)), r"over \(3, 16\) tokens, got \(4,\)"),
        (lambda x: token_transform(x[0], jm.identity(N), over="rows"), '"centers" or "tokens", got \'rows\''),
        (lambda x: soft_gather(x, jnp.ones(N, bool)), r"mask must have shape \(3, 8\), got \(16,\)"),
        (lambda x: frame_attention(x, x[:, :4]), r"one shape \(\*batch, frames, d\)"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input(x, call, message):
    with pytest.raises(ValueError, match=message):
        call(x)
