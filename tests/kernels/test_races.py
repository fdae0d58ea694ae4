"""Rung 2: in the TPU interpreter, where memory that nobody wrote holds NaN and reads out of bounds raise, blocks that do not
divide the sequences still give the reference's answer. In the GPU interpreter, which keeps clocks, lanes and the copy engine
never touch the same memory without an order between them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu, tpu as pltpu

from jaxmerge._kernels import _mosaic_gpu as mgpu
from jaxmerge._kernels.attend import (
    _vjp_gpu as attend_back,
    mosaic_gpu as attend_gpu,
    mosaic_tpu as attend_tpu,
    ref as attend_ref,
)
from jaxmerge._kernels.match import mosaic_gpu as match_gpu, mosaic_tpu as match_tpu, ref as match_ref
from jaxmerge._kernels.merge import mosaic_tpu as merge_tpu, ref as merge_ref
from jaxmerge._kernels.step import mosaic_gpu as step_gpu, mosaic_tpu as step_tpu, ref as step_ref
from tests.kernels import cases

pytestmark = pytest.mark.slow  # callbacks from compiled code: seconds alone, and not to be relied on beside other programs


@pytest.fixture
def strict():
    yield pltpu.InterpretParams()
    pltpu.reset_tpu_interpret_mode_state()


def test_step(strict):
    rng, n = np.random.default_rng(0), 19
    metric, x, sizes = cases.exact(rng, 2, n, 8, jnp.float32), cases.tokens(rng, 2, n, 8, jnp.float32), cases.sizes(rng, 2, n)
    options = {"r": 3, "protected": (True, *[False] * (n - 1))}
    found, wanted = (
        step_tpu.step(metric, x, sizes, **options, rows=1, interpret=strict),
        step_ref.step(metric, x, sizes, **options),
    )
    assert (found[1] == wanted[1]).all() and (found[2] == wanted[2]).all()
    cases.close(found[0], wanted[0], terms=n, largest=float(jnp.max(jnp.abs(x))))


def test_merge_and_unmerge(strict):
    rng, n, m, d = np.random.default_rng(1), 40, 21, 8
    ids, x, y = (
        cases.plan(rng, 1, n, m, ordered=True),
        cases.tokens(rng, 1, n, d, jnp.float32),
        cases.tokens(rng, 1, m, d, jnp.float32),
    )
    weight, big = cases.sizes(rng, 1, n), float(jnp.max(jnp.abs(x)))
    found = merge_tpu.merge(ids, x, weight, m=m, mean=True, block=(16, 8), interpret=strict)
    wanted = merge_ref.merge(ids, x, weight, m=m, mean=True)
    assert (found[1] == wanted[1]).all()
    cases.close(found[0], wanted[0], terms=n, largest=big)
    assert (merge_tpu.unmerge(ids, y, block=(16, 8), interpret=strict) == merge_ref.unmerge(ids, y)).all()


def test_match(strict):
    rng = np.random.default_rng(2)
    a, b = cases.exact(rng, 1, 20, 8, jnp.float32), cases.exact(rng, 1, 150, 8, jnp.float32)
    for found, wanted in zip(match_tpu.match(a, b, block=(16, 128), interpret=strict), match_ref.match(a, b), strict=True):
        assert (found == wanted).all()


def test_nearest_ahead(strict):
    rng = np.random.default_rng(3)
    a, b = cases.whole(rng, 1, 20, 8, jnp.bfloat16), cases.whole(rng, 1, 150, 8, jnp.bfloat16)
    places = [jnp.asarray(rng.integers(0, 9, (1, n)), jnp.int32) for n in (20, 150)]
    found = match_tpu.nearest_ahead(a, b, *places, block=(16, 128), interpret=strict)
    assert all((one == other).all() for one, other in zip(found, match_ref.nearest_ahead(a, b, *places), strict=True))


def test_attend(strict):
    """With the mean of the keys: a sum that stays on chip from heads to heads, and begins with what nobody wrote."""
    rng, n, h, f = np.random.default_rng(4), 37, 4, 64
    qkv = cases.tokens(rng, 2, 40, 3 * h * f, jnp.float32).reshape(2, 40, 3, h, f)
    options = dict(scale=f**-0.5, length=n, mean_keys=True)
    found = attend_tpu.attend(qkv, None, None, None, **options, interpret=strict)
    largest = float(jnp.max(jnp.abs(qkv)))
    for one, other in zip(found, attend_ref.attend(qkv, None, None, None, **options), strict=True):
        cases.close(one, other, terms=n + f * int(largest**2), largest=largest)


def test_attend_vjp(strict):
    """Sums that stay on chip from one block of queries to the next; the last block has less than it has room for."""
    rng, n, h, f = np.random.default_rng(5), 300, 2, 64
    qkv, g = (cases.tokens(rng, 1, rows, width * h * f, jnp.float32) for rows, width in ((304, 3), (n, 1)))
    given = qkv.reshape(1, 304, 3, h, f), None, None, jnp.zeros((1, n)), jnp.ones((1, 3, h, f)), g.reshape(1, n, h, f)
    found = attend_tpu.attend_vjp(*given, scale=f**-0.5, length=n, interpret=strict)
    wanted = attend_ref.attend_vjp(*given, scale=f**-0.5, length=n)
    largest = float(jnp.max(jnp.abs(qkv))) ** 2 * float(jnp.max(jnp.abs(g)))
    for one, other in zip(found, wanted, strict=True):
        if other is not None:
            cases.close(one, other, terms=n + f, largest=largest)


@pytest.fixture
def raced(interpret, capfd):
    """Runs a Hopper kernel; whether two touched the same memory in no order, which jax 0.11 prints and 0.12 raises."""

    def run(kernel, *arrays, **options):
        capfd.readouterr()
        how, said = plgpu.InterpretGPUParams(detect_races=True), ""
        try:
            jax.block_until_ready(jax.jit(lambda *a: kernel(*a, **options, interpret=how))(*arrays))
        except jax.errors.JaxRuntimeError as e:
            said = str(e)
            if "RACE DETECTED" not in said:
                raise
        return "RACE DETECTED" in said + "".join(capfd.readouterr())

    return run


@pytest.mark.parametrize("ordered", [True, False])
def test_a_race_is_seen(raced, ordered):
    """A tile that lanes have read is written again by the copy engine."""

    def tiles(x, out, room, full):
        ask = lambda i: plgpu.copy_gmem_to_smem(x.at[i], room, full)

        def add(i, sum):
            plgpu.barrier_wait(full)
            sum = sum + room[...]
            if ordered:
                plgpu.commit_smem()
            pl.when(i < 3)(lambda: ask(i + 1))
            return sum

        ask(jnp.int32(0))
        out[...] = lax.fori_loop(0, 4, add, jnp.zeros((64, 128), jnp.float32))

    def kernel(x, interpret):
        scratch = dict(room=plgpu.SMEM((64, 128), jnp.float32), full=plgpu.Barrier())
        out = jax.ShapeDtypeStruct((64, 128), jnp.float32)
        return plgpu.kernel(tiles, out_type=out, scratch_types=scratch, interpret=interpret)(x)

    assert raced(kernel, jnp.ones((4, 64, 128))) == (not ordered)


def test_attention_reads_a_tile_before_the_next_is_written(monkeypatch, raced):
    monkeypatch.setattr(attend_gpu, "SHARED", 1)  # one tile at a time
    x, bias, offset = jnp.ones((1, 128, 3, 3, 32), jnp.bfloat16), jnp.zeros((1, 128)), jnp.ones((1, 3, 3, 32))
    assert not raced(attend_gpu.attend, x, None, None, bias, offset, scale=1.0, mean_keys=True, threads=2)


def test_the_gradient_of_attention_reads_a_tile_before_the_next_is_written(monkeypatch, raced):
    monkeypatch.setattr(attend_back, "SHARED", 1)  # two tiles at a time, of three of each head
    monkeypatch.setattr(attend_back, "heads_each", lambda h, *_: h)
    x, g = jnp.ones((1, 192, 3, 3, 32), jnp.bfloat16), jnp.ones((1, 192, 3, 32), jnp.bfloat16)
    bias, offset = jnp.zeros((1, 192)), jnp.ones((1, 3, 3, 32))
    assert not raced(attend_gpu.attend_vjp, x, None, None, bias, offset, g, scale=1.0)


@pytest.mark.parametrize("room, shared", [(mgpu.MOST_SHARED, False), (45_000, True)])
def test_a_step_reads_a_tile_before_the_next_is_written(monkeypatch, raced, room, shared):
    monkeypatch.setattr(mgpu, "MOST_SHARED", room)
    rng, n = np.random.default_rng(0), 137
    metric, x = cases.exact(rng, 1, n, 32, jnp.bfloat16), cases.tokens(rng, 1, n, 128, jnp.float32)
    layout, _ = step_gpu._laid_out(metric, 128, None, None, r=9, threads=2)
    assert (layout.slots == 2) == shared
    assert not raced(step_gpu.step, metric, x, r=9, protected=(False,) * n, threads=2, splits=2)


@pytest.mark.parametrize("k, dtype", [(64, jnp.bfloat16), (64, jnp.float32), (256, jnp.bfloat16), (128, jnp.float32)], ids=str)
def test_match_reads_keys_before_the_next_are_written(raced, k, dtype):
    """Queries are in registers, or in shared memory where they are wider."""
    rng = np.random.default_rng(0)
    assert not raced(match_gpu.match, cases.exact(rng, 1, 130, k, dtype), cases.exact(rng, 1, 300, k, dtype))
