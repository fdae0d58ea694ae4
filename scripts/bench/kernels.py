"""What the kernels take on the accelerator at hand: beside XLA, beside the chip's own limits, beside the official code.

    python -m scripts.bench.kernels --out runs/bench [--tome PATH]        PATH: a checkout of facebookresearch/ToMe

Shapes are those of real models (jaxmerge/_kernels/arg_specs.py). Times are of one call among many in one program, on
arguments that are in no cache; on a GPU they are what the launches took on the chip. "of copy" is the least a call must move,
over its time, as a share of a large copy measured in the same run; "of rate" likewise its multiplications, as a share of a
large bfloat16 product's. Beside `attend`, attention of queries, keys and values in one product, cuDNN is given the bias in
feature columns. With --tome, torch runs `bipartite_soft_matching` and `merge_wavg` on the same GPU in the same run:
eager, through torch.compile, and each replayed as a CUDA graph. Writes kernels.json.
"""

import functools
import importlib
import json
import pathlib
import sys
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import jaxmerge as jm
from jaxmerge._kernels import _dispatch as dispatch
from jaxmerge._kernels.arg_specs import BYTES, LONG, VIT, Tokens, cases
from scripts.bench import device
from scripts.refusals import refusals

OPS = ("step", "match", "merge", "unmerge", "pack", "attend")
ROWS = 20_000
"""Tokens of a batch, if none is given: about what a training step holds."""


