"""Every Hopper kernel is lowered for CUDA on a machine without one, forward and backward, through the public functions."""

import itertools
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest

import jaxmerge as jm
from jaxmerge._kernels import _dispatch as dispatch
from jaxmerge._kernels.arg_specs import BYTES, LONG, VIT, Tokens
from jaxmerge._kernels.match import mosaic_gpu as matching

H200 = "NVIDIA H200"
LONG_ROW = Tokens("ViT-H/14@518", 1370, 80, 1280, 40, 1)


def program(f, *shapes) -> str:
    """The program for CUDA."""
    with dispatch.aim("gpu", H200):
        return jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def lowered(f, *shapes) -> int:
    """How many kernels it launches."""
    return program(f, *shapes).count("@mosaic_gpu")


def shape(*axes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(axes, dtype)


def step(spec, metric, x, sizes):
    protect = range(spec.prefix)
    merged = jm.tokens.merge_step(metric, x, spec.r, sizes=sizes, protect=protect, implementation="mosaic_gpu")
    return merged.x.astype(jnp.float32).sum(), merged


@pytest.mark.parametrize(
    "spec, dtype", [(VIT[2], jnp.bfloat16), (VIT[0], jnp.float32), (VIT[3], jnp.bfloat16), (VIT[7], jnp.bfloat16)], ids=str
)
def test_a_step_is_one_launch_and_its_gradient_another(spec, dtype):
    shapes = shape(8, spec.n, spec.k, dtype=dtype), shape(8, spec.n, spec.d, dtype=dtype), shape(8, spec.n, dtype=jnp.float32)
    assert lowered(jax.grad(partial(step, spec), argnums=1, has_aux=True), *shapes) == 2


@pytest.mark.parametrize("n, k, d, launches", [(577, 64, 1024, 1), (810, 80, 1280, 3)])
def test_what_a_step_that_normalises_keeps_on_chip_fits(n, k, d, launches):
    """Two rows near the limit of shared memory: lowering refuses what is beyond. The second is matched by another kernel."""
    arrays = shape(8, n, k), shape(8, n, d, dtype=jnp.float32), shape(8, n, d), shape(d, dtype=jnp.float32)

    def normed(metric, x, residual, vector):
        norm = jm.tokens.LayerNorm(vector, vector, dtype=jnp.bfloat16)
        more = dict(residual=residual, offset=vector, norm=norm, implementation="mosaic_gpu")
        return jm.tokens.merge_step(metric, x, 23, **more).normed

    assert lowered(normed, *arrays) == launches


@pytest.mark.parametrize(
    "spec, dtype",
    [(LONG_ROW, jnp.bfloat16), pytest.param(VIT[3], jnp.float32, marks=pytest.mark.slow)],
    ids=["long", "float32"],
)
def test_a_row_whose_metric_does_not_fit_is_three_launches(spec, dtype):
    n = spec.n
    shapes = shape(8, n, spec.k, dtype=dtype), shape(8, n, spec.d, dtype=dtype), shape(8, n, dtype=jnp.float32)
    assert lowered(partial(step, spec), *shapes) == 3


def test_match_and_energy_are_two_launches():
    spec = LONG[1]
    near = partial(jm.tokens.nearest, implementation="mosaic_gpu")
    assert lowered(near, shape(2, spec.n, spec.k), shape(2, spec.n, spec.k)) == 2
    assert lowered(partial(matching.match, split=3, window=300), shape(2, spec.n, spec.k), shape(2, spec.n, spec.k)) == 2
    energy = partial(jm.tokens.energy, margin=0.5, implementation="mosaic_gpu")
    assert lowered(energy, shape(2, spec.n, spec.k)) == 2


@pytest.mark.parametrize("rows, split", [(8, 1), (1, 2)])
def test_keys_are_split_where_that_saves_rounds_of_blocks(rows, split):
    """SD 128x128: 64 blocks a row for 132 multiprocessors. Eight rows, 512 blocks, are four rounds with or without."""
    shapes = shape(rows, 8192, 320), shape(rows, 8192, 320)
    default, asked = (program(partial(matching.match, **how), *shapes) for how in ({}, {"split": split}))
    assert default == asked != program(partial(matching.match, split=3 - split), *shapes)


@pytest.mark.parametrize("k, dtype", [(k, dtype) for k in (64, 320, 1024) for dtype in (jnp.bfloat16, jnp.float32)], ids=str)
def test_keys_are_let_go_when_the_products_that_read_them_have_ended(k, dtype):
    """Products go on while the thread does; queries stay on chip, or pass through the ring."""
    x = shape(1, 256, k, dtype=dtype)
    with dispatch.aim("gpu", H200):
        text = str(jax.make_jaxpr(matching.match)(x, x))
    order = re.findall(r"\b(wgmma_ref|wgmma_wait|wgmma_accumulator_deref|barrier_arrive)", text)
    assert "barrier_arrive" in order and ("wgmma_ref", "barrier_arrive") not in itertools.pairwise(order)


@pytest.mark.parametrize("spec, dtype, count", [(LONG[1], jnp.bfloat16, 5), (VIT[3], jnp.float32, 16)], ids=str)
def test_the_nearest_are_two_launches(spec, dtype, count):
    x, ok = shape(2, spec.n, spec.k, dtype=dtype), shape(2, spec.n, dtype=bool)
    assert lowered(lambda x, ok: matching.nearest_k(x, x, count=count, b_ok=ok), x, ok) == 2


@pytest.mark.parametrize("spec, dtype", [(LONG[1], jnp.bfloat16), (VIT[3], jnp.float32)], ids=str)
def test_the_nearest_ahead_are_two_launches(spec, dtype):
    x, place, ok = (shape(2, spec.n, *more, dtype=t) for more, t in (((spec.k,), dtype), ((), jnp.int32), ((), bool)))
    assert lowered(lambda x, place, ok: matching.nearest_ahead(x, x, place, place, ok), x, place, ok) == 2


@pytest.mark.parametrize("d, dtype, launches", [(64, jnp.float32, 6), (1152, jnp.bfloat16, 3), (1024, jnp.float32, 3)], ids=str)
def test_density_peaks_are_three_sweeps(d, dtype, launches):
    """For the densities, what is denser, and the centres; rows that do not fit on chip are made ready by XLA."""
    peaks = partial(jm.tokens.density_peaks, k=64, implementation="mosaic_gpu")
    assert lowered(peaks, shape(2, 729, d, dtype=dtype)) == launches


def test_reasons_against_the_nearest():
    x = shape(2, 64, 64)
    with dispatch.aim("gpu", H200):
        assert dispatch.refusals("nearest_k", "mosaic_gpu", (x, x), count=16) == []
        assert "17 neighbours" in dispatch.refusals("nearest_k", "mosaic_gpu", (x, x), count=17)[0]


@pytest.mark.parametrize(
    "spec, options",  # neither width is a multiple of 128
    [(BYTES[1], {}), pytest.param(LONG[1], {}, marks=pytest.mark.slow), (LONG[1], {"tile": 8, "joined": 2})],
    ids=str,
)
def test_merge_and_its_gradient_are_one_launch_each(monkeypatch, spec, options):
    """In what a table of measurements says is the fastest setting, if there is one."""
    n, m, d = spec.n, spec.n - spec.r, spec.d
    arrays = shape(2, n, dtype=jnp.int32), shape(2, n, d), shape(2, n, dtype=jnp.float32)
    case = {dispatch.shape_key(arrays, m=m, mean=True): {"us": 1.0, "xla_us": 2.0, **options}}
    monkeypatch.setattr(dispatch, "_table", lambda kind: {"merge.mosaic_gpu": case})

    def loss(x, ids, weight):
        return jm.merge(jm.Plan(ids, m), x, weight=weight, implementation="mosaic_gpu").astype(jnp.float32).sum()

    shapes = shape(2, n, d), shape(2, n, dtype=jnp.int32), shape(2, n, dtype=jnp.float32)
    text = program(jax.value_and_grad(loss), *shapes)
    assert text.count("@mosaic_gpu") == 2 and "red.shared" in text
    if options:
        monkeypatch.setattr(dispatch, "_table", lambda kind: {})
        assert program(jax.value_and_grad(loss), *shapes) != text


def test_packing_and_its_gradient_are_one_launch_each():
    n, d, capacity = BYTES[0].n, BYTES[0].d, 256

    def loss(x, mask):
        return jm.tokens.pack(mask, x, capacity, implementation="mosaic_gpu").x.astype(jnp.float32).sum()

    assert lowered(jax.value_and_grad(loss), shape(2, n, d), shape(2, n, dtype=bool)) == 2


@pytest.mark.parametrize(
    "spec",
    [VIT[2], VIT[6], pytest.param(Tokens("narrow heads, a long ring", 2000, 16, 128, 0), marks=pytest.mark.slow)],
    ids=lambda s: s.name,
)
def test_attention_and_its_gradient_are_one_launch_each(spec):
    heads, rows = spec.d // spec.k, -(-spec.n // 8) * 8
    summed = lambda found: sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(found))
    both = lambda f: jax.grad(lambda *a: summed(f(*a)), argnums=(0, 1))
    for keys in (False, True):
        packed = partial(jm.attention.packed_attention, length=spec.n, mean_keys=keys, implementation="mosaic_gpu")
        shapes = shape(2, rows, 3, heads, spec.k), shape(2, spec.n, dtype=jnp.float32)
        assert (lowered(packed, *shapes), lowered(both(packed), *shapes)) == (1, 2)
    three = lambda q, k, v: jm.attention.proportional_attention(q, k, v, None, implementation="mosaic_gpu")
    shapes = shape(2, 70, 8, spec.k), shape(2, 300, 2, spec.k), shape(2, 300, 2, spec.k)
    assert (lowered(three, *shapes), lowered(both(three), *shapes)) == (1, 2)


def test_reasons_against_attention():
    q = jnp.zeros((1, 64, 2, 72), jnp.float32)
    with dispatch.aim("gpu", H200), pytest.raises(ValueError, match=r"(?s)queries are float32.*72 features"):
        jm.attention.proportional_attention(q, q, q, None, implementation="mosaic_gpu")


def test_reasons_against_a_kernel():
    spec = BYTES[0]
    arrays = jnp.zeros((1, spec.n), jnp.int32), jnp.zeros((1, spec.n, spec.d + 1))
    with dispatch.aim("gpu", "NVIDIA A100-SXM4-40GB"), pytest.raises(ValueError, match=r"(?s)is no Hopper.*1473 features"):
        jm.merge(jm.Plan(arrays[0], 3), arrays[1], implementation="mosaic_gpu")
