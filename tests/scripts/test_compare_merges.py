"""Comparing merges: the tasks, the protocol on tiny models, bad flags."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scripts import compare_merges, images, tasks
from scripts.experts import Network, Scorer, grams, named, probe
from scripts.merges import MERGES


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Images of one's own: three classes, bright in one of three bands."""
    rng = np.random.default_rng(0)
    labels = np.arange(96) % 3
    pictures = rng.integers(0, 100, (96, 8, 8, 1)).astype(np.uint8)
    for picture, label in zip(pictures, labels, strict=True):
        picture[2 * label : 2 * label + 3] += 120
    names = dict(zip(images.REQUIRED, (pictures[:60], labels[:60], pictures[60:], labels[60:]), strict=True))
    path = tmp_path_factory.mktemp("own") / "own.npz"
    np.savez(path, **names)
    return path


def test_eight_tasks_of_one_size(own):
    suite = tasks.images(own, 0)
    assert len(suite.tasks) == 8 and len({t.name for t in suite.tasks}) == 8
    for part in ("train", "validation", "test"):
        assert len({(getattr(t, part).x.shape, getattr(t, part).y.shape) for t in suite.tasks}) == 1
    assert all(set(np.unique(t.train.y)) == {0, 1} and t.classes == 2 for t in suite.tasks)  # two of three classes each
    x = images.from_file(own).train
    for name, f in tasks.TRANSFORMS.items():
        y = f(x)
        assert y.shape == x.shape and not np.array_equal(x, y), name
        if name != "noisy":  # nothing is lost
            np.testing.assert_array_equal(np.sort(np.abs(y), axis=None), np.sort(np.abs(x), axis=None))


def test_text_is_held_out_by_documents():
    documents = [(str(i), f"document {i} ") for i in range(200)]
    corpus = tasks._corpus(documents, 10**6, 10**6)
    train, held = (set(bytes(part).decode().split("\n\n")) for part in (corpus.train, corpus.heldout))
    assert train and held and not train & held and len(train | held) == 200
    split = tasks._windows(np.arange(10, dtype=np.uint8).reshape(2, 5), unscored=1)
    assert split.x.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]] and split.y.tolist() == [[-1, 2, 3, 4], [-1, 7, 8, 9]]


def test_languages(tmp_path):
    with pytest.raises(ValueError, match=r"needs en.txt for the base and eight languages beside it; there are none"):
        tasks.languages(tmp_path, 0)
    for k, name in enumerate(["en", *"abcdefghi"]):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name * 5} {i * k}" for i in range(3000)))
    suite = tasks.languages(tmp_path, 0, windows=16, held_out=4)
    assert [t.name for t in suite.tasks] == list("abcdefgh") and not suite.heads
    assert suite.tasks[0].test.x.shape == (4, 64) and suite.tasks[0].validation.x.shape == (1, 64)
    (tmp_path / "a.txt").write_text("too short")
    with pytest.raises(ValueError, match="a: too little text to train on and hold out"):
        tasks.languages(tmp_path, 0)


def test_statistics_and_heads(own):
    suite = tasks.images(own, 0)
    network = compare_merges.build(suite, 8, 1, 2)
    params = network.init(0)
    head = {"head": params.pop("head")}
    x = jnp.asarray(suite.tasks[0].train.x)
    np.testing.assert_allclose(
        network.features(params, x) @ head["head"]["kernel"] + jnp.zeros((1, 1)),
        network.logits(params, head, x),
        rtol=1e-5,
        atol=1e-5,
    )
    found = grams(network, params, head, x)
    kernels = {n for n, leaf in named(params).items() if n.endswith("kernel") and leaf.ndim == 2}
    assert set(found) == kernels and all(found[n].shape == (named(params)[n].shape[0],) * 2 for n in kernels)
    inputs = network.model({**params, **head}).blocks[0].norm1
    embedded = network.model({**params, **head}).patch_embed(x) + params["pos_embed"]
    rows = np.asarray(inputs(embedded)).reshape(-1, 8)
    np.testing.assert_allclose(found["blocks/0/attn/qkv/kernel"], rows.T @ rows, rtol=1e-4, atol=1e-3)
    fitted = probe(network, params, suite.tasks[0])
    scorer = Scorer(network, [fitted], [suite.tasks[0].train])
    assert scorer(params)[0, 0] > 0.6  # of two classes, on what it was fitted on
    assert np.asarray(network.logits(params, fitted, x))[:, 2:].max() < -1e6  # classes that the task does not have


@pytest.mark.slow
def test_the_whole_comparison(own, tmp_path):
    only = ("linear", "ties", "regmean", "adamerging", "emr")
    compare_merges.main(
        suite="images", data=own, out=tmp_path, width=8, depth=1, heads=2, steps=2, expert_steps=2, batch=8, learned_steps=1,
        orders=1, held_out=8, only=only,
    )  # fmt: skip
    report = json.loads((tmp_path / "merges.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["experts", "base", "multi-task training", *only]
    assert rows["experts"]["default"]["normalized"] == [1.0] * 8
    for name, row in rows.items():
        assert len(row["default"]["accuracy"]) == 8 and all(0 <= a <= 1 for a in row["default"]["accuracy"])
        assert ("tuned" in row) == (name in ("linear", "ties", "regmean", "adamerging"))
    assert [(r["name"], r["experts"]) for r in report["by_number"]] == [
        (name, k) for name in ("linear", "ties", "emr") for k in range(1, 9)
    ]
    assert np.shape(report["analysis"]["cosines"]) == (8, 8)
    assert (tmp_path / "accuracy.png").stat().st_size > 1000 and (tmp_path / "tasks.png").stat().st_size > 1000


def test_a_language_model_is_one_function_too():
    suite = tasks.Suite("text", tasks.Split(np.zeros((1, 4)), np.zeros((1, 4))), 256, False, [])
    network: Network = compare_merges.build(suite, 16, 1, 2)
    params, x = network.init(0), jnp.array([[1, 2, 3, 4]])
    changed = network.logits(params, {}, x.at[0, 2].set(9))
    np.testing.assert_allclose(changed[0, :2], network.logits(params, {}, x)[0, :2], rtol=1e-6)  # nothing looks ahead
    assert not np.allclose(changed[0, 2], network.logits(params, {}, x)[0, 2])
    assert "head/kernel" in grams(network, params, {}, x)
    assert jax.tree.structure(params) == jax.tree.structure(network.init(1))


def test_every_merge_has_one_name():
    assert len({m.name for m in MERGES}) == len(MERGES) and set(compare_merges.BY_NUMBER) <= {m.name for m in MERGES}


def test_bad_flags(own, tmp_path):
    run = lambda **flags: compare_merges.main(out=tmp_path, **flags)
    with pytest.raises(ValueError, match="--only tiess: not among linear, "):
        run(only=("tiess",))
    with pytest.raises(ValueError, match="--suite images needs --data"):
        run(suite="images")
    with pytest.raises(ValueError, match="--suite digits takes no --data"):
        run(data=own)
