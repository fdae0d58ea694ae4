"""Cached decoding equals the uncached forward: greedy, prompts padded on either side, packed encoders, beams, early stops."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import decoding, load, mrt5, t5
from models.fold import Scanned
from models.lm import ByteLM
from tests.conftest import GOLDEN
from tests.models import test_mrt5, test_t5
from tests.models.test_t5 import ATOL, state_dict

LM = t5.T5Config(32, 12, 48, 2, num_decoder_layers=2, vocab_size=64)
NUMBERS = ("length", "eos", "temperature", "top_k", "top_p", "beams", "length_penalty", "early_stopping")


def jitted(f):
    """f(model, ...) as one compiled program."""

    @functools.partial(jax.jit, static_argnames=("graph", *NUMBERS))
    def run(graph, params, *args, **kwargs):
        return f(nnx.merge(graph, params), *args, **kwargs)

    return lambda model, *args, **kwargs: run(*nnx.split(model), *args, **kwargs)


generate, beam_search = jitted(decoding.generate), jitted(decoding.beam_search)


@pytest.fixture(scope="module", params=[False, True], ids=["list", "scanned"])
def byt5(request, golden):
    z = golden("bytes/byt5_a")
    model = t5.T5(test_t5.CONFIG, scan=request.param, rngs=nnx.Rngs(0))
    load.load(model, state_dict(z), t5.torch_name, ignore=t5.ALIASES)
    return model, z, jax.jit(model.encode)(jnp.asarray(z["in/input_ids"]), jnp.asarray(z["in/attention_mask"]) > 0)


@pytest.fixture(scope="module")
def lm():
    return ByteLM(LM, rngs=nnx.Rngs(0))


def test_greedy_text_of_byt5(byt5):
    model, z, encoded = byt5
    want = z["out/greedy_ids"][:, 1:]
    got = generate(model, encoded=encoded, length=want.shape[1])
    np.testing.assert_array_equal(got.ids, want)
    uncached = model.decode(t5.shift_right(jnp.asarray(want)), encoded.states, encoded.key_bias).logits
    p = jnp.take_along_axis(jax.nn.log_softmax(uncached), jnp.asarray(want)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(got.score, [p[row, :n].sum() for row, n in enumerate(got.length)], atol=ATOL)


@pytest.mark.parametrize("name, how", [("soft", {}), ("hard", dict(capacity=17, keep_gate=False))])
def test_greedy_text_of_mrt5(golden, name, how):
    z = golden("bytes/mrt5_a")
    model = mrt5.MrT5(test_mrt5.CONFIG, rngs=nnx.Rngs(0))
    load.load(model, state_dict(z), test_mrt5.NAME, ignore=t5.ALIASES)
    encoded = jax.jit(lambda ids: model.encode(ids, **how))(jnp.asarray(z["in/input_ids"]))
    want = z[f"{name}/greedy_ids"][:, 1:]
    np.testing.assert_array_equal(generate(model, encoded=encoded, length=want.shape[1]).ids, want)


@pytest.mark.parametrize("side", ["left", "right", "scattered"])
def test_every_cached_logit_is_the_uncached_one(lm, side):
    one = jax.jit(lambda ids, cache: decoding.step(lm, ids, cache))
    begin = jax.jit(lambda ids, mask: decoding.start(lm, ids, prompt_mask=mask, room=7))
    ids = jax.random.randint(jax.random.key(0), (3, 12), 0, 64)
    lengths, p = [5, 1, 3], 5
    prompt, mask = np.full((3, p), 63), np.zeros((3, p), bool)
    for row, n in enumerate(lengths):
        where = {"left": range(p - n, p), "right": range(n), "scattered": sorted([0, 4, 2, 1, 3][:n])}[side]
        prompt[row, list(where)], mask[row, list(where)] = ids[row, :n], True
    logits, cache = begin(jnp.asarray(prompt), jnp.asarray(mask))
    more = jnp.stack([ids[row, n : n + 7] for row, n in enumerate(lengths)])
    got = [logits[:, None]]
    for piece in (more[:, :1], more[:, 1:2], more[:, 2:7]):  # by single ids and by several
        logits, cache = one(piece, cache)
        got.append(logits)
    want = jax.jit(lm)(ids)
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(jnp.concatenate(got, 1)[row], want[row, n - 1 : n + 7], atol=1e-5)


def test_decoder_prompts_of_t5(byt5):
    model, _, encoded = byt5
    prompt, mask = jnp.array([[70, 80, 90], [0, 0, 75]]), jnp.array([[True] * 3, [False, False, True]])
    logits, _ = jax.jit(lambda: decoding.start(model, prompt, prompt_mask=mask, encoded=encoded, room=1))()
    for row, ids in enumerate(([0, 70, 80, 90], [0, 75])):
        memory = encoded.states[row : row + 1], encoded.key_bias[row : row + 1]
        full = jax.jit(lambda ids, *memory: model.decode(ids, *memory).logits)(jnp.array([ids]), *memory)
        np.testing.assert_allclose(logits[row], full[0, -1], atol=1e-5)


def test_a_row_ends_alone_and_all_rows_end_the_loop(lm):
    prompt = jnp.array([[3], [9], [20]])
    free = generate(lm, prompt, length=12, eos=None)
    assert free.length.tolist() == [12] * 3
    eos = int(free.ids[1, 4])
    got = generate(lm, prompt, length=12, eos=eos)
    for row in range(3):
        text = free.ids[row].tolist()
        end = text.index(eos) + 1 if eos in text else 12
        assert got.ids[row].tolist() == text[:end] + [0] * (12 - end) and int(got.length[row]) == end


def test_samples_are_drawn_with_the_key_and_rarely_repeat(lm):
    prompt = jnp.zeros((4, 1), int)
    how = dict(length=10, eos=None, temperature=1.0, top_p=0.95)
    a, b, c = (generate(lm, prompt, key=jax.random.key(seed), **how).ids for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c) and not np.array_equal(a[0], a[1])
    np.testing.assert_array_equal(
        generate(lm, prompt, key=jax.random.key(0), length=10, eos=None, temperature=1.0, top_k=1).ids,
        generate(lm, prompt, length=10, eos=None).ids,
    )


def test_beams_are_those_of_hugging_face(byt5):
    model, _, encoded = byt5
    scanned = isinstance(model.encoder.blocks, Scanned)
    for case in json.loads((GOLDEN / "bytes/byt5_beams.json").read_text())["cases"]:
        if scanned != (case["eos"] == 130):
            continue  # one end mark per form, to compile half as much
        how = {k: case[k] for k in ("eos", "length_penalty", "early_stopping")}
        got = beam_search(model, encoded=encoded, length=9, beams=3, **how)
        for row in range(2):
            texts = [t[:n] for t, n in zip(got.ids[row].tolist(), got.length[row].tolist(), strict=True)]
            assert texts == case["texts"][row], how
            np.testing.assert_allclose(got.score[row], case["scores"][row], atol=ATOL)


def test_one_beam_is_greedy(byt5):
    model, z, encoded = byt5
    want = z["out/greedy_ids"][:, 1:]
    np.testing.assert_array_equal(beam_search(model, encoded=encoded, length=want.shape[1], beams=1).ids[:, 0], want)


def test_bfloat16_keeps_a_cache_of_bfloat16():
    """Both forms round alike: they differ by the order of sums alone."""
    model = ByteLM(dataclasses.replace(LM, softmax1=True), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    logits, cache = decoding.start(model, jnp.array([[1, 2, 3]]), room=4)
    assert cache.k.dtype == jnp.bfloat16 and logits.dtype == jnp.float32 and cache.k.shape[2] == 7
    np.testing.assert_allclose(logits[0], model(jnp.array([[1, 2, 3]]))[0, -1], atol=0.02)


def test_what_is_missing_is_named(lm, byt5):
    with pytest.raises(ValueError, match=r"T5 needs encoded= \(model\.encode\(ids\)\)"):
        decoding.start(byt5[0], room=1)
    with pytest.raises(ValueError, match="ByteLM takes no encoded="):
        decoding.start(lm, jnp.zeros((1, 1), int), room=1, encoded=byt5[2])
    with pytest.raises(ValueError, match="needs a prompt of at least one id per row"):
        decoding.start(lm, room=1)
    with pytest.raises(ValueError, match="length counts the bytes to write and must be 1 or more, got 0"):
        decoding.generate(lm, jnp.zeros((1, 1), int), length=0)
