"""The MrT5 train step, compiled by the real TPU compiler for pods that are not there, with sharded state."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P

from models import mrt5, t5
from tests.hlo import collectives, compile_for, tpu_mesh

pytestmark = pytest.mark.tpu

BASE = t5.T5Config(256, 32, 512, 8, num_layers=2, num_decoder_layers=1, softmax1=True, dropout=0.0)
CONFIG = mrt5.MrT5Config(BASE, gate_layer=1)


@pytest.mark.parametrize(
    "topology, shape, capacity", [("v5e:4x4", (4, 4), None), pytest.param("v5p:4x4x4", (8, 8), 128, marks=pytest.mark.slow)]
)
def test_train_step_compiles(topology, shape, capacity):
    """Batches are split over both axes, parameters and optimiser state over one; bfloat16 compute."""
    mesh = tpu_mesh(topology, shape, ("data", "fsdp"))
    tx = optax.adamw(1e-4)
    make = lambda: mrt5.MrT5(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graph, params = nnx.split(nnx.eval_shape(make))

    def place(x):
        fits = [i for i, n in enumerate(x.shape) if n % shape[1] == 0 and n >= 128]
        spec = P(*(None,) * max(fits, key=lambda i: x.shape[i]), "fsdp") if fits else P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    params = jax.tree.map(place, params)
    optimiser = jax.tree.map(place, jax.eval_shape(tx.init, params))
    rows = 2 * shape[0] * shape[1]
    batch = lambda n: jax.ShapeDtypeStruct((rows, n), jnp.int32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))

    def step(params, optimiser, batch, alpha):
        ids, labels = batch

        def f(p):
            return mrt5.loss(nnx.merge(graph, p), ids, labels, alpha, capacity=capacity, score_weight=0.5)

        grads, metrics = jax.grad(f, has_aux=True)(params)
        updates, optimiser = tx.update(grads, optimiser, params)
        return optax.apply_updates(params, updates), optimiser, metrics

    out = jax.tree.map(lambda x: x.sharding, (params, optimiser))
    compiled = compile_for(
        step,
        params,
        optimiser,
        (batch(256), batch(128)),
        jnp.float32(0.01),
        out_shardings=(*out, None),
        donate_argnums=(0, 1),
    )
    assert collectives(compiled), "the gradients of a split batch must be summed somewhere"
    assert compiled.memory_analysis().temp_size_in_bytes < 2**30
