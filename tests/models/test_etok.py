"""Learn your tokens: equal to its definition word by word; packing, causality, padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmerge as jm
from models.decoder import DecoderConfig, Places
from models.etok import ETok, ETokConfig, loss
from models.hat import WORD, read_words
from tests.models.test_hat import CAPACITY, TEXTS, packed

SMALL = DecoderConfig(16, 1, 2, 32)
CONFIG = ETokConfig(SMALL, DecoderConfig(24, 1, 4, 48, num_kv_heads=2), SMALL, tokens=3, max_word=8)


@pytest.fixture(scope="module")
def model():
    return ETok(CONFIG, rngs=nnx.Rngs(0))


@functools.partial(jax.jit, static_argnums=0)
def costs(graph, params, ids, starts, docs):
    model = nnx.merge(graph, params)
    return model.nats(ids, docs, read_words(starts, docs, capacity=CAPACITY, max_word=8))


def run(model, batch):
    return costs(*nnx.split(model), *batch)


def word_by_word(model, words):
    dense, p = lambda m: Places(jnp.arange(m)[None], jnp.zeros((1, m), int)), CONFIG.tokens
    tokens = []
    for word in words:
        x = jnp.concatenate([model.marks[...], model.embedding[...][jnp.array(word)]])[None]
        tokens.append(model.to_backbone(model.encoder_norm(model.encoder(x, dense(x.shape[1]))[:, :p])))
    y = model.backbone_norm(model.backbone(jnp.concatenate(tokens, 1), dense(p * len(words))))
    y = jnp.concatenate([model.first[...][None], y[:, :-p]], 1)
    out = []
    for i, word in enumerate(words):
        told = model.to_decoder(y[:, p * i : p * (i + 1)])
        x = jnp.concatenate([told, model.decoder_embedding[...][jnp.array(word)][None]], 1)
        out.append(model.head(model.norm(model.decoder(x, dense(x.shape[1]))))[0, p - 1 :])
    return jnp.concatenate(out)


def test_the_definition_word_by_word(model):
    text = TEXTS[0][:15]
    split = tuple(tuple(w) for w in jm.words.split(text, rule="whitespace"))
    logp = jax.nn.log_softmax(nnx.jit(word_by_word, static_argnums=1)(model, split))
    symbols = [s for word in split for s in (*word, WORD)][:-1]  # nothing follows the last word
    nats, scored, byte = run(model, packed([text], []))
    np.testing.assert_allclose(nats[scored], [-logp[i, s] for i, s in enumerate(symbols)], atol=1e-4)
    assert byte.sum() == len(text)


def test_documents_do_not_see_each_other_and_no_byte_a_later_one(model):
    nats, scored, _ = run(model, packed([TEXTS[0], TEXTS[1]], [TEXTS[1]]))
    alone, there, _ = run(model, packed([TEXTS[0]], []))
    want = jnp.concatenate([alone[0][there[0]], nats[1][scored[1]]])
    np.testing.assert_allclose(nats[0][scored[0]], want, atol=1e-5)
    ids, starts, docs = packed([TEXTS[0]], [TEXTS[0]])
    nats, scored, _ = run(model, (ids.at[1, 17].set(90), starts, docs))
    before = 17 + 3 * int(starts[0, :18].sum()) - 1
    np.testing.assert_allclose(nats[0, :before][scored[0, :before]], nats[1, :before][scored[1, :before]], atol=1e-5)
    assert abs(nats[0] - nats[1])[before] > 1e-3


@pytest.mark.slow
def test_loss_learns_everywhere(model):
    graph, params = nnx.split(model)
    batch = packed([TEXTS[0]], [TEXTS[1]])
    step = jax.jit(jax.value_and_grad(lambda p: loss(nnx.merge(graph, p), *batch, capacity=CAPACITY), has_aux=True))
    (total, metrics), grads = step(params)
    nats, scored, byte = run(model, batch)
    np.testing.assert_allclose(total, nats[scored].sum() / byte.sum(), atol=1e-5)
    count = read_words(*batch[1:], capacity=CAPACITY, max_word=8).plan.sizes > 0  # one word is longer than 8 bytes
    assert metrics["overflow"] == 0 and metrics["rate"] == pytest.approx(1 - 3 * float(count.sum() / byte.sum()))
    assert not [path for path, g in nnx.to_flat_state(grads) if not np.asarray(g[...]).any()]


def test_bad_config():
    with pytest.raises(ValueError, match="tokens must be 1 or more"):
        ETokConfig(SMALL, SMALL, SMALL, tokens=0)
