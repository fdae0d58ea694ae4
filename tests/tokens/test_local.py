"""Matching near by: the band, blocks, neighbours; the rules written down again, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.tokens import adjacent_matching, bipartite_matching, block_matching, local_matching

B, N, D = 2, 17, 8


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).standard_normal((B, N, D)).astype(np.float32)


def unit(row):
    return row / np.linalg.norm(row, axis=-1, keepdims=True)


def band(row, r, window, protect=()):
    """Token Merging's rule on scores masked outside a band."""
    n = len(row)
    score = unit(row)[::2] @ unit(row)[1::2].T
    score[np.abs(np.arange(score.shape[0])[:, None] - np.arange(score.shape[1])) > window] = -np.inf
    for p in protect:
        score[(slice(None), p // 2) if p % 2 else p // 2] = -np.inf
    goes = np.arange(n)
    for i in np.argsort(-score.max(-1), kind="stable")[:r]:
        goes[2 * i] = 2 * score[i].argmax() + 1
    return np.searchsorted(np.unique(goes), goes)


@pytest.mark.parametrize("r, window, protect", [(8, 1, ()), (4, 2, (0, 3)), (5, 0, (16,)), (6, 4, ())])
def test_equals_the_rule(x, r, window, protect):
    plan = jax.jit(lambda x: local_matching(x, r, window=window, protect=protect))(x)
    np.testing.assert_array_equal(plan.segment_ids, [band(row, r, window, protect) for row in x])


def test_a_wide_band_is_bipartite_matching(x):
    both = jax.jit(lambda x: (local_matching(x, 6, window=N), bipartite_matching(x, 6)))
    band, whole = both(x)
    np.testing.assert_array_equal(band.segment_ids, whole.segment_ids)


def test_no_token_moves_out_of_the_band(x):
    ids = np.asarray(jax.jit(lambda x: local_matching(x, 8, window=1))(x).segment_ids)
    for row in ids:
        for s in range(N - 8):
            assert np.ptp(np.flatnonzero(row == s)) <= 6  # two sources, each 3 from their receiver at most


def test_nothing_outside_the_sequence_attracts():
    """All similarities negative: a comparison with zeros outside would win, and stand for the end token."""
    row = jnp.array([[1.0, 0.0], [-1.0, 0.1], [1.0, 0.0], [-1.0, 0.5], [1.0, 0.0], [-1.0, 0.3]])
    plan = local_matching(row, 1, window=2)  # 0 joins 3, its least unlike
    assert plan.segment_ids.tolist() == [2, 0, 1, 2, 3, 4]


def test_a_source_whose_window_is_protected_does_not_count(x):
    with pytest.raises(ValueError, match="between 0 and 7, got r=8: of n=17 tokens, 2 protected, 7 have a partner within 0"):
        local_matching(x, 8, window=0, protect=(1, 16))
    plan = local_matching(x, 7, window=0, protect=(1, 16))
    assert (np.asarray(plan.segment_ids)[:, :3] == [0, 1, 2]).all()


def test_blocks_do_not_meet(x):
    whole = jax.jit(lambda x: block_matching(x, 2, block=8))
    rows = x[:, :16]
    ids = np.asarray(whole(rows).segment_ids)
    for i, row in enumerate(rows):
        a, b = (np.asarray(bipartite_matching(row[s], 2).segment_ids) for s in (slice(0, 8), slice(8, 16)))
        np.testing.assert_array_equal(ids[i], np.r_[a, b + 6])
    other = rows.copy()
    other[:, 8:] = -rows[:, :8]
    np.testing.assert_array_equal(np.asarray(whole(other).segment_ids)[:, :8], ids[:, :8])


@pytest.mark.parametrize("r, protect", [(5, ()), (7, (0, 9)), (16, ())])
def test_neighbours_join_by_the_strongest_links(x, r, protect):
    ids = np.asarray(jax.jit(lambda x: adjacent_matching(x, r, protect=protect))(x).segment_ids)
    for row, got in zip(x, ids, strict=True):
        link = (unit(row)[:-1] * unit(row)[1:]).sum(-1)
        for p in protect:
            link[max(p - 1, 0) : p + 1] = -np.inf
        joined = np.argsort(-link, kind="stable")[:r]
        want = np.r_[0, np.cumsum(~np.isin(np.arange(N - 1), joined))]
        np.testing.assert_array_equal(got, want)


def test_reversed_tokens_give_reversed_groups(x):
    match = jax.jit(lambda x: adjacent_matching(x, 6).segment_ids)
    np.testing.assert_array_equal(np.asarray(match(x[:, ::-1]))[:, ::-1], N - 7 - np.asarray(match(x)))


def test_neighbours_merge_by_stage(x):
    stages = jax.jit(lambda x: jm.tokens.in_rounds(adjacent_matching, x, [6, 5, 3]))
    plan, _ = stages(x)
    assert plan.num_segments == 3 and (np.diff(np.asarray(plan.segment_ids)) >= 0).all()  # runs of runs are runs


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x: local_matching(x, 9, window=0), ValueError, "between 0 and 8, got r=9"),
        (lambda x: local_matching(x, 1, window=-1), ValueError, "window must be 0 or more, got -1"),
        (lambda x: local_matching(x, 1.0, window=1), TypeError, "Python int"),
        (lambda x: local_matching(x, 1, window=1, protect=(17,)), ValueError, "position 17 is not among n=17"),
        (lambda x: block_matching(x, 1, block=4), ValueError, "block must divide n=17, got 4; pad the tokens"),
        (lambda x: block_matching(x[:, :16], 3, block=4), ValueError, "between 0 and 2, got r=3: at most half of a block of 4"),
        (lambda x: adjacent_matching(x, 17), ValueError, "between 0 and 16, got r=17: 16 pairs"),
        (lambda x: adjacent_matching(x, 15, protect=(4,)), ValueError, "between 0 and 14, got r=15: 14 pairs"),
        (lambda x: adjacent_matching(x[0, 0], 1), ValueError, r"\(\*batch, n, d\)"),
    ],
)
def test_bad_input(call, error, message, x, unchecked):
    with pytest.raises(error, match=message):
        call(x)
