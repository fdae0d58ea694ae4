"""Auto and Explicit axes, and real TPU topologies: the layout stays, nothing is gathered, the bits are the same."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import jaxmerge as jm
from jaxmerge import params
from tests.hlo import collectives, compile_for, tpu_mesh

SPECS = {"embed": P("model"), "kernel": P("data", "model"), "norm": P(), "stacked": P(None, "data")}
SHAPES = {"embed": (48, 6), "kernel": (8, 16), "norm": (7,), "stacked": (3, 8, 5)}


def test_whole_models_keep_their_layout(mesh):
    """bfloat16 models in, a model out, under one jit: TIES with counts over the whole model."""
    tx = params.ties(0.2, tie="majority")
    rng = np.random.default_rng(0)
    coarse = lambda shape: (np.round(rng.standard_normal(shape) * 8) / 8).astype(jnp.bfloat16)
    base, *models = ({n: coarse(s) for n, s in SHAPES.items()} for _ in range(4))
    put = lambda tree: {n: jax.device_put(x, NamedSharding(mesh, SPECS[n])) for n, x in tree.items()}
    merge = jax.jit(lambda base, models: params.merge(tx, base, models))
    one = merge(base, models)
    compiled = merge.lower(put(base), [put(m) for m in models]).compile()
    assert set(collectives(compiled)) == {"all-reduce"}
    eight = compiled(put(base), [put(m) for m in models])
    for n, shape in SHAPES.items():
        assert eight[n].sharding.is_equivalent_to(NamedSharding(mesh, SPECS[n]), len(shape)), (n, eight[n].sharding)
        np.testing.assert_array_equal(np.asarray(eight[n]).astype(np.float32), np.asarray(one[n]).astype(np.float32))


def test_newton_schulz_stays_split():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = params.iso_c()
    x = {"w": jax.ShapeDtypeStruct((3, 64, 24), jnp.float32, sharding=NamedSharding(mesh, P(None, "data")))}
    assert set(collectives(compile_for(lambda x: tx.merge(tx.match(x), x), x))) == {"all-reduce"}


@pytest.mark.tpu
def test_ranks_gather_nothing():
    """On 512 chips each lays its share of every model out by rows, and a byte an entry back: once for the norms and merge."""
    chips = tpu_mesh("v5p:8x8x8", (64, 8), ("fsdp", "tensor"))
    mesh = Mesh(chips.devices, chips.axis_names, axis_types=(AxisType.Explicit,) * 2)
    x = jax.ShapeDtypeStruct((3, 1024, 2048), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp", "tensor")))
    tx = params.della(0.5, 0.2, seed=0, rescale="l1")
    found = jm.testing.collectives(compile_for(lambda x: tx.merge(tx.match({"w": x}), {"w": x}), x))
    assert {c.name for c in found} == {"all-reduce", "all-to-all"}
    assert sum(c.bytes for c in found if c.name == "all-to-all") == (3 * 4 + 1) * 1024 * 2048 // 512


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("topology", "shape"), [pytest.param("v5e:4x4", (8, 2), marks=pytest.mark.slow), ("v5p:8x8x8", (64, 8))]
)
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_ties_compiles_for_tpu(topology, shape, scope):
    """An FSDP and tensor-sharded transformer: counts are reduced over the chips, no weight moves."""
    mesh = tpu_mesh(topology, shape, ("fsdp", "tensor"))

    def model(models):
        leaf = lambda shape, spec: jax.ShapeDtypeStruct(
            (models, *shape), jnp.float32, sharding=NamedSharding(mesh, P(None, *spec))
        )
        return {
            "embed": leaf((32768, 1024), ("tensor", "fsdp")),
            "layers/attn": leaf((4, 1024, 1024), (None, "fsdp", "tensor")),
            "layers/mlp": leaf((4, 1024, 4096), (None, "fsdp", "tensor")),
            "norm": leaf((1024,), ()),
        }

    tx = params.ties(0.2, scope=scope)
    compiled = compile_for(lambda stacked: tx.merge(tx.match(stacked), stacked), model(3))
    found = collectives(compiled)
    assert found and set(found) == {"all-reduce"}, found
    for line in compiled.as_text().splitlines():
        if " all-reduce(" in line or " all-reduce-start(" in line:
            moved = re.findall(r"(\w+)\[([\d,]*)\]", line.split(" all-reduce")[0])
            assert moved and set(moved) <= {("u32", "3"), ("u32", "1"), ("u32", "")}, line  # counts: one number per model
