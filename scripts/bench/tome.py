"""Matching and merging against the official Token Merging in torch: the same arrays, one thread, one process, in turn.

    git clone https://github.com/facebookresearch/ToMe ../ToMe
    python -m scripts.bench.tome --tome ../ToMe --out runs/bench

Needs `pip install torch` and a C++ compiler for torch.compile; without --tome it times jaxmerge against the floor alone.
Before anything is timed both sides must put the same tokens together. Timed: from the metric, the tokens and their sizes to
the merged tokens and sizes (`bipartite_soft_matching` + `merge_wavg`; `bipartite_matching` + `merge`).

The floor is what one thread cannot beat without other arithmetic: the bytes that must move (metric, tokens and sizes in,
tokens and sizes out) at the speed of a copy of as many, plus the operations of the similarities at the speed of a large
matrix product, both timed in the same rounds. Nothing overlaps, because merging waits for the last similarity.

Writes tome.json and tome.png.
"""

import importlib.util
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import tyro
from rich.console import Console

from scripts.bench import meter
from scripts.refusals import refusals

Case = tuple[int, int, int, int, int]
CASES: tuple[Case, ...] = ((8, 197, 768, 64, 16), (8, 577, 1024, 64, 40), (1, 4096, 64, 64, 2048))
OURS, EAGER, COMPILED = "jaxmerge", "ToMe, eager", "ToMe, torch.compile"


def main(
    *,
    tome: pathlib.Path | None = None,
    out: pathlib.Path = pathlib.Path("runs/bench"),
    rounds: int = 25,
    cases: tuple[Case, ...] = CASES,
) -> None:
    """Time them, print a table per case, write the figures.

    Args:
      tome: a checkout of facebookresearch/ToMe.
      out: directory for tome.json and tome.png.
      rounds: how often everyone has a turn.
      cases: batch, tokens, features, features of the metric, r.
    """
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    console.print(f"one thread, on core {meter.pin()}")
    report, panels, floors = [], {}, {}
    for case in cases:
        rows, floor = measure(case, rounds, tome)
        batch, n, d, _, r = case
        title = f"({batch}, {n}, {d}), r = {r}"
        console.print(meter.table(f"{title}: milliseconds", rows, against=[name for name in (EAGER, COMPILED) if name in rows]))
        console.print(
            f"floor {floor['ms']:.2f} ms = {floor['bytes'] / 1e6:.1f} MB at {floor['bytes_per_second'] / 1e9:.1f} GB/s + "
            f"{floor['flops'] / 1e6:.0f} MFLOP at {floor['flops_per_second'] / 1e9:.0f} GFLOP/s; "
            f"jaxmerge takes {rows[OURS]['cpu_median'] / floor['ms']:.2f} times as long"
        )
        report.append(dict(case=case, rows=rows, floor=floor))
        panels[title], floors[title] = rows, floor["ms"]
    (out / "tome.json").write_text(json.dumps(dict(rounds=rounds, cases=report), indent=2))
    meter.picture(panels, out / "tome.png", floors=floors)
    console.print(f"wrote tome.json and tome.png to {out}")


def measure(case: Case, rounds: int, tome: pathlib.Path | None) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """The times of everyone on one case, and the floor."""
    batch, n, d, metric_d, r = case
    rng = np.random.default_rng(0)
    metric, x = (rng.standard_normal((batch, n, f), np.float32) for f in (metric_d, d))
    sizes = rng.integers(1, 5, (batch, n)).astype(np.float32)
    calls, groups, tokens = ours(metric, x, sizes, r)
    if tome is not None:
        theirs, their_groups, their_tokens = official(tome, metric, x, sizes, r)
        different = int((groups != their_groups).sum())
        if different:
            raise SystemExit(f"{different} of {groups.size} tokens have other company in {tome}: not the same work.")
        np.testing.assert_allclose(tokens, their_tokens, rtol=1e-4, atol=1e-5)
        calls |= theirs

    left = batch * (n - r)
    size = 4 * (metric.size + x.size + sizes.size + left * (d + 1))
    multiply, operations = meter.matmul()
    extra = {"copy": meter.copy(size), "matmul": multiply}
    times = meter.interleave(calls | extra, rounds)
    flops = 2 * batch * (n - n // 2) * (n // 2) * metric_d
    rate = dict(
        bytes_per_second=size / float(times["copy"][:, 0].min()),
        flops_per_second=operations / float(times["matmul"][:, 0].min()),
    )
    floor = dict(ms=1e3 * (size / rate["bytes_per_second"] + flops / rate["flops_per_second"]), bytes=size, flops=flops, **rate)
    return meter.summary({name: times[name] for name in calls}), floor


def ours(metric: Any, x: Any, sizes: Any, r: int) -> tuple[dict[str, Callable[[], object]], np.ndarray, np.ndarray]:
    """What to time; each token's group, named by its first position; each token's merged value."""
    import jax
    import jax.numpy as jnp

    import jaxmerge as jm

    @jax.jit
    def step(metric, x, sizes):
        plan = jm.tokens.bipartite_matching(metric, r)
        return plan, jm.merge(plan, x, weight=sizes), jm.merge(plan, sizes, reduce="sum")

    arrays = [jnp.asarray(a) for a in (metric, x, sizes)]
    plan, merged, _ = step(*arrays)
    return (
        {OURS: lambda: jax.block_until_ready(step(*arrays))},
        firsts(np.asarray(plan.segment_ids)),
        np.asarray(jm.unmerge(plan, merged)),
    )


def official(path: pathlib.Path, metric: Any, x: Any, sizes: Any, r: int) -> tuple[dict[str, Callable[[], object]], Any, Any]:
    """The same of the official code, eager and compiled."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(1)
    torch._dynamo.reset()  # one shape at a time, as one program of ours serves one shape
    code = load(path / "tome" / "merge.py")
    arrays = [torch.from_numpy(a) for a in (metric, x, sizes[..., None])]

    def step(metric, x, sizes):
        merge, _ = code.bipartite_soft_matching(metric, r)
        return code.merge_wavg(merge, x, sizes)

    def run(step):
        with torch.no_grad():
            return step(*arrays)

    merge, _ = code.bipartite_soft_matching(arrays[0], r)
    ids = code.merge_source(merge, arrays[1]).argmax(dim=1).numpy()
    merged = run(step)[0].numpy()
    compiled = torch.compile(step, dynamic=False)
    values = np.take_along_axis(merged, ids[..., None], axis=1)
    return {EAGER: lambda: run(step), COMPILED: lambda: run(compiled)}, firsts(ids), values


def firsts(ids: np.ndarray) -> np.ndarray:
    """Segment ids (batch, n) in any numbering, each as the first position that has it."""
    out = np.empty_like(ids)
    for row, to in zip(ids, out, strict=True):
        _, first, which = np.unique(row, return_index=True, return_inverse=True)
        to[:] = first[which]
    return out


def load(path: pathlib.Path) -> Any:
    """A peer's module from its file, without the package around it (which wants a certain timm)."""
    spec = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
    if spec is None or spec.loader is None or not path.exists():
        raise ValueError(f"{path} is not there; --tome wants a checkout of https://github.com/facebookresearch/ToMe.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # torch.compile looks for it there
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    with refusals():
        tyro.cli(main, prog=f"python -m {__spec__.name}", description=__doc__)
