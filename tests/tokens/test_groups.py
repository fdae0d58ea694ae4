"""Given groups: the rule itself, the published sums, long sequences, meshes, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxmerge as jm
from jaxmerge.tokens.given import _groups, bind, bind_attributes, from_groups
from tests.hlo import collectives

B, N, D = 4, 16, 8


@pytest.fixture(scope="module")
def groups():
    return np.random.default_rng(0).integers(-3, 4, (B, N)).astype(np.int32) * 1000


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (B, N, D))


def rule(groups, mask, alone):
    """A dictionary from groups to numbers, filled from left to right."""
    seen, ids = {}, []
    for i, (g, inside) in enumerate(zip(groups, mask, strict=True)):
        name = ("group", g) if inside else ("alone", i)
        ids.append(seen.setdefault(name, len(seen)) if inside or alone else -1)
    return ids


@pytest.mark.parametrize("rest", ["drop", "alone"])
def test_groups_are_numbered_as_they_appear(groups, rest):
    for mask in (np.ones_like(groups, bool), np.random.default_rng(1).random((B, N)) < 0.6):
        plan = from_groups(groups, N, mask=mask, rest=rest)
        want = [rule(g, m, rest == "alone") for g, m in zip(groups, mask, strict=True)]
        np.testing.assert_array_equal(plan.segment_ids, want)
    np.testing.assert_array_equal(from_groups(groups, N).segment_ids, from_groups(7 - groups, N).segment_ids)  # renamed


def test_room_for_fewer_groups_is_counted(groups):
    whole, tight = from_groups(groups, N), from_groups(groups, 3)
    np.testing.assert_array_equal(tight.overflow, (np.asarray(whole.segment_ids) >= 3).sum(-1))
    np.testing.assert_array_equal(tight.sizes, whole.sizes[:, :3])
    assert (tight.overflow > 0).any()


def test_every_position_its_own_group_is_the_identity():
    np.testing.assert_array_equal(from_groups(np.arange(N)[::-1] * 5, N).segment_ids, np.arange(N))
    assert from_groups(jnp.zeros((2, 0), jnp.int32), 3).sizes.tolist() == [[0, 0, 0]] * 2


def test_long_sequences_are_sorted_and_give_the_same(monkeypatch, groups):
    mask = np.random.default_rng(2).random((B, N)) < 0.6
    extremes = np.where(groups == 0, np.iinfo(np.int32).min, np.where(groups == 1000, np.iinfo(np.int32).max, groups))
    short = [from_groups(g, 5, mask=m).segment_ids for g in (groups, extremes) for m in (None, mask)]
    monkeypatch.setattr(_groups, "COMPARE_ALL", 0)
    for got, want in zip((from_groups(g, 5, mask=m) for g in (groups, extremes) for m in (None, mask)), short, strict=True):
        np.testing.assert_array_equal(got.segment_ids, want)


def test_weights_of_subtokens_learn(groups, x):
    """A softmax over the subtokens of each identifier, as weight=, against numpy; gradients reach the scores."""
    score = x[..., 0]

    @jax.jit
    def pooled(x, score):
        return jm.merge(from_groups(groups, N), x, weight=jnp.exp(score))

    y = np.asarray(pooled(x, score))
    for b in range(B):
        ids = np.asarray(rule(groups[b], np.ones(N, bool), False))
        for s in range(ids.max() + 1):
            w = np.exp(np.asarray(score[b], np.float64)[ids == s])
            np.testing.assert_allclose(y[b, s], w @ np.asarray(x[b], np.float64)[ids == s] / w.sum(), rtol=0, atol=2e-6)
    grad = jax.grad(lambda s: (pooled(x, s) ** 2).sum())(score)
    assert jnp.isfinite(grad).all() and (grad != 0).any()


# --- bound in place


def official_binding(embeddings, pairs):
    """The published rule of semantic binding, on index lists."""
    out = np.array(embeddings, np.float64)
    for nouns, attributes in pairs:
        total = 1.1 * out[nouns].sum(0) + 1.2 * out[attributes].sum(0)
        out[nouns + attributes] = 0
        out[nouns[0]] = total
    return out


def test_equals_the_rule_of_semantic_binding():
    prompt = np.random.default_rng(3).standard_normal((77, 12)).astype(np.float32)
    pairs = [([2, 3], [1]), ([9], [6, 7, 12]), ([20], [])]
    groups, attribute = np.full(77, -1, np.int32), np.zeros(77, bool)
    for k, (nouns, attributes) in enumerate(pairs):
        groups[nouns + attributes] = k
        attribute[attributes] = True
    plan = jax.jit(bind_attributes)(groups, attribute)
    assert plan.num_segments == 77
    np.testing.assert_allclose(jm.merge(plan, prompt, reduce="sum"), official_binding(prompt, pairs), rtol=0, atol=2e-6)
    other = bind_attributes(groups, attribute, noun_weight=1.0, attribute_weight=0.5)
    np.testing.assert_allclose(other.weights[2, [1, 2, 3]], [0.5, 1, 1])


def test_a_negation_becomes_one_embedding_in_place_or_shorter(x):
    groups, weight, want = np.full((B, N), -1), np.ones((B, N), np.float32), np.array(x)
    groups[:, 3:6], weight[:, 3] = 0, 3  # "not bright red"
    want[:, 3], want[:, 4:6] = (3 * want[:, 3] + want[:, 4] + want[:, 5]) / 5, 0

    @jax.jit
    def merged(groups, weight, x):
        short = from_groups(groups, N - 2, mask=groups >= 0, rest="alone")
        return jm.merge(bind(groups, weight=weight), x), jm.merge(short, x, weight=weight)

    kept, short = merged(groups, weight, x)
    np.testing.assert_allclose(kept, want, rtol=0, atol=1e-6)
    np.testing.assert_allclose(short, np.delete(want, [4, 5], axis=1), rtol=0, atol=1e-6)


def test_groups_without_a_head_stay_and_the_total_stays(x):
    x = np.asarray(x)
    groups = np.where(np.arange(N) < 8, 0, 5) + np.zeros((B, 1), np.int32)
    plan = jax.jit(bind)(groups, head=groups == 0)
    y = np.asarray(jm.merge(plan, x, reduce="sum"))
    np.testing.assert_array_equal(y[:, 8:], x[:, 8:])
    np.testing.assert_allclose(y[:, 0], x[:, :8].sum(1), rtol=0, atol=2e-6)
    np.testing.assert_array_equal(np.asarray(plan.weights).sum(-2), 1)


def test_gradients_reach_the_weights_of_a_bound_phrase(x):
    groups = jnp.zeros((B, N), jnp.int32)
    loss = lambda w: (jm.merge(bind(groups, weight=w), x) ** 2).sum()
    w, direction = jnp.linspace(0.5, 2, B * N).reshape(B, N), x[..., 1]
    slope = jnp.vdot(jax.grad(loss)(w), direction)
    h = 1e-2  # the loss is of order 1, float32 leaves 1e-5 of its slope, and the third derivative is small
    np.testing.assert_allclose(slope, (loss(w + h * direction) - loss(w - h * direction)) / (2 * h), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("route", ["compared", "sorted"])
def test_every_device_groups_its_own(mesh, monkeypatch, groups, x, route):
    if route == "sorted":
        monkeypatch.setattr(_groups, "COMPARE_ALL", 0)

    def step(g, x):
        plan = from_groups(g, 6)
        return plan, jm.merge(plan, x), jm.merge(bind(g), x)

    with jax.set_mesh(mesh):
        args = jax.device_put(groups, NamedSharding(mesh, P("data"))), jax.device_put(x, NamedSharding(mesh, P("data")))
        compiled = jax.jit(step).lower(*args).compile()
        plan, _, bound = compiled(*args)
    assert collectives(compiled) == []
    np.testing.assert_array_equal(plan.segment_ids, step(groups, x)[0].segment_ids)
    np.testing.assert_allclose(bound, step(groups, x)[2], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda g: from_groups(g.astype(float), 2), TypeError, "from_groups: groups must be integers, got float"),
        (lambda g: from_groups(g, 2, mask=g), TypeError, "from_groups: mask must be boolean, got int32"),
        (lambda g: from_groups(g, 2, mask=g[0] > 0), ValueError, r"mask must have the groups' shape \(4, 16\), got \(16,\)"),
        (lambda g: from_groups(g, 2, rest="keep"), ValueError, '"drop" or "alone", got \'keep\''),
        (lambda g: from_groups(g[0, 0], 2), ValueError, "at least one axis, the n positions; got a scalar"),
        (lambda g: jax.jit(from_groups)(g, 2), TypeError, "num_segments must be a Python int"),
        (lambda g: bind(g, weight=np.ones(3)), ValueError, r"weight must have the groups' shape \(4, 16\), got \(3,\)"),
        (lambda g: bind(g, head=g), TypeError, "bind: head must be boolean"),
        (lambda g: bind_attributes(g, g), TypeError, "bind_attributes: is_attribute must be boolean"),
    ],
)
def test_bad_input(call, error, message, groups, unchecked):
    with pytest.raises(error, match=message):
        call(groups)
