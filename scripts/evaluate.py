"""Held-out bits per hidden byte of any number of checkpoints, by domain of the text, deletion soft and hard, in one table.

    python -m scripts.evaluate --out runs/quickstart --checkpoints base=runs/quickstart/base ties=runs/quickstart/ties

Text and windows are those of training (OUT/data.json). Two programs are compiled, whatever the number of rows: soft deletion,
and hard deletion with room for the longest row.
What the decoder owes to its encoder is told beside: how many bits more it needs when it reads another window's input.
Below the models stand what the byte frequencies and an order-2 byte model of the same training text give on the same bytes.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxmerge import words
from models import mrt5, t5
from scripts import bytes_data, data, reading, state
from scripts.bytes_models import nats
from scripts.refusals import refusals


@dataclasses.dataclass
class Flags:
    """What to evaluate."""

    checkpoints: tuple[str, ...]
    """NAME=PATH for every row; each an Orbax checkpoint of parameters."""
    out: pathlib.Path = pathlib.Path("runs/quickstart")
    """Where evaluation.json goes, and where training left model.json and data.json."""
    windows: int = 256
    """Held-out windows per domain."""
    length: int | None = None
    """Bytes of a window; by default as in training, and so are the next two."""
    noise: float | None = None
    """The share of them that is hidden."""
    span: float | None = None
    """The mean length of a hidden span."""
    rows: int = 64
    """Windows per forward pass."""
    data: int | None = None
    """The mesh's axis over which batches alone are split; by default what `fsdp` leaves."""
    fsdp: int | None = None
    """The mesh's axis over which parameters are split too: by default in two."""


def score(
    params: state.Params,
    ids: jax.Array,
    labels: jax.Array,
    *,
    config: mrt5.MrT5Config,
    mesh: Mesh,
    hidden: int,
    capacity: int | None,
) -> dict[str, jax.Array]:
    """Per window: bits per hidden byte, bytes kept, and bytes that found no room."""
    model = state.to_model(config, state.gathered(mesh, params))
    encoded = model.encode(ids, capacity=capacity)
    logits = model.decode(t5.shift_right(labels), encoded).logits
    bits = nats(logits, labels).sum(-1) / (hidden * jnp.log(2.0))
    kept = words.kept(encoded.gate, mask=encoded.mask, threshold=config.threshold).sum(-1)
    return {"bits": bits, "kept": kept, "overflow": jnp.zeros_like(kept) if encoded.plan is None else encoded.plan.overflow}


class Scorer:
    """Held-out windows on the mesh and the compiled programs that read them."""

    def __init__(self, config: mrt5.MrT5Config, mesh: Mesh, windows: dict[str, bytes_data.Hidden], rows: int):
        if rows % mesh.size:
            raise ValueError(f"Scorer: rows must be a multiple of the {mesh.size} devices, got {rows}.")
        self.windows, self.rows, self.place = windows, rows, state.batched(mesh)
        hidden = int(next(iter(windows.values())).mask[0].sum())
        self.step = jax.jit(functools.partial(score, config=config, mesh=mesh, hidden=hidden), static_argnames="capacity")

    def __call__(
        self, params: state.Params, domain: str, capacity: int | None = None, *, of_others: bool = False
    ) -> dict[str, np.ndarray]:
        """Scores by window; `of_others`: the encoder reads the window before instead."""
        _, inputs, targets = self.windows[domain]
        inputs, parts = np.roll(inputs, 1, axis=0) if of_others else inputs, []
        for i in range(0, len(inputs), self.rows):
            batch = jax.device_put((inputs[i : i + self.rows], targets[i : i + self.rows]), self.place)
            parts.append(jax.device_get(self.step(params, *batch, capacity=capacity)))
        return jax.tree.map(lambda *x: np.concatenate(x), *parts)


BEFORE = 2
"""Bytes before each held-out window, which only the order-2 model sees."""


def heldout(corpora: dict[str, data.Corpus], count: int, length: int) -> dict[str, np.ndarray]:
    """The windows of every domain, (count, BEFORE + length)."""
    data.check_room(corpora, length, BEFORE + length)
    return {domain: data.tile(c.heldout, count, BEFORE + length) for domain, c in corpora.items()}


def hide(windows: dict[str, np.ndarray], noise: float, span: float) -> dict[str, bytes_data.Hidden]:
    """Spans hidden in them, the same in every evaluation."""
    return {d: bytes_data.hide(w[:, BEFORE:], np.random.default_rng(1), noise=noise, span=span) for d, w in windows.items()}


