"""Exact byte-level probabilities: the official vectors, and every text of a tiny tokenizer and model, by brute force."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge import words

# A BPE tokenizer: merges in order of rank.
VOCABULARY = [b"a", b"b", b"c", b"ab", b"bb", b"abc", b"aa", b""]
MERGES = {(0, 1): 3, (1, 1): 4, (3, 2): 5, (0, 0): 6}
LAST = len(VOCABULARY) - 1
LONGEST = 4


@functools.cache
def encode(text):
    tokens = [VOCABULARY.index(text[i : i + 1]) for i in range(len(text))]
    for (left, right), merged in MERGES.items():
        out = []
        for token in tokens:
            if out and out[-1] == left and token == right:
                out[-1] = merged
            else:
                out.append(token)
        tokens = out
    return tokens


@functools.cache
def log_probs(tokens):
    """A random model of all its context, which ends every text after so many tokens."""
    logits = np.random.default_rng([7, *tokens]).normal(size=len(VOCABULARY))
    if len(tokens) >= LONGEST:
        logits[:LAST] = -np.inf
    return logits - np.logaddexp.reduce(logits)


@functools.cache
def texts():
    """Every text with its probability, where the model keeps to what the tokenizer writes."""
    out = {}
    for n in range(LONGEST + 1):
        for tokens in itertools.product(range(LAST), repeat=n):
            text = b"".join(VOCABULARY[t] for t in tokens)
            if tuple(encode(text)) != tokens:
                continue
            log_p = 0.0
            for i, token in enumerate([*tokens, LAST]):
                here = np.where(words.canonical_after(VOCABULARY, encode, tokens[:i], end=LAST), log_probs(tokens[:i]), -np.inf)
                log_p += here[token] - np.logaddexp.reduce(here)
            out[text] = np.exp(log_p)
    return out


def prefix_probability(prefix):
    return sum(p for text, p in texts().items() if text.startswith(prefix))


def model(**kwargs):
    return words.byte_model(VOCABULARY, encode, log_probs, end=LAST, **kwargs)


def test_every_prefix_has_the_probability_of_its_texts():
    """The sum over all texts that begin so, also mid-token, and the next byte's and the end's by division."""
    assert sum(texts().values()) == pytest.approx(1) and len(texts()) > 500
    exact = model(renormalize=True)
    for n in range(5):
        for letters in itertools.product(b"abc", repeat=n):
            prefix = bytes(letters)
            want = prefix_probability(prefix)
            if want == 0:
                continue
            covers = exact.init(prefix)
            assert covers.log_prob == pytest.approx(np.log(want), abs=1e-9)
            p = np.exp(exact.predict(covers))
            assert p.sum() == pytest.approx(1)
            for byte in b"abc":
                assert p[byte] == pytest.approx(prefix_probability(prefix + bytes([byte])) / want, abs=1e-9)
            assert p[words.END] == pytest.approx(texts().get(prefix, 0.0) / want, abs=1e-9)


def test_covers_are_those_of_the_definition():
    """Enumerated from nothing: every canonical sequence whose last token alone reaches the end; in both forms of canonical."""
    exact = model()
    for prefix in (b"a", b"ab", b"abb", b"aab", b"cab", b"bbab"):
        covers = {}
        for n in range(1, len(prefix) + 1):
            for tokens in itertools.product(range(LAST), repeat=n):
                text = b"".join(VOCABULARY[t] for t in tokens)
                if (
                    text.startswith(prefix)
                    and len(text) - len(VOCABULARY[tokens[-1]]) < len(prefix)
                    and encode(text) == list(tokens)
                ):
                    covers[tokens] = sum(log_probs(tokens[:i])[t] for i, t in enumerate(tokens))
        assert set(words.cover_encodings(VOCABULARY, encode, prefix)) == set(covers)
        got = exact.init(prefix)
        assert got.log_prob == pytest.approx(np.logaddexp.reduce(list(covers.values())))
        assert got.log_p == pytest.approx(covers[tuple(encode(prefix))])
        assert len(got.beyond) == len(covers) - 1


def test_pairs_decide_for_bpe():
    pairs = words.canonical_pairs(VOCABULARY, encode, end=LAST)
    for n in range(4):
        for tokens in itertools.product(range(LAST), repeat=n):
            if encode(b"".join(VOCABULARY[t] for t in tokens)) == list(tokens):
                np.testing.assert_array_equal(pairs(tokens), words.canonical_after(VOCABULARY, encode, tokens, end=LAST))
    np.testing.assert_allclose(model(canonical=pairs).predict(model().init(b"ab")), model().predict(model().init(b"ab")))


def test_one_call_per_byte():
    calls = []
    counted = lambda tokens: calls.append(tokens) or log_probs(tokens)
    exact = words.byte_model(VOCABULARY, encode, counted, end=LAST)
    covers = exact.init()
    for byte in b"abcab":
        exact.predict(covers)
        covers = exact.append(covers, byte)
    assert len(calls) <= 5 and len(set(calls)) == len(calls)


def test_bits_per_byte_are_those_of_whole_texts():
    some = [t for t in texts() if t][::37]
    canonical = words.canonical_pairs(VOCABULARY, encode, end=LAST)
    got = words.bits_per_byte(some, encode, log_probs, end=LAST, canonical=canonical)
    assert got == pytest.approx(-sum(np.log2(texts()[t]) for t in some) / sum(map(len, some)))
    exact = model(renormalize=True)
    covers, log_p = exact.init(), 0.0
    for symbol in [*some[3], words.END]:
        log_p += exact.predict(covers)[symbol]
        covers = exact.append(covers, symbol) if symbol != words.END else covers
    assert log_p == pytest.approx(np.log(texts()[some[3]]))


def test_next_symbol_equals_the_official(golden):
    """Eight steps of the official code, its covers and its model's outputs given: also as one batch, under jit."""
    z = golden("near/exact_byte_probs_a")
    steps = np.arange(8)
    own = z["cover_logp"][steps, z["cover_self"]]
    covers = np.where(np.arange(64) < z["n_cover"][:, None], z["cover_first"], -1)
    got = jax.jit(words.next_symbol, static_argnames="num_symbols")(
        jnp.asarray(covers), jnp.asarray(z["cover_logp"]), jnp.asarray(own), jnp.asarray(z["first_symbol"]),
        jnp.asarray(z["logp_next"]), valid=jnp.asarray(z["valid_mask"]), num_symbols=259,
    )  # fmt: skip
    np.testing.assert_allclose(np.exp(got), z["pred"], atol=1e-6)
    assert np.abs(np.exp(got) - z["pred_naive_token"]).sum(axis=1).min() > 0.5  # what the first byte of the next token would be


