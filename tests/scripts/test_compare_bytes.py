"""Comparing byte models: the data, what is hidden, operations counted, the protocol on tiny models, resuming, bad flags."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.decoder import DecoderConfig
from models.hat import HATConfig
from models.hnet import HNetConfig
from models.t5 import T5Config
from scripts import bytes_data, bytes_models, bytes_report, compare_bytes
from scripts.bytes_flops import operations, xla_operations
from scripts.bytes_models import Contestant
from scripts.bytes_train import Recipe, Scorer, Trainer

BASE = T5Config(16, 8, 16, 2, 2, 1, softmax1=True, dropout=0.0)
SMALL = DecoderConfig(16, 1, 2, 16)
DECODERS = [
    Contestant("plain", "next byte", SMALL),
    Contestant("HAT", "next byte", HATConfig(SMALL, SMALL, SMALL, max_word=12)),
    Contestant("H-Net", "next byte", HNetConfig(("t1", ("t1",), "t1"), (16, 16), (0, 0), (2, 2), ratios=(3.0,))),
]
RECIPE = Recipe(
    length=32, batch=2, budget=256, rate=1e-2, noise=0.3, span=3.0, k_p=0.1, k_i=1e-2, lowest=0.0, windows=6, points=2, peek=4
)  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(
        bytes_models, "contestants", lambda rates, share, decoders: [
            *bytes_models.spans(BASE, 1, share, rates), *(DECODERS if decoders else [])
        ],
    )  # fmt: skip


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Three languages on the same sentences; two have running text too, one is named as the sentences' column is."""
    path = tmp_path_factory.mktemp("own")
    lines = [
        "id\ten\tth\tid",
        *(f'n{i:02d}\tsentence "{i}, and more of it\tประโยค {i} และอื่น\tkalimat {i}, lagi' for i in range(60)),
    ]
    (path / "parallel.tsv").write_text("\n".join(lines) + "\n")
    for name in ("en", "th"):
        (path / f"{name}.txt").write_text(f"{name} runs on and on. " * 40)
    return path


def test_languages_are_held_out_by_sentence(own):
    domains = bytes_data.languages(own, held_out=20)
    assert [d.name for d in domains] == ["en", "th", "id"] and all(d.sentences == 20 for d in domains)
    en, th, more = (d.train.tobytes().decode() for d in domains)
    assert en.startswith("en runs on") and 'sentence "39,' in en and 'sentence "40,' not in en
    assert th.startswith("th runs on") and more.startswith("kalimat 0, lagi\nkalimat 1")
    assert [d.heldout.tobytes().decode().split("\n")[0][-10:] for d in domains] == ["more of it", "40 และอื่น", "t 40, lagi"]
    with pytest.raises(ValueError, match=r"there is no parallel\.tsv"):
        bytes_data.languages(own / "absent")
    with pytest.raises(ValueError, match="60 sentences in 3 languages, too few to hold out 60"):
        bytes_data.languages(own, held_out=60)


def test_windows_are_a_function_of_the_step(own):
    domains = bytes_data.languages(own, held_out=20)
    draw = lambda step, seed=0: bytes_data.draw(domains, step, batch=4, length=16, seed=seed)
    np.testing.assert_array_equal(draw(3), draw(3))
    assert not np.array_equal(draw(3), draw(4)) and not np.array_equal(draw(3), draw(3, seed=1))
    of = lambda row: [d.name for d in domains if row.tobytes() in d.train.tobytes()]
    names = [of(row) for step in range(3) for row in draw(step)]
    assert all(n == [domains[i % 3].name] for i, n in enumerate(names))  # in turn
    assert bytes_data.tile(domains[0].heldout, 16).shape == (len(domains[0].heldout) // 16, 16)
    with pytest.raises(ValueError, match="shorter than a window of 10000"):
        bytes_data.tile(domains[0].heldout, 10_000)


def test_operations():
    a, b = jnp.ones((4, 5)), jnp.ones((5, 6))
    assert operations(lambda a, b: a @ b, a, b) == 2 * 4 * 5 * 6
    assert operations(jax.vmap(jnp.dot), jnp.ones((3, 7)), jnp.ones((3, 7))) == 2 * 3 * 7
    square = jnp.ones((4, 4))
    loop = lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, None, length=5)[0]
    assert operations(jax.jit(loop), square) == operations(jax.checkpoint(loop), square) == 5 * 2 * 4**3
    assert operations(jax.value_and_grad(lambda a, b: jnp.sum((a @ b) ** 2), (0, 1)), a, b) == 3 * 2 * 4 * 5 * 6
    assert operations(lambda p, x: jax.lax.cond(p, lambda x: x @ x @ x, lambda x: x, x), True, square) == 2 * 2 * 4**3
    kernel = jnp.ones((8, 3, 2))  # out, in, width
    convolve = lambda x: jax.lax.conv_general_dilated(x, kernel, (1,), "VALID")
    assert operations(convolve, jnp.ones((1, 3, 9))) == 2 * 8 * 8 * 3 * 2
    assert xla_operations(lambda a, b: a @ b, a, b) == 2 * 4 * 5 * 6
    with pytest.raises(ValueError, match="a while loop holds a matrix product"):
        operations(lambda x: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ c, x), square)


