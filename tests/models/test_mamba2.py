"""Mamba-2: equal to the recurrence step by step, for any chunk; documents apart; cached; inside H-Net, under its names."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import load
from models.decoder import DecoderConfig, Places, Stack, places
from models.hnet import HNet, HNetConfig, loss, torch_name
from models.hnet_decode import begin, step
from models.mamba2 import Mamba2, MambaBlock, MambaConfig, recur

SMALL = MambaConfig(state=6, conv=4, expand=2, head_dim=8, chunk=5)
WIDTH = DecoderConfig(16, 2, 2, 0)
N = 17


def one_at_a_time(x, dt, A, B, C, *, docs, state):
    """The definition, in numpy."""
    y, last = np.zeros_like(x), np.zeros(len(x), int)
    for t in range(x.shape[1]):
        state = np.where((docs[:, t] == last)[:, None, None, None], state, 0)
        last = docs[:, t]
        state = np.exp(dt[:, t] * A)[..., None, None] * state
        state = state + np.einsum("bh,bhp,bs->bhps", dt[:, t], x[:, t], B[:, t])
        y[:, t] = np.einsum("bhps,bs->bhp", state, C[:, t])
    return y, state


@pytest.mark.parametrize("chunk", [1, 5, 256])
def test_chunks_equal_the_recurrence(chunk):
    rng = np.random.default_rng(0)
    x, B, C = rng.normal(size=(2, N, 3, 4)), rng.normal(size=(2, N, 6)), rng.normal(size=(2, N, 6))
    dt, A, state = rng.uniform(0.1, 1, (2, N, 3)), -rng.uniform(0.1, 4, 3), rng.normal(size=(2, 3, 4, 6))
    docs = np.stack([np.zeros(N, int), np.arange(N) // 7])
    want, last = one_at_a_time(x, dt, A, B, C, docs=docs, state=state)
    arrays = (jnp.asarray(a, jnp.float32) for a in (x, dt, A, B, C))
    rest = dict(docs=jnp.asarray(docs), state=jnp.asarray(state, jnp.float32))
    got, end = jax.jit(recur, static_argnames="chunk")(*arrays, **rest, chunk=chunk)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(end, last, atol=1e-5)


def test_the_mixer_written_out():
    """Projection, convolution, recurrence, gate and norm as the official module orders them."""
    mixer = Mamba2(WIDTH, SMALL, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = np.asarray(jax.random.normal(jax.random.key(0), (1, N, 16)))
    got = nnx.jit(lambda m, x: m(x, places(jnp.zeros((1, N), int)))[0])(mixer, jnp.asarray(x))
    p = {".".join(map(str, k)): np.asarray(v[...], np.float64) for k, v in nnx.to_flat_state(nnx.state(mixer))}
    silu = lambda a: a / (1 + np.exp(-a))
    z, u, dt = np.split(x @ p["in_proj.kernel"], [32, 76], axis=-1)
    padded = np.pad(u, ((0, 0), (3, 0), (0, 0)))
    u = silu(sum(padded[:, i : i + N] * p["conv"][:, 0, i] for i in range(4)) + p["conv_bias"])
    v, B, C = np.split(u, [32, 38], axis=-1)
    dt = np.log1p(np.exp(dt + p["dt_bias"]))
    v = v.reshape(1, N, 4, 8)
    blank = dict(docs=np.zeros((1, N), int), state=np.zeros((1, 4, 8, 6)))
    y, _ = one_at_a_time(v, dt, -np.exp(p["A_log"]), B, C, **blank)
    y = (y + v * p["D"][:, None]).reshape(1, N, 32) * silu(z)
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5) * p["norm.scale"]
    np.testing.assert_allclose(got, y @ p["out_proj.kernel"], atol=1e-5)


@pytest.fixture(scope="module")
def stack():
    return Stack([MambaBlock(WIDTH, SMALL, dtype=jnp.float32, rngs=nnx.Rngs(i)) for i in range(2)])


def test_documents_apart_and_cached_steps(stack):
    """Two documents in a row are each alone; a ragged prompt and then one position at a time are the whole."""
    x = jax.random.normal(jax.random.key(0), (2, N, 16))
    graph, params = nnx.split(stack)
    forward = jax.jit(lambda p, x, docs: nnx.merge(graph, p)(x, places(docs)))
    whole = forward(params, x, jnp.zeros((2, N), jnp.int32))
    two = jnp.zeros((2, N), jnp.int32).at[:, 6:].set(1).at[:, 14:].set(-1)
    together, tail = forward(params, x, two), jnp.where(jnp.arange(N)[None] < 8, 0, -1) + jnp.zeros((2, 1), jnp.int32)
    np.testing.assert_allclose(together[:, :6], whole[:, :6], atol=1e-5)
    np.testing.assert_allclose(together[:, 6:14], forward(params, jnp.roll(x, -6, axis=1), tail)[:, :8], atol=1e-5)
    go = jax.jit(lambda p, x, at, cache: nnx.merge(graph, p).step(x, at, cache=cache))
    length = jnp.array([7, 2])
    index = jnp.arange(7)[None] + jnp.zeros((2, 1), jnp.int32)
    inside = index < length[:, None]
    y, cache = go(params, x[:, :7], Places(index, jnp.where(inside, 0, -1)), stack.cache(2, N))
    np.testing.assert_allclose(y[inside], whole[:, :7][inside], atol=1e-5)
    for _ in range(10):
        y, cache = go(params, x[jnp.arange(2), length][:, None], Places(length[:, None], jnp.zeros((2, 1), jnp.int32)), cache)
        np.testing.assert_allclose(y[:, 0], whole[jnp.arange(2), length], atol=1e-5)
        length = length + 1


LAYOUT = ("m2", ("T1M1",), "m1t1")
HNET = HNetConfig(LAYOUT, (16, 24), (0, 32), (2, 2), window=(6, None), ratios=(2.0,), mamba=SMALL)


@pytest.mark.slow
def test_inside_hnet(stack):
    """Cached steps equal the forward; gradients reach every parameter; scanned is unscanned."""
    model, ids = HNet(HNET, rngs=nnx.Rngs(0)), jax.random.randint(jax.random.key(1), (2, N), 0, 256)
    graph, params = nnx.split(model)
    want, (routed,) = jax.jit(lambda p: nnx.merge(graph, p)(ids))(params)
    assert 0 < int(routed.routing.starts.sum()) < 2 * N
    go = jax.jit(lambda p, *args: step(nnx.merge(graph, p), *args))
    state, at = begin(model, 2, N), lambda t: Places(t, jnp.zeros_like(t))
    first = jnp.arange(9)[None] + jnp.zeros((2, 1), jnp.int32)
    logits, state = go(params, ids[:, :9], at(first), state)
    np.testing.assert_allclose(logits, want[:, :9], atol=1e-4)
    for t in range(9, N):
        logits, state = go(params, ids[:, t : t + 1], at(jnp.full((2, 1), t)), state)
        np.testing.assert_allclose(logits[:, 0], want[:, t], atol=1e-4)
    scanned = HNet(dataclasses.replace(HNET, scan=True, remat="full"), rngs=nnx.Rngs(5))
    load.load(scanned, load.export(model, str), str)
    value = nnx.jit(nnx.value_and_grad(lambda m: loss(m, ids)[0]))
    (a, grads), (b, stacked) = value(model), value(scanned)
    np.testing.assert_allclose(a, b, atol=1e-5)
    grads, stacked = load.export(nnx.merge(graph, grads), str), load.export(nnx.merge(nnx.split(scanned)[0], stacked), str)
    for name, g in grads.items():
        np.testing.assert_allclose(stacked[name], g, atol=1e-5, err_msg=name)
    # The residual's kernel is zero at first, the routers' are the identity: all of them move.
    assert not [name for name, g in grads.items() if not g.any()]


def test_official_names():
    names = functools.partial(torch_name, layout=LAYOUT)
    out = load.export(HNet(HNET, rngs=nnx.Rngs(0)), names)
    mixer = {k.removeprefix("backbone.encoder.layers.1.") for k in out if k.startswith("backbone.encoder.layers.1.")}
    parts = ["in_proj.weight", "out_proj.weight", "conv1d.weight", "conv1d.bias", "dt_bias", "A_log", "D", "norm.weight"]
    assert mixer == {"norm1.weight", *(f"mixer.{p}" for p in parts)}
    assert out["backbone.encoder.layers.1.mixer.conv1d.weight"].shape == (44, 1, 4)
    assert out["backbone.encoder.layers.1.mixer.in_proj.weight"].shape == (32 + 44 + 4, 16)
    assert "backbone.main_network.main_network.layers.1.mlp.fc1.weight" in out
    assert "backbone.decoder.layers.1.mixer.Wqkv.weight" in out


def test_bad_config():
    with pytest.raises(ValueError, match="head_dim 7 must divide"):
        Mamba2(WIDTH, MambaConfig(head_dim=7), dtype=jnp.float32, rngs=nnx.Rngs(0))
