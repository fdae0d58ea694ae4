"""`jaxmerge doctor`: who is there and who is missing, what can be read and what can be written, each with what helps."""

import concurrent.futures
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmerge import _roll_call, cli
from jaxmerge._commands import doctor
from jaxmerge._roll_call import Party, Roll, party, roll_call
from jaxmerge.checkpoint import _probe


@pytest.fixture
def port():
    with socket.create_server(("", 0)) as free:
        return free.getsockname()[1]


def call(port: int, ranks: list[int], processes: int, seconds: float) -> list[Roll]:
    with concurrent.futures.ThreadPoolExecutor(len(ranks)) as hosts:
        return list(hosts.map(lambda rank: roll_call(Party(f"localhost:{port}", processes, rank), seconds), ranks))


def test_all_arrive_and_the_port_is_free_again(port):
    for ranks in ([0, 1, 2, 3], [3, 2, 1, 0]):
        for roll in call(port, ranks, 4, 10.0):
            assert sorted(roll.present) == [0, 1, 2, 3] and not roll.missing
    assert str(roll).startswith("4 of 4 hosts arrived (0 ")


def test_who_is_missing(port):
    """All who came learn it, when the time is over; a stranger is not counted, a rank that came twice is named."""
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(1) as strangers:

        def knock() -> None:
            time.sleep(0.1)
            with socket.create_connection(("localhost", port)) as line:
                line.sendall(b"GET / HTTP/1.1\r\n\r\n")

        strangers.submit(knock)
        rolls = call(port, [0, 1, 3, 3], 5, 0.8)
    assert 0.7 < time.monotonic() - began < 5
    for roll in rolls:
        assert roll.missing == [2, 4] and roll.twice == ((3, socket.gethostname()),)
        assert "3 of 5 hosts arrived" in str(roll) and "missing 2, 4: start the same command there too" in str(roll)
        assert "says that it is 3, too: each needs a rank of its own" in str(roll)
    assert "host 0 is not found" in str(call(port, [1], 2, 0.3)[0])
    with socket.create_server(("", port)), pytest.raises(OSError, match=f"port {port} of this host is taken"):
        roll_call(Party(f"localhost:{port}", 2, 0), 0.3)


def test_what_the_environment_says():
    said = {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
    assert party(said) == Party("host:1", 4, 3)
    assert party(said | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}) is None and party({}) is None
    for wrong in (
        {"JAX_PROCESS_ID": "4"},
        {"JAX_PROCESS_ID": "x"},
        {"JAX_COORDINATOR_ADDRESS": "host"},
        {"JAX_NUM_PROCESSES": ""},
    ):
        with pytest.raises(ValueError, match=r"several processes need all of|is no rank among"):
            party(said | wrong)


