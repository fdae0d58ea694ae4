"""Read compiled programs: which collectives they hold, and whether the TPU compiler accepts them."""

import re

import jax
import numpy as np
from jax.sharding import Mesh

_COLLECTIVE = re.compile(
    r"\b(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast)(?:-start)?\("
)


def collectives(compiled) -> list[str]:
    """Names of the collectives in an optimised program (`jax.jit(f).lower(...).compile()`)."""
    return _COLLECTIVE.findall(compiled.as_text())


def tpu_mesh(topology: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> Mesh:
    """A mesh over the chips of a TPU that is not there: `tpu_mesh("v5e:4x4", (8, 2), ("data", "model"))`."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return Mesh(np.array(devices).reshape(shape), axes)


def compile_for(f, *args, **jit_kwargs):
    """Compile for wherever the ShapeDtypeStructs in `args` live."""
    return jax.jit(f, **jit_kwargs).lower(*args).compile()
