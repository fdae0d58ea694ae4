"""The same methods as OpenToMe has them, on the same arrays: one thread, one process, in turn; and what each library has.

    git clone https://github.com/Westlake-AI/OpenToMe ../OpenToMe
    python -m scripts.bench.opentome --opentome ../OpenToMe --out runs/bench

Needs what `opentome.tome` imports: torch, scikit-learn, packaging. OpenToMe runs eagerly, as it is written; nothing in its
`tome` or `timm` calls torch.compile. A method is timed from its inputs to the merged tokens and sizes, and both sides must
put the same tokens together. Writes opentome.json.

What each has (OpenToMe at 4b791cb, read in its code and run):

|                          | jaxmerge                                  | OpenToMe                                            |
|--------------------------|-------------------------------------------|-----------------------------------------------------|
| what a method returns    | a plan: data, a pytree                    | closures; in places a token map                     |
| matching                 | ToMe, and what `jaxmerge.tokens` lists    | ToMe, k-th, random, local, PiToMe, MCTF, CrossGET   |
| other                    | pruning, nearest, and what `tokens` lists | DiffRate, ATC (scikit-learn, on the CPU), DCT, FPET |
| patched models           | its own ViT                               | timm blocks: those above, ToFu, DTEM                |
| order of the tokens      | kept                                      | [stayed, received]; PiToMe by energy                |
| unmerge                  | every plan                                | ToMe's family; None for PiToMe, CrossGET and ATC    |
| unmerge(merge(x)), twins | x                                         | not x in `bipartite_soft_matching`                  |
| composition of steps     | `compose`                                 | source matrix or token map                          |
| compiled whole           | jit, static shapes                        | eager                                               |
| gradients                | tokens, weights, soft plans; tested       | autograd; DiffRate's rates, DTEM and FPET learn     |
| vmap, scan               | tested                                    | -                                                   |
| sharding                 | any mesh, no collectives, tested          | data-parallel training scripts                      |
| tests of the methods     | laws, official vectors                    | none in `test/`                                     |
"""

import importlib
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

import jaxmerge as jm
from scripts.bench import meter
from scripts.bench.tome import Case, firsts
from scripts.refusals import refusals

CASES: tuple[Case, ...] = ((8, 197, 768, 64, 16), (8, 577, 1024, 64, 40))
METHODS = ("ToMe", "PiToMe", "DiffRate's merge")


def main(
    *,
    opentome: pathlib.Path | None = None,
    out: pathlib.Path = pathlib.Path("runs/bench"),
    rounds: int = 15,
    cases: tuple[Case, ...] = CASES,
) -> None:
    """Time every method on both sides and print a table per case.

    Args:
      opentome: a checkout of Westlake-AI/OpenToMe; without it only ours are timed.
      out: directory for opentome.json.
      rounds: how often everyone has a turn.
      cases: batch, tokens, features, features of the metric, r.
    """
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    console.print(f"one thread, on core {meter.pin()}")
    report = []
    for case in cases:
        rows = measure(case, rounds, opentome)
        batch, n, d, _, r = case
        console.print(meter.table(f"({batch}, {n}, {d}), r = {r}: milliseconds", rows, against=[]))
        for method in METHODS if opentome else ():
            ratio = rows[f"OpenToMe, {method}"]["cpu_median"] / rows[f"jaxmerge, {method}"]["cpu_median"]
            console.print(f"{method}: OpenToMe takes {ratio:.2f} times as long as jaxmerge")
        report.append(dict(case=case, rows=rows))
    (out / "opentome.json").write_text(json.dumps(dict(rounds=rounds, cases=report), indent=2))
    console.print(f"wrote opentome.json to {out}")


def measure(case: Case, rounds: int, opentome: pathlib.Path | None) -> dict[str, dict[str, float]]:
    """The times of every method on both sides."""
    batch, n, d, metric_d, r = case
    rng = np.random.default_rng(0)
    metric, x = (rng.standard_normal((batch, n, f), np.float32) for f in (metric_d, d))
    sizes = rng.integers(1, 5, (batch, n)).astype(np.float32)
    calls, groups = {}, {}
    for side, both in (("jaxmerge", ours), *([("OpenToMe", lambda *a: theirs(opentome, *a))] if opentome else ())):
        for method, (call, ids) in both(metric, x, sizes, r).items():
            calls[f"{side}, {method}"] = call
            other = groups.setdefault(method, firsts(ids))
            if (other != firsts(ids)).any():
                raise SystemExit(f"{method}: the two sides put different tokens together, which is not the same work.")
    return meter.summary(meter.interleave(calls, rounds))


def ours(metric: Any, x: Any, sizes: Any, r: int) -> dict[str, tuple[Callable[[], object], np.ndarray]]:
    """Method to what is timed, and to the segment of each token."""

    def tome(metric: jax.Array) -> jm.Plan:
        return jm.tokens.bipartite_matching(metric, r)

    def pitome(metric: jax.Array) -> jm.Plan:
        return jm.tokens.energy_matching(metric, r, margin=0.5)

    def diffrate(metric: jax.Array) -> jm.Plan:
        """Tokens come sorted by importance: the last r each join the one before them that they are most like."""
        kept = metric.shape[1] - r
        near = jm.tokens.nearest(metric[:, kept:], metric[:, :kept])
        here = jnp.broadcast_to(jnp.arange(kept, dtype=jnp.int32), (len(metric), kept))
        return jm.Plan(jnp.concatenate([here, near.index], axis=1), kept)

    arrays = [jnp.asarray(a) for a in (metric, x, sizes)]

    def timed(planner: Callable[[jax.Array], jm.Plan]) -> tuple[Callable[[], object], np.ndarray]:
        @jax.jit
        def step(metric, x, sizes):
            plan = planner(metric)
            return plan, jm.merge(plan, x, weight=sizes), jm.merge(plan, sizes, reduce="sum")

        return lambda: jax.block_until_ready(step(*arrays)), np.asarray(step(*arrays)[0].segment_ids)

    return dict(zip(METHODS, map(timed, (tome, pitome, diffrate)), strict=True))


def theirs(path: pathlib.Path, metric: Any, x: Any, sizes: Any, r: int) -> dict[str, tuple[Callable[[], object], np.ndarray]]:
    """The same of OpenToMe."""
    if not (path / "opentome").is_dir():
        raise ValueError(f"{path} is not there; --opentome wants a checkout of https://github.com/Westlake-AI/OpenToMe.")
    sys.path.insert(0, str(path))
    code, pitome, diffrate = (importlib.import_module(f"opentome.tome.{name}") for name in ("tome", "pitome", "diffrate"))
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(1)
    metric, x, sizes = (torch.from_numpy(a) for a in (metric, x, sizes[..., None]))
    kept = x.shape[1] - r
    matchings = (
        lambda: code.bipartite_soft_matching(metric, r)[0],
        lambda: pitome.pitome_vision(metric, r, margin=0.5)[0],
        lambda: diffrate.get_merge_func(metric, kept, class_token=False)[0],
    )

    def timed(matching: Callable[[], Any]) -> tuple[Callable[[], object], np.ndarray]:
        def step():
            with torch.no_grad():
                return code.merge_wavg(matching(), x, sizes)

        return step, code.merge_source_matrix(matching(), x).argmax(dim=1).numpy()

    return dict(zip(METHODS, map(timed, matchings), strict=True))


if __name__ == "__main__":
    with refusals():
        tyro.cli(main, prog=f"python -m {__spec__.name}", description=__doc__)
