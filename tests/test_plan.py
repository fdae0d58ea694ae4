"""The algebra: laws on random plans, transformations of JAX, meshes, dtypes, and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxmerge as jm
from jaxmerge.testing import assert_plan, assert_planner, random_forest, random_plan
from tests.hlo import collectives

B, N, M, F = 8, 12, 5, 4


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (B, N, F))


# --- laws


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_laws_of_hard_plans(batch, seed):
    assert_plan(random_plan(jax.random.key(seed), batch, N, M))


@pytest.mark.parametrize("batch", [(), (3,)])
def test_laws_of_soft_plans(batch):
    w = jax.random.normal(jax.random.key(0), (*batch, M, N))
    assert_plan(jm.SoftPlan(jnp.where(w > 0.5, w, 0.0)))


@pytest.mark.parametrize(
    "plan",
    [
        jm.Plan(jnp.zeros(6, jnp.int32), 1),  # everything into one
        jm.Plan(jnp.full(6, -1), 3),  # everything dropped
        jm.Plan(jnp.arange(6), 2),  # mostly overflow
        jm.Plan(jnp.zeros((2, 6), jnp.int8), 3),  # small integers, empty slots
        jm.Plan(jnp.zeros((0,), jnp.int32), 3),  # no positions
        jm.Plan(jnp.full(4, -1), 0),  # no segments
        jm.Plan(jnp.zeros((0, 6), jnp.int32), 2),  # no batch
    ],
    ids=["all-in-one", "all-dropped", "overflow", "int8", "n=0", "m=0", "batch=0"],
)
def test_laws_at_the_edges(plan):
    assert_plan(plan)


def test_the_suite_can_fail(monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(jm.Plan, "sizes", property(lambda plan: plan.matrix.sum(-1) + 1))
        with pytest.raises(AssertionError, match="sizes = A 1"):
            assert_plan(jm.Plan(jnp.array([0, 1, 1]), 2), seed=1, features=2)
    with pytest.raises(AssertionError, match="order"):
        assert_plan(jm.Plan(jnp.array([1, 0]), 2), ordered=True)
    with pytest.raises(AssertionError, match="vmap"):
        assert_planner(
            lambda x: jm.tokens.keep(x.sum(-1) > x.sum((-1, -2), keepdims=True).mean(), 3),
            jnp.ones((2, 4, 3)).at[0].mul(-1),
        )


def test_composition_is_associative():
    a, b, c = (random_plan(jax.random.key(i), (2,), n, m) for i, (n, m) in enumerate([(8, 6), (6, 5), (5, 3)]))
    left, right = jm.compose(c, jm.compose(b, a)), jm.compose(jm.compose(c, b), a)
    np.testing.assert_array_equal(left.matrix, right.matrix)
    np.testing.assert_array_equal(left.overflow, right.overflow)


def test_hard_and_soft_compose_as_matrices():
    hard, soft = (
        random_plan(jax.random.key(0), (2,), N, M),
        jm.SoftPlan(jax.random.normal(jax.random.key(1), (2, 3, M))),
    )
    out = jm.compose(soft, hard)
    assert isinstance(out, jm.SoftPlan)
    np.testing.assert_allclose(out.weights, soft.weights @ hard.matrix, rtol=1e-6)


def test_from_parents_follows_chains_and_keeps_order():
    plan = jm.from_parents(jnp.array([0, 0, 1, 2, 4, 4]), 2)  # 3 -> 2 -> 1 -> 0
    np.testing.assert_array_equal(plan.segment_ids, [0, 0, 0, 0, 1, 1])
    long = jm.from_parents(jnp.maximum(jnp.arange(33) - 1, 0), 1)  # one chain of 33
    assert long.sizes.tolist() == [33]
    assert_plan(random_forest(jax.random.key(0), (3,), 16, 5), ordered=True)


def test_from_parents_drops_cycles_and_counts_overflow():
    plan = jm.from_parents(jnp.array([1, 0, 2, 2, 9, 5]), 1)  # 0 <-> 1, root 2, parent out of range, root 5 without room
    np.testing.assert_array_equal(plan.segment_ids, [-1, -1, 0, 0, -1, 1])
    assert plan.overflow == 1


def test_pytrees_features_and_dtypes(x):
    plan = random_plan(jax.random.key(0), (B,), N, M)
    tree = {"a": x, "b": (x[..., 0], x[..., None].repeat(2, -1).astype(jnp.bfloat16)), "i": jnp.ones((B, N), jnp.int32)}
    out = jm.merge(plan, tree, reduce="sum")
    assert jax.tree.map(lambda a: (a.shape[1], a.dtype), out) == jax.tree.map(lambda a: (M, a.dtype), tree)
    np.testing.assert_array_equal(out["i"], plan.sizes)
    flags = jnp.arange(N) % 3 == 0
    np.testing.assert_array_equal(jm.merge(jm.Plan(jnp.arange(N) // 4, 3), flags, reduce="max"), flags.reshape(3, 4).any(-1))


def test_bfloat16_is_summed_in_float32():
    plan = jm.Plan(jnp.zeros(4096, jnp.int32), 1)
    ones = jnp.ones(4096, jnp.bfloat16)  # bfloat16 sums of ones stall at 256
    assert jm.merge(plan, ones, reduce="sum").item() == 4096 and jm.merge(plan, ones).item() == 1
    assert jm.merge(jm.SoftPlan(jnp.ones((1, 4096), jnp.bfloat16)), ones, reduce="sum").item() == 4096


def test_a_nan_stays_in_its_segment_on_this_backend():
    plan = jm.Plan(jnp.array([0, 0, 1, -1]), 2)
    out = jm.merge(plan, jnp.array([1.0, 2.0, jnp.nan, jnp.inf]))
    assert out[0] == 1.5 and jnp.isnan(out[1])


def test_the_tpu_form_agrees_with_the_default_form(x, monkeypatch):
    plan, w = random_plan(jax.random.key(0), (B,), N, M), jnp.abs(x[..., 0]) + 0.1
    run = lambda: jax.value_and_grad(lambda x, w: jnp.sum(jm.merge(plan, x, weight=w) ** 2), (0, 1))(x, w)
    want = run()
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *a, tpu, **_: tpu(*a))
    # a weight's gradient is the difference of two terms of up to 2 x^2 / w, and 0 for a lone position
    atol = float(np.finfo(np.float32).eps * (2 * x**2 / w[..., None]).max())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=atol), run(), want)


# --- gradients


def test_gradients_are_those_of_the_dense_matrix(x):
    plan = random_plan(jax.random.key(0), (B,), N, M)
    w = jnp.abs(x[..., 0]) + 0.5
    c = jax.random.normal(jax.random.key(2), (B, M, F))

    def dense(x, w):
        a = plan.matrix * w[:, None]
        mass = a.sum(-1, keepdims=True)
        return jnp.sum(c * jnp.where(mass == 0, 0, a @ x / jnp.where(mass == 0, 1, mass)))

    got = jax.grad(lambda x, w: jnp.sum(c * jm.merge(plan, x, weight=w)), (0, 1))(x, w)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), got, jax.grad(dense, (0, 1))(x, w))


def test_gradients_flow_through_soft_weights_and_not_through_ids(x):
    w = jax.nn.softmax(jax.random.normal(jax.random.key(0), (B, M, N)))
    g = jax.grad(lambda w: jnp.sum(jm.merge(jm.SoftPlan(w), x) ** 2))(w)
    assert jnp.abs(g).max() > 0
    assert jax.grad(lambda x: jnp.sum(jm.merge(jm.Plan(jnp.zeros((B, N), int), 1), x)))(x).shape == x.shape


@pytest.mark.parametrize("reduce", ["mean", "sum", "max", "first"])
def test_forward_mode_agrees_with_reverse_mode(x, reduce):
    plan = random_plan(jax.random.key(0), (B,), N, M)
    f = lambda x: jm.merge(plan, x, reduce=reduce)
    t = jax.random.normal(jax.random.key(5), x.shape)
    y, dy = jax.jvp(f, (x,), (t,))
    (dx,) = jax.vjp(f, x)[1](jnp.ones_like(y))
    np.testing.assert_allclose(jnp.sum(dy), jnp.sum(dx * t), rtol=1e-4)


# --- transformations


def test_a_plan_has_a_cotangent_that_says_nothing(x):
    plan = random_plan(jax.random.key(0), (B,), N, M)
    y, back = jax.vjp(jm.merge, plan, x)
    of_plan, of_x = back(jnp.ones_like(y))
    assert isinstance(of_plan, jm.Plan) and of_plan.segment_ids.dtype == jax.dtypes.float0
    np.testing.assert_array_equal(of_x, jax.grad(lambda x: jm.merge(plan, x).sum())(x))


def test_strict_promotion(x):
    plan = random_plan(jax.random.key(0), (B,), N, M)
    with jax.numpy_dtype_promotion("strict"):
        for a in (x, x.astype(jnp.bfloat16), x.astype(jnp.float16)):
            for weight in (None, jnp.ones((B, N), jnp.int32), jnp.ones((B, N), jnp.bfloat16), jnp.ones((B, N))):
                y = jax.eval_shape(lambda a, w: jm.unmerge(plan, jm.merge(plan, a, weight=w)), a, weight)
                assert y.dtype == a.dtype
        jax.eval_shape(lambda: jm.attention.key_bias(jm.compose(jm.identity(M, (B,)), plan)))
        jax.eval_shape(lambda w: jm.merge(jm.SoftPlan(w), x.astype(jnp.bfloat16)), jnp.ones((B, M, N)))


def test_a_plan_of_numpy_arrays_is_a_plan(unchecked):
    plan = jax.device_get(random_plan(jax.random.key(0), (2,), N, M))
    assert isinstance(plan.segment_ids, np.ndarray)
    assert_plan(plan)
    assert_plan(jax.device_get(jm.SoftPlan(jax.random.normal(jax.random.key(0), (2, M, N)))))
    np.testing.assert_array_equal(jm.compose(jax.device_get(jm.identity(M, (2,))), plan).sizes, plan.sizes)
    hops = np.int64(1)  # as numpy counts
    assert jm.from_parents(np.zeros(3, np.int32), 1, hops=hops).sizes.tolist() == [3]


@pytest.mark.parametrize("kind", [jnp.int8, jnp.uint8, jnp.int16, np.int8])
def test_narrow_ids_are_compared_with_wide_numbers(kind, unchecked):
    """300 segments, of which an int8 knows 127; and 300 positions."""
    make = np.array if kind is np.int8 else jnp.array
    plan, wide = jm.Plan(make([0, 0, 100], kind), 300), jm.Plan(jnp.array([0, 0, 100]), 300)
    for one in ("sizes", "kept", "overflow", "matrix"):
        np.testing.assert_array_equal(getattr(plan, one), getattr(wide, one))
    assert jax.jit(lambda p: p.sizes)(plan)[0] == 2 and plan.segment_ids.dtype == jnp.int32
    assert jm.from_parents(make([0] * 300, kind), 1).sizes.tolist() == [300]


@pytest.mark.parametrize("plan", [jm.Plan(np.array([0, 2, -1]), 3), jm.SoftPlan(np.eye(3, dtype=np.float32))])
def test_flax_saves_the_leaves(plan, unchecked):
    leaves, structure = jax.tree.flatten(plan)
    saved = serialization.to_bytes(leaves)
    back = jax.tree.unflatten(structure, serialization.from_bytes(leaves, saved))
    assert type(back) is type(plan) and back.num_segments == 3
    np.testing.assert_array_equal(back.matrix, plan.matrix)


def test_random_keys_go_where_their_positions_go():
    plan, keys = jm.Plan(jnp.array([1, 0, 1, -1]), 2), jax.random.split(jax.random.key(0), 4)
    first = jm.merge(plan, keys, reduce="first")
    assert (first == keys[jnp.array([1, 0])]).all() and (jm.unmerge(plan, first)[:3] == keys[jnp.array([0, 1, 0])]).all()


def test_plans_cross_every_transformation(x):
    plan = random_plan(jax.random.key(0), (B,), N, M)
    want = jm.merge(plan, x)
    same = lambda got: np.testing.assert_allclose(got, want, rtol=1e-6)
    same(jax.jit(jm.merge)(plan, x))
    same(jax.vmap(jm.merge)(plan, x))
    same(jax.lax.scan(lambda c, px: (c, jm.merge(*px)), 0, (plan, x))[1])
    same(jax.checkpoint(jm.merge)(plan, x))
    assert jax.eval_shape(jm.merge, plan, x).shape == want.shape
    assert jax.jit(lambda p: jm.compose(jm.identity(M, (B,)), p))(plan).num_segments == M
    leaves, tree = jax.tree.flatten(plan)
    assert len(leaves) == 1 and jax.tree.unflatten(tree, leaves).num_segments == M


def test_one_plan_shared_by_vmap(x):
    plan = random_plan(jax.random.key(0), (), N, M)
    shared = jax.vmap(jm.merge, in_axes=(None, 0))(plan, x)
    np.testing.assert_allclose(shared[3], jm.merge(plan, x[3]), rtol=1e-6)


# --- meshes


OPERATIONS = {
    "merge mean": lambda p, x, y: jm.merge(p, x),
    "merge weighted": lambda p, x, y: jm.merge(p, x, weight=jnp.ones(p.segment_ids.shape)),
    "merge sum": lambda p, x, y: jm.merge(p, x, reduce="sum"),
    "merge max": lambda p, x, y: jm.merge(p, x, reduce="max"),
    "merge first": lambda p, x, y: jm.merge(p, x, reduce="first"),
    "unmerge": lambda p, x, y: jm.unmerge(p, y),
    "grad merge": lambda p, x, y: jax.grad(lambda x: (jm.merge(p, x) * y).sum())(x),
    "grad unmerge": lambda p, x, y: jax.grad(lambda y: (jm.unmerge(p, y) * x).sum())(y),
    "grad first": lambda p, x, y: jax.grad(lambda x: (jm.merge(p, x, reduce="first") * y).sum())(x),
    "compose": lambda p, x, y: jm.merge(jm.compose(jm.Plan(p.segment_ids[:, :M] % 3, 3), p), x),
    "from_parents": lambda p, x, y: jm.merge(jm.from_parents(p.segment_ids % N, N), x),
}


@pytest.mark.parametrize("features", [None, "model"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_layout_survives_and_no_collective_appears(mesh, name, features, x):
    plan, y = random_plan(jax.random.key(0), (B,), N, M), jnp.ones((B, M, F))
    place = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
    with jax.set_mesh(mesh):
        args = (
            jm.Plan(place(plan.segment_ids, "data"), M),
            place(x, "data", None, features),
            place(y, "data", None, features),
        )
        compiled = jax.jit(OPERATIONS[name]).lower(*args).compile()
        out = compiled(*args)
    assert collectives(compiled) == []
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, P("data", None, features)), 3)
    np.testing.assert_allclose(out, OPERATIONS[name](plan, x, y), rtol=1e-6, atol=1e-6)


# --- bad input: one clear error that names the value, the expectation and the remedy


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: jm.Plan(jnp.array(3), 2), ValueError, "at least one axis"),
        (lambda: jm.Plan(jnp.zeros(3), 2), TypeError, "must be integers, got float32.*SoftPlan"),
        (lambda: jm.Plan(jnp.zeros(3, int), -1), ValueError, "0 or more, got -1"),
        (lambda: jax.jit(lambda m: jm.Plan(jnp.zeros(3, int), m))(2), TypeError, "Python int.*static"),
        (lambda: jm.SoftPlan(jnp.zeros(3)), ValueError, r"\(\*batch, m, n\), got \(3,\)"),
        (lambda: jm.SoftPlan(jnp.zeros((2, 3), int)), TypeError, "use Plan"),
        (lambda: jm.merge(jm.identity(3), jnp.ones(4)), ValueError, r"plan's shape \(3,\).*got \(4,\)"),
        (lambda: jm.merge(jm.identity(3), jnp.ones((2, 3))), ValueError, "jax.vmap or broadcast"),
        (lambda: jm.merge(jm.identity(3), jnp.ones(3), weight=jnp.ones(2)), ValueError, r"shape \(3,\), got \(2,\)"),
        (lambda: jm.merge(jm.identity(3), jnp.ones(3), reduce="amax"), ValueError, "amax"),
        (lambda: jm.merge(jm.identity(3), jnp.ones(3), weight=jnp.ones(3), reduce="max"), ValueError, "no meaning"),
        (lambda: jm.merge(jm.identity(3), jnp.arange(3)), TypeError, "int32 has no mean.*cast"),
        (lambda: jm.merge(jm.SoftPlan(jnp.eye(3)), jnp.ones(3), reduce="first"), ValueError, "needs a Plan"),
        (lambda: jm.unmerge(jm.Plan(jnp.zeros(3, int), 2), jnp.ones(3)), ValueError, r"shape \(2,\).*got \(3,\)"),
        (
            lambda: jm.compose(jm.Plan(jnp.zeros(4, int), 2), jm.Plan(jnp.zeros(2, int), 3)),
            ValueError,
            "reads 4.*writes 3",
        ),
        (lambda: jm.identity(3, like=jnp.ones((2, 4, 5))), ValueError, r"\(\*batch, 3, d\).*got \(2, 4, 5\)"),
        (lambda: jm.identity(4, (2,), like=jnp.ones((2, 4, 5))), ValueError, "batch left out"),
        (lambda: jm.from_parents(jnp.arange(3), 3, hops=0), ValueError, "hops must be 1 or more, got 0"),
        (
            lambda: jm.unmerge(jm.identity(3), jnp.arange(3), fill=np.nan),
            ValueError,
            "fill must be a value of y's int32, got nan; cast y",
        ),
        (lambda: jm.unmerge(jm.identity(3), jnp.arange(3), fill=2.5), ValueError, "int32, got 2.5"),
        (lambda: jm.unmerge(jm.identity(3), jnp.ones(3, jnp.uint8), fill=-1), ValueError, "uint8, got -1"),
        (lambda: jm.unmerge(jm.identity(3), jnp.ones(3, bool), fill=np.nan), ValueError, "bool, got nan"),
        (lambda: jm.compose(jm.identity(4), jm.Plan(jnp.zeros(4, int), 2)), ValueError, "swapped"),
        (lambda: jm.compose(jm.identity(3, (2,)), jm.identity(3)), ValueError, "batch shapes differ"),
        (lambda: jm.merge(jnp.ones(3), jm.identity(3)), TypeError, "merge: a Plan of an array.*comes first; got ArrayImpl"),
        (lambda: jm.unmerge(None, jnp.ones(3)), TypeError, "unmerge: a Plan.*got NoneType"),
        (lambda: jm.merge(jm.Plan([0, 1, 1], 2), jnp.ones(3)), TypeError, "got one that holds a list"),
        (lambda: jm.tokens.keep(jnp.ones(3), 2), TypeError, "boolean, got float32"),
        (lambda: jm.tokens.keep_top_k(jnp.ones(3), 4), ValueError, "between 0 and the number of tokens, 3; got 4"),
    ],
)
def test_bad_input(call, error, message, unchecked):
    with pytest.raises(error, match=message):
        call()


# --- the two planners that only need the algebra


def test_keep_and_keep_top_k(x):
    assert_planner(lambda x: jm.tokens.keep(x[..., 0] > 0, 7), x, ordered=True)
    assert_planner(lambda x: jm.tokens.keep_top_k(x[..., 0], 5), x, ordered=True)
    score = x[..., 0]
    plan = jm.tokens.keep_top_k(score, 5)
    np.testing.assert_array_equal(np.sort(jm.merge(plan, score, reduce="first"), -1), np.sort(score, -1)[:, -5:])
    np.testing.assert_array_equal(jm.tokens.keep_top_k(jnp.zeros(4), 2).kept, [True, True, False, False])
    np.testing.assert_array_equal(jm.tokens.keep_top_k(jnp.array([jnp.nan, 1.0, 0.0]), 2).kept, [False, True, True])
