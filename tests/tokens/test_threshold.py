"""Matching by thresholds: the official vectors, calibration, masks and overflow, frames, bad input."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxmerge as jm
from jaxmerge.tokens import RunningThreshold, bipartite_matching, earlier_matching, matching_threshold, threshold_matching
from tests.conftest import GOLDEN

CASES = {c["name"]: c["params"] for c in json.loads((GOLDEN / "tokens/dymu_a.json").read_text())["cases"]}
B, N, D = 4, 16, 8


@pytest.fixture(scope="module")
def dymu(golden):
    return golden("tokens/dymu_a")


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (B, N, D))


matched = jax.jit(lambda x, threshold: threshold_matching(x, threshold, N))


def case(vectors, name):
    return {k.removeprefix(f"{name}/"): v for k, v in vectors.items() if k.startswith(f"{name}/")}


def official_rows(plan, groups):
    """The slot of each official token, found by the tokens that it holds; its order comes from an unstable sort."""
    return np.take_along_axis(np.asarray(plan.segment_ids), groups.argmax(-1), 1)


def take(x, i):
    return np.take_along_axis(np.asarray(x), i.reshape(*i.shape, *[1] * (np.ndim(x) - 2)), axis=1)


@pytest.mark.parametrize("name", ["batch0", "batch1", "batch2", "batch3"])
def test_equals_the_official_code_over_a_batch(dymu, name):
    a, p = case(dymu, name), CASES[name]
    protect = (0,) if p["class_token"] else ()

    @jax.jit
    def ours(metric, x):
        found = matching_threshold(metric, p["r"], protect=protect)
        threshold = found if p["threshold"] is None else p["threshold"]
        plan = threshold_matching(metric, threshold, p["N_out"], protect=protect)
        mean = jm.merge(plan, x)
        return found, plan, mean, jm.unmerge(plan, mean)

    found, plan, mean, repeated = ours(a["metric"], a["x"])
    if p["threshold"] is None:
        np.testing.assert_allclose(found, a["batch_threshold"], rtol=0, atol=2e-5)
        assert sum(p["lengths"]) == 3 * (33 - p["r"])  # as many as asked for, over the batch
    assert (np.asarray(plan.overflow) == 0).all()
    np.testing.assert_array_equal((np.asarray(plan.sizes) > 0).sum(-1), p["lengths"])
    np.testing.assert_array_equal(np.asarray(plan.sizes) > 0, a["padding_mask"] == 0)  # free slots come last
    real = a["padding_mask"] == 0
    slots = official_rows(plan, a["pos_tracking"])
    np.testing.assert_array_equal(take(plan.matrix, slots)[real], a["pos_tracking"][real])
    np.testing.assert_array_equal(take(plan.sizes, slots)[real], a["size"][..., 0][real])
    shrunk = np.maximum(a["size"], 1) / (a["size"] + 1e-4)  # the official batch form divides by size + 1e-4
    np.testing.assert_allclose(take(mean, slots)[real], (a["out"] / shrunk)[real], rtol=0, atol=2e-5)
    shrunk = np.asarray(jm.unmerge(plan, plan.sizes / (plan.sizes + 1e-4)))[..., None]
    np.testing.assert_allclose(repeated * shrunk, a["repeated"], rtol=0, atol=2e-5)


def test_equals_the_official_code_in_a_second_round_with_padding(dymu):
    first, a, p = case(dymu, "batch1"), case(dymu, "batch1_round2"), CASES["batch1_round2"]
    valid = first["padding_mask"] == 0

    @jax.jit
    def ours(metric, x, size):
        threshold = matching_threshold(metric, p["r"], protect=(0,), valid=valid)
        plan = threshold_matching(metric, threshold, p["N_out"], protect=(0,), valid=valid)
        return threshold, plan, jm.merge(plan, x, weight=size), jm.merge(plan, size, reduce="sum")

    threshold, plan, mean, size = ours(a["metric"], first["out"], first["size"][..., 0])
    np.testing.assert_allclose(threshold, a["batch_threshold"], rtol=0, atol=2e-5)
    groups = np.einsum("bmi,bin->bmn", np.asarray(plan.matrix, np.int32), first["pos_tracking"].astype(np.int32))
    real = a["padding_mask"] == 0
    np.testing.assert_array_equal((np.asarray(plan.sizes) > 0).sum(-1), p["lengths"])
    slots = [
        [int(np.flatnonzero((row == g).all(-1))[0]) if g.any() else 0 for g in gs]
        for row, gs in zip(groups, a["pos_tracking"], strict=True)
    ]
    slots = np.array(slots)
    np.testing.assert_array_equal(take(groups, slots)[real], a["pos_tracking"][real])
    np.testing.assert_allclose(take(size, slots)[real], a["size"][..., 0][real], rtol=0, atol=2e-5)
    shrunk = np.maximum(a["size"], 1) / (a["size"] + 1e-4)
    np.testing.assert_allclose(take(mean, slots)[real], (a["out"] / shrunk)[real], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["inst0", "inst1"])
def test_equals_the_official_code_of_one_instance(dymu, name):
    a, p = case(dymu, name), CASES[name]
    m = 33 - p["r_effective"]
    options = dict(protect=(0,), max_r=p["max_r_per_instance"])
    plan = jax.jit(lambda x: threshold_matching(x, p["threshold"], m, **options))(a["metric"])
    slots = official_rows(plan, a["pos_tracking"])
    np.testing.assert_array_equal(take(plan.matrix, slots), a["pos_tracking"])
    np.testing.assert_array_equal(take(plan.sizes, slots), a["size"][..., 0])
    mean = jm.merge(plan, a["x"])
    np.testing.assert_allclose(take(mean, slots), a["out"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(jm.unmerge(plan, mean), a["unmerged"], rtol=0, atol=2e-5)


# --- the rule and the laws


def test_a_threshold_that_nothing_passes_and_one_that_all_pass(x):
    np.testing.assert_array_equal(matched(x, 1.1).segment_ids, np.tile(np.arange(N), (B, 1)))
    np.testing.assert_array_equal(matched(x, -1.1).segment_ids, jax.jit(lambda x: bipartite_matching(x, N // 2))(x).segment_ids)


def test_one_threshold_per_row_and_one_for_all(x):
    several = matched(x, jnp.array([0.2, 0.4, 0.6, 1.1]))
    for i, t in enumerate((0.2, 0.4, 0.6, 1.1)):
        np.testing.assert_array_equal(several.segment_ids[i], matched(x, t).segment_ids[i])
    kept = (np.asarray(several.sizes) > 0).sum(-1)
    assert kept[3] == N and kept[0] < N


@pytest.mark.parametrize("r", [0, 1, 4, 8])
def test_the_threshold_is_the_value_behind_the_first_r_per_row(x, r):
    unit = np.asarray(x) / np.linalg.norm(x, axis=-1, keepdims=True)
    best = (unit[:, ::2] @ unit[:, 1::2].swapaxes(1, 2)).max(-1).reshape(-1)
    want = max(np.sort(best)[::-1][min(r * B, best.size - 1)], 0)
    found = jax.jit(lambda x: matching_threshold(x, r))(x)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-6)
    if r < 8:
        kept = np.asarray(matched(x, found).sizes) > 0
        assert kept.sum() == B * (N - r)


def test_a_threshold_is_never_negative():
    apart = jnp.array([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.1], [-1.0, 0.1]])
    assert matching_threshold(apart, 1) == 0


def test_what_does_not_fit_is_counted(x):
    plan = jax.jit(lambda x: threshold_matching(x, 1.1, 10))(x)
    np.testing.assert_array_equal(plan.overflow, np.full(B, N - 10))


def test_masked_tokens_are_dropped_and_meet_nobody(x):
    valid = jnp.arange(N)[None] < jnp.array([16, 12, 7, 1])[:, None]
    broken = jnp.where(valid[..., None], x, jnp.nan)
    plan = jax.jit(lambda x, valid: threshold_matching(x, 0.1, N, valid=valid))(broken, valid)
    for i, n in enumerate((16, 12, 7, 1)):
        alone = jax.jit(lambda x: threshold_matching(x, 0.1, N))(x[i, :n]).segment_ids
        np.testing.assert_array_equal(plan.segment_ids[i], np.r_[alone, np.full(N - n, -1)])
    np.testing.assert_array_equal(plan.kept, valid)


def test_calibration_over_sharded_rows_moves_counts_alone(x, mesh):
    with jax.set_mesh(mesh):
        rows = jax.device_put(x, NamedSharding(mesh, P("data")))
        compiled = jax.jit(lambda x: matching_threshold(x, 3)).lower(rows).compile()
        got = compiled(rows)
    assert "all-gather" not in compiled.as_text()
    np.testing.assert_allclose(got, matching_threshold(x, 3), rtol=0, atol=1e-6)


def test_the_running_threshold_is_a_mean():
    state, values = RunningThreshold.init(2), np.random.default_rng(0).random((5, 2)).astype(np.float32)
    assert (state.threshold == 1).all()
    update = jax.jit(RunningThreshold.update)
    for v in values:
        state = update(state, v)
    np.testing.assert_allclose(state.threshold, values.mean(0), rtol=1e-6)
    assert state.count == 5


# --- frames


def frames_rule(row, threshold, one_hop):
    unit = row / np.linalg.norm(row, axis=-1, keepdims=True)
    score = np.tril((unit @ unit.T + 1) / 2, -1)
    goes = np.where(score.max(-1) > threshold, score.argmax(-1), np.arange(len(row)))
    for _ in range(0 if one_hop else len(row)):
        goes = goes[goes]
    stays = np.flatnonzero(goes == np.arange(len(row)))
    return [int(np.searchsorted(stays, g)) if g in stays else -1 for g in goes]


@pytest.mark.parametrize("hops", [None, 1])
def test_frames_join_the_earlier_one_most_like_them(x, hops):
    got = jax.jit(lambda x: earlier_matching(x, 0.7, N, hops=hops))(x).segment_ids
    np.testing.assert_array_equal(got, [frames_rule(row, 0.7, hops == 1) for row in np.asarray(x)])
    assert (np.asarray(got) == -1).any() == (hops == 1)  # the official step loses what a merged frame had gathered


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x: threshold_matching(x, 0.5, N, max_r=-1), ValueError, "between 0 and 16, got r=-1: max_r counts"),
        (lambda x: threshold_matching(x, 0.5, N, protect=(16,)), ValueError, "position 16 is not among n=16"),
        (lambda x: threshold_matching(x[0, 0], 0.5, N), ValueError, r"\(\*batch, n, d\)"),
        (lambda x: matching_threshold(x, 9), ValueError, "between 0 and 8, got r=9: of n=16 tokens, 0 protected"),
        (lambda x: matching_threshold(x, 1.0), TypeError, "Python int"),
        (lambda x: earlier_matching(x, 0.75, N, hops=0), ValueError, "hops must be 1 or more, got 0"),
    ],
)
def test_bad_input(call, error, message, x, unchecked):
    with pytest.raises(error, match=message):
        call(x)
