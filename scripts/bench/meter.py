"""One thread, many rounds, everybody in turn: processor seconds and wall, beside what the machine can do at that moment."""

import os
import pathlib
import time
from collections.abc import Callable, Sequence

import numpy as np
from rich.table import Table


def pin() -> int:
    """Bind this process to one core, before JAX starts and sizes its pool by it; returns the core."""
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    return core


def interleave(
    calls: dict[str, Callable[[], object]],
    rounds: int,
    *,
    warm: int = 2,
    before: dict[str, Callable[[], None]] | None = None,
) -> dict[str, np.ndarray]:
    """Time every call once per round, in turn, and another one first each round, so that noise falls on all alike.

    Args:
      calls: name to a function that returns when its work is done.
      rounds: 5 or more for figures that are reported.
      warm: calls of each beforehand, to compile and to touch the memory.
      before: name to what must be done before each call, and is not timed.

    Returns:
      Name to (rounds, 2): seconds of processor time and of wall time.
    """
    prepare = {name: (before or {}).get(name, lambda: None) for name in calls}
    for name, call in calls.items():
        for _ in range(warm):
            prepare[name]()
            call()
    times = {name: np.empty((rounds, 2)) for name in calls}
    names = list(calls)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            prepare[name]()
            wall, processor = time.perf_counter(), time.process_time()
            calls[name]()
            times[name][i] = time.process_time() - processor, time.perf_counter() - wall
    return times


def copy(size: int) -> Callable[[], object]:
    """A call that moves `size` bytes: reads half of them and writes the other half, into memory that is there already."""
    source, target = np.ones(size // 8, np.float32), np.zeros(size // 8, np.float32)
    return lambda: np.copyto(target, source)


def accumulate(size: int, arrays: int) -> Callable[[], object]:
    """A call that moves `size` bytes with XLA: adds up so many arrays into the first of them, whose memory is donated."""
    import jax
    import jax.numpy as jnp

    add = jax.jit(lambda first, *rest: sum(rest, first), donate_argnums=0)
    first, *rest = (jnp.full(size // (4 * (arrays + 1)), value, jnp.float32) for value in (1, *(0,) * (arrays - 1)))
    memory = [first]

    def call() -> None:
        memory.append(jax.block_until_ready(add(memory.pop(), *rest)))

    return call


def matmul(side: int = 768) -> tuple[Callable[[], object], int]:
    """A call that multiplies two square matrices with JAX, and its floating-point operations."""
    import jax
    import jax.numpy as jnp

    a = jnp.asarray(np.random.default_rng(0).standard_normal((side, side)), jnp.float32)
    multiply = jax.jit(lambda a: jnp.matmul(a, a, precision="highest"))
    return lambda: jax.block_until_ready(multiply(a)), 2 * side**3


def summary(times: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Name to milliseconds: processor and wall, median and extremes."""
    return {
        name: {
            f"{clock}_{which}": float(f(t[:, i]) * 1e3)
            for i, clock in enumerate(("cpu", "wall"))
            for which, f in (("median", np.median), ("min", np.min), ("max", np.max))
        }
        for name, t in times.items()
    }


def table(title: str, rows: dict[str, dict[str, float]], *, against: Sequence[str]) -> Table:
    """Milliseconds of processor and wall time, and how many times the median of each of `against` goes into each row's."""
    out = Table(title=title)
    out.add_column("", no_wrap=True)
    for column in ("CPU median", "min", "max", "wall median", "min", "max", *(f"{name} / this" for name in against)):
        out.add_column(column, justify="right")
    for name, row in rows.items():
        figures = [f"{row[f'{c}_{w}']:.2f}" for c in ("cpu", "wall") for w in ("median", "min", "max")]
        out.add_row(name, *figures, *(f"{rows[a]['cpu_median'] / row['cpu_median']:.2f} x" for a in against))
    return out


def picture(panels: dict[str, dict[str, dict[str, float]]], path: pathlib.Path, *, floors: dict[str, float]) -> None:
    """One panel per case: a bar to the median of the processor time, a line from minimum to maximum, dashes at the floor."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(panels), 3.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (title, rows) in zip(np.ravel(figure.subplots(1, len(panels))), panels.items(), strict=True):
        middle = [row["cpu_median"] for row in rows.values()]
        low, high = ([row[f"cpu_{w}"] for row in rows.values()] for w in ("min", "max"))
        colours = ["#0072b2" if name.startswith("jaxmerge") else "#bbbbbb" for name in rows]
        axis.bar(list(rows), middle, color=colours)
        axis.vlines(range(len(rows)), low, high, color="black", linewidth=1)
        axis.set_ylim(0, 1.4 * max(middle))
        if title in floors:
            axis.axhline(floors[title], color="#d55e00", linestyle="--", linewidth=1)
            axis.text(len(rows) - 0.5, floors[title], "floor", color="#d55e00", ha="right", va="bottom", fontsize=8)
        axis.set_title(title, fontsize=8)
        axis.set_ylabel("milliseconds of processor time", fontsize=8)
        axis.tick_params(labelsize=8)
    figure.savefig(path)
