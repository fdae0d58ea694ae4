"""Virtual unmerging: DyMU's official vectors, its kernel written down again, both forms, laws, meshes, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxmerge as jm
from jaxmerge.virtual import merged_positions, rotary, virtual_attention
from tests.hlo import collectives, compile_for, tpu_mesh

B, N, M, H, D = 4, 16, 10, 4, 8


@pytest.fixture(scope="module")
def plan():
    return jm.Plan(jnp.asarray(np.random.default_rng(0).integers(-1, M + 1, (B, N)), jnp.int32), M)


@pytest.fixture(scope="module")
def qkv():
    rng = np.random.default_rng(1)
    return tuple(jnp.asarray(rng.standard_normal((B, M, heads, D)), jnp.float32) for heads in (H, 2, 2))


def reference(ids, q, k, v, positions, *, base=10_000.0, is_causal=False):
    """Unmerge, turn, attend, merge: one row and one head at a time, in float64, complex numbers for the turning."""
    m, h, d = q.shape
    g, kept = k.shape[1], (ids >= 0) & (ids < m)
    omega = base ** (-np.arange(d // 2) / (d // 2))
    turn = np.exp(1j * np.asarray(positions, np.float64)[:, None] * omega)
    out, here = np.zeros((m, h, d)), np.flatnonzero(kept)
    u = lambda x, j: np.asarray(x, np.float64)[ids[here], j]
    z = lambda x, j: (u(x, j)[:, : d // 2] + 1j * u(x, j)[:, d // 2 :]) * turn[here]
    for head in range(h):
        logits = (z(q, head) @ z(k, head * g // h).conj().T).real * d**-0.5
        if is_causal:
            logits = np.where(here[:, None] >= here[None], logits, -np.inf)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        y = (p / p.sum(-1, keepdims=True)) @ u(v, head * g // h)
        for s in np.unique(ids[here]):
            out[s, head] = y[ids[here] == s].mean(0)
    return out


@pytest.mark.parametrize("implementation", ["expanded", "compact"])
def test_equals_the_official_code(golden, implementation):
    """q, k, v of 7 merged tokens with 12 places; the recorded output is of the unmerged sequence, then merged by the mean."""
    vtu = {k.split("/")[1]: v for k, v in golden("tokens/dymu_a").items() if k.startswith("vtu0/")}
    plan = jm.Plan(jnp.asarray(vtu["mapping"])[None], 7)
    qkv = tuple(np.moveaxis(vtu[name], 1, 2) for name in "qkv")
    every = jm.identity(12, (1,))

    @jax.jit
    def calls(qkv):
        attend = lambda plan, qkv: virtual_attention(plan, *qkv, is_causal=True, implementation=implementation)
        return attend(plan, qkv), attend(every, jm.unmerge(plan, qkv))

    merged, each = calls(qkv)
    np.testing.assert_allclose(np.moveaxis(merged, 2, 1), vtu["remerged"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(np.moveaxis(each, 2, 1), vtu["attn_out"], rtol=0, atol=2e-5)


def test_the_official_kernels_scores_are_ours(golden):
    """Products of merged tokens, gathered and weighed by cosines and sines of the distance: as many as in a matrix product."""
    vtu = {k.split("/")[1]: v for k, v in golden("tokens/dymu_a").items() if k.startswith("vtu0/")}
    q, k, ids = vtu["q"][0].astype(np.float64), vtu["k"][0].astype(np.float64), vtu["mapping"]
    (q1, q2), (k1, k2) = np.split(q, 2, -1), np.split(k, 2, -1)
    product = lambda a, b: a[:, :, None] * b[:, None]
    dot, cross = product(q1, k1) + product(q2, k2), product(q1, k2) - product(q2, k1)
    t = np.arange(12)
    angle = (t[:, None] - t[None])[..., None] * 10_000.0 ** (-np.arange(4) / 4)
    gathered = ((dot[:, ids][:, :, ids] * np.cos(angle)) + (cross[:, ids][:, :, ids] * np.sin(angle))).sum(-1)
    np.testing.assert_allclose(gathered * 8**-0.5, vtu["scores"][0], rtol=0, atol=2e-5)
    turn = lambda x: rotary(jnp.moveaxis(jnp.asarray(x)[0], 1, 0)[ids], jnp.arange(12))
    ours = jnp.einsum("thd,shd->hts", turn(vtu["q"]), turn(vtu["k"])) * 8**-0.5
    np.testing.assert_allclose(ours, vtu["scores"][0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("implementation", ["expanded", "compact"])
def test_equals_the_rule_with_drops_empty_slots_and_shared_heads(plan, qkv, implementation, is_causal):
    positions = jnp.asarray(np.cumsum(np.random.default_rng(2).integers(1, 4, (B, N)), axis=-1), jnp.int32)
    f = jax.jit(lambda p, q, k, v, t: virtual_attention(p, q, k, v, t, is_causal=is_causal, implementation=implementation))
    got = f(plan, *qkv, positions)
    ids = np.asarray(plan.segment_ids)
    want = [reference(ids[b], *(np.asarray(x[b]) for x in qkv), positions[b], is_causal=is_causal) for b in range(B)]
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("implementation", ["expanded", "compact"])
def test_batches_of_any_rank_and_no_batch(plan, qkv, implementation):
    f = jax.jit(lambda p, q, k, v: virtual_attention(p, q, k, v, implementation=implementation))
    want = f(plan, *qkv)
    fold = lambda x: x.reshape(2, 2, *x.shape[1:])
    two = f(jm.Plan(fold(plan.segment_ids), M), *map(fold, qkv))
    np.testing.assert_allclose(two, fold(want), rtol=0, atol=1e-6)
    one = f(jm.Plan(plan.segment_ids[0], M), *(x[0] for x in qkv))
    np.testing.assert_allclose(one, want[0], rtol=0, atol=1e-6)
    assert f(plan, *(x.astype(jnp.bfloat16) for x in qkv)).dtype == jnp.bfloat16


def test_gradients_agree(plan, qkv):
    """Of the two forms with each other, and along one direction with a difference quotient."""
    loss = lambda qkv, how: (virtual_attention(plan, *qkv, implementation=how) ** 2).sum()
    grads = [jax.jit(jax.grad(loss), static_argnums=1)(qkv, how) for how in ("expanded", "compact")]
    for a, b in zip(*grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    step = jax.jit(lambda h: loss(jax.tree.map(lambda x: x + h * jnp.cos(7 * x), qkv), "compact"))
    slope = sum(jnp.vdot(g, jnp.cos(7 * x)) for g, x in zip(grads[1], qkv, strict=True))
    # float32 rounds a loss near 100 to 1e-5, that is 1e-3 of the quotient at this h, besides a third derivative of order 1
    np.testing.assert_allclose(slope, (step(1e-2) - step(-1e-2)) / 2e-2, rtol=5e-3)


def test_the_compact_form_multiplies_less():
    ids = jnp.arange(256) // 4
    shape = jax.ShapeDtypeStruct((64, 4, 32), jnp.float32)
    flops = {}
    for how in ("expanded", "compact"):
        f = jax.jit(lambda q, k, v, how=how: virtual_attention(jm.Plan(ids, 64), q, k, v, implementation=how))
        flops[how] = f.lower(shape, shape, shape).compile().cost_analysis()["flops"]
    assert flops["expanded"] - flops["compact"] > 1.5 * 256**2 * 32 * 4  # of 2 n² d h saved, some go to merging the weights


def test_every_device_attends_its_own(mesh, plan, qkv):
    with jax.set_mesh(mesh):
        place = lambda x: jax.device_put(x, NamedSharding(mesh, P("data")))
        args = jax.tree.map(place, (plan, qkv))
        for how in ("expanded", "compact"):
            f = jax.jit(lambda p, qkv, how=how: virtual_attention(p, *qkv, implementation=how))
            compiled = f.lower(*args).compile()
            out = compiled(*args)
            assert collectives(compiled) == [], how
            assert out.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), 4), how


@pytest.mark.tpu
def test_compiles_for_tpu_without_a_collective():
    """Pool, group and attend as if unmerged, on every chip its own."""
    mesh = tpu_mesh("v5e:4x4", (16,), ("data",))
    shape = lambda dtype, *s: jax.ShapeDtypeStruct((16, *s), dtype, sharding=NamedSharding(mesh, P("data")))

    def step(groups, x, q):
        plan = jm.tokens.from_groups(groups, 64)
        pooled = jm.merge(jm.tokens.grid_pool((16, 16), (8, 8), like=x), x)
        return pooled, [virtual_attention(plan, q, q, q, implementation=how) for how in ("expanded", "compact")]

    compiled = compile_for(step, shape(jnp.int32, 256), shape(jnp.bfloat16, 256, 128), shape(jnp.bfloat16, 64, 4, 64))
    assert collectives(compiled) == []


# --- rotary and positions


@pytest.mark.parametrize("interleaved", [False, True])
def test_only_the_distance_matters(interleaved):
    q, k = np.random.default_rng(3).standard_normal((2, N, H, D)).astype(np.float32)
    turn = jax.jit(lambda x, t: rotary(x, t, interleaved=interleaved))
    score = lambda s, t: np.einsum("nhd,nhd->nh", turn(q, s), turn(k, t))
    s, t = np.arange(N), np.arange(N)[::-1] * 2
    np.testing.assert_allclose(score(s, t), score(s + 5, t + 5), rtol=0, atol=1e-5)
    np.testing.assert_allclose(score(s, s), np.einsum("nhd,nhd->nh", q, k), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(turn(q, 0 * s), q)
    assert np.abs(score(s, t) - score(s, t + 1)).max() > 0.1


def test_the_two_layouts_are_one_permutation_apart():
    x, t = jax.random.normal(jax.random.key(4), (N, H, D)), jnp.linspace(0.0, 9.5, N)
    halves = np.arange(D).reshape(2, D // 2).T.ravel()  # features 0 and D/2 beside each other
    np.testing.assert_allclose(rotary(x, t)[..., halves], rotary(x[..., halves], t, interleaved=True), rtol=0, atol=1e-6)


def test_positions_of_merged_tokens(plan):
    ids, t = np.asarray(plan.segment_ids), np.cumsum(np.arange(1, N + 1))
    given = jnp.broadcast_to(jnp.asarray(t), (B, N))
    weight = jnp.broadcast_to(jnp.linspace(1, 2, N), (B, N))
    both = lambda p, t, w: (merged_positions(p, t), merged_positions(p, t, reduce="mean", weight=w))
    first, mean = map(np.asarray, jax.jit(both)(plan, given, weight))
    assert first.dtype == given.dtype
    for b, s in np.ndindex(B, M):
        members = np.flatnonzero(ids[b] == s)
        assert first[b, s] == (t[members[0]] if len(members) else 0)
        want = np.average(t[members], weights=np.linspace(1, 2, N)[members]) if len(members) else 0
        np.testing.assert_allclose(mean[b, s], want, rtol=1e-6)
    soft = jm.SoftPlan(jnp.array([[0.5, 0.5, 0.0], [0.0, 1.0, 3.0]]))
    assert merged_positions(soft, reduce="mean").tolist() == [0.5, 1.75]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda p, q, k, v: virtual_attention(p, q[:, :3], k, v), r"takes \(4, 16\) to \(4, 10\).*got \(4, 3, 4, 8\)"),
        (lambda p, q, k, v: virtual_attention(p, q[:, :, :3], k, v), "g dividing h"),
        (lambda p, q, k, v: virtual_attention(p, q, k, v, jnp.arange(N)), r"positions \(4, 16\)"),
        (lambda p, q, k, v: virtual_attention(p, q, k, v, implementation="xla"), '"expanded" or "compact", got \'xla\''),
        (lambda p, q, k, v: rotary(q[..., :7], jnp.zeros((4, 10))), r"even d.*\(4, 10, 4, 7\)"),
        (lambda p, q, k, v: rotary(q, jnp.arange(10)), r"positions \(\*batch, n\).*\(10,\)"),
        (lambda p, q, k, v: merged_positions(p, reduce="last"), 'reduce must be "mean"'),
        (lambda p, q, k, v: merged_positions(jm.SoftPlan(jnp.ones((2, 3)))), "needs a Plan"),
    ],
)
def test_bad_input(call, message, plan, qkv, unchecked):
    with pytest.raises(ValueError, match=message):
        call(plan, *qkv)