@pytest.mark.parametrize("change", ["gone", "other arguments", "other results"])
def test_a_jax_whose_detection_is_another(monkeypatch, change):
    """It is private: without it one process is one process, and several are told what to set."""
    from jax._src import clusters

    if change == "gone":
        monkeypatch.delattr(clusters, "ClusterEnv")
    else:
        found = (lambda address: None) if change == "other arguments" else lambda *_: (None, None)
        monkeypatch.setattr(clusters.ClusterEnv, "auto_detect_unset_distributed_params", found)
    assert party({}) is None and party({"SLURM_NTASKS": "1"}) is None
    for said in ({"SLURM_NTASKS": "4"}, {"JAX_COORDINATOR_ADDRESS": "host:1"}):
        [(name, value)] = said.items()
        with pytest.raises(ValueError, match=rf"{name}={value} speaks of several processes, .* set JAX_COORDINATOR_ADDRESS, "):
            party(said)
    ranks = {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
    assert party(ranks) == Party("host:1", 4, 3)  # what is said is not asked for


def test_one_merge_of_two_processes(port, tmp_path):
    """Each has a part; the first one tells."""
    rng = np.random.default_rng(0)
    trees = [{f"layers.{i}.w": rng.standard_normal((64, 64)).astype(np.float32) for i in range(4)} for _ in "ab"]
    for name, tree in zip("ab", trees, strict=True):
        save_file(tree, tmp_path / f"{name}.safetensors")
    command = ["merge", "linear", "--models", "a.safetensors", "b.safetensors", "--out", "out"]
    root = str(pathlib.Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": f"localhost:{port}"}
    start = lambda rank: subprocess.Popen(
        [sys.executable, "-m", "jaxmerge.cli", *command],
        cwd=tmp_path,
        env={**environment, "JAX_PROCESS_ID": str(rank), "XLA_FLAGS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    both = [start(rank) for rank in (0, 1)]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert "seconds" in said[0][0] and "seconds" not in said[1][0]
    merged = load_file(tmp_path / "out/model.safetensors")
    for name, x in merged.items():
        np.testing.assert_allclose(x, (trees[0][name] + trees[1][name]) / 2, rtol=1e-6)


def test_nobody_merges_while_somebody_is_missing(port, monkeypatch, capsys):
    for name, value in {"COORDINATOR_ADDRESS": f"localhost:{port}", "NUM_PROCESSES": "2", "PROCESS_ID": "0"}.items():
        monkeypatch.setenv(f"JAX_{name}", value)
    monkeypatch.setattr(_roll_call, "roll_call", lambda party, seconds: Roll(2, {0: "here"}))
    assert cli._guarded(["merge", "recipe.yml", "out"], alone=False) == 2
    assert "1 of 2 hosts arrived (0 here); missing 1: start the same command there too" in capsys.readouterr().err


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setattr(doctor, "_machine", lambda: None)  # what they say is looked at in test_cli


def test_the_command_counts_hosts(port, quiet, monkeypatch, capsys):
    for name, value in {"COORDINATOR_ADDRESS": f"localhost:{port}", "NUM_PROCESSES": "2", "PROCESS_ID": "0"}.items():
        monkeypatch.setenv(f"JAX_{name}", value)
    assert cli.main(["doctor", "--wait", "0.2"]) == 1
    said = capsys.readouterr().out
    assert f"2 are expected at localhost:{port}, this is 0" in said and "1 of 2 hosts arrived" in said and "missing 1:" in said
    with concurrent.futures.ThreadPoolExecutor(1) as other:
        other.submit(call, port, [1], 2, 10.0)
        assert cli.main(["doctor", "--wait", "10"]) == 0
    assert "2 of 2 hosts arrived" in capsys.readouterr().out
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    assert cli.main(["doctor"]) == 2 and "2 is no rank among 2 processes" in capsys.readouterr().err


def test_what_can_be_read_and_written(tmp_path, quiet, capsys):
    save_file({"w": np.ones((3, 4), np.float32), "big": np.ones((30, 40), np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-1])
    names = sorted(p.name for p in tmp_path.iterdir())
    assert cli.main(["doctor", str(tmp_path / "model.safetensors"), "--out", str(tmp_path / "a/b"), str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "headers: safetensors, 2 tensors" in said and "read: 16 bytes of w" in said
    assert f"{tmp_path}/a/b: create: {tmp_path} takes files" in said and said.count("remove: it is gone again") == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert cli.main(["doctor", str(tmp_path / "cut.safetensors"), str(tmp_path / "none")]) == 1
    said = capsys.readouterr().out
    assert "headers: NO: " in said and "is cut short" in said and "none: list: NO: nothing lies there" in said
    [finding] = _probe.write(tmp_path / "cut.safetensors/x")
    assert not finding.works and finding.step == "create"
    assert "outputs are written to local paths" in _probe.write("https://host/x")[0].found
    error = PermissionError(13, "Permission denied")
    assert "chmod u+w" in _probe._remedy(tmp_path, "create", error) and "chmod u+r" in _probe._remedy(tmp_path, "list", error)
    assert "s3:PutObject" in _probe._remedy("s3://b/x", "create", OSError("403")) and "no answer in 30 s" in _probe._remedy(
        "gs://b", "list", TimeoutError()
    )


def test_demo(tmp_path, capsys):
    """Every command it prints is one that a user can give; what it leaves is whole."""
    out = tmp_path / "demo"
    assert cli.main(["demo", str(out)]) == 0
    said = capsys.readouterr().out
    for part in (
        "$ jaxmerge plan",
        "$ jaxmerge merge",
        "$ jaxmerge verify",
        "is what its receipt says",
        "tasks.png",
        "entries that",
    ):
        assert part in said, part
    assert "model.layers.5.self_attn.q_proj.weight at=1 weight=[1, 1, 0.8] " in said
    assert "model.norm.weight at=0 weight=[1, 0.2, 0.4] " in said
    assert (out / "tasks.png").stat().st_size > 10_000
    config = json.loads((out / "merged/config.json").read_text())
    tokens = json.loads((out / "merged/tokenizer.json").read_text())
    assert config["vocab_size"] == 1025 and tokens["added_tokens"][-1]["content"] == "<|fim|>"
    commands = [line.removeprefix("$ jaxmerge ").split() for line in said.splitlines() if line.startswith("$ jaxmerge")]
    assert [c[0] for c in commands] == ["plan", "merge", "verify", "inspect"]
    assert cli.main(["verify", commands[2][1]]) == 0
    assert cli.main(["demo", str(out)]) == 2 and "exists; name another folder" in capsys.readouterr().err
    assert cli.main(["demo", "--help"]) == 0 and "usage: jaxmerge demo [OUT]" in capsys.readouterr().out
    assert pathlib.Path("jaxmerge-demo").exists() is False
