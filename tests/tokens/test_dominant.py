"""Keeping some and assigning the rest: the official vectors of VisionZip and VisionDrop, the rules, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.tokens import assign, dominant_and_contextual, keep, keep_top_k, representatives

B, N, D = 3, 21, 8


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (B, N, D))


@pytest.fixture(scope="module")
def score():
    return jax.nn.softmax(jax.random.normal(jax.random.key(1), (B, N)))


def cosines(x):
    unit = np.asarray(x, np.float64) / np.linalg.norm(np.asarray(x, np.float64), axis=-1, keepdims=True)
    return unit @ unit.T


# --- assign


def test_assign_equals_the_rule(x):
    rng = np.random.default_rng(0)
    stay = rng.random((B, N)) < 0.4
    targets, rest = stay & (rng.random((B, N)) < 0.7), rng.random((B, N)) < 0.8
    plan = jax.jit(lambda x, stay, targets, rest: assign(x, stay, 12, targets=targets, rest=rest))(x, stay, targets, rest)
    for b in range(B):
        order, likeness = np.flatnonzero(stay[b]).tolist(), cosines(x[b])
        for i in range(N):
            best = max(np.flatnonzero(targets[b]), key=lambda j: likeness[i, j])
            want = order.index(i) if stay[b, i] else order.index(best) if rest[b, i] else -1
            assert plan.segment_ids[b, i] == want


def test_assign_of_no_rest_is_keep(x, score):
    mask = keep_top_k(score, 6).kept
    none = jnp.zeros_like(mask)
    np.testing.assert_array_equal(assign(x, mask, 6, rest=none).segment_ids, keep(mask, 6).segment_ids)
    np.testing.assert_array_equal(assign(x, mask, 0).segment_ids, keep(mask, 0).segment_ids)


def test_what_finds_no_target_is_dropped_and_what_finds_no_room_is_counted(x, score):
    mask = keep_top_k(score, 6).kept
    plan = assign(x, mask, 4, targets=jnp.zeros_like(mask))
    np.testing.assert_array_equal(plan.sizes, 1)
    np.testing.assert_array_equal(plan.overflow, 2)
    everything = assign(x, mask, 4)
    np.testing.assert_array_equal(everything.sizes.sum(-1), N - 2)  # the rest joins a slot that is there


# --- dominant and contextual


def test_equals_the_official_code(golden):
    a = {k.split("/")[1]: v for k, v in golden("tokens/visiondrop_encoder_a").items()}
    dominant, contextual, m = 11, 5, 16  # ten and the class token
    score = jnp.asarray(a["cls_attn"]).sum(axis=1).at[:, 0].set(jnp.inf)

    @jax.jit
    def ours(score, metric, x):
        plan, stay = dominant_and_contextual(score, metric, dominant, contextual), representatives(score, dominant, contextual)
        others = jm.Plan(jnp.where(stay.kept, -1, plan.segment_ids), m)
        return plan, stay, jm.merge(stay, x, reduce="first") + jm.merge(others, x)

    plan, stay, out = ours(score, a["metric"], a["hidden"])
    leads = keep_top_k(score, dominant).kept
    np.testing.assert_array_equal([np.flatnonzero(row) for row in leads], np.sort(a["dominant_idx"], axis=1))
    # the official order: dominant first, each part in the order of the sequence
    slots = np.asarray(stay.segment_ids)
    order = np.stack([[*slots[b][leads[b]], *slots[b][(slots[b] >= 0) & ~np.asarray(leads[b])]] for b in range(2)])
    np.testing.assert_allclose(np.take_along_axis(np.asarray(out), order[..., None], axis=1), a["out"], rtol=0, atol=2e-5)
    assert (np.take_along_axis(np.asarray(plan.sizes), order, axis=1)[:, :dominant] == 1).all()


def test_our_mean_is_half_as_long_as_the_official_sum():
    """Of equal tokens ours keeps the length; the official combination, target + mean of the others, doubles it."""
    x, score = jnp.ones((6, 4)), jnp.zeros(6)
    plan, stay = dominant_and_contextual(score, x, 2, 2), representatives(score, 2, 2)
    np.testing.assert_array_equal(jm.merge(plan, x), 1)
    theirs = jm.merge(stay, x, reduce="first") + jm.merge(jm.Plan(jnp.where(stay.kept, -1, plan.segment_ids), 4), x)
    np.testing.assert_array_equal(theirs[:, 0], [1, 1, 2, 1])  # equal tokens all join the first target


@pytest.mark.parametrize("dominant, contextual", [(8, 5), (0, 4), (20, 1), (13, 8), (0, 21)])
def test_equals_the_rule(x, score, dominant, contextual):
    plan = jax.jit(lambda score, x: dominant_and_contextual(score, x, dominant, contextual))(score, x)
    for b in range(B):
        leads = np.argsort(-np.asarray(score[b]), kind="stable")[:dominant]
        rest = [i for i in range(N) if i not in leads]
        targets = rest[:: max(1, len(rest) // contextual)][:contextual]
        stay, likeness = sorted([*leads, *targets]), cosines(x[b])
        for i in range(N):
            root = i if i in stay else max(targets, key=lambda j: likeness[i, j])
            assert plan.segment_ids[b, i] == stay.index(root)


def test_without_contextual_tokens_the_rest_is_dropped(x, score):
    np.testing.assert_array_equal(dominant_and_contextual(score, x, 7, 0).segment_ids, keep_top_k(score, 7).segment_ids)


def test_labels_follow_their_tokens():
    """VisionDrop's second stage takes a target's place among the rest for its place in the sequence; a plan cannot."""
    score = jnp.zeros(8).at[0].set(1.0).at[1].set(1.0)
    labels = jnp.arange(8)
    stay = representatives(score, 2, 2)
    assert jm.merge(stay, labels, reduce="first").tolist() == [0, 1, 2, 5]
    place_among_the_rest = [0, 3]  # what the official code reads labels by, beside the dominant 0 and 1
    assert labels[np.sort([0, 1, *place_among_the_rest])].tolist() == [0, 0, 1, 3]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, s: dominant_and_contextual(s, x, 20, 2), "of n=21 tokens, dominant=20 and contextual=2"),
        (lambda x, s: dominant_and_contextual(s, x, -1, 2), "dominant=-1"),
        (lambda x, s: dominant_and_contextual(s[:, :4], x, 1, 2), r"got \(3, 4\) and \(3, 21, 8\)"),
        (lambda x, s: representatives(s, 1, -2), "contextual=-2"),
        (lambda x, s: assign(x, s[:, :4] > 0, 2), r"metric \(3, 21, 8\), \{'mask': \(3, 4\)\}"),
        (lambda x, s: assign(x, s > 0, -1), "assign: capacity must be 0 or more, got -1"),
    ],
)
def test_bad_input(call, message, x, score, unchecked):
    with pytest.raises(ValueError, match=message):
        call(x, score)
