"""HoliTom: the official windows and merges, the best cut by brute force, the whole pipeline written down again."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.tokens import (
    attention_and_density,
    attention_and_similarity,
    center_weight,
    frame_similarity,
    holitom,
    static_merging,
    static_windows,
)
from tests.conftest import GOLDEN

DETAILS = json.loads((GOLDEN / "tokens/holitom_a.json").read_text())
PARAMS = {c["name"]: c["params"] for c in DETAILS["cases"]}
F, N, D = 8, 12, 8
windows_of = jax.jit(static_windows, static_argnames=("threshold", "max_window"))
merge_static = jax.jit(static_merging, static_argnames=("capacity",))


@pytest.fixture(scope="module")
def official(golden):
    return golden("tokens/holitom_a")


@pytest.fixture(scope="module")
def video():
    """Tokens that stand still for a while, change at random moments, and tremble."""
    rng = np.random.default_rng(3)
    x = np.empty((2, F, N, D), np.float32)
    x[:, 0] = rng.standard_normal((2, N, D))
    for t in range(1, F):
        fresh = rng.random((2, N, 1)) < 0.2
        x[:, t] = np.where(fresh, rng.standard_normal((2, N, D)), x[:, t - 1])
    return x + 0.05 * rng.standard_normal(x.shape).astype(np.float32)


# --- windows


@pytest.mark.parametrize("name", ["windows_0.8_1024", "windows_0.6_3"])
def test_windows_are_the_official_ones(official, name):
    p = PARAMS[name]
    w = windows_of(official[f"{name}/feature_sim"], threshold=p["tau"], max_window=p["max_window_size"])
    runs = np.stack([w.start, w.end], axis=1)
    np.testing.assert_array_equal(np.unique(runs, axis=0), official[f"{name}/windows"])
    assert w.saved == p["total_reduced"]


@pytest.mark.parametrize("limit", [1, 2, 3, None])
def test_no_other_cut_saves_more(video, limit):
    similarity = np.asarray(frame_similarity(video))
    w = windows_of(similarity, threshold=0.8, max_window=limit)
    alike = similarity > 0.8
    for b in range(2):
        best = 0
        for cut in itertools.product([False, True], repeat=F - 1):
            edges = [0, *(i + 1 for i in range(F - 1) if cut[i]), F]
            spans = list(itertools.pairwise(edges))
            if limit is None or max(e - s for s, e in spans) <= limit:
                best = max(best, sum(alike[b, s : e - 1].all(0).sum() * (e - 1 - s) for s, e in spans))
        assert w.saved[b] == best
    assert limit != 1 or not w.static.any()


def test_static_tokens_merge_into_their_first_frame(video):
    w = windows_of(np.asarray(frame_similarity(video)))
    plan = merge_static(video)
    ids = np.asarray(plan.segment_ids).reshape(2, F, N)
    for b, t, i in np.ndindex(2, F, N):
        home = w.start[b, t] if w.static[b, t, i] else t
        assert ids[b, t, i] == ids[b, home, i]
    assert ((plan.sizes > 0).sum(1) == F * N - w.saved).all()
    small = merge_static(video, capacity=40)
    assert (small.overflow == (np.asarray(plan.segment_ids) >= 40).sum(1)).all()


def test_a_still_video_is_one_frame_and_a_broken_one_stays(video):
    still = np.repeat(video[:, :1], F, axis=1)
    assert ((merge_static(still).sizes > 0).sum(1) == N).all()
    plan = merge_static(np.full_like(video, np.nan))
    np.testing.assert_array_equal(plan.segment_ids, np.tile(np.arange(F * N), (2, 1)))


# --- inside a frame


@pytest.mark.parametrize("name", ["merge0", "merge1"])
def test_merges_are_the_official_ones(official, name):
    a, p = {k.split("/")[1]: v for k, v in official.items() if k.startswith(f"{name}/")}, PARAMS[name]
    beta = p["Beta"] if p["NO_BETA"] == "0" else None
    total = math.ceil(30 * p["retain_ratio"])
    keep = round(total * (1 - p["D"]))

    def run(x, attention, keep, k):
        plan, weight = attention_and_density(x, attention, keep, k, neighbors=p["K"], beta=beta)
        return plan, jm.merge(plan, x, weight=weight)

    run = jax.jit(run, static_argnums=(2, 3))
    plan, y = run(a["x"], a["attn"], keep, total - keep)
    slots = np.take_along_axis(np.asarray(plan.segment_ids), a["pos"].astype(int), 1)  # official order: kept, then centres
    np.testing.assert_allclose(np.take_along_axis(np.asarray(y), slots[..., None], 1), a["out"], rtol=0, atol=2e-5)
    assert all(len(set(row)) == total for row in slots)

    x = a["x"][:1]  # without attention: the static tokens of a window
    k = round(30 * p["retain_ratio"])
    plan, y = run(x, a["attn"][:1], 0, k)
    slots = np.take_along_axis(np.asarray(plan.segment_ids), a["density_pos"].astype(int), 1)
    np.testing.assert_allclose(np.take_along_axis(np.asarray(y), slots[..., None], 1), a["density_out"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("halving", [False, True])
def test_what_attention_leaves_joins_its_like(video, halving):
    x, attention = video[:, 0], np.random.default_rng(2).random((2, N)).astype(np.float32)
    plan, weight = attention_and_similarity(x, jnp.asarray(attention), 4, halving=halving)
    y = jm.merge(plan, x, weight=weight)
    for b in range(2):
        top = np.sort(np.argsort(-attention[b])[:4])
        u = x[b] / np.linalg.norm(x[b], axis=1, keepdims=True)
        groups, state = [[i] for i in top], x[b].astype(np.float64)
        for i in np.setdiff1d(np.arange(N), top):
            near = (u[i] @ u[top].T).argmax()
            groups[near].append(i)
            state[top[near]] = (state[top[near]] + state[i]) / 2
        want = state[top] if halving else np.stack([x[b, g].mean(0) for g in groups])
        np.testing.assert_allclose(y[b], want, rtol=0, atol=2e-5)


def test_beta_is_a_weighted_mean():
    plan = jm.Plan(jnp.array([0, 1, 0, 2, 0, -1]), 3)
    centers = jnp.array([False, True, True, True, False, False])
    weight = center_weight(plan, centers, 0.6)
    x = jnp.array([1.0, 2.0, 10.0, 3.0, 5.0, 7.0])
    np.testing.assert_allclose(jm.merge(plan, x, weight=weight), [0.6 * 10 + 0.4 * 3, 2, 3], rtol=1e-6)
    np.testing.assert_allclose(jm.merge(plan, weight, reduce="sum"), 1, rtol=1e-6)
    np.testing.assert_array_equal(center_weight(plan, centers, None), [1, 1, 1, 1, 1, 0])


# --- all of it


def rule(x, attention, ratio, w, *, share, beta):
    """HoliTom on one video: {first position of each output's centre: its value}, given the windows."""
    frames, n, _ = x.shape
    start, end, static = (np.asarray(a) for a in w)
    saved = (static & (start != np.arange(frames))[:, None]).sum()
    ratio = min(ratio / ((frames * n - saved) / (frames * n)), 1)
    out = {}

    def clusters(feat, where, k):
        if k == 0:
            return
        dist = np.linalg.norm(feat[:, None].astype(np.float64) - feat[None], axis=-1) / np.sqrt(D)
        rho = np.exp(-(np.sort(dist, axis=1)[:, : min(7, k)] ** 2).mean(1))
        delta = np.array([dist[i, rho > rho[i]].min(initial=dist.max()) for i in range(len(feat))])
        centers = np.sort(np.argsort(-rho * delta, kind="stable")[:k])
        near = dist[:, centers].argmin(1)
        near[centers] = np.arange(k)
        for j, c in enumerate(centers):
            others = feat[(near == j) & (np.arange(len(feat)) != c)]
            if beta is None:
                out[where[c]] = np.concatenate([feat[c][None], others]).mean(0)
            else:
                out[where[c]] = beta * feat[c] + (1 - beta) * others.mean(0) if len(others) else feat[c]

    for s in np.unique(start):
        e = end[s]
        still = np.flatnonzero(static[s])
        clusters(x[s : e + 1, still].mean(0), s * n + still, round(len(still) * ratio))
        for t in range(s, e + 1):
            moving = np.flatnonzero(~static[t])
            total = math.ceil(len(moving) * ratio)
            keep = round(total * (1 - share))
            top = np.sort(np.argsort(-attention[t, moving], kind="stable")[:keep])
            out.update({t * n + moving[i]: x[t, moving[i]] for i in top})
            rest = np.delete(moving, top)
            clusters(x[t, rest], t * n + rest, total - keep)
    return out


@pytest.mark.parametrize("share, beta", [(0.0, 0.6), (0.5, 0.6), (0.5, None)])
def test_the_whole_pipeline_is_its_rule(video, share, beta):
    attention = np.random.default_rng(1).random((2, F, N)).astype(np.float32)
    w = windows_of(np.asarray(frame_similarity(video)))
    run = jax.jit(lambda x, a: holitom(x, a, ratio=0.31, density=share, neighbors=7, beta=beta))
    plan, weight = run(video, attention)
    y = np.asarray(jm.merge(plan, video.reshape(2, F * N, D), weight=weight))
    for b in range(2):
        want = rule(video[b], attention[b], 0.31, [a[b] for a in w], share=share, beta=beta)
        ids = np.asarray(plan.segment_ids)[b]
        assert (np.asarray(plan.sizes)[b] > 0).sum() == len(want)
        assert len({ids[at] for at in want}) == len(want)
        for at, value in want.items():
            np.testing.assert_allclose(y[b, ids[at]], value, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: static_windows(frame_similarity(x), max_window=0), "1 frame or more, got 0"),
        (lambda x: holitom(x, x[..., 0], ratio=1.5), "between 0 and 1, got 1.5"),
        (lambda x: holitom(x, x[..., 0, 0], ratio=0.5), r"attention must have shape \(2, 8, 12\), got \(2, 8\)"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input(video, call, message):
    with pytest.raises(ValueError, match=message):
        call(video)
