"""The laws that every planner obeys, whatever family it is of: one table, one set of checks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxmerge as jm
from jaxmerge import testing
from tests.hlo import collectives
from tests.tokens.cases import Case, D, N, every_case

BATCH = 8
CASES = every_case()
every_planner = pytest.mark.parametrize("case", CASES, ids=repr)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (BATCH, N, D))


def matrix(plan: jm.Plan | jm.SoftPlan) -> jax.Array:
    return plan.matrix.astype(jnp.float32)


def together(plan: jm.Plan | jm.SoftPlan) -> np.ndarray:
    """(batch, n, n): how much positions i and j share: what a plan says, however its segments are numbered."""
    a = matrix(plan)
    return np.asarray(jnp.einsum("...mi,...mj->...ij", a, a))


@every_planner
def test_laws(case: Case, x):
    testing.assert_planner(case.plan, x[:2], ordered=case.ordered, low_precision=case.low_precision)


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
    plan = jax.jit(case.plan)(rows)
    a = np.asarray(matrix(plan))
    sound = [0, 1, 2, 5, 6, 7] if isinstance(plan, jm.SoftPlan) else list(range(8))
    assert np.isfinite(a[sound]).all()
    if isinstance(plan, jm.Plan):
        assert (a.sum(-2) <= 1).all()
        assert (np.asarray(plan.sizes).sum(-1) + np.asarray(plan.overflow) <= N).all()
    merged = np.asarray(jm.merge(plan, jnp.ones((8, N, 2))))[:7]
    mass = np.asarray(plan.sizes)[:7]
    np.testing.assert_allclose(merged[mass > 1e-3], 1, rtol=1e-5, err_msg="the mean of ones is one")


@every_planner
def test_every_device_plans_its_own(case: Case, x, mesh):
    def step(metric, x):
        plan = case.plan(metric)
        y = jm.merge(plan, x)
        return matrix(plan), y, jm.unmerge(plan, y)

    with jax.set_mesh(mesh):
        place = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
        compiled = jax.jit(step).lower(place(x, "data"), place(x, "data", None, "model")).compile()
        plan, y, back = compiled(place(x, "data"), place(x, "data", None, "model"))
        jax.block_until_ready(back)
    assert collectives(compiled) == []
    for out in (y, back):
        assert out.sharding.is_equivalent_to(NamedSharding(mesh, P("data", None, "model")), 3)
    np.testing.assert_allclose(plan, jax.jit(step)(x, x)[0], rtol=0, atol=0 if plan.dtype == bool else 1e-5)


@pytest.mark.parametrize("case", [c for c in CASES if c.equivariant], ids=repr)
def test_permuting_tokens_permutes_groups(case: Case, x):
    order = np.random.default_rng(0).permutation(N)
    f = jax.jit(case.plan)
    there, here = together(f(x[:, order])), together(f(x))[:, order][:, :, order]
    np.testing.assert_allclose(there, here, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", [c for c in CASES if c.duplicates], ids=repr)
def test_twins_merge_without_loss(case: Case, x):
    twins = jnp.repeat(x[:, : N // 2], 2, axis=1)
    plan = case.plan(twins)
    back = jm.unmerge(plan, jm.merge(plan, twins))
    kept = np.asarray(plan.kept)
    np.testing.assert_allclose(np.asarray(back)[kept], np.asarray(twins)[kept], rtol=1e-6, atol=1e-6)


@every_planner
def test_gradients(case: Case, x):
    """Through what is merged, and for a soft plan through the plan too: finite, and equal to differences."""

    def loss(metric, x):
        plan = case.plan(metric)
        return jnp.sum(jnp.sin(jm.merge(plan, x, weight=jnp.ones(x.shape[:-1]))))

    one = (x[0], x[1])
    f = jax.jit(loss)
    dm, dx = jax.jit(jax.grad(loss, (0, 1)))(*one)
    assert jnp.isfinite(dm).all() and jnp.isfinite(dx).all()
    rng = np.random.default_rng(1)
    v = jnp.asarray(rng.standard_normal((N, D)).astype(np.float32))
    h = 1e-2
    slope = (f(one[0], one[1] + h * v) - f(one[0], one[1] - h * v)) / (2 * h)
    np.testing.assert_allclose(slope, jnp.vdot(dx, v), rtol=2e-2, atol=2e-2)
    if isinstance(jax.eval_shape(case.plan, x[0]), jm.SoftPlan):
        slope = (f(one[0] + h * v, one[1]) - f(one[0] - h * v, one[1])) / (2 * h)
        np.testing.assert_allclose(slope, jnp.vdot(dm, v), rtol=5e-2, atol=5e-2)
