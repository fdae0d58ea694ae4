"""Which implementation runs: through the public functions, on meshes of either kind, and every reason against one at once."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jaxmerge as jm
from jaxmerge._kernels import _dispatch as dispatch
from jaxmerge._kernels._doctor import rows
from tests.hlo import collectives
from tests.kernels import cases

N, K, D, R = 17, 8, 16, 5


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return cases.exact(rng, 8, N, K, jnp.float32), cases.tokens(rng, 8, N, D, jnp.float32), cases.sizes(rng, 8, N)


def layer(metric, x, sizes, implementation=None):
    step = jm.tokens.merge_step(metric, x, R, sizes=sizes, protect=(0,), implementation=implementation)
    near = jm.tokens.nearest(metric, metric[..., ::2, :], implementation=implementation)
    return step, near, jm.unmerge(step.plan, step.x, fill=7, implementation=implementation)


def test_kernels_give_the_public_answer_on_a_mesh(mesh, arrays):
    """Per shard on Explicit axes, without a collective; on Auto axes XLA runs, and a kernel asked for is refused."""
    wanted = jax.jit(layer)(*arrays)
    specs = P("data"), P("data", None, "model"), P("data")
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]
    kernel = jax.jit(partial(layer, implementation="mosaic_tpu"))
    with dispatch.aim("tpu", interpret=True):
        if mesh.axis_types[0] == AxisType.Auto:
            with pytest.raises(ValueError, match="Auto axes"):
                kernel(*placed)
            return
        compiled = kernel.lower(*placed).compile()
        found = compiled(*placed)
    assert collectives(compiled) == []
    assert found[0].x.sharding.spec == P("data", None, "model")
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if jnp.issubdtype(one.dtype, jnp.integer):
            assert (one == other).all()
        else:
            np.testing.assert_allclose(one, other, atol=N * 2.0**-22 * np.abs(arrays[1]).max())


def test_vmap_is_one_launch(arrays):
    """A mapped axis joins the batch, with gradients too; a kernel with a dynamic grid would else run in a loop."""
    metric, x, sizes = (a.reshape(2, 4, *a.shape[1:]) for a in arrays)
    kernel = partial(layer, implementation="mosaic_tpu")
    with dispatch.aim("tpu", interpret=True):
        loss = lambda x: jnp.sum(kernel(metric[0], x, sizes[0])[0].x ** 2)
        program = jax.jit(jax.vmap(jax.value_and_grad(loss)))
        value, gradient = program(x)
        names = [e.primitive.name for e in jax.make_jaxpr(program)(x).eqns[0].params["jaxpr"].eqns]
    wanted = jax.jit(jax.vmap(lambda x: jnp.sum(layer(metric[0], x, sizes[0])[0].x ** 2)))(x)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    assert gradient.shape == x.shape and not {"while", "scan"} & set(names)


def normed(metric, x, sizes, offset, scale, implementation=None):  # noqa: PLR0917
    """A step that adds and normalises, behind a bias; in numbers, and their gradients."""
    norm = jm.tokens.LayerNorm(scale, offset, dtype=jnp.float32)

    def loss(x, offset, scale):
        more = dict(sizes=sizes, offset=offset, norm=norm._replace(scale=scale), residual=0.5 * x)
        step = jm.tokens.merge_step(metric, x, R, **more, implementation=implementation)
        return jnp.sum(step.x**2) + jnp.sum(jnp.sin(step.normed)), step.normed

    (_, found), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(x, offset, scale)
    return found, gradients


def near(found, wanted):
    """Sums of no more than N terms, over at most D features, of float32 numbers whose largest is counted with each."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=8 * N * D * 2.0**-24 * float(jnp.abs(other).max()))


def test_a_norm_on_a_mesh(mesh, arrays):
    """Whole rows, whatever axis the batch lies along; rows that are split are refused, with the remedy."""
    vectors = jnp.linspace(-1, 1, D), jnp.linspace(1, 2, D)
    wanted = jax.jit(normed)(*arrays, *vectors)
    place = lambda *specs: [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]
    kernel = jax.jit(partial(normed, implementation="mosaic_tpu"))
    with dispatch.aim("tpu", interpret=True), jax.set_mesh(mesh):
        if mesh.axis_types[0] == AxisType.Auto:
            return
        near(kernel(*place(P("data"), P("data"), P("data")), *vectors), wanted)
        with pytest.raises(ValueError, match="axis w of 'nw' is sharded over 'model'"):
            kernel(*place(P("data"), P("data", None, "model"), P("data")), *vectors)


def test_attention_on_a_mesh(mesh):
    """Heads may be split; where the mean of the keys over them is asked for, they are refused, with the remedy."""
    qkv = cases.tokens(np.random.default_rng(0), 8, 9, 3 * 4 * 64, jnp.float32).reshape(8, 9, 3, 4, 64)
    place = lambda *spec: jax.device_put(qkv, NamedSharding(mesh, P(*spec)))
    attend = lambda keys: jax.jit(
        partial(jm.attention.packed_attention, bias=None, mean_keys=keys, implementation="mosaic_tpu")
    )
    wanted = jm.attention.packed_attention(qkv, None, mean_keys=True)
    slope = jax.grad(lambda qkv: jnp.sum(jnp.sin(jm.attention.packed_attention(qkv, None))))(qkv)
    with dispatch.aim("tpu", interpret=True), jax.set_mesh(mesh):
        if mesh.axis_types[0] == AxisType.Auto:
            with pytest.raises(ValueError, match="Auto axes"):
                attend(True)(place("data"))
            return
        whole, split = attend(True).lower(place("data")).compile(), place("data", None, None, "model")
        assert collectives(whole) == []
        for found, one in (*zip(whole(place("data")), wanted, strict=True), (attend(False)(split), wanted[0])):
            cases.close(found, one, terms=9 + 64, largest=float(jnp.abs(qkv).max()) ** 2)
        back = jax.jit(jax.grad(lambda qkv: jnp.sum(jnp.sin(attend(False)(qkv))))).lower(split).compile()
        assert collectives(back) == []
        cases.close(back(split), slope, terms=9 + 64, largest=float(jnp.abs(qkv).max()) ** 3)
        with pytest.raises(ValueError, match=r"axis m of 'n3mk' is sharded over 'model': jax\.reshard it first"):
            attend(True)(split)


