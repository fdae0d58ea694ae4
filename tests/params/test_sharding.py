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


@pytest.fixture(scope="module")
def told():
    """Models over Auto axes, their layout, and a merge of methods that gather where the compiler chooses."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    layout = {"a/w": P("data", "model"), "b/w": P("data", "model"), "c": P("data"), "ids": P()}
    shardings = {n: NamedSharding(mesh, spec) for n, spec in layout.items()}
    shapes = {"a/w": (16, 24), "b/w": (32, 24), "c": (16,)}
    draw = lambda seed: {n: np.random.default_rng(seed).standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    base, *models = (jax.device_put(draw(k) | {"ids": np.arange(3)}, shardings) for k in range(4))
    covariance = lambda seed: np.cov(np.random.default_rng(seed).standard_normal((16, 40)))
    grams = [{"a/w": jax.device_put(covariance(k), shardings["ids"])} for k in range(3)]
    tx = params.partition({"a": params.regmean(grams), "b": params.iso_c(), "c": params.linear()}, lambda name: name[0])
    return tx, base, models, shardings


def test_auto_axes_where_the_layout_is_said(told):
    """The same merge, laid out as before; the compiler, which chose to gather, does not."""
    tx, base, models, shardings = told
    run = lambda s: lambda base, models: params.merge(tx, base, models, integers="base", shardings=s)
    programs = [jax.jit(run(s)).lower(base, models).compile() for s in (None, shardings)]
    gathered = lambda p: sum(c.bytes for c in jm.testing.collectives(p) if c.name == "all-gather")
    assert gathered(programs[0]) > gathered(programs[1]) == 0
    expected, found = (p(base, models) for p in programs)
    for name, leaf in found.items():
        assert leaf.sharding.is_equivalent_to(shardings[name], leaf.ndim) and leaf.dtype == base[name].dtype
        np.testing.assert_allclose(leaf, expected[name], atol=1e-5)  # as in test_every_alias: what a factorisation amplifies
    grams = [{"a/w": jax.device_put(np.eye(16), shardings["a/w"])}] * 3  # data that is split
    jax.eval_shape(lambda: params.merge(params.regmean(grams), base, models, integers="base", shardings=shardings))


def test_what_is_said_of_layouts(told, unchecked):
    tx, base, models, shardings = told
    merge = lambda **changed: params.merge(tx, base, models, shardings=changed.pop("shardings", shardings | changed))
    with pytest.raises(ValueError, match=r"NamedShardings on one mesh.*\n  c: got P"):
        merge(c=P("data"))
    with pytest.raises(ValueError, match=r"\n  c has none\n  d: the models have no such leaf"):
        merge(shardings={n if n != "c" else "d": s for n, s in shardings.items()})
    other = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match=r"\n  c lies on Mesh\('data': 8"):
        merge(c=NamedSharding(other, P("data")))
    traced = lambda f: params.merge(params.fisher([f] * 3), base, models, integers="base", shardings=shardings)
    with pytest.raises(ValueError, match=r"array that the method holds.*must say its layout too"):
        jax.jit(traced)({n: abs(x) for n, x in base.items()})


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
