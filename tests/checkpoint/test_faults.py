"""Whatever happens to a merge: the output is whole or not there, what was there stays, and the same command goes on."""

import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from jaxmerge import checkpoint, params
from jaxmerge.checkpoint import _behind, _direct, _journal
from tests.checkpoint.conftest import save

# Merges in forked children: each is killed at its k-th event, looked at, and run again to the end. An event is a range written
# (before it, and after half of it), a line of the journal (before, after), a step of making the output appear, a unit done.
KILLS = """
import hashlib, json, os, pathlib, random, shutil, signal, sys, warnings
warnings.simplefilter("ignore")
from jaxmerge import checkpoint, params
from jaxmerge.checkpoint import _direct, _journal, _layout, _programs, _ranges, _tree
import numpy as np
root, out, count, seed = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
_programs.SIZES = (1 << 13, 1 << 12)
_ranges.CHECKPOINT = 1 << 15
tx = {"ties": params.ties(0.3), "dare": params.dare_linear(0.5, seed=1)}[sys.argv[5]]
kind = sys.argv[6]
happened, noted, last = 0, 0, 1 << 60

def event(*_):
    global happened
    happened += 1
    if happened == last or noted == -last:
        os.kill(os.getpid(), signal.SIGKILL)

def around(module, name):
    f = getattr(module, name)
    def g(*a, **k):
        global noted
        event(); value = f(*a, **k); noted += name == "note"; event()
        return value
    setattr(module, name, g)

def torn(self, data, offset):
    event(); half = data.size // 2
    write(self, data[:half], offset); event(); write(self, data[half:], offset + half)

write = _direct.Writer.write
_direct.Writer.write = torn
around(_journal.Workplace, "note"); around(_journal, "sync"); around(pathlib.Path, "rename")
for name in ("_flush", "_send", "put"):
    around(_tree.Blocks, name)
around(_tree.Tree, "_give_shapes"); around(_tree.Tree, "finish")
around(_layout.Layout if kind == "safetensors" else _tree.Tree, "prepare")

def child(work):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, json.dumps(work()).encode())
        os._exit(0)
    os.close(write)
    status = os.waitpid(pid, 0)[1]
    text = os.read(read, 1 << 16)
    os.close(read)
    return status, json.loads(text) if text else None

def run(kill):
    def work():
        global last
        last = kill
        report = checkpoint.merge(tx, root / "base", [root / n for n in "abc"], out, memory=300_000, overwrite=True,
                                  format=kind if kind == "safetensors" else "orbax", on_devices=kind == "devices",
                                  on_progress=event, beside={"README.md": "a card"})
        return [happened, report.resumed]
    return child(work)

def look(there):
    '''Its bytes; of Orbax, whose files have names drawn at random, the values, and what lies beside them.'''
    if kind == "safetensors":
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in there.iterdir()}
    def work():
        source = checkpoint.open(there)
        found = {n: hashlib.sha256(np.ascontiguousarray(source.read(n)).tobytes()).hexdigest() for n in source.leaves}
        receipt = checkpoint.receipt(there)
        assert {f for f in receipt["files"]} == {str(p.relative_to(there)) for p in there.rglob("*") if p.is_file()} - beside
        assert {p.name for p in there.iterdir()} == names, list(there.iterdir())
        return found | {"settings": receipt["settings"]}
    status, found = child(work)
    assert status == 0
    return found

beside = {"jaxmerge.json", "README.md", "commit_success.txt", "orbax.checkpoint"}
status, (events, resumed) = run(1 << 60)
assert status == 0 and resumed == 0
names = {p.name for p in out.iterdir()}
want = look(out)
rng, resumes = random.Random(seed), 0
for trial in range(count):
    kept = trial % 2 == 0
    if not kept:
        shutil.rmtree(out)
    status, _ = run(rng.randint(1, events) if trial else -2)  # the first when two notes are safe, whatever the machine does
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        replaced = out.parent / (out.name + ".replaced")
        there = out if out.exists() else replaced if replaced.exists() else None
        finished = not (out.parent / (out.name + ".merging")).exists()  # killed when all was done
        assert there is not None if kept else there is None or finished
        if there is not None and not (there / "lock").exists():
            assert look(there) == want, "what was there has changed"
    status, (_, resumed) = run(1 << 60)
    assert status == 0
    resumes += resumed > 0
    assert sorted(p.name for p in out.parent.iterdir()) == [out.name], sorted(out.parent.iterdir())
    assert look(out) == want, "not what an undisturbed merge makes"
print(json.dumps([events, resumes]))
"""


