"""Merging checkpoints on disk: ours, mergekit's, and two floors (the same bytes read and written, no arithmetic), in turn.

    python -m scripts.bench.engine build --root runs/bench --sizes 0.13 0.5 2
    python -m scripts.bench.engine run   --root runs/bench --size 0.5 --methods linear ties [--mergekit PYTHON] [--warm]

Both tools run their commands on one recipe. Models are Llama-shaped, bfloat16, random: a base and three experts (base +
N(0, 0.002^2)). Every run is a process of its own; what it takes is what the operating system says: wall, processor seconds
(its own and the system's for it), the time until a megabyte of the inputs is read (the start-up) and one of the output is
written, the peak of its anonymous and file-backed memory, page faults, bytes from and to the disk. Cold: inputs are dropped
from the page cache before each run.

Both floors pass the page cache by (O_DIRECT). "ring" has one thread that reads and one that writes, two rooms of 4 MiB an
input, in ordinary pages; "large pages" a thread that reads for each input, four rooms, in large pages, of which the kernel
has fewer to look up and pin. What a run takes beyond the second is its start-up, then its processor's time where that
exceeds two processors' wall, then waiting.
"""

import compileall
import dataclasses
import json
import math
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

import jaxmerge
from scripts.refusals import refusals

SHAPES = {  # hidden, feed-forward, layers, heads, key-value heads, vocabulary
    0.0001: (64, 96, 2, 4, 2, 256),  # for tests
    0.13: (2048, 5632, 2, 32, 8, 16000),
    0.5: (2048, 5632, 9, 32, 8, 16000),
    2.0: (3072, 8192, 17, 24, 8, 32000),
}
EXPERTS = ("a", "b", "c")
Method = Literal["linear", "task_arithmetic", "ties", "dare_ties", "model_stock", "slerp"]
INPUTS: dict[str, tuple[str, ...]] = {"linear": EXPERTS, "slerp": ("a", "b")}
"""Of what a method reads; the others read the base and three experts."""


