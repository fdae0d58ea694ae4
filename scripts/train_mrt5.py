"""Train a small byte-level MrT5 from scratch, then an expert from it for each domain of the text: prose and code, or yours.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m scripts.train_mrt5 --out runs/quickstart
    python -m scripts.train_mrt5 --out runs/books --text 'books/**/*.txt'        # one domain, no experts
    python -m scripts.train_mrt5 --out runs/two --text en=en.txt de=german/      # experts OUT/en and OUT/de

The encoder reads 128 bytes with spans hidden, the decoder spells the spans. Bytes are deleted after the first encoder block.
At first the gate is held open, and the model is a ByT5 (the paper starts from a trained one); then the controller steers
deletion to its target. Parameters and optimiser state are split over the mesh axis `fsdp`, batches over both axes.

Text of your own is read where it lies, a window at a time, however large; one byte in eight is held out, by document or, of few
documents, by stretch (`scripts.texts`).

Writes OUT/base, OUT/prose, OUT/code (Orbax, parameters alone), OUT/model.json, OUT/data.json, OUT/metrics.jsonl, OUT/loss.png,
and OUT/resume (everything that `--resume` needs to go on as if nothing had happened).
"""

import dataclasses
import itertools
import json
import pathlib
import shutil
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxmerge import words
from models import mrt5
from models.t5 import T5Config
from scripts import bytes_data, data, evaluate, reading, state, texts
from scripts.bytes_models import SURE, head_start
from scripts.bytes_train import optimiser
from scripts.refusals import refusals

TAKEN = {"base", "resume"}
"""Names in OUT that no domain may have."""
TINY = mrt5.MrT5Config(T5Config(128, 32, 256, 4, 3, 2, softmax1=True, dropout=0.0), gate_layer=1)


@dataclasses.dataclass
class Flags:
    """What to train, for how long, on which mesh."""

    out: pathlib.Path = pathlib.Path("runs/quickstart")
    resume: bool = False
    """Go on from OUT/resume."""
    text: tuple[str, ...] = ()
    """What to train on: files, folders, quoted globs; NAME=PATH for several domains, which come in turn, an expert for each.
    None: the prose and code that every Python carries."""
    model: mrt5.MrT5Config = TINY
    length: int = 128
    """Bytes of a window."""
    noise: float = 0.3
    """The share of them that is hidden (ByT5: 0.15)."""
    span: float = 6.0
    """The mean length of a hidden span (ByT5: 20)."""
    batch: int = 16
    """Windows of a step, of each domain as many."""
    experts: bool = True
    """Whether an expert of each domain follows the base, where there are two or more."""
    steps: int = 1400
    expert_steps: int = 200
    lr: float = 3e-3
    expert_lr: float = 1e-3
    gate_start: int = 900
    """The step from which the gate learns; before it, nothing is deleted."""
    target_deletion: float = 0.5
    """The share of bytes that the controller steers to."""
    controller_p: float = 0.02
    controller_i: float = 5e-5
    controller_lowest: float = 0.0
    data: int | None = None
    """The mesh's axis over which batches alone are split; by default what `fsdp` leaves."""
    fsdp: int | None = None
    """The mesh's axis over which parameters are split too: by default in two."""
    seed: int = 0
    log_every: int = 10
    eval_every: int = 150
    save_every: int = 250


class TrainState(NamedTuple):
    """Everything a step changes: what a checkpoint for resuming holds."""

    params: state.Params
    optimiser: Any
    controller: words.ControllerState
    step: jax.Array


def initial_params(flags: Flags, mesh: Mesh) -> state.Params:
    """Fresh parameters with a head start, the gate held open."""
    params = state.init(flags.model, mesh, flags.seed)
    head_start(params["t5"])
    return jax.device_put(gated(params, SURE), state.sharded(mesh, params))


def gated(params: state.Params, bias: float) -> state.Params:
    """The parameters with this bias of the gate: at `SURE` it deletes nothing, at 1, where the paper starts, it learns."""
    out = params["gate"]["out"]
    return params | {"gate": params["gate"] | {"out": out | {"bias": jnp.full_like(out["bias"], bias)}}}


