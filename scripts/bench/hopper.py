"""What NVIDIA's compiler makes of the Hopper kernels, without a GPU: registers, what it spills, products that it makes wait.

    pip install -e ".[cuda13]"
    python -m scripts.bench.hopper --out runs/bench
    python -m scripts.bench.hopper --ops step match --only ViT-B

Shapes are those of real models (jaxmerge/_kernels/arg_specs.py). XLA compiles for an H200 by its description alone, and ptxas
turns every kernel into the machine's instructions. "spilled" are bytes of registers written to memory and read again by every
lane; "waits" are products of which ptxas says that it lets none begin before the last has ended. Writes hopper.json.
"""

import contextlib
import importlib.util
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import SingleDeviceSharding
from rich.console import Console
from rich.table import Table

from jaxmerge._kernels import _dispatch as dispatch
from jaxmerge._kernels.arg_specs import BYTES, LONG, VIT, cases
from scripts.bench import device
from scripts.bench.kernels import ROWS
from scripts.refusals import refusals

KIND = "NVIDIA H200"
DESCRIPTION = f"""
gpu_device_info {{
  name: "{KIND}"
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  core_count: 132  threads_per_core_limit: 2048  fpus_per_core: 128  clock_rate_ghz: 1.98
  threads_per_warp: 32  threads_per_block_limit: 1024
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  shared_memory_per_core: 233472  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  memory_bandwidth: 4800000000000  l2_cache_size: 52428800  device_memory_size: 151397597184
  driver_version: "13.0.0"  runtime_version: "12.8.0"  compile_time_toolkit_version: "12.8.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{KIND}"
"""
"""What XLA has to know of the device, in its own words."""


class Kernel(NamedTuple):
    """What ptxas says of one kernel."""

    registers: int
    """Of a lane, at the start: `set_max_registers` moves them between threads afterwards."""
    spilled: int
    """Bytes that a lane writes and reads, in instructions."""
    waits: int
    """Functions whose products are made to wait for each other."""


def main(
    *,
    ops: tuple[str, ...] = tuple(dispatch.FOLDERS),
    only: str = "",
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    out: pathlib.Path = pathlib.Path("runs/bench"),
) -> None:
    """Compile them and print a table; a quarter of an hour for all on one core.

    Args:
      ops: of match, energy, nearest_k, nearest_ahead, peaks, merge, unmerge, step, pack, attend, attend_vjp.
      only: a part of the model's name.
      dtype: of tokens and metric.
      out: directory for hopper.json.
    """
    if not at_hand():
        raise ValueError('hopper: there is no CUDA compiler in this environment: pip install -e ".[cuda13]".')
    out.mkdir(parents=True, exist_ok=True)
    console, rows = Console(width=120), []
    table = Table(title=f"compiled for {KIND}, {dtype}")
    for column in ("op", "model", "batch", "registers", "spilled", "waits"):
        table.add_column(column, justify="left" if column in ("op", "model") else "right")
    for spec in (s for s in (*VIT, *LONG, *BYTES) if only in s.name):
        for op, (shapes, static) in cases(spec, max(1, ROWS // spec.n), jnp.dtype(dtype)).items():
            with dispatch.aim("gpu", KIND):
                why = dispatch.refusals(op, "mosaic_gpu", shapes, **static)
            if op not in ops or why:
                continue
            found = kernels(getattr(dispatch.implementation(op, "mosaic_gpu"), op), *shapes, **static)
            rows.append(dict(op=op, model=spec.name, batch=shapes[0].shape[0], kernels=[k._asdict() for k in found]))
            device.write(out / "hopper.json", dict(kind=KIND, dtype=dtype, rows=rows))
            each = (", ".join(str(getattr(k, field)) for k in found) for field in Kernel._fields)
            table.add_row(op, spec.name, str(shapes[0].shape[0]), *each)
            console.print(f"{op} {spec.name}: {found}", highlight=False)
    if not rows:
        raise ValueError(f"hopper: no kernel is of {' or '.join(ops)} and of a model named like {only!r}; see --help.")
    console.print(table)


def at_hand() -> bool:
    """Whether JAX's CUDA plugin is installed; a GPU need not be."""
    return importlib.util.find_spec("jax_cuda13_plugin") is not None


def kernels(f: Callable[..., Any], *shapes: Any, **static: Any) -> list[Kernel]:
    """Compile f for an H200 that is not there: its kernels, but for those that this process has compiled before.

    Raises:
      jax.errors.JaxRuntimeError: the compiler refuses the program.
    """
    from jax.experimental import topologies

    chip = topologies.get_topology_desc(
        platform="cuda", topology_name="h200", target_config=DESCRIPTION, topology="1x1x1"
    ).devices[0]
    on = lambda s: None if s is None else jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=SingleDeviceSharding(chip))
    with dispatch.aim("gpu", KIND):
        traced = jax.jit(lambda *arrays: f(*arrays, **static)).trace(*map(on, shapes))
        lowered = traced.lower(lowering_platforms=("cuda",))
    with printed() as text:
        lowered.compile()
    return [parsed(part) for part in text().split("Compile time")[:-1]]


def parsed(text: str) -> Kernel:
    """ptxas' words of one kernel."""
    number = lambda pattern: int(found[1]) if (found := re.search(pattern, text)) else 0
    spilled = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    return Kernel(number(r"Used (\d+) registers"), spilled, len(re.findall(r"wgmma.*serializ", text)))


@contextlib.contextmanager
def printed() -> Iterator[Callable[[], str]]:
    """What the compiler prints, which it does past Python, and only if it is asked to."""
    before = os.environ.get("MOSAIC_GPU_DUMP_PTXAS")
    sys.stdout.flush()
    with tempfile.TemporaryFile("w+") as file:
        kept, text = os.dup(1), ""
        os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
        os.dup2(file.fileno(), 1)
        try:
            yield lambda: text
        finally:
            os.dup2(kept, 1)
            os.close(kept)
            os.environ.pop("MOSAIC_GPU_DUMP_PTXAS")
            if before is not None:
                os.environ["MOSAIC_GPU_DUMP_PTXAS"] = before
            file.seek(0)
            text = file.read()


if __name__ == "__main__":
    with refusals():
        tyro.cli(main, prog=f"python -m {__spec__.name}", description=__doc__)
