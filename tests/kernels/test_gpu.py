"""Every kernel against its reference at real sizes, on a Hopper GPU: `JAX_PLATFORMS=cuda pytest -m gpu`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge._kernels.arg_specs import BYTES, LONG, VIT, Tokens
from jaxmerge._kernels.match import mosaic_gpu as matching, ref as match_ref
from jaxmerge._kernels.merge import mosaic_gpu as merging, ref as merge_ref
from jaxmerge._kernels.step import ref as step_ref
from tests.kernels import cases

pytestmark = pytest.mark.gpu
LONG_ROW = Tokens("ViT-H/14@518", 1370, 80, 1280, 40, 1)
both = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])


def same(f, *arrays):
    """f by kernel and by XLA: the same integers, and numbers that differ by rounding."""
    one, other = (jax.jit(lambda *a, which=which: f(which, *a)) for which in ("mosaic_gpu", "xla"))
    found, wanted = jax.tree.leaves(one(*arrays)), jax.tree.leaves(other(*arrays))
    for a, b in zip(found, wanted, strict=True):
        near(a, b)
    return found


def near(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype
    if jnp.issubdtype(a.dtype, jnp.integer):
        assert (a == b).all()
    else:  # a mean of float32 sums, rounded once: half a unit of its last place each
        ulp = 2.0**-7 if a.dtype == jnp.bfloat16 else 2.0**-20
        a, b = (np.asarray(y, np.float32) for y in (a, b))
        a, b = a[a != b], b[a != b]  # infinities are equal or apart, and have no difference
        assert (np.isfinite(a) & np.isfinite(b)).all() and (np.abs(a - b) <= ulp * np.maximum(1, np.abs(b))).all()


@both
@pytest.mark.parametrize("spec", [VIT[0], VIT[3], VIT[6], LONG_ROW], ids=lambda s: s.name)
def test_step(spec, dtype):
    rng = np.random.default_rng(0)
    metric = cases.exact(rng, 3, spec.n, spec.k, dtype)  # cosines are exact, and often equal
    x, sizes = cases.tokens(rng, 3, spec.n, spec.d, dtype), cases.sizes(rng, 3, spec.n)
    residual = cases.tokens(rng, 3, spec.n, spec.d, jnp.bfloat16)

    def step(which, metric, sizes, x, residual):
        options = dict(sizes=sizes, protect=range(spec.prefix), implementation=which)

        def loss(x, residual):
            merged = jm.tokens.merge_step(metric, x, spec.r, residual=residual, **options)
            return (merged.x.astype(jnp.float32) ** 2).sum(), merged

        (_, merged), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, residual)
        return merged, gradients, jm.tokens.merge_step(metric, x, spec.r, **options)

    same(step, metric, sizes, x, residual)


@both
@pytest.mark.parametrize("spec", [VIT[2], VIT[3], VIT[6], LONG_ROW], ids=lambda s: s.name)
def test_step_that_adds_and_normalises(spec, dtype):
    rng = np.random.default_rng(0)
    metric = cases.exact(rng, 3, spec.n, spec.k, jnp.bfloat16)
    x, sizes = cases.tokens(rng, 3, spec.n, spec.d, dtype), cases.sizes(rng, 3, spec.n)
    residual = cases.tokens(rng, 3, spec.n, spec.d, jnp.bfloat16)
    offset, scale, shift = cases.tokens(rng, 1, 3, spec.d, jnp.float32)[0]

    def step(which, metric, sizes, x, residual, offset):  # noqa: PLR0917
        norm = jm.tokens.LayerNorm(scale, shift, dtype=jnp.bfloat16)
        options = dict(sizes=sizes, residual=residual, offset=offset, norm=norm, implementation=which)
        return jm.tokens.merge_step(metric, x, spec.r, protect=range(spec.prefix), **options)

    plain = lambda *a: step(*a)._replace(normed=None)
    same(plain, metric, sizes, x, residual, offset)
    found = jax.jit(lambda *a: step("mosaic_gpu", *a))(metric, sizes, x, residual, offset)
    again = step_ref.normalised(found.x, scale, shift, 1e-6, jnp.bfloat16)  # of the rows as this kernel rounded them
    cases.close(found.normed, again, terms=spec.d, largest=float(jnp.abs(again.astype(jnp.float32)).max()))


@both
@pytest.mark.parametrize("spec, fewer", [(VIT[0], 1), (LONG[1], 1), (LONG[1], 0)], ids=str)
def test_match(spec, dtype, fewer):
    """Queries are held in registers, but for wide ones of float32, and those beside a last tile of keys that is not full."""
    rng = np.random.default_rng(0)
    a, b = cases.exact(rng, 2, spec.n, spec.k, dtype), cases.exact(rng, 2, spec.n - fewer, spec.k, dtype)
    same(lambda which, a, b: jm.tokens.nearest(a, b, implementation=which), a, b)
    found, wanted = (jax.jit(f)(a, b) for f in (partial(matching.match, split=3), match_ref.match))
    assert all((one == other).all() for one, other in zip(found, wanted, strict=True))


@both
@pytest.mark.parametrize("kernel", ["shifted", "gaussian"])
def test_energy(dtype, kernel):
    x = cases.tokens(np.random.default_rng(0), 2, LONG_ROW.n, LONG_ROW.k, dtype)
    found, wanted = (
        jax.jit(lambda x, which=which: jm.tokens.energy(x, 0.45, kernel=kernel, implementation=which))(x)
        for which in ("mosaic_gpu", "xla")
    )
    cases.close(found, wanted, terms=LONG_ROW.n * (LONG_ROW.k + 8), largest=2.0 / LONG_ROW.n)


@both
@pytest.mark.parametrize("spec, count", [(LONG_ROW, 5), (LONG[0], 16)], ids=str)
def test_nearest_k(spec, count, dtype):
    rng = np.random.default_rng(0)
    x, ok = cases.tokens(rng, 2, spec.n, spec.k, dtype), jnp.asarray(rng.random((2, spec.n)) < 0.7)
    found, wanted = (
        jax.jit(lambda x, module=module: module.nearest_k(x, x, count=count, b_ok=ok))(x) for module in (matching, match_ref)
    )
    squares = float(jnp.max(jnp.sum(x.astype(jnp.float32) ** 2, axis=-1)))
    cases.close(found, wanted, terms=spec.k, largest=4 * squares)


def test_nearest_k_of_whole_numbers():
    x = jnp.asarray(np.random.default_rng(0).integers(-3, 4, (2, 1000, 64)), jnp.bfloat16)
    found, wanted = (jax.jit(lambda x, m=m: m.nearest_k(x, x, count=8))(x) for m in (matching, match_ref))
    assert (found == wanted).all()


@both
@pytest.mark.parametrize("n, k", [(577, 64), (1370, 1152)])
def test_nearest_ahead_of_whole_numbers(n, k, dtype):
    """Rows that stay on chip, and rows that pass through the ring."""
    rng = np.random.default_rng(0)
    x, place = cases.whole(rng, 2, n, k, dtype), jnp.asarray(rng.permuted(np.tile(np.arange(n), (2, 1)), axis=1), jnp.int32)
    ok = jnp.asarray(rng.random((2, n)) < 0.7)
    same(lambda which, x: (matching if which == "mosaic_gpu" else match_ref).nearest_ahead(x, x, place, place, ok), x)


@both
def test_density_peaks(dtype):
    """Around 64 places far apart, so that rounding decides nothing."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(10 * rng.standard_normal((64, 1152))[np.arange(729) % 64] + rng.standard_normal((2, 729, 1152)), dtype)
    same(lambda which, x: jm.tokens.density_peaks(x, 64, implementation=which), x)