def test_norms_that_differ_along_a_mapped_axis(arrays):
    """Each mapped row has its own offset and norm, or its own tokens with those of all."""
    tokens = [a.reshape(2, 4, *a.shape[1:]) for a in arrays]
    vectors = jnp.linspace(-1, 1, 2 * D).reshape(2, D), jnp.linspace(1, 2, 2 * D).reshape(2, D)
    for axes, some in ((0, vectors), (None, [v[0] for v in vectors])):
        mapped = lambda which, axes=axes: jax.jit(
            jax.vmap(partial(normed, implementation=which), in_axes=(0, 0, 0, axes, axes))
        )
        wanted = mapped(None)(*tokens, *some)
        with dispatch.aim("tpu", interpret=True):
            near(mapped("mosaic_tpu")(*tokens, *some), wanted)


@pytest.mark.parametrize("what", ["offset", "norm's scale", "norm's bias"])
def test_vectors_of_another_width_are_refused(unchecked, arrays, what):
    vectors = {name: jnp.zeros(D + (name == what)) for name in ("offset", "norm's scale", "norm's bias")}
    norm = jm.tokens.LayerNorm(vectors["norm's scale"], vectors["norm's bias"])
    with pytest.raises(
        ValueError, match=rf"merge_step: {what} must have one number for each of {D} features, got \({D + 1},\)"
    ):
        jm.tokens.merge_step(*arrays[:2], R, offset=vectors["offset"], norm=norm)


def test_all_reasons_are_named_at_once(arrays):
    metric, x, _ = arrays
    with pytest.raises(ValueError, match=r"(?s)it is for tpu, and this process runs on cpu.*metric is float16.*form 17 runs"):
        wide = jnp.tile(metric.astype(jnp.float16), (1, 8, 1))
        jm.tokens.merge_step(wide, wide, 1, protect=range(1, 68, 4), implementation="mosaic_tpu")
    with pytest.raises(ValueError, match="takes no mask"):
        jm.tokens.nearest(metric, metric, mask=jnp.ones((N, N), bool), implementation="mosaic_tpu")
    with pytest.raises(ValueError, match='for "mean" and "sum" of a Plan'):
        jm.merge(jm.identity(N, (8,)), x, reduce="max", implementation="mosaic_tpu")
    with pytest.raises(ValueError, match="it is for tpu"):
        jm.merge(jm.identity(N, (8,)), x, implementation="mosaic_tpu")


@pytest.mark.usefixtures("unchecked")
def test_unknown_implementation(arrays):
    with pytest.raises(ValueError, match="implementation must be"):
        jm.merge(jm.identity(N, (8,)), arrays[1], implementation="triton")


def test_many_devices_without_a_mesh_are_refused(arrays):
    """A bare kernel in a program that the compiler may partition fails late, when TPUs compile it: it is never traced."""
    arrays_, roles = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays], ("nk", "nd", "n")
    seen = []
    jax.jit(lambda *a: seen.append(dispatch.layout_of(a, roles)[1])).lower(*arrays_)
    assert "8 devices and no mesh in sight" in seen[0][0]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    look = lambda *a: (seen.append(dispatch.layout_of(a, roles)[1]), a)[1]
    inside = jax.shard_map(look, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    jax.jit(inside).lower(*arrays_)
    assert seen[1] == []


def test_what_is_chosen(monkeypatch):
    """The model of the chip decides, until a table of measurements says otherwise."""
    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((8, 197, 64), (8, 197, 768))] + [None, None]
    static = {"r": 13, "protected": (True, *[False] * 196)}
    choose = partial(dispatch.choose, "step", shapes, ("nk", "nd", "n", "nd"), implementation=None, **static)
    assert choose()[0] == "xla"
    with dispatch.aim("tpu", "TPU v5 lite"):
        monkeypatch.setattr(dispatch, "layout_of", lambda *a: (dispatch.Layout(None, (), None), []))
        assert choose()[0] == "mosaic_tpu"
        key = dispatch.shape_key(shapes, **static)
        monkeypatch.setattr(dispatch, "_table", lambda kind: {"step.mosaic_tpu": {key: {"rows": 2, "us": 9.0, "xla_us": 8.0}}})
        assert choose()[0] == "xla"


def test_doctor_knows_every_operation():
    found = {(row.op, row.implementation): row for row in rows()}
    assert len(found) == len(dispatch.FOLDERS) * 3
    assert all(not row.why for (_, name), row in found.items() if name == "xla")
    assert "runs on cpu" in found["step", "mosaic_tpu"].why[0]