def test_next_symbol_is_predict():
    exact = model()
    first = np.array([*(t[0] for t in VOCABULARY[:LAST]), words.END])
    for prefix in (b"a", b"ab", b"cab"):
        covers = exact.init(prefix)
        valid = words.canonical_after(VOCABULARY, encode, covers.tokens, end=LAST)
        symbols, log_p = zip(*((rest[0], p) for rest, p in covers.beyond), strict=True) if covers.beyond else ((-1,), (0.0,))
        got = words.next_symbol(
            jnp.array(symbols), jnp.array(log_p), jnp.float32(covers.log_p), jnp.asarray(first),
            jnp.asarray(log_probs(covers.tokens), jnp.float32), valid=jnp.asarray(valid),
        )  # fmt: skip
        np.testing.assert_allclose(np.exp(got), np.exp(exact.predict(covers)), atol=1e-6)


def test_bad_arguments():
    with pytest.raises(ValueError, match="no text has byte 122 after b'ab'"):
        model().append(model().init(b"ab"), ord("z"))
    with pytest.raises(ValueError, match="no token of the vocabulary has a byte"):
        words.byte_model([b""], encode, log_probs)
    with pytest.raises(ValueError, match="the texts have no bytes"):
        words.bits_per_byte([b""], encode, log_probs)
