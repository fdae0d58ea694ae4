"""BLT: patch ids as the official code has them, cross-attention written out, packing, causality, n-grams, meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxmerge as jm
from models.blt import BLT, BLTConfig, loss, next_patch
from models.decoder import DecoderConfig

LOCAL = DecoderConfig(16, 2, 2, 32, window=6)
CONFIG = BLTConfig(LOCAL, DecoderConfig(24, 2, 2, 32), LOCAL, cross_heads=2, ngrams=(3, 5), rows=64, functions=2)
N = 24


@pytest.fixture(scope="module")
def model():
    return BLT(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def batch():
    ids = jax.random.randint(jax.random.key(0), (2, N), 0, 256)
    return ids, jax.random.bernoulli(jax.random.key(1), 0.3, (2, N)), jnp.zeros_like(ids)


@functools.partial(jax.jit, static_argnums=0, static_argnames="capacity")
def forward(graph, params, ids, starts, docs, *, capacity=20):
    return nnx.merge(graph, params)(ids, starts, docs, capacity=capacity)


@functools.partial(jax.jit, static_argnums=0)
def value_and_grad(graph, params, batch):
    return jax.value_and_grad(lambda p: loss(nnx.merge(graph, p), *batch, capacity=20), has_aux=True)(params)


def run(model, *batch):
    return forward(*nnx.split(model), *batch)


def test_patch_ids_are_the_official_ones(golden):
    """Both kinds: of the patch a byte is in, and of the patch that the decoder reads at it."""
    z = golden("bytes/blt_a")
    lengths = z["thr/next1/lengths"]
    for row, mine, theirs in zip(lengths, z["patch_ids_from_lengths"], z["decoder_patch_ids_from_lengths"], strict=True):
        at = np.cumsum(row)[:-1]
        starts = np.zeros(48, bool)
        starts[np.r_[0, at[at < 48]]] = True
        plan = jm.words.segments(jnp.asarray(starts)[None], 48)
        np.testing.assert_array_equal(plan.segment_ids[0], mine)
        np.testing.assert_array_equal(next_patch(plan).segment_ids[0, :-1], theirs[:-1])  # the last needs the byte after


def test_cross_attention_written_out(model):
    pool, plan = model.pool, jm.Plan(jnp.array([[0, 1, 1, 1, 2, 2]]), 4)
    x = jax.random.normal(jax.random.key(0), (1, 6, 16))
    patches = jax.random.normal(jax.random.key(1), (1, 4, 2, 16))
    got, heads = nnx.jit(lambda m: m.pool(patches, x, plan))(pool), lambda y: np.asarray(y).reshape(*y.shape[:-1], 2, 8)
    q, k, v = heads(pool.q(pool.query_norm(patches))), heads(pool.k(pool.key_norm(x))), heads(pool.v(pool.key_norm(x)))
    for patch, part in enumerate(([0], [1, 2, 3], [4, 5])):
        s = np.einsum("khf,nhf->khn", q[0, patch], k[0, part]) / 8**0.5
        p = np.exp(s) / np.exp(s).sum(-1, keepdims=True)
        want = pool.o(jnp.asarray(np.einsum("khn,nhf->khf", p, v[0, part]).reshape(2, 16)))
        np.testing.assert_allclose(got[0, patch], want, atol=1e-5)
    cross = model.decoder.blocks[0].cross
    got = nnx.jit(lambda m: m.read(x, patches, plan))(cross)
    q, k, v = (
        heads(cross.q(cross.query_norm(x))),
        heads(cross.k(cross.key_norm(patches))),
        heads(cross.v(cross.key_norm(patches))),
    )
    for t, patch in enumerate(plan.segment_ids[0].tolist()):
        s = np.einsum("hf,khf->hk", q[0, t], k[0, patch]) / 8**0.5
        p = np.exp(s) / np.exp(s).sum(-1, keepdims=True)
        want = cross.o(jnp.asarray(np.einsum("hk,khf->hf", p, v[0, patch]).reshape(16)))
        np.testing.assert_allclose(got[0, t], want, atol=1e-5)


def test_documents_do_not_see_each_other(model, batch):
    ids, starts, docs = batch
    packed = docs.at[:, 9:].set(1).at[:, 20:].set(-1)
    together = run(model, ids, starts, packed)
    first = run(model, ids, starts, jnp.where(packed == 0, 0, -1))
    shifted = (jnp.roll(x, -9, axis=1) for x in (ids, starts))
    second = run(model, *shifted, jnp.where(jnp.arange(N)[None] < 11, 0, -1) + docs)
    np.testing.assert_allclose(together[:, :8], first[:, :8], atol=1e-5)  # the last byte of a document asks what comes next
    np.testing.assert_allclose(together[:, 9:19], second[:, :10], atol=1e-5)


def test_no_byte_sees_a_later_one(model, batch):
    ids, starts, docs = batch
    a, b = run(model, ids, starts, docs), run(model, ids.at[:, 15].set(ids[:, 15] ^ 255), starts, docs)
    np.testing.assert_allclose(a[:, :15], b[:, :15], atol=1e-5)
    assert (np.abs(a - b)[:, 15:].max(-1) > 1e-5).all()


@pytest.mark.slow
def test_loss_counts_and_learns_everywhere(model, batch):
    ids, starts, _ = batch
    (total, metrics), grads = value_and_grad(*nnx.split(model), batch)
    logp = np.asarray(jax.nn.log_softmax(run(model, *batch)))
    want = np.mean([-logp[r, t, ids[r, t + 1] + 4] for r in range(2) for t in range(N - 1)])
    np.testing.assert_allclose(total, want, atol=1e-5)
    count = (starts | (jnp.arange(N)[None] <= 1)).sum()
    assert metrics["rate"] == pytest.approx(1 - int(count) / (2 * N)) and metrics["overflow"] == 0
    still = [path for path, g in nnx.to_flat_state(grads) if not np.asarray(g[...]).any()]
    assert not still
    tight = loss(model, *batch, capacity=4)[1]
    assert tight["overflow"] > 0 and np.isfinite(tight["ce"])


@pytest.mark.slow
def test_eight_devices_equal_one(mesh, model, batch):
    batch = tuple(jnp.concatenate([x] * 4) for x in batch)
    graph, params = nnx.split(model)
    want = value_and_grad(graph, params, batch)
    with jax.set_mesh(mesh):
        place = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
        got = value_and_grad(graph, place(params), tuple(place(x, "data") for x in batch))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


def test_bad_config():
    with pytest.raises(ValueError, match="cross_heads 3 must divide"):
        BLTConfig(LOCAL, LOCAL, LOCAL, cross_heads=3)
    with pytest.raises(ValueError, match="widths 16 and 24 must be one"):
        BLTConfig(LOCAL, LOCAL, DecoderConfig(24, 1, 2, 8), cross_heads=2)
