"""Merges of models against mergekit's kernels and against the bytes that must move: one thread, one process, in turn.

    pip install torch mergekit==0.1.5
    python -m scripts.bench.params --out runs/bench
    python -m scripts.bench.params --out runs/bench --dtype bfloat16

Without mergekit ours is timed against the floor alone. Both sides get the same tensors, in memory, and compute in float32;
ours is one jitted program, its first input donated; mergekit's method is called on a list of tensor groups, as its merges do.
Most of what is left to either side is the kernel's page faults; GLIBC_TUNABLES=glibc.malloc.hugetlb=1 spares both many of them.
XLA uses half of a register of 512 bits; with XLA_FLAGS=--xla_cpu_prefer_vector_width=512 ours takes 3 to 18 % less.
Before anything is timed the two results are compared, where nothing is random. mergekit keeps any of the entries that tie
at a threshold, and takes arcee_fusion's quartiles from a sample where a tensor has more than 10^6 entries: a few entries may
differ there, and the table says how many; and in arcee_fusion's divergence of a row, of which 32 bits keep one digit or two.

The floor is the bytes of all inputs and of the output, in their dtype, at the better of two speeds in the same rounds: that of
numpy's copy, and that of one XLA loop which reads as many arrays as the merge and writes one over the first. Inputs count twice
where a norm or a threshold must be known before the first entry is merged. These models fit the last-level cache of a large
server (84 MB, float32, with three beside the base): there the floor is that of the cache.
Throughput counts entries of the output times models (beside a base). Writes params.json and params.png.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from scripts.bench import meter
from scripts.refusals import refusals

Shape = tuple[int, ...]
Tensors = dict[str, np.ndarray]
LLAMA: dict[str, Shape] = {"attention/kernel": (1024, 1024), "mlp/kernel": (4096, 1024), "norm/scale": (1024,)}
SQUARE: dict[str, Shape] = {"attention/kernel": (512, 512), "norm/scale": (512,)}
MILLION: dict[str, Shape] = {"attention/kernel": (960, 1024), "norm/scale": (1024,)}
OURS, PEER, COPY, SUM = "jaxmerge", "mergekit", "copy", "sum"


class Case(NamedTuple):
    """A method on both sides.

    Attributes:
      ours: (params, the models' shapes) -> transform.
      peer: mergekit's name and its parameters that have no default; None where it lacks the method.
      models: how many, beside the base.
      base: task vectors against a base; the base is the first model; or there is none.
      random: the masks are drawn, and mergekit draws others.
      rounding: relative; of sums over millions of entries mergekit loses 2e-4 in multislerp and 5e-5 in nuslerp, jaxmerge
        4e-7 and 9e-8 (against float64).
      shapes: of the leaves; small matrices for what factors them.
    """

    ours: Callable[[Any, dict[str, Shape]], Any]
    peer: tuple[str, dict[str, Any]] | None = None
    models: int = 3
    base: Literal["base", "first", "none"] = "base"
    random: bool = False
    rounding: float = 2e-5
    shapes: dict[str, Shape] = LLAMA


EACH = {"weight": 1.0}
CASES = {
    "linear": Case(lambda p, _: p.linear(), ("linear", EACH), base="none"),
    "task_arithmetic": Case(lambda p, _: p.task_arithmetic(), ("task_arithmetic", EACH)),
    "ties": Case(lambda p, _: p.ties(0.5, scope="tensor"), ("ties", EACH | {"density": 0.5})),
    "dare_linear": Case(
        lambda p, _: p.dare_linear(0.5, seed=0, rescale="l1"), ("dare_linear", EACH | {"density": 0.5}), random=True
    ),
    "dare_ties": Case(lambda p, _: p.dare_ties(0.5, seed=0, rescale="l1"), ("dare_ties", EACH | {"density": 0.5}), random=True),
    "breadcrumbs": Case(lambda p, _: p.breadcrumbs(0.9, 0.01), ("breadcrumbs", EACH | {"density": 0.9})),
    "breadcrumbs_ties": Case(lambda p, _: p.breadcrumbs_ties(0.9, 0.01), ("breadcrumbs_ties", EACH | {"density": 0.9})),
    "della": Case(lambda p, _: p.della(0.5, 0.15, seed=0, rescale="l1"), ("della", EACH | {"density": 0.5}), random=True),
    "della_linear": Case(
        lambda p, _: p.della_linear(0.5, 0.15, seed=0, rescale="l1"), ("della_linear", EACH | {"density": 0.5}), random=True
    ),
    "sce": Case(lambda p, _: p.sce(0.5, mask="delta", floor=1e-6), ("sce", {"select_topk": 0.5})),
    "model_stock": Case(lambda p, _: p.model_stock(floor=1e-6), ("model_stock", {})),
    "slerp": Case(lambda p, _: p.slerp(0.5), ("slerp", {"t": 0.5}), models=1, base="first"),
    "nuslerp": Case(lambda p, _: p.nuslerp(), ("nuslerp", EACH), models=2, base="none", rounding=1e-4),
    "multislerp": Case(lambda p, _: p.multislerp(), ("multislerp", EACH), base="none", rounding=1e-3),
    "karcher": Case(lambda p, _: p.karcher(), ("karcher", {}), base="none", rounding=1e-3),
    "arcee_fusion": Case(lambda p, _: p.arcee_fusion(), ("arcee_fusion", {}), models=1, base="first"),
    "arcee_fusion, sampled": Case(lambda p, _: p.arcee_fusion(sample=10**6), ("arcee_fusion", {}), models=1, base="first"),
    "arcee_fusion, under 10^6 entries": Case(
        lambda p, _: p.arcee_fusion(), ("arcee_fusion", {}), models=1, base="first", shapes=MILLION
    ),
    "nearswap": Case(lambda p, _: p.nearswap(0.001), ("nearswap", {"t": 0.001}), models=1),
    "ram": Case(lambda p, _: p.ram(), ("ram", {})),
    "ramplus_tl": Case(lambda p, _: p.ramplus_tl(), ("ramplus_tl", {})),
    "passthrough": Case(lambda p, _: p.passthrough(), ("passthrough", {}), models=1, base="none"),
    "ties, whole model": Case(lambda p, _: p.ties(0.2)),
    "breadcrumbs, whole model": Case(lambda p, _: p.breadcrumbs(0.9, 0.01, scope="model")),
    "dare_linear, 1 / p": Case(lambda p, _: p.dare_linear(0.5, seed=0)),
    "della, 1 / p": Case(lambda p, _: p.della(0.5, 0.15, seed=0)),
    "magmax": Case(lambda p, _: p.magmax()),
    "varm": Case(lambda p, _: p.varm()),
    "elect_largest (EMR)": Case(lambda p, _: p.elect_largest()),
    "consensus": Case(lambda p, _: p.consensus()),
    "pcb": Case(lambda p, _: p.pcb()),
    "widen": Case(lambda p, _: p.widen(), base="first"),
    "fisher": Case(lambda p, shapes: p.fisher([{n: np.ones(s, np.float32) for n, s in shapes.items()}] * 3)),
    "regmean": Case(lambda p, shapes: p.regmean([_gram(shapes)] * 3, axis=1), shapes=SQUARE),
    "tsvm": Case(lambda p, _: p.tsvm(), shapes=SQUARE),
    "iso_c": Case(lambda p, _: p.iso_c(), shapes=SQUARE),
    "iso_cts": Case(lambda p, _: p.iso_cts(), shapes=SQUARE),
    "knots, ties": Case(lambda p, _: p.knots(p.ties(0.5, scope="tensor")), shapes=SQUARE),
    "wudi, 10 steps": Case(lambda p, _: p.wudi(steps=10), shapes=SQUARE),
}


def main(
    *,
    out: pathlib.Path = pathlib.Path("runs/bench"),
    rounds: int = 7,
    dtype: Literal["float32", "bfloat16"] = "float32",
    methods: tuple[str, ...] = tuple(CASES),
) -> None:
    """Time them, print one table, write the figures.

    Args:
      out: directory for params.json and params.png (params_bfloat16.json, ... for the other dtype).
      rounds: how often everyone has a turn.
      dtype: of the models.
      methods: which ones; all by default.
    """
    unknown = sorted(set(methods) - set(CASES))
    if unknown:
        raise ValueError(f"--methods has {unknown}; there are {sorted(CASES)}.")
    out.mkdir(parents=True, exist_ok=True)
    console = Console(width=140)
    console.print(f"one thread, on core {meter.pin()}, {dtype}")
    table = Table(title="processor time, medians")
    table.add_column("", no_wrap=True)
    columns = (
        "ms",
        "min",
        "max",
        "M entries/s",
        "share of floor",
        "GB/s of floor",
        "mergekit ms",
        "mergekit / jaxmerge",
        "differ",
    )
    for column in columns:
        table.add_column(column, justify="right")
    report, panels, floors = {}, {}, {}
    for name in methods:
        row = report[name] = measure(CASES[name], dtype, rounds)
        console.print(f"{name}: {row['times'][OURS]['cpu_median']:.1f} ms, {row['share_of_floor']:.0%} of the floor")
        ours, peer = row["times"][OURS], row["times"].get(PEER)
        table.add_row(
            name,
            *(f"{ours[f'cpu_{which}']:.1f}" for which in ("median", "min", "max")),
            f"{row['entries_per_second'] / 1e6:.0f}",
            f"{row['share_of_floor']:.0%}",
            f"{row['bytes_per_second'] / 1e9:.1f}",
            *((f"{peer['cpu_median']:.1f}", f"{row['ratio']:.1f}", row["differ"]) if peer else ("", "", "")),
        )
        if peer:
            panels[name], floors[name] = row["times"], row["floor_ms"]
    console.print(table)
    stem = "params" if dtype == "float32" else f"params_{dtype}"
    (out / f"{stem}.json").write_text(json.dumps(dict(rounds=rounds, dtype=dtype, methods=report), indent=2))
    if panels:
        meter.picture(panels, out / f"{stem}.png", floors=floors)
    console.print(f"wrote to {out}")


def measure(case: Case, dtype: str, rounds: int) -> dict[str, Any]:
    """The times of both sides on one method, and of the bytes that must move."""
    base, models = draw(case.shapes, case.models)
    size = sum(x.size for x in base.values())
    inputs = case.models + (case.base != "none")
    call, before, merged, looks = ours(case, base, models, dtype)
    moved = size * (looks * inputs + 1) * (4 if dtype == "float32" else 2)
    calls: dict[str, Callable[[], object]] = {OURS: call}
    differ = ""
    if case.peer is not None and (peer := mergekit(case, base, models, dtype)) is not None:
        calls[PEER], theirs = peer
        differ = "" if case.random else compare(merged, theirs, case.rounding if dtype == "float32" else 2**-7)
    floors = {COPY: meter.copy(moved)}
    if inputs > 1:  # one array added up in place is no work
        floors[SUM] = meter.accumulate(moved, inputs)
    times = meter.interleave(calls | floors, rounds, warm=1, before={OURS: before})
    rows = meter.summary({name: times[name] for name in calls})
    rate = moved / min(float(np.median(times[name][:, 0])) for name in floors)
    seconds = rows[OURS]["cpu_median"] / 1e3
    return dict(
        times=rows,
        bytes=moved,
        bytes_per_second=rate,
        floor_ms=1e3 * moved / rate,
        share_of_floor=moved / rate / seconds,
        entries_per_second=size * case.models / seconds,
        differ=differ,
        **({"ratio": rows[PEER]["cpu_median"] / rows[OURS]["cpu_median"]} if PEER in rows else {}),
    )


def draw(shapes: dict[str, Shape], models: int) -> tuple[Tensors, list[Tensors]]:
    """A base of entries of 0.02, and models that differ from it by 0.002."""
    rng = np.random.default_rng(0)
    normal = lambda scale: {n: rng.standard_normal(s, np.float32) * np.float32(scale) for n, s in shapes.items()}
    base = normal(0.02)
    return base, [{n: base[n] + d for n, d in normal(0.002).items()} for _ in range(models)]


def ours(
    case: Case, base: Tensors, models: list[Tensors], dtype: str
) -> tuple[Callable[[], object], Callable[[], None], Tensors, int]:
    """What to time, what to do before each time (the input that is donated must be there again), the result, and how often the
    inputs must be read."""
    import jax
    import jax.numpy as jnp

    from jaxmerge import params

    tx = case.ours(params, {n: x.shape for n, x in base.items()})
    put = lambda tree: jax.block_until_ready({n: jnp.array(x, dtype) for n, x in tree.items()})
    first, *rest = [base, *models] if case.base != "none" else models
    rest = [put(m) for m in rest]

    def step(first, rest):
        if case.base == "base":
            return params.merge(tx, first, rest)
        return params.merge(tx, None, [first, *rest])

    program = jax.jit(step, donate_argnums=0)
    donated = {}

    def before() -> None:
        donated["first"] = put(first)

    before()
    merged = {n: np.asarray(x, np.float32) for n, x in program(donated.pop("first"), rest).items()}
    looks = 2 if any(need.statistic in ("sum", "order") for need in params.needs(tx)) else 1
    return lambda: jax.block_until_ready(program(donated.pop("first"), rest)), before, merged, looks


def mergekit(case: Case, base: Tensors, models: list[Tensors], dtype: str) -> tuple[Callable[[], object], Tensors] | None:
    """The same of mergekit; None where it is not installed."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
        from mergekit import merge_methods  # pyright: ignore[reportMissingImports]
        from mergekit.merge_methods.base import TensorGroup  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    torch.set_num_threads(1)
    method, parameters = case.peer  # type: ignore[misc]
    everyone = [base, *models] if case.base != "none" else models
    index = 0 if case.base != "none" else None
    tensor = lambda x: torch.from_numpy(x).to(getattr(torch, dtype))
    groups = [TensorGroup.from_tensors([tensor(m[n]) for m in everyone], base_index=index, name=n) for n in base]

    def run():
        with torch.no_grad():
            return merge_methods.get(method)(
                groups, parameters=parameters, dtype=torch.float32, out_dtype=getattr(torch, dtype)
            )

    return run, {n: x.float().numpy() for n, x in zip(base, run(), strict=True)}


def compare(a: Tensors, b: Tensors, rtol: float) -> str:
    """How many entries differ by more than rounding; more than 5 in 100 is other work."""
    wrong = sum(int((~np.isclose(a[n], b[n], rtol=rtol, atol=2e-6)).sum()) for n in a)
    size = sum(x.size for x in a.values())
    if wrong > size // 20:
        raise SystemExit(f"{wrong} of {size} entries differ from mergekit's: not the same work.")
    return f"{wrong} of {size / 1e6:.1f} M"


def _gram(shapes: dict[str, Shape]) -> Tensors:
    """What regmean wants of each matrix, outputs by inputs, here without data behind it."""
    return {n: np.eye(s[1], dtype=np.float32) + np.float32(0.1) for n, s in shapes.items() if len(s) > 1}


if __name__ == "__main__":
    with refusals():
        tyro.cli(main, prog=f"python -m {__spec__.name}", description=__doc__)
