"""Rung 1: every kernel gives its reference's answer, in interpret mode: forward and gradients, ties and masks exactly."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge._kernels import merge as merges, pack as packs, step as steps
from jaxmerge._kernels.attend import mosaic_tpu as attend_tpu, ref as attend_ref
from jaxmerge._kernels.match import mosaic_tpu as match_tpu, ref as match_ref
from jaxmerge._kernels.merge import mosaic_tpu as merge_tpu, ref as merge_ref
from jaxmerge._kernels.pack import ref as pack_ref
from jaxmerge._kernels.step import mosaic_tpu as step_tpu, ref as step_ref
from jaxmerge.attention import MASKED
from tests.kernels import cases

F32, BF16 = jnp.float32, jnp.bfloat16


def each(*default, slow=()):
    """Pairs of a shape and a dtype by default, and all of `slow` in both dtypes."""
    marked = [pytest.param(spec, dtype, marks=pytest.mark.slow) for spec in slow for dtype in (F32, BF16)]
    name = lambda value: getattr(value, "name", None) or str(jnp.dtype(value))
    return pytest.mark.parametrize("spec, dtype", [*default, *marked], ids=name)


ODD, EVEN, SHORT_BYTES = cases.SMALL


@pytest.fixture(autouse=True)
def interpreted():
    from jaxmerge._kernels._dispatch import aim

    with aim("tpu", interpret=True):
        yield


def largest(x) -> float:
    return float(jnp.max(jnp.abs(x.astype(jnp.float32))))


@each((ODD, BF16), (EVEN, F32), slow=cases.VIT)
def test_step(spec, dtype):
    rng, batch = np.random.default_rng(0), 2
    protected = tuple(i < spec.prefix or i == spec.n - 2 for i in range(spec.n))
    metric, x = cases.exact(rng, batch, spec.n, spec.k, dtype), cases.tokens(rng, batch, spec.n, spec.d, dtype)
    cotangent = cases.tokens(rng, batch, spec.n - spec.r, spec.d, jnp.float32)
    sizes, residual = cases.sizes(rng, batch, spec.n), cases.tokens(rng, batch, spec.n, spec.d, BF16)
    offset, norm = cases.tokens(rng, 1, 1, spec.d, jnp.float32)[0], cases.tokens(rng, 1, 2, spec.d, jnp.float32)
    how = steps.How(spec.r, protected, 1e-6, BF16)
    norm = norm[:, 0], norm[:, 1]
    every = (sizes, None, None), (None, residual, None, *norm), (sizes, residual, offset, *norm)
    for more in every[slice(1, 3) if dtype == BF16 else slice(1)]:
        reference = lambda x, more=more: step_ref.step(metric, x, *more, **how._asdict())
        kernel = lambda x, more=more: steps.differentiable(step_tpu, how, metric, x, *more)
        (y, mass, ids, *normed), (y_ref, mass_ref, ids_ref, normed_ref) = jax.jit(kernel)(x), jax.jit(reference)(x)
        assert (ids == ids_ref).all() and (mass == mass_ref).all()
        terms = int(jnp.max(jnp.sum(ids[0][:, None] == ids[0][None, :], axis=0)))
        cases.close(y, y_ref, terms=terms, largest=largest(x) + largest(residual) + largest(offset))
        for found in normed:  # of the rows as this kernel rounded them
            cases.close(found, step_ref.normalised(y, *norm, 1e-6, BF16), terms=spec.d, largest=largest(normed_ref))
    if dtype == F32:
        loss = lambda f: lambda x: jnp.sum(f(x)[0].astype(jnp.float32) * cotangent)
        back = [jax.jit(jax.grad(loss(f)))(x) for f in (kernel, reference)]
        cases.close(*back, terms=1, largest=largest(cotangent))


@each((EVEN, F32), (SHORT_BYTES, BF16), slow=cases.EVERY)
def test_merge_and_unmerge(spec, dtype):
    rng, batch, n, m = np.random.default_rng(1), 2 if spec.n < 4096 else 1, spec.n, spec.n - spec.r
    ids = cases.plan(rng, batch, n, m, ordered=spec in cases.BYTES or spec is SHORT_BYTES)
    x, y = cases.tokens(rng, batch, n, spec.d, dtype), cases.tokens(rng, batch, m, spec.d, dtype)
    dropped = (ids < 0) | (ids >= m)
    x = jnp.where(dropped[..., None], jnp.nan, x)
    weight, block = cases.sizes(rng, batch, n), (32, 24) if spec in cases.SMALL else None
    terms = int(max(np.bincount(np.asarray(ids)[~np.asarray(dropped)])))
    mass = merge_ref.merge(ids, x, weight, m=m, mean=False)[1]
    big = largest(jnp.nan_to_num(x))
    for w, mean in ((weight, True), (None, False)):
        kernel = jax.jit(partial(merge_tpu.merge, m=m, mean=mean, block=block))(ids, x, w)
        reference = jax.jit(partial(merge_ref.merge, m=m, mean=mean))(ids, x, w)
        assert (kernel[1] == reference[1]).all()
        cases.close(kernel[0], reference[0], terms=terms, largest=big * (1 if mean else terms))
    one = jnp.float32(mass > 0) / jnp.maximum(mass, 1)
    kernel = jax.jit(partial(merge_tpu.unmerge, block=block))(ids, y, one, weight)
    cases.close(kernel, merge_ref.unmerge(ids, y, one, weight), terms=1, largest=largest(y) * 333)
    plain = jax.jit(partial(merge_tpu.unmerge, block=block))(ids, y)
    assert (plain == merge_ref.unmerge(ids, y)).all()


@pytest.mark.parametrize("mean", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_derivatives_of_any_order(mean):
    """In rows and in weights, forward, reverse, and one through the other; under vmap, scan and remat."""
    rng, batch, n, m, d = np.random.default_rng(2), 2, 13, 5, 8
    ids, x = cases.plan(rng, batch, n, m, ordered=False), cases.tokens(rng, batch, n, d, jnp.float32)
    w, c = jnp.asarray(rng.random((batch, n)) + 0.5, jnp.float32), cases.tokens(rng, batch, m, d, jnp.float32)

    def everything(merge):
        f = lambda x, w: jnp.sum(jnp.sin(merge(x, w)) * c)
        gradient, along = jax.grad(f, (0, 1)), (0.3 * x, 0.2 * w)
        twice = jax.grad(lambda x: jnp.sum(jax.grad(f)(x, w) ** 2))(x)
        rows = jax.vmap(jax.checkpoint(lambda x: merge(x, w)))(jnp.stack([x, 2 * x]))
        loop = jax.grad(lambda x: jax.lax.scan(lambda s, _: (s + f(x * s, w), None), 1.0, None, length=2)[0])(x)
        return gradient(x, w), jax.jvp(f, (x, w), along)[1], jax.jvp(gradient, (x, w), along)[1], twice, rows, loop

    kernel = jax.jit(lambda: everything(lambda x, w: merges.differentiable(merge_tpu, m, mean, ids, x, w)[0]))()
    reference = jax.jit(lambda: everything(lambda x, w: merge_ref.merge(ids, x, w, m=m, mean=mean)[0]))()
    for found, wanted in zip(jax.tree.leaves(kernel), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5 * float(jnp.max(jnp.abs(wanted))))


@each((ODD, F32), (ODD, BF16), slow=(*cases.VIT, *cases.LONG))
def test_match(spec, dtype):
    """Cosines are quarters: similarities and positions must be the same, not close."""
    rng, batch = np.random.default_rng(3), 2 if spec.n < 4096 else 1
    n, m, block = spec.n, spec.n // 2 + 150, (16, 128) if spec in cases.SMALL else None
    a, b = cases.exact(rng, batch, n, spec.k, dtype), cases.exact(rng, batch, m, spec.k, dtype)
    a_ok, b_ok = jnp.asarray(rng.random((1, n)) < 0.7), jnp.asarray(rng.random((batch, m)) < 0.7)
    for options in ({}, {"a_ok": a_ok, "b_ok": b_ok, "window": n // 8}):
        found = match_tpu.match(a, b, **options, block=block)
        wanted = match_ref.match(a, b, **options)
        assert (found[0] == wanted[0]).all() and (found[1] == wanted[1]).all()


@each((ODD, BF16), slow=(*cases.VIT, *cases.LONG))
def test_energy_and_nearest_k(spec, dtype):
    rng, batch, block = np.random.default_rng(4), 1, (16, 128) if spec in cases.SMALL else None
    x = cases.tokens(rng, batch, spec.n, spec.k, dtype)
    terms = spec.n * (spec.k + 8)  # each cosine is a sum of k products
    for kernel in ("shifted", "gaussian"):
        found = match_tpu.energy(x, x, margin=0.45, kernel=kernel, block=block)
        cases.close(found, match_ref.energy(x, x, margin=0.45, kernel=kernel), terms=terms, largest=2.0)
    ok = jnp.asarray(rng.random((1, spec.n)) < 0.7)
    found, wanted = (f(x, x, count=5, b_ok=ok) for f in (partial(match_tpu.nearest_k, block=block), match_ref.nearest_k))
    cases.close(found, wanted, terms=spec.k, largest=largest(jnp.sum(x.astype(jnp.float32) ** 2, axis=-1)) * 4)


@each((ODD, BF16), (EVEN, F32), slow=(*cases.VIT, *cases.LONG))
def test_nearest_ahead(spec, dtype):
    """Distances are whole numbers: they and the positions must be the same, not close."""
    rng, batch, n = np.random.default_rng(6), 2 if spec.n < 4096 else 1, spec.n
    m, block = n // 2 + 150, (16, 128) if spec in cases.SMALL else None
    a, b = cases.whole(rng, batch, n, spec.k, dtype), cases.whole(rng, batch, m, spec.k, dtype)
    b = b.at[:, 128:].set(b[:, : m - 128])  # equals in the same lane
    places = [jnp.asarray(rng.integers(0, n, (batch, rows)), jnp.int32) for rows in (n, m)]
    ok = jnp.asarray(rng.random((batch, m)) < 0.7).at[0].set(n == ODD.n)  # one row may look at nothing
    for more in ((), (*places, ok), (None, None, ok)):
        found, wanted = match_tpu.nearest_ahead(a, b, *more, block=block), match_ref.nearest_ahead(a, b, *more)
        assert all((one == other).all() for one, other in zip(found, wanted, strict=True))


@each((SHORT_BYTES, BF16), slow=cases.BYTES)
def test_pack(spec, dtype):
    from jaxmerge._kernels.pack import mosaic_tpu as pack_tpu

    rng, batch, capacity = np.random.default_rng(5), 2, spec.n - spec.r
    keep = jnp.asarray(rng.random((batch, spec.n)) < np.array([[0.1], [0.6]]))  # one row with empty slots, one that overflows
    x = cases.tokens(rng, batch, spec.n, spec.d, dtype)
    found = jax.jit(lambda x: packs.differentiable(pack_tpu, capacity, keep, x))(x)
    for one, other in zip(found, pack_ref.pack(keep, x, capacity=capacity), strict=True):
        assert (one == other).all()
    back = jax.grad(lambda x: jnp.sum(packs.differentiable(pack_tpu, capacity, keep, x)[0].astype(jnp.float32)))(x)
    slot = jnp.cumsum(keep, axis=1)
    assert (back == jnp.where((keep & (slot <= capacity))[..., None], 1, 0)).all()


@pytest.mark.parametrize("n, rows, h, f, dtype", [(37, 40, 4, 64, BF16), (300, 300, 2, 64, F32), (29, 29, 8, 80, F32)])
def test_attend(n, rows, h, f, dtype):
    """One rounding of the weights and one of the result in bfloat16; in float32 sums of n and of f products."""
    rng = np.random.default_rng(0)
    qkv = cases.tokens(rng, 2, rows, 3 * h * f, dtype).reshape(2, rows, 3, h, f)
    bias = jnp.asarray(rng.standard_normal((2, n)), F32).at[1].set(MASKED)  # one row sees nothing
    offset = cases.tokens(rng, 2, 3, h * f, F32).reshape(2, 3, h, f)
    options = dict(scale=f**-0.5, length=n)
    found, keys = jax.jit(partial(attend_tpu.attend, **options, mean_keys=True))(qkv, None, None, bias, offset)
    k = qkv[:, :n, 1].astype(F32) + offset[:, 1, None]
    assert keys.dtype == dtype
    cases.close(keys, k.mean(axis=-2).astype(dtype), terms=h, largest=largest(k))
    (alone,) = jax.jit(partial(attend_tpu.attend, **options))(qkv, None, None, bias, offset)
    assert (alone == found).all()
    q, k, v = (qkv[:, :n, i] + (0 if i == 1 else offset[:, i, None].astype(F32)) for i in range(3))
    q = q.astype(dtype)  # rounded with its offset; that of the keys does not matter
    (wanted,) = attend_ref.attend(*(x.astype(F32) for x in (q, k, v)), bias, scale=f**-0.5)
    unit = 2.0**-9 if dtype == BF16 else 2.0**-24 * (n + f * largest(q) * largest(k))
    assert found.dtype == dtype and (np.abs(found.astype(F32) - wanted) <= unit * (2 * largest(v) + np.abs(wanted))).all()


@pytest.mark.parametrize(
    "n, rows, h, f, dtype", [(37, 40, 4, 64, BF16), (300, 300, 2, 64, F32), (29, 29, 8, 80, F32), (300, 304, 2, 64, BF16)]
)
def test_attend_vjp(n, rows, h, f, dtype):
    """Of one product, with rows behind the last; of queries, keys and values apart, as many or not."""
    rng, scale = np.random.default_rng(1), f**-0.5
    draw = lambda rows, dtype=dtype: cases.tokens(rng, 2, rows, h * f, dtype).reshape(2, rows, h, f)
    q, k, v = parts = [draw(rows) for _ in range(3)]
    g, s = draw(n), n + 5
    bias = jnp.asarray(rng.standard_normal((2, s)), F32).at[:, 3].set(MASKED).at[1].set(MASKED)  # a row that sees nothing
    offset = cases.tokens(rng, 2, 3, h * f, F32).reshape(2, 3, h, f)
    short = 2.0**-24 * (f + 4)
    off = dict(scale=scale, unit=2.0**-8 + n * 2.0**-24 if dtype == BF16 else 2.0**-24 * (n + f), of_scores=short)
    vjp = partial(attend_tpu.attend_vjp, scale=scale)
    for module in (attend_tpu, attend_ref) if dtype == F32 else (attend_tpu,):
        packed = jax.jit(partial(module.attend_vjp, scale=scale, length=n))
        dqkv, *_, dbias = packed(jnp.stack(parts, axis=2), None, None, bias[:, :n], offset, g)
        assert dqkv.dtype == dtype and not dqkv[:, n:].any()
        shifted = (q + offset[:, 0, None]).astype(dtype)  # rounded with its offset; that of keys and values does not matter
        found = *(dqkv[:, :n, i] for i in range(3)), dbias
        cases.gradients_of_attention(found, (shifted[:, :n], k[:, :n], v[:, :n]), bias[:, :n], g, **off)
    k, v = draw(s), draw(s)
    for b in (bias, None):
        found = jax.jit(vjp)(q[:, :n], k, v, b, None, g)
        cases.gradients_of_attention(found, (q[:, :n], k, v), b, g, **off)


def test_the_gradient_of_attention_in_every_argument():
    """Batch axes, a mapped one too; offset, bias and the mean of the keys, with what lies behind the last row."""
    rng, (n, h, f) = np.random.default_rng(2), (13, 2, 64)
    qkv = cases.tokens(rng, 4, 16, 3 * h * f, F32).reshape(2, 2, 16, 3, h, f)
    bias, offset = jnp.asarray(rng.standard_normal((2, 2, n)), F32), jnp.asarray(rng.standard_normal((3, h, f)), F32)
    g, of_mean = (jnp.asarray(rng.standard_normal(shape), F32) for shape in ((2, n, h, f), (2, n, f)))

    def loss(which, keys, qkv, bias, offset):
        found = jm.attention.packed_attention(
            qkv, bias, offset=offset, length=n, mean_keys=keys is not None, implementation=which
        )
        out, *mean = found if keys is not None else (found,)
        return jnp.sum(out * g) + sum(jnp.sum(m * keys) for m in mean)

    for keys in (None, of_mean, jnp.zeros_like(of_mean)):
        call = lambda which, keys=keys: jax.jit(
            jax.vmap(jax.grad(partial(loss, which, keys), argnums=(0, 1, 2)), in_axes=(0, 0, None))
        )(qkv, bias, offset)
        for one, other in zip(call("mosaic_tpu"), call("xla"), strict=True):
            cases.close(one, other, terms=n + f, largest=largest(g) * largest(qkv) ** 2)


def test_second_derivatives_of_a_kernel_are_refused():
    x = jnp.ones((1, 16, 3, 2, 64))
    slope = jax.grad(lambda x: jnp.sum(jm.attention.packed_attention(x, None, implementation="mosaic_tpu")))
    with pytest.raises(ValueError, match=r'first derivatives alone.*implementation="xla"'):
        jax.grad(lambda x: jnp.sum(slope(x)))(x)


def test_a_gradient_that_does_not_fit_says_so():
    x = jax.ShapeDtypeStruct((1, 12_000, 1, 128), F32)
    with pytest.raises(ValueError, match=r'gradient of 12000 queries and 12000 keys takes \d+ MiB.*implementation="xla"'):
        jax.eval_shape(partial(attend_tpu.attend_vjp, scale=1.0), x, x, x, None, None, x)


def test_attend_refuses_what_does_not_fit():
    shape = lambda *axes: jax.ShapeDtypeStruct(axes, BF16)
    why = attend_tpu.refusals("attend", shape(1, 8, 3, 3, 64), None, None, None, scale=1.0)
    assert "192" in why[0] and "multiple of 128" in why[0]
    assert "share 1" in attend_tpu.refusals("attend", shape(1, 8, 2, 64), *[shape(1, 8, 1, 64)] * 2, None, scale=1.0)[0]
    assert "MiB" in attend_tpu.refusals("attend", shape(1, 2**17, 3, 2, 64), None, None, None, scale=1.0)[0]


def test_attention_with_a_bias_that_rows_share(unchecked):
    rng = np.random.default_rng(0)
    q, k, v = (cases.tokens(rng, 2, 24, 128, F32).reshape(2, 24, 2, 64) for _ in range(3))
    bias = jnp.asarray(rng.standard_normal((1, 24)), F32)
    found, wanted = (jm.attention.proportional_attention(q, k, v, bias, implementation=w) for w in ("mosaic_tpu", "xla"))
    cases.close(found, wanted, terms=24 + 64, largest=largest(q) * largest(k) * largest(v))
    with pytest.raises(ValueError, match="nothing to do"):
        jm.attention.packed_attention(jnp.stack([q, k, v], axis=2), None, length=0, implementation="mosaic_tpu")
