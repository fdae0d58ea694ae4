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
from models.decoder import DecoderConfig, Places
from models.hat import HAT, STOP, WORD, CrossConfig, HATConfig, TFreeConfig, TFreeHAT, loss, read_words, torch_name, with_marks
from models.layers import copy_layers

ATOL = 1e-4  # the golden vectors' own figure for float32
LOCAL = DecoderConfig(24, 2, 3, 32, window=768)
CROSS = CrossConfig(24, 3, 3)
RELEASED = TFreeConfig(LOCAL, DecoderConfig(32, 2, 4, 48, num_kv_heads=2, rope_theta=5e5), LOCAL, CROSS, CROSS)
SMALL, LARGE = DecoderConfig(16, 2, 2, 32), DecoderConfig(24, 2, 4, 48, num_kv_heads=2)
PAPER = HATConfig(SMALL, LARGE, SMALL, max_word=8)
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


@functools.partial(jax.jit, static_argnums=0, static_argnames="capacity")
def value_and_grad(graph, params, ids, starts, docs, capacity=None):
    f = lambda p: loss(nnx.merge(graph, p), ids, starts, docs, capacity=capacity)
    return jax.value_and_grad(f, has_aux=True)(params)


def run(model, ids, starts, docs, capacity=None):
    graph, params = nnx.split(model)
    (total, metrics), grads = value_and_grad(graph, params, ids, starts, docs, capacity=capacity)
    return total, metrics, nnx.merge(graph, grads)


def packed(*rows, n=48, rule="whitespace", stop=()):
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


@pytest.mark.parametrize("name", ["t0", "t1"])
def test_golden(released, name):
    model, z = released
    ids = jnp.asarray(z[f"{name}/input_ids"])
    starts = jnp.zeros(ids.shape, bool).at[0, z[f"{name}/cu_words"][:-1]].set(True)
    words = read_words(starts, jnp.zeros_like(ids), capacity=12)
    logits = nnx.jit(lambda m: m(ids, jnp.zeros_like(ids), words))(model)
    np.testing.assert_allclose(logits, z[f"{name}/logits"], atol=ATOL)
    total, metrics, grads = run(model, ids, starts, jnp.zeros_like(ids), capacity=12)
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
    got, net = model.encode(x, at, words), model.connector
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
    text = TEXTS[0]
    ids, starts, docs = packed([text], n=len(text))
    words = read_words(starts, docs, capacity=9, max_word=8)
    stream = with_marks(ids, words)
    logits = nnx.jit(lambda m: m(stream, words))(paper)[0]
    split = [list(w) for w in jm.words.split(text, rule="whitespace")]
    symbols = [s for w in split for s in (WORD, *w)]
    assert stream.ids[0, : len(symbols)].tolist() == symbols
    want = word_by_word(paper, split)
    np.testing.assert_allclose(logits[: len(symbols)], want, atol=ATOL)
    # The loss: each slot predicts the next; all of it shared out among the bytes.
    logp = jax.nn.log_softmax(want)
    nats = -sum(logp[i, s] for i, s in enumerate(symbols[1:]))
    total, metrics, _ = run(paper, ids, starts, docs, capacity=9)
    np.testing.assert_allclose(total, nats / len(text), atol=ATOL)
    assert metrics["rate"] == pytest.approx(1 - len(split) / len(text))


def test_a_document_that_is_over_says_so(paper):
    ids, starts, docs = packed([TEXTS[0]], stop=[STOP])
    words = read_words(starts, docs, capacity=12, max_word=8)
    stream = with_marks(ids, words)
    here = int(jnp.argmax(stream.ids[0] == STOP))
    assert stream.ids[0, here - 1] == WORD
    _, scored, byte = paper.nats(ids, docs, words)
    assert scored[0, here - 1] and byte[0, here - 1] and not scored[0, here:].any()


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
    together = packed([TEXTS[0], TEXTS[1]], n=54)
    alone = [packed([t], n=54) for t in TEXTS]
    cost = nnx.jit(lambda m, ids, starts, docs: m.nats(ids, docs, read_words(starts, docs, capacity=20, max_word=8)))
    nats, scored, _ = cost(either, *together)
    apart = [cost(either, *x) for x in alone]
    want = jnp.concatenate([nats[scored] for nats, scored, _ in apart])
    np.testing.assert_allclose(nats[scored], want, atol=ATOL)


