"""All that is claimed of a Hopper GPU, in ten minutes on one: kernels against their references, kernels, whole models.

    JAX_PLATFORMS=cuda python -m scripts.bench.gpu --out runs/gpu [--tome PATH]      PATH: a checkout of facebookresearch/ToMe

In the order of what matters: `scripts.bench.kernels --quick`, and ToMe in torch beside it; `scripts.bench.vit` at 224, 384 and
518, forward and with gradients; `scripts.tune --quick`; tests/kernels/test_gpu.py. Everything runs in processes of its own,
which compile side by side and are timed one after the other, so that compiling takes the cores and not the time; XLA then
picks the algorithms of its products while others compile, of whole models among cuBLAS's alone. Each writes what it found after
every figure, into --out; gpu.json names what ran, what ended badly or was cut off, and what there was no time to start.
"""

import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import tyro
from rich.console import Console

from scripts.bench import device
from scripts.refusals import refusals

TESTS = "tests/kernels/test_gpu.py"
LEAST = 20
"""Seconds without which nothing is begun."""
PRODUCTS = "--xla_gpu_enable_triton_gemm=false"
"""For whole models: cuBLAS alone. XLA would compile and time Triton's tilings for every product of every length that a merging
model has: beside other jobs three programs of a ViT were not ready after 200 seconds, and so they were timed within 80."""


class Job(NamedTuple):
    """A process, and the file that its words go to."""

    name: str
    arguments: tuple[str, ...]
    flags: str = ""
    """For XLA."""


def main(
    *, tome: pathlib.Path | None = None, minutes: float = 10, workers: int = 8, out: pathlib.Path = pathlib.Path("runs/gpu")
) -> None:
    """Run them, print where each ended.

    Args:
      tome: a checkout of the official code, to run it in torch.
      minutes: for everything; what is running then is stopped.
      workers: processes at a time, and among which the tests are shared out.
      out: directory for all figures and words.
    """
    out.mkdir(parents=True, exist_ok=True)
    began, found = time.monotonic(), {}
    for jobs in (timed(tome, out), tests(workers)):
        found |= run(jobs, out, workers, began, began + 60 * minutes)
        device.write(out / "gpu.json", found)


def timed(tome: pathlib.Path | None, out: pathlib.Path) -> list[Job]:
    """What is measured, in the order of what matters."""
    script = lambda name, *more: ("-m", f"scripts.{name}", *more)
    kernels = lambda what, *more: Job(f"kernels {what}", script("bench.kernels", "--quick", *more, "--out", str(out / what)))
    beside = ("--tome", str(tome)) if tome else ()
    layers = ("ViT-B/16@224", "ViT-B/16@384", "ViT-H/14@378", "SD 64x64", "video 8x196", "ByT5-small 1024")
    return [
        kernels("step", "--only", "ViT", "--ops", "step", *beside),
        vit(out, "B/16", 224, batch=64, r=13),
        vit(out, "B/16", 384, batch=64, r=40),
        kernels("ViT", "--only", "ViT", "--ops", "merge", "unmerge", "attend", "attend_vjp"),
        kernels("SD", "--only", "SD"),
        kernels("video", "--only", "video"),
        Job("tune", script("tune", "--quick", "--layers", *layers)),
        vit(out, "L/16", 384, batch=32, r=23),
        vit(out, "H/14", 518, batch=8, r=40),
        vit(out, "B/16", 224, batch=256, r=13),
        vit(out, "B/16", 224, batch=64, r=13, train=True),
        vit(out, "B/16", 224, batch=64, r=13, train=True, attention="cudnn"),
        kernels("ByT5", "--only", "ByT5"),
        vit(out, "H/14", 224, batch=64, r=8),
        vit(out, "L/16", 224, batch=64, r=8),
        vit(out, "B/16", 384, batch=64, r=40, train=True),
        vit(out, "L/16", 384, batch=32, r=23, train=True),
        vit(out, "H/14", 378, batch=16, r=21),
        vit(out, "B/16", 224, batch=8, r=13),
    ]


def tests(workers: int) -> list[Job]:
    """The tests that need a GPU, which take no turns: after all that is timed."""
    return [
        Job(f"tests {i + 1} of {workers}", ("-c", SHARE, str(i), str(workers), TESTS, "-p", "no:cacheprovider"))
        for i in range(workers)
    ]


def vit(
    out: pathlib.Path, variant: str, resolution: int, *, batch: int, r: int, train: bool = False, attention: str = "mosaic_gpu"
) -> Job:
    """A whole model with and without merging, and with its tokens dropped for nothing."""
    name = f"vit {variant.replace('/', '-')} at {resolution}, batch {batch}{', gradient' if train else ''}"
    name += ", cuDNN's attention" if attention == "cudnn" else ""
    options = {"variant": variant, "resolution": resolution, "batch": batch, "attention": attention}
    flags = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    more = (
        "--rs",
        "0",
        str(r),
        "--ways",
        "kernel",
        "cut",
        "--name",
        name.replace(",", "").replace("'", "").replace(" ", "_"),
        "--out",
        str(out),
    )
    return Job(name, ("-m", "scripts.bench.vit", *flags, *more, *(("--train",) if train else ())), PRODUCTS)


SHARE = """
import sys, pytest
class Share:
    def pytest_collection_modifyitems(self, items):
        items[:] = items[int(sys.argv[1])::int(sys.argv[2])]
raise SystemExit(pytest.main(["-m", "gpu", "-q", "-p", "no:benchmark", "--durations=5", *sys.argv[3:]], plugins=[Share()]))
"""
"""Every so manieth test."""


def run(jobs: list[Job], out: pathlib.Path, workers: int, began: float, stop: float) -> dict[str, str]:
    """Run so many at a time until the last has ended, or time has; how each did."""
    turn, cache = (out / "turn").resolve(), (out / "compiled").resolve()
    more = {
        device.TURN: str(turn),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_COMPILATION_CACHE_DIR": str(cache),  # what is run again, after a cut, compiles less
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
    }
    xla = os.environ.get("XLA_FLAGS", "")
    console, waiting, running, ended = Console(width=140), list(jobs), {}, {}

    def end(name: str, how: str) -> None:
        ended[name] = how
        console.print(f"{time.monotonic() - began:4.0f} s  {name}: {how}", highlight=False)

    while waiting or running:
        late = time.monotonic() > stop
        while waiting and (late or stop - time.monotonic() < LEAST):
            end(waiting.pop(0).name, "not started: no time was left")
        while waiting and len(running) < workers:
            job = waiting.pop(0)
            with open(out / f"{job.name.replace(',', '').replace(' ', '_')}.txt", "w") as words:
                process = subprocess.Popen(
                    [sys.executable, "-u", *job.arguments],
                    stdout=words,
                    stderr=words,
                    env={"JAX_PLATFORMS": "cuda", **os.environ, **more, "XLA_FLAGS": f"{xla} {job.flags}"},
                    start_new_session=True,
                )
            running[job.name] = process, time.monotonic()
        for name, (process, start) in list(running.items()):
            if late and process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                end(name, "cut off: what it found until then is in its file")
            elif process.poll() is not None:
                how = "done" if process.returncode == 0 else f"ended with status {process.returncode}"
                end(name, f"{how} after {time.monotonic() - start:.0f} s")
            else:
                continue
            del running[name]
        time.sleep(0.2)
    return ended


if __name__ == "__main__":
    with refusals():
        tyro.cli(main, prog=f"python -m {__spec__.name}", description=__doc__)
