"""Rung 1 for Hopper: kernels equal their references where JAX interprets them, barriers and copies included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge._kernels import _dispatch as dispatch, _mosaic_gpu as mgpu
from jaxmerge._kernels.arg_specs import BYTES, LONG, VIT
from jaxmerge._kernels.attend import _vjp_gpu as back, mosaic_gpu as attending, ref as attend_ref
from jaxmerge._kernels.match import mosaic_gpu as matching, ref as match_ref
from jaxmerge._kernels.merge import mosaic_gpu as merging, ref as merge_ref
from jaxmerge._kernels.pack import mosaic_gpu as packing, ref as pack_ref
from jaxmerge._kernels.step import mosaic_gpu as stepping, ref as step_ref
from tests.kernels import cases

pytestmark = pytest.mark.slow
both = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])


@both
@pytest.mark.parametrize("at_once", [True, False])
def test_step(monkeypatch, interpret, dtype, at_once):
    if not at_once:
        monkeypatch.setattr(stepping, "AT_ONCE", 64)
    rng, n, r = np.random.default_rng(0), 137, 9
    metric, x = cases.exact(rng, 2, n, 32, dtype), cases.tokens(rng, 2, n, 128, jnp.float32)
    residual = None if at_once else cases.tokens(rng, 2, n, 128, jnp.bfloat16)
    sizes, protected = cases.sizes(rng, 2, n), (True, True) + (False,) * (n - 2)
    step = lambda *a: stepping.step(*a, r=r, protected=protected, threads=2, splits=2, interpret=interpret)
    y, mass, ids, _ = jax.jit(step)(metric, x, sizes, residual)
    y_ref, mass_ref, ids_ref, _ = step_ref.step(metric, x, sizes, residual, r=r, protected=protected)
    assert (ids == ids_ref).all() and (mass == mass_ref).all()
    cases.close(y, y_ref, terms=r + 1, largest=2 * float(jnp.abs(x).max()))


@both
@pytest.mark.parametrize("d, norms", [(256, 2), (136, 1)])
def test_step_that_adds_and_normalises(monkeypatch, interpret, dtype, d, norms):
    """On chip where rows fill all lanes, else behind; a norm for every row of the batch, or one for all."""
    monkeypatch.setattr(mgpu, "totals", lambda ref, *rows: [jnp.sum(row) for row in rows])  # instructions are not interpreted
    rng, n, r = np.random.default_rng(0), 137, 9
    metric, x = cases.exact(rng, 2, n, 32, jnp.bfloat16), cases.tokens(rng, 2, n, d, dtype)
    offset, norm = cases.tokens(rng, 1, norms, d, jnp.float32)[0], cases.tokens(rng, 2, norms, d, jnp.float32)
    how = dict(r=r, protected=(True,) + (False,) * (n - 1), epsilon=1e-6, dtype=dtype)
    found = jax.jit(lambda *a: stepping.step(*a, **how, interpret=interpret))(metric, x, None, x, offset, *norm)
    wanted = step_ref.step(metric, x, None, x, offset, *norm, **how)
    assert (found.ids == wanted.ids).all()
    cases.close(found.x, wanted.x, terms=r + 1, largest=2 * float(jnp.abs(x).max()))
    again = step_ref.normalised(found.x, *norm, 1e-6, dtype)
    cases.close(found.normed, again, terms=d, largest=float(jnp.abs(again).max()))


def test_step_whose_tiles_are_shared_by_threads(interpret):
    rng, n, r = np.random.default_rng(0), 577, 40
    metric, x = cases.exact(rng, 1, n, 64, jnp.bfloat16), cases.tokens(rng, 1, n, 136, jnp.bfloat16)
    protected = (True,) + (False,) * (n - 1)
    y, mass, ids, _ = jax.jit(lambda *a: stepping.step(*a, r=r, protected=protected, interpret=interpret))(metric, x)
    y_ref, mass_ref, ids_ref, _ = step_ref.step(metric, x, r=r, protected=protected)
    assert (ids == ids_ref).all() and (mass == mass_ref).all()
    cases.close(y, y_ref, terms=r + 1, largest=float(jnp.abs(x).max()))


@both
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("options", [{}, {"window": 40}], ids=["all", "window"])
def test_match(interpret, dtype, options, split):
    """Keys may be split among blocks, of which some may see none that they may look at; the first of equals wins."""
    rng = np.random.default_rng(0)
    a, b = cases.exact(rng, 2, 130, 64, dtype), cases.exact(rng, 2, 200 * split, 64, dtype)
    if not options:
        ok = lambda *shape: jnp.asarray(rng.random(shape) < 0.8)
        options = {"a_ok": ok(2, 130), "b_ok": ok(1, 200 * split).at[:, : 140 * (split > 1)].set(False)}
    similarity, index = matching.match(a, b, **options, split=split, interpret=interpret)
    wanted, index_ref = match_ref.match(a, b, **options)
    assert (index == index_ref).all() and (similarity == wanted).all()


@both
@pytest.mark.parametrize("split", [1, 2])
def test_match_of_queries_that_do_not_fit_in_registers(interpret, dtype, split):
    """They are made ready with the keys, and stay in shared memory."""
    rng, k = np.random.default_rng(0), 256 if dtype == jnp.bfloat16 else 128
    a, b = cases.exact(rng, 1, 130, k, dtype), cases.exact(rng, 1, 300, k, dtype)
    found, wanted = matching.match(a, b, split=split, interpret=interpret), match_ref.match(a, b)
    assert all((one == other).all() for one, other in zip(found, wanted, strict=True))


@both
@pytest.mark.parametrize("kernel", ["shifted", "gaussian"])
def test_energy(interpret, dtype, kernel):
    x = cases.tokens(np.random.default_rng(0), 2, 200, 64, dtype)
    found = matching.energy(x, x, margin=0.45, kernel=kernel, interpret=interpret)
    cases.close(found, match_ref.energy(x, x, margin=0.45, kernel=kernel), terms=200 * (64 + 8), largest=2.0)


@both
@pytest.mark.parametrize("count, k, masked", [(5, 64, False), (9, 80, True)])
def test_nearest_k(interpret, dtype, count, k, masked):
    rng = np.random.default_rng(0)
    a, b = cases.tokens(rng, 2, 130, k, dtype), cases.tokens(rng, 2, 200, k, dtype)
    b_ok = jnp.asarray(rng.random((2, 200)) < 0.5).at[0, 4:].set(False) if masked else None  # fewer keys than neighbours
    found = matching.nearest_k(a, b, count=count, b_ok=b_ok, interpret=interpret)
    wanted = np.asarray(match_ref.nearest_k(a, b, count=count, b_ok=b_ok))
    there = np.isfinite(wanted)
    assert (np.isfinite(found) == there).all() and there.all() == (not masked)
    squares = float(jnp.max(jnp.sum(b.astype(jnp.float32) ** 2, axis=-1)))
    cases.close(np.asarray(found)[there], wanted[there], terms=k, largest=4 * squares)


def test_nearest_k_where_distances_are_whole_numbers(interpret):
    """Exact, equal ones as often as there are; rows that are not finite are far from all."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-3, 4, (1, 150, 16)), jnp.bfloat16)
    found = matching.nearest_k(x, x, count=16, interpret=interpret)
    assert (found == match_ref.nearest_k(x, x, count=16)).all()
    odd = x.at[0, 7, 3].set(jnp.inf).at[0, 9].set(jnp.nan)
    found = np.asarray(matching.nearest_k(odd, odd, count=3, interpret=interpret))[0]
    sound = np.arange(150) != 7
    sound[9] = False
    assert np.isinf(found[~sound]).all()
    assert (found[sound] == match_ref.nearest_k(x[:, sound], x[:, sound], count=3)[0]).all()


