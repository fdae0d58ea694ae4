"""Two sides given as lists, k-th and random bipartite matching: the official vectors, the rule itself, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.tokens import bipartite_matching, kth_bipartite_matching, random_bipartite_matching, two_sided_matching

B, N, D = 4, 17, 8


@pytest.fixture(scope="module")
def tome(golden):
    return golden("tokens/tome_a")


@pytest.fixture(scope="module")
def metric():
    return jax.random.normal(jax.random.key(0), (B, N, D))


@pytest.mark.parametrize("name, k", [("kth0", 2), ("kth1", 3), ("kth2", 4)])
def test_kth_equals_the_official_code(tome, name, k):
    a = {key.split("/")[1]: v for key, v in tome.items() if key.startswith(f"{name}/")}
    plan = jax.jit(lambda m: kth_bipartite_matching(m, k, remainder="drop"))(a["metric"])
    whole = a["x"].shape[1] // k * k
    ids = np.asarray(plan.segment_ids)
    np.testing.assert_array_equal(ids[:, :whole].reshape(2, -1, k)[:, :, :-1].reshape(2, -1), a["dst_idx"])
    assert (ids[:, whole:] == -1).all()  # the official code loses them without a word
    mean = jm.merge(plan, a["x"])
    np.testing.assert_allclose(mean, a["out_mean"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(mean, a["wavg_x"], rtol=0, atol=2e-5)
    np.testing.assert_array_equal(plan.sizes, a["wavg_size"][..., 0])
    np.testing.assert_allclose(jm.unmerge(plan, mean)[:, :whole], a["unmerged"], rtol=0, atol=2e-5)


def test_kth_keeps_the_remainder_unless_told(tome):
    x = tome["kth2/metric"]
    keep, drop = kth_bipartite_matching(x, 4), kth_bipartite_matching(x, 4, remainder="drop")
    np.testing.assert_array_equal(keep.segment_ids[:, :64], drop.segment_ids[:, :64])
    assert keep.num_segments == 17 and (np.asarray(keep.segment_ids)[:, 64] == 16).all()


def test_kth_of_two_is_bipartite_matching_of_half(metric):
    x = metric[:, :16]
    np.testing.assert_array_equal(kth_bipartite_matching(x, 2).segment_ids, bipartite_matching(x, 8).segment_ids)
    np.testing.assert_array_equal(kth_bipartite_matching(x, 1).segment_ids, np.tile(np.arange(16), (B, 1)))


@pytest.mark.parametrize("name, r", [("rand0", 20), ("rand1", 40)])
def test_random_equals_the_official_code_on_its_draws(tome, name, r):
    a = {key.split("/")[1]: v for key, v in tome.items() if key.startswith(f"{name}/")}
    # with receivers in the recorded order; ours are numbered by position, so `slots` undoes the official order
    plan = jax.jit(two_sided_matching)(a["metric"], a["a_idx"], a["b_idx"])
    np.testing.assert_array_equal(
        np.take_along_axis(np.asarray(plan.segment_ids), a["a_idx"], 1),
        np.take_along_axis(np.asarray(plan.segment_ids), np.take_along_axis(a["b_idx"], a["dst_idx"], 1), 1),
    )
    slots = np.take_along_axis(np.asarray(plan.segment_ids), a["b_idx"], 1)
    mean = np.asarray(jm.merge(plan, a["x"]))
    np.testing.assert_allclose(np.take_along_axis(mean, slots[..., None], 1), a["out_mean"], rtol=0, atol=2e-5)
    np.testing.assert_array_equal(np.take_along_axis(np.asarray(plan.sizes), slots, 1), a["wavg_size"][..., 0])
    np.testing.assert_allclose(jm.unmerge(plan, mean), a["unmerged"], rtol=0, atol=2e-5)
    assert plan.num_segments == a["x"].shape[1] - r


def test_random_draws_r_tokens_that_are_not_protected(metric):
    draw = jax.jit(lambda key: random_bipartite_matching(metric, 5, key, protect=(0, -1)))
    left = np.zeros(N)
    for seed in range(40):
        plan = draw(jax.random.key(seed))
        ids = np.asarray(plan.segment_ids)
        assert (ids[:, 0] == 0).all() and (ids[:, -1] == 11).all()
        alone = np.take_along_axis(np.asarray(plan.sizes), ids, 1) == 1
        left += ~alone.all(axis=0)
        assert plan.num_segments == N - 5
    assert left[0] == left[-1] == 0 and (left[1:-1] > 0).all()


def test_one_key_is_shared_and_many_are_not(metric):
    same = jnp.broadcast_to(metric[:1], metric.shape)
    shared = random_bipartite_matching(same, 5, jax.random.key(3)).segment_ids
    assert (shared == shared[:1]).all()
    own = random_bipartite_matching(same, 5, jax.random.split(jax.random.key(3), B)).segment_ids
    assert (own != own[:1]).any()


def test_random_receivers_are_the_nearest(metric):
    for row, ids in zip(
        np.asarray(metric), np.asarray(random_bipartite_matching(metric, 6, jax.random.key(7)).segment_ids), strict=True
    ):
        unit = row / np.linalg.norm(row, axis=-1, keepdims=True)
        order = np.asarray(jax.random.permutation(jax.random.key(7), jnp.arange(N)))
        sources, receivers = order[:6], np.sort(order[6:])
        nearest = receivers[(unit[sources] @ unit[receivers].T).argmax(-1)]
        np.testing.assert_array_equal(ids[sources], np.searchsorted(receivers, nearest))
        np.testing.assert_array_equal(ids[receivers], np.arange(11))


# --- two sides


@pytest.mark.parametrize("r", [0, 3, 8])
def test_even_and_odd_sides_are_bipartite_matching(metric, r):
    plan = two_sided_matching(metric, np.arange(0, N, 2), np.arange(1, N, 2), r)
    np.testing.assert_array_equal(plan.segment_ids, bipartite_matching(metric, r).segment_ids)


def test_a_mask_says_who_may_join_whom(metric):
    mask = np.eye(3, dtype=bool)
    plan = two_sided_matching(metric, np.array([1, 3, 5]), np.array([0, 2, 4]), mask=mask)
    assert (np.asarray(plan.segment_ids)[:, :6] == [0, 0, 1, 1, 2, 2]).all()
    mask[1] = False  # the second source has nowhere to go, so it goes last
    plan = two_sided_matching(metric, np.array([1, 3, 5]), np.array([0, 2, 4]), 2, mask=mask)
    assert (np.asarray(plan.segment_ids)[:, :6] == [0, 0, 1, 2, 3, 3]).all()
    plan = two_sided_matching(metric, np.array([1, 3, 5]), np.array([0, 2, 4]), 3, mask=mask)
    assert (np.asarray(plan.segment_ids)[:, :6] == [0, 0, 1, 2, 3, 3]).all() and (plan.overflow == 1).all()


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x: kth_bipartite_matching(x, 0), ValueError, "k must be between 1 and the number of tokens, 17; got 0"),
        (lambda x: kth_bipartite_matching(x, 18), ValueError, "got 18"),
        (lambda x: kth_bipartite_matching(x, 2, remainder="lose"), ValueError, '"keep" or "drop", got \'lose\''),
        (lambda x: kth_bipartite_matching(x[0, 0], 2), ValueError, r"\(\*batch, n, d\), got \(8,\)"),
        (lambda x: random_bipartite_matching(x, 17, jax.random.key(0)), ValueError, "between 0 and 16.*one must stay"),
        (lambda x: random_bipartite_matching(x, 16, jax.random.key(0), protect=(0,)), ValueError, "of 16 tokens"),
        (lambda x: random_bipartite_matching(x, 1.5, jax.random.key(0)), TypeError, "Python int.*1.5"),
        (lambda x: random_bipartite_matching(x, 1, jax.random.PRNGKey(0)), TypeError, r"typed key.*got uint32\[2\]"),
        (lambda x: random_bipartite_matching(x, 1, jax.random.key(0), protect=(17,)), ValueError, "position 17 is not among"),
        (lambda x: random_bipartite_matching(x, 1, jax.random.key(0), protect=[True]), TypeError, "not a mask.*flatnonzero"),
        (lambda x: two_sided_matching(x, np.array([0]), np.array([17])), ValueError, "destination 17 is not among n=17"),
        (lambda x: two_sided_matching(x, np.array([-1]), np.array([3])), ValueError, "source -1 is not among"),
        (lambda x: two_sided_matching(x, np.array([3]), np.array([3])), ValueError, "position 3 is named twice"),
        (lambda x: two_sided_matching(x, np.array([3]), np.array([4]), 2), ValueError, "0 and 1, got r=2: there are 1 sources"),
        (lambda x: two_sided_matching(x, np.array([3]), np.array([], int)), ValueError, "no destination"),
    ],
)
def test_bad_input(call, error, message, metric, unchecked):
    with pytest.raises(error, match=message):
        call(metric)
