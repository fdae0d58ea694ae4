"""DyVTE's router: the official computation in numpy, its targets, and that it learns them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmerge.tokens import exit_layer
from models.reducers.dyvte import ExitRouter, may_exit, text_state


def test_equals_the_official_router():
    """One row: [mean of the question but its last token, its last token] -> linear, GELU, linear, without biases."""
    rng = np.random.default_rng(0)
    x, router = rng.standard_normal((2, 9, 6)).astype(np.float32), ExitRouter(6, hidden=10, rngs=nnx.Rngs(0))
    text = np.zeros((2, 9), bool)
    text[0, 4:], text[1, 4:8] = True, True  # the second row is padded by one
    want = []
    for row, last in ((0, 8), (1, 7)):
        state = np.concatenate([x[row, 4:last].mean(0), x[row, last]])
        hidden = np.asarray(jax.nn.gelu(state @ np.asarray(router.w1.kernel[...]), approximate=False))
        want.append(hidden @ np.asarray(router.w2.kernel[...]))
    np.testing.assert_allclose(router(text_state(x, jnp.asarray(text))), want, rtol=0, atol=1e-5)


def test_short_questions_have_a_state():
    x = jnp.ones((2, 3, 2))
    text = jnp.array([[False, False, True], [False, False, False]])
    np.testing.assert_array_equal(text_state(x, text), [[0, 0, 1, 1], [0, 0, 0, 0]])


def test_targets_equal_the_official_rule():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 4, (40, 6))
    labels[:, 4:] = -100
    labels[0] = -100
    full = (rng.standard_normal((40, 6, 4)) + 3 * np.eye(4)[np.maximum(labels, 0)]).astype(np.float32)
    less = (full + 0.3 * rng.standard_normal(full.shape)).astype(np.float32)
    want = []
    for a, b, y in zip(full, less, labels, strict=True):
        at = np.flatnonzero(y >= 0)
        nll = [-np.asarray(jax.nn.log_softmax(z))[at, y[at]].mean() if len(at) else 0 for z in (a, b)]
        same = (a.argmax(-1) == b.argmax(-1))[at].mean() if len(at) else 1
        want.append(int(same > 0.99 and (nll[1] < nll[0] * 1.03 or not len(at))))
    np.testing.assert_array_equal(may_exit(jnp.asarray(full), jnp.asarray(less), jnp.asarray(labels)), want)
    assert want[0] == 1 and 5 < sum(want) < 35


def test_a_router_learns_its_targets():
    """No gradient reaches the language model; the router itself learns when the sign of a feature says exit."""
    router = ExitRouter(4, hidden=16, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (64, 5, 4))
    text = jnp.ones((64, 5), bool)
    target = (x[:, -1, 0] > 0).astype(int)

    def loss(router, x):
        logits = jax.nn.log_softmax(router(text_state(x, text)))
        return -jnp.take_along_axis(logits, target[:, None], axis=-1).mean()

    @nnx.jit
    def step(router, x):
        grads = nnx.grad(loss)(router, x)
        nnx.update(router, jax.tree.map(lambda p, g: p - 0.5 * g, nnx.state(router, nnx.Param), grads))

    for _ in range(60):
        step(router, x)
    says = exit_layer(router(text_state(x, text))[:, None])  # one layer: 0 exits, 1 stays
    assert (says == 1 - target).mean() > 0.9
    assert (jax.grad(lambda x: loss(router, x))(x) == 0).all()


@pytest.mark.parametrize("shape", [(2, 3, 4, 2), (5, 2)])
def test_routers_decide_per_row(shape):
    logits = jnp.zeros(shape).at[..., -1, 1].set(1.0)
    np.testing.assert_array_equal(exit_layer(logits), jnp.full(shape[:-2], shape[-2] - 1))
