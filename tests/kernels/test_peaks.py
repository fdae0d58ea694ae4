"""Density peaks by the kernels' sweeps: the public answer, whatever is shifted, scaled, masked, broken or twice there."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jaxmerge as jm
from jaxmerge._kernels import _dispatch as dispatch
from jaxmerge._kernels._doctor import rows
from jaxmerge._kernels.match import ref
from jaxmerge._kernels.match._distances import moved
from jaxmerge._kernels.match._peaks import by_sweeps
from tests.hlo import collectives

B, N, D, K = 2, 75, 16, 9
both = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])


@partial(jax.jit, static_argnames="implementation")
def clusters(x, mask, count, implementation=None):
    which: Any = dict(mask=mask, implementation=implementation)
    centers = jm.tokens.density_centers(x, K, count=count, **which)
    far = jnp.roll(mask, 1, axis=-1)  # centres that are masked, too
    return jm.tokens.density_peaks(x, K, **which), centers, jm.tokens.nearest_center(x, far, 2 * K, **which)


def drawn(what: str, dtype):
    """Tokens; which of them take part; how many centres there are."""
    rng = np.random.default_rng(0)
    x, mask, count = rng.standard_normal((B, N, D)), np.ones((B, N), bool), np.array([K, K])
    if what == "shifted":
        x += rng.choice([-50.0, 0.0, 20.0], D)
    elif what == "large":
        x *= 2.0**60
    elif what == "masked":
        mask, count = rng.random((B, N)) < np.array([[0.5], [0.05]]), np.array([4, 0])
    elif what == "broken":
        x[0, 3], x[1, 5, 2], x[1, 60] = np.nan, np.inf, np.nan
    elif what == "twins":
        x[:, 1::2] = x[:, :-1:2]
    elif what == "equal":
        x[:] = x[:1, :1]
    return jnp.asarray(x, dtype), jnp.asarray(mask), jnp.asarray(count)


WHAT = ("plain", "shifted", "large", "masked", "broken", "twins", "equal")


def same(what, dtype, implementation):
    found, wanted = (clusters(*drawn(what, dtype), implementation=which) for which in (implementation, "xla"))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (one == other).all(), what


@both
def test_the_answer_is_that_of_all_distances(dtype):
    with dispatch.aim("tpu", interpret=True):
        for what in WHAT:
            same(what, dtype, "mosaic_tpu")


@pytest.mark.slow
@both
@pytest.mark.parametrize("what", WHAT)
def test_on_hopper(interpret, dtype, what):
    with dispatch.aim("gpu", "NVIDIA H200", interpret=interpret):
        same(what, dtype, "mosaic_gpu")


@both
@pytest.mark.parametrize("what", ["plain", "shifted", "large", "broken"])
def test_nothing_is_rounded_by_moving(dtype, what):
    x = drawn(what, dtype)[0][0]
    y, sound, scale = moved(x)
    assert y.dtype == dtype and (np.isfinite(x.astype(jnp.float32)).all(1) == sound).all()
    x, y = (np.asarray(a[sound], np.float64) for a in (x, y))
    np.testing.assert_array_equal(float(scale) * (y[:, None] - y[None]), x[:, None] - x[None])
    assert np.abs(y).max() < 2 and (what != "shifted" or np.abs(y.mean(0)).max() < 0.6)


def test_the_distance_between_twins_is_nothing_whatever_a_sweep_rounds():
    def rounded(*arguments):
        least, at, most = ref.nearest_ahead(*arguments)
        return least + 1e-6, at, most

    x = drawn("twins", jnp.float32)[0]
    score = by_sweeps(ref.nearest_k, rounded)(x, count=5)
    assert (score == -jnp.inf).sum() == B * (N // 2) and ((score == -jnp.inf) == (ref.peaks(x, count=5) == -jnp.inf)).all()


def test_gradients_and_a_mapped_axis():
    """No gradient but that of what is merged; and a mapped axis joins the batch, so that nothing is launched in a loop."""
    x = drawn("plain", jnp.float32)[0]

    def loss(x, which):
        return jnp.sum(jm.merge(jm.tokens.density_peaks(x, K, implementation=which), x, implementation="xla") ** 2)

    with dispatch.aim("tpu", interpret=True):
        program = jax.jit(jax.vmap(jax.grad(partial(loss, which="mosaic_tpu"))))
        found = program(x)
        equations = jax.make_jaxpr(program)(x).eqns[0].params["jaxpr"].eqns
    np.testing.assert_allclose(found, jax.vmap(jax.grad(partial(loss, which="xla")))(x), rtol=1e-6)
    assert not {"while", "scan"} & {e.primitive.name for e in equations}
    assert sum(e.primitive.name == "pallas_call" for e in equations) <= 3


def test_on_a_mesh(mesh):
    """Per shard on Explicit axes, without a collective; on Auto axes XLA runs, and a kernel asked for is refused."""
    x, mask, count = (jnp.tile(a, (4, *[1] * (a.ndim - 1))) for a in drawn("masked", jnp.float32))
    wanted = clusters(x, mask, count, implementation="xla")
    placed = [jax.device_put(a, NamedSharding(mesh, P("data"))) for a in (x, mask, count)]
    with dispatch.aim("tpu", interpret=True):
        if mesh.axis_types[0] == AxisType.Auto:
            with pytest.raises(ValueError, match="Auto axes"):
                clusters(*placed, implementation="mosaic_tpu")
            return
        compiled = clusters.lower(*placed, implementation="mosaic_tpu").compile()
        found = compiled(*placed)
    assert collectives(compiled) == []
    assert found[0].segment_ids.sharding.spec[0] == "data"
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (one == other).all()


def test_where_a_kernel_is_chosen():
    """Where XLA's passes over all distances cost more than a second product; float32 rows are six products wide."""
    shape = lambda n, d, dtype: [jax.ShapeDtypeStruct((8, n, d), dtype), None, None]
    faster = partial(dispatch.faster, "peaks", "mosaic_tpu", kind="TPU v5 lite", count=5)
    assert faster(shape(729, 1152, jnp.bfloat16)) and faster(shape(4096, 256, jnp.float32))
    assert not faster(shape(100, 64, jnp.bfloat16))
    assert not faster(shape(4096, 4096, jnp.float32)) and not faster(shape(729, 256, jnp.float32))  # these stay on chip
    for platform, kind in (("tpu", "TPU v5 lite"), ("gpu", "NVIDIA H200")):
        with dispatch.aim(platform, kind):
            found = {(row.op, row.implementation): row for row in rows()}
        for op in ("peaks", "nearest_ahead"):
            row = found[op, f"mosaic_{platform}"]
            assert "SigLIP-SO400M@384" in row.chosen and "SD 128x128" in row.chosen and not row.why
    with dispatch.aim("tpu", "TPU v5 lite"):
        assert "17 neighbours" in dispatch.refusals("peaks", "mosaic_tpu", shape(729, 64, jnp.float32), count=17)[0]
    x = jnp.zeros((1, 20, 8), jnp.float16)
    with pytest.raises(ValueError, match=r"(?s)runs on cpu.*17 neighbours.*queries are float16"):
        jm.tokens.density_peaks(x, 3, neighbors=17, implementation="mosaic_gpu")
