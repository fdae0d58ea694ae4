"""The algebra, compiled by the real TPU compiler for chips that are not there: sharded, and without a collective."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxmerge as jm
from tests.hlo import collectives, compile_for, tpu_mesh

pytestmark = pytest.mark.tpu

TOPOLOGIES = [("v5e:4x4", (8, 2)), ("v5p:4x4x4", (32, 2))]
N, M, D = 197, 181, 768


@pytest.mark.parametrize("topology, shape", TOPOLOGIES, ids=[t for t, _ in TOPOLOGIES])
def test_algebra_compiles_without_collectives(topology, shape):
    mesh = tpu_mesh(topology, shape, ("data", "model"))
    batch = 8 * shape[0]
    array = lambda s, dtype, *spec: jax.ShapeDtypeStruct(s, dtype, sharding=NamedSharding(mesh, P(*spec)))
    plan = jm.Plan(array((batch, N), jnp.int32, "data"), M)
    x = array((batch, N, D), jnp.bfloat16, "data", None, "model")
    y = array((batch, M, D), jnp.bfloat16, "data", None, "model")
    w = array((batch, N), jnp.float32, "data")

    def everything(plan, x, y, w):
        merged, merge_back = jax.vjp(lambda x: jm.merge(plan, x, weight=w), x)
        spread, spread_back = jax.vjp(lambda y: jm.unmerge(plan, y), y)
        others = [jm.merge(plan, x, reduce=reduce) for reduce in ("sum", "max", "first")]
        composed = jm.compose(jm.from_parents(jnp.zeros_like(plan.segment_ids[:, :M]), 1), plan)
        return merged, spread, merge_back(merged), spread_back(spread), others, plan.sizes, composed

    compiled = compile_for(everything, plan, x, y, w)
    assert collectives(compiled) == []
    assert "dot" in compiled.as_text() or "convolution" in compiled.as_text(), "sums should run on the matrix unit"
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < 2**30, f"{temporary} bytes of scratch"
