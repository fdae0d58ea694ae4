"""Bipartite matching: the official vectors, the rule itself, the laws, meshes, bad input."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jaxmerge as jm
from jaxmerge import testing
from jaxmerge.tokens import bipartite_matching, schedule
from tests.conftest import GOLDEN
from tests.hlo import collectives, compile_for, tpu_mesh

B, N, D = 4, 17, 8
DETAILS = json.loads((GOLDEN / "tokens/tome_a.json").read_text())
PARAMS = {case["name"]: case["params"] for case in DETAILS["cases"]}


@pytest.fixture(scope="module")
def tome(golden):
    return golden("tokens/tome_a")


@pytest.fixture(scope="module")
def metric():
    return jax.random.normal(jax.random.key(0), (B, N, D))


# --- the official implementation. Its tokens come out as [even that stayed, odd], with a distillation token as [class,
# distillation, even, odd]; `official` lists the input position of each output, and so undoes that order.


def official(even, n, distilled=False):
    """even: (batch, k) indices, in the even side, of those that stayed, as the official code lists them."""
    odd = np.broadcast_to(np.arange(1, n, 2), (len(even), n // 2))
    even = 2 * even
    parts = [even[:, :1], odd[:, :1], even[:, 1:], odd[:, 1:]] if distilled else [even, odd]
    return np.concatenate(parts, axis=1)


def take(x, positions):
    return np.take_along_axis(np.asarray(x), positions.reshape(*positions.shape, *[1] * (x.ndim - 2)), axis=1)


@pytest.mark.parametrize("name", ["bip0", "bip1", "bip2", "bip3"])
def test_equals_the_official_code(tome, name):
    a = {k.split("/")[1]: v for k, v in tome.items() if k.startswith(f"{name}/")}
    p = PARAMS[name]
    protect = (0, 1) if p["distill_token"] else (0,) if p["class_token"] else ()
    (r,) = schedule(1, p["r"], n=p["N"], protected=len(protect))
    assert r == p["r_effective"]

    @jax.jit
    def ours(a, positions):
        plan = bipartite_matching(a["metric"], r, protect=protect)
        slots = jnp.take_along_axis(plan.segment_ids, positions, axis=1)  # of the official tokens
        order = lambda y: jnp.take_along_axis(y, slots.reshape(*slots.shape, *[1] * (y.ndim - 2)), axis=1)
        weigh = lambda x, size: (
            order(jm.merge(plan, x, weight=size)),
            order(jm.merge(plan, size, reduce="sum"))[..., None],
        )
        (wavg_x, wavg_size), vjp = jax.vjp(weigh, a["x"], a["size"][..., 0])
        grad_x, grad_size = vjp((a["cot_x"], a["cot_size"]))
        mean = jm.merge(plan, a["x"])
        return plan, dict(
            source=order(plan.matrix),
            wavg_nosize_size=order(plan.sizes)[..., None],
            wavg_nosize_x=order(mean),
            out_mean=order(mean),
            out_sum=order(jm.merge(plan, a["x"], reduce="sum")),
            out_amax=order(jm.merge(plan, a["x"], reduce="max")),
            wavg_x=wavg_x,
            wavg_size=wavg_size,
            grad_x=grad_x,
            grad_size=grad_size[..., None],
            unmerged=jm.unmerge(plan, mean),
        )

    plan, got = ours(a, official(a["unm_idx"], p["N"], p["distill_token"]))
    assert plan.num_segments == p["N_out"]
    to = lambda positions: np.take_along_axis(np.asarray(plan.segment_ids), positions, axis=1)
    np.testing.assert_array_equal(to(2 * a["src_idx"]), to(2 * a["dst_idx"] + 1))
    # max is not recorded with a distillation token, nor is unmerge, which is wrong there
    assert got.keys() - a.keys() <= {"out_amax", "unmerged"}
    for key in got.keys() & a.keys():
        atol = 0 if key in ("source", "wavg_nosize_size") else 2e-3 if key.startswith("grad") else 2e-5
        np.testing.assert_allclose(got[key], a[key], rtol=0, atol=atol, err_msg=key)


def test_equals_the_official_code_in_a_second_round(tome):
    metric, x, size = (tome[f"bip0{k}"] for k in ("_round2/metric", "/wavg_nosize_x", "/wavg_nosize_size"))

    @jax.jit
    def ours(positions):
        first = bipartite_matching(tome["bip0/metric"], 13, protect=(0,))
        slots = jnp.take_along_axis(first.segment_ids, positions, axis=1)
        permute = jm.Plan(jnp.argsort(slots, axis=1), 52)  # into the official order, which the second round reads
        second = bipartite_matching(metric, 7, protect=(0,))
        return second, jm.compose(second, jm.compose(permute, first)), jm.merge(second, x, weight=size[..., 0])

    second, whole, merged = ours(official(tome["bip0/unm_idx"], 65))
    stays = np.asarray(second.sizes)[np.arange(2)[:, None], second.segment_ids][:, ::2] == 1  # or was joined: not even
    slots = take(second.segment_ids, official(np.stack([np.flatnonzero(row) for row in stays]), 52))
    np.testing.assert_array_equal(take(whole.matrix, slots), tome["bip0_round2/source"])
    np.testing.assert_array_equal(take(whole.sizes, slots), tome["bip0_round2/wavg_size"][..., 0])
    np.testing.assert_allclose(take(merged, slots), tome["bip0_round2/wavg_x"], rtol=0, atol=2e-5)


def test_r_of_zero_is_the_identity(tome):
    plan = bipartite_matching(tome["bip4/metric"], 0, protect=(0,))
    np.testing.assert_array_equal(jm.merge(plan, tome["bip4/x"]), tome["bip4/out_mean"])


@pytest.mark.parametrize("case", DETAILS["parse_r"], ids=lambda c: f"{c['num_layers']}-{c['r']}")
def test_schedules_are_the_official_ones(case):
    r = tuple(case["r"]) if case["kind"] == "tuple" else case["r"]
    assert schedule(case["num_layers"], r) == case["out"]


def test_schedules_are_clamped_to_what_is_left():
    layers = schedule(6, 50, n=197, protected=1)
    assert layers == [50, 50, 48, 24, 12, 6]
    n = 197
    for r in layers:
        plan = jax.eval_shape(lambda x, r=r: bipartite_matching(x, r, protect=(0,)), jax.ShapeDtypeStruct((n, 4), "float32"))
        n = plan.num_segments
    assert schedule(1, (7, -0.5)) == [7] and schedule(3, (6, 0.0)) == [6, 6, 6]


# --- the rule, written down again


def rule(metric, r, protect):
    """Token Merging's rule: who each position ends up with."""
    n = len(metric)
    unit = metric / np.linalg.norm(metric, axis=-1, keepdims=True)
    score = unit[::2] @ unit[1::2].T
    for p in protect:
        if p % 2:
            score[:, p // 2] = -np.inf
        else:
            score[p // 2] = -np.inf
    goes = np.arange(n)
    for i in np.argsort(-score.max(-1), kind="stable")[:r]:
        goes[2 * i] = 2 * score[i].argmax() + 1
    stays = np.unique(goes)
    return np.searchsorted(stays, goes)


@pytest.mark.parametrize("n", [16, 17])
@pytest.mark.parametrize("protect", [(), (0,), (0, 1), (3, 4, -1)])
def test_equals_the_rule(n, protect):
    x = np.random.default_rng(n).standard_normal((B, n, D)).astype(np.float32)
    for r in (1, 4):
        plan = bipartite_matching(x, r, protect=protect)
        positions = [p % n for p in protect]
        np.testing.assert_array_equal(plan.segment_ids, [rule(row, r, positions) for row in x])


# --- laws


@pytest.mark.parametrize("r", [0, 3, 8])
def test_laws(metric, r):
    testing.assert_planner(lambda x: bipartite_matching(x, r), metric)


def test_protected_tokens_stay_alone_and_in_order(metric):
    plan = bipartite_matching(metric, 6, protect=(0, 1, 16))
    np.testing.assert_array_equal(take(plan.sizes, take(plan.segment_ids, np.full((B, 3), [0, 1, 16]))), 1)
    np.testing.assert_array_equal(np.asarray(plan.segment_ids)[:, [0, 1, 16]], np.full((B, 3), [0, 1, 10]))
    stayed = np.asarray(plan.segment_ids)[:, 1::2]  # odd positions never move
    assert (np.diff(stayed, axis=1) > 0).all()


def test_duplicates_merge_first_and_merging_again_changes_nothing():
    x = jnp.repeat(jax.random.normal(jax.random.key(1), (B, 8, D)), 2, axis=1)
    plan = bipartite_matching(x, 8)
    np.testing.assert_array_equal(plan.segment_ids, np.tile(np.repeat(np.arange(8), 2), (B, 1)))
    np.testing.assert_array_equal(jm.unmerge(plan, jm.merge(plan, x)), x)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e30, 1e-30, jnp.inf, jnp.nan])
