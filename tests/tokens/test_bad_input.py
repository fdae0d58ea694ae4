"""What a planner cannot use it refuses in one sentence: its name, what it expects, what it was given."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm

t = jm.tokens
X, SCORE = jnp.asarray(np.random.default_rng(0).standard_normal((2, 16, 4)), jnp.float32), jnp.ones((2, 16))
PLAN, LONG = jm.Plan(jnp.zeros((2, 16), jnp.int32), 1), jnp.ones((2, 17))
SHORT_X = X[:, :9]
SIDES = np.tile(np.arange(4), (2, 1))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: t.bipartite_matching(X, 3, protect=0), TypeError, r"several positions, such as \(0,\).*got 0"),
        (lambda: t.bipartite_matching(X, 3, protect=(0.5,)), TypeError, "static positions"),
        (lambda: t.bipartite_matching(X + 1j, 3), TypeError, "metric must be real, got complex64"),
        (lambda: t.k_means(X + 1j, 3), TypeError, "x must be real, got complex64"),
        (lambda: t.grid_matching(X, 3, grid=4), TypeError, "grid_matching: grid must be 2 sizes.*got 4"),
        (lambda: t.grid_matching(X, 3, grid=(4, 4), stride=2), TypeError, "grid_matching: stride must be 2 sizes"),
        (lambda: t.trajectory_matching(X, grid=(2, 2, 4), window=1), ValueError, r"trajectory_matching: grid must be 2 sizes"),
        (lambda: t.space_to_depth(X, (-4, -4), 2), ValueError, r"space_to_depth: grid .* 1 or more, got \(-4, -4\)"),
        (lambda: t.token_graph(X, grid=16), TypeError, "token_graph: grid must be 2 sizes"),
        (lambda: t.adaptive_k_means(X, 5), TypeError, "adaptive_k_means: ks must be sizes.*got 5"),
        (lambda: t.keep(SCORE > 0, -1), ValueError, "keep: capacity must be 0 or more, got -1"),
        (lambda: t.keep(SCORE > 0, 2.5), TypeError, "keep: capacity must be a Python int.*got 2.5"),
        (lambda: t.keep_top_k(SCORE, 2.5), TypeError, "keep_top_k: k must be a Python int.*got 2.5"),
        (lambda: t.assign(X, SCORE > 0, -1), ValueError, "assign: capacity must be 0 or more"),
        (lambda: t.earlier_matching(X, 0.5, -1), ValueError, "earlier_matching: capacity must be 0 or more"),
        (lambda: t.threshold_matching(X, 0.5, -1), ValueError, "threshold_matching: capacity must be 0 or more"),
        (lambda: t.keep_apart(PLAN, SCORE > 0, -1), ValueError, "keep_apart: capacity must be 0 or more"),
        (lambda: t.keep_apart(PLAN, LONG > 0, 1), ValueError, r"keep_apart: mask must .* \(2, 16\), got \(2, 17\)"),
        (lambda: t.density_peaks(X, 3, mask=LONG > 0), ValueError, r"density_centers: mask .* \(2, 16\); got \(2, 17\)"),
        (lambda: t.density_peaks(X, 3, neighbors=1.5), TypeError, "neighbors must be a Python int"),
        (lambda: t.nearest_center(X, LONG > 0, 3), ValueError, r"nearest_center: centers .* got \(2, 17\)"),
        (lambda: t.k_means(X, 3, mask=LONG > 0), ValueError, r"k_means: mask .* got \(2, 17\)"),
        (lambda: t.attention_and_density(X, LONG, 3, 2), ValueError, r"attention_and_density: attention .* got \(2, 17\)"),
        (lambda: t.attention_and_similarity(X, LONG, 3), ValueError, r"attention_and_similarity: attention .* \(2, 17\)"),
        (lambda: t.primary_and_clusters(X, LONG, 3, 2), ValueError, r"primary_and_clusters: score .* got \(2, 17\)"),
        (lambda: t.prune_and_merge(LONG, X, 9, 5), ValueError, r"prune_and_merge: importance .* got \(2, 17\)"),
        (lambda: t.inertia(SHORT_X, PLAN), ValueError, r"inertia: x must be the plan's tokens.*got \(2, 9, 4\)"),
        (lambda: t.silhouette(SHORT_X, PLAN), ValueError, "silhouette: x must be the plan's tokens"),
        (lambda: t.members(PLAN, 2, weight=LONG), ValueError, r"members: weight .* \(2, 16\), got \(2, 17\)"),
        (lambda: t.carry_positions(PLAN, SHORT_X, 2), ValueError, r"carry_positions: positions .* got \(2, 9, 4\)"),
        (lambda: t.nearest(X, X, mask=LONG > 0), ValueError, r"nearest: mask .* \(2, 16, 16\), queries by keys; got"),
        (lambda: t.local_outlier_factor(X, 3, mask=LONG > 0), ValueError, r"one per point; got \(2, 17\)"),
        (lambda: t.attention_inhibition(X, X, 2), ValueError, r"text_to_text \(\*batch, t, t\).*got \(2, 16, 4\)"),
        (lambda: t.trajectory_matching(X, grid=(2, 2), window=1.5), TypeError, "window must be a Python int.*got 1.5"),
        (lambda: t.schedule(2.5, 8), TypeError, "schedule: depth must be a Python int.*got 2.5"),
        (lambda: t.schedule(2, 2.5), TypeError, "schedule: r must be a Python int.*got 2.5"),
        (lambda: t.keep_schedule(2.5, 0.5, n=16), TypeError, "keep_schedule: depth must be a Python int"),
        (lambda: t.margins(2.5), TypeError, "margins: depth must be a Python int"),
        (lambda: t.flow_layers(6.5), TypeError, "flow_layers: depth must be a Python int"),
        (lambda: t.linear_decay(2.5, 8, start=0, step=0.5), TypeError, "linear_decay: depth must be a Python int"),
        (
            lambda: t.visible_layers(jnp.zeros(2, jnp.int32), SCORE > 0, 2.5),
            TypeError,
            "visible_layers: depth must be a Python",
        ),
        (lambda: t.page_rank(jnp.ones((2, 4, 4)), steps=2.5), TypeError, "page_rank: steps must be a Python int.*got 2.5"),
        (lambda: t.clip_matching(X, 1, classes=0.5), TypeError, "clip_matching: classes must be a Python int.*got 0.5"),
        (lambda: t.two_sided_matching(X[0], SIDES, SIDES + 8), ValueError, r"sources must be .* batch \(\); got \(2, 4\)"),
        (lambda: t.two_sided_matching(X, SIDES[0], SIDES[:1, None] + 8), ValueError, r"destinations must be .*got \(1, 1, 4\)"),
        (lambda: t.two_sided_matching(X, jnp.ones((3, 4), int), SIDES), ValueError, r"sources must be .* \(2,\); got \(3, 4\)"),
        (lambda: t.two_sided_matching(X, 3, SIDES), ValueError, r"sources must be .*got \(\)"),
        (lambda: t.negative_merge(X, jnp.ones((3, 5, 4))), ValueError, r"batch axes must be x's, \(2,\), .*got \(3,\)"),
        (lambda: t.attention_score(jnp.ones((2, 1, 4, 4)), prefix=5), ValueError, "a prefix between 0 and n.*prefix=5"),
        (lambda: t.keep(jnp.array(True), 1), ValueError, r"keep: mask must have 1 or more axes.*got shape \(\)"),
        (lambda: t.keep_top_k(SCORE[0, 0], 1), ValueError, "keep_top_k: score must have 1 or more axes"),
        (lambda: t.keep_top_k(SCORE + 1j, 1), TypeError, "keep_top_k: score must be real, got complex64"),
        (lambda: t.hiprune(SCORE + 1j, SCORE, 8, width=4), TypeError, "hiprune: middle must be real"),
        (lambda: t.ranks(SCORE + 1j), ValueError, "ranks: score must be real numbers along an axis, got complex64"),
        (lambda: t.page_rank(SCORE[0]), ValueError, "page_rank: logits must have 2 or more axes"),
        (lambda: t.recover(SCORE[0, 0], SCORE, X, 8), ValueError, "recover: score must have 1 or more axes"),
        (lambda: t.holitom(SCORE, SCORE, ratio=0.5), ValueError, r"holitom: x must have 3 or more axes.*got shape \(2, 16\)"),
        (lambda: t.exit_plan(SCORE[:, 0], SCORE > 0, 8), TypeError, "exit_plan: exits and visual must be boolean, got float32"),
        (lambda: t.members(PLAN.segment_ids, 2), TypeError, "members: plan must be a Plan of segment ids, got Array"),
        (lambda: t.in_order(jm.SoftPlan(X)), TypeError, "in_order: plan must be a Plan of segment ids, got SoftPlan"),
        (lambda: t.propagate(X, X), TypeError, "propagate: keep must be a Plan"),
        (lambda: t.center_weight(PLAN, LONG > 0, 0.5), ValueError, r"center_weight: centers .*\(2, 16\).*got \(2, 17\)"),
        (lambda: t.rope_positions(SCORE, (2,)), ValueError, r"rope_positions: positions must have shape .*got \(2, 16\)"),
    ],
)
def test_refused(call, error, message, unchecked):
    with pytest.raises(error, match=message):
        call()


def test_whole_numbers_are_scores(unchecked):
    """Counts and ranks, as numpy and integer arithmetic give them."""
    whole = np.tile(np.arange(16), (2, 1))
    same = lambda plan, score: np.testing.assert_array_equal(plan(whole).segment_ids, plan(score).segment_ids)
    same(lambda s: t.flow_cut(s, 4, 8), whole.astype(np.float32))
    same(lambda s: t.prune_and_merge(s, X, 12, 6), whole.astype(np.float32))
    same(lambda s: t.hiprune(s, s, 9, width=4), whole.astype(np.float32))
