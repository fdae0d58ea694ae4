"""k-means: Lloyd's rule, starts, empty clusters, choosing k; VMTC and CMAI on top; bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.tokens import (
    adaptive_k_means,
    attention_inhibition,
    in_order,
    inertia,
    k_means,
    primary_and_clusters,
    silhouette,
)

B, N, D, K = 3, 30, 8, 5
cluster = jax.jit(k_means, static_argnames=("k", "iterations", "init", "metric"))
spread = jax.jit(inertia, static_argnames=("metric",))
renumber = jax.jit(in_order)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (B, N, D))


def start(x, k, init, draws=None):
    """The tokens that the means start from."""
    if init == "first":
        return np.arange(k)
    chosen, nearest = [], np.full(len(x), np.inf)
    for t in range(k):
        weight = nearest if draws is None else np.where(np.isinf(nearest), 0, np.log(np.maximum(nearest, 1e-300))) + draws[t]
        chosen.append(int(np.argmax(weight)))
        nearest = np.minimum(nearest, ((x - x[chosen[-1]]) ** 2).sum(1))
    return np.array(chosen)


def rule(x, k, iterations, metric, init, *, draws=None):
    """Lloyd in float64."""
    x = x.astype(np.float64)
    if metric == "cosine":
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
    means = x[start(x, k, init, draws)]

    def assign():
        if metric == "cosine":
            return (x @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T).argmax(1)
        return ((x[:, None] - means[None]) ** 2).sum(-1).argmin(1)

    for _ in range(iterations):
        ids = assign()
        means = np.stack([x[ids == j].mean(0) if (ids == j).any() else means[j] for j in range(k)])
    return np.asarray(renumber(jm.Plan(jnp.asarray(assign()), k)).segment_ids)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("init", ["farthest", "first"])
def test_equals_the_rule(x, metric, init):
    plan = cluster(x, K, iterations=4, init=init, metric=metric)
    np.testing.assert_array_equal(plan.segment_ids, [rule(row, K, 4, metric, init) for row in np.asarray(x)])


def test_k_means_plus_plus_draws_by_distance(x):
    key = jax.random.key(7)
    draws = np.asarray(jax.random.gumbel(key, (K, N)))
    plan = cluster(x, K, iterations=2, init="k-means++", key=key)
    np.testing.assert_array_equal(
        plan.segment_ids, [rule(row, K, 2, "cosine", "k-means++", draws=draws) for row in np.asarray(x)]
    )
    other = cluster(x, K, iterations=2, init="k-means++", key=jax.random.key(8))
    assert (other.segment_ids != plan.segment_ids).any()


def test_the_sum_of_squares_never_rises(x):
    plans = [cluster(x, K, iterations=t, init="first", metric="euclidean") for t in (0, 1, 2, 4, 8)]
    loss = np.stack([spread(x, plan, metric="euclidean") for plan in plans])
    assert (np.diff(loss, axis=0) <= 1e-4).all() and (loss[-1] < loss[0]).all()


def test_far_from_the_origin_nothing_changes(x):
    near = cluster(x, K, iterations=4, metric="euclidean")
    far = cluster(jnp.round(x * 64) / 64 + 1024.0, K, iterations=4, metric="euclidean")
    np.testing.assert_array_equal(
        far.segment_ids, cluster(jnp.round(x * 64) / 64, K, iterations=4, metric="euclidean").segment_ids
    )
    assert (near.sizes > 0).all()


def test_one_cluster_for_each_token_is_the_identity(x):
    np.testing.assert_array_equal(cluster(x, N, iterations=1).segment_ids, np.tile(np.arange(N), (B, 1)))


def test_empty_clusters_are_empty_slots_at_the_end():
    x = jnp.repeat(jnp.eye(3), 4, axis=0)
    plan = cluster(x, 5)
    assert plan.segment_ids.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and plan.sizes.tolist() == [4, 4, 4, 0, 0]


def test_masked_and_broken_tokens(x):
    mask = np.arange(N) % 3 > 0
    plan = cluster(x.at[:, 1].set(jnp.nan), K, mask=np.tile(mask, (B, 1)), metric="euclidean")
    without = cluster(x[:, 2:][:, mask[2:]], K, metric="euclidean")
    ids = np.asarray(plan.segment_ids)
    assert (ids[:, ~mask] == -1).all() and (ids[:, 1] >= 0).all()
    same = lambda i: i[:, :, None] == i[:, None, :]
    np.testing.assert_array_equal(same(ids[:, 2:][:, mask[2:]]), same(np.asarray(without.segment_ids)))


# --- choosing k


def blobs(k, each=6, seed=0):
    rng = np.random.default_rng(seed)
    return (np.repeat(10 * np.eye(8)[:k], each, axis=0) + 0.1 * rng.standard_normal((k * each, 8))).astype(np.float32)


def test_silhouette_is_its_definition(x):
    plan = cluster(x, K)
    unit = np.asarray(x / jnp.linalg.norm(x, axis=-1, keepdims=True))
    for row, ids, got in zip(unit, np.asarray(plan.segment_ids), jax.jit(silhouette)(x, plan), strict=True):
        dist = np.linalg.norm(row[:, None] - row[None], axis=-1)
        score = []
        for i in range(N):
            mine = (ids == ids[i]).sum()
            a = dist[i, ids == ids[i]].sum() / max(mine - 1, 1)
            b = min(dist[i, ids == j].mean() for j in range(K) if j != ids[i] and (ids == j).any())
            score.append((b - a) / max(a, b) if mine > 1 else 0)
        # a distance is off by sqrt(eps) at most: |a|² + |b|² - 2 a·b cancels
        np.testing.assert_allclose(got, np.mean(score), rtol=0, atol=1e-5)


@pytest.mark.parametrize("criterion", ["silhouette", "elbow"])
def test_the_range_finds_the_right_number(criterion):
    x = np.stack([blobs(3, 8), blobs(4)])
    plan = jax.jit(lambda x: adaptive_k_means(x, range(2, 7), criterion=criterion))(x)
    assert plan.num_segments == 6 and (plan.sizes > 0).sum(-1).tolist() == [3, 4]


# --- VQToken, VMTC, CMAI


def test_a_codebook_and_its_map(x):
    """VQToken: codes are means of normalised tokens; the map says which code stands where."""
    plan = cluster(x, K)
    unit = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    codes = jm.merge(plan, unit)
    drawn = jm.unmerge(plan, codes)
    np.testing.assert_array_equal(drawn, np.take_along_axis(np.asarray(codes), np.asarray(plan.segment_ids)[..., None], 1))
    assert ((drawn - unit) ** 2).sum() < ((unit - unit.mean(1, keepdims=True)) ** 2).sum()


def test_primary_tokens_stay_and_the_rest_condenses(x):
    score = x.sum(-1)
    plan = jax.jit(lambda x, score: primary_and_clusters(x, score, 6, 4))(x, score)
    top = np.argsort(-np.asarray(score), axis=1)[:, :6]
    sizes = np.take_along_axis(np.asarray(plan.sizes), np.take_along_axis(np.asarray(plan.segment_ids), top, 1), 1)
    assert (sizes == 1).all() and (plan.sizes.sum(1) == N).all() and (plan.segment_ids >= 0).all()


def test_inhibition_hides_what_no_context_looks_at(x):
    text = jax.nn.softmax(jax.random.normal(jax.random.key(1), (B, 4, 4)))
    image = jax.nn.softmax(jax.random.normal(jax.random.key(2), (B, 4, N)))
    bias = attention_inhibition(text, image, 7)
    focus = np.asarray(text) @ np.asarray(image)
    seen = focus >= np.sort(focus, axis=-1)[..., -7:-6]
    np.testing.assert_array_equal(bias == 0, seen)
    weights = jax.nn.softmax(jnp.log(image) + bias)
    assert (np.asarray(weights)[~seen] == 0).all()
    assert (attention_inhibition(text, image, N) == 0).all()


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x: k_means(x, 0), ValueError, "k must be between 1 and the number of tokens, 30; got 0"),
        (lambda x: k_means(x, 2.5), TypeError, "Python int, because shapes are static; got 2.5"),
        (lambda x: k_means(x, 2, iterations=-1), ValueError, "iterations must be 0 or more, got -1"),
        (lambda x: k_means(x, 2, init="random"), ValueError, "init must be .*got 'random'"),
        (lambda x: k_means(x, 2, metric="dot"), ValueError, "metric must be .*got 'dot'"),
        (lambda x: k_means(x, 2, init="k-means++"), ValueError, "a key goes with"),
        (lambda x: k_means(x, 2, key=jax.random.key(0)), ValueError, "a key goes with"),
        (lambda x: k_means(x[0, 0], 2), ValueError, r"\(\*batch, n, d\), got \(8,\)"),
        (lambda x: adaptive_k_means(x, [3, 2]), ValueError, r"increasing candidates, at least one; got \[3, 2\]"),
        (lambda x: adaptive_k_means(x, [2, 3], criterion="gap"), ValueError, "criterion must be .*got 'gap'"),
        (lambda x: primary_and_clusters(x, x.sum(-1), 28, 3), ValueError, "30 tokens less keep=28"),
        (lambda x: attention_inhibition(x[:, :8], x[:, :8], 9), ValueError, "image tokens, 8; got 9"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input(x, call, error, message):
    with pytest.raises(error, match=message):
        call(x)