@both
@pytest.mark.parametrize("given", ["nothing", "places", "mask", "both"])
def test_nearest_ahead_where_distances_are_whole_numbers(interpret, dtype, given):
    rng, n, m = np.random.default_rng(0), 130, 200
    a, b = cases.whole(rng, 2, n, 64, dtype), cases.whole(rng, 2, m, 64, dtype)
    places = [jnp.asarray(rng.integers(0, 9, (2, rows)), jnp.int32) for rows in (n, m)] if given in ("places", "both") else ()
    ok = jnp.asarray(rng.random((2, m)) < 0.6).at[0].set(False) if given in ("mask", "both") else None
    more = (*(places or (None, None)), ok)
    found, wanted = matching.nearest_ahead(a, b, *more, interpret=interpret), match_ref.nearest_ahead(a, b, *more)
    assert all((one == other).all() and one.dtype == other.dtype for one, other in zip(found, wanted, strict=True))


@both
def test_queries_that_do_not_fit_on_chip_pass_through_the_ring(monkeypatch, interpret, dtype):
    """Narrow ones do the same where they are held to be wide, with more features than a ring has chunks of."""
    monkeypatch.setattr(matching, "_resident", lambda *_: False)
    rng, n, m, k = np.random.default_rng(0), 130, 300, 576 if dtype == jnp.bfloat16 else 192
    a, b = cases.exact(rng, 1, n, k, dtype), cases.exact(rng, 1, m, k, dtype)
    for options in ({}, {"window": 40}):
        found, wanted = matching.match(a, b, **options, interpret=interpret), match_ref.match(a, b, **options)
        assert all((one == other).all() for one, other in zip(found, wanted, strict=True))
    a, b = cases.whole(rng, 1, n, k, dtype), cases.whole(rng, 1, m, k, dtype)
    places = [jnp.asarray(rng.integers(0, 9, (1, rows)), jnp.int32) for rows in (n, m)]
    found, wanted = matching.nearest_ahead(a, b, *places, interpret=interpret), match_ref.nearest_ahead(a, b, *places)
    assert all((one == other).all() for one, other in zip(found, wanted, strict=True))


