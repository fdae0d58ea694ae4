"""Matching in rounds: the official vectors, the schedules of the systems that use Token Merging, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.tokens import bipartite_matching, halvings, head_mean, in_rounds, keep_schedule, schedule


def official_order(x, rs, sizes, metric=lambda x: x):
    """Rounds whose tokens pass on in the official order, [even that stayed, by rank, odd], which the next round pairs up."""
    size = jnp.ones(x.shape[:-1])
    for r in rs:
        plan = bipartite_matching(metric(x), r)
        n, ids = x.shape[-2], plan.segment_ids
        m = metric(x)
        unit = m / jnp.linalg.norm(m, axis=-1, keepdims=True)
        best = (unit[:, ::2] @ jnp.swapaxes(unit[:, 1::2], 1, 2)).max(-1)
        stay = 2 * jnp.argsort(-best, axis=-1)[:, r:]
        odd = jnp.broadcast_to(jnp.arange(1, n, 2), (len(m), n // 2))
        slots = jnp.take_along_axis(ids, jnp.concatenate([stay, odd], axis=1), 1)
        permute = jm.Plan(jnp.argsort(slots, axis=1), n - r)
        plan = jm.compose(permute, plan)
        x, size = jm.merge(plan, x, weight=size if sizes else None), jm.merge(plan, size, reduce="sum")
    return x


def test_equals_longvlm(golden):
    a = golden("tokens/longvlm_a")
    rs, clips, heads = (40, 20, 10), 4, 16
    x = a["c0/x"].reshape(8 // clips, clips * 24, 64)
    metric = lambda x: head_mean(x, heads)
    got = jax.jit(lambda x: official_order(x, rs, True, metric))(x)
    np.testing.assert_allclose(got.reshape(52, 64), a["c0/out"], rtol=0, atol=2e-5)
    # without permuting, the first round is the same and the later ones pair other tokens
    one, first = jax.jit(
        lambda x: (in_rounds(bipartite_matching, x, [40], metric=metric)[0], bipartite_matching(metric(x), 40))
    )(x)
    np.testing.assert_array_equal(one.segment_ids, first.segment_ids)


def test_equals_aim(golden):
    a = golden("tokens/aim_a")
    x = a["merge/x"]
    np.testing.assert_allclose(jax.jit(lambda x: official_order(x, (32,), False))(x), a["merge/out1"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(jax.jit(lambda x: official_order(x, (32, 16), False))(x), a["merge/out2"], rtol=0, atol=2e-5)
    # of half the tokens only odd positions stay, in their order: nothing to permute, so in_rounds is the same
    _, y = jax.jit(lambda x: in_rounds(bipartite_matching, x, halvings(64, 16), sizes=False))(x)
    np.testing.assert_allclose(y, a["merge/out2"], rtol=0, atol=2e-5)


def test_sizes_make_rounds_associative_and_plain_means_do_not():
    x = np.random.default_rng(0).standard_normal((2, 16, 8)).astype(np.float32)
    rounds = jax.jit(lambda x, sizes: in_rounds(bipartite_matching, x, [8, 4, 2], sizes=sizes), static_argnums=1)
    plan, y = rounds(x, True)
    assert plan.num_segments == 2 and (np.asarray(plan.sizes).sum(-1) == 16).all()
    np.testing.assert_allclose(y, jm.merge(plan, x), rtol=0, atol=1e-6)
    plan, y = rounds(x, False)
    assert not np.allclose(y, jm.merge(plan, x), atol=1e-3)


def test_no_round_is_the_identity_and_one_round_is_the_planner():
    x = np.random.default_rng(0).standard_normal((2, 16, 8)).astype(np.float32)
    plan, y = in_rounds(bipartite_matching, x, [])
    np.testing.assert_array_equal(plan.segment_ids, np.tile(np.arange(16), (2, 1)))
    np.testing.assert_array_equal(y, x)
    one, plan = jax.jit(lambda x: (in_rounds(bipartite_matching, x, [5])[0], bipartite_matching(x, 5)))(x)
    np.testing.assert_array_equal(one.segment_ids, plan.segment_ids)


def test_head_mean_is_the_mean_over_heads():
    x = np.random.default_rng(0).standard_normal((2, 3, 12)).astype(np.float32)
    np.testing.assert_allclose(head_mean(jnp.asarray(x), 3), x.reshape(2, 3, 3, 4).mean(2), rtol=0, atol=1e-6)


# --- the systems that use Token Merging as it is: what each adds is how many tokens go where


def test_longvlm_leaves_30_tokens_of_a_clip_of_2560():
    assert 2560 - sum([1280, 640, 320, 160, 80, 40, 10]) == 30
    assert halvings(2560, 30) == [1280, 640, 320, 160, 80, 40, 10]


@pytest.mark.parametrize("n, m", [(576, 100), (64, 16), (7, 7), (9, 4), (256, 1)])
def test_halvings_are_b_vllms(n, m):
    rs, left = [], n  # `multi_layer_merge`
    while left // 2 > m:
        rs.append(left // 2)
        left -= left // 2
    if left > m:  # at once, though 2 m + 1 tokens cannot lose m + 1 where each goes to another side of m
        rs += [left - m] if left - m <= left // 2 else [left // 2, 1]
    assert halvings(n, m) == rs and n - sum(rs) == m


def test_auroracap_removes_a_ratio_evenly():
    # int(H W / patch² (1 - ratio) / layers) in each of 24 layers of CLIP at 336 px, with a class token
    assert keep_schedule(24, 0.4, n=577, protected=1) == [int(576 * 0.6 / 24)] * 24 == [14] * 24
    low = keep_schedule(24, 0.1, n=577, protected=1)
    left = 577
    for r in low:  # as the official code clamps where it stands
        assert r == min(int(576 * 0.9 / 24), (left - 1) // 2)
        left -= r
    assert keep_schedule(24, 1.0, n=577, protected=1) == [0] * 24


def test_tinychart_removes_84_per_layer():
    layers = schedule(26, 84, n=(768 // 14) ** 2)  # SigLIP at 768 px, no class token, features of the layer before the last
    assert layers == [84] * 26 and (768 // 14) ** 2 - sum(layers) == 732


def test_simvlg_removes_19_in_each_layer_of_the_connector():
    layers = schedule(12, 19, n=257, protected=1)  # BERT base over 257 tokens of EVA-CLIP
    assert layers == [19] * 12 and 257 - sum(layers) == 29


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: in_rounds(bipartite_matching, jnp.ones((8, 4)), [4, 3]), ValueError, "between 0 and 2, got r=3"),
        (lambda: head_mean(jnp.ones((2, 6)), 4), ValueError, "6 channels do not divide into 4 heads"),
        (lambda: halvings(8, 0), ValueError, "m must be between 1 and n=8, got 0"),
        (lambda: halvings(8, 9), ValueError, "got 9"),
        (lambda: keep_schedule(4, 1.5, n=8), ValueError, "ratio between 0 and 1, got 1.5"),
        (lambda: keep_schedule(0, 0.5, n=8), ValueError, "depth must be 1 or more, got 0"),
    ],
)
def test_bad_input(call, error, message, unchecked):
    with pytest.raises(error, match=message):
        call()
