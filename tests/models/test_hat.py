"""HAT: the released form equal to the golden vectors, the paper's to its definition word by word; packing, limits, meshes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxmerge as jm
from models import load
from models.decoder import DecoderConfig, Places, RopeScaling
from models.hat import HAT, STOP, WORD, CrossConfig, HATConfig, TFreeConfig, TFreeHAT, loss, read_words, torch_name, with_marks
from tests.models.test_decoder import copy_parameters

ATOL = 1e-4  # the golden vectors' own figure for float32
LOCAL = DecoderConfig(24, 2, 3, 32, window=768)
CROSS = CrossConfig(24, 3, 3)
RELEASED = TFreeConfig(LOCAL, DecoderConfig(32, 2, 4, 48, num_kv_heads=2, rope_theta=5e5), LOCAL, CROSS, CROSS)
SMALL, LARGE = DecoderConfig(16, 2, 2, 32), DecoderConfig(24, 2, 4, 48, num_kv_heads=2)
PAPER = HATConfig(SMALL, LARGE, SMALL, max_word=8)
N, CAPACITY = 56, 20
TEXTS = "The cat sat on a mat, purring.", "Größe 你好。 ok"


@pytest.fixture(scope="module")
def released(golden):
    z = golden("bytes/hat_a")
    model = TFreeHAT(RELEASED, rngs=nnx.Rngs(0))
    load.load(model, weights(z), torch_name)
    return model, z


@pytest.fixture(scope="module")
def paper():
    return HAT(PAPER, rngs=nnx.Rngs(0))


def weights(z):
    return {k.removeprefix("sd/"): z[k] for k in z if k.startswith("sd/")}


@functools.partial(jax.jit, static_argnums=0)
def value_and_grad(graph, params, batch):
    return jax.value_and_grad(lambda p: loss(nnx.merge(graph, p), *batch, capacity=CAPACITY), has_aux=True)(params)


@functools.partial(jax.jit, static_argnums=0)
def forward(graph, params, ids, starts, docs):
    model = nnx.merge(graph, params)
    words = read_words(starts, docs, capacity=CAPACITY, max_word=model.c.max_word)
    return model.nats(ids, docs, words)[:2]


def run(model, batch):
    """(loss, metrics), gradients."""
    graph, params = nnx.split(model)
    out, grads = value_and_grad(graph, params, batch)
    return out, nnx.merge(graph, grads)


def costs(model, batch):
    """Nats, and which of them count."""
    return forward(*nnx.split(model), *batch)


def packed(*rows, n=N, rule="whitespace", stop=()):
    """Rows of texts, each a document, as (ids, starts, docs)."""
    ids, starts, docs = (np.zeros((len(rows), n), t) for t in (np.int32, bool, np.int32))
    docs -= 1
    for r, texts in enumerate(rows):
        at = 0
        for d, text in enumerate(texts):
            new = [*text.encode(), *stop]
            ids[r, at : at + len(new)], docs[r, at : at + len(new)] = new, d
            starts[r, at : at + len(new)] = [*jm.words.starts(text, rule=rule), *[True] * len(stop)]
            at += len(new)
    return jnp.asarray(ids), jnp.asarray(starts), jnp.asarray(docs)


# --- the released form


@pytest.mark.parametrize("name", ["t0", pytest.param("t1", marks=pytest.mark.slow)])
def test_golden(released, name):
    model, z = released
    ids = jnp.asarray(z[f"{name}/input_ids"])
    starts = jnp.zeros(ids.shape, bool).at[0, z[f"{name}/cu_words"][:-1]].set(True)
    words = read_words(starts, jnp.zeros_like(ids), capacity=12)
    np.testing.assert_allclose(nnx.jit(lambda m: m(ids, jnp.zeros_like(ids), words))(model), z[f"{name}/logits"], atol=ATOL)
    pad = ((0, 0), (0, N - ids.shape[1]))
    batch = jnp.pad(ids, pad), jnp.pad(starts, pad), jnp.pad(jnp.zeros_like(ids), pad, constant_values=-1)
    (total, metrics), grads = run(model, batch)
    np.testing.assert_allclose(total, z[f"{name}/next_byte_ce"], atol=ATOL)
    assert metrics["rate"] == pytest.approx(1 - (len(z[f"{name}/cu_words"]) - 1) / ids.shape[1]) and metrics["overflow"] == 0
    if f"{name}/grad_l2_all" in z:
        grads = load.export(grads, torch_name)
        norms = [np.linalg.norm(grads[key]) for key in sorted(grads)]
        np.testing.assert_allclose(norms, z[f"{name}/grad_l2_all"], atol=1e-5, rtol=1e-4)


def test_round_trip_and_unknown_names(released):
    model, z = released
    out = load.export(model, torch_name)
    assert out.keys() == weights(z).keys()
    for name, value in weights(z).items():
        np.testing.assert_array_equal(out[name], value)
    tensors = weights(z)
    tensors["surprise"] = tensors.pop("layer_norm.weight")
    with pytest.raises(ValueError, match=r"(?s)missing.*layer_norm.*unknown.*surprise"):
        load.load(TFreeHAT(RELEASED, rngs=nnx.Rngs(0)), tensors, torch_name)
    with pytest.raises(ValueError, match="is no parameter of TFreeHAT"):
        torch_name("encoder.gate")


def test_shared_key_heads_and_norms():
    """Grouped queries and QK-norm in the connector, against the softmax written out for one word."""
    cross = CrossConfig(24, 3, 1, qk_norm=True)
    model = TFreeHAT(dataclasses.replace(RELEASED, encoder_cross=cross), rngs=nnx.Rngs(0))
    x, at = jax.random.normal(jax.random.key(0), (1, 7, 24)), Places(jnp.arange(7)[None], jnp.zeros((1, 7), int))
    words = read_words(jnp.array([[True, False, False, True, False, False, False]]), jnp.zeros((1, 7), int), capacity=3)
    got, net = nnx.jit(lambda m: m.encode(x, at, words))(model), model.connector
    normed = lambda y: y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5)
    q = normed(np.asarray(net.q(model.latent_query[...]))[0, 0].reshape(3, 8))
    k, v = normed(np.asarray(net.k(x))[0]), np.asarray(net.v(x))[0]
    turn = lambda y, p: rotated(y, p, 8)
    for w, part in enumerate((range(3), range(3, 7))):
        s = np.array([[turn(q[h], w) @ turn(k[t], t) for t in part] for h in range(3)]) / 8**0.5
        p = np.exp(s) / np.exp(s).sum(1, keepdims=True)
        np.testing.assert_allclose(got[0, w], np.asarray(net.o(jnp.asarray((p @ v[list(part)]).reshape(-1)))), atol=1e-5)
    assert not np.asarray(got[0, 2]).any()


def rotated(x, position, d):
    angle = position * 1e4 ** (-np.arange(d // 2) / (d // 2))
    a, b = x[: d // 2], x[d // 2 :]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)])


# --- the paper's form


def word_by_word(model, words):
    """The paper's definition: each word encoded alone, the backbone over all, each word decoded alone."""
    embeddings, dense = [], lambda m: Places(jnp.arange(m)[None], jnp.zeros((1, m), int))
    for word in words:
        ids = jnp.array([[WORD, *word]])
        x = model.encoder(model.embedding[...][ids], dense(ids.shape[1]))
        embeddings.append(model.to_backbone(model.encoder_norm(x[:, 0])))
    p = model.backbone_norm(model.backbone(jnp.stack(embeddings, 1), dense(len(words))))
    p = jnp.concatenate([model.first[...][None, None], p[:, :-1]], 1)
    out = []
    for i, word in enumerate(words):
        x = jnp.concatenate([model.to_decoder(p[:, i : i + 1]), model.decoder_embedding[...][jnp.array([word])]], 1)
        out.append(model.predict(model.decoder(x, dense(len(word) + 1)))[0])
    return jnp.concatenate(out)