@pytest.fixture
def reductions(monkeypatch):
    """What lanes do to shared memory each for itself, which the interpreter does not have."""

    def scatter(how, ref, at, value):
        before = ref[...]
        at = before.at[jnp.where(at < 0, before.shape[0], at)]
        ref[...] = getattr(at, "add" if how == "or" else how)(value, mode="drop")  # a bit that was set would be seen here

    monkeypatch.setattr(mgpu, "scatter", scatter)
    monkeypatch.setattr(mgpu, "together", lambda: None)


@both
@pytest.mark.parametrize(
    "case, options",  # n, m, whether there are weights, whether it is a mean
    [
        ((150, 70, True, True), {}),
        ((150, 70, False, True), {"tile": 8, "joined": 2}),
        ((150, 70, True, False), {"tile": 32, "joined": 4}),
        ((90, 9, True, False), {"at_once": 2}),  # fewer ids than lanes
        ((2600, 20, False, True), {"joined": 3}),  # more than are asked for together; members far apart
    ],
    ids=str,
)
def test_merge_and_unmerge(interpret, reductions, dtype, case, options):
    (n, m, weighted, mean), rng = case, np.random.default_rng(0)
    ids, x = cases.plan(rng, 2, n, m, ordered=False), cases.tokens(rng, 2, n, 200, dtype)  # no multiple of 128
    if n > 1000:
        ids = jnp.where(rng.random(ids.shape) < 0.05, ids, -1)
    weight = cases.sizes(rng, 2, n) if weighted else None
    y, mass = merging.merge(ids, x, weight, m=m, mean=mean, **options, interpret=interpret)
    y_ref, mass_ref = merge_ref.merge(ids, x, weight, m=m, mean=mean)
    assert (mass == mass_ref).all()
    cases.close(y, y_ref, terms=n, largest=333.0 * float(jnp.abs(x).max()))
    found = merging.unmerge(ids, y_ref, None, weight, interpret=interpret)
    cases.close(found, merge_ref.unmerge(ids, y_ref, None, weight), terms=1, largest=333.0 * float(jnp.abs(y_ref).max()))