@both
@pytest.mark.parametrize("ordered, d", [(False, 1536), (True, BYTES[0].d), (False, LONG[1].d)])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_merge_and_unmerge(dtype, ordered, d, reduce):
    rng = np.random.default_rng(0)
    n, m = 1024, 300
    ids, weight = cases.plan(rng, 2, n, m, ordered=ordered), cases.sizes(rng, 2, n) / 512
    x = cases.tokens(rng, 2, n, d, dtype)

    def both_ways(which, ids, weight, x):
        plan = jm.Plan(ids, m)
        merge = lambda x: jm.merge(plan, x, weight=weight, reduce=reduce, implementation=which)
        y, back = jax.vjp(merge, x)
        return y, back(y)[0], jm.unmerge(plan, y, implementation=which)

    same(both_ways, ids, weight, x)


@both
@pytest.mark.parametrize("options", merging.CANDIDATES["merge"], ids=str)
@pytest.mark.parametrize("spec", [VIT[3], LONG[1], BYTES[0], Tokens("short", 50, 8, 128, 42)], ids=lambda s: s.name)
def test_merge_in_every_setting(dtype, options, spec):
    """As models have their ids, and with some dropped, some beyond and empty segments."""
    rng, m = np.random.default_rng(0), spec.n - spec.r
    ids = jnp.concatenate([cases.merging(rng, spec), cases.plan(rng, 2, spec.n, m, ordered=False)])
    x, weight = cases.tokens(rng, 3, spec.n, spec.d, dtype), cases.sizes(rng, 3, spec.n) / 512
    for mean in (True, False):
        found = jax.jit(lambda *a, mean=mean: merging.merge(*a, m=m, mean=mean, **options))(ids, x, weight)
        wanted = jax.jit(lambda *a, mean=mean: merge_ref.merge(*a, m=m, mean=mean))(ids, x, weight)
        for a, b in zip(found, wanted, strict=True):
            cases.close(a, b, terms=spec.n, largest=float(jnp.abs(x).max()))


