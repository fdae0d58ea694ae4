"""JAX's interpreter of Hopper kernels, where it has one."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxmerge._kernels import _mosaic_gpu as mgpu


@pytest.fixture
def interpret(monkeypatch):
    """The interpreter, and products of what is in registers, which it does not have."""
    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip("this jax does not offer its GPU interpreter")

    def accumulated(shape, body):
        def into(acc):
            beside = []

            def multiply(a, b):
                if isinstance(a, jax.Array):
                    beside.append(jnp.dot(a, b[...], preferred_element_type=jnp.float32))
                    plgpu.commit_smem()  # b is read as wgmma reads it, not by lanes
                else:
                    plgpu.wgmma(acc, a, b)

            body(multiply)
            return sum(beside, acc[...])

        return pl.run_scoped(into, plgpu.ACC(shape, jnp.float32))

    def add_product(acc, a, b):
        def by_way_of(room):
            room[...] = a
            plgpu.commit_smem()
            plgpu.wgmma(acc, room, b)

        if isinstance(a, jax.Array):  # in a block of one thread
            pl.run_scoped(by_way_of, plgpu.SMEM(a.shape, a.dtype, transforms=mgpu.tiled(a.shape[1])), collective_axes="thread")
        else:
            plgpu.wgmma(acc, a, b)

    monkeypatch.setattr(mgpu, "accumulated", accumulated)
    monkeypatch.setattr(mgpu, "add_product", add_product)
    return plgpu.InterpretGPUParams()