@both
def test_merge_over_batch_axes_and_its_derivatives(interpret, reductions, dtype):
    """Forward, in both modes and under vmap; in x and, for float32, in the weights."""
    rng, n, m = np.random.default_rng(0), 60, 20
    plan = jm.Plan(cases.plan(rng, 4, n, m, ordered=False).reshape(2, 2, n), m)
    x, weight = cases.tokens(rng, 4, n, 128, dtype).reshape(2, 2, n, 128), cases.sizes(rng, 4, n).reshape(2, 2, n) / 64

    def everything(which):
        def merge(ids, x, weight):
            return jm.merge(jm.Plan(ids, m), x, weight=weight, implementation=which)

        y, back = jax.vjp(jax.vmap(merge), plan.segment_ids, x, weight)
        tangent = jax.jvp(lambda x, weight: merge(plan.segment_ids, x, weight), (x, weight), (x * 2, weight))[1]
        return y, back(y)[1], tangent, back(y)[2]

    with dispatch.aim("gpu", "NVIDIA H200", interpret=interpret):
        found = everything("mosaic_gpu")
    wanted = everything("xla")
    largest = 6 * float(jnp.abs(x).max()) ** 2 * 128
    for a, b in zip(found[:3], wanted[:3], strict=True):
        cases.close(a, b, terms=n, largest=largest)
    if dtype == jnp.float32:
        cases.close(found[3], wanted[3], terms=n * 128, largest=largest)


@pytest.mark.parametrize("spec", [VIT[2], VIT[3], LONG[0], LONG[1], BYTES[0]], ids=lambda s: s.name)
def test_merge_at_real_sizes(interpret, reductions, spec):
    """A row of the batch each, ids as Token Merging makes them, or as words do: forward, and the gradient."""
    m, rng = spec.n - spec.r, np.random.default_rng(0)
    ids = cases.merging(rng, spec)
    x, weight = cases.tokens(rng, 1, spec.n, spec.d, jnp.bfloat16), cases.sizes(rng, 1, spec.n)

    def both_ways(which):
        y, back = jax.vjp(lambda x: jm.merge(jm.Plan(ids, m), x, weight=weight, implementation=which), x)
        return y, back(y)[0]

    with dispatch.aim("gpu", "NVIDIA H200", interpret=interpret):
        found = both_ways("mosaic_gpu")
    for a, b in zip(found, both_ways("xla"), strict=True):
        cases.close(a, b, terms=spec.n, largest=333.0 * float(jnp.abs(x).max()))


@both
def test_pack(interpret, dtype):
    rng, n = np.random.default_rng(0), 100
    keep = jnp.asarray(rng.random((2, n)) < np.array([[0.1], [0.6]]))  # one row with empty slots, one that overflows
    x = cases.tokens(rng, 2, n, 200, dtype)
    found = packing.pack(keep, x, capacity=40, interpret=interpret)
    assert all((a == b).all() for a, b in zip(found, pack_ref.pack(keep, x, capacity=40), strict=True))


def test_attention_over_batch_axes_and_its_gradient(interpret):
    rng, length = np.random.default_rng(0), 69
    packed = jnp.asarray(rng.standard_normal((2, 1, 72, 3, 2, 64)), jnp.bfloat16)
    bias, offset = jnp.zeros((2, 1, length)), jnp.asarray(rng.standard_normal((3, 2, 64)), jnp.float32)

    def attention(packed, bias, offset, which):
        out = jm.attention.packed_attention(packed, bias, offset=offset, length=length, implementation=which)
        return jnp.sum(jnp.sin(3 * out.astype(jnp.float32))), out

    def both(which):
        back = jax.grad(attention, argnums=(0, 1, 2), has_aux=True)
        return jax.jit(jax.vmap(lambda x, bias: back(x, bias, offset, which)))(packed, bias)

    with dispatch.aim("gpu", "NVIDIA H200", interpret=interpret):
        found = both("mosaic_gpu")
    # queries, weights, results and their cotangents are rounded in turn, up to 2^-8 of themselves each
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(both("xla")), strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        assert np.abs(one - other).max() <= 2.0**-6 * np.abs(other).max()


