"""Which implementation runs, and why not another: the device, the shapes, and how the arrays lie on a mesh.

A kernel is one device's program: the compiler cannot partition it. So it runs where one device has it all, inside of
`jax.shard_map`, and where the arrays' own layout names a mesh with Explicit axes: there `run` wraps it. Under Auto axes a
traced array does not tell its layout; then XLA runs, and an explicit request is refused.
"""

import contextlib
import dataclasses
import functools
import importlib
import json
import pathlib
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.custom_batching import custom_vmap
from jax.sharding import AxisType, PartitionSpec as P

Implementation = Literal["xla", "mosaic_tpu", "mosaic_gpu"]
FOLDERS = {
    "match": "match",
    "energy": "match",
    "nearest_k": "match",
    "nearest_ahead": "match",
    "peaks": "match",
    "merge": "merge",
    "unmerge": "merge",
    "step": "step",
    "pack": "pack",
    "attend": "attend",
    "attend_vjp": "attend",
}
"""Each operation, and the folder of its implementations."""
KERNELS: dict[str, str] = {"mosaic_tpu": "tpu", "mosaic_gpu": "gpu"}
"""Kernel implementations, and the platform that each is for."""
AUTO = (
    "the mesh has Auto axes, under which a traced array does not tell its layout: make the axes Explicit, or call inside of "
    "jax.shard_map over all of them"
)
UNSEEN = (
    "there are {} devices and no mesh in sight, so that the compiler may partition the program: use Explicit axes, or call "
    "inside of jax.shard_map"
)


@dataclasses.dataclass(frozen=True)
class Target:
    """The device that programs are traced for: its platform and kind, and how kernels are interpreted, if they are."""

    platform: str
    kind: str
    interpret: Any = False


_target: ContextVar[Target | None] = ContextVar("target", default=None)


def target() -> Target:
    """What `aim` names, or else the default device."""
    return _target.get() or Target(jax.default_backend(), jax.devices()[0].device_kind)


@contextlib.contextmanager
def aim(platform: str, kind: str = "", *, interpret: Any = False):
    """Trace for another device than the default one: ahead-of-time compilation, and tests that interpret kernels."""
    token = _target.set(Target(platform, kind, interpret))
    try:
        yield
    finally:
        _target.reset(token)


class Layout(NamedTuple):
    """How the arguments lie: the mesh to shard over (None: no need to), its batch axes, and the axes of the features."""

    mesh: Any
    batch: tuple
    features: Any


def run(
    op: str,
    arrays: Sequence[Array | None],
    roles: Sequence[str],
    outputs: Sequence[str],
    *,
    implementation: Implementation | None,
    call: Callable[..., tuple],
    xla: Callable[[], Any],
    **static: Any,
) -> Any:
    """`xla()`, or else `call(module, *arrays)`, per shard and over one batch axis.

    Args:
      arrays: what the implementations take, with any batch axes; None where left out.
      roles: of each array the axes behind the batch: "n" and "m" are positions, "d" features, which may be sharded, "k" what
        a metric is summed over. Behind "*" they are of an array that is the same for the whole batch, whose batch axes are 1.
        `outputs` likewise.
      static: the keyword arguments, passed to `refusals` and `faster`.

    Raises:
      ValueError: the implementation was asked for and refuses, with every reason.
    """
    chosen, layout = choose(op, arrays, roles, implementation=implementation, **static)
    if chosen == "xla":
        return xla()
    module, rank = _module(op, chosen), _rank(arrays, roles)
    given = [i for i, x in enumerate(arrays) if x is not None]

    def flat(*some):
        batch = some[0].shape[:rank]
        full = [None] * len(arrays)
        for i, x in zip(given, some, strict=True):
            full[i] = x.reshape(-1, *x.shape[rank:])
        return tuple(y.reshape(*batch, *y.shape[1:]) for y in call(module, *full))

    some = tuple(arrays[i] for i in given)
    if layout.mesh is None:
        return flat(*some)
    batch = lambda role: [None] * rank if role.startswith("*") else layout.batch
    spec = lambda role: P(*batch(role), *(layout.features if axis == "d" else None for axis in role.lstrip("*")))
    specs = tuple(spec(roles[i]) for i in given)
    per_shard = jax.shard_map(flat, mesh=layout.mesh, in_specs=specs, out_specs=tuple(map(spec, outputs)), check_vma=False)
    return per_shard(*some)


