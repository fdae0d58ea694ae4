"""The shared decoder block: windows, documents, caches, scan and remat, long rope, meshes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from models import decoder, load
from models.decoder import ByteDecoder, DecoderConfig, Places, RopeScaling, loss, places

CONFIG = DecoderConfig(16, 3, 4, 32, num_kv_heads=2, window=5, qk_norm="head", softcap=20.0)
ATOL = 1e-5
N = 37


@pytest.fixture(scope="module")
def model():
    return ByteDecoder(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def ids():
    return jax.random.randint(jax.random.key(1), (2, N), 0, 256)


@functools.partial(jax.jit, static_argnums=0)
def forward(graph, params, *args):
    return nnx.merge(graph, params)(*args)


def run(model, *args):
    return forward(*nnx.split(model), *args)


def copy_parameters(source, target):
    """Into the same model with its layers kept the other way, or in another dtype."""
    load.load(target, load.export(source, str), str)


def packed(ids):
    docs = jnp.zeros_like(ids).at[:, 20:].set(1)
    return docs.at[1, 30:].set(-1)


def dense(q, k, v, at, c):
    """What `banded` is to equal: every pair, masked."""
    back = at.position[:, :, None] - at.position[:, None, :]
    seen = (jnp.abs(back) <= c.window) & (at.segment[:, :, None] == at.segment[:, None, :])
    return decoder.attend(q, k, v, seen & (back >= 0) if c.causal else seen, softcap=c.softcap)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window, block", [(5, 4), (9, 4), pytest.param(3, 256, marks=pytest.mark.slow)])
def test_a_window_in_blocks_is_a_masked_window(ids, causal, window, block, monkeypatch):
    monkeypatch.setattr(decoder, "BLOCK", block)
    c = dataclasses.replace(CONFIG, causal=causal, window=window)
    q, k, v = (jax.random.normal(jax.random.key(i), (2, N, h, 4)) for i, h in enumerate((4, 2, 2)))
    at = places(packed(ids))
    there = at.segment >= 0
    np.testing.assert_allclose(decoder.banded(q, k, v, at, c)[there], dense(q, k, v, at, c)[there], atol=ATOL)


def test_queries_in_blocks_change_nothing(ids):
    c = dataclasses.replace(CONFIG, window=None)
    q, k, v = (jax.random.normal(jax.random.key(i), (2, N, h, 4)) for i, h in enumerate((4, 2, 2)))
    at = places(packed(ids))
    f = jax.jit(jax.value_and_grad(lambda q, c: (decoder.whole(q, k, v, at, c) ** 2).sum()), static_argnums=1)
    want, some = f(q, c), f(q, dataclasses.replace(c, block_size=8))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=ATOL), some, want)


def test_a_window_makes_no_square():
    """16k positions, window 64: no array has a row of keys for each query."""
    c = DecoderConfig(16, 1, 2, 32, window=64)
    params = jax.eval_shape(lambda: nnx.split(ByteDecoder(c, rngs=nnx.Rngs(0)))[1])
    graph = nnx.graphdef(nnx.eval_shape(lambda: ByteDecoder(c, rngs=nnx.Rngs(0))))
    ids = jax.ShapeDtypeStruct((1, 16384), jnp.int32)
    step = jax.grad(lambda p, ids: loss(nnx.merge(graph, p), ids)[0])
    jaxpr = str(jax.make_jaxpr(step)(params, ids))
    assert "16384,16384" not in jaxpr and "[1,256,2,1,64,128]" in jaxpr


def test_documents_do_not_see_each_other(model, ids):
    docs = packed(ids)
    together = run(model, ids, docs)
    np.testing.assert_allclose(together[:, 20:30], run(model, ids[:, 20:30]), atol=ATOL)
    np.testing.assert_allclose(together[:, :20], run(model, ids[:, :20]), atol=ATOL)


def test_loss_scores_bytes_of_the_same_document(model, ids):
    docs = packed(ids)
    logp = np.asarray(jax.nn.log_softmax(run(model, ids, docs)))
    want = [-logp[b, t, ids[b, t + 1]] for b in range(2) for t in range(N - 1) if docs[b, t] == docs[b, t + 1] >= 0]
    np.testing.assert_allclose(decoder.next_byte(run(model, ids, docs), ids, docs), np.mean(want), atol=ATOL)


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_cached_equals_uncached(model, ids, scan):
    """Ragged rows: the second is 3 positions behind; what is padding is not written."""
    model = twin(model, scan=scan)
    want, behind = run(model, ids), jnp.array([0, 3])
    graph, params = nnx.split(model)
    step = jax.jit(lambda p, ids, at, cache: nnx.merge(graph, p).step(ids, at, cache))
    cache = model.stack.cache(2, N)
    first = jnp.arange(10)[None] + jnp.zeros((2, 1), int)
    logits, cache = step(params, ids[:, :10], Places(first, jnp.where(first < 10 - behind[:, None], 0, -1)), cache)
    np.testing.assert_allclose(logits[0], want[0, :10], atol=ATOL)
    np.testing.assert_allclose(logits[1, :7], want[1, :7], atol=ATOL)
    for t in range(10, 20):
        at = (t - behind)[:, None]
        logits, cache = step(params, jnp.take_along_axis(ids, at, 1), Places(at, jnp.zeros_like(at)), cache)
        np.testing.assert_allclose(logits[:, 0], want[jnp.arange(2), at[:, 0]], atol=ATOL)


def twin(model, **changes):
    other = ByteDecoder(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(9))
    copy_parameters(model, other)
    return other


@pytest.mark.parametrize("remat", [pytest.param(None, marks=pytest.mark.slow), "dots"])
def test_scan_and_remat_change_nothing(model, ids, remat):
    value_and_grad = nnx.jit(nnx.value_and_grad(lambda m: loss(m, ids, packed(ids))[0]))
    want, grads = value_and_grad(model)
    got, scanned = value_and_grad(twin(model, scan=True, remat=remat))
    np.testing.assert_allclose(got, want, atol=ATOL)
    blocks = scanned.stack.blocks.each.ffn.down.kernel[...]
    for i in range(3):
        np.testing.assert_allclose(blocks[i], grads.stack.blocks[i].ffn.down.kernel[...], atol=ATOL)


def test_long_rope():
    """Llama 3.1's own figures: fast frequencies stay, those slower than one turn in 8192 are divided by 8."""
    c = DecoderConfig(128, 1, 1, 0, rope_theta=5e5, rope_scaling=RopeScaling())
    plain = np.asarray(decoder.frequencies(dataclasses.replace(c, rope_scaling=None)), np.float64)
    got, wavelength = np.asarray(decoder.frequencies(c), np.float64), 2 * np.pi / plain
    np.testing.assert_allclose(got[wavelength < 8192 / 4], plain[wavelength < 8192 / 4], rtol=1e-6)
    np.testing.assert_allclose(got[wavelength > 8192], plain[wavelength > 8192] / 8, rtol=1e-6)
    assert (np.diff(got) < 0).all()


