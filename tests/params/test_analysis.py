"""Cosines, sign conflicts and norms, against numpy; and their picture."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge import params


def test_analysis_in_numpy():
    rng = np.random.default_rng(0)
    stacked = {n: jnp.asarray(rng.standard_normal((3, *s)), jnp.float32) for n, s in {"a": (4, 5), "b": (7,), "c": ()}.items()}
    flat = np.concatenate([np.asarray(x).reshape(3, -1) for x in stacked.values()], axis=1)
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    np.testing.assert_allclose(params.cosines(stacked), unit @ unit.T, rtol=1e-5, atol=1e-6)
    shares = lambda rows: np.abs(rows)[rows * np.sign(rows.sum(axis=0)) < 0].sum() / np.abs(rows).sum()
    for n, x in stacked.items():
        rows = np.asarray(x).reshape(3, -1)
        np.testing.assert_allclose(params.task_norms(stacked)[n], np.linalg.norm(rows, axis=1), rtol=1e-5)
        np.testing.assert_allclose(params.sign_conflict(stacked)[n], shares(rows), rtol=1e-5)
    label = lambda name: "vector" if name == "b" else None
    groups = {None: np.concatenate([flat[:, :20], flat[:, 27:]], axis=1), "vector": flat[:, 20:27]}
    norms, conflict = (
        params.task_norms(stacked, label),
        jax.jit(lambda s: list(params.sign_conflict(s, label).values()))(stacked),
    )
    assert list(norms) == list(groups)
    for found, share, rows in zip(norms.values(), conflict, groups.values(), strict=True):
        np.testing.assert_allclose(found, np.linalg.norm(rows, axis=1), rtol=1e-5)
        np.testing.assert_allclose(share, shares(rows), rtol=1e-5)


def test_models_that_changed_nothing():
    zero = {"w": jnp.zeros((2, 3))}
    assert params.cosines(zero).tolist() == [[0, 0], [0, 0]] and params.sign_conflict(zero)["w"] == 0
    assert params.sign_conflict({"w": jnp.ones((2, 3))})["w"] == 0


@pytest.fixture
def stacked():
    rng = np.random.default_rng(1)
    leaf = lambda *shape: jnp.asarray(rng.standard_normal((2, *shape)), jnp.float32)
    return {"blocks": {10: leaf(3), 9: {"w": leaf(2, 2), "b": leaf()}}, "embed": leaf(4)}


def test_the_picture_shows_what_was_found(stacked, tmp_path):
    figure = params.draw_tasks(stacked, ["math", "code"])
    matrix, conflict, norms = figure.axes
    cosine = float(params.cosines(stacked)[0, 1])
    assert [t.get_text() for t in matrix.texts] == ["1.00", f"{cosine:.2f}", f"{cosine:.2f}", "1.00"]
    assert [t.get_text() for t in matrix.get_xticklabels()] == ["math", "code"]
    for axis in (conflict, norms):
        assert [t.get_text() for t in axis.get_xticklabels()] == ["9", "10", "rest"]
    by_leaf = params.task_norms(stacked)
    nine = np.hypot(by_leaf["blocks/9/w"], by_leaf["blocks/9/b"])
    lines = np.array([line.get_ydata() for line in norms.lines])
    np.testing.assert_allclose(lines, np.stack([nine, by_leaf["blocks/10"], by_leaf["embed"]], axis=1), rtol=1e-6)
    shares = params.sign_conflict(stacked, lambda name: name.split("/")[1] if "/" in name else "rest")
    heights = [bar.get_height() for bar in conflict.patches]
    np.testing.assert_allclose(heights, [100 * shares[k] for k in ("9", "10", "rest")], rtol=1e-5)
    figure.savefig(tmp_path / "tasks.png")
    assert (tmp_path / "tasks.png").stat().st_size > 1000


def test_the_picture_with_labels_of_ones_own(stacked):
    figure = params.draw_tasks(stacked, label=lambda name: name.split("/")[-1])
    assert [t.get_text() for t in figure.axes[1].get_xticklabels()] == ["b", "w", "10", "embed"]
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["0", "1"]


def test_pictures_that_cannot_be_drawn(stacked, monkeypatch):
    with pytest.raises(ValueError, match=r"one name for each of the 2 models; got 1: \['math'\]"):
        params.draw_tasks(stacked, ["math"])
    with pytest.raises(ValueError, match="no task vectors to draw"):
        params.draw_tasks({})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'draw_tasks needs matplotlib: pip install "jaxmerge\[viz\]"'):
        params.draw_tasks(stacked)
