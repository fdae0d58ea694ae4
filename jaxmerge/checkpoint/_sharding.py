"""Where a leaf goes: rules from a leaf's name and shape to a sharding; and shardings as Orbax writes them."""

import base64
import contextlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

Rule = Callable[[str, tuple[int, ...]], Sharding]


def fsdp(mesh: Mesh, axis: str | tuple[str, ...] = "fsdp") -> Rule:
    """Split each leaf over `axis` along its largest dimension that the axis divides; a leaf without one is replicated.

    Args:
      mesh: the devices.
      axis: one mesh axis, or several taken together.

    Returns:
      A rule for `merge(sharding=...)`.

    Raises:
      ValueError: the mesh has no such axis.

    Example:
      >>> import jax, jaxmerge as jm
      >>> rule = jm.checkpoint.fsdp(jax.make_mesh((1,), ("fsdp",)))
      >>> tuple(rule("layers/0/kernel", (8, 16)).spec)
      (None, 'fsdp')
    """
    axes = (axis,) if isinstance(axis, str) else tuple(axis)
    unknown = [a for a in axes if a not in mesh.shape]
    if unknown:
        raise ValueError(f"fsdp: the mesh has no axis {unknown}; its axes are {dict(mesh.shape)}.")
    size = math.prod(mesh.shape[a] for a in axes)

    def rule(name: str, shape: tuple[int, ...]) -> NamedSharding:
        fits = [d for d in range(len(shape)) if shape[d] % size == 0 and shape[d] > 0]
        if not fits:
            return NamedSharding(mesh, PartitionSpec())
        chosen = max(fits, key=lambda d: (shape[d], d))
        return NamedSharding(mesh, PartitionSpec(*[None] * chosen, axis if isinstance(axis, str) else axes))

    return rule


def all_devices() -> Rule:
    """`fsdp` over every device of every process."""
    return fsdp(Mesh(np.array(jax.devices()), ("fsdp",), axis_types=(AxisType.Auto,)))


def split_evenly(name: str, shape: tuple[int, ...], sharding: Sharding) -> list[str]:
    """What is wrong with a sharding for this shape, in words."""
    if not isinstance(sharding, NamedSharding):
        return []
    if len(sharding.spec) > len(shape):
        return [f"  {name}: the spec {sharding.spec} names {len(sharding.spec)} dimensions, the leaf has shape {shape}"]
    problems = []
    for dimension, axes in enumerate(sharding.spec):
        axes = () if axes is None else axes if isinstance(axes, tuple) else (axes,)
        size = math.prod(sharding.mesh.shape[a] for a in axes)
        if shape[dimension] % size:
            problems.append(
                f"  {name}: mesh axis {'*'.join(axes)} of size {size} does not divide dimension {dimension} of {shape}; "
                "shard another dimension, replicate this leaf, or use checkpoint.fsdp(mesh), which chooses"
            )
    return problems


def shards_of(sharding: Sharding, dimensions: int) -> tuple[int, ...]:
    """Into how many parts each axis is split."""
    counts = [1] * dimensions
    if isinstance(sharding, NamedSharding):
        for dimension, axes in enumerate(sharding.spec[:dimensions]):
            axes = () if axes is None else axes if isinstance(axes, tuple) else (axes,)
            counts[dimension] = math.prod(sharding.mesh.shape[a] for a in axes)
    return tuple(counts)


def of_mesh(mesh: str, what: str) -> Rule | None:
    """The rule that words such as data=2,fsdp=4 mean; every device on fsdp where there are none; None for "saved".

    Args:
      mesh: the words.
      what: what messages call them.

    Raises:
      ValueError: they are of another form, or do not fit the devices that are here.
    """
    if mesh == "saved":
        return None
    try:
        axes = {k.strip(): int(v) for k, v in (part.split("=") for part in mesh.split(","))} if mesh else {}
    except ValueError:
        raise ValueError(f"{what} {mesh!r} is not of the form data=2,fsdp=4.") from None
    axes = axes or {"fsdp": jax.device_count()}
    if "fsdp" not in axes or min(axes.values()) < 1:
        raise ValueError(f"{what} {mesh!r} must have an axis fsdp, over which leaves are split, and sizes of 1 or more.")
    need, have = math.prod(axes.values()), jax.device_count()
    if need != have and (need > have or jax.process_count() > 1):
        raise ValueError(
            f"{what} {mesh!r} needs {need} devices, here are {have} ({jax.default_backend()}); on CPU set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={need}."
        )
    devices = np.array(jax.devices()[:need]).reshape(tuple(axes.values()))
    return fsdp(Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes)))


# --- as Orbax writes them -------------------------------------------------------------------------------------------------


def to_json(shardings: Mapping[str, Sharding]) -> dict[str, str]:
    """Orbax's file of shardings, of the names of arrays; of kinds that it knows."""
    found = {}
    for name, s in shardings.items():
        told: dict[str, Any] = {"sharding_type": type(s).__name__}
        if isinstance(s, NamedSharding):
            devices = np.asarray(s.mesh.devices)
            told |= {"shape": list(devices.shape), "axis_names": list(s.mesh.axis_names)}
            told |= {"axis_types": [f"AxisType.{kind.name}" for kind in s.mesh.axis_types], "partition_spec": list(s.spec)}
            told["device_mesh"] = {"mesh": np.vectorize(lambda d: {"id": d.id}, otypes=[object])(devices).tolist()}
        elif isinstance(s, SingleDeviceSharding):
            told["device_str"] = str(next(iter(s.device_set)))
        else:
            continue
        found[base64.b64encode(name.encode()).decode()] = json.dumps(told)
    return found


def from_json(text: str) -> dict[str, Sharding]:
    """What is in Orbax's file of shardings, as far as those devices are here."""
    here = {d.id: d for d in jax.devices()} | {str(d): d for d in jax.devices()}
    known: dict[str, Sharding | None] = {}  # many arrays, few meshes
    for told in set((saved := json.loads(text)).values()):
        with contextlib.suppress(KeyError, ValueError, TypeError):
            known[told] = _read(json.loads(told), here)
    found = {base64.b64decode(name).decode(): known.get(told) for name, told in saved.items()}
    return {name: sharding for name, sharding in found.items() if sharding is not None}


def _read(told: dict[str, Any], here: Mapping[Any, Any]) -> Sharding | None:
    """One of them.

    Raises:
      KeyError: its devices are not here.
    """
    if told["sharding_type"] == "SingleDeviceSharding":
        return SingleDeviceSharding(here[told["device_str"]])
    if told["sharding_type"] != "NamedSharding":
        return None
    ids = np.array(told["device_mesh"]["mesh"], dtype=object)
    devices = np.vectorize(lambda d: here[d["id"]], otypes=[object])(ids).reshape(told["shape"])
    kinds = tuple(AxisType[kind.removeprefix("AxisType.")] for kind in told.get("axis_types") or ()) or None
    mesh = Mesh(devices, tuple(told["axis_names"]), axis_types=kinds)
    spec = [tuple(axes) if isinstance(axes, list) else axes for axes in told["partition_spec"]]
    return NamedSharding(mesh, PartitionSpec(*spec), memory_kind=told.get("memory_kind"))