def kills(models, tmp_path, count, method, kind):
    root = models[0]["base"].parent
    env = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"}
    env["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    (tmp_path / "place").mkdir()
    command = [sys.executable, "-c", KILLS, str(root), str(tmp_path / "place/out"), str(count), "7", method, kind]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    events, resumed = (int(v) for v in done.stdout.strip().strip("[]").split(","))
    assert events > 40
    return resumed


@pytest.mark.parametrize(
    "kind", ["orbax", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("safetensors", "devices"))]
)
def test_killed_at_random_moments(models, tmp_path, kind):
    assert kills(models, tmp_path, 4 if kind == "safetensors" else 3, "dare", kind) >= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "kind", "resumed"),
    [
        ("dare", "safetensors", 15),
        ("ties", "safetensors", 3),
        ("dare", "orbax", 10),
        ("ties", "orbax", 3),
        ("ties", "devices", 3),
    ],
)
def test_killed_at_fifty_random_moments(models, tmp_path, method, kind, resumed):
    """Of ties most moments are in the passes that find the threshold, which are done again if they were not whole."""
    assert kills(models, tmp_path, 50, method, kind) >= resumed


def merge(models, out, **kwargs):
    paths, _ = models
    return checkpoint.merge(params.linear(), paths["base"], [paths["a"], paths["b"]], out, **kwargs)


