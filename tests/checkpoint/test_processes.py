"""Several processes: each reads and writes its own part of the bytes, and the output is that of one."""

import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest

from jaxmerge import checkpoint, params
from jaxmerge.checkpoint._feed import Unit
from jaxmerge.checkpoint._processes import share
from jaxmerge.checkpoint._task import SOON, small_first
from tests.checkpoint.conftest import save

RUNTIME = 300 << 20
"""What compiled programs and the libraries that write take."""
METHODS = {"linear": params.linear(), "ties": params.ties(0.3), "stock": params.model_stock()}
WITH_DATA = ("fisher", "regmean")
WORKER = """
import pathlib, sys, jax
rank, processes, port, root, kind, names = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:6], sys.argv[6].split(",")
if processes > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=processes, process_id=rank)
from jaxmerge import checkpoint, params
import jaxmerge.checkpoint._tree
import jax.experimental.multihost_utils
def lines(file):
    return dict(line.split(":") for line in pathlib.Path(f"/proc/self/{file}").read_text().splitlines())
def io():
    return int(lines("io")["rchar"]), int(lines("io")["wchar"])
def memory(what):
    return int(lines("status")[what].split()[0]) << 10
for name in names:
    tx = {"linear": params.linear, "ties": lambda: params.ties(0.3), "stock": params.model_stock, "fisher": params.fisher,
          "regmean": params.regmean}[name]()
    data = [f"{root}/{m}-{name}" for m in "ab"] if name in ("fisher", "regmean") else []
    base = None if data else f"{root}/base"
    before, there = io(), memory("VmRSS")
    report = checkpoint.merge(tx, base, [f"{root}/a", f"{root}/b"], f"{root}/{processes}_{name}", memory="64MB", format=kind,
                              statistics=data)
    found = (*(b - a for a, b in zip(before, io())), report.headers.bytes_read, report.headers.bytes_written)
    print(name, *found, memory("VmHWM") - there, flush=True)
"""


def test_who_does_what():
    units = [(Unit(f"large{i}", 0, 100),) for i in range(6)] + [(Unit("small", i, i + 1),) for i in range(400)]
    weights = [100] * 6 + [1] * 400
    shares = [share(units, weights, p, 4) for p in range(4)]
    assert sorted(u for s in shares for u in s) == sorted(u for g in units for u in g)
    assert [sum(u.size for u in s) for s in shares] == [250] * 4
    for mine in shares:  # in order, and the small ones in one run
        assert list(mine) == [g[0] for g in units if g[0] in mine]
        small = [u.start for u in mine if u.name == "small"]
        assert not small or small == list(range(small[0], small[-1] + 1))


def test_a_small_leaf_comes_before_a_large_one():
    units = [
        Unit("large", 0, 9),
        Unit("parts", 0, 1),
        Unit("parts", 1, 2),
        Unit("a", 0, 2),
        Unit("b", 0, 3),
        Unit("large2", 0, 9),
    ]
    weights = [SOON + 1, 7, 7, 5, 6, SOON + 1]
    assert small_first(units, weights) == (units[4], *units[:4], units[5])
    assert small_first(units[1:], weights[1:]) == tuple(units[1:])
    assert small_first(units[:3], weights[:3]) == tuple(units[:3])
    assert small_first([], []) == ()


def models_at(root: pathlib.Path, kind: str, large: bool) -> None:
    """A base and two models: 24 leaves of one size; or one of three times the memory that a process is given."""
    rng = np.random.default_rng(0)
    shapes = {"large": (48_000, 1000)} if large else {f"layers.{i}.w": (2048, 1000) for i in range(24)}
    base = {n: rng.standard_normal(s, np.float32) for n, s in shapes.items()} | {"step": np.arange(3)}
    for seed, n in enumerate(("base", "a", "b")):
        noise = np.random.default_rng(seed)
        change = lambda v, noise=noise: v + np.float32(0.01) * noise.standard_normal(v.shape, np.float32)
        save(root / f"{n}.files", {k: change(v) if k != "step" else v for k, v in base.items()})
        checkpoint.merge(params.passthrough(), None, [root / f"{n}.files"], root / n, format=kind)


def merged_by(processes: int, root: pathlib.Path, kind: str, methods: Sequence[str]) -> list[str]:
    """Merge with so many processes into root/PROCESSES_METHOD; what they print."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(pathlib.Path(__file__).parents[2]), "XLA_FLAGS": ""}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(processes), port, str(root), kind, ",".join(methods)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    outputs = [w.communicate(timeout=300) for w in workers]
    assert [w.returncode for w in workers] == [0] * processes, "\n".join(e[-2000:] for _, e in outputs)
    return [out for out, _ in outputs]


def a_share_each(outputs: Sequence[str], methods: Sequence[str]) -> list[int]:
    """Each of four processes has read and written at most 27 % of the bytes; by how much their memory has grown."""
    found = []
    for out in outputs:
        counted = [line.split() for line in out.splitlines() if line.split()[0] in methods]
        assert len(counted) == len(methods)
        for name, read, written, all_read, all_written, grown in counted:
            print(name, int(read) / int(all_read), int(written) / int(all_written), int(grown) >> 20)
            assert int(read) <= 0.27 * int(all_read) and int(written) <= 0.27 * int(all_written), (name, counted)
            found.append(int(grown))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "large"), [("safetensors", False), ("orbax", False), ("orbax", True)])
def test_four_processes(tmp_path, kind, large):
    """Counted by the operating system: at most 27 % of the bytes each, and no more memory than allowed, beside what programs
    take; the output has the values of one process."""
    methods = ["linear"] if large else list(METHODS)
    models_at(tmp_path, kind, large)
    for grown in a_share_each(merged_by(4, tmp_path, kind, methods), methods):
        assert grown <= 64_000_000 + RUNTIME
    for name, tx in ((name, METHODS[name]) for name in methods):
        checkpoint.merge(tx, tmp_path / "base", [tmp_path / "a", tmp_path / "b"], tmp_path / f"one_{name}", format=kind)
        one, four = (checkpoint.open(tmp_path / f"{n}_{name}") for n in ("one", "4"))
        # sums are made by programs that the flags of this process compile otherwise
        compare = np.testing.assert_array_equal if name == "ties" else lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-7)
        for n in one.leaves:
            compare(one.read(n), four.read(n))


@pytest.mark.slow
def test_four_processes_with_statistics(tmp_path):
    """Information, of which the norms span all processes' parts, and Gram matrices: the bytes of one process, a share each."""
    shapes = {f"layers.{i}.w": (800, 1000) for i in range(24)}
    for seed, m in enumerate("ab"):
        rng = np.random.default_rng(seed)
        save(tmp_path / m, {n: rng.standard_normal(s, np.float32) for n, s in shapes.items()})
        save(tmp_path / f"{m}-fisher", {n: (1 + seed) * rng.random(s, np.float32) for n, s in shapes.items()})
        x = rng.standard_normal((1000, 800), np.float32)
        save(tmp_path / f"{m}-regmean", {n: x.T @ (x * (1 + i % 3)) for i, n in enumerate(shapes)})
    a_share_each(merged_by(4, tmp_path, "safetensors", WITH_DATA), WITH_DATA)
    merged_by(1, tmp_path, "safetensors", WITH_DATA)
    for name in WITH_DATA:
        four, one = ((tmp_path / f"{n}_{name}" / "model.safetensors").read_bytes() for n in (4, 1))
        assert four == one, name
