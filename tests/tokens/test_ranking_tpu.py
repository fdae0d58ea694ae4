"""The ranking family under the real TPU compiler: every device ranks its own images, without a sort."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxmerge as jm
from tests.hlo import collectives, compile_for, tpu_mesh


@pytest.mark.tpu
def test_compiles_for_tpu_without_a_collective():
    mesh = tpu_mesh("v5e:4x4", (16,), ("data",))
    shape = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype, sharding=NamedSharding(mesh, P("data")))

    def step(logits, keys, x):
        attention = jax.nn.softmax(logits.astype(jnp.float32)).mean(axis=(1, 2))
        score = jm.tokens.flow_score(attention, attention, keys)
        plans = {
            "hiprune": jm.tokens.hiprune(attention, score, 192, width=24),
            "flow_cut": jm.tokens.flow_cut(score, jm.tokens.flow_budget(attention, 2, 128), 576),
            "page_rank": jm.tokens.page_rank_pruning(logits, 192),
            "dominant": jm.tokens.dominant_and_contextual(attention, keys, 54, 10),
            "prune_and_merge": jm.tokens.prune_and_merge(attention, keys, 400, 300),
            "recover": jm.tokens.recover(score, attention, keys, 128),
            "correlation": jm.tokens.sample_by_correlation(attention, keys, 192),
        }
        return {name: jm.merge(plan, x) for name, plan in plans.items()}

    compiled = compile_for(step, shape(16, 4, 576, 576, dtype=jnp.float32), shape(16, 576, 64), shape(16, 576, 128))
    assert collectives(compiled) == []
    assert " sort(" not in compiled.as_text()