def test_the_paper_word_by_word(paper):
    text = TEXTS[0][:15]
    split = [list(w) for w in jm.words.split(text, rule="whitespace")]
    symbols = [s for w in split for s in (WORD, *w)]
    logp = jax.nn.log_softmax(nnx.jit(word_by_word, static_argnums=1)(paper, tuple(map(tuple, split))))
    (total, metrics), _ = run(paper, packed([text]))
    nats, scored = costs(paper, packed([text]))
    assert scored[0].tolist() == [i < len(symbols) - 1 for i in range(N + CAPACITY - 1)]
    want = [-logp[i, s] for i, s in enumerate(symbols[1:])]
    np.testing.assert_allclose(nats[scored], want, atol=ATOL)
    np.testing.assert_allclose(total, np.sum(want) / len(text), atol=ATOL)  # [W] is shared out among the bytes
    assert metrics["rate"] == pytest.approx(1 - len(split) / len(text))


def test_a_document_that_is_over_says_so(paper):
    ids, starts, docs = packed([TEXTS[0]], stop=[STOP])
    stream = with_marks(ids, read_words(starts, docs, capacity=CAPACITY, max_word=8))
    here = int(jnp.argmax(stream.ids[0] == STOP))
    assert stream.ids[0, here - 1] == WORD
    _, scored = costs(paper, (ids, starts, docs))
    assert scored[0, here - 1] and not scored[0, here:].any()