def test_decoders_cost_the_same():
    recipe = dataclasses.replace(RECIPE, length=256, batch=1)
    domains = [bytes_data.Domain("x", np.frombuffer(b"some words of usual length, " * 100, np.uint8), np.zeros(999, np.uint8))]
    cost = {}
    for row in bytes_models.next_byte():
        trainer = Trainer(row, recipe, domains)
        params, batch = jax.eval_shape(lambda row=row: row.init(0, None)), trainer.batch(0)
        capacity = 56 if row.name == "HAT" else trainer.capacity
        loss = lambda p, row=row, b=batch, c=capacity: row.loss(p, b, jax.random.key(0), 0.0, c)[0]
        cost[row.name] = operations(loss, params)
    assert max(cost.values()) < 1.05 * min(cost.values()), cost


@pytest.mark.parametrize(
    "name", ["MrT5 50%", *(pytest.param(name, marks=pytest.mark.slow) for name in ("random 50%", "HAT", "H-Net"))]
)
def test_room_for_all_changes_nothing(name):
    """Scores with and without packing agree where the gate is shut or open; deletion at random deletes what was asked for."""
    rows = {row.name: row for row in (*bytes_models.spans(BASE, 1, 0.5, (0.5,)), *DECODERS)}
    row = rows[name]
    windows = np.random.default_rng(0).integers(97, 123, (8, 64)).astype(np.uint8)
    batch = row.batch(windows, np.random.default_rng(1), noise=0.3, span=3.0)
    params = row.init(0, None)
    score = jax.jit(row.score, static_argnames="capacity")
    free, packed = (score(params, batch, jax.random.key(5), capacity=c) for c in (None, batch[0].shape[1]))
    np.testing.assert_array_equal(free["kept"], packed["kept"])
    assert packed["overflow"].sum() == 0
    if name != "MrT5 50%":  # whose gates are between the two, and weigh what is deleted softly
        np.testing.assert_allclose(free["nats"], packed["nats"], rtol=1e-4)
    if row.at_random:
        assert abs(1 - packed["kept"].mean() / batch[0].shape[1] - 0.5) < 4 * 0.5 / batch[0].size ** 0.5
    loss, metrics = jax.jit(row.loss)(params, batch, jax.random.key(5))
    assert np.isfinite(loss) and {"ce", "rate"} <= set(metrics)


def test_scores_count_the_bytes():
    """The bits of a window are those of its loss; a batch that is not full is filled with windows that are not counted."""
    text = np.random.default_rng(0).integers(97, 123, 7 * 32).astype(np.uint8)
    domains = [bytes_data.Domain("x", text, text)]
    for row in (Contestant("ByT5", "hidden spans", BASE), DECODERS[0]):
        scorer = Scorer(row, dataclasses.replace(RECIPE, windows=7), domains, rows=4)
        params = row.init(0, None)
        scores = scorer(params)
        assert scores.bits["x"].shape == (7,) and scorer(params, at_most=2).bits["x"].shape == (2,)
        assert np.array_equal(scores.bits["x"][:2], scorer(params, at_most=2).bits["x"])
        batch = scorer.first
        ce = jax.jit(row.loss)(params, batch, jax.random.key(0))[1]["ce"] / np.log(2)
        labels = batch[1].size if row.task == "hidden spans" else 4 * 31
        assert scores.bits["x"][:4].sum() * RECIPE.scored(row) == pytest.approx(float(ce) * labels, rel=1e-4)


