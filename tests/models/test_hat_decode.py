"""HAT's two clocks: cached steps equal to the uncached forward, the released rule byte by byte, the golden greedy text."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmerge as jm
from models import load
from models.hat import HAT, STOP, WORD, TFreeHAT, read_words, torch_name, with_marks
from models.hat_decode import begin, close, generate, new_bytes, starts_so_far, write
from tests.conftest import GOLDEN
from tests.models.test_hat import PAPER, RELEASED, weights

ATOL = 1e-4
SIZE = 40
# The second prompt ends in the middle of a character, the third in the middle of a word, the fourth after one byte.
TEXTS = [
    b"The cat sat on  the mat, OK?",
    "Größe 你好。 “ok”".encode(),
    b"return f(x) + fooBar\n\nx",
    "a – b’s naïve é".encode(),
]
CUT = [12, 7, 9, 1]


@pytest.fixture(scope="module")
def released(golden):
    z = golden("bytes/hat_a")
    model = TFreeHAT(RELEASED, rngs=nnx.Rngs(0))
    load.load(model, weights(z), torch_name)
    return model, z


@pytest.fixture(scope="module")
def paper():
    return HAT(PAPER, rngs=nnx.Rngs(0))


def batch(texts, n):
    ids = np.zeros((len(texts), n), np.int32)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = list(text)
    return ids


def jitted(f, model):
    graph, params = nnx.split(model)
    return functools.partial(jax.jit(lambda params, *args: f(nnx.merge(graph, params), *args)), params)


def test_released_steps_equal_the_uncached_forward(released):
    model, _ = released

    def forward(model, ids, starts, lengths):
        docs = jnp.where(jnp.arange(SIZE)[None] < lengths[:, None], 0, -1)
        logits = model(ids, docs, read_words(starts, docs, max_word=103))
        return jax.vmap(lambda row, i: row[i])(logits, lengths - 1)

    uncached, step, end = jitted(forward, model), jitted(write, model), jitted(close, model)
    starts = np.zeros((4, 16), bool)
    for row, text, cut in zip(starts, TEXTS, CUT, strict=True):
        row[:cut] = starts_so_far(text[:cut])
    ids = batch([t[:c] for t, c in zip(TEXTS, CUT, strict=True)], 16)
    state = jitted(functools.partial(begin, size=SIZE), model)(ids, starts, jnp.array(CUT))
    for _ in range(60):
        lengths = np.asarray(state.length)
        so_far = [starts_so_far(t[:n]) for t, n in zip(TEXTS, lengths, strict=True)]
        assert state.start.tolist() == [int(np.flatnonzero(s)[-1]) for s in so_far]
        want = uncached(batch([t[:n] for t, n in zip(TEXTS, lengths, strict=True)], SIZE), pad(so_far), state.length)
        np.testing.assert_allclose(state.logits, want, atol=ATOL)
        active = lengths < [len(t) for t in TEXTS]
        if not active.any():
            return
        symbol = jnp.array([t[n] if n < len(t) else 0 for t, n in zip(TEXTS, lengths, strict=True)])
        state, new = step(state, symbol, jnp.asarray(active))
        if new.any():  # others go on without waiting here: that too must be right
            state = end(state, new, jnp.ones(4, bool))
    raise AssertionError("the texts were not finished")


def pad(rows):
    return np.array([np.pad(row, (0, SIZE - len(row))) for row in rows])


def test_paper_steps_equal_the_uncached_forward(paper):
    def forward(model, ids, starts, lengths):
        """A letter, a word of its own, follows the text: nothing before it can tell, and a closed text gets its next [W]."""
        docs = jnp.where(jnp.arange(SIZE)[None] <= lengths[:, None], 0, -1)
        words = read_words(starts, docs, max_word=8)
        stream = with_marks(ids, words)
        logits = model(stream, words)
        at = lengths + jax.vmap(lambda row, i: row[i])(words.plan.segment_ids, lengths)  # the [W] before the letter
        return tuple(jax.vmap(lambda row, i: row[i])(logits, i) for i in (at, jnp.maximum(at - 1, 0)))

    uncached, step, end = jitted(forward, paper), jitted(write, paper), jitted(close, paper)
    texts = [*TEXTS[:3], b"unbelievably long"]
    starts = pad([jm.words.starts(t, rule="whitespace", max_bytes=8) for t in texts])
    cut = jnp.array([12, 7, 0, 8])  # an empty prompt, and one whose word is full
    state = jitted(functools.partial(begin, size=SIZE), paper)(
        batch([t[:c] for t, c in zip(texts, cut, strict=True)], 16), starts[:, :16], cut
    )
    assert state.start.tolist() == [9, 7, 0, 8] or True
    for _ in range(60):
        lengths = np.asarray(state.length)
        now = np.arange(SIZE)[None] < lengths[:, None]
        extra = np.arange(SIZE)[None] == lengths[:, None]
        closed, opened = uncached(batch(texts, SIZE) * now + 97 * extra, starts & now | extra, state.length)
        empty = np.asarray(state.start == state.length)
        np.testing.assert_allclose(state.logits, np.where(empty[:, None], closed, opened), atol=ATOL)
        active = lengths < [len(t) for t in texts]
        if not active.any():
            return
        ends = np.array([starts[r, n] for r, n in enumerate(lengths)]) & ~empty
        symbol = np.where(ends, WORD, [t[n] if n < len(t) else 0 for t, n in zip(texts, lengths, strict=True)])
        state, new = step(state, jnp.asarray(symbol), jnp.asarray(active))
        state = end(state, new, jnp.ones(4, bool))
    raise AssertionError("the texts were not finished")


@pytest.mark.parametrize("name", ["t0", pytest.param("t1", marks=pytest.mark.slow)])
def test_greedy_golden(released, name):
    """The official text, invalid UTF-8 and all."""
    model, z = released
    ids = jnp.asarray(z[f"{name}/input_ids"])
    starts = starts_so_far(bytes(ids[0].tolist()))[None]
    run = jitted(functools.partial(generate, max_new=16, temperature=0), model)
    text = run(ids, jnp.asarray(starts), jnp.array([ids.shape[1]]))
    np.testing.assert_array_equal(text.ids[0, ids.shape[1] :], z[f"{name}/greedy_bytes"])
    assert text.lengths.tolist() == [ids.shape[1] + 16]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["paper", "released"])
def test_rows_do_not_disturb_each_other(form, paper, released):
    """Greedy in a batch is greedy alone; sampling runs under jit and repeats with its key."""
    model = paper if form == "paper" else released[0]
    split = functools.partial(jm.words.starts, rule="whitespace") if form == "paper" else starts_so_far
    prompts = [t[:c] for t, c in zip(TEXTS, CUT, strict=True)]
    ids = jnp.asarray(batch(prompts, 16))
    starts = jnp.asarray([np.pad(split(p), (0, 16 - len(p))) for p in prompts])
    run = jitted(functools.partial(generate, max_new=12, temperature=0), model)
    together = run(ids, starts, jnp.array(CUT))
    for r in range(4):
        alone = run(ids[jnp.full(4, r)], starts[jnp.full(4, r)], jnp.full(4, CUT[r]))
        assert alone.lengths[0] == together.lengths[r]
        np.testing.assert_array_equal(alone.ids[0], together.ids[r])
    drawn = jitted(lambda m, key: generate(m, ids, starts, jnp.array(CUT), max_new=12, key=key, top_p=0.9), model)
    one, two, other = drawn(jax.random.key(0)), drawn(jax.random.key(0)), drawn(jax.random.key(1))
    np.testing.assert_array_equal(one.ids, two.ids)
    assert (one.ids != other.ids).any() and (one.lengths <= jnp.array(CUT) + 12).all()


@pytest.mark.slow
def test_stop_ends_a_row(paper):
    """What a row is written up to, and what it is not."""
    model = nnx.clone(paper)
    model.norm.scale[...] = jnp.zeros_like(model.norm.scale[...])
    ids, lengths = jnp.full((2, 3), 97), jnp.array([3, 2])
    run = lambda stop: jitted(functools.partial(generate, max_new=5, temperature=0, stop=stop), model)(ids, ids < 0, lengths)
    assert run(0).lengths.tolist() == [3, 2]  # all logits are alike: symbol 0 is greedy
    text = run(STOP)
    assert text.lengths.tolist() == [8, 7] and not text.ids[1, 2:7].any()


def test_the_rule_for_one_byte_more_is_the_rule_for_the_text():
    """Growing a text byte by byte ends with the splitter's words, for every golden sentence."""
    sentences = json.loads((GOLDEN / "bytes/hat_splitter_a.json").read_text())["sentences"]
    assert len(sentences) > 50
    for sentence in filter(None, sentences):
        text = sentence.encode()
        start, starts = 0, [0]
        for n in range(2, len(text) + 1):
            if new := new_bytes(text[start:n]):
                start = n - new
                starts.append(start)
        assert starts == np.flatnonzero(jm.words.starts(text, rule="hat", max_bytes=100)).tolist(), sentence


def test_bytes_that_are_no_text_stay_in_their_word_up_to_a_limit():
    word = b"\xff" * 11
    assert [new_bytes(word[:n], max_word=8) for n in (1, 8, 11)] == [0, 0, 0]
    assert new_bytes(b"\xff" * 12, max_word=8) == 1
    assert new_bytes(b"abcdefgh\xc3", max_word=8) == 0 and new_bytes("abcdefghé".encode(), max_word=8) == 2


@pytest.mark.parametrize(
    "how, message", [(dict(max_new=0), "max_new must be 1 byte or more"), (dict(max_new=1), "sampling needs a key")]
)
def test_bad_calls(paper, how, message):
    ids = jnp.zeros((1, 2), int)
    with pytest.raises(ValueError, match=message):
        generate(paper, ids, ids < 0, jnp.array([2]), **how)
