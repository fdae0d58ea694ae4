"""Sampling rules against brute force, beam search against every text there is."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.sampling import NEVER, beam_init, beam_step, filtered, sample


def test_greedy_needs_no_key_and_a_draw_does(unchecked):
    logits = jax.random.normal(jax.random.key(0), (3, 4, 7))
    np.testing.assert_array_equal(sample(logits, temperature=0), np.argmax(logits, -1))
    with pytest.raises(ValueError, match=r"temperature of 1\.0 draws at random: give a key"):
        sample(logits)
    for wrong, text in (
        (dict(temperature=-1.0), "temperature must be above 0"),
        (dict(top_k=0), "top_k must be 1 or more"),
        (dict(top_p=0.0), r"top_p must lie in \(0, 1\]"),
    ):
        with pytest.raises(ValueError, match=text):
            sample(logits, jax.random.key(0), **wrong)


def test_filters_by_brute_force():
    logits = np.array(jax.random.normal(jax.random.key(1), (20, 9)))
    logits[3, :4] = 2.0  # ties
    for temperature, k, p in itertools.product((1.0, 0.5), (None, 1, 3, 9), (None, 0.01, 0.6, 1.0)):
        got = np.asarray(filtered(jnp.asarray(logits), temperature=temperature, top_k=k, top_p=p))
        for row, x in zip(got, logits / temperature, strict=True):
            may = np.ones(9, bool) if k is None else x >= np.sort(x)[-k]
            weight = np.where(may, np.exp(x), 0) / np.exp(x[may]).sum()
            if p is not None and p < 1:
                order = np.argsort(-np.where(may, x, -np.inf), kind="stable")
                may[order[np.cumsum(weight[order]) - weight[order] >= p]] = False
            np.testing.assert_array_equal(np.isfinite(row), may)
            np.testing.assert_allclose(row[may], x[may], rtol=1e-6)


def test_draws_follow_the_probabilities():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    draws = jax.jit(jax.vmap(lambda key: sample(logits, key, top_p=0.9)))(jax.random.split(jax.random.key(2), 4096))
    share = np.bincount(draws, minlength=4) / 4096
    np.testing.assert_allclose(share, np.array([0.5, 0.3, 0.15, 0.0]) / 0.95, atol=4 * (0.25 / 4096) ** 0.5)


def search(table, beams, n, **how):
    """Beam search over a Markov chain: the logits of the next id are a row of `table`."""
    step = jax.jit(lambda s, last: beam_step(s, table[last], eos=1, **how))
    state, last = beam_init(1, beams, n), jnp.zeros((1, beams), int)
    while bool(state.open.any()):
        state, _, last = step(state, last)
    return state


@pytest.mark.parametrize("penalty", [0.0, 1.0, -1.0])
def test_with_room_for_all_texts_beam_search_is_exact(penalty):
    table = jax.random.normal(jax.random.key(3), (3, 3))
    logp, n = np.asarray(jax.nn.log_softmax(table)), 4
    every = {}
    for text in itertools.product(range(3), repeat=n):
        text = text[: text.index(1) + 1] if 1 in text else text
        every[text] = sum(logp[a, b] for a, b in itertools.pairwise((0, *text))) / len(text) ** penalty
    best = sorted(every.items(), key=lambda kv: -kv[1])
    # Eager closing is exact only if a longer text can still be hoped for: with 81 beams none is closed before its time.
    state = search(table, 81, n, length_penalty=penalty)
    found = [tuple(t[:m]) for t, m in zip(state.done_ids[0].tolist(), state.done_length[0].tolist(), strict=True)]
    assert set(found[: len(best)]) == set(every) and set(found[len(best) :]) == {()}
    score = np.asarray(state.done_score[0, : len(best)])
    np.testing.assert_allclose(score, [s for _, s in best], rtol=1e-5)  # best first
    np.testing.assert_allclose(score, [every[t] for t in found[: len(best)]], rtol=1e-5)
    assert (np.asarray(state.done_score[0, len(best) :]) == NEVER).all()


def test_one_beam_is_greedy_and_early_stopping_is_earlier():
    table = jax.random.normal(jax.random.key(4), (5, 5)).at[:, 1].add(1.0)
    greedy, last = [], 0
    while last != 1 and len(greedy) < 8:
        last = int(jnp.argmax(table[last]))
        greedy.append(last)
    state = search(table, 1, 8)
    assert state.done_ids[0, 0, : len(greedy)].tolist() == greedy
    patient, eager = (search(table, 3, 8, length_penalty=2.0, early_stopping=e) for e in (False, True))
    assert int(eager.length) <= int(patient.length) and bool((patient.done_score >= eager.done_score).all())


def test_sizes_are_checked(unchecked):
    with pytest.raises(ValueError, match="beams and length must be 1 or more; got 0 and 3"):
        beam_init(1, 0, 3)