def shapes(size: float) -> dict[str, tuple[int, ...]]:
    """A Llama's tensors."""
    hidden, wide, layers, heads, few, vocabulary = SHAPES[size]
    head = hidden // heads
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        at = f"model.layers.{i}."
        out |= {
            f"{at}self_attn.q_proj.weight": (hidden, hidden),
            f"{at}self_attn.k_proj.weight": (few * head, hidden),
            f"{at}self_attn.v_proj.weight": (few * head, hidden),
            f"{at}self_attn.o_proj.weight": (hidden, hidden),
            f"{at}mlp.gate_proj.weight": (wide, hidden),
            f"{at}mlp.up_proj.weight": (wide, hidden),
            f"{at}mlp.down_proj.weight": (hidden, wide),
            f"{at}input_layernorm.weight": (hidden,),
            f"{at}post_attention_layernorm.weight": (hidden,),
        }
    return out | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def build(root: pathlib.Path, size: float) -> None:
    """Write a base and its experts, each as the Hub has them."""
    import ml_dtypes
    import numpy as np

    rng = np.random.default_rng(0)
    pool = rng.standard_normal(1 << 24, dtype=np.float32)
    hidden, wide, layers, heads, few, vocabulary = SHAPES[size]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": few,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    tensors = shapes(size)

    def noise(n: int, at: int) -> np.ndarray:
        out = np.empty(n, np.float32)
        for start in range(0, n, pool.size):
            part = out[start : start + pool.size]
            part[:] = np.roll(pool, at + 7919 * start // pool.size)[: part.size]
        return out

    for k, name in enumerate(("base", *EXPERTS)):
        directory = root / str(size) / name
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(config))
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for n, shape in tensors.items():
            bytes_ = 2 * int(np.prod(shape))
            header[n] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + bytes_]}
            offset += bytes_
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(directory / "model.safetensors", "wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for i, shape in enumerate(tensors.values()):
                n = int(np.prod(shape))
                base = (0.02 * noise(n, 104729 * i)).astype(ml_dtypes.bfloat16)
                if k:
                    base = (base.astype(np.float32) + 0.002 * noise(n, 104729 * i + 15485863 * k)).astype(ml_dtypes.bfloat16)
                f.write(base.view(np.uint16).tobytes())
    print(f"{size} B: {offset / 1e9:.2f} GB each, {offset / 2e9:.3f} B parameters")


# --- who runs --------------------------------------------------------------------------------------------------------

FLOOR = """
import mmap, os, queue, sys, threading
kind, root, out, names = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]
os.makedirs(out, exist_ok=True)
STEP = 1 << 22
files = [os.open(f"{root}/{n}/model.safetensors", os.O_RDONLY | os.O_DIRECT) for n in names]
lanes, rooms = {"ring": ([files], 2), "large": ([[file] for file in files], 4)}[kind]
size = os.fstat(files[0]).st_size
target = os.open(f"{out}/model.safetensors", os.O_RDWR | os.O_CREAT, 0o644)
os.posix_fallocate(target, 0, size)
direct = os.open(f"{out}/model.safetensors", os.O_WRONLY | os.O_DIRECT)
free, full = [queue.Queue() for _ in lanes], [queue.Queue() for _ in lanes]
def room():
    memory = mmap.mmap(-1, STEP, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE if kind == "large" else mmap.MADV_NOHUGEPAGE)
    return memory
for lane, ring in zip(lanes, free):
    for _ in range(rooms): ring.put([room() for _ in lane])
def read(i):
    for at in range(0, size, STEP):
        mine = free[i].get()
        for file, memory in zip(lanes[i], mine): os.preadv(file, [memory], at)
        full[i].put(mine)
threads = [threading.Thread(target=read, args=(i,)) for i in range(len(lanes))]
for thread in threads: thread.start()
for at in range(0, size, STEP):
    read_ = [some.get() for some in full]
    n = min(STEP, size - at)
    whole = n - n % 4096
    if whole: os.pwrite(direct, memoryview(read_[0][0])[:whole], at)
    if n > whole: os.pwrite(target, memoryview(read_[0][0])[whole:n], at + whole)
    for some, mine in zip(free, read_): some.put(mine)
for thread in threads: thread.join()
os.fsync(target)
"""
FLOORS = {"floor: ring": "ring", "floor: large pages": "large"}


def recipe(method: str, root: pathlib.Path, names: tuple[str, ...]) -> str:
    """The merge as mergekit's YAML, for both."""
    experts = [n for n in names if n != "base"]
    if method == "slerp":
        return json.dumps(
            {
                "merge_method": "slerp",
                "base_model": f"{root}/a",
                "models": [{"model": f"{root}/b"}],
                "parameters": {"t": 0.5},
                "dtype": "bfloat16",
            }
        )
    parameters = {"ties": {"density": 0.5, "weight": 1.0}, "dare_ties": {"density": 0.5, "weight": 1.0}}
    models = [{"model": f"{root}/{n}", "parameters": parameters.get(method, {"weight": 1.0})} for n in experts]
    document = {"merge_method": method, "models": models, "dtype": "bfloat16"}
    if "base" in names:
        document["base_model"] = f"{root}/base"
    return json.dumps(document)


@dataclasses.dataclass
class Taken:
    """What a process took; `start` until a megabyte was read (NaN: from memory), `first` until one was written."""

    wall: float
    start: float
    first: float
    cpu: float
    system: float
    start_cpu: float
    anonymous: float
    filed: float
    faults: int
    read: int
    written: int


def meter(command: list[str], env: dict[str, str], log: pathlib.Path) -> Taken:
    """Run it and watch it."""
    began = time.monotonic()
    with open(log, "w") as sink:
        process = subprocess.Popen(command, env=env, stdout=sink, stderr=subprocess.STDOUT)
    proc = pathlib.Path(f"/proc/{process.pid}")
    peaks = {"RssAnon": 0, "RssFile": 0}
    io = {"read_bytes": 0, "write_bytes": 0}
    since: dict[str, tuple[float, float]] = {}

    def watch() -> None:
        while process.returncode is None:
            try:
                for line in (proc / "status").read_text().splitlines():
                    key = line.split(":")[0]
                    if key in peaks:
                        peaks[key] = max(peaks[key], int(line.split()[1]))
                for line in (proc / "io").read_text().splitlines():
                    key, value = line.split(": ")
                    if key in io:
                        io[key] = int(value)
                        if key not in since and io[key] >= 1e6:
                            ticks = (proc / "stat").read_text().rpartition(")")[2].split()[11:13]
                            since[key] = time.monotonic() - began, sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
            except OSError:
                return
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{command[:3]} failed:\n{log.read_text()[-2000:]}")
    start, start_cpu = since.get("read_bytes", (math.nan, math.nan))
    return Taken(
        wall,
        start,
        since.get("write_bytes", (wall, 0))[0],
        usage.ru_utime + usage.ru_stime,
        usage.ru_stime,
        start_cpu,
        peaks["RssAnon"] / 1e3,
        peaks["RssFile"] / 1e3,
        usage.ru_minflt,
        io["read_bytes"],
        io["write_bytes"],
    )


def drop(files: list[pathlib.Path]) -> None:
    """Out of the page cache."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def run(
    root: pathlib.Path,
    size: float,
    methods: tuple[Method, ...],
    *,
    rounds: int = 5,
    mergekit: str | None = None,
    warm: bool = False,
    out: pathlib.Path | None = None,
) -> None:
    """Interleave, print a table, and write every run's figures."""
    from rich.console import Console

    models = root.absolute() / str(size)
    env = {**os.environ, "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}
    compileall.compile_dir(pathlib.Path(jaxmerge.__file__).parent, quiet=1)  # as an installation leaves it
    rows, console = {}, Console(width=180)
    for method in methods:
        names = INPUTS.get(method, ("base", *EXPERTS))
        target = root.absolute() / "out"
        yaml = root.absolute() / "recipe.yml"
        yaml.write_text(recipe(method, models, names))
        commands = {
            **{name: [sys.executable, "-c", FLOOR, kind, str(models), str(target), *names] for name, kind in FLOORS.items()},
            "ours": [sys.executable, "-m", "jaxmerge.cli", "merge", str(yaml), str(target)],
        }
        if mergekit:
            tool = str(pathlib.Path(mergekit).parent / "mergekit-yaml")
            commands["mergekit"] = [tool, str(yaml), str(target), "--no-copy-tokenizer", "--quiet"]
        inputs = [models / n / "model.safetensors" for n in names]
        taken: dict[str, list[Taken]] = {name: [] for name in commands}
        for i in range(rounds):
            order = list(commands)
            for name in order[i % len(order) :] + order[: i % len(order)]:
                shutil.rmtree(target, ignore_errors=True)
                os.sync()
                if warm:
                    for path in inputs:
                        with open(path, "rb") as f:
                            while f.read(1 << 24):
                                pass
                else:
                    drop(inputs)
                taken[name].append(meter(commands[name], env, root / f"{name}.log"))
        shutil.rmtree(target, ignore_errors=True)
        rows[method] = {name: [dataclasses.asdict(t) for t in ts] for name, ts in taken.items()}
        title = f"{method}, {size} B, {'warm' if warm else 'cold'}, {rounds} rounds: medians (min to max)"
        for table in tables(title, taken):
            console.print(table)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"size": size, "warm": warm, "load": os.getloadavg(), "runs": rows}, indent=1))


