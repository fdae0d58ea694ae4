"""Rung 3: the TPU compiler takes every kernel, within the chip's memory: inside of shard_map, and through the public functions
in a program that is partitioned automatically."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import jaxmerge as jm
from jaxmerge._kernels import _dispatch as dispatch, merge as merges, pack as packs, step as steps
from jaxmerge._kernels.arg_specs import BYTES, LONG, VIT, cases
from jaxmerge._kernels.attend import mosaic_tpu as attend_tpu
from jaxmerge._kernels.match import mosaic_tpu as match_tpu
from jaxmerge._kernels.merge import mosaic_tpu as merge_tpu
from jaxmerge._kernels.pack import mosaic_tpu as pack_tpu
from jaxmerge._kernels.step import mosaic_tpu as step_tpu
from tests.hlo import collectives, compile_for, tpu_mesh

pytestmark = pytest.mark.tpu

CHIPS = {"v5e:2x2": "TPU v5 lite", "v5p:2x2x1": "TPU v5", "v6e:2x2": "TPU v6 lite", "tpu7x:2x2x1": "TPU7x"}
every_chip = pytest.mark.parametrize(
    "topology", ["v5e:2x2", *(pytest.param(t, marks=pytest.mark.slow) for t in list(CHIPS)[1:])]
)


def kernels(compiled) -> int:
    return compiled.as_text().count('custom_call_target="tpu_custom_call"')


def on_every_chip(topology, dtype, spec, ops=None):
    """Compile the operations of a layer for one row of the batch per device, with the gradients of what has any."""
    mesh = tpu_mesh(topology, (-1,), ("data",))
    shape = lambda s: None if s is None else jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(mesh, P("data")))
    calls = {
        "step": lambda *a, **how: steps.differentiable(step_tpu, steps.How(**how), *a),
        "merge": lambda *a, m, mean: merges.differentiable(merge_tpu, m, mean, *a),
        "pack": lambda *a, capacity: packs.differentiable(pack_tpu, capacity, *a),
        "unmerge": merge_tpu.unmerge, "attend": attend_tpu.attend, "attend_vjp": attend_tpu.attend_vjp,
        "match": match_tpu.match, "energy": match_tpu.energy, "nearest_k": match_tpu.nearest_k,
        "nearest_ahead": match_tpu.nearest_ahead, "peaks": match_tpu.peaks,
    }  # fmt: skip
    at = cases(spec, mesh.size, dtype)
    with dispatch.aim("tpu", CHIPS[topology]):
        for op in ops or at:
            arguments, static = at[op]
            if op == "step":
                arguments = [*arguments[:3], arguments[1]]  # with the residual, as models call it
            if op in ("attend", "attend_vjp"):
                batch, _, *heads = arguments[0].shape
                arguments[4] = jax.ShapeDtypeStruct((batch, *heads), jnp.float32)  # with the product's bias
            assert not dispatch.refusals(op, "mosaic_tpu", arguments, **static)
            arguments, call = [shape(a) for a in arguments], partial(calls[op], **static)
            if op in ("step", "merge", "pack"):
                call = lambda *a, call=call: jax.vjp(lambda x: call(a[0], x, *a[2:])[0], a[1])[1](call(*a)[0])
            compiled = compile_for(
                jax.shard_map(call, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=True), *arguments
            )
            assert collectives(compiled) == []
            assert kernels(compiled) >= 1


@every_chip
def test_every_kernel_compiles(topology):
    on_every_chip(topology, jnp.bfloat16, VIT[0])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("spec", [*VIT, *LONG, *BYTES], ids=lambda s: s.name)
@pytest.mark.parametrize("topology", CHIPS)
def test_every_kernel_compiles_at_every_size(topology, spec, dtype):
    on_every_chip(topology, dtype, spec)


@every_chip
def test_public_functions_on_a_partitioned_program(topology):
    """Explicit axes: kernels run per shard, forward and back. Auto axes: XLA does, and a kernel asked for is refused."""
    devices = tpu_mesh(topology, (2, -1), ("data", "model")).devices
    spec, batch = VIT[0], 8

    def layer(metric, x, sizes, implementation=None):
        step = jm.tokens.merge_step(metric, x, spec.r, sizes=sizes, protect=(0,), implementation=implementation)
        apart = jm.unmerge(step.plan, step.x, implementation=implementation)
        packed = jm.tokens.pack(
            jm.tokens.nearest(metric, metric[:, ::2]).similarity > 0.5, apart, 64, implementation=implementation
        )
        return jnp.sum(packed.x.astype(jnp.float32)) + jnp.sum(step.x.astype(jnp.float32))

    def program(kind):
        mesh = Mesh(devices, ("data", "model"), axis_types=(kind,) * 2)
        array = lambda s, *spec: jax.ShapeDtypeStruct((batch, *s), jnp.bfloat16, sharding=NamedSharding(mesh, P("data", *spec)))
        return array((spec.n, spec.k)), array((spec.n, spec.d), None, "model"), array((spec.n,))

    with dispatch.aim("tpu", CHIPS[topology]):
        explicit = compile_for(jax.value_and_grad(layer, 1), *program(AxisType.Explicit))
        assert kernels(explicit) >= 5  # step, unmerge and pack, and back through them
        assert {c for c in collectives(explicit)} <= {"all-reduce"}  # of the loss
        automatic = compile_for(layer, *program(AxisType.Auto))
        assert kernels(automatic) == 0
        with pytest.raises(ValueError, match="Auto axes"):
            jax.jit(partial(layer, implementation="mosaic_tpu")).lower(*program(AxisType.Auto))


@every_chip
def test_a_step_that_adds_and_normalises(topology):
    """A float32 residual stream, bfloat16 beside it; forward and back, over Explicit axes."""
    mesh = Mesh(tpu_mesh(topology, (-1,), ("data",)).devices, ("data",), axis_types=(AxisType.Explicit,))
    spec, place = VIT[2], lambda *axes: NamedSharding(mesh, P(*axes))
    array = lambda *shape, dtype: jax.ShapeDtypeStruct((mesh.size, *shape), dtype, sharding=place("data"))
    vector = jax.ShapeDtypeStruct((spec.d,), jnp.float32, sharding=place())

    def loss(x, residual, offset, scale, metric):
        norm = jm.tokens.LayerNorm(scale, offset, dtype=jnp.bfloat16)
        step = jm.tokens.merge_step(metric, x, spec.r, residual=residual, offset=offset, norm=norm, implementation="mosaic_tpu")
        return jnp.sum(step.x) + jnp.sum(step.normed.astype(jnp.float32))

    some = array(spec.n, spec.d, dtype=jnp.float32), array(spec.n, spec.d, dtype=jnp.bfloat16), vector, vector
    with dispatch.aim("tpu", CHIPS[topology]):
        compiled = compile_for(jax.value_and_grad(loss, (0, 1, 2, 3)), *some, array(spec.n, spec.k, dtype=jnp.bfloat16))
    assert kernels(compiled) == 2  # the step, and back through its merge
    assert set(collectives(compiled)) <= {"all-reduce"}  # of the loss, and of the vectors' gradients


@every_chip
def test_attention_and_its_gradient_where_devices_share_an_offset(topology):
    """Inside of shard_map, which is told what varies: two kernels, and one sum, of what the offset's gradient is."""
    mesh, spec = tpu_mesh(topology, (-1,), ("data",)), VIT[0]
    heads = (3, spec.d // spec.k, spec.k)

    def loss(qkv, bias, offset):
        out, _ = jm.attention.packed_attention(
            qkv, bias, offset=offset, length=spec.n, mean_keys=True, implementation="mosaic_tpu"
        )
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    layout = P("data"), P("data"), P()
    array = lambda spec, dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    some = array(layout[0], jnp.bfloat16, mesh.size, 200, *heads), array(layout[1], jnp.float32, mesh.size, spec.n)
    with dispatch.aim("tpu", CHIPS[topology]):
        slopes = jax.shard_map(jax.grad(loss, (0, 1, 2)), mesh=mesh, in_specs=layout, out_specs=layout, check_vma=True)
        compiled = compile_for(slopes, *some, array(layout[2], jnp.float32, *heads))
    assert kernels(compiled) == 2
    assert list(collectives(compiled)) == ["all-reduce"]


@every_chip
def test_density_peaks_on_a_partitioned_program(topology):
    """Explicit axes: three sweeps per shard, and no collective. Auto axes: XLA."""
    devices = tpu_mesh(topology, (-1,), ("data",)).devices

    def kernels_of(kind):
        layout = NamedSharding(Mesh(devices, ("data",), axis_types=(kind,)), P("data"))
        x = jax.ShapeDtypeStruct((devices.size, 576, 1024), jnp.bfloat16, sharding=layout)
        mask = jax.ShapeDtypeStruct(x.shape[:2], bool, sharding=layout)
        compiled = compile_for(lambda x, mask: jm.tokens.density_peaks(x, 64, mask=mask), x, mask)
        assert collectives(compiled) == []
        return kernels(compiled)

    with dispatch.aim("tpu", CHIPS[topology]):
        assert kernels_of(AxisType.Explicit) == 3
        assert kernels_of(AxisType.Auto) == 0