def test_a_long_word_is_cut(paper):
    """Without starts, 20 bytes are words of 8, 8 and 4."""
    ids, docs = jnp.full((1, 20), 97), jnp.zeros((1, 20), int)
    words = read_words(jnp.zeros((1, 20), bool), docs, max_word=8)
    assert words.plan.sizes[0].tolist() == [8, 8, 4] + [0] * 17
    assert with_marks(ids, words).at.position.max() == 8


# --- both


@pytest.fixture(params=["paper", "released"])
def either(request, paper, released):
    return paper if request.param == "paper" else released[0]


def test_documents_do_not_see_each_other(either):
    nats, scored = costs(either, packed([TEXTS[0], TEXTS[1]], [TEXTS[1], TEXTS[0]]))
    alone, there = costs(either, packed([TEXTS[0]], [TEXTS[1]]))
    first, second = (alone[r][there[r]] for r in range(2))
    np.testing.assert_allclose(nats[0][scored[0]], jnp.concatenate([first, second]), atol=ATOL)
    np.testing.assert_allclose(nats[1][scored[1]], jnp.concatenate([second, first]), atol=ATOL)


def test_no_byte_sees_a_later_one(either):
    """Change a byte, and what was predicted before it stays. Boundaries are given, so no word may leak its own end."""
    ids, starts, docs = packed([TEXTS[0]], [TEXTS[0]])
    t = 17
    nats, scored = costs(either, (ids.at[1, t].set(90), starts, docs))
    word = int(starts[0, : t + 1].sum())  # in the paper's form a [W] stands before each word
    slot = t + word - 1 if isinstance(either, HAT) else t - 1  # where byte t is predicted
    np.testing.assert_allclose(nats[0, :slot], nats[1, :slot], atol=1e-5)
    assert (np.abs(nats[0] - nats[1])[slot : slot + 2] > 1e-3).all() and scored[0, slot + 1]


def test_words_that_do_not_fit_are_counted_and_not_scored(either):
    ids, starts, docs = packed(["a b c d e f g h i j k l m n o p q r s t u v w x"])
    fits = jnp.arange(N)[None] < 2 * CAPACITY
    (total, metrics), _ = run(either, (ids, starts, docs))
    (want, _), _ = run(either, (ids, starts, jnp.where(fits, docs, -1)))
    assert metrics["overflow"] == 47 - 2 * CAPACITY
    np.testing.assert_allclose(total, want, atol=1e-5)


@pytest.mark.slow
def test_padding_alone_costs_nothing(either):
    ids = jnp.zeros((2, N), jnp.int32)
    (total, _), grads = run(either, (ids, ids > 0, ids - 1))
    assert total == 0 and all(not np.asarray(g).any() for g in jax.tree.leaves(nnx.state(grads)))


