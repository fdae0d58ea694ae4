"""Pruning and merging the tail by importance: DiffRate's official vectors, the rule, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.tokens import keep_top_k, merged_similarity, prune_and_merge

B, N, D = 3, 21, 8


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (B, N, D))


@pytest.fixture(scope="module")
def importance():
    return jax.nn.softmax(jax.random.normal(jax.random.key(1), (B, N)))


@pytest.mark.parametrize("name, kept, protect", [("merge0", 20, (0,)), ("merge1", 22, ())])
def test_equals_the_official_code(golden, name, kept, protect):
    """Their tokens come sorted by importance, so the positions' own order stands for it."""
    a = {k.split("/")[1]: v for k, v in golden("tokens/diffrate_a").items() if k.startswith(f"{name}/")}
    n = a["x"].shape[1]

    @jax.jit
    def ours(x, size):
        order = -jnp.cumsum(jnp.ones_like(x[..., 0]), axis=-1)
        plan = prune_and_merge(order, x, n, kept, protect=protect)
        similarity = merged_similarity(order, x, n, kept, protect=protect)
        y = jm.merge(plan, x)
        return plan, similarity, y, jm.merge(plan, size, reduce="sum"), jm.unmerge(plan, y)

    plan, similarity, y, size, back = ours(a["x"], a["size"])
    np.testing.assert_array_equal(plan.segment_ids[:, :kept], np.broadcast_to(np.arange(kept), (2, kept)))
    np.testing.assert_array_equal(plan.segment_ids[:, kept:], a["dst_idx"])
    np.testing.assert_array_equal(plan.matrix, a["source"].astype(bool))
    for got, want in ((similarity[:, kept:], "node_max"), (y, "out"), (size, "size_sum"), (back, "uncompressed")):
        np.testing.assert_allclose(got, a[want], rtol=0, atol=2e-5)
    np.testing.assert_array_equal(similarity[:, :kept], 1)


@pytest.mark.parametrize(
    "kept, merged, protect", [(16, 9, (0,)), (21, 10, ()), (12, 12, (0, 3)), (9, 14, (-1,)), (5, 2, (0, 4))]
)
def test_equals_the_rule(x, importance, kept, merged, protect):
    both = lambda *args: [f(*args, kept, merged, protect=protect) for f in (prune_and_merge, merged_similarity)]
    plan, similarity = jax.jit(both)(importance, x)
    assert plan.num_segments == min(kept, merged)
    for b in range(B):
        fixed = [p % N for p in protect]
        unit = np.asarray(x[b]) / np.linalg.norm(x[b], axis=-1, keepdims=True)
        order = [*fixed, *[i for i in np.argsort(-np.asarray(importance[b])) if i not in fixed]]
        stay, tail = sorted(order[: min(kept, merged)]), order[min(kept, merged) : kept]
        for i in range(N):
            if i in stay:
                want, like = stay.index(i), 1
            elif i in tail and (open_ := [j for j in stay if j not in fixed]):
                best = max(open_, key=lambda j: unit[i] @ unit[j])
                want, like = stay.index(best), unit[i] @ unit[best]
            else:
                want, like = -1, 0
            assert plan.segment_ids[b, i] == want
            assert abs(similarity[b, i] - like) < 1e-5


def test_counts_may_be_traced(x, importance):
    """What training needs: one program for all rates."""
    f = jax.jit(lambda kept, merged: prune_and_merge(importance, x, kept, merged, protect=(0,), capacity=N))
    for kept, merged in ((16, 9), (12, 12), (9, 14)):
        static = prune_and_merge(importance, x, kept, merged, protect=(0,))
        traced = f(jnp.int32(kept), jnp.int32(merged))
        np.testing.assert_array_equal(traced.segment_ids, static.segment_ids)
        np.testing.assert_array_equal(traced.sizes[:, static.num_segments :], 0)


def test_pruning_alone_is_keep_top_k(x, importance):
    np.testing.assert_array_equal(prune_and_merge(importance, x, 8, 8).segment_ids, keep_top_k(importance, 8).segment_ids)


def test_their_size_can_be_negative_and_ours_cannot():
    x = jnp.array([[1.0, 0.0], [-1.0, 0.1], [-1.0, -0.1]])
    importance, size = jnp.array([3.0, 2.0, 1.0]), jnp.array([1.0, 1.0, 2.0])
    plan = prune_and_merge(importance, x, 3, 1)
    theirs = jm.merge(plan, size * merged_similarity(importance, x, 3, 1), reduce="sum")
    assert theirs[0] < 0
    assert jm.merge(plan, size, reduce="sum")[0] == 4


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda x, s: prune_and_merge(s, x, 22, 4),
            ValueError,
            "kept must be between 0, the protected tokens, and n=21; got 22",
        ),
        (lambda x, s: prune_and_merge(s, x, 5, 1, protect=(0, 1)), ValueError, "merged must be between 2"),
        (lambda x, s: prune_and_merge(s, x, 5, 4, protect=(21,)), ValueError, "position 21 is not among n=21"),
        (lambda x, s: prune_and_merge(s, x, jnp.int32(5), 4), TypeError, "give a capacity: shapes are static"),
        (lambda x, s: merged_similarity(s[:, :3], x, 3, 2), ValueError, r"shape \(3, 21\); got \(3, 3\)"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input(call, error, message, x, importance):
    with pytest.raises(error, match=message):
        call(x, importance)