def folded(f: Callable[..., Any]) -> Callable[..., Any]:
    """f over arrays of one batch axis, such that `jax.vmap` makes that axis longer and the kernel is still launched once."""
    call = custom_vmap(f)

    @call.def_vmap
    def rule(size, batched, *arrays):
        def fold(x, has):
            x = x if has else jnp.broadcast_to(x[None], (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        y = folded(f)(*(None if x is None else fold(x, has) for x, has in zip(arrays, batched, strict=True)))
        return jax.tree.map(lambda y: y.reshape(size, -1, *y.shape[1:]), y), jax.tree.map(lambda y: True, y)

    return call


def alike(arrays: Sequence[Array | None]) -> list[Array | None]:
    """The arrays, such that inside of `jax.shard_map` each varies over the mesh axes that any does: what is one for all devices
    then has a gradient that is added up over them."""
    varying = lambda x: jax.typeof(x).manual_axis_type.varying
    over = frozenset[str]().union(*(varying(x) for x in arrays if x is not None))
    cast = lambda x, more: jax.lax.pcast(x, more, to="varying") if more else x
    return [None if x is None else cast(x, tuple(over - varying(x))) for x in arrays]


def choose(
    op: str,
    arrays: Sequence[Any],
    roles: Sequence[str],
    *,
    implementation: Implementation | None,
    **static: Any,
) -> tuple[str, Layout]:
    """The implementation that runs, and the layout it runs in."""
    nowhere = Layout(None, (), None)
    if implementation not in (None, "xla", *KERNELS):
        raise ValueError(f'{op}: implementation must be None, "xla", "mosaic_tpu" or "mosaic_gpu", got {implementation!r}.')
    if implementation == "xla":
        return "xla", nowhere
    here = target()
    if implementation is None:
        fitting = [name for name, platform in KERNELS.items() if platform == here.platform]
        if not fitting:
            return "xla", nowhere
        (name,) = fitting
        layout, why = layout_of(arrays, roles)
        shapes = flat_shapes(arrays, roles)
        if not why and not refusals(op, name, shapes, **static) and faster(op, name, shapes, kind=here.kind, **static):
            return name, layout
        return "xla", nowhere
    layout, why = layout_of(arrays, roles)
    why += refusals(op, implementation, flat_shapes(arrays, roles), **static)
    if why:
        raise ValueError(f"{op}: {implementation} cannot run here:" + "".join(f"\n  - {reason}" for reason in why))
    return implementation, layout


def refusals(op: str, implementation: str, shapes: Sequence[Any] | None = None, **static: Any) -> list[str]:
    """Every reason why a kernel cannot run on the target; with shapes, on these. None: an empty list."""
    here, platform = target(), KERNELS[implementation]
    why = []
    if here.platform != platform:
        why.append(f"it is for {platform}, and this process runs on {here.platform}")
    module = _module(op, implementation)
    if isinstance(module, str):
        return [*why, module]
    if hasattr(module, "device_refusals"):
        why += module.device_refusals(here.kind)
    return why if shapes is None else why + module.refusals(op, *shapes, **static)


def faster(op: str, implementation: str, shapes: Sequence[Any], *, kind: str, **static: Any) -> bool:
    """Whether a kernel that can run beats XLA on this kind of device: as measured, or else as its model of the chip says."""
    measured = tuned(op, implementation, kind, shapes, **static)
    if "us" in measured:
        return measured["us"] < measured["xla_us"]
    return _module(op, implementation).faster(op, *shapes, kind=kind, **static)


def layout_of(arrays: Sequence[Any], roles: Sequence[str]) -> tuple[Layout, list[str]]:
    """Where the arrays lie, and every reason why a kernel cannot run there."""
    alone = Layout(None, (), None)
    given = [(x, role) for x, role in zip(arrays, roles, strict=True) if x is not None]
    traced = any(isinstance(x, Tracer) for x, _ in given)
    shardings = [jax.typeof(x).sharding for x, _ in given]
    mesh = next((s.mesh for s in shardings if not s.mesh.empty), jax.sharding.get_abstract_mesh())
    kinds = set(mesh.axis_types) if not mesh.empty else set()
    if kinds == {AxisType.Manual}:
        return alone, []
    if AxisType.Auto in kinds:
        return alone, [AUTO]
    if not kinds:
        several = {len(x.sharding.device_set) for x, _ in given if not isinstance(x, Tracer)} - {1}
        if several or (traced and _target.get() is None and jax.device_count() > 1):
            return alone, [UNSEEN.format(jax.device_count())]
        return alone, []
    return _explicit(mesh, shardings, [role for _, role in given])


def _explicit(mesh: Any, shardings: Sequence[Any], roles: Sequence[str]) -> tuple[Layout, list[str]]:
    """The layout on a mesh of Explicit axes: batch axes alike everywhere, positions whole, features sharded or not."""
    why, batches, features = [], [], []
    for sharding, role in zip(shardings, roles, strict=True):
        spec = tuple(sharding.spec)
        axes = role.lstrip("*")
        if axes == role:
            batches.append(spec[: len(spec) - len(role)])
        for axis, over in zip(axes, spec[len(spec) - len(axes) :], strict=True):
            if axis == "d":
                features.append(over)
            elif over is not None:
                why.append(f"axis {axis} of {role!r} is sharded over {over!r}: jax.reshard it first")
    if len(set(batches)) > 1:
        why.append(
            f"the arguments' batch axes are sharded differently, {' and '.join(map(str, sorted(set(batches), key=str)))}"
        )
    return Layout(mesh, batches[0], features[0] if features else None), why


def flat_shapes(arrays: Sequence[Any], roles: Sequence[str]) -> list[Any]:
    """The arguments' shapes with one batch axis."""
    rank, shapes = _rank(arrays, roles), []
    for x in arrays:
        batch = 1 if x is None else functools.reduce(int.__mul__, x.shape[:rank], 1)
        shapes.append(None if x is None else jax.ShapeDtypeStruct((batch, *x.shape[rank:]), x.dtype))
    return shapes


def tuned(op: str, implementation: str, kind: str, shapes: Sequence[Any], **static: Any) -> dict[str, Any]:
    """What `scripts.tune` found for these shapes on a kind of device: the options of the fastest call, "us" that it takes and
    "xla_us" that XLA does. Empty where it never ran."""
    return _table(kind).get(f"{op}.{implementation}", {}).get(shape_key(shapes, **static), {})


def shape_key(shapes: Sequence[Any], **static: Any) -> str:
    """The name of a case in the tables: shapes without the batch, dtypes, and the numbers that are compiled in."""
    arrays = ["x".join(map(str, x.shape[1:])) + f":{x.dtype}" for x in shapes if x is not None]
    return " ".join(arrays + [f"{k}={v}" for k, v in sorted(static.items()) if isinstance(v, int | float | str)])


def table_path(kind: str) -> pathlib.Path:
    """Where what was measured on a kind of device is kept."""
    return pathlib.Path(__file__).parent / "tuned" / f"{kind.replace(' ', '_').lower()}.json"


@functools.cache
def _table(kind: str) -> dict[str, Any]:
    path = table_path(kind)
    return json.loads(path.read_text()) if kind and path.exists() else {}


def _rank(arrays: Sequence[Any], roles: Sequence[str]) -> int:
    return next(x.ndim - len(role) for x, role in zip(arrays, roles, strict=True) if x is not None)


def implementation(op: str, name: str) -> Any:
    """The module that has an operation: "ref", or a kernel's."""
    return importlib.import_module(f"jaxmerge._kernels.{FOLDERS[op]}.{name}")


def _module(op: str, implementation: str) -> Any:
    """The module, or the reason why there is none."""
    name = f"jaxmerge._kernels.{FOLDERS[op]}.{implementation}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name != name:
            return f"it cannot be imported here: {e}"
        return f"there is no {implementation} kernel for {op}"
    except ImportError as e:
        return f"it cannot be imported here: {e}"
