"""Cosines, sign conflicts and norms, against numpy."""

import jax.numpy as jnp
import numpy as np

from jaxmerge import params


def test_analysis_in_numpy():
    rng = np.random.default_rng(0)
    stacked = {n: jnp.asarray(rng.standard_normal((3, *s)), jnp.float32) for n, s in {"a": (4, 5), "b": (7,), "c": ()}.items()}
    flat = np.concatenate([np.asarray(x).reshape(3, -1) for x in stacked.values()], axis=1)
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    np.testing.assert_allclose(params.cosines(stacked), unit @ unit.T, rtol=1e-5, atol=1e-6)
    for n, x in stacked.items():
        rows = np.asarray(x).reshape(3, -1)
        np.testing.assert_allclose(params.task_norms(stacked)[n], np.linalg.norm(rows, axis=1), rtol=1e-5)
        against = np.abs(rows)[rows * np.sign(rows.sum(axis=0)) < 0].sum()
        np.testing.assert_allclose(params.sign_conflict(stacked)[n], against / np.abs(rows).sum(), rtol=1e-5)


def test_models_that_changed_nothing():
    zero = {"w": jnp.zeros((2, 3))}
    assert params.cosines(zero).tolist() == [[0, 0], [0, 0]] and params.sign_conflict(zero)["w"] == 0
    assert params.sign_conflict({"w": jnp.ones((2, 3))})["w"] == 0
