"""What the TPU compiler says of the kernels, for chips that are not there: XLA's program and ours, beside the roofline.

    python -m scripts.bench.kernels_aot --chips v5e v6e --out runs/bench

For each layer of `arg_specs`, one program per chip: bytes through memory and arithmetic as `cost_analysis` counts them (a
kernel counts what it declares: a pass of the matrix unit for each bfloat16 part), and the time that the larger of the two
needs at the chip's published rates. The floor is the bytes that must move, and the products that must be taken once, in
bfloat16. Nothing here was run: an estimate knows no launch, no latency and no vector unit. Writes kernels_aot.json.
"""

import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from rich.console import Console
from rich.table import Table

import jaxmerge as jm
from jaxmerge._kernels import _dispatch as dispatch, merge as merges, pack as packs, step as steps
from jaxmerge._kernels.arg_specs import BYTES, LONG, VIT, Tokens, cases
from scripts.refusals import refusals

CHIPS = {
    "v5e": ("v5e:2x2", "TPU v5 lite"),
    "v5p": ("v5p:2x2x1", "TPU v5"),
    "v6e": ("v6e:2x2", "TPU v6 lite"),
    "tpu7x": ("tpu7x:2x2x1", "TPU7x"),
}


def main(
    *,
    chips: tuple[str, ...] = tuple(CHIPS),
    layers: tuple[str, ...] = (
        "ViT-B/16@224",
        "ViT-L/16@384",
        "SigLIP-SO400M@384",
        "SD 64x64",
        "SD 128x128",
        "ByT5-small 4096",
    ),
    ops: tuple[str, ...] = ("step", "match", "energy", "peaks", "merge", "unmerge", "pack", "attend", "attend_vjp"),
    dtype: str = "bfloat16",
    out: pathlib.Path = pathlib.Path("runs/bench"),
) -> None:
    """Compile them and print the table.

    Args:
      chips: of v5e, v5p, v6e, tpu7x.
      layers: names in `arg_specs`.
      ops: which operations; "peaks" are whole density peaks, one cluster for 8 tokens.
      dtype: of metric and tokens.
      out: directory for kernels_aot.json.
    """
    out.mkdir(parents=True, exist_ok=True)
    console, rows = Console(width=120), []
    for chip in chips:
        for row in measure(chip, layers, ops, jnp.dtype(dtype)):
            console.print(f"{row['chip']} {row['layer']} {row['op']}: {row['kernel_us']:.2f} us, XLA {row['xla_us']:.2f}")
            rows.append(row)
    table = Table(title=f"{dtype}: microseconds per row of the batch, as the compiler's counts and the chip's rates have it")
    for column in ("chip", "layer", "operation", "floor", "kernel", "of the floor", "XLA", "XLA / kernel"):
        table.add_column(column, justify="left" if column in ("chip", "layer", "operation") else "right")
    for row in rows:
        table.add_row(
            row["chip"], row["layer"], row["op"], f"{row['floor_us']:.2f}", f"{row['kernel_us']:.2f}",
            f"{row['floor_us'] / row['kernel_us']:.0%}", f"{row['xla_us']:.2f}", f"{row['xla_us'] / row['kernel_us']:.1f} x",
        )  # fmt: skip
    console.print(table)
    (out / "kernels_aot.json").write_text(json.dumps(rows, indent=2))


def measure(chip: str, layers: tuple[str, ...], ops: tuple[str, ...], dtype: np.dtype) -> Iterator[dict]:
    """One row per layer and operation."""
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    topology, kind = CHIPS[chip]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh, rate = Mesh(np.array(devices), ("data",)), dispatch.implementation("step", "mosaic_tpu").tpu.chip(kind)
    cores = len({d.id for d in devices}) // len({tuple(d.coords) for d in devices})
    flops_rate, bandwidth = (r / cores for r in rate)
    for spec in (*VIT, *LONG, *BYTES):
        if spec.name not in layers:
            continue
        per_device = 1 if spec in LONG else 8
        for op, (arrays, static) in cases(spec, per_device * len(devices), dtype).items():
            if op not in ops:
                continue
            if op in ("attend", "attend_vjp"):
                arrays[4] = None  # its bias, which all rows share and shards would not
            row = {"chip": chip, "layer": spec.name, "op": op, "batch": per_device}
            for name, call in {"kernel": kernel(op, spec, static), "xla": xla(op, spec, static)}.items():
                with dispatch.aim("tpu", kind):
                    flops, moved = counts(call, mesh, arrays)
                time = max(flops / flops_rate, moved / bandwidth)
                row |= {f"{name}_flops": flops, f"{name}_bytes": moved, f"{name}_us": time * 1e6 / per_device}
            flops, moved = floor(op, arrays, static)
            row["floor_us"] = max(flops / flops_rate, moved / bandwidth) * 1e6 / len(devices) / per_device
            yield row


