"""The laws that every planner obeys, whatever family it is of: one table, one set of checks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jaxmerge as jm
from jaxmerge import testing
from tests.hlo import collectives
from tests.tokens.cases import Case, D, N, every_case

BATCH = 8
CASES = every_case()
every_planner = pytest.mark.parametrize(  # further rows of a planner, "name, variant", are slow tests
    "case", [pytest.param(c, id=c.name, marks=pytest.mark.slow if "," in c.name else ()) for c in CASES]
)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (BATCH, N, D))


@functools.cache
def compiled(case: Case):
    """The planner, compiled once for all tests of (8, 16, 8)."""
    return jax.jit(case.plan)


def matrix(plan: jm.Plan | jm.SoftPlan) -> jax.Array:
    return plan.matrix.astype(jnp.float32)


def together(plan: jm.Plan | jm.SoftPlan) -> np.ndarray:
    """(batch, n, n): how much positions i and j share: what a plan says, however its segments are numbered."""
    a = np.asarray(matrix(plan))
    return np.einsum("...mi,...mj->...ij", a, a)


def padded(plan: jm.Plan | jm.SoftPlan) -> jm.Plan | jm.SoftPlan:
    """The same plan with empty slots up to n, so that all planners share one compilation of the algebra."""
    m, size = plan.num_segments, max(plan.num_segments, N)
    if isinstance(plan, jm.Plan):
        ids = np.asarray(plan.segment_ids)
        return jm.Plan(jnp.asarray(np.where(ids >= m, size, ids)), size)
    return jm.SoftPlan(jnp.asarray(np.pad(np.asarray(plan.weights), ((0, 0), (0, N - m), (0, 0)))))


@every_planner
def test_laws(case: Case, x):
    """jit, vmap, scan and eval_shape agree, in bfloat16 too, and the algebra's laws hold of what comes out."""
    scan = lambda x: jax.lax.scan(lambda c, row: (c, case.plan(row)), 0, x)[1]
    ways = {"jit": case.plan, "vmap": jax.vmap(case.plan), "scan": scan}
    x = x[:2]
    plans = jax.jit(lambda x: {how: f(x) for how, f in ways.items()})(x)
    leaf = lambda p: p.segment_ids if isinstance(p, jm.Plan) else p.weights
    plan, shape = plans["jit"], jax.eval_shape(case.plan, x)
    assert leaf(shape).shape == leaf(plan).shape and shape.num_segments == plan.num_segments
    tolerance = 0 if isinstance(plan, jm.Plan) else 16 * N * testing.EPS
    for how, other in plans.items():
        np.testing.assert_allclose(leaf(other), leaf(plan), rtol=tolerance, atol=tolerance, err_msg=how)
    testing.assert_plan(padded(plan), ordered=case.ordered)
    if case.low_precision:
        low = jax.jit(case.plan)(x.astype(jnp.bfloat16))
        assert leaf(low).shape == leaf(plan).shape
        testing.assert_plan(padded(low), ordered=case.ordered)


@every_planner
def test_strict_promotion(case: Case, x):
    """No dtype is promoted that nobody asked for: whole programs are written under `jax_numpy_dtype_promotion="strict"`."""
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(lambda x: jm.unmerge(p := case.plan(x), jm.merge(p, x)), x[:2])


@every_planner
def test_values_that_could_break_a_plan(case: Case, x):
    """Equal tokens, zero rows, NaN and infinity: the plan keeps its shape and its law, and nothing turns into NaN unasked."""
    rows = jnp.stack([
        jnp.ones((N, D)),
        jnp.zeros((N, D)),
        x[0].at[3].set(0),
        x[0].at[5].set(jnp.nan),
        x[0].at[0, 0].set(jnp.inf).at[1, 1].set(-jnp.inf),
        x[0] * 1e30,
        x[0] * 1e-30,
        x[0],
    ])  # fmt: skip
    plan = compiled(case)(rows)
    a = np.asarray(matrix(plan), np.float64)
    sound = [0, 1, 2, 5, 6, 7] if isinstance(plan, jm.SoftPlan) else list(range(8))
    assert np.isfinite(a[sound]).all()
    if isinstance(plan, jm.Plan):
        ids = np.asarray(plan.segment_ids)
        assert (a.sum(-2) <= 1).all() and (a.sum((-1, -2)) + (ids >= plan.num_segments).sum(-1) <= N).all()
    padded_plan, mass = padded(plan), a[sound].sum(-1)
    ones = np.asarray(means_of_ones(padded_plan))[sound][:, : plan.num_segments]
    np.testing.assert_allclose(ones[mass > 1e-3], 1, rtol=2 * N * testing.EPS, err_msg="the mean of ones is one")
    np.testing.assert_array_equal(ones[mass == 0], 0, err_msg="an empty slot is 0")


@jax.jit
def means_of_ones(plan):
    return jm.merge(plan, jnp.ones((BATCH, N)))


