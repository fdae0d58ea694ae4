"""Measure the kernels of this machine's accelerator against XLA, and write what was found to the package.

    python -m scripts.tune                            every operation and layer of arg_specs, bfloat16 and float32
    python -m scripts.tune --ops step --layers "ViT-B/16@224"
    python -m scripts.tune --quick --layers "ViT-B/16@224" "SD 64x64"

For each operation and layer: XLA's time, and the kernel's for every setting that its module names in CANDIDATES. One whose
result is not XLA's is named and passed over, unless the result holds choices, which rounding may change. The table
`jaxmerge/_kernels/tuned/<device kind>.json` then says which settings are used, and whether the kernel runs by default.
"""

import fcntl
import itertools
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from jaxmerge._kernels import _dispatch as dispatch
from jaxmerge._kernels.arg_specs import BYTES, LONG, VIT, cases
from scripts.bench import device
from scripts.refusals import refusals


def main(
    *,
    ops: tuple[str, ...] = tuple(dispatch.FOLDERS),
    layers: tuple[str, ...] = tuple(spec.name for spec in (*VIT, *LONG, *BYTES)),
    dtypes: tuple[str, ...] = ("bfloat16", "float32"),
    batch: int = 32,
    quick: bool = False,
) -> None:
    """Tune and write the table.

    Args:
      ops: of match, energy, nearest_k, nearest_ahead, peaks, merge, unmerge, step, pack, attend, attend_vjp.
      layers: names in `arg_specs`.
      dtypes: of metric and tokens.
      batch: rows of the batch; a quarter of it for long sequences.
      quick: where there is more than one setting to choose from, and for bfloat16 alone: a minute or two.
    """
    dtypes = ("bfloat16",) if quick else dtypes
    here = dispatch.target()
    names = [name for name, platform in dispatch.KERNELS.items() if platform == here.platform]
    if not names:
        raise ValueError(f"tune: there are no kernels for {here.platform}; run this on a TPU or a Hopper GPU.")
    (name,) = names
    console, path = Console(), dispatch.table_path(here.kind)
    table = json.loads(path.read_text()) if path.exists() else {}
    for spec in (*VIT, *LONG, *BYTES):
        for dtype in dtypes if spec.name in layers else ():
            for op, (shapes, static) in cases(spec, batch // 4 if spec in LONG else batch, jnp.dtype(dtype)).items():
                if op not in ops or (quick and op not in getattr(dispatch.implementation(op, name), "CANDIDATES", {})):
                    continue
                if why := dispatch.refusals(op, name, shapes, **static):
                    console.print(f"{spec.name} {dtype} {op}: passed over: {'; '.join(why)}", highlight=False)
                    continue
                arrays = [None if s is None else filled(i, s, spec.n - spec.r) for i, s in enumerate(shapes)]
                found = tune(op, name, arrays, static)
                table.setdefault(f"{op}.{name}", {})[dispatch.shape_key(shapes, **static)] = found
                console.print(f"{spec.name} {dtype} {op}: {found}", highlight=False)
                path.parent.mkdir(exist_ok=True)
                path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def tune(op: str, name: str, arrays: list, static: dict) -> dict:
    """The best setting, its microseconds and XLA's."""
    module, reference = dispatch.implementation(op, name), dispatch.implementation(op, "ref")
    settings = getattr(module, "CANDIDATES", {}).get(op, ({},))
    refused = (jax.errors.JaxRuntimeError, ValueError, NotImplementedError)
    best, programs = {"us": float("inf")}, {}
    for i, options in enumerate(settings):
        try:
            programs[i] = program(lambda *a, options=options: getattr(module, op)(*a, **static, **options), arrays)
        except refused as e:
            print(f"{op} with {options or 'its only setting'} does not fit: {device.first_line(e)}")
    xla = program(lambda *a: getattr(reference, op)(*a, **static), arrays)
    device.compile_all([*programs.values(), xla])
    wanted = results(xla, arrays)
    for i, one in programs.items():
        try:
            if apart := difference(results(one, arrays), wanted):
                print(f"{op} with {settings[i] or 'its only setting'} is passed over: its result is not XLA's, but {apart}")
                continue
            best = min(best, {"us": round(one.seconds() * 1e6, 2), **settings[i]}, key=lambda found: found["us"])
        except refused as e:
            print(f"{op} with {settings[i] or 'its only setting'} does not fit: {device.first_line(e)}")
    return best | {"xla_us": round(xla.seconds() * 1e6, 2)}


def results(one: device.Program, arrays: list) -> list[np.ndarray]:
    """What a program makes of these arguments."""
    given = tuple(a for a in arrays if a is not None)
    with device.turn(fcntl.LOCK_EX):
        return [np.asarray(y) for y in jax.tree.leaves(one.compiled(*[given] * one.copies)[0])]


def difference(found: list[np.ndarray], wanted: list[np.ndarray]) -> str:
    """In words, if some number is off by more than 2^-6 of the largest there is, twice what bfloat16 rounds off.

    Nothing is said of results with integers among them, indices as a rule: where two are nearly as good, rounding decides.
    """
    if any(jnp.issubdtype(b.dtype, jnp.integer) for b in wanted):
        return ""
    for a, b in zip(found, wanted, strict=True):
        a, b = a.astype(np.float64), b.astype(np.float64)
        off, largest = np.abs(a - b).max(initial=0), np.abs(b).max(initial=0)
        if not off <= 2.0**-6 * largest:
            return f"{off:.3g} off, where the largest is {largest:.3g}"
    return ""


def program(call: Callable, arrays: list) -> device.Program:
    """Of calls on these arguments or copies of them."""
    again = itertools.cycle([a for a in arrays if a is not None])
    shapes = [None if a is None else jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]
    return device.Program(call, shapes, draw=lambda rng, shape: jnp.copy(next(again)))


def filled(seed: int, shape: jax.ShapeDtypeStruct, m: int) -> jax.Array:
    """Numbers for an argument: ids of m segments, in order but for a quarter; true a third of the time; normal rows."""
    rng = np.random.default_rng(seed)
    if shape.dtype == bool:
        return jnp.asarray(rng.random(shape.shape) < 1 / 3)
    if shape.dtype == jnp.int32:
        ids = np.sort(rng.integers(0, m, shape.shape), axis=-1)
        return jnp.asarray(np.where(rng.random(shape.shape) < 0.25, rng.integers(0, m, shape.shape), ids), jnp.int32)
    if len(shape.shape) == 2:
        return jnp.asarray(rng.integers(1, 4, shape.shape), shape.dtype)
    return jnp.asarray(rng.standard_normal(shape.shape, np.float32), shape.dtype)


if __name__ == "__main__":
    with refusals():
        tyro.cli(main, prog=f"python -m {__spec__.name}", description=__doc__)
