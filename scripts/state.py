"""A model's parameters as a plain tree, on a mesh and on disk.

Parameters are nested dicts of arrays with string keys, so that any tool can read the checkpoints. The mesh has two axes,
`data` and `fsdp`: batches are split over both, parameters and optimiser state over `fsdp`.
"""

import dataclasses
import json
import math
import pathlib
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from models.mrt5 import MrT5, MrT5Config
from models.t5 import T5Config

Params = dict[str, Any]


def make_mesh(data: int | None = None, fsdp: int | None = None) -> Mesh:
    """The mesh, or a clear word when the devices do not fit it. By default parameters are split in two."""
    devices = jax.device_count()
    fsdp = (math.gcd(devices, 2) if data is None else devices // data) if fsdp is None else fsdp
    data = devices // fsdp if data is None else data
    if data * fsdp != devices:
        raise ValueError(
            f"make_mesh: data x fsdp = {data} x {fsdp} must equal the number of devices, {devices}; "
            "on a CPU, set XLA_FLAGS=--xla_force_host_platform_device_count=8 or choose other sizes."
        )
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def sharded(mesh: Mesh, tree: Any) -> Any:
    """The sharding of every leaf: its longest axis that `fsdp` divides is split, small or odd leaves are whole everywhere."""
    size = mesh.shape["fsdp"]

    def one(leaf):
        fits = [i for i, n in enumerate(leaf.shape) if n % size == 0 and n >= 8 * size]
        if not fits:
            return NamedSharding(mesh, P())
        longest = max(fits, key=lambda i: leaf.shape[i])
        return NamedSharding(mesh, P(*(None,) * longest, "fsdp"))

    return jax.tree.map(one, tree)


def batched(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: examples over all devices."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def gathered(mesh: Mesh, params: Params) -> Params:
    """The parameters whole on every device, for a forward pass inside jit; gradients come back split."""
    return jax.tree.map(lambda p: jax.lax.with_sharding_constraint(p, NamedSharding(mesh, P())), params)


def template(config: MrT5Config) -> MrT5:
    """The model without memory: shapes in place of arrays."""
    return nnx.eval_shape(lambda: MrT5(config, rngs=nnx.Rngs(0)))


def init(config: MrT5Config, mesh: Mesh, seed: int) -> Params:
    """Fresh parameters, created where they live."""
    make = lambda: to_tree(MrT5(config, rngs=nnx.Rngs(seed)))
    return jax.jit(make, out_shardings=sharded(mesh, jax.eval_shape(make)))()


def to_tree(model: nnx.Module) -> Params:
    """The parameters of a model as nested dicts."""
    tree: Params = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        *parents, name = map(str, path)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf[...]
    return tree


def to_model(config: MrT5Config, params: Params) -> MrT5:
    """A model that holds these parameters; cheap enough to call inside jit."""
    return filled(template(config), params)


def filled(model: Any, params: Params) -> Any:
    """A model without memory, and parameters from `to_tree`, put together."""
    graph, state = nnx.split(model)
    flat = []
    for path, leaf in nnx.to_flat_state(state):
        value: Any = params
        for key in path:
            value = value[str(key)]
        flat.append((path, leaf.replace(value)))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def save(path: pathlib.Path, tree: Any) -> None:
    """Write an Orbax checkpoint, each device its own part."""
    from orbax.checkpoint import v1 as ocp

    ocp.save(str(path.absolute()), tree, overwrite=True)


def load(path: pathlib.Path, mesh: Mesh, abstract: Any) -> Any:
    """Read an Orbax checkpoint onto the mesh, each device its own part."""
    from orbax.checkpoint import v1 as ocp

    if not path.exists():
        raise ValueError(f"load: there is no checkpoint at {path}.")
    place = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
    return ocp.load(str(path.absolute()), jax.tree.map(place, abstract, sharded(mesh, abstract)))


def load_like(path: pathlib.Path, tree: Any) -> Any:
    """Read an Orbax checkpoint into the shapes, dtypes and layouts of a tree that is at hand."""
    from orbax.checkpoint import v1 as ocp

    return ocp.load(
        str(path.absolute()), jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
    )


def load_params(path: pathlib.Path, mesh: Mesh, config: MrT5Config) -> Params:
    """The parameters of a model of this architecture."""
    return load(path, mesh, jax.eval_shape(lambda: to_tree(MrT5(config, rngs=nnx.Rngs(0)))))


def save_config(path: pathlib.Path, config: MrT5Config) -> None:
    path.write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n")


def load_config(path: pathlib.Path) -> MrT5Config:
    """The architecture, from the `model.json` that training leaves beside its checkpoints."""
    if not path.exists():
        raise ValueError(f"load_config: {path} is missing; training writes it beside its checkpoints.")
    fields = json.loads(path.read_text())
    return MrT5Config(**{**fields, "base": T5Config(**fields["base"])})