def make_optimiser(flags: Flags, phase: str) -> optax.GradientTransformation:
    """That of `scripts.compare_bytes`, down to 0 at the end of every phase."""
    steps, rate = (flags.steps, flags.lr) if phase == "base" else (flags.expert_steps, flags.expert_lr)
    return optimiser(rate, steps, begins=phase == "base", decays=True, queries=flags.model.base.d_kv**-0.5)


def make_step(flags: Flags, mesh: Mesh, tx: optax.GradientTransformation, gate_start: int):
    """One optimiser step: the loss with the controller's alpha, the update, then the controller with the batch's rate."""
    gains = dict(k_p=flags.controller_p, k_i=flags.controller_i, lowest=flags.controller_lowest)
    controller = words.pi_controller(target=flags.target_deletion, **gains)

    def step(s: TrainState, ids: jax.Array, labels: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        def loss(params):
            model = state.to_model(flags.model, state.gathered(mesh, params))
            return mrt5.loss(model, ids, labels, s.controller.alpha)

        (total, metrics), grads = jax.value_and_grad(loss, has_aux=True)(s.params)
        updates, opt = tx.update(grads, s.optimiser, s.params)
        active = s.step >= gate_start
        params: Any = optax.apply_updates(s.params, updates)
        params["gate"] = jax.tree.map(lambda new, old: jnp.where(active, new, old), params["gate"], s.params["gate"])
        params = jax.tree.map(jax.lax.with_sharding_constraint, params, state.sharded(mesh, params))
        after = jax.tree.map(
            lambda a, b: jnp.where(active, a, b), controller.update(s.controller, metrics["rate"]), s.controller
        )
        metrics |= {"loss": total, "alpha": s.controller.alpha}
        return TrainState(params, opt, after, s.step + 1), metrics

    return jax.jit(step, donate_argnums=0)


def fresh(params: state.Params, tx: optax.GradientTransformation, controller: words.ControllerState, mesh: Mesh) -> TrainState:
    """The state at a phase's first step."""
    opt = jax.jit(tx.init, out_shardings=state.sharded(mesh, jax.eval_shape(tx.init, params)))(params)
    whole = lambda x: jax.device_put(x, state.sharded(mesh, x))
    return TrainState(params, opt, jax.tree.map(whole, controller), whole(jnp.zeros((), jnp.int32)))


def batch(flags: Flags, corpora: dict[str, data.Corpus], phase: str, step: int) -> bytes_data.Hidden:
    """The windows of a step: of all domains in turn for the base, of its own for an expert."""
    rng = np.random.default_rng((flags.seed, ["base", *corpora].index(phase), step))
    domains = list(corpora) if phase == "base" else [phase]
    turns = np.bincount(np.arange(step * flags.batch, (step + 1) * flags.batch) % len(domains), minlength=len(domains))
    rows = [data.draw(corpora[d].train, rng, int(n), flags.length) for d, n in zip(domains, turns, strict=True) if n]
    return bytes_data.hide(np.concatenate(rows), rng, noise=flags.noise, span=flags.span)


class Log:
    """Metrics to a progress bar and to OUT/metrics.jsonl, a line at a time, so that a killed run loses none."""

    def __init__(self, path: pathlib.Path, progress):
        self.path, self.progress = path, progress

    def write(self, row: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def run_phase(
    flags: Flags, phase: str, s: TrainState, step, *, mesh: Mesh, corpora: dict[str, data.Corpus], scorer, log: Log
) -> TrainState:
    """Train from where the state stands to the phase's end; save on the way."""
    steps = flags.steps if phase == "base" else flags.expert_steps
    first = int(s.step)
    task = log.progress.add_task(f"{phase:5s}", total=steps, completed=first, text="compiling")
    began, bytes_seen = time.perf_counter(), 0
    for i in range(first, steps):
        if phase == "base" and i == flags.gate_start:
            s = s._replace(params=gated(s.params, 1.0))
        hidden = batch(flags, corpora, phase, i)
        s, metrics = step(s, *jax.device_put((hidden.inputs, hidden.targets), state.batched(mesh)))
        # One step in flight: more of them starve each other's collectives on virtual devices that share few threads.
        jax.block_until_ready(s)
        bytes_seen += hidden.mask.size
        if (i + 1) % flags.log_every == 0 or i + 1 == steps:
            m = {k: float(v) for k, v in metrics.items()}
            if not np.isfinite(m["loss"]):
                raise FloatingPointError(f"train_mrt5: the loss of {phase} at step {i} is {m['loss']}; lower --lr.")
            speed = bytes_seen / (time.perf_counter() - began)
            began, bytes_seen = time.perf_counter(), 0
            bits = m["ce"] / np.log(2) * hidden.targets.size / hidden.mask.sum()
            row = {"phase": phase, "step": i + 1, **m, "bpb": float(bits), "bytes_per_s": round(speed)}
            log.write(row)
            log.progress.update(
                task,
                completed=i + 1,
                text=f"loss {m['loss']:.2f} bits/byte {row['bpb']:.2f} deleted {m['rate']:.0%} alpha {m['alpha']:.3f} "
                f"{speed:,.0f} B/s",
            )
        if (i + 1) % flags.eval_every == 0 or i + 1 == steps:
            bits = {d: float(scorer(s.params, d)["bits"].mean()) for d in corpora}
            log.write({"phase": phase, "step": i + 1, "heldout": bits})
            shown = ", ".join(f"{d} {b:.3f}" for d, b in bits.items())
            log.progress.console.print(f"{phase:5s} step {i + 1:5d}: held-out bits per hidden byte: {shown}", highlight=False)
        if (i + 1) % flags.save_every == 0 and i + 1 < steps:
            keep_for_resume(flags.out, phase, s)
    if first < steps:
        keep_for_resume(flags.out, phase, s)
        state.save(flags.out / phase, s.params)
    return s


def keep_for_resume(out: pathlib.Path, phase: str, s: TrainState) -> None:
    """Save the whole training state, then drop the one before it (of this phase: the base's last one starts both experts)."""
    path = out / "resume" / f"{phase}-{int(s.step):06d}"
    state.save(path, s._asdict())
    for old in path.parent.glob(f"{phase}-*"):
        if old != path:
            shutil.rmtree(old)


def latest(out: pathlib.Path, phase: str) -> pathlib.Path | None:
    """The newest finished state of a phase."""
    found = sorted(p for p in (out / "resume").glob(f"{phase}-*") if p.name.removeprefix(f"{phase}-").isdigit())
    return found[-1] if found else None


def check(flags: Flags, mesh: Mesh, read: reading.Reading) -> None:
    """Refuse what cannot be trained, before anything of an earlier run is overwritten."""
    if flags.batch < 1 or flags.batch % mesh.size:
        raise ValueError(f"train_mrt5: batch must be a multiple of the {mesh.size} devices, got {flags.batch}.")
    for name in ("steps", "expert_steps", "log_every", "eval_every", "save_every"):
        if getattr(flags, name) < 1:
            raise ValueError(f"train_mrt5: {name} must be 1 or more, got {getattr(flags, name)}.")
    gains = dict(k_p=flags.controller_p, k_i=flags.controller_i, lowest=flags.controller_lowest)
    words.pi_controller(target=flags.target_deletion, **gains)
    words.span_counts(flags.length, density=flags.noise, mean=flags.span)
    written = flags.out / "model.json"
    if flags.resume and written.exists() and (before := state.load_config(written)) != flags.model:
        raise ValueError(
            f"train_mrt5: {flags.out} holds another model, {before}; give the same --model flags, or leave out --resume."
        )
    written = flags.out / "data.json"
    if flags.resume and written.exists() and (other := reading.differences(reading.load(written), read)):
        raise ValueError(f"train_mrt5: {flags.out} was trained with {other}; give the same flags, or leave out --resume.")
    if taken := TAKEN & set(read.sizes):
        raise ValueError(f"train_mrt5: OUT/{min(taken)} is not a domain's; give it another name in --text.")


def train(flags: Flags) -> None:
    """The base, then the experts."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    mesh = state.make_mesh(flags.data, flags.fsdp)
    text = tuple(map(texts.absolute, flags.text))
    corpora = reading.corpora(text)
    read = reading.Reading(text, flags.length, flags.noise, flags.span, reading.sizes(corpora))
    check(flags, mesh, read)
    heldout = evaluate.hide(evaluate.heldout(corpora, 32, flags.length), flags.noise, flags.span)
    flags.out.mkdir(parents=True, exist_ok=True)
    if not flags.resume:
        shutil.rmtree(flags.out / "resume", ignore_errors=True)
        (flags.out / "metrics.jsonl").unlink(missing_ok=True)
    state.save_config(flags.out / "model.json", flags.model)
    reading.save(flags.out / "data.json", read)
    phases = ["base", *(corpora if flags.experts and len(corpora) > 1 else ())]
    scorer = evaluate.Scorer(flags.model, mesh, heldout, 32)
    columns = [TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[text]}")]
    with Progress(*columns, TimeElapsedColumn()) as progress:
        log = Log(flags.out / "metrics.jsonl", progress)
        base, step = None, None
        for phase in phases:
            tx = make_optimiser(flags, phase)
            if base is None:
                no_alpha = words.pi_controller(target=flags.target_deletion).init()
                s = fresh(initial_params(flags, mesh), tx, no_alpha, mesh)
            else:
                params, controller = jax.tree.map(jnp.copy, (base.params, base.controller))  # a step consumes its state
                s = fresh(params, tx, controller, mesh)
            path = latest(flags.out, phase) if flags.resume else None
            if path is not None:
                s = TrainState(**state.load_like(path, s._asdict()))
                progress.console.print(f"{phase:5s} goes on from step {int(s.step)}", highlight=False)
            if phase in phases[:2]:  # all experts share one compiled step
                step = make_step(flags, mesh, tx, flags.gate_start if phase == "base" else 0)
            s = run_phase(flags, phase, s, step, mesh=mesh, corpora=corpora, scorer=scorer, log=log)
            base = s if phase == "base" else base
    draw(flags, list(corpora))


def draw(flags: Flags, domains: list[str]) -> None:
    """OUT/loss.png: bits per byte, deletion against its target, alpha."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in (flags.out / "metrics.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), constrained_layout=True)
    # Told apart by colour-blind eyes (Okabe and Ito).
    colours = itertools.cycle(("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442"))
    colour = {"base": "#444444", **dict(zip(domains, colours, strict=False))}
    markers = dict(zip(domains, itertools.cycle("os^vD*P"), strict=False))
    for phase, shade in colour.items():
        offset = 0 if phase == "base" else flags.steps
        train_rows = [r for r in rows if r["phase"] == phase and "loss" in r]
        x = [r["step"] + offset for r in train_rows]
        for axis, key in zip(axes, ("bpb", "rate", "alpha"), strict=True):
            axis.plot(x, [r[key] for r in train_rows], color=shade, alpha=0.4 if key == "bpb" else 0.9, label=phase)
        for domain, marker in markers.items():
            tested = [r for r in rows if r["phase"] == phase and "heldout" in r]
            x = [r["step"] + offset for r in tested]
            style = dict(color=shade, marker=marker, linestyle="none", markersize=4)
            axes[0].plot(x, [r["heldout"][domain] for r in tested], label=f"{phase}, held-out {domain}", **style)
    axes[1].axhline(flags.target_deletion, color="black", linestyle=":", label="target")
    axes[1].set_ylim(0, 1)
    for axis, title in zip(
        axes, ("bits per hidden byte", "bytes deleted", "alpha, the gate's weight in the loss"), strict=True
    ):
        axis.set_title(title)
        axis.set_xlabel("step")
    axes[0].legend(fontsize=6, ncols=2)
    axes[1].legend(fontsize=7)
    figure.savefig(flags.out / "loss.png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    import tyro

    with refusals():
        train(tyro.cli(Flags, prog=f"python -m {__spec__.name}", description=__doc__))
