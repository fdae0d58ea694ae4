"""FlowCut: the official vectors, the rule written down again, cutting row by row, bad input."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.tokens import flow_budget, flow_cut, flow_layers, flow_score, keep_top_k
from tests.conftest import GOLDEN

PARAMS = {c["name"]: c["params"] for c in json.loads((GOLDEN / "tokens/flowcut_a.json").read_text())["cases"]}


@pytest.mark.parametrize("name", ["c0", "c1"])
def test_equals_the_official_code(golden, name):
    a = {k.split("/")[1]: v for k, v in golden("tokens/flowcut_a").items() if k.startswith(f"{name}/")}
    score = flow_score(a["cls_attn"], a["semantic_attn"], a["value"])
    np.testing.assert_allclose(score, a["score"], rtol=0, atol=2e-5)
    budget = flow_budget(a["cls_attn"], PARAMS[name]["rpl"], PARAMS[name]["target"])
    assert budget.max() == a["prune_num"]  # theirs is one number for the batch


def budget_rule(attention, left, target):
    p = attention.astype(np.float64) / attention.sum()
    entropy = -sum(q * np.log(q) for q in p if q > 0) / np.log(len(p))
    return round((len(p) - target) / left**0.5 * (1 - entropy**2))


@pytest.mark.parametrize("left", [1, 4, 10])
def test_budget_equals_the_rule(left):
    attention = np.random.default_rng(left).exponential(size=(5, 40)).astype(np.float32) ** 3
    attention[0, ::2] = 0  # 0 log 0 = 0
    want = [max(0, min(budget_rule(row, left, 12), 28)) for row in attention]
    np.testing.assert_array_equal(flow_budget(attention, left, 12), want)
    assert len(set(want)) > 1


def test_budget_of_masked_tokens_is_that_of_the_others():
    attention = jax.nn.softmax(3 * jax.random.normal(jax.random.key(0), (4, 40)))
    mask = jnp.ones((4, 40), bool).at[:, 30:].set(False)
    np.testing.assert_array_equal(flow_budget(attention, 3, 8, mask=mask), flow_budget(attention[:, :30], 3, 8))


def test_even_attention_cuts_nothing_and_the_last_layer_cuts_to_the_target():
    attention = jnp.stack([jnp.ones(16), jnp.zeros(16), jnp.full(16, jnp.nan), jnp.eye(16)[3]])
    np.testing.assert_array_equal(flow_budget(attention, 1, 6), [0, 0, 0, 10])
    np.testing.assert_array_equal(flow_budget(attention, 0, 6), 10)
    np.testing.assert_array_equal(flow_budget(attention, 0, 20), 0)  # no target is above what is there


def test_scores_without_mass_are_zero_and_not_nan():
    values = jnp.ones((3, 4, 2))
    zero = jnp.zeros((3, 4)).at[1].set(jnp.inf).at[2].set(0.25)
    np.testing.assert_array_equal(flow_score(zero, zero, values), [[0] * 4, [0] * 4, [1] * 4])


@pytest.mark.parametrize("capacity", [10, 4])
def test_cut_equals_the_rule(capacity):
    rng = np.random.default_rng(0)
    score, mask, count = rng.standard_normal((6, 10)), rng.random((6, 10)) < 0.8, np.array([0, 1, 3, 6, 9, 12])
    plan = flow_cut(score.astype(np.float32), jnp.asarray(count), capacity, mask=jnp.asarray(mask))
    for row in range(6):
        left = max(0, min(mask[row].sum() - count[row], capacity))
        want = sorted([i for i in np.argsort(-score[row]) if mask[row, i]][:left])
        assert np.flatnonzero(plan.kept[row]).tolist() == want
    assert (plan.overflow == 0).all()


def test_cut_of_a_static_number_is_keep_top_k():
    score = jax.random.normal(jax.random.key(1), (4, 10))
    np.testing.assert_array_equal(flow_cut(score, 7, 3).segment_ids, keep_top_k(score, 3).segment_ids)


def test_nan_goes_first_but_after_what_is_not_there():
    score = jnp.array([1.0, jnp.nan, -jnp.inf, 2.0])
    assert flow_cut(score, 1, 4).segment_ids.tolist() == [0, 1, -1, 2]  # NaN and -inf are equally low, the first stays
    mask = jnp.array([True, True, False, True])
    assert flow_cut(score, 0, 4, mask=mask).segment_ids.tolist() == [0, 1, -1, 2]


def test_an_encoder_ends_at_the_target_with_one_state():
    """The loop of an encoder: score, cut, carry; the state is explicit, and the composed plan says who is left."""
    target, n = 6, 24
    x = jax.random.normal(jax.random.key(2), (3, n, 8))
    plan, total = jm.identity(n, (3,)), None

    @jax.jit
    def encode(x, plan, total):
        for left in flow_layers(8):
            there = plan.sizes > 0
            logits = jnp.where(there, 4 * x[..., 0], -jnp.inf)
            attention = jax.nn.softmax(logits)
            total = flow_score(attention, attention, x, so_far=total)
            if left is not None:
                budget = flow_budget(attention, left, target, mask=there)
                cut = flow_cut(total, budget, n if left else target, mask=there)
                x, total = jm.merge(cut, (x, total), reduce="first")
                plan = jm.compose(cut, plan)
            x = jnp.roll(x, 1, axis=-1)
        return x, plan

    y, plan = encode(x, plan, total)
    np.testing.assert_array_equal(plan.sizes, jnp.ones((3, target)))
    np.testing.assert_array_equal(jnp.roll(jm.merge(plan, x, reduce="first"), 8, axis=-1), y)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda a: flow_score(a, a[:, :4], a[..., None]), r"got \(2, 8\), \(2, 4\) and \(2, 8, 1\)"),
        (lambda a: flow_budget(a, -1, 4), "got -1 and 4"),
        (lambda a: flow_cut(a, 1, 9), "between 0 and the number of tokens, 8; got 9"),
        (lambda a: flow_layers(1), "depth must be 2 or more, got 1"),
    ],
)
def test_bad_input(call, message, unchecked):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((2, 8)))