@pytest.mark.parametrize("mesh", [AxisType.Explicit, pytest.param(AxisType.Auto, marks=pytest.mark.slow)], indirect=True)
def test_eight_devices_equal_one(mesh, model, ids):
    ids = jnp.concatenate([ids] * 4)
    graph, params = nnx.split(model)
    step = jax.jit(jax.value_and_grad(lambda p, ids: loss(nnx.merge(graph, p), ids, packed(ids[:2])[jnp.zeros(8, int)])[0]))
    want = step(params, ids)
    with jax.set_mesh(mesh):
        place = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
        docs = place(packed(ids[:2])[jnp.zeros(8, int)], "data")
        step = jax.jit(jax.value_and_grad(lambda p, ids, docs: loss(nnx.merge(graph, p), ids, docs)[0]))
        got = step(place(params), place(ids, "data"), docs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=ATOL), got, want)


def test_bfloat16_stays_near_float32(model, ids):
    """Products are off by some 2^-8 of their size and the residual stream is float32: 2^-5 of the logits after three blocks."""
    low = ByteDecoder(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(1))
    copy_parameters(model, low)
    want, got = run(model, ids), run(low, ids)
    assert got.dtype == jnp.float32
    assert float(jnp.abs(got - want).max()) < 2**-5 * float(jnp.abs(want).max())
    assert float(jnp.abs(got - want).max()) > 0


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(num_heads=3), "width 16 is no multiple of num_heads 3"),
        (dict(num_kv_heads=3), "num_kv_heads 3 must divide num_heads 4"),
        (dict(rotary_dim=3), "3 features cannot turn in pairs"),
        (dict(window=0), "window must be 1 or more"),
        (dict(remat="all"), "got 'all'"),
    ],
)
def test_bad_configs(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)
