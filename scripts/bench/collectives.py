"""What each merge moves between chips: collectives and bytes of its compiled program, on 8 devices and on a TPU pod.

    python -m scripts.bench.collectives                   # 8 virtual devices, and v5p:8x8x8 by the real TPU compiler (libtpu)
    python -m scripts.bench.collectives --methods ties tsvm --axes auto     # or told: Auto axes, and `merge` told the layout

Nothing runs: programs are compiled for devices that are not there. Bytes are of results on one device; in the body of a loop (a
search for a threshold, an iteration) they move in every turn, and the table counts them once.
"""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu must not look for a TPU host
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jaxmerge import params, testing
from scripts.bench.params import CASES, SQUARE, Case, Shape
from scripts.refusals import refusals

LARGE: dict[str, Shape] = {"embed": (4096, 1024), "kernel": (1024, 4096), "scale": (1024,)}
SMALL: dict[str, Shape] = {"kernel": (2048, 256), "scale": (1024,)}  # larger eigenproblems compile for minutes on a TPU
AXES = ("fsdp", "tensor")


def main(
    *,
    methods: tuple[str, ...] = tuple(CASES),
    topology: str = "v5p:8x8x8",
    axes: Literal["auto", "told", "explicit"] = "explicit",
) -> None:
    """Compile them, print one table.

    Args:
      methods: which ones; all by default.
      topology: of the pod; "none" leaves it out.
      axes: of the mesh; told: Auto, and `merge` is told the layout (`shardings=`).
    """
    kind = AxisType.Explicit if axes == "explicit" else AxisType.Auto
    meshes = {"8 devices": Mesh(np.array(jax.devices()).reshape(4, 2), AXES, axis_types=(kind,) * 2)}
    if topology != "none":
        from jax.experimental import topologies

        chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
        meshes[topology] = Mesh(np.array(chips).reshape(-1, 8), AXES, axis_types=(kind,) * 2)
    table = Table(title=f"collectives, {axes} axes, matrices split both ways: how many, kilobytes")
    for column in ("", "looks at", *meshes):
        table.add_column(column, no_wrap=not column)
    for name in track(methods, "compiling"):
        looks = ", ".join(f"{n.statistic} ({n.scope})" for n in params.needs(CASES[name].ours(params, shapes(CASES[name]))))
        table.add_row(name, looks or "each entry", *(moved(CASES[name], mesh, axes == "told") for mesh in meshes.values()))
    Console(width=140).print(table)


def shapes(case: Case) -> dict[str, Shape]:
    return SMALL if case.shapes is SQUARE else LARGE


def moved(case: Case, mesh: Mesh, told: bool) -> str:
    """The collectives of one merge over this mesh, in words."""
    tx = case.ours(params, shapes(case))
    split = lambda shape: NamedSharding(mesh, P(*(AXES if len(shape) > 1 else AXES[:1])))
    model = {n: jax.ShapeDtypeStruct(s, jnp.float32, sharding=split(s)) for n, s in shapes(case).items()}

    def merge(first, rest):
        base, models = (first, rest) if case.base == "base" else (None, [first, *rest])
        return params.merge(tx, base, models, shardings={n: x.sharding for n, x in model.items()} if told else None)

    compiled = jax.jit(merge).lower(model, [model] * (case.models - (case.base == "none"))).compile()
    found: dict[str, list[int]] = {}
    for collective in testing.collectives(compiled):
        found.setdefault(collective.name, []).append(collective.bytes)
    return "\n".join(f"{len(b)} {name}, {sum(b) / 1024:.2f}" for name, b in sorted(found.items())) or "-"


if __name__ == "__main__":
    with refusals():
        tyro.cli(main, prog=f"python -m {__spec__.name}", description=__doc__)