def baselines(
    corpora: dict[str, data.Corpus], windows: dict[str, np.ndarray], hidden: dict[str, bytes_data.Hidden]
) -> dict[str, dict[str, float]]:
    """What simple statistics of each domain's training text (of 16 MiB, spread over it) give on its hidden bytes."""
    rows: dict[str, dict[str, float]] = {"byte frequency": {}, "order-2 bytes": {}}
    for domain, w in windows.items():
        train, scored = data.excerpt(corpora[domain].train), np.pad(hidden[domain].mask, ((0, 0), (BEFORE, 0)))
        rows["byte frequency"][domain] = data.byte_frequency_bits(train, w, scored)
        rows["order-2 bytes"][domain] = data.order_2_bits(train, w, scored)
    return rows


def evaluate(flags: Flags) -> dict[str, Any]:
    """All figures, by row."""
    named = [c.partition("=") for c in flags.checkpoints]
    if len({name for name, *_ in named}) < max(len(named), 1):
        raise ValueError(f"evaluate: give one or more checkpoints, each a name of its own; got {list(flags.checkpoints)}.")
    if bad := [name for name, eq, path in named if not (name and eq and path)]:
        raise ValueError(f"evaluate: checkpoints are given as NAME=PATH; got {bad}.")
    config, read = state.load_config(flags.out / "model.json"), reading.load(flags.out / "data.json")
    mesh = state.make_mesh(flags.data, flags.fsdp)
    given = {k: v for k in ("length", "noise", "span") if (v := getattr(flags, k)) is not None}
    read, corpora = dataclasses.replace(read, **given), read.corpora()
    windows = heldout(corpora, flags.windows, read.length)
    hidden = hide(windows, read.noise, read.span)
    reads = next(iter(hidden.values())).inputs.shape[1]
    scorer = Scorer(config, mesh, hidden, min(flags.rows, flags.windows))
    params = {name: state.load_params(pathlib.Path(path), mesh, config) for name, _, path in named}
    soft = {(name, domain): scorer(p, domain) for name, p in params.items() for domain in windows}
    capacity = words.capacity_for(np.concatenate([s["kept"] for s in soft.values()]), multiple_of=8, at_most=reads)
    result: dict[str, Any] = {"capacity": capacity, "reads": reads, "rows": {}}
    for name, p in params.items():
        row = {}
        for domain in windows:
            hard = scorer(p, domain, capacity)
            row[domain] = {
                "soft": float(soft[name, domain]["bits"].mean()),
                "hard": float(hard["bits"].mean()),
                "deleted": float(1 - hard["kept"].mean() / reads),
                "input": float((scorer(p, domain, of_others=True)["bits"] - soft[name, domain]["bits"]).mean()),
                "overflow": int(hard["overflow"].sum()),
            }
        result["rows"][name] = row
    result["baselines"] = baselines(corpora, windows, hidden)
    return result


COLUMNS = {"soft": "{:.3f}", "hard": "{:.3f}", "deleted": "{:.1%}", "input": "{:+.2f}"}


def tables(result: dict[str, Any]):
    """The figures as rich tables, two domains to each; the best of each column of bits is bold."""
    from rich import box
    from rich.table import Table

    rows, domains = result["rows"], list(next(iter(result["rows"].values())))
    best = {(d, c): min(r[d][c] for r in rows.values()) for d in domains for c in ("soft", "hard")}
    title = "Held-out bits per hidden byte; input: bits more with another window's input"
    for i in range(0, len(domains), 2):
        out = Table(title=None if i else title, box=box.SIMPLE, padding=(0, 1, 0, 0))
        out.add_column("", no_wrap=True)
        for domain in domains[i : i + 2]:
            for column in COLUMNS:
                out.add_column(f"{domain}\n{column}", justify="right", no_wrap=True)
        for name, row in rows.items():
            cells = []
            for d in domains[i : i + 2]:
                for c, form in COLUMNS.items():
                    text = form.format(row[d][c])
                    cells.append(f"[bold]{text}[/bold]" if row[d][c] == best.get((d, c)) else text)
            out.add_row(name, *cells)
        out.add_section()
        for name, row in result["baselines"].items():
            bits = (f"{row[d]:.3f}" for d in domains[i : i + 2])
            out.add_row(f"[dim]{name}[/dim]", *(c for b in bits for c in (b, "", "", "")))
        yield out


def main(flags: Flags) -> None:
    from rich.console import Console

    result = evaluate(flags)
    console = Console()
    for table in tables(result):
        console.print(table)
    (flags.out / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    import tyro

    with refusals():
        main(tyro.cli(Flags, prog=f"python -m {__spec__.name}", description=__doc__))
