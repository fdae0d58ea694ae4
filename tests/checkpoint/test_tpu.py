"""Merges of sharded checkpoints, compiled by the real TPU compiler for whole pods: what leaves a chip is counts and sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from jaxmerge import params
from jaxmerge.checkpoint import _sharded
from jaxmerge.params._partition import settings_of
from tests.hlo import collectives, tpu_mesh

pytestmark = [pytest.mark.tpu, pytest.mark.slow]
PODS = {"v5p:8x8x8": (64, 8), "v5p:16x16x16": (512, 8)}
METHODS = {
    "linear": (params.linear(), False),
    "slerp": (params.slerp(0.3), False),
    "model_stock": (params.model_stock(), True),
    "ties": (params.ties(0.2, scope="model"), True),
    "ties, tensor": (params.ties(0.2, scope="tensor"), True),
    "dare_ties": (params.dare_ties(0.5, seed=0), True),
    "breadcrumbs": (params.breadcrumbs(0.8, 0.01), True),
}
SHAPE, SPEC = (4096, 8192), P("fsdp", "tensor")


@pytest.mark.parametrize("pod", PODS)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_no_leaf_is_gathered(pod, kind):
    chips = tpu_mesh(pod, PODS[pod], ("fsdp", "tensor"))
    sharding = NamedSharding(Mesh(chips.devices, chips.axis_names, axis_types=(kind,) * 2), SPEC)
    for name, (tx, has_base) in METHODS.items():
        models = 2 if name == "slerp" else 3
        arrays = [jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16, sharding=sharding)] * (models + has_base)
        steps = tx.match.steps
        settings = [{"w": of_step} for of_step in settings_of(steps, "w", (models, *SHAPE))]
        of_leaf = lambda upto=None, settings=settings: [s["w"] for s in settings[:upto]]
        for i, survey in ((i, step.survey) for i, step in enumerate(steps) if step.survey is not None):
            query, notes = survey.start(settings[i])
            for _ in range(survey.rounds):
                read = _sharded._reader(steps[:i], survey.read, sharding, has_base, None).lower(query, of_leaf(i), arrays)
                assert set(collectives(read.compile())) <= {"all-reduce"}, name
                counts = np.zeros(jax.tree.leaves(read.out_info)[0].shape, np.uint32)
                query, notes = survey.step(query, notes, {"w": _sharded._from_halves(jnp.asarray(counts))})
            settings[i] = dict(survey.finish(notes, settings[i]))
        compiled = _sharded._merger(steps, sharding, has_base, None, jnp.bfloat16).lower(of_leaf(), arrays).compile()
        assert set(collectives(compiled)) <= {"all-reduce"}, name
        assert compiled.output_shardings[0].is_equivalent_to(sharding, 2), name
