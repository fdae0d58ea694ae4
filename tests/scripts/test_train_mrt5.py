"""The main job at a tiny size: it trains, saves, resumes bit for bit, is evaluated and shown."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
import tyro
from jax.sharding import PartitionSpec as P

from jaxmerge import words
from models import mrt5, t5
from scripts import data, evaluate, show_bytes, state, train_mrt5
from scripts.bytes_views import characters

TINY = mrt5.MrT5Config(t5.T5Config(16, 4, 32, 2, 2, 1, softmax1=True, dropout=0.0), gate_layer=1)
FLAGS = train_mrt5.Flags(
    model=TINY, length=32, batch=8, steps=4, expert_steps=2, gate_start=1, log_every=1, eval_every=4, save_every=2
)


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out):
    return [(r["phase"], r["step"], r["loss"], r["alpha"]) for r in rows(out) if "loss" in r]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("mrt5")
    train_mrt5.train(dataclasses.replace(FLAGS, out=out))
    return out


def test_training_leaves_everything(trained):
    files = {"model.json", "data.json", "metrics.jsonl", "loss.png"}
    assert {p.name for p in trained.iterdir()} == {"base", "prose", "code", "resume", *files}
    assert [(p, s) for p, s, *_ in losses(trained)] == [
        *(("base", i) for i in (1, 2, 3, 4)), *(("prose", i) for i in (1, 2)), *(("code", i) for i in (1, 2))
    ]  # fmt: skip
    assert all(a == 0 for p, s, _, a in losses(trained) if p == "base" and s <= 2)  # the gate is not steered before it learns
    assert rows(trained)[0]["rate"] == 0 and rows(trained)[0]["gate"] > -1e-6  # nothing is deleted before
    assert losses(trained)[3][3] > 0
    assert [r["step"] for r in rows(trained) if "heldout" in r] == [4, 2, 2]


def test_checkpoints_are_plain_sharded_trees(trained):
    mesh = state.make_mesh(4, 2)
    params = state.load_params(trained / "base", mesh, TINY)
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    assert all(type(key.key) is str for path, _ in flat for key in path)
    assert params["t5"]["embedding"].sharding.spec == P("fsdp")
    assert params["t5"]["encoder"]["blocks"]["1"]["ffn"]["wi_0"]["kernel"].shape == (16, 32)
    again = state.to_tree(state.to_model(TINY, params))
    jax.tree.map(np.testing.assert_array_equal, again, params)
    experts = [state.load_params(trained / name, mesh, TINY) for name in ("prose", "code")]
    tables = [np.asarray(p["t5"]["embedding"]) for p in (params, *experts)]
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(tables, 2))


def test_resuming_equals_never_stopping(trained, tmp_path, monkeypatch):
    """Stopped in the middle of the base, as a killed run is: after the save at step 2, before anything else."""
    flags = dataclasses.replace(FLAGS, out=tmp_path, experts=False)

    class Stop(Exception):
        pass

    save = train_mrt5.keep_for_resume
    with monkeypatch.context() as m:

        def save_and_stop(out, phase, s):
            save(out, phase, s)
            raise Stop

        m.setattr(train_mrt5, "keep_for_resume", save_and_stop)
        with pytest.raises(Stop):
            train_mrt5.train(flags)
    assert [s for _, s, *_ in losses(tmp_path)] == [1, 2]
    train_mrt5.train(dataclasses.replace(flags, resume=True))
    assert losses(tmp_path) == losses(trained)[:4]  # bit for bit
    mesh = state.make_mesh(4, 2)
    jax.tree.map(
        np.testing.assert_array_equal,
        state.load_params(tmp_path / "base", mesh, TINY),
        state.load_params(trained / "base", mesh, TINY),
    )


@pytest.mark.slow
def test_text_of_ones_own(tmp_path):
    """One domain, from the command line: no experts; evaluation and pictures read what was held out of it."""
    files = tmp_path / "a folder"
    files.mkdir()
    (files / "ru.txt").write_text("Все люди рождаются свободными. " * 40, encoding="utf-8")
    (files / "ja.txt").write_text("すべての人間は、生まれながらにして自由である。\n" * 40, encoding="utf-8")
    small = ["--length", "32", "--batch", "8", "--steps", "1", "--gate-start", "0", "--text", str(files / "*.txt")]
    out = tmp_path / "run"
    flags = tyro.cli(train_mrt5.Flags, args=["--out", str(out), *small])
    train_mrt5.train(dataclasses.replace(flags, model=TINY))
    assert {p.name for p in out.iterdir()} == {"base", "model.json", "data.json", "metrics.jsonl", "loss.png", "resume"}
    result = evaluate.evaluate(evaluate.Flags((f"base={out / 'base'}",), out=out, windows=8, rows=8))
    assert list(result["rows"]["base"]) == ["text"] == list(result["baselines"]["order-2 bytes"])
    assert len(list(evaluate.tables(result))) == 1
    text, _ = show_bytes.show(show_bytes.Flags((out / "base",), out=tmp_path / "d.html", inputs=32))
    assert "自由" in text.decode() and "свободными" in text.decode()
    again = dataclasses.replace(flags, model=TINY, resume=True, text=(str(files / "ja.txt"),))
    with pytest.raises(ValueError, match=r"was trained with text .* and not .*ja\.txt"):
        train_mrt5.train(again)
    for name in train_mrt5.TAKEN:
        with pytest.raises(ValueError, match=f"OUT/{name} is not a domain's"):
            train_mrt5.train(dataclasses.replace(flags, model=TINY, text=(f"{name}={files / 'ja.txt'}",)))


def test_domains_come_in_turn():
    """Also where there are more of them than windows in a step; each window is of one."""
    text = {name: data.Corpus(np.full(200, ord(name), np.uint8), np.zeros(0, np.uint8)) for name in "abc"}
    flags = dataclasses.replace(FLAGS, batch=2)
    steps = [train_mrt5.batch(flags, text, "base", step).targets for step in range(3)]
    assert [sorted({words.to_bytes(row)[1:2] for row in rows}) for rows in steps] == [[b"a", b"b"], [b"a", b"c"], [b"b", b"c"]]
    assert {words.to_bytes(row)[1:2] for row in train_mrt5.batch(flags, text, "b", 0).targets} == {b"b"}


def test_evaluation(trained):
    flags = evaluate.Flags((f"base={trained / 'base'}", f"code={trained / 'code'}"), out=trained, windows=8, rows=8)
    evaluate.main(flags)
    result = json.loads((trained / "evaluation.json").read_text())
    assert set(result["rows"]) == {"base", "code"} and set(result["baselines"]) == {"byte frequency", "order-2 bytes"}
    for row in result["rows"].values():
        for d in row.values():
            assert 0 <= d["deleted"] <= 1 and d["overflow"] == 0 and 0 < d["soft"] < 20
            assert d["hard"] == pytest.approx(d["soft"], abs=0.5) and d["input"] != 0
    with pytest.raises(ValueError, match=r"NAME=PATH; got \['nothing'\]"):
        evaluate.evaluate(dataclasses.replace(flags, checkpoints=("nothing",)))
    for checkpoints in ((), ("a=x", "a=y")):
        with pytest.raises(ValueError, match="one or more checkpoints, each a name of its own"):
            evaluate.evaluate(dataclasses.replace(flags, checkpoints=checkpoints))
    with pytest.raises(ValueError, match="no checkpoint at"):
        evaluate.evaluate(dataclasses.replace(flags, checkpoints=(f"x={trained / 'absent'}",)))


def test_pictures(trained, tmp_path, capsys):
    page = tmp_path / "page.txt"
    page.write_bytes("Grüße & <b>\n".encode() + b"\xff" + "漢字 end".encode())
    flags = show_bytes.Flags((trained / "base",), out=tmp_path / "d.html", file=page, inputs=32)
    show_bytes.main(flags)
    text, (view,) = show_bytes.show(flags)
    chars = characters(text, view)
    assert "".join(c for c, *_ in chars) == "Grüße & <b>\n\ufffd漢字 end"
    assert all(-30 <= g <= 0 and gone == (g <= -15) for _, gone, g in chars)
    html = flags.out.read_text()
    assert html.count("<span") == len(chars) + 3 and "&lt;" in html and 'data-v="-' in html
    assert "deleted" in capsys.readouterr().out
    with pytest.raises(ValueError, match="there is no file"):
        show_bytes.show(dataclasses.replace(flags, file=tmp_path / "absent"))


@pytest.mark.parametrize("wrong", [dict(noise=0.0), dict(target_deletion=2.0), dict(length=0), dict(resume=True)])
def test_bad_flags_cost_no_earlier_run(tmp_path, wrong):
    """Everything is refused before the state that `--resume` needs is dropped, or another model's description written."""
    kept = tmp_path / "resume" / "base-000004", tmp_path / "metrics.jsonl", tmp_path / "model.json"
    kept[0].mkdir(parents=True)
    kept[1].write_text("{}\n")
    state.save_config(kept[2], dataclasses.replace(TINY, gate_layer=0))
    with pytest.raises(ValueError, match="holds another model" if "resume" in wrong else "density|target|length"):
        train_mrt5.train(dataclasses.replace(FLAGS, out=tmp_path, **wrong))
    assert all(path.exists() for path in kept) and state.load_config(kept[2]).gate_layer == 0


def test_bad_flags(tmp_path):
    with pytest.raises(ValueError, match="batch must be a multiple of the 8 devices, got 6"):
        train_mrt5.train(dataclasses.replace(FLAGS, out=tmp_path, batch=6))
    with pytest.raises(ValueError, match="steps must be 1 or more, got 0"):
        train_mrt5.train(dataclasses.replace(FLAGS, out=tmp_path, steps=0))
    with pytest.raises(ValueError, match="3 x 2 must equal the number of devices, 8"):
        state.make_mesh(3, 2)
    assert dict(state.make_mesh().shape) == {"data": 4, "fsdp": 2} == dict(state.make_mesh(fsdp=2).shape)
    assert dict(state.make_mesh(data=1).shape) == {"data": 1, "fsdp": 8}
    with pytest.raises(ValueError, match=r"model\.json is missing"):
        state.load_config(tmp_path / "model.json")
