"""Expert Merging: its losses by hand, its chunks, and a merge that is learned from what two teachers say."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmerge import params

RNG = np.random.default_rng(0)


def test_losses_are_their_equations():
    a, b = (jnp.asarray(RNG.standard_normal((2, 5, 7)), jnp.float32) for _ in range(2))
    p = np.asarray(jax.nn.softmax(a / 3), np.float64)
    kl = float(jnp.mean(optax.losses.kl_divergence(jax.nn.log_softmax(b / 3), jax.nn.softmax(a / 3))))
    entropy = -np.mean(np.sum(p * np.log(p), axis=-1))
    np.testing.assert_allclose(params.distillation(a, b), 9 * (kl + entropy), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(lambda x: params.distillation(a, x))(a), 0, atol=1e-7)
    np.testing.assert_allclose(params.hidden_mse([a, a], [b, a]), np.mean((np.asarray(a) - np.asarray(b)) ** 2) / 2, rtol=1e-5)
    raw = {"w": jnp.asarray(RNG.standard_normal((3, 4)), jnp.float32), "b": jnp.zeros((3, 1))}
    factors = np.concatenate([np.asarray(jax.nn.sigmoid(x)).ravel() for x in raw.values()])
    np.testing.assert_allclose(params.drift(raw), 3 * np.abs(factors - 0.1).mean(), rtol=1e-5)  # experts times the mean
    assert params.drift(params.expert_coefficients({"w": jnp.ones((3, 2))})) < 1e-7


def test_chunks_go_where_they_matter():
    stacked = {"w": jnp.asarray(RNG.standard_normal((2, 6, 4)), jnp.float32), "b": jnp.ones((2, 4)), "c": jnp.zeros((2, 5))}
    raw = {"w": jnp.zeros((2, 1)), "b": jnp.array([[0.0], [100.0]]), "c": jnp.zeros((2, 1))}
    importance = params.chunk_importance(raw, stacked)
    by_hand = {"w": 24 * 0.5 * np.linalg.norm(stacked["w"].reshape(2, -1), axis=1).mean(), "b": 4 * 0.75 * 2.0, "c": 0.0}
    for name, v in by_hand.items():
        np.testing.assert_allclose(importance[name], v / sum(by_hand.values()), rtol=1e-5)
    chunks = params.allocate_chunks(importance, 12)
    assert sum(chunks.values()) == 12 and chunks["w"] > chunks["b"] >= chunks["c"] == 1
    assert params.allocate_chunks(importance, 12, least=0)["c"] == 0
    assert params.allocate_chunks(importance, 12, most={"w": 4, "b": 3, "c": 9}) == {"w": 4, "b": 3, "c": 5}
    assert params.allocate_chunks(importance, 12, most=2) == {"w": 2, "b": 2, "c": 2}


def test_leaves_without_chunks_keep_the_start():
    base, models = {"w": jnp.zeros(4), "b": jnp.zeros(2)}, [{"w": jnp.ones(4), "b": jnp.ones(2)}] * 2
    raw = params.expert_coefficients(params.task_vectors(base, models), {"w": 2, "b": 0})
    merged = params.merge(params.expert_merging(raw, rest=0.1), base, models)
    for name in base:
        np.testing.assert_allclose(merged[name], 0.2, rtol=1e-6)


def test_two_teachers_are_merged_by_what_they_say():
    """Each teacher knows half of the inputs; chunks and all losses at work, from unlabelled inputs of both."""
    w = 3 * RNG.standard_normal((6, 4)).astype(np.float32)
    base = {"w": jnp.zeros((6, 4))}
    models = [{"w": jnp.asarray(np.where(rows[:, None], w, 0))} for rows in (np.arange(6) < 3, np.arange(6) >= 3)]
    x = [jnp.asarray(RNG.standard_normal((32, 6)) * rows, jnp.float32) for rows in (np.arange(6) < 3, np.arange(6) >= 3)]
    batches = [{"x": x[k], "logits": x[k] @ models[k]["w"], "alpha": jnp.float32(1)} for k in (0, 1)] * 40

    def loss(model, batch):
        y = batch["x"] @ model["w"]
        return batch["alpha"] * (params.distillation(batch["logits"], y) + 0.1 * params.hidden_mse([batch["logits"]], [y]))

    start = params.expert_coefficients(params.task_vectors(base, models), 2)
    found, losses = params.fit(
        loss,
        params.expert_merging,
        start,
        base=base,
        models=models,
        batches=batches,
        optimizer=optax.adam(0.1),
        regularizer=lambda raw: 0.01 * params.drift(raw),
    )
    factors = np.asarray(jax.nn.sigmoid(found["w"]))
    assert min(factors[0, 0], factors[1, 1]) > 0.7, factors  # each expert's own half
    np.testing.assert_allclose([factors[0, 1], factors[1, 0]], 0.1, atol=0.02)  # where a task vector is 0 nothing pulls
    assert losses[-2:].sum() < losses[:2].sum()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: params.expert_coefficients({"w": jnp.ones((1, 2))}, start=1.0), "start must be between 0 and 1"),
        (lambda: params.expert_coefficients({"w": jnp.ones((1, 2))}, {"v": 1}), r"no leaves \['v'\]"),
        (lambda: params.chunk_importance({"v": jnp.ones((1, 1))}, {"w": jnp.ones((1, 2))}), r"no leaves \['v'\]"),
        (lambda: params.allocate_chunks({"w": 1.0}, 0), "0 chunks are not enough"),
        (lambda: params.allocate_chunks({"w": -1.0}, 2), "must not be negative"),
        (lambda: params.hidden_mse([], []), "as many layers of both"),
    ],
)
def test_wrong_arguments(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call()
