"""Rung 2: in the TPU interpreter, where memory that nobody wrote holds NaN and reads out of bounds raise, blocks that do not
divide the sequences still give the reference's answer."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxmerge._kernels.match import mosaic_tpu as match_tpu, ref as match_ref
from jaxmerge._kernels.merge import mosaic_tpu as merge_tpu, ref as merge_ref
from jaxmerge._kernels.step import mosaic_tpu as step_tpu, ref as step_ref
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
