"""H-Net: equal to the official code; two stages against one row at a time; packing, capacities, cached steps, meshes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P

from models import load
from models.decoder import Places
from models.hnet import HNet, HNetConfig, depth_of, groups, loss, torch_name
from models.hnet_decode import begin, generate, step
from models.mamba2 import MambaConfig
from tests.models.test_decoder import copy_parameters

ATOL = 1e-4  # the golden vectors' own figure for float32
OFFICIAL = HNetConfig(["t1", ["T1"], "t1"], (32, 48), (0, 64), (4, 4), (4, 6), (7, None), ratios=(3.0,))
NESTED = HNetConfig(
    ["T1", ["t1T1", ["T2"], "t1"], "t2"], (16, 24, 24), (32, 32, 32), (2, 2, 2), window=(5, 6, None), ratios=(2.0, 2.0)
)
NAME = functools.partial(torch_name, layout=OFFICIAL.layout)
N = 26


@pytest.fixture(scope="module")
def official(golden):
    z = golden("bytes/hnet_a")
    model = HNet(OFFICIAL, rngs=nnx.Rngs(0))
    load.load(model, weights(z), NAME)
    return model, z


@pytest.fixture(scope="module")
def nested():
    """With routers that are not the identity and a residual that is not 0: a step that forgot one would show."""
    model = HNet(NESTED, rngs=nnx.Rngs(1))
    for i, stage in enumerate((model.backbone, model.backbone.main)):
        for j, leaf in enumerate((stage.q.kernel, stage.k.kernel, stage.residual.kernel)):
            leaf[...] = leaf[...] + 0.2 * jax.random.normal(jax.random.key(3 * i + j), leaf.shape)
    model.backbone.main.pad[...] = jnp.linspace(-1, 1, 8)
    return model


@pytest.fixture(scope="module")
def ids():
    return jax.random.randint(jax.random.key(1), (4, N), 0, 256)


def weights(z):
    return {k.removeprefix("lm/sd/"): z[k] for k in z if k.startswith("lm/sd/")}


@functools.partial(jax.jit, static_argnums=0, static_argnames="capacities")
def forward(graph, params, ids, docs, capacities=None):
    return nnx.merge(graph, params)(ids, docs, capacities=capacities)


@functools.partial(jax.jit, static_argnums=0, static_argnames="capacities")
def value_and_grad(graph, params, ids, docs, capacities=None):
    return jax.value_and_grad(lambda p: loss(nnx.merge(graph, p), ids, docs, capacities=capacities), has_aux=True)(params)


def run(model, ids, docs, **how):
    return forward(*nnx.split(model), ids, docs, **how)


def test_equals_the_official_model(official):
    model, z = official
    ids = jnp.asarray(z["lm/input_ids"])
    logits, (routed,) = run(model, ids, jnp.zeros_like(ids))
    np.testing.assert_allclose(logits, z["lm/logits"], atol=ATOL)
    np.testing.assert_allclose(routed.routing.p.reshape(-1), z["lm/stage0/boundary_prob"][:, 1], atol=1e-6)
    np.testing.assert_array_equal(routed.routing.starts.reshape(-1), z["lm/stage0/boundary_mask"])
    graph, params = nnx.split(model)
    (total, metrics), grads = value_and_grad(graph, params, ids, jnp.zeros_like(ids))
    np.testing.assert_allclose(total, z["lm/loss_ce_plus_0.03_lb"], atol=ATOL)
    np.testing.assert_allclose(metrics["ce"], z["lm/ce"], atol=ATOL)
    np.testing.assert_allclose(metrics["ratio"], z["lm/lb"][0], atol=1e-6)
    assert metrics["rate"] == pytest.approx(1 - z["lm/stage0/boundary_mask"].mean())
    grads = load.export(nnx.merge(graph, grads), NAME)
    for key in (k for k in z if k.startswith("lm/grad/")):
        np.testing.assert_allclose(grads[key.removeprefix("lm/grad/")], z[key], atol=1e-5, err_msg=key)
    norms = [np.linalg.norm(grads[name]) for name in sorted(grads)]
    np.testing.assert_allclose(norms, z["lm/grad_l2_all"], rtol=1e-4, atol=1e-6)


def test_round_trip_and_unknown_names(official):
    model, z = official
    out = load.export(model, NAME)
    assert out.keys() == weights(z).keys()
    for name, value in weights(z).items():
        np.testing.assert_array_equal(out[name], value)
    tensors = weights(z)
    tensors["surprise"] = tensors.pop("backbone.residual_proj.bias")
    with pytest.raises(ValueError, match=r"(?s)missing.*residual_proj\.bias.*unknown.*surprise"):
        load.load(model, tensors, NAME)
    with pytest.raises(ValueError, match="is no parameter of HNet"):
        NAME("backbone.encoder.gate")


def test_names_of_nested_stages(nested):
    names = set(load.export(nested, functools.partial(torch_name, layout=NESTED.layout)))
    assert len(names) == len(jax.tree.leaves(nnx.state(nested)))
    assert {
        "backbone.main_network.encoder.layers.1.mlp.fc1.weight",
        "backbone.main_network.main_network.main_network.layers.1.mixer.Wqkv.weight",
        "backbone.main_network.main_network.main_network.rmsnorm.weight",
        "backbone.main_network.routing_module.q_proj_layer.weight",
        "backbone.main_network.pad_dimension",
        "backbone.decoder.layers.1.norm1.weight",
    } <= names
    assert not any(name.startswith("backbone.decoder.layers.0.mlp") for name in names)


def test_documents_do_not_see_each_other(nested, ids):
    """Nor does padding matter: two documents in a row, and each at the head of one."""
    docs = jnp.zeros_like(ids).at[:, 10:].set(1).at[:, 20:].set(-1)
    together, _ = run(nested, ids, docs)
    first, _ = run(nested, ids, jnp.where(docs == 0, 0, -1))
    second, _ = run(nested, jnp.roll(ids, -10, axis=1), jnp.where(jnp.arange(N)[None] < 10, 0, -1) + jnp.zeros_like(ids))
    np.testing.assert_allclose(together[:, :10], first[:, :10], atol=1e-5)
    np.testing.assert_allclose(together[:, 10:20], second[:, :10], atol=1e-5)


def test_no_byte_sees_a_later_one(nested, ids):
    a, _ = run(nested, ids, jnp.zeros_like(ids))
    b, _ = run(nested, ids.at[:, 15].set(ids[:, 15] ^ 255), jnp.zeros_like(ids))
    np.testing.assert_allclose(a[:, :15], b[:, :15], atol=1e-5)
    assert (np.abs(a - b)[:, 15:].max(-1) > 1e-5).all()


@pytest.mark.slow
def test_chunks_that_do_not_fit_are_counted(nested, ids):
    docs = jnp.zeros_like(ids)
    whole, (outer, inner) = run(nested, ids, docs)
    counts = [np.asarray(jnp.sum(r.plan.sizes > 0, axis=1)) for r in (outer, inner)]
    assert counts[0].max() < N and (counts[1] < counts[0]).all()  # each stage does skip something
    room = int(counts[0].min())
    roomy, _ = run(nested, ids, docs, capacities=(int(counts[0].max()), int(counts[1].max())))
    np.testing.assert_allclose(roomy, whole, atol=1e-5)
    tight, (cut, _) = run(nested, ids, docs, capacities=(room - 2, room))
    lost = cut.plan.overflow > 0
    assert lost.all()
    for row, plan_ids in enumerate(cut.plan.segment_ids):
        fits = np.asarray(plan_ids) < room - 2
        np.testing.assert_allclose(tight[row][fits], whole[row][fits], atol=1e-5)
        assert np.isfinite(tight[row]).all()


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_cached_steps_equal_the_uncached_forward(nested, ids, scan):
    """Prompts of 9, 1, 12 and 5 bytes in one call, then byte by byte, each row at its own place."""
    model = twin(nested, scan=True) if scan else nested
    want, _ = run(nested, ids, jnp.zeros_like(ids))
    graph, params = nnx.split(model)
    go = jax.jit(lambda params, *args: step(nnx.merge(graph, params), *args))
    length = jnp.array([9, 1, 12, 5])
    index = jnp.arange(12)[None] + jnp.zeros((4, 1), jnp.int32)
    inside = index < length[:, None]
    logits, state = go(params, ids[:, :12], Places(index, jnp.where(inside, 0, -1)), begin(model, 4, N))
    np.testing.assert_allclose(logits[inside], want[:, :12][inside], atol=ATOL)
    rows = jnp.arange(4)
    for _ in range(16):
        there, at = length < N, jnp.minimum(length, N - 1)
        logits, state = go(params, ids[rows, at][:, None], Places(at[:, None], jnp.where(there, 0, -1)[:, None]), state)
        np.testing.assert_allclose(logits[there, 0], want[rows, at][there], atol=ATOL)
        length = length + there
    assert (length >= N - 9).all() and (state.chunks < length).all() and (state.main.chunks < state.chunks).all()


def twin(model, **changes):
    other = HNet(dataclasses.replace(model.c, **changes), rngs=nnx.Rngs(9))
    copy_parameters(model, other)
    return other


@pytest.mark.slow
def test_generate(nested, ids):
    graph, params = nnx.split(nested)
    lengths = jnp.array([9, 1, 12, 5])
    greedy = lambda p, ids, stop: generate(nnx.merge(graph, p), ids, lengths, max_new=8, temperature=0, stop=stop)
    text, length = jax.jit(greedy)(params, ids[:, :12], 300)
    assert length.tolist() == [17, 9, 20, 13]
    docs = jnp.where(jnp.arange(N)[None] < length[:, None], 0, -1)
    logits, _ = run(nested, jnp.pad(text, ((0, 0), (0, 6))), docs)
    for row, (start, end) in enumerate(zip(lengths, length, strict=True)):
        np.testing.assert_array_equal(text[row, start:end], jnp.argmax(logits[row, start - 1 : end - 1], -1))
        assert not text[row, end:].any()
    stop = int(text[0, 10])
    again, ended = jax.jit(greedy)(params, ids[:, :12], stop)
    assert ended[0] == np.flatnonzero(text[0, 9:17] == stop)[0] + 9
    np.testing.assert_array_equal(again[0, : ended[0]], text[0, : ended[0]])
    with pytest.raises(ValueError, match="sampling needs a key"):
        generate(nested, ids, lengths, max_new=1)


@pytest.mark.slow
def test_scan_and_remat_change_nothing(nested, ids):
    docs = jnp.zeros_like(ids).at[:, 10:].set(1)
    value = lambda model: value_and_grad(*nnx.split(model), ids, docs)
    scanned = twin(nested, scan=True, remat="dots")
    ((want, _), grads), ((got, _), stacked) = value(nested), value(scanned)
    np.testing.assert_allclose(got, want, atol=1e-5)
    grads, stacked = (load.export(nnx.merge(nnx.split(m)[0], g), str) for m, g in ((nested, grads), (scanned, stacked)))
    for name, g in grads.items():
        np.testing.assert_allclose(stacked[name], g, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_bfloat16_stays_near_float32(official):
    """Where the routers agree, some twenty products of 2^-9 each; logits are of size 1."""
    model, z = official
    low = HNet(OFFICIAL, dtype=jnp.bfloat16, rngs=nnx.Rngs(1))
    copy_parameters(model, low)
    ids = jnp.asarray(z["lm/input_ids"])
    (want, (one,)), (got, (two,)) = (run(m, ids, jnp.zeros_like(ids)) for m in (model, low))
    np.testing.assert_array_equal(one.routing.starts, two.routing.starts)
    assert got.dtype == jnp.float32 and 0 < np.abs(got - want).max() < 2**-4 * np.abs(want).max()


@pytest.mark.slow
def test_eight_devices_equal_one(mesh, nested, ids):
    ids = jnp.concatenate([ids, ids[:, ::-1]])
    docs = jnp.zeros_like(ids).at[:, 17:].set(1)
    graph, params = nnx.split(nested)
    want = value_and_grad(graph, params, ids, docs, capacities=(24, 20))
    with jax.set_mesh(mesh):
        place = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
        got = value_and_grad(graph, place(params), place(ids, "data"), place(docs, "data"), capacities=(24, 20))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=ATOL), got, want)


def test_published_config():
    config = {
        "arch_layout": ["m4", ["T22"], "m4"],
        "d_model": [1024, 1536],
        "d_intermediate": [0, 4096],
        "ssm_cfg": {"chunk_size": 256, "d_conv": 4, "d_state": 128, "expand": 2},
        "attn_cfg": {"num_heads": [16, 16], "rotary_emb_dim": [32, 48], "window_size": [1023, -1]},
        "tie_embeddings": False,
    }
    c = HNetConfig.published(config)
    assert c.mamba == MambaConfig(state=128, conv=4, expand=2, chunk=256)
    assert c.window == (1023, None) and depth_of(c.layout) == 2 and c.stack(1, "T", 22, 1).d_ff == 4096
    with pytest.raises(ValueError, match="tie_embeddings is set"):
        HNetConfig.published({**config, "tie_embeddings": True})


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(layout=["t1", "T1", "t1"]), "a layout is"),
        (dict(layout=["t1", ["x1"], "t1"]), "'x1' is no part of a layout"),
        (dict(width=(32,)), "2 stages, but width has 1 entries"),
        (dict(ratios=()), "2 stages have 1 routers"),
        (dict(width=(48, 32)), "at least as wide"),
    ],
)
def test_bad_configs(change, message):
    with pytest.raises(ValueError, match=message):
        HNet(dataclasses.replace(OFFICIAL, **change), rngs=nnx.Rngs(0))


def test_groups():
    assert groups("T1m4") == [("T", 1), ("m", 4)]
    with pytest.raises(ValueError, match="capacities must have 1 entries"):
        HNet(OFFICIAL, rngs=nnx.Rngs(0))(jnp.zeros((1, 4), int), capacities=())
