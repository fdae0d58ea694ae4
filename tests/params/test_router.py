"""The router by its equations, and at its work: tasks told apart, twins served."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmerge import params
from jaxmerge.params.learned._router import _forward

RNG = np.random.default_rng(0)
CENTRES = RNG.standard_normal((3, 6)).astype(np.float32)


def inputs(n, noise=0.4):
    labels = RNG.integers(0, 3, n)
    return jnp.asarray(CENTRES[labels] + noise * RNG.standard_normal((n, 6)), jnp.float32), jnp.asarray(labels)


def test_normalisation_by_hand():
    """In training the hidden units of a batch have mean 0 and variance 1 before the rectifier; then the running averages."""
    router = params.init_router(jax.random.key(1), 6, 3, hidden=(5,))
    x, _ = inputs(9)
    logits, (means, variances) = _forward(router, x, jax.random.key(0), 0.0)
    y = np.asarray(x, np.float64) @ np.asarray(router.kernels[0]) + np.asarray(router.biases[0])
    z = (y - y.mean(0)) / np.sqrt(y.var(0) + 1e-5)
    expected = np.where(z > 0, z, 0.01 * z) @ np.asarray(router.kernels[1]) + np.asarray(router.biases[1])
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(means[0], 0.1 * y.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(variances[0], 0.9 + 0.1 * y.var(0, ddof=1), rtol=1e-4)


def test_tells_tasks_apart_and_serves_the_right_twin():
    x, labels = inputs(200)
    held_out = inputs(100)
    router = params.init_router(jax.random.key(0), 6, 3, hidden=(12,))
    found, losses = params.fit_router(
        router, x, labels, optimizer=optax.adamw(5e-3), key=jax.random.key(1), epochs=20, batch=64, held_out=held_out
    )
    assert losses.shape == (20,) and losses[-1] < losses[0] / 2
    assert jnp.mean(jnp.argmax(params.route(found, held_out[0]), axis=1) == held_out[1]) > 0.85
    shared, own = params.twin_split({"w": jnp.asarray(RNG.standard_normal((3, 4, 4)), jnp.float32)}, density=1.0)
    weights = jax.nn.softmax(params.route(found, jnp.asarray(CENTRES)))
    served = jax.vmap(lambda w: params.twin_serve(shared, own, w))(weights)["w"]
    np.testing.assert_allclose(
        served[:, 0], shared["w"] + jnp.einsum("bk,kij->bij", weights, params.dense(own)["w"]), atol=1e-5
    )


@pytest.mark.slow
def test_the_best_epoch_is_kept():
    """No epoch that was passed over tells more of the held-out inputs right; without them it is the last."""
    x, labels = inputs(60, noise=1.5)
    held_out = inputs(50, noise=1.5)
    router = params.init_router(jax.random.key(0), 6, 3, hidden=(12,))
    fit = lambda n, **options: params.fit_router(
        router, x, labels, optimizer=optax.adamw(2e-2), key=jax.random.key(1), epochs=n, batch=20, **options
    )[0]
    right = lambda r: float(jnp.mean(jnp.argmax(params.route(r, held_out[0]), axis=1) == held_out[1]))
    assert right(fit(30, held_out=held_out)) >= right(fit(30))


def test_wrong_arguments(unchecked):
    router = params.init_router(jax.random.key(0), 6, 3)
    x, labels = inputs(8)
    for options in (dict(epochs=0), dict(dropout=1.0)):
        with pytest.raises(ValueError, match="one epoch or more"):
            params.fit_router(router, x, labels, optimizer=optax.sgd(1.0), key=jax.random.key(0), **options)
    with pytest.raises(ValueError, match="a label for each of the 8 inputs"):
        params.fit_router(router, x, labels[:4], optimizer=optax.sgd(1.0), key=jax.random.key(0))
