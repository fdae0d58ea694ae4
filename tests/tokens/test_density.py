"""Density peaks, members and the positions they carry: the official vectors, the rule, ties, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxmerge as jm
from jaxmerge._kernels.match._distances import distances
from jaxmerge._kernels.match.ref import smallest
from jaxmerge.tokens import (
    carry_positions,
    density_centers,
    density_peaks,
    in_order,
    keep_apart,
    members,
    nearest_center,
    rope_positions,
)
from tests.hlo import collectives, compile_for, tpu_mesh

B, N, D = 3, 30, 8
peaks = jax.jit(density_peaks, static_argnames=("k", "neighbors", "order"))
find_centers = jax.jit(density_centers, static_argnames=("k", "neighbors"))
to_nearest = jax.jit(nearest_center, static_argnames=("k",))
apart = jax.jit(keep_apart, static_argnames=("capacity",))
renumber = jax.jit(in_order)
name_members = jax.jit(members, static_argnames=("k", "order"))


@pytest.fixture(scope="module")
def ppe(golden):
    return golden("tokens/ppe_a")


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (B, N, D))


def rule(x, k, neighbors):
    """DPC-KNN in float64: centres by falling score, then each token's centre."""
    dist = np.linalg.norm(x[:, None].astype(np.float64) - x[None], axis=-1) / np.sqrt(x.shape[1])
    rho = np.exp(-(np.sort(dist, axis=1)[:, :neighbors] ** 2).mean(1))
    delta = np.array([dist[i, rho > rho[i]].min(initial=dist.max()) for i in range(len(x))])
    centers = np.argsort(-rho * delta, kind="stable")[:k]
    joins = centers[dist[:, centers].argmin(1)]
    joins[centers] = centers
    return centers, joins


# --- the official code