@pytest.mark.slow
def test_no_model_but_hat_is_asked_for_the_first_byte():
    hat = DECODERS[1]
    windows = np.frombuffer(b"ab cd ef", np.uint8)[None]
    batch = hat.batch(windows, np.random.default_rng(0), noise=0.3, span=3.0)
    params, key = hat.init(0, None), jax.random.key(0)
    loss, score = jax.jit(hat.loss), jax.jit(hat.score)
    total = loss(params, batch, key)[0] * 8  # shared out among all bytes
    first = total - score(params, batch, key)["nats"][0]
    changed = score({**params, "head": jax.tree.map(jnp.zeros_like, params["head"])}, batch, key)["nats"][0]
    assert 0 < first < total and changed == pytest.approx(9 * np.log(258), rel=1e-5)  # 7 bytes, and two [W]


@pytest.mark.slow
def test_the_whole_comparison(tiny, tmp_path, capsys):
    flags = dict(
        out=tmp_path, rates=(0.5,), budget=512, share=0.5, decoder_budget=256, length=32, decoder_length=32, tokens=64,
        windows=6, rounds=1,
    )  # fmt: skip
    compare_bytes.main(**flags)
    report = json.loads((tmp_path / "bytes.json").read_text())
    assert [row["name"] for row in report["rows"]] == [
        "start", "ByT5", "MrT5 50%", "random 50%", "plain", "HAT", "H-Net"
    ]  # fmt: skip
    for row in report["rows"]:
        assert all(len(b) == 6 and np.isfinite(b).all() for b in row["bits"].values())
        assert set(row["ms"]) == {"forward", "step"} and row["flops"]["step"] > row["flops"]["forward"] > 0
    assert (tmp_path / "bytes.png").stat().st_size > 1000
    text = (tmp_path / "bytes.md").read_text()
    assert "| MrT5 50% | 50% |" in text and "| H-Net |" in text
    before = (tmp_path / "bytes.json").stat().st_mtime_ns
    compare_bytes.main(**flags)
    assert (tmp_path / "bytes.json").stat().st_mtime_ns == before and "H-Net: found in" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is of another recipe"):
        compare_bytes.main(**{**flags, "rate": 1e-3})


@pytest.mark.slow
def test_by_language(tiny, own, tmp_path, monkeypatch):
    monkeypatch.setattr(bytes_data.languages, "__kwdefaults__", {"held_out": 20})
    compare_bytes.main(data=own, out=tmp_path, budget=512, share=0.5, length=32, tokens=64, windows=6, rounds=0)
    text = (tmp_path / "bytes.md").read_text()
    assert "| th | " in text and "MrT5 50%, kept a sentence" in text


def test_only_some(tmp_path):
    rows = bytes_models.contestants((0.5,), 0.25, decoders=True)
    assert [row.name for row in compare_bytes.chosen(rows, ("MrT5 50%", "HAT"))] == ["start", "MrT5 50%", "HAT"]
    with pytest.raises(ValueError, match="--only MrT6: not among start, ByT5, MrT5 50%, random 50%, plain"):
        compare_bytes.main(out=tmp_path, rates=(0.5,), only=("MrT6",))


def test_errors_and_differences():
    bits = lambda x: {"a": list(x), "b": list(x + 1)}
    noise = np.random.default_rng(0).normal(size=400)
    base, row = dict(bits=bits(noise)), dict(bits=bits(noise + 0.1))
    mean, error = bytes_report.mean_and_error(base["bits"])
    assert mean == pytest.approx(noise.mean() + 0.5) and error == pytest.approx(noise.std(ddof=1) / 20 / 2**0.5)
    more, error = bytes_report.difference(row, base)
    assert more == pytest.approx(0.1) and error == pytest.approx(0, abs=1e-12)  # window by window


def test_config_files_go_round(tmp_path):
    for row in (*bytes_models.spans(BASE, 1, 0.5, (0.5,)), *DECODERS):
        bytes_models.save_config(tmp_path / "model.json", row.config)
        found = bytes_models.load_config(tmp_path / "model.json")
        assert type(found) is type(row.config)
        assert json.dumps(dataclasses.asdict(found)) == json.dumps(dataclasses.asdict(row.config))
