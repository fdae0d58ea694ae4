"""Held-out bits per byte of any number of checkpoints, prose and code, deletion soft and hard, in one table.

    python -m scripts.evaluate --out runs/quickstart --checkpoints base=runs/quickstart/base ties=runs/quickstart/ties

Two programs are compiled, whatever the number of rows: soft deletion, and hard deletion with room for the longest row.
Beside the models stand what the byte frequencies and an order-2 byte model of the same training text give on the same bytes.
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
from scripts import data, state


@dataclasses.dataclass
class Flags:
    """What to evaluate."""

    checkpoints: tuple[str, ...]
    """NAME=PATH for every row; each an Orbax checkpoint of parameters."""
    out: pathlib.Path = pathlib.Path("runs/quickstart")
    """Where evaluation.json goes, and where training left model.json."""
    windows: int = 256
    """Held-out windows per domain."""
    inputs: int = 128
    """Bytes that the encoder reads."""
    targets: int = 128
    """Bytes that the decoder predicts."""
    rows: int = 64
    """Windows per forward pass."""
    data: int | None = None
    fsdp: int | None = None
    """The mesh: by default parameters are split in two, and batches over all devices."""


def score(
    params: state.Params, windows: jax.Array, *, config: mrt5.MrT5Config, mesh: Mesh, inputs: int, capacity: int | None
) -> dict[str, jax.Array]:
    """Per window: bits per target byte, bytes kept, and bytes that found no room."""
    model = state.to_model(config, state.gathered(mesh, params))
    ids, labels = windows[:, :inputs], windows[:, inputs:]
    encoded = model.encode(ids, capacity=capacity)
    logits = model.decode(t5.shift_right(labels), encoded).logits
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    bits = (jax.nn.logsumexp(logits, axis=-1) - picked).mean(-1) / jnp.log(2.0)
    kept = words.kept(encoded.gate, mask=encoded.mask, threshold=config.threshold).sum(-1)
    return {"bits": bits, "kept": kept, "overflow": jnp.zeros_like(kept) if encoded.plan is None else encoded.plan.overflow}


class Scorer:
    """Held-out windows on the mesh and the compiled programs that read them."""

    def __init__(self, config: mrt5.MrT5Config, mesh: Mesh, windows: dict[str, np.ndarray], inputs: int, rows: int):
        if rows % mesh.size:
            raise ValueError(f"Scorer: rows must be a multiple of the {mesh.size} devices, got {rows}.")
        put = lambda w: jax.device_put(w.astype(np.int32) + words.OFFSET, state.batched(mesh))
        self.batches = {k: [put(w[i : i + rows]) for i in range(0, len(w), rows)] for k, w in windows.items()}
        score_here = functools.partial(score, config=config, mesh=mesh, inputs=inputs)
        self.step = jax.jit(score_here, static_argnames="capacity")

    def __call__(self, params: state.Params, domain: str, capacity: int | None = None) -> dict[str, np.ndarray]:
        parts = []
        for batch in self.batches[domain]:
            parts.append(jax.device_get(self.step(params, batch, capacity=capacity)))
        return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def heldout(count: int, length: int) -> dict[str, np.ndarray]:
    """The windows of every domain."""
    return {domain: data.tile(data.load(domain).heldout, count, length) for domain in data.DOMAINS}


def baselines(windows: dict[str, np.ndarray], targets: int) -> dict[str, dict[str, float]]:
    """What simple statistics of each domain's training text give on its held-out target bytes."""
    rows: dict[str, dict[str, float]] = {"byte frequency": {}, "order-2 bytes": {}}
    for domain, w in windows.items():
        train = data.load(domain).train
        rows["byte frequency"][domain] = data.byte_frequency_bits(train, w, targets)
        rows["order-2 bytes"][domain] = data.order_2_bits(train, w, targets)
    return rows


def evaluate(flags: Flags) -> dict[str, Any]:
    """All figures, by row."""
    named = [c.partition("=") for c in flags.checkpoints]
    if bad := [name for name, eq, path in named if not (name and eq and path)]:
        raise ValueError(f"evaluate: checkpoints are given as NAME=PATH; got {bad}.")
    config = state.load_config(flags.out / "model.json")
    mesh = state.make_mesh(flags.data, flags.fsdp)
    windows = heldout(flags.windows, flags.inputs + flags.targets)
    scorer = Scorer(config, mesh, windows, flags.inputs, min(flags.rows, flags.windows))
    params = {name: state.load_params(pathlib.Path(path), mesh, config) for name, _, path in named}
    soft = {(name, domain): scorer(p, domain) for name, p in params.items() for domain in windows}
    capacity = words.capacity_for(np.concatenate([s["kept"] for s in soft.values()]), multiple_of=8, at_most=flags.inputs)
    result: dict[str, Any] = {"capacity": capacity, "inputs": flags.inputs, "targets": flags.targets, "rows": {}}
    for name, p in params.items():
        row = {}
        for domain in windows:
            hard = scorer(p, domain, capacity)
            row[domain] = {
                "soft": float(soft[name, domain]["bits"].mean()),
                "hard": float(hard["bits"].mean()),
                "deleted": float(1 - hard["kept"].mean() / flags.inputs),
                "overflow": int(hard["overflow"].sum()),
            }
        result["rows"][name] = row
    result["baselines"] = baselines(windows, flags.targets)
    return result


def table(result: dict[str, Any]):
    """The figures as a rich table; the best of each column is bold."""
    from rich import box
    from rich.table import Table

    rows = result["rows"]
    title = f"Held-out bits per byte (the next {result['targets']} bytes after {result['inputs']})"
    out = Table(title=title, box=box.SIMPLE)
    out.add_column("", no_wrap=True)
    for domain in data.DOMAINS:
        for column in ("soft", "hard", "deleted"):
            out.add_column(f"{domain}\n{column}", justify="right", no_wrap=True)
    best = {(d, c): min(r[d][c] for r in rows.values()) for d in data.DOMAINS for c in ("soft", "hard")}
    for name, row in rows.items():
        cells = []
        for d in data.DOMAINS:
            for c in ("soft", "hard"):
                text = f"{row[d][c]:.3f}"
                cells.append(f"[bold]{text}[/bold]" if row[d][c] == best[d, c] else text)
            cells.append(f"{row[d]['deleted']:.1%}")
        out.add_row(name, *cells)
    out.add_section()
    for name, row in result["baselines"].items():
        out.add_row(f"[dim]{name}[/dim]", *(c for d in data.DOMAINS for c in (f"{row[d]:.3f}", "", "")))
    return out


def main(flags: Flags) -> None:
    from rich.console import Console

    result = evaluate(flags)
    Console(width=None).print(table(result))
    (flags.out / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Flags, description=__doc__))
