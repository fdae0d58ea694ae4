"""MergeDNA: merges within windows, three losses and where their gradients go, masks that prefer lone words, a mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxmerge as jm
from models.decoder import DecoderConfig
from models.mergedna import MergeDNA, MergeDNAConfig, loss, masked_bases

LOCAL, LATENT = DecoderConfig(16, 2, 2, 32), DecoderConfig(24, 1, 2, 32)
CONFIG = MergeDNAConfig(LOCAL, LATENT, latent_decoder_depth=1, window=8, rates=((2, 1), (4, 2)), vocab_size=4)


@pytest.fixture(scope="module")
def model():
    return MergeDNA(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def ids():
    return jax.random.randint(jax.random.key(0), (2, 32), 0, 4)


@functools.partial(jax.jit, static_argnums=0)
def value_and_grad(graph, params, ids, key):
    def f(params):
        total, metrics = loss(nnx.merge(graph, params), ids, rngs=nnx.Rngs(mask=key))
        return total, metrics

    return jax.value_and_grad(f, has_aux=True)(params)


def test_words_stay_within_windows_and_windows_do_not_meet(model, ids):
    graph, params = nnx.split(model)
    tokenize = jax.jit(lambda p, ids: nnx.merge(graph, p).tokenize(ids, (3, 2)))
    x, plan = tokenize(params, ids)
    assert x.shape == (2, 4 * 3, 16) and int(plan.sizes.min()) >= 1
    np.testing.assert_array_equal(plan.segment_ids // 3, np.broadcast_to(np.arange(32) // 8, (2, 32)))
    changed, other = tokenize(params, ids.at[:, 9].set(3 - ids[:, 9]))
    np.testing.assert_allclose(changed[:, :3], x[:, :3], atol=1e-6)
    np.testing.assert_array_equal(other.segment_ids[:, :8], plan.segment_ids[:, :8])
    assert np.abs(changed - x)[:, 3:6].max() > 1e-4


@pytest.mark.slow
def test_loss_is_the_sum_of_three(model, ids):
    graph, params = nnx.split(model)
    seen = set()
    for seed in range(6):
        (total, m), grads = value_and_grad(graph, params, ids, jax.random.key(seed))
        np.testing.assert_allclose(total, m["ce"] + 0.25 * m["selected"] + m["masked"], rtol=1e-6)
        seen.add(round(float(m["rate"]), 4))
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert len(seen) > 1 and seen <= {round(sum(rate) / 8, 4) for rate in CONFIG.rates}  # the compression is drawn anew
    assert not [path for path, g in nnx.to_flat_state(grads) if not np.asarray(g[...]).any()]


@pytest.mark.slow
def test_the_second_loss_holds_the_tokenizer_still(model, ids):
    graph, params = nnx.split(model)
    grads = jax.jit(jax.grad(lambda p: loss(nnx.merge(graph, p), ids)[1]["selected"]))(params)
    moved = {path[0] for path, g in nnx.to_flat_state(grads) if np.asarray(g[...]).any()}
    assert not moved & {"embedding", "local_encoder"} and {"to_latent", "latent_encoder", "local_decoder"} <= moved


def test_words_that_stand_alone_are_masked_most():
    plan = jm.Plan(jnp.array([[0, 0, 1, 2, 2, 3]]), 4)
    select = jm.Plan(jnp.array([[0, 1, 0, 0]]), 2)  # word 1 stands alone
    assert masked_bases(plan, select, 1, None).tolist() == [[False, False, True, False, False, False]]
    keys = jax.random.split(jax.random.key(0), 400)
    draws = np.asarray(jax.jit(jax.vmap(lambda key: masked_bases(plan, select, 1, key)[0]))(keys))
    share = draws[:, [0, 2, 3, 5]].mean(0)
    np.testing.assert_allclose(share, [1 / 6, 1 / 2, 1 / 6, 1 / 6], atol=0.08)  # odds 1 : 3 : 1 : 1; 3 sigma of 400
    np.testing.assert_array_equal(draws[:, 0], draws[:, 1])


@pytest.mark.slow
def test_eight_devices_equal_one(mesh):
    """No letter occurs twice: equal words would be equally like a third, and rounding would choose between them."""
    model = MergeDNA(dataclasses.replace(CONFIG, vocab_size=64), rngs=nnx.Rngs(0))
    ids = jnp.stack([jax.random.permutation(jax.random.key(i), 64)[:32] for i in range(8)])
    graph, params = nnx.split(model)
    step = jax.jit(jax.value_and_grad(lambda p, ids: loss(nnx.merge(graph, p), ids)[0]))
    want = step(params, ids)
    with jax.set_mesh(mesh):
        place = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
        got = step(place(params), place(ids, "data"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(rates=((5, 1),)), "of 8 tokens in a window 0 to 4 can merge"),
        (dict(rates=((1,),)), "one entry per local layer, 2"),
        (dict(keep=1.0), "keep between 0 and 1"),
    ],
)
def test_bad_configs(change, message):
    with pytest.raises(ValueError, match=message):
        MergeDNAConfig(**{**vars(CONFIG), **change})


def test_bad_length(model):
    with pytest.raises(ValueError, match="30 bases are no multiple of the window, 8"):
        model.encode(jnp.zeros((1, 30), int))