def test_another_merge_at_the_same_place(models, tmp_path):
    place = _journal.Workplace(tmp_path / "out", rank=0, overwrite=False)
    with pytest.raises(OSError, match=rf"another merge \(process {os.getpid()}\) is writing .*out; wait for it"):
        merge(models, tmp_path / "out")
    assert place.directory.exists()
    place.leave(keep=True)
    merge(models, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_is_there_stays(models, tmp_path):
    out = tmp_path / "out"
    merge(models, out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(FileExistsError, match="--overwrite"):
        merge(models, out)
    hurt = {n: v.copy() for n, v in models[1]["a"].items()}
    hurt["big"][0, 0] = np.nan
    broken = save(tmp_path / "broken", hurt)
    with pytest.raises(checkpoint.MergeError, match="not finite"):
        checkpoint.merge(params.linear(), models[0]["base"], [broken], out, overwrite=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "out"]


def test_a_full_disk(models, tmp_path):
    """A limit on file size stands in for it: the room is taken before anything is computed, and what was there stays."""
    merge(models, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"no room for .*model\.safetensors"):
            merge(models, tmp_path / "out", overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def rewritten(path, change):
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


SHARDS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
DAMAGE = {
    "cut": (lambda one, two: os.truncate(two, two.stat().st_size - 10), "cut short"),
    "header": (lambda one, two: rewritten(two, lambda data: data.__setitem__(9, 0xFF)), "a header that cannot be read"),
    "zeros": (lambda one, two: rewritten(two, lambda data: data.__setitem__(slice(64), bytes(64))), "or is damaged"),
    "gone": (lambda one, two: two.unlink(), "lacks 1 of its 2 files: model-00002"),
    "twice": (shutil.copy, f"is in two files, {SHARDS[0]} and {SHARDS[1]}"),
    "renamed": (lambda one, two: two.rename(two.with_name("model-00002-of-00003.safetensors")), "lacks"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_shard_that_is_wrong(models, tmp_path, name):
    """One error before anything is written; what an earlier merge has left is as it was."""
    (paths, trees), (damage, message), inputs = models, DAMAGE[name], tmp_path / "a"
    leaves = list(trees["a"])
    for shard, part in zip(SHARDS, (leaves[:3], leaves[3:]), strict=True):
        save(inputs, {n: trees["a"][n] for n in part}).joinpath("model.safetensors").rename(inputs / shard)
    out = tmp_path / "out"
    checkpoint.merge(params.linear(), paths["base"], [inputs], out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    damage(*(inputs / shard for shard in SHARDS))
    with pytest.raises(ValueError, match=message):
        checkpoint.merge(params.linear(), paths["base"], [inputs], out, overwrite=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "out"]


def test_a_disk_that_fills_up_under_a_tree(models, tmp_path, monkeypatch):
    """Of a tree no room can be taken first, but what cannot fit is refused; when there is room again the merge goes on."""
    monkeypatch.setattr("jaxmerge.checkpoint._ranges.CHECKPOINT", 1 << 14)
    merge(models, tmp_path / "before")
    with monkeypatch.context() as m:
        m.setattr("shutil.disk_usage", lambda path: type("", (), {"free": 10_000}))
        with pytest.raises(OSError, match=r"no room for .*out\.merging of up to 145 kB: 10 kB are free"):
            merge(models, tmp_path / "out", format="orbax")
    assert [p.name for p in tmp_path.iterdir()] == ["before"]
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"ocdbt\.process_0 cannot be written: .*File too large"):
            merge(models, tmp_path / "out", format="orbax")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert not (tmp_path / "out").exists()
    merge(models, tmp_path / "out", format="orbax")
    one, two = checkpoint.open(tmp_path / "before"), checkpoint.open(tmp_path / "out")
    for n in one.leaves:
        np.testing.assert_array_equal(one.read(n), two.read(n))


def test_no_permission(models, tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
    with pytest.raises(PermissionError, match=r"out\.merging"):
        merge(models, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fails_in_the_middle(models, tmp_path, monkeypatch):
    """One error, the output is not there; the same command goes on when the disk is well again."""
    monkeypatch.setattr("jaxmerge.checkpoint._ranges.CHECKPOINT", 1 << 14)
    write, left = _direct.Writer.write, [3]

    def failing(self, data, offset):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(5, "Input/output error")
        write(self, data, offset)

    monkeypatch.setattr(_direct.Writer, "write", failing)
    with pytest.raises(OSError, match="Input/output error"):
        merge(models, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out.merging"]
    monkeypatch.setattr(_direct.Writer, "write", write)
    assert merge(models, tmp_path / "out").resumed > 0
    merge(models, tmp_path / "undisturbed")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "undisturbed/model.safetensors").read_bytes()


def test_an_input_that_is_cut_while_it_is_read(models, tmp_path, monkeypatch):
    path = save(tmp_path / "short", models[1]["a"]) / "model.safetensors"
    prepare = _direct.Reader.__init__

    def cut(self):
        prepare(self)
        os.truncate(path, path.stat().st_size - 1000)

    monkeypatch.setattr(_direct.Reader, "__init__", cut)
    with pytest.raises(OSError, match="cut short: asked for"):
        checkpoint.merge(params.linear(), models[0]["base"], [path], tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["short"]


def test_nothing_is_replaced_but_what_a_merge_has_made(models, tmp_path):
    """Not a home directory, not a folder of notes, not a file; and links lead where they point."""
    home = tmp_path / "home"
    home.mkdir()
    merge(models, home)  # an empty directory is a place like any other
    (home / "jaxmerge.json").unlink()
    file = tmp_path / "file"
    file.write_text("precious")
    for out in (home, file):
        with pytest.raises(FileExistsError, match=r"is not replaced: no merge has made it \(it has no jaxmerge.json\)"):
            merge(models, out, overwrite=True)
    assert (home / "model.safetensors").exists() and file.read_text() == "precious"
    (tmp_path / "nothing yet").symlink_to(tmp_path / "far" / "away")
    for _ in range(2):
        merge(models, tmp_path / "nothing yet", overwrite=True)
    assert (tmp_path / "nothing yet").is_symlink() and (tmp_path / "far/away/jaxmerge.json").exists()
    assert sorted(p.name for p in tmp_path.rglob("*.merging")) == []


def test_no_output_takes_the_place_of_its_parents(models, tmp_path):
    for name in "ab":
        shutil.copytree(models[0][name], tmp_path / "all" / name)
    (tmp_path / "all/jaxmerge.json").write_text("{}")
    with pytest.raises(checkpoint.MergeError, match=r"a, which is merged here, lies in .*all; choose another place"):
        checkpoint.merge(params.linear(), None, [tmp_path / "all/a", tmp_path / "all/b"], tmp_path / "all", overwrite=True)
    assert (tmp_path / "all/a/model.safetensors").exists()


def test_another_merge_does_not_go_on_from_this_one(models, tmp_path, monkeypatch):
    """What was left by other inputs, coefficients or options is not taken over; a torn line of the journal is not either."""
    paths, _ = models
    merge(models, tmp_path / "want")
    for left in ([paths["a"], paths["c"]], [paths["a"], paths["b"]]):
        with monkeypatch.context() as m:
            m.setattr("jaxmerge.checkpoint._ranges.CHECKPOINT", 1 << 14)
            m.setattr(_journal.Workplace, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                checkpoint.merge(params.linear(), paths["base"], left, tmp_path / "out", overwrite=True)
        journal = tmp_path / "out.merging/journal-0.jsonl"
        assert len(journal.read_text().splitlines()) > 3
        journal.write_text(journal.read_text() + '{"units": 999, "fo')
        report = merge(models, tmp_path / "out", overwrite=True)
        assert (report.resumed > 0) == (left[1] == paths["b"])
        assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "want/model.safetensors").read_bytes()


@pytest.mark.parametrize("synced", [False, True])
def test_a_machine_that_went_down(models, tmp_path, monkeypatch, synced):
    """What a process that was killed had written is there; after the machine went down, only what had been put on the disk."""
    merge(models, tmp_path / "want")
    monkeypatch.setattr("jaxmerge.checkpoint._ranges.CHECKPOINT", 1 << 14)
    monkeypatch.setattr(_behind, "SYNC", -1 if synced else 3600)
    for here, resumed in (("one", True), ("another", synced)):
        with monkeypatch.context() as m:
            m.setattr(_journal, "boot", lambda: "one")
            m.setattr(_journal.Workplace, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                merge(models, tmp_path / "out", overwrite=True)
        monkeypatch.setattr(_journal, "boot", lambda here=here: here)
        assert (merge(models, tmp_path / "out", overwrite=True).resumed > 0) == resumed
        assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "want/model.safetensors").read_bytes()


def test_lines_that_no_longer_hold(tmp_path, monkeypatch):
    """All up to the last that holds: of an earlier run of the machine those before one that was for good."""
    good, one, two = {"n": 0}, {"n": 1, "boot": "one"}, {"n": 2, "boot": "two"}
    holding = _journal.holding
    assert holding([good, one], "one") == [good, one] and holding([good, one], "two") == [good]
    assert holding([good, one, good, two], "three") == [good, one, good] and holding([one], "two") == []
    assert holding([good, one], None) == [good]  # a machine that does not say which run this is
    synced, sync = [], _journal.sync
    monkeypatch.setattr(_journal, "sync", lambda path: [synced.append(path), sync(path)])
    place = _journal.Workplace(tmp_path / "out", rank=0, overwrite=False)
    assert place.begin("m", lambda: None, resume=True) == []
    place.note({"n": 1})
    place.note({"n": 2}, for_good=False)
    place.forget()
    assert [line["n"] for line in place.begin("m", lambda: None, resume=True)] == [1]
    place.note({"n": 2}, for_good=False)
    assert place.begin("m", lambda: None, resume=True) == [{"n": 1}, {"n": 2}]
    assert set(synced) >= set(place.directory.iterdir())  # what an earlier process left with the kernel is on the disk now
    place.forget()
    assert place.begin("m", lambda: None, resume=True) == [{"n": 1}, {"n": 2}]


def test_where_a_machine_does_not_say_which_run_this_is(models, tmp_path, monkeypatch):
    """All that is noted is on the disk first."""
    syncs, sync = [], _direct.Writer.sync
    monkeypatch.setattr("jaxmerge.checkpoint._ranges.CHECKPOINT", 1 << 14)
    monkeypatch.setattr(_direct.Writer, "sync", lambda self: [syncs.append(1), sync(self)])
    for known in (False, True):
        if not known:
            monkeypatch.setattr(_behind, "boot", lambda: None)
        merge(models, tmp_path / f"out{known}")
        assert (len(syncs) == 1) == known and syncs
        syncs.clear()
        monkeypatch.setattr(_behind, "boot", _journal.boot)


def test_what_does_not_reach_the_disk_is_written_again(models, tmp_path, monkeypatch):
    """The kernel takes over what the disk then refuses: that is told, and nothing that was noted is believed."""
    monkeypatch.setattr("jaxmerge.checkpoint._ranges.CHECKPOINT", 1 << 14)

    def refuse(self):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as m:
        m.setattr(_direct.Writer, "sync", refuse)
        with pytest.raises(OSError, match="did not reach the disk: Input/output error"):
            merge(models, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert merge(models, tmp_path / "out").resumed == 0
    merge(models, tmp_path / "undisturbed")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "undisturbed/model.safetensors").read_bytes()


def test_without_direct_io(models, tmp_path, monkeypatch):
    """Where it is refused (tmpfs, some network file systems) files go through the page cache, and it is said."""
    merge(models, tmp_path / "want")
    monkeypatch.setattr(_direct, "_open", lambda file, mode: (os.open(file, mode), False))
    report = merge(models, tmp_path / "out")
    assert (
        len(report.buffered) == 4
        and (tmp_path / "want/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
    )
