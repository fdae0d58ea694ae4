"""What `jaxmerge doctor` prints: the device, and of each operation which implementation can run, why not, and which would."""

import platform
from importlib import metadata
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmerge._kernels import _dispatch as dispatch
from jaxmerge._kernels.arg_specs import BYTES, LONG, VIT, cases


class Row(NamedTuple):
    """An implementation of an operation: usable where `why` is empty, and the shapes of models at which it would be chosen."""

    op: str
    implementation: str
    why: list[str]
    chosen: list[str]
    of: int
    """How many shapes there are."""


def machine() -> dict[str, str]:
    """Versions and devices."""
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": metadata.version("jaxlib"),
        "devices": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "measured here": "yes" if dispatch.table_path(devices[0].device_kind).exists() else "no: python -m scripts.tune",
    }


def rows() -> list[Row]:
    """Every operation and implementation, for bfloat16 at the shapes of `arg_specs`, a batch of 8 on one device."""
    kind, found = dispatch.target().kind, []
    tokens = {spec.name: cases(spec, 8, jnp.bfloat16) for spec in (*VIT, *LONG, *BYTES)}
    for op in dispatch.FOLDERS:
        at = {name: case[op] for name, case in tokens.items() if op in case}
        chosen: dict[str, list[str]] = {name: [] for name in ("xla", *dispatch.KERNELS)}
        for name, (shapes, static) in at.items():
            fits = [k for k, platform in dispatch.KERNELS.items() if platform == dispatch.target().platform]
            runs = [k for k in fits if not dispatch.refusals(op, k, shapes, **static)
                    and dispatch.faster(op, k, shapes, kind=kind, **static)]  # fmt: skip
            chosen[(*runs, "xla")[0]].append(name)
        for name, where in chosen.items():
            found.append(Row(op, name, [] if name == "xla" else dispatch.refusals(op, name), where, len(at)))
    return found
