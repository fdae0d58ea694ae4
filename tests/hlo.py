"""Read compiled programs: which collectives they hold, and whether the TPU compiler accepts them."""

import jax
import numpy as np
from jax.sharding import Mesh

import jaxmerge as jm


def collectives(compiled) -> list[str]:
    """Names of the collectives in an optimised program (`jax.jit(f).lower(...).compile()`)."""
    return [found.name for found in jm.testing.collectives(compiled)]


def tpu_mesh(topology: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> Mesh:
    """A mesh over the chips of a TPU that is not there: `tpu_mesh("v5e:4x4", (8, 2), ("data", "model"))`."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return Mesh(np.array(devices).reshape(shape), axes)


def compile_for(f, *args, **jit_kwargs):
    """Compile for wherever the ShapeDtypeStructs in `args` live."""
    return jax.jit(f, **jit_kwargs).lower(*args).compile()