def kernel(op: str, spec: Tokens, static: dict):
    """An operation by its TPU kernel."""
    module = dispatch.implementation(op, "mosaic_tpu")
    if op == "peaks":
        return lambda x, *_: density_peaks(x, spec, static, "mosaic_tpu")
    if op == "step":
        return lambda *a: steps.differentiable(module, steps.How(**static), *a)
    if op == "merge":
        return lambda *a: merges.differentiable(module, static["m"], static["mean"], *a)
    if op == "pack":
        return lambda *a: packs.differentiable(module, static["capacity"], *a)
    return lambda *a: getattr(module, op)(*a, **static)


def density_peaks(x: jax.Array, spec: Tokens, static: dict, implementation: dispatch.Implementation) -> jax.Array:
    """Clusters around an eighth of the tokens."""
    plan = jm.tokens.density_peaks(x, spec.n // 8, neighbors=static["count"], implementation=implementation)
    return plan.segment_ids


def xla(op: str, spec: Tokens, static: dict):
    """The same by the public functions."""
    options: Any = {"implementation": "xla"}
    protect = tuple(range(spec.prefix))
    plan = lambda ids: jm.Plan(ids, spec.n - spec.r)
    return {
        "step": lambda metric, x, s, _: jm.tokens.merge_step(metric, x, spec.r, sizes=s, protect=protect, **options),
        "match": lambda a, b: jm.tokens.nearest(a, b, **options),
        "energy": lambda a, b: jm.tokens.energy(a, static["margin"], **options),
        "peaks": lambda x, *_: density_peaks(x, spec, static, "xla"),
        "merge": lambda ids, x, w: jm.merge(plan(ids), x, weight=w, **options),
        "unmerge": lambda ids, y, before, after: (
            jm.unmerge(plan(ids), y * before[..., None].astype(y.dtype), **options) * after[..., None].astype(y.dtype)
        ),
        "attend": lambda qkv, k, v, bias, offset: jm.attention.packed_attention(
            qkv, bias, length=spec.n, mean_keys=static["mean_keys"]
        ),
        "attend_vjp": lambda qkv, k, v, bias, offset, g: jax.vjp(
            lambda qkv: jm.attention.packed_attention(qkv, bias, length=spec.n), qkv
        )[1](g)[0],
        "pack": lambda keep, x: jm.tokens.pack(keep, x, spec.n - spec.r, **options),
    }[op]


def counts(call, mesh: Mesh, arrays: list) -> tuple[float, float]:
    """FLOPs and bytes of one device's program."""
    shape = lambda s: None if s is None else jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(mesh, P("data")))
    sharded = jax.shard_map(call, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    cost = jax.jit(sharded).lower(*map(shape, arrays)).compile().cost_analysis() or {}
    return cost.get("flops", 0.0), cost.get("bytes accessed", 0.0)


def floor(op: str, arrays: list, static: dict) -> tuple[float, float]:
    """What must be multiplied once and moved once, by all devices."""
    size = lambda s: 0 if s is None else s.size * s.dtype.itemsize
    read = sum(map(size, arrays))
    if op in ("match", "energy"):
        a, b = arrays[0], arrays[1]
        same = op == "energy"
        return 2.0 * a.shape[0] * a.shape[1] * b.shape[1] * a.shape[2], read / (2 if same else 1) + 4 * a.shape[0] * a.shape[
            1
        ] * 2
    batch, n = arrays[0].shape[:2]
    if op == "peaks":
        return 2.0 * batch * n * n * arrays[0].shape[2], read + 4 * batch * n
    if op == "attend":
        heads, f = arrays[0].shape[3:]
        wrote = size(arrays[0]) / 3 * (1 + static["mean_keys"] / heads)
        return 4.0 * batch * static["length"] ** 2 * heads * f, read + wrote
    if op == "attend_vjp":  # scores once more, and four other products
        heads, f = arrays[0].shape[3:]
        return 10.0 * batch * static["length"] ** 2 * heads * f, 2 * size(arrays[0]) + size(arrays[3]) + size(arrays[5])
    if op == "step":
        metric, x = arrays[0], arrays[1]
        return batch * n * n / 2 * metric.shape[2], read + batch * (n - static["r"]) * x.shape[
            2
        ] * x.dtype.itemsize + 4 * batch * 2 * n
    rows, wide = arrays[1], {"merge": static.get("m"), "unmerge": n, "pack": static.get("capacity")}[op]
    return 0.0, read + batch * wide * (rows.shape[2] * rows.dtype.itemsize + 4)


if __name__ == "__main__":
    with refusals():
        tyro.cli(main, prog=f"python -m {__spec__.name}", description=__doc__)