def test_no_byte_sees_a_later_one(either):
    """Change a byte: what was predicted before it stays. Boundaries are given, so no word may leak its own end."""
    ids, starts, docs = packed([TEXTS[0]], n=30)
    words = read_words(starts, docs, capacity=10, max_word=8)

    def logits(model, ids):
        return model(with_marks(ids, words), words) if isinstance(either, HAT) else model(ids, docs, words)

    f = nnx.jit(logits)
    t = 17
    slot = t + int(words.plan.segment_ids[0, t]) + 1 if isinstance(either, HAT) else t
    a, b = f(either, ids), f(either, ids.at[0, t].set(90))
    np.testing.assert_allclose(a[:, :slot], b[:, :slot], atol=1e-5)
    assert np.abs(a - b)[:, slot].max() > 1e-3


def test_words_that_do_not_fit_are_counted_and_not_scored(either):
    ids, starts, docs = packed([TEXTS[0]], n=30)
    cut = int(np.flatnonzero(starts[0])[4])
    total, metrics, _ = run(either, ids, starts, docs, capacity=4)
    want, _, _ = run(either, ids, starts, jnp.where(jnp.arange(30)[None] < cut, docs, -1), capacity=4)
    assert metrics["overflow"] == 30 - cut
    np.testing.assert_allclose(total, want, atol=1e-5)


def test_padding_alone_costs_nothing(either):
    ids = jnp.zeros((2, 16), int)
    total, _, grads = run(either, ids, ids > 0, ids - 1)
    assert total == 0 and all(not np.asarray(g).any() for g in jax.tree.leaves(nnx.state(grads)))


def test_scan_and_remat_change_nothing(either):
    batch = packed([TEXTS[0], TEXTS[1]], n=54)
    again = lambda c: dataclasses.replace(c, scan=True, remat="dots")
    config = dataclasses.replace(
        either.c, **{name: again(getattr(either.c, name)) for name in ("encoder", "backbone", "decoder")}
    )
    scanned = type(either)(config, rngs=nnx.Rngs(7))
    copy_layers(either, scanned)
    want, _, grads = run(either, *batch)
    got, _, stacked = run(scanned, *batch)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(nnx.state(stacked)))
    unstacked = type(either)(either.c, rngs=nnx.Rngs(7))
    copy_layers(stacked, unstacked)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), nnx.state(unstacked), nnx.state(grads))


def test_bfloat16_stays_near_float32(either):
    """Some forty products in a row, each off by 2^-9 of its size and not of one sign: 2^-9 sqrt(40) of a nat, with room 2."""
    batch = packed([TEXTS[0], TEXTS[1]], n=54)
    low = type(either)(either.c, dtype=jnp.bfloat16, rngs=nnx.Rngs(7))
    copy_layers(either, low)
    want, got = run(either, *batch)[0], run(low, *batch)[0]
    assert 0 < abs(float(got - want)) < 2 * 2**-9 * 40**0.5 * float(want)


def test_eight_devices_equal_one(mesh, either):
    rows = [[TEXTS[i % 2], TEXTS[(i + 1) % 2][: i + 3]] for i in range(8)]
    batch = packed(*rows, n=54)
    want = run(either, *batch, capacity=20)
    graph, params = nnx.split(either)
    with jax.set_mesh(mesh):
        place = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
        got = value_and_grad(graph, place(params), *(place(x, "data") for x in batch), capacity=20)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=ATOL), got[0], want[:2])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=ATOL), got[1], nnx.state(want[2]))


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