@pytest.mark.parametrize("case", ["packed", "two tiles at a time", "shared heads", "wide heads"])
def test_attend_vjp(monkeypatch, interpret, case):
    """A row that sees nothing, rows behind the last, tiles that come again, keys that heads share; heads that take turns."""
    rng, (n, s, h, heads, f) = np.random.default_rng(0), (150, 150, 2, 2, 64)
    if case in ("packed", "shared heads"):
        monkeypatch.setattr(back, "heads_each", lambda h, *_: h)
    if case == "two tiles at a time":
        monkeypatch.setattr(back, "SHARED", 1)
    if case in ("shared heads", "wide heads"):
        n, s, h, heads, f = (70, 200, 4, 2, 80) if case == "shared heads" else (130, 64, 1, 1, 128)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    packed = case in ("packed", "two tiles at a time")
    rows = 200 if case == "packed" else n + -n % 8
    q, k, v, g = draw(2, rows if packed else n, h, f), draw(2, rows if packed else s, heads, f), None, draw(2, n, h, f)
    v = draw(*k.shape)
    b = jnp.asarray(rng.standard_normal((2, s)), jnp.float32).at[:, 7].set(jm.attention.MASKED)
    b = b.at[1].set(jm.attention.MASKED) if packed else None if case == "wide heads" else b
    offset = draw(1, 3, h, f).astype(jnp.float32) if case == "packed" else None
    given = (jnp.stack([q, k, v], axis=2), None, None) if packed else (q, k, v)
    how = dict(scale=f**-0.5, length=n if packed else None, interpret=interpret)
    found = jax.jit(lambda *a: attending.attend_vjp(*a, **how))(*given, b, offset, g)
    if packed:
        assert found[0].shape == given[0].shape and not found[0][:, n:].any()
        found = *(found[0][:, :n, i] for i in range(3)), found[3]
        q, k, v = q[:, :n], k[:, :n], v[:, :n]
    assert all(x.dtype == jnp.bfloat16 for x in found[:3])
    if offset is not None:  # one side takes queries as they are rounded with it, the other adds what it makes of scores
        q, v = q + offset[:, 0, None], v + offset[:, 2, None]
    off = dict(unit=2.0**-8 + max(n, s) * 2.0**-24, of_scores=2.0**-24 * f if offset is None else 2.0**-8)
    cases.gradients_of_attention(found, (q, k, v), b, g, scale=f**-0.5, **off)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", ["packed", "ring", "shared heads"])
def test_attend(monkeypatch, interpret, case, bias):
    rng, (n, s, h, g, f, threads) = np.random.default_rng(0), (150, 150, 2, 2, 64, None)
    if case == "ring":
        monkeypatch.setattr(attending, "SHARED", 1)  # one tile at a time
    if case == "shared heads":
        n, s, h, g, f, threads = 70, 200, 4, 2, 80, 1
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    q, k, v = draw(2, n, h, f), draw(2, s, g, f), draw(2, s, g, f)
    b = jnp.asarray(rng.standard_normal((2, s)), jnp.float32).at[:, 7].set(jm.attention.MASKED) if bias else None
    given, length = ((q, k, v), None) if case == "shared heads" else ((jnp.stack([q, k, v], axis=2), None, None), n - 3)
    b = b if b is None or length is None else b[:, :length].at[1].set(jm.attention.MASKED)  # a row that sees nothing
    offset = draw(2, 3, h, f).astype(jnp.float32) if case == "ring" else None
    options = dict(scale=f**-0.5, length=length)
    more = dict(mean_keys=length is not None, threads=threads, interpret=interpret)
    found, *keys = jax.jit(lambda *a: attending.attend(*a, **options, **more))(*given, b, offset)
    for mean in keys:
        whole = k[:, :length].astype(jnp.float32) + (0 if offset is None else offset[:, 1, None])
        assert mean.dtype == jnp.bfloat16
        cases.close(mean, whole.mean(axis=-2).astype(jnp.bfloat16), terms=h, largest=float(jnp.abs(whole).max()))
    if offset is not None:  # queries are rounded again with it; of keys it does not matter
        q, v = (q + offset[:, 0, None]).astype(jnp.bfloat16), v + offset[:, 2, None]
        given = (jnp.stack([q.astype(jnp.float32), k.astype(jnp.float32), v], axis=2), None, None)
    (wanted,) = attend_ref.attend(*(None if x is None else x.astype(jnp.float32) for x in given), b, **options)
    # weights of bfloat16 are off by 2^-9 of themselves, their mean by 2^-9 of the largest value; the result by 2^-9 of itself
    bound = 2.0**-9 * float(jnp.abs(v).max()) + 2.0**-9 * np.abs(wanted) + 2.0**-16
    assert found.dtype == jnp.bfloat16 and (np.abs(np.asarray(found, np.float32) - wanted) <= bound).all()
