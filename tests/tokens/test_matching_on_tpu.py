"""The matching family, compiled by the TPU compiler."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxmerge as jm
from jaxmerge import tokens
from tests.hlo import collectives, compile_for, tpu_mesh


@pytest.mark.tpu
def test_compiles_for_tpu_without_a_collective_or_a_sort():
    mesh = tpu_mesh("v5e:4x4", (16,), ("data",))

    def step(x):
        plans = (
            tokens.kth_bipartite_matching(x, 4),
            tokens.grid_matching(x, 64, grid=(16, 16)),
            tokens.energy_matching(x, 64, margin=0.5, protect=(0,)),
            tokens.threshold_matching(x, 0.8, 256, max_r=32),
            tokens.local_matching(x, 64, window=4),
            tokens.adjacent_matching(x, 64),
            tokens.trajectory_matching(x, grid=(8, 8), window=2),
        )
        return [jm.merge(plan, x) for plan in plans], plans

    shape = jax.ShapeDtypeStruct((32, 256, 64), jnp.bfloat16, sharding=NamedSharding(mesh, P("data")))
    compiled = compile_for(step, shape)
    assert collectives(compiled) == []
    assert " sort(" not in compiled.as_text()