def test_ties_take_the_first_and_no_value_breaks_a_plan(value):
    plan = bipartite_matching(jnp.full((6, D), value), 2)
    assert plan.segment_ids.tolist() == [0, 0, 0, 1, 2, 3]


def test_rows_without_a_direction_are_like_nothing():
    x = jnp.eye(4)[jnp.array([0, 0, 1, 1])] * jnp.array([[0.0], [1.0], [1.0], [1.0]])
    assert bipartite_matching(x, 1).segment_ids.tolist() == [0, 1, 2, 2]  # the zero row is not the one that merges


@pytest.mark.parametrize("scale", [2.0**100, 2.0**-100])
def test_length_does_not_matter(metric, scale):
    np.testing.assert_array_equal(bipartite_matching(metric * scale, 5).segment_ids, bipartite_matching(metric, 5).segment_ids)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sixteen_bits_are_compared_in_float32(metric, dtype):
    half = (metric * 100).astype(dtype)  # squares of these overflow float16
    np.testing.assert_array_equal(
        bipartite_matching(half, 5).segment_ids, bipartite_matching(half.astype(jnp.float32), 5).segment_ids
    )


def test_gradients_pass_the_plan_by(metric):
    def loss(x, m):
        return (jm.merge(bipartite_matching(m, 5), x, weight=jnp.ones((B, N))) ** 2).sum()

    dx, dm = jax.grad(loss, argnums=(0, 1))(metric, metric)
    assert jnp.isfinite(dx).all() and (dx != 0).any() and (dm == 0).all()