@every_planner
@pytest.mark.parametrize("mesh", [pytest.param(AxisType.Auto, marks=pytest.mark.slow), AxisType.Explicit], indirect=True)
def test_every_device_plans_its_own(case: Case, x, mesh):
    def step(metric, x):
        plan = case.plan(metric)
        y = jm.merge(plan, x)
        return matrix(plan), y, jm.unmerge(plan, y)

    with jax.set_mesh(mesh):
        place = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
        args = place(x, "data"), place(x, "data", None, "model")
        program = jax.jit(step).lower(*args).compile()
        plan, y, back = jax.block_until_ready(program(*args))
    assert collectives(program) == []
    for out in (y, back) if y.size else ():  # where nothing is kept the compiler may put it anywhere
        assert out.sharding.is_equivalent_to(NamedSharding(mesh, P("data", None, "model")), 3)
    np.testing.assert_allclose(plan, matrix(compiled(case)(x)), rtol=0, atol=0 if plan.dtype == bool else 1e-5)


@pytest.mark.parametrize("mesh", [AxisType.Explicit], indirect=True)
@pytest.mark.parametrize(
    "f",
    [
        lambda x: jm.tokens.bipartite_matching(x, 3),
        lambda x: jm.tokens.merge_step(x, x, 3),
        lambda x: jm.tokens.energy_matching(x, 3, margin=0.5),
        lambda x: jm.tokens.density_peaks(x, 5),
        lambda x: jm.tokens.nearest(x, x),
        lambda x: jm.merge(jm.Plan(jax.reshard(jnp.zeros((BATCH, N), jnp.int32), P("data")), 3), x),
        lambda x: jm.unmerge(jm.Plan(jax.reshard(jnp.zeros((BATCH, 20), jnp.int32), P("data")), N), x),
        lambda x: jm.attention.proportional_attention(x[:, :, None], x[:, :, None], x[:, :, None], None),
        lambda x: jm.attention.packed_attention(jnp.stack([x] * 3, axis=2)[..., None, :], None),
    ],
)
def test_a_sequence_that_is_split_is_refused(f, x, mesh):
    """In words that say what to do, and what they say does it."""
    with jax.set_mesh(mesh):
        split = jax.device_put(x, NamedSharding(mesh, P("data", "model")))
        with pytest.raises(
            ValueError, match=r"split along its positions, over mesh axis 'model'.* jax.reshard\(x, jax.P\('data', "
        ):
            jax.eval_shape(f, split)
        jax.eval_shape(f, jax.reshard(split, jax.P("data", None, None)))


@pytest.mark.parametrize("case", [c for c in CASES if c.equivariant], ids=repr)
def test_permuting_tokens_permutes_groups(case: Case, x):
    order = np.random.default_rng(0).permutation(N)
    f = compiled(case)
    there, here = together(f(x[:, order])), together(f(x))[:, order][:, :, order]
    np.testing.assert_allclose(there, here, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", [c for c in CASES if c.duplicates], ids=repr)
def test_twins_merge_without_loss(case: Case, x):
    twins = jnp.repeat(x[:, : N // 2], 2, axis=1)
    a, twins = np.asarray(matrix(compiled(case)(twins)), np.float64), np.asarray(twins)
    assert (a.sum(-1) > 1).any()  # it does merge
    mean = a @ twins / np.maximum(a.sum(-1, keepdims=True), 1e-9)
    kept = a.any(-2)
    np.testing.assert_allclose((np.swapaxes(a, -1, -2) @ mean)[kept], twins[kept], rtol=1e-6, atol=1e-6)


@every_planner
def test_gradients(case: Case, x):
    """Through what is merged, and for a soft plan through the plan too: finite, and equal to differences."""

    def loss(metric, x):
        plan = case.plan(metric)
        return jnp.sum(jnp.sin(jm.merge(plan, x, weight=jnp.ones(x.shape[:-1]))))

    f = jax.jit(jax.value_and_grad(loss, (0, 1)))
    metric, h = x[0], 1e-2
    _, (dm, dx) = f(metric, x[1])
    assert jnp.isfinite(dm).all() and jnp.isfinite(dx).all()
    soft = isinstance(jax.eval_shape(case.plan, metric), jm.SoftPlan)
    assert soft or (dm == 0).all()  # integers carry no gradient
    v = jnp.asarray(np.random.default_rng(1).standard_normal((N, D)).astype(np.float32))
    slope = (f(metric, x[1] + h * v)[0] - f(metric, x[1] - h * v)[0]) / (2 * h)
    np.testing.assert_allclose(slope, jnp.vdot(dx, v), rtol=2e-2, atol=2e-2)
    if soft:
        slope = (f(metric + h * v, x[1])[0] - f(metric - h * v, x[1])[0]) / (2 * h)
        np.testing.assert_allclose(slope, jnp.vdot(dm, v), rtol=5e-2, atol=5e-2)