@pytest.mark.slow
def test_scan_and_remat_change_nothing(either):
    batch = packed([TEXTS[0], TEXTS[1]], [TEXTS[1]])
    stacks = {name: getattr(either.c, name) for name in ("encoder", "backbone", "decoder")}
    config = dataclasses.replace(either.c, **{k: dataclasses.replace(c, scan=True, remat="dots") for k, c in stacks.items()})
    scanned = type(either)(config, rngs=nnx.Rngs(7))
    copy_parameters(either, scanned)
    (want, _), grads = run(either, batch)
    (got, _), stacked = run(scanned, batch)
    np.testing.assert_allclose(got, want, atol=1e-5)
    grads, stacked = load.export(grads, str), load.export(stacked, str)
    for name, g in grads.items():
        np.testing.assert_allclose(stacked[name], g, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_bfloat16_stays_near_float32(either):
    """Some forty products in a row, each off by 2^-9 of its size and not of one sign: 2^-9 sqrt(40) of a nat, with room 2."""
    batch = packed([TEXTS[0], TEXTS[1]], [TEXTS[1], TEXTS[0]])
    low = type(either)(either.c, dtype=jnp.bfloat16, rngs=nnx.Rngs(7))
    copy_parameters(either, low)
    (want, scored), (got, _) = costs(either, batch), costs(low, batch)
    off = np.abs(got - want)[scored].mean()
    assert got.dtype == jnp.float32 and 0 < off < 2 * 2**-9 * 40**0.5 * want[scored].mean()


@pytest.mark.slow
def test_eight_devices_equal_one(mesh, either):
    batch = packed(*[[TEXTS[i % 2], TEXTS[(i + 1) % 2][: i + 3]] for i in range(8)])
    want, grads = run(either, batch)
    graph, params = nnx.split(either)
    with jax.set_mesh(mesh):
        place = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
        got = value_and_grad(graph, place(params), tuple(place(x, "data") for x in batch))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=ATOL), got[0], want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=ATOL), got[1], nnx.state(grads))


def test_published_config():
    """The keys of a released config.json."""
    stack = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3, intermediate_size=32)
    stack |= dict(rms_norm_eps=1e-5, rope_theta=1e4, rope_scaling={"rope_type": "default"}, mlp_bias=False, sliding_window=768)
    cross = dict(hidden_size=24, hidden_size_q=24, hidden_size_kv=24, num_attention_heads=3, attention_num_kv_heads=3)
    cross |= dict(word_window_size=1, key_query_norm=False, key_query_norm_per_head=False)
    wide = stack | dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, rope_theta=5e5)
    config = dict(
        encoder_config=stack | dict(cross_attention_config=cross),
        backbone_config=wide | dict(sliding_window=None),
        decoder_config=stack
        | dict(cross_attention_config=cross | dict(key_query_norm_per_head=True), cross_attn_every_layer=True),
        max_word_size=100,
    )
    flat = dataclasses.replace(CROSS, norm_per_head=False)
    local = dataclasses.replace(LOCAL, num_kv_heads=3)
    want = TFreeConfig(local, RELEASED.backbone, local, flat, CROSS)
    assert TFreeConfig.published(config) == want
    scaling = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    config["backbone_config"] |= dict(rope_scaling=scaling | dict(original_max_position_embeddings=8192), key_query_norm=True)
    backbone = TFreeConfig.published(config, scan=True).backbone
    assert backbone.rope_scaling == RopeScaling() and backbone.qk_norm == "all" and backbone.scan
    config["backbone_config"] |= dict(rope_scaling={"rope_type": "yarn"})
    with pytest.raises(ValueError, match=r"rope_scaling .*yarn.* not supported"):
        TFreeConfig.published(config)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(encoder_cross=CrossConfig(20, 2, 2)), "encoder_cross must be 8 wide per head"),
        (dict(decoder_cross=CrossConfig(24, 3, 2)), "24, 3 heads, 2 key heads"),
        (dict(decoder=SMALL, decoder_cross=CrossConfig(16, 2, 2)), "widths 24 and 16 must be one"),
    ],
)
def test_bad_configs(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RELEASED, **change)