# --- meshes and machines


@pytest.mark.parametrize("features", [None, "model"])
@pytest.mark.parametrize("r", [0, 5])
def test_every_device_merges_its_own(mesh, features, r):
    metric, x = (jax.random.normal(jax.random.key(i), (8, N, D)) for i in (0, 1))

    def step(metric, x):
        plan = bipartite_matching(metric, r, protect=(0,))
        y = jm.merge(plan, x, weight=jnp.ones_like(metric[..., 0]))
        return plan, y, jm.unmerge(plan, y)

    with jax.set_mesh(mesh):
        place = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
        args = place(metric, "data"), place(x, "data", None, features)
        compiled = jax.jit(step).lower(*args).compile()
        plan, y, back = compiled(*args)
    assert collectives(compiled) == []
    for out in (y, back):
        assert out.sharding.is_equivalent_to(NamedSharding(mesh, P("data", None, features)), 3)
    if r or AxisType.Explicit in mesh.axis_types:  # with Auto axes the compiler may keep a constant where it likes
        assert plan.segment_ids.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), 2)
    np.testing.assert_array_equal(plan.segment_ids, step(metric, x)[0].segment_ids)


@pytest.mark.tpu
@pytest.mark.parametrize("topology, chips", [("v5e:4x4", 16), ("v5p:4x4x4", 64)])
def test_compiles_for_tpu_without_a_collective(topology, chips):
    mesh = tpu_mesh(topology, (chips,), ("data",))
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=NamedSharding(mesh, P("data")))

    def step(keys, x):
        plan = bipartite_matching(keys, 16, protect=(0,))
        y = jm.merge(plan, x)
        return y, jm.unmerge(plan, y), plan

    compiled = compile_for(step, shape(8 * chips, 197, 64), shape(8 * chips, 197, 768))
    assert collectives(compiled) == []
    assert " sort(" not in compiled.as_text()


# --- bad input


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda x: bipartite_matching(x, 9),
            ValueError,
            "between 0 and 8, got r=9: of n=17 tokens, 0 of them",
        ),
        (
            lambda x: bipartite_matching(x, 8, protect=(0, 1)),
            ValueError,
            r"7.*r=8.*2 of them.*schedule\(depth, r, n=1",
        ),
        (lambda x: bipartite_matching(x, -1), ValueError, "got r=-1"),
        (lambda x: jax.jit(bipartite_matching)(x, 3), TypeError, "Python int"),
        (lambda x: bipartite_matching(x, 2.0), TypeError, "Python int, because shapes are static; got 2.0"),
        (lambda x: bipartite_matching(x[0, 0], 1), ValueError, r"\(\*batch, n, d\), got \(8,\)"),
        (lambda x: bipartite_matching(x, 1, protect=(17,)), ValueError, "position 17 is not among n=17"),
        (lambda x: bipartite_matching(x, 1, protect=np.arange(17) < 1), TypeError, "not a mask.*flatnonzero"),
        (lambda x: bipartite_matching(x, 1, protect=jnp.arange(3)), TypeError, "static positions"),
        (lambda x: schedule(0, 3), ValueError, "depth must be 1 or more, got 0"),
        (lambda x: schedule(4, (3, 2.0)), ValueError, r"inflect in \[-1, 1\], got \(3, 2.0\).*list"),
        (lambda x: schedule(4, (3, 2, 1)), ValueError, "use a list"),
        (lambda x: schedule(2, [1, -1]), ValueError, r"0 or more in every layer, got \[1, -1\]"),
    ],
)
def test_bad_input(call, error, message, metric, unchecked):
    with pytest.raises(error, match=message):
        call(metric)