def tables(title: str, taken: dict[str, list[Taken]]) -> list[Any]:
    """Time, with and without the start-up, against each floor; and memory and bytes."""
    from rich.table import Table

    def median(name: str, of: Callable[[Taken], float]) -> float:
        return statistics.median(map(of, taken[name]))

    def reach(name: str, of: Callable[[Taken], float]) -> str:
        found = [*map(of, taken[name])]
        return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"

    wall, net = (lambda t: t.wall), (lambda t: t.wall - t.start)
    against = [name.removeprefix("floor: ") for name in FLOORS]
    heads = ("", "wall s", *(f"/ {a}" for a in against), "start s", "then s", *(f"/ {a}" for a in against))
    times = Table(*heads, "first written s", "CPU s", "at start", "system", title=title)
    memory = Table("", "anonymous MB", "file MB", "faults", "read GB", "written GB")
    for name in taken:
        times.add_row(
            name,
            reach(name, wall),
            *(f"{median(name, wall) / median(floor, wall):.2f}" for floor in FLOORS),
            f"{median(name, lambda t: t.start):.2f}",
            f"{median(name, net):.2f}",
            *(f"{median(name, net) / median(floor, net):.2f}" for floor in FLOORS),
            f"{median(name, lambda t: t.first):.2f}",
            reach(name, lambda t: t.cpu),
            f"{median(name, lambda t: t.start_cpu):.2f}",
            f"{median(name, lambda t: t.system):.2f}",
        )
        memory.add_row(
            name,
            f"{median(name, lambda t: t.anonymous):.0f}",
            f"{median(name, lambda t: t.filed):.0f}",
            f"{median(name, lambda t: t.faults) / 1e3:.0f} k",
            f"{median(name, lambda t: t.read) / 1e9:.2f}",
            f"{median(name, lambda t: t.written) / 1e9:.2f}",
        )
    for table in (times, memory):
        for column in table.columns[1:]:
            column.justify, column.no_wrap = "right", True
    return [times, memory]


@dataclasses.dataclass(frozen=True)
class Build:
    """Write the models."""

    root: pathlib.Path
    sizes: tuple[float, ...] = (0.13, 0.5, 2.0)


@dataclasses.dataclass(frozen=True)
class Run:
    """Time the merges."""

    root: pathlib.Path
    size: float = 0.5
    methods: tuple[Method, ...] = ("linear", "task_arithmetic", "ties", "dare_ties", "model_stock", "slerp")
    rounds: int = 5
    mergekit: str | None = None
    """A Python that has mergekit."""
    warm: bool = False
    out: pathlib.Path | None = None
    """A JSON file for every run's figures."""


def main() -> None:
    import tyro

    options = tyro.extras.subcommand_cli_from_dict({"build": Build, "run": Run})
    if isinstance(options, Build):
        for size in options.sizes:
            build(options.root, size)
    else:
        arguments = dataclasses.asdict(options)
        run(arguments.pop("root"), arguments.pop("size"), arguments.pop("methods"), **arguments)


if __name__ == "__main__":
    with refusals():
        main()
