"""Task vectors are nowhere written down inside jit, and the merge takes the place of the donated base."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge import params

SHAPE = (256, 128)


@pytest.mark.parametrize("make", [params.magmax, params.consensus, params.ram])
def test_a_merge_holds_less_than_a_leaf(make):
    leaf = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
    step = lambda base, models: params.merge(make(), base, models)
    memory = jax.jit(step, donate_argnums=0).lower({"w": leaf}, [{"w": leaf}] * 3).compile().memory_analysis()
    size = 4 * SHAPE[0] * SHAPE[1]
    assert memory.alias_size_in_bytes == size and memory.temp_size_in_bytes < size // 4


def test_inside_jit_as_outside():
    """Order statistics of what is trimmed and drawn: three readers, one of them after the other."""
    tx = params.chain(
        params.trim(0.4, scope="row"),
        params.rescale(params.random_mask(0.7, seed=1), "linf"),
        params.elect_sign(tie="majority", scope="tensor"),
        params.sum_experts(),
    )
    rng = np.random.default_rng(0)
    base, *models = ({"w": jnp.asarray(np.round(rng.standard_normal((12, 9)) * 4), jnp.float32)} for _ in range(4))
    np.testing.assert_array_equal(
        jax.jit(lambda base, models: params.merge(tx, base, models))(base, models)["w"], params.merge(tx, base, models)["w"]
    )