def main(
    *,
    ops: tuple[str, ...] = OPS,
    only: str = "",
    batch: int | None = None,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    tome: pathlib.Path | None = None,
    out: pathlib.Path = pathlib.Path("runs/bench"),
) -> None:
    """Time them and print a table.

    Args:
      ops: of step, match, merge, unmerge, pack, attend.
      only: a part of the model's name.
      batch: rows of the batch; about 20 000 tokens where left out.
      dtype: of tokens and metric.
      tome: a checkout of the official code, to run it in torch.
      out: directory for kernels.json.
    """
    out.mkdir(parents=True, exist_ok=True)
    console, kind = Console(width=140), jax.devices()[0].device_kind
    chip = device.ceilings()
    console.print(f"{kind}: copies {chip.bandwidth / 1e9:.0f} GB/s, multiplies {chip.rate / 1e12:.0f} TFLOP/s in bfloat16")
    table = Table(title=f"microseconds of one call, {dtype}")
    for column in ("op", "model", "batch", "kernel", "XLA", "XLA / kernel", "of copy", "of rate"):
        table.add_column(column, justify="left" if column in ("op", "model") else "right")
    rows = []
    for spec in (*VIT, *LONG, *BYTES):
        if only not in spec.name:
            continue
        size = batch or max(1, ROWS // spec.n)
        for op, (shapes, static) in cases(spec, size, jnp.dtype(dtype)).items():
            if op in ops:
                rows.append(measure(op, spec, shapes, static, chip))
                table.add_row(*described(rows[-1]))
                console.print(" ".join(described(rows[-1])))
    console.print(table)
    peers = torch_step(tome, [s for s in VIT if only in s.name], batch, dtype) if tome else []
    for peer in peers:
        ours = next((r["kernel"] for r in rows if r["op"] == "step" and r["model"] == peer["model"]), None)
        beside = "" if ours is None else f", {peer['seconds'] / ours:.1f} x the kernel's time"
        console.print(
            f"{peer['model']}, batch {peer['batch']}: ToMe in torch, {peer['how']}: {peer['seconds'] * 1e6:.1f} us{beside}"
        )
    found = dict(kind=kind, dtype=dtype, **chip._asdict(), rows=rows, peers=peers)
    (out / "kernels.json").write_text(json.dumps(found, indent=2))


def measure(op: str, spec: Tokens, shapes: list, static: dict, chip: device.Ceilings) -> dict[str, Any]:
    """One operation at one shape, by its kernel and by XLA; seconds, None where it cannot run."""
    moved, multiplied = work(op, shapes, static)
    row: dict[str, Any] = dict(op=op, model=spec.name, batch=shapes[0].shape[0], kernel=None, why="")
    row["key"] = dispatch.shape_key(shapes, **static)
    draw = functools.partial(argument, op, spec, static)
    for name in ("xla", next((k for k, p in dispatch.KERNELS.items() if p == jax.default_backend()), None)):
        if name is None or (name != "xla" and (why := dispatch.refusals(op, name, shapes, **static))):
            row["why"] = "no kernel" if name is None else "; ".join(why)
            continue
        folder = f"jaxmerge._kernels.{dispatch.FOLDERS[op]}"
        module = importlib.import_module(f"{folder}.{'ref' if name == 'xla' else name}")
        call = lambda *a, module=module: getattr(module, op)(*a, **static)
        row["xla" if name == "xla" else "kernel"] = device.seconds(call, shapes, draw=draw)
    if op == "attend" and jax.default_backend() == "gpu":
        flash = lambda qkv, *rest: jm.attention.packed_attention(qkv, rest[2], length=spec.n, implementation="cudnn")
        row["cudnn"] = device.seconds(flash, shapes, draw=draw)
    if row["kernel"]:
        row |= dict(of_copy=moved / row["kernel"] / chip.bandwidth, of_rate=multiplied / row["kernel"] / chip.rate)
    return row


def work(op: str, shapes: list, static: dict) -> tuple[float, float]:
    """The least bytes an operation moves, and the operations of its products."""
    size = lambda s: 0 if s is None else int(np.prod(s.shape)) * jnp.dtype(s.dtype).itemsize
    everything = sum(map(size, shapes))
    if op == "match":
        a, b = shapes[:2]
        batch, n, k = a.shape
        return everything + 8 * batch * n, 2.0 * batch * n * b.shape[1] * k
    row = lambda s: s.shape[0] * s.shape[2] * jnp.dtype(s.dtype).itemsize
    if op == "unmerge":
        return everything + row(shapes[1]) * shapes[0].shape[1], 0.0
    if op == "merge":
        return everything + row(shapes[1]) * static["m"], 0.0
    if op == "pack":
        return size(shapes[0]) + 2 * row(shapes[1]) * static["capacity"], 0.0
    if op == "attend":
        (batch, _, _, heads, f), n = shapes[0].shape, static["length"]
        return everything + size(shapes[0]) / 3, 4.0 * batch * heads * n * n * f
    metric, x = shapes[:2]
    batch, n, k = metric.shape
    return everything + row(x) * (n - static["r"]) + 4 * batch * (2 * n - static["r"]), 2.0 * batch * (n // 2) * (
        n - n // 2
    ) * k


def argument(op: str, spec: Tokens, static: dict, rng: np.random.Generator, shape: Any) -> jax.Array:
    """Normal tokens, small sizes; ids as Token Merging makes them, or runs of bytes as words do."""
    batch, n = shape.shape[0], spec.n
    if shape.dtype == jnp.int32 and spec in BYTES:
        return jnp.asarray(np.sort(rng.integers(0, n - spec.r, (batch, n)), axis=1), jnp.int32)
    if shape.dtype == jnp.int32:
        source = np.zeros((batch, n), bool)
        np.put_along_axis(source, 2 * np.argsort(rng.random((batch, n // 2)), axis=1)[:, : min(spec.r, n // 2)], True, axis=1)
        stay = np.cumsum(~source, axis=1) - 1
        to = np.take_along_axis(stay, 2 * rng.integers(0, n // 2, (batch, n)) + 1, axis=1)
        return jnp.asarray(np.where(source, to, stay), jnp.int32)
    if shape.dtype == bool:
        return jnp.asarray(np.argsort(rng.random((batch, n)), axis=1) < n - spec.r)
    return device.normal(rng, shape)


def described(row: dict[str, Any]) -> list[str]:
    us = lambda t: "-" if t is None else f"{t * 1e6:.1f}"
    if not row["kernel"]:
        return [row["op"], row["model"], str(row["batch"]), row["why"][:40], us(row["xla"]), "", "", ""]
    shares = [f"{row['of_copy']:.0%}", f"{row['of_rate']:.0%}" if row["of_rate"] else ""]
    ratio = f"{row['xla'] / row['kernel']:.1f}"
    if "cudnn" in row:
        ratio += f" (cuDNN {us(row['cudnn'])})"
    return [row["op"], row["model"], str(row["batch"]), us(row["kernel"]), us(row["xla"]), ratio, *shares]


def torch_step(checkout: pathlib.Path, specs: list[Tokens], batch: int | None, dtype: str) -> list[dict[str, Any]]:
    """The official step in torch, on the same GPU: seconds of each way to run it."""
    torch: Any = importlib.import_module("torch")
    sys.path.insert(0, str(checkout / "tome"))
    official = importlib.import_module("merge")  # alone: the package around it wants timm
    kind = dict(device="cuda", dtype=getattr(torch, dtype))

    def step(metric, x, size, r, prefix):
        return official.merge_wavg(official.bipartite_soft_matching(metric, r, prefix > 0)[0], x, size)

    def clock(run, calls: int) -> float:
        times = []
        for _ in range(3):
            run()
        for _ in range(5):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(10):
                run()
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop) / 1e3 / 10 / calls)
        return float(np.median(times))

    def replayed(run):
        aside = torch.cuda.Stream()
        with torch.cuda.stream(aside):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    rows = []
    for s in specs:
        size = batch or max(1, ROWS // s.n)
        sets = [
            (
                torch.randn(size, s.n, s.k, **kind),
                torch.randn(size, s.n, s.d, **kind),
                torch.randint(1, 5, (size, s.n, 1)).to(**kind),
            )
            for _ in range(6)
        ]
        torch._dynamo.reset()
        ways: dict[str, Any] = {"eager": step, "torch.compile": torch.compile(step, dynamic=False)}
        for how, f in ways.items():
            run = lambda f=f, sets=sets, s=s: [f(*some, s.r, s.prefix) for some in sets]
            rows.append(dict(model=s.name, batch=size, how=how, seconds=clock(run, len(sets))))
            rows.append(dict(model=s.name, batch=size, how=f"{how}, CUDA graph", seconds=clock(replayed(run), len(sets))))
    return rows


if __name__ == "__main__":
    with refusals():
        tyro.cli(main, prog=f"python -m {__spec__.name}", description=__doc__)
