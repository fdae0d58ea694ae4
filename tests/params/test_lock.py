"""Matrices that cancel in attention: what the layer computes stays, what merges does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge import params
from jaxmerge.virtual import rotary
from tests.rounding import EPS, assert_within, backward


def attention(w, x, heads, kv_heads, *, turn=lambda q: q, normalise=lambda q: q):
    """Grouped queries, biases, rotary positions and normalised queries and keys, as far as they are there."""
    project = lambda m, b, h: (x @ m.T + (0 if b is None else b[None])).reshape(len(x), h, -1)
    q, k, v = project(w.q, w.q_bias, heads), project(w.k, w.k_bias, kv_heads), project(w.v, w.v_bias, kv_heads)
    q, k = turn(normalise(q)), turn(normalise(k))
    k, v = (jnp.repeat(m, heads // kv_heads, axis=1) for m in (k, v))
    p = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1]))
    return jnp.einsum("hqk,khd->qhd", p, v).reshape(len(x), -1) @ w.o.T


def layer(rng, heads=4, kv_heads=2, d=4, width=6):
    make = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    sizes = (heads * d, kv_heads * d, kv_heads * d)
    return params.Attention(*(make(n, width) for n in sizes), make(width, heads * d), *(make(n) for n in sizes)), make(5, width)


@pytest.mark.parametrize(
    "pairs", [pytest.param(None, marks=pytest.mark.slow), "half", pytest.param("interleaved", marks=pytest.mark.slow)]
)
def test_biases_and_rotary_positions(pairs):
    weights, x = layer(np.random.default_rng(0))
    positions = jnp.arange(5) * 3.0
    turn = (lambda q: q) if pairs is None else lambda q: rotary(q, positions, interleaved=pairs == "interleaved")
    p, r = params.lock_matrices(jax.random.key(1), 2, 4, rotary=pairs)
    locked = params.lock(weights, p, r)
    run = jax.jit(lambda w: attention(w, x, 4, 2, turn=turn))
    np.testing.assert_allclose(run(locked), run(weights), rtol=1e-4, atol=1e-4)
    for name, w in locked._asdict().items():
        assert float(jnp.abs(w - getattr(weights, name)).max()) > 0.1, name
    assert params.lock_suspicion([weights, locked], kv_heads=2)[0, 1] > 0.2
    assert (np.linalg.cond(p) <= np.e**2 + 1e-3).all() and (np.linalg.cond(r) <= np.e**2 + 1e-3).all()


def test_a_matrix_that_does_not_commute_is_no_lock_under_rotary_positions():
    weights, x = layer(np.random.default_rng(0))
    turn = lambda q: rotary(q, jnp.arange(5) * 3.0)
    wrong = params.lock(weights, *params.lock_matrices(jax.random.key(1), 2, 4, rotary="interleaved"))
    run = lambda w: attention(w, x, 4, 2, turn=turn)
    assert float(jnp.abs(run(wrong) - run(weights)).max()) > 0.1


def test_normalised_queries_and_keys_are_left_alone():
    weights, x = layer(np.random.default_rng(0))
    scale = jnp.array([1.0, 2.0, 0.5, 3.0])[None, None]
    normalise = lambda q: scale * q / jnp.sqrt(jnp.mean(q * q, axis=-1, keepdims=True) + 1e-6)
    p, r = params.lock_matrices(jax.random.key(1), 2, 4)
    run = lambda w: attention(w, x, 4, 2, normalise=normalise)
    locked = params.lock(weights, None, r)
    np.testing.assert_allclose(run(locked), run(weights), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(locked.q, weights.q)
    assert float(jnp.abs(run(params.lock(weights, p, r)) - run(weights)).max()) > 0.1


def test_mergelock_equals_its_equations(golden):
    v = {k: jnp.asarray(x) for k, x in golden("params/mergelock_a").items()}
    weights = params.Attention(*(v[f"in/W{n}"] for n in "qkvo"))
    locked = params.lock(weights, v["aux/P"], v["aux/R"])
    for n, w in zip("qkvo", locked, strict=False):
        condition = max(np.linalg.cond(v["aux/R" if n in "vo" else "aux/P"]))
        assert_within(w, v[f"out/W{n}"], 2 * 4 * EPS * condition * np.abs(v[f"in/W{n}"]).max(), n)  # sums of 4, on both sides
    run = jax.jit(lambda weights: attention(weights, v["in/x"], 2, 2))
    assert_within(run(locked), v["out/y"], backward(run, locked))


@pytest.mark.parametrize("transpose", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_locks_with_grouped_queries_are_seen(transpose):
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    weights = params.Attention(make(8, 6), make(4, 6), make(4, 6), make(6, 8))
    near = params.Attention(*(w + 0.05 * make(*w.shape) for w in weights[:4]))
    locked = params.lock(weights, make(2, 2, 2), make(2, 2, 2), transpose=transpose)
    x = make(5, 6)
    np.testing.assert_allclose(attention(weights, x, 4, 2), attention(locked, x, 4, 2), rtol=1e-3, atol=1e-4)
    suspicion = params.lock_suspicion([weights, near, locked], kv_heads=2)
    assert suspicion[0, 1] < 0.05 and suspicion[0, 2] > 0.4 and suspicion[1, 2] > 0.4, suspicion


def test_wrong_locks(unchecked):
    weights = params.Attention(*(jnp.eye(4) for _ in range(4)))
    with pytest.raises(ValueError, match="one per key and value head"):
        params.lock(weights, jnp.eye(3)[None], jnp.eye(3)[None])
    for options in (dict(d=3, rotary="half"), dict(d=4, rotary="pairs")):
        with pytest.raises(ValueError, match="rotary must be None"):
            params.lock_matrices(jax.random.key(0), 1, **options)
