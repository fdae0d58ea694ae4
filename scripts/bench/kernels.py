"""What the kernels take on the accelerator at hand: beside XLA, beside the chip's own limits, beside the official code.

    python -m scripts.bench.kernels --out runs/bench [--tome PATH]        PATH: a checkout of facebookresearch/ToMe
    python -m scripts.bench.kernels --quick --tome PATH                   a case or two of each operation, in minutes

Shapes are those of real models (jaxmerge/_kernels/arg_specs.py). Times are of one call among many in one program, on
arguments that are in no cache; on a GPU they are what the launches took on the chip. "of copy" is the least a call must move,
over its time, as a share of a large copy measured in the same run; "of rate" likewise its multiplications, as a share of a
large bfloat16 product's. Beside `attend`, attention of queries, keys and values in one product, and `attend_vjp`, forward
and back, cuDNN is given the bias in feature columns. With --tome, torch runs `bipartite_soft_matching` and `merge_wavg` on
the same GPU in the same run: eager, through torch.compile, and each replayed as a CUDA graph. Writes kernels.json, again
after every figure.
"""

import fcntl
import functools
import importlib
import pathlib
import sys
from collections.abc import Iterator
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

OPS = ("step", "match", "energy", "nearest_k", "nearest_ahead", "peaks", "merge", "unmerge", "pack", "attend", "attend_vjp")
QUICK = {
    "ViT-B/16@224": (64, ("step", "merge", "unmerge", "attend", "attend_vjp")),
    "ViT-B/16@384": (64, ("step", "merge", "unmerge", "attend", "attend_vjp")),
    "SD 64x64": (8, ("match", "merge", "unmerge", "energy", "nearest_k")),
    "video 8x196": (16, ("match", "nearest_k", "nearest_ahead", "peaks", "merge")),
    "SD 128x128": (1, ("match",)),
    "ByT5-small 1024": (20, ("pack",)),
}
"""Of --quick: rows of the batch and operations, the layers in order of what matters."""
ROWS = 20_000
"""Tokens of a batch, if none is given: about what a training step holds."""