@pytest.mark.parametrize("case, k", [("c0", 12), ("c1", 24)])
def test_equals_ppe(ppe, case, k):
    x, ids = ppe[f"{case}/x"], ppe[f"{case}/idx_cluster"]
    centers = find_centers(x, k)
    plan = peaks(x, k)
    # theirs are numbered by the centres' scores
    ours = np.asarray(plan.segment_ids)
    to = np.zeros(k, int)
    to[ours[0]] = ids[0]
    np.testing.assert_array_equal(to[ours], ids)
    assert len(set(to)) == k and centers.sum() == k
    np.testing.assert_allclose(jm.merge(plan, x)[:, np.argsort(to)], ppe[f"{case}/out"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("case, k, reserve", [("c0", 12, 1), ("c1", 24, 4)])
def test_positions_are_those_of_ppe(ppe, case, k, reserve):
    """Which members they take is the whim of an unstable sort, so it is read off their result, as weights; how many of them,
    how they repeat and how the coordinates are laid out must then be theirs."""
    ids, positions, official = ppe[f"{case}/idx_cluster"][0], ppe[f"{case}/pos"].T, ppe[f"{case}/position_ids"]
    listed = official.reshape(3, reserve, k)
    weight = np.zeros(len(ids), np.float32)
    for segment in range(k):
        for place in reversed(range(reserve)):
            at = np.flatnonzero((positions == listed[:, place, segment]).all(1))
            assert ids[at] == segment
            weight[at] = reserve - place
    carried = jax.jit(lambda ids, weight: carry_positions(jm.Plan(ids, k), positions, reserve, weight=weight))(ids, weight)
    np.testing.assert_array_equal(carried.reshape(k, -1).T, official)


def test_equals_holitom(golden):
    a = golden("tokens/holitom_a")
    x = a["dpc/x"]
    centers = find_centers(x, 7)
    for row, official in zip(np.asarray(centers), a["dpc/index_center"], strict=True):
        np.testing.assert_array_equal(np.flatnonzero(row), np.sort(official))
    squared, scale = jax.vmap(distances)(jnp.asarray(x))
    dist = scale[:, None, None] * np.sqrt(squared) / np.sqrt(x.shape[-1])
    off = ~np.eye(30, dtype=bool)  # torch's own diagonal is rounding, not 0
    np.testing.assert_allclose(np.asarray(dist)[:, off], a["dpc/dist"][:, off], rtol=0, atol=2e-5)


# --- the rule


@pytest.mark.parametrize("k, neighbors", [(1, 1), (5, 3), (11, 5), (N, 5)])
def test_equals_the_rule(x, k, neighbors):
    plan = peaks(x, k, neighbors=neighbors, order="center")
    for row, ids in zip(np.asarray(x), np.asarray(plan.segment_ids), strict=True):
        centers, joins = rule(row, k, neighbors)
        np.testing.assert_array_equal(ids, np.searchsorted(np.sort(centers), joins))


def test_orders_hold_the_same_groups(x):
    by_center, by_first = (peaks(x, 6, order=order) for order in ("center", "first"))
    np.testing.assert_array_equal(renumber(by_center).segment_ids, by_first.segment_ids)
    centers = find_centers(x, 6)
    for ids, row in zip(np.asarray(by_center.segment_ids), np.asarray(centers), strict=True):
        np.testing.assert_array_equal(ids[row], np.arange(6))


def test_masked_tokens_are_as_if_they_were_not_there(x):
    mask = np.arange(N) % 3 > 0
    plan = peaks(x, 4, mask=np.tile(mask, (B, 1)))
    without = peaks(x[:, mask], 4)
    np.testing.assert_array_equal(np.asarray(plan.segment_ids)[:, mask], without.segment_ids)
    assert (np.asarray(plan.segment_ids)[:, ~mask] == -1).all()


def test_fewer_tokens_than_clusters_leave_empty_slots(x):
    plan = peaks(x, 8, mask=np.arange(N) < np.array([[3], [0], [30]]))
    assert (plan.sizes > 0).sum(1).tolist() == [3, 0, 8]


def test_budgets_of_each_row(x):
    count = jnp.array([2, 0, 6])
    centers = find_centers(x, 6, count=count)
    assert centers.sum(1).tolist() == [2, 0, 6]
    np.testing.assert_array_equal(centers[0], find_centers(x[0], 2, neighbors=2))
    np.testing.assert_array_equal(centers[2], find_centers(x[2], 6, neighbors=5))


def test_named_tokens_stay_apart(x):
    alone = np.arange(N) % 7 == 0
    groups = peaks(x, 4, mask=np.tile(~alone, (B, 1)))
    plan = apart(groups, np.tile(alone, (B, 1)), 5)
    ids = np.asarray(plan.segment_ids)
    for b in range(B):
        assert len(set(ids[b])) == 9 and len(set(ids[b, alone])) == 5 and not set(ids[b, alone]) & set(ids[b, ~alone])
        same = lambda i: i[:, None] == i[None, :]
        np.testing.assert_array_equal(same(ids[b, ~alone]), same(np.asarray(groups.segment_ids)[b, ~alone]))
    assert keep_apart(jm.Plan(jnp.array([0, 2, -1, 0]), 1), np.arange(4) == 2, 1).segment_ids.tolist() == [0, 2, 1, 0]


def test_twins_meet():
    x = jnp.repeat(jax.random.normal(jax.random.key(1), (B, 8, D)), 2, axis=1)
    plan = peaks(x, 8, neighbors=2)
    np.testing.assert_array_equal(plan.segment_ids, np.tile(np.repeat(np.arange(8), 2), (B, 1)))


def test_shift_and_rotation_change_nothing(x):
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((D, D)))[0].astype(np.float32)
    same = peaks(x @ turn + 3.0, 6)
    np.testing.assert_array_equal(same.segment_ids, peaks(x, 6).segment_ids)


@pytest.mark.parametrize("scale", [2.0**60, 2.0**-60])
def test_no_scale_overflows(x, scale):
    plan = peaks(x * scale, 5)
    assert (plan.sizes > 0).all()
    if scale < 1:  # every density is 1, and positions decide: but tokens still join the nearest
        centers = find_centers(x * scale, 5)
        np.testing.assert_array_equal(plan.segment_ids, to_nearest(x, centers, 5).segment_ids)


def test_densities_that_underflow_still_differ():
    """At a hundred times the distance every density is 0 in float32, where the official score knows no centre."""
    x = jax.random.normal(jax.random.key(2), (N, D))
    large = find_centers(100 * x, 3)
    log_rho = -(np.sort(np.linalg.norm(100 * (x[:, None] - x[None]), axis=-1), axis=1)[:, :5] ** 2).mean(1) / D
    assert np.exp(log_rho.astype(np.float32)).max() == 0
    assert large[np.argmax(log_rho)]


def test_a_broken_token_is_a_centre_last(x):
    broken = x.at[:, 4].set(jnp.nan)
    centers = find_centers(broken, N - 1)
    assert not centers[:, 4].any()
    ids = np.asarray(peaks(broken, 5, order="center").segment_ids)
    assert (ids[:, 4] == 0).all()  # far from every centre alike: the first


def test_smallest_is_the_head_of_a_sort(x):
    ties = jnp.round(x)
    np.testing.assert_array_equal(smallest(ties, 4), np.sort(ties, axis=-1)[..., :4])


# --- members and positions


def test_members_are_named_in_turn():
    plan = jm.Plan(jnp.array([[0, 1, 0, -1, 0, 1, 5], [2, 2, 2, 2, 2, 0, 0]]), 3)
    assert name_members(plan, 3).tolist() == [[[0, 2, 4], [1, 5, 1], [-1, -1, -1]], [[5, 6, 5], [-1, -1, -1], [0, 1, 2]]]
    assert name_members(plan, 3, order="last").tolist()[0] == [[4, 2, 0], [5, 1, 5], [-1, -1, -1]]
    weight = jnp.array([[1.0, 1, 3, 9, 1, 2, 0]] * 2)
    assert name_members(plan, 2, weight=weight).tolist()[0] == [[2, 0], [5, 1], [-1, -1]]
    assert name_members(plan, 2, weight=weight, order="last").tolist()[0] == [[2, 4], [5, 1], [-1, -1]]


def test_the_first_member_is_what_first_takes(x):
    plan = jm.testing.random_plan(jax.random.key(3), (B,), N, 7)
    first = name_members(plan, 1)[..., 0]
    taken = np.take_along_axis(np.asarray(x), np.maximum(first, 0)[..., None], 1) * (np.asarray(first) >= 0)[..., None]
    np.testing.assert_array_equal(taken, jm.merge(plan, x, reduce="first"))


def test_channels_turn_with_their_members():
    positions = jnp.arange(12).reshape(1, 3, 4)
    groups = rope_positions(positions, (4, 8, 8))[0]
    assert groups.tolist() == [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11]
    assert rope_positions(positions, (3, 5, 6))[0].tolist() == [*range(12), 0, 1]  # 4 divides none: in turn
    assert rope_positions(positions[..., :1], (1, 2, 3))[0].tolist() == [0, 4, 4, 8, 8, 8]


def test_a_cascade_composes(x):
    """PPE's second stage clusters what the first merged; positions of the first stage are carried by one member each."""

    @jax.jit
    def cascade(x):
        first = density_peaks(x, 12)
        second = density_peaks(jm.merge(first, x), 4, neighbors=3)
        rows = carry_positions(first, jnp.broadcast_to(jnp.arange(N)[:, None], (B, N, 1)), 3)[..., 0, :]
        carried = carry_positions(second, rows)[..., 0]
        return jm.compose(second, first), jm.merge(second, first.sizes, reduce="sum"), carried

    whole, sizes, carried = cascade(x)
    np.testing.assert_array_equal(sizes, whole.sizes)
    ids = np.asarray(whole.segment_ids)
    for b in range(B):
        assert (ids[b][np.asarray(carried[b])] == np.arange(4)[:, None]).all()


@pytest.mark.tpu
def test_compiles_for_tpu_without_a_collective():
    """Clusters, members and a propagating plan for 576 tokens, and no sort among them."""
    mesh = tpu_mesh("v5e:4x4", (16,), ("data",))
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=NamedSharding(mesh, P("data")))

    def step(x, score):
        dense, means = density_peaks(x, 64), jm.tokens.k_means(x, 64)
        soft = jm.tokens.propagate(jm.tokens.keep_top_k(score, 400), jm.tokens.token_graph(x, grid=(24, 24), neighbors=4))
        return jm.merge(dense, x), members(dense, 4), jm.merge(means, x), jm.merge(soft, x, reduce="sum")

    compiled = compile_for(step, shape(16, 576, 128), shape(16, 576))
    assert collectives(compiled) == []
    assert " sort(" not in compiled.as_text()


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x: density_peaks(x, 31), ValueError, "between 0 and the number of tokens, 30; got 31"),
        (lambda x: density_peaks(x, 2.0), TypeError, "k must be a Python int, because shapes are static; got 2.0"),
        (lambda x: density_peaks(x, 2, neighbors=0), ValueError, "neighbors must be between 1 and.*30; got 0"),
        (lambda x: density_peaks(x, 2, order="score"), ValueError, '"first" or "center", got \'score\''),
        (lambda x: density_peaks(x[0, 0], 2), ValueError, r"\(\*batch, n, d\), got \(8,\)"),
        (lambda x: members(jm.identity(3), 0), ValueError, "k must be 1 or more, got 0"),
        (lambda x: members(jm.identity(3), 1, order="best"), ValueError, "order must be"),
        (lambda x: rope_positions(jnp.zeros((2, 3, 4)), (8, 8)), ValueError, "2 sections for 3 axes"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input(x, call, error, message):
    with pytest.raises(error, match=message):
        call(x)