@both
def test_pack(dtype):
    spec, rng = BYTES[0], np.random.default_rng(0)
    keep = jnp.asarray(rng.random((3, spec.n)) < np.array([[0.1], [0.25], [0.6]]))

    def packed(which, x):
        pack = lambda x: jm.tokens.pack(keep, x, spec.n - spec.r, implementation=which)
        y, back = jax.vjp(lambda x: pack(x).x, x)
        return pack(x), back(y)

    same(packed, cases.tokens(rng, 3, spec.n, spec.d, dtype))


@pytest.mark.parametrize("spec", [VIT[2], VIT[3], VIT[6], Tokens("long", 2000, 128, 512, 0)], ids=lambda s: s.name)
def test_attend(spec):
    """Beside XLA's attention in float32: weights and results are rounded to bfloat16, 2^-9 of the largest value each."""
    rng, heads = np.random.default_rng(0), spec.d // spec.k
    qkv = cases.tokens(rng, 2, -(-spec.n // 8) * 8, 3 * spec.d, jnp.bfloat16).reshape(2, -1, 3, heads, spec.k)
    bias = jm.attention.key_bias(cases.sizes(rng, 2, spec.n)).at[:, 5].set(jm.attention.MASKED)
    offset = cases.tokens(rng, 3, heads, spec.k, jnp.float32)

    def attend(which, qkv, bias):
        options = dict(offset=offset, length=spec.n, mean_keys=True, implementation=which)
        pull = lambda qkv: jm.attention.packed_attention(qkv, bias, **options)
        out, back = jax.vjp(pull, qkv)
        q, k, v = (qkv[:, : spec.n, i] for i in range(3))
        return *pull(qkv), jm.attention.proportional_attention(q, k, v, None, implementation=which), back(out)[0]

    found = jax.jit(attend, static_argnums=0)("mosaic_gpu", qkv, bias)
    wanted = jax.jit(attend, static_argnums=0)("xla", qkv.astype(jnp.float32), bias)
    for a, b, parts in zip(found, wanted, (1, 1, 1, 8), strict=True):  # a gradient is a sum of products of rounded ones
        b = np.asarray(b)
        assert a.dtype == jnp.bfloat16 and np.abs(np.asarray(a, np.float32) - b).max() <= parts * 2.0**-8 * np.abs(b).max()
