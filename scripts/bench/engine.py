"""Merging checkpoints on disk: ours, mergekit's, and the floor (the same bytes read and written, no arithmetic), in turn.

    python -m scripts.bench.engine build --root runs/bench --sizes 0.13 0.5 2
    python -m scripts.bench.engine run   --root runs/bench --size 0.5 --methods linear ties [--mergekit PYTHON] [--warm]

Both tools run their commands on one recipe. Models are Llama-shaped, bfloat16, random: a base and three experts (base +
N(0, 0.002^2)). Every run is a process of its own; what it takes is what the operating system says: wall, the time until a
megabyte of output is written, processor seconds (its own and the system's for it), the peak of its anonymous and file-backed
memory, page faults, bytes from and to the disk. Cold: inputs are dropped from the page cache before each run.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import threading
import time
from typing import Literal

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
root, out, names = sys.argv[1], sys.argv[2], sys.argv[3:]
os.makedirs(out, exist_ok=True)
STEP, ROOMS = 1 << 22, 4
files = [os.open(f"{root}/{n}/model.safetensors", os.O_RDONLY | os.O_DIRECT) for n in names]
size = os.fstat(files[0]).st_size
target = os.open(f"{out}/model.safetensors", os.O_RDWR | os.O_CREAT, 0o644)
os.posix_fallocate(target, 0, size)
direct = os.open(f"{out}/model.safetensors", os.O_WRONLY | os.O_DIRECT)
free, full = [queue.Queue() for _ in files], [queue.Queue() for _ in files]
for rooms in free:
    for _ in range(ROOMS):
        rooms.put(room := mmap.mmap(-1, STEP, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        room.madvise(mmap.MADV_HUGEPAGE)  # direct I/O into large pages is twice as fast
def read(i):
    for at in range(0, size, STEP):
        room = free[i].get()
        os.preadv(files[i], [room], at)
        full[i].put(room)
threads = [threading.Thread(target=read, args=(i,)) for i in range(len(files))]
for thread in threads: thread.start()
for at in range(0, size, STEP):
    rooms = [some.get() for some in full]
    n = min(STEP, size - at)
    whole = n - n % 4096
    if whole: os.pwrite(direct, memoryview(rooms[0])[:whole], at)
    if n > whole: os.pwrite(target, memoryview(rooms[0])[whole:n], at + whole)
    for some, room in zip(free, rooms): some.put(room)
for thread in threads: thread.join()
os.fsync(target)
"""


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
    """What a process took; `first` until a megabyte of output was written."""

    wall: float
    first: float
    cpu: float
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
    peaks = {"RssAnon": 0, "RssFile": 0}
    io = {"read_bytes": 0, "write_bytes": 0}
    first: list[float] = []

    def watch() -> None:
        while process.returncode is None:
            try:
                for line in pathlib.Path(f"/proc/{process.pid}/status").read_text().splitlines():
                    key = line.split(":")[0]
                    if key in peaks:
                        peaks[key] = max(peaks[key], int(line.split()[1]))
                for line in pathlib.Path(f"/proc/{process.pid}/io").read_text().splitlines():
                    key, value = line.split(": ")
                    if key in io:
                        io[key] = int(value)
                if not first and io["write_bytes"] >= 1e6:
                    first.append(time.monotonic() - began)
            except OSError:
                return
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{command[:3]} failed:\n{log.read_text()[-2000:]}")
    cpu = usage.ru_utime + usage.ru_stime
    began_writing = first[0] if first else wall
    memory = peaks["RssAnon"] / 1e3, peaks["RssFile"] / 1e3
    return Taken(wall, began_writing, cpu, *memory, usage.ru_minflt, io["read_bytes"], io["write_bytes"])


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
    from rich.table import Table

    models = root.absolute() / str(size)
    env = {**os.environ, "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}
    rows, console = {}, Console(width=140)
    for method in methods:
        names = INPUTS.get(method, ("base", *EXPERTS))
        target = root.absolute() / "out"
        yaml = root.absolute() / "recipe.yml"
        yaml.write_text(recipe(method, models, names))
        commands = {
            "floor": [sys.executable, "-c", FLOOR, str(models), str(target), *names],
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
        table = Table(title=f"{method}, {size} B, {'warm' if warm else 'cold'}, {rounds} rounds: medians (min to max)")
        columns = ("", "wall s", "to floor", "first s", "CPU s", "anonymous MB", "file MB", "faults", "read GB", "written GB")
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
        floor = statistics.median(t.wall for t in taken["floor"])
        for name, ts in taken.items():
            m = {f.name: statistics.median(getattr(t, f.name) for t in ts) for f in dataclasses.fields(Taken)}
            walls, cpus = [t.wall for t in ts], [t.cpu for t in ts]
            table.add_row(
                name,
                f"{m['wall']:.2f} ({min(walls):.2f} to {max(walls):.2f})",
                f"{m['wall'] / floor:.2f}",
                f"{m['first']:.2f}",
                f"{m['cpu']:.2f} ({min(cpus):.2f} to {max(cpus):.2f})",
                f"{m['anonymous']:.0f}",
                f"{m['filed']:.0f}",
                f"{m['faults'] / 1e3:.0f} k",
                f"{m['read'] / 1e9:.2f}",
                f"{m['written'] / 1e9:.2f}",
            )
        console.print(table)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"size": size, "warm": warm, "load": os.getloadavg(), "runs": rows}, indent=1))


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