def main(
    *,
    ops: tuple[str, ...] = OPS,
    only: str = "",
    batch: int | None = None,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    tome: pathlib.Path | None = None,
    quick: bool = False,
    out: pathlib.Path = pathlib.Path("runs/bench"),
) -> None:
    """Time them and print a table.

    Args:
      ops: of step, match, energy, nearest_k, nearest_ahead, peaks, merge, unmerge, pack, attend.
      only: a part of the model's name.
      batch: rows of the batch; about 20 000 tokens where left out.
      dtype: of tokens and metric.
      tome: a checkout of the official code, to run it in torch.
      quick: the layers, operations and batches of QUICK alone.
      out: directory for kernels.json.
    """
    out.mkdir(parents=True, exist_ok=True)
    console, kind = Console(width=140), jax.devices()[0].device_kind
    chip = device.ceilings()
    console.print(f"{kind}: copies {chip.bandwidth / 1e9:.0f} GB/s, multiplies {chip.rate / 1e12:.0f} TFLOP/s in bfloat16")
    table = Table(title=f"microseconds of one call, {dtype}")
    for column in ("op", "model", "batch", "kernel", "XLA", "XLA / kernel", "of copy", "of rate"):
        table.add_column(column, justify="left" if column in ("op", "model") else "right")
    found: dict[str, Any] = dict(kind=kind, dtype=dtype, **chip._asdict(), rows=[], peers=[])
    every = {spec.name: spec for spec in (*VIT, *LONG, *BYTES) if only in spec.name and (not quick or spec.name in QUICK)}
    for name in [name for name in QUICK if name in every] if quick else every:
        spec, (size, some) = every[name], QUICK[name] if quick else (max(1, ROWS // every[name].n), OPS)
        at = cases(spec, batch or size, jnp.dtype(dtype)).items()
        programs = {op: prepared(op, spec, *case) for op, case in at if op in ops and op in some}
        device.compile_all(one for ways, _ in programs.values() for one in ways.values())
        for op, case in at:
            if op in programs:
                found["rows"].append(measure(op, spec, *case, chip=chip, ways=programs[op][0], why=programs[op][1]))
                device.write(out / "kernels.json", found)
                table.add_row(*described(found["rows"][-1]))
                console.print(" ".join(described(found["rows"][-1])))
    console.print(table)
    for peer in torch_step(tome, [s for s in VIT if s.name in every], batch, dtype, quick) if tome else ():
        found["peers"].append(peer)
        device.write(out / "kernels.json", found)
        same = lambda r, peer=peer: (r["op"], r["model"], r["batch"]) == ("step", peer["model"], peer["batch"])
        ours = next((r["kernel"] for r in found["rows"] if same(r)), None)
        beside = "" if ours is None else f", {peer['seconds'] / ours:.1f} x the kernel's time"
        console.print(
            f"{peer['model']}, batch {peer['batch']}: ToMe in torch, {peer['how']}: {peer['seconds'] * 1e6:.1f} us{beside}"
        )


def prepared(op: str, spec: Tokens, shapes: list, static: dict) -> tuple[dict[str, device.Program], str]:
    """What there is to time, lowered, and why a kernel is not among it."""
    draw, ways, why = functools.partial(argument, op, spec, static), {}, ""
    for name in ("xla", next((k for k, p in dispatch.KERNELS.items() if p == jax.default_backend()), None)):
        if name is None or (name != "xla" and dispatch.refusals(op, name, shapes, **static)):
            why = "no kernel" if name is None else "; ".join(dispatch.refusals(op, name, shapes, **static))
            continue
        module = dispatch.implementation(op, "ref" if name == "xla" else name)
        call = lambda *a, module=module: getattr(module, op)(*a, **static)
        ways["xla" if name == "xla" else "kernel"] = device.Program(call, shapes, draw=draw)
    if op in ("attend", "attend_vjp") and jax.default_backend() == "gpu":
        more: Any = dict(length=spec.n, mean_keys=static.get("mean_keys", False), implementation="cudnn")
        flash: Any = lambda qkv, *rest: jm.attention.packed_attention(qkv, rest[2], offset=rest[3][0], **more)
        if op == "attend_vjp":
            back = lambda qkv, *rest: jax.vjp(lambda qkv: flash(qkv, *rest), qkv)[1](rest[4])[0]
            ways["cudnn"] = device.Program(back, shapes, draw=draw)
        else:
            ways["cudnn"] = device.Program(flash, shapes, draw=draw)
    return ways, why


def measure(
    op: str, spec: Tokens, shapes: list, static: dict, *, chip: device.Ceilings, ways: dict[str, device.Program], why: str
) -> dict[str, Any]:
    """One operation at one shape, each way; seconds, None where it cannot run."""
    moved, multiplied = work(op, shapes, static)
    row: dict[str, Any] = dict(op=op, model=spec.name, batch=shapes[0].shape[0], kernel=None, xla=None, why=why)
    row["key"] = dispatch.shape_key(shapes, **static)
    for name, program in ways.items():
        try:
            row[name] = program.seconds()
        except jax.errors.JaxRuntimeError as e:  # it does not fit: the others are timed all the same
            row["why"] += f"{name}: {device.first_line(e)}"
    if row["kernel"]:
        row |= dict(of_copy=moved / row["kernel"] / chip.bandwidth, of_rate=multiplied / row["kernel"] / chip.rate)
    return row


def work(op: str, shapes: list, static: dict) -> tuple[float, float]:
    """The least bytes an operation moves, and the operations of its products."""
    size = lambda s: 0 if s is None else int(np.prod(s.shape)) * jnp.dtype(s.dtype).itemsize
    everything = sum(map(size, shapes))
    if op == "peaks":  # every product twice
        batch, n, k = shapes[0].shape
        return everything + 4 * batch * n, 4.0 * batch * n * n * k
    if op in ("match", "energy", "nearest_k", "nearest_ahead"):
        a, b = shapes[:2]
        batch, n, k = a.shape
        found = {"match": 2, "energy": 1, "nearest_ahead": 5}.get(op, static.get("count", 0))
        return (everything if op == "match" else size(a)) + 4 * batch * n * found, 2.0 * batch * n * b.shape[1] * k
    row = lambda s: s.shape[0] * s.shape[2] * jnp.dtype(s.dtype).itemsize
    if op == "unmerge":
        return everything + row(shapes[1]) * shapes[0].shape[1], 0.0
    if op == "merge":
        return everything + row(shapes[1]) * static["m"], 0.0
    if op == "pack":
        return size(shapes[0]) + 2 * row(shapes[1]) * static["capacity"], 0.0
    if op == "attend":
        (batch, _, _, heads, f), n = shapes[0].shape, static["length"]
        return everything + size(shapes[0]) / 3 * (1 + static["mean_keys"] / heads), 4.0 * batch * heads * n * n * f
    if op == "attend_vjp":  # scores once more, and four other products
        (batch, _, _, heads, f), n = shapes[0].shape, static["length"]
        return everything + size(shapes[0]), 10.0 * batch * heads * n * n * f
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
    """The table's line."""
    us = lambda t: "-" if t is None else f"{t * 1e6:.1f}"
    if not row["kernel"]:
        return [row["op"], row["model"], str(row["batch"]), row["why"][:40], us(row["xla"]), "", "", ""]
    shares = [f"{row['of_copy']:.0%}", f"{row['of_rate']:.0%}" if row["of_rate"] else ""]
    ratio = f"{row['xla'] / row['kernel']:.1f}" if row["xla"] else ""
    if row.get("cudnn"):
        ratio += f" (cuDNN {us(row['cudnn'])})"
    return [row["op"], row["model"], str(row["batch"]), us(row["kernel"]), us(row["xla"]), ratio, *shares]


def torch_step(
    checkout: pathlib.Path, specs: list[Tokens], batch: int | None, dtype: str, quick: bool = False
) -> Iterator[dict[str, Any]]:
    """The official step in torch, on the same GPU: seconds of each way to run it, eager ones first."""
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
        with device.turn(fcntl.LOCK_EX):
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

    for how, f in {"eager": step, "torch.compile": torch.compile(step, dynamic=False)}.items():
        for s in specs:
            size = batch or (QUICK[s.name][0] if quick else max(1, ROWS // s.n))
            sets = [
                (
                    torch.randn(size, s.n, s.k, **kind),
                    torch.randn(size, s.n, s.d, **kind),
                    torch.randint(1, 5, (size, s.n, 1)).to(**kind),
                )
                for _ in range(6)
            ]
            torch._dynamo.reset()
            run = lambda f=f, sets=sets, s=s: [f(*some, s.r, s.prefix) for some in sets]
            yield dict(model=s.name, batch=size, how=how, seconds=clock(run, len(sets)))
            yield dict(model=s.name, batch=size, how=f"{how}, CUDA graph", seconds=clock(replayed(run), len(sets)))


if __name__ == "__main__":
    with refusals():
        tyro.cli(main, prog=f"python -m {__spec__.name}", description=__doc__)
