"""HiPrune: the official vectors, the rule written down again, the grid's edges, bad input."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge.tokens import hiprune
from tests.conftest import GOLDEN

PARAMS = {c["name"]: c["params"] for c in json.loads((GOLDEN / "tokens/hiprune_a.json").read_text())["cases"]}


@pytest.fixture(scope="module")
def attention():
    """Middle and deep attention of three 4 x 6 images."""
    return tuple(jax.nn.softmax(jax.random.normal(jax.random.key(i), (3, 24)) * 2) for i in (0, 1))


def rule(middle, deep, k, *, width, alpha, wrap):
    """One row, as the paper says it; with `wrap`, as the official code does."""
    n = len(middle)
    chosen = set()
    for anchor in np.argsort(-middle, kind="stable")[: round(k * alpha / 5)]:
        row, column = divmod(int(anchor), width)
        if wrap:
            chosen |= {min(max(anchor + step, 0), n - 1) for step in (0, -1, 1, -width, width)}
        else:
            around = [(row, column), (row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
            chosen |= {r * width + c for r, c in around if 0 <= r < n // width and 0 <= c < width}
    registers = [i for i in np.argsort(-deep, kind="stable") if i not in chosen][: k - len(chosen)]
    return np.isin(np.arange(n), [*chosen, *registers])


@pytest.mark.parametrize("name", ["c0", "c1"])
def test_equals_the_official_code(golden, name):
    a, p = {k: v for k, v in golden("tokens/hiprune_a").items() if k.startswith(name)}, PARAMS[name]
    middle, deep = a[f"{name}/attn_shallow"][:, 1:], a[f"{name}/attn_deep"][:, 1:]  # their first is the class token
    plan = hiprune(middle, deep, p["per_image"], width=p["grid"], alpha=p["alpha"], wrap=True)
    np.testing.assert_array_equal(plan.kept, a[f"{name}/mask"].astype(bool))


@pytest.mark.parametrize("k, alpha", [(10, 0.5), (20, 1.0), (24, 0.1), (7, 0.0), (0, 0.1)])
@pytest.mark.parametrize("wrap", [False, True])
def test_equals_the_rule(attention, k, alpha, wrap):
    plan = hiprune(*attention, k, width=6, alpha=alpha, wrap=wrap)
    np.testing.assert_array_equal(
        plan.kept, [rule(*rows, k, width=6, alpha=alpha, wrap=wrap) for rows in zip(*attention, strict=True)]
    )
    np.testing.assert_array_equal(plan.sizes, 1)


def test_a_grid_has_edges_and_a_line_has_none():
    """An anchor in the last column: right of it there is nothing, but on the official line the next row begins."""
    middle, deep = jnp.zeros(12).at[7].set(1.0), jnp.zeros(12).at[0].set(1.0)  # rows of 4; (1, 3)
    kept = lambda wrap: np.flatnonzero(hiprune(middle, deep, 5, width=4, alpha=1.0, wrap=wrap).kept).tolist()
    assert kept(False) == [0, 3, 6, 7, 11]
    assert kept(True) == [3, 6, 7, 8, 11]


def test_the_official_line_clamps_to_its_ends():
    middle, deep = jnp.zeros(12).at[2].set(1.0), jnp.zeros(12).at[11].set(1.0)
    kept = lambda wrap: np.flatnonzero(hiprune(middle, deep, 5, width=4, alpha=1.0, wrap=wrap).kept).tolist()
    assert kept(False) == [1, 2, 3, 6, 11]
    assert kept(True) == [0, 1, 2, 3, 6]  # above the first row: patch 0


def test_no_value_puts_a_register_before_an_anchor():
    middle, deep = jnp.zeros(16).at[5].set(1.0), jnp.full(16, jnp.inf).at[:4].set(jnp.nan)
    assert np.flatnonzero(hiprune(middle, deep, 5, width=4, alpha=1.0).kept).tolist() == [1, 4, 5, 6, 9]


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(k=4, width=5), "width 5 does not divide n=24 patches; leave the class token out"),
        (dict(k=4, width=0), "width 0"),
        (dict(k=25, width=6), "between 0 and the number of patches, 24; got 25"),
        (dict(k=4, width=6, alpha=1.0), "1 anchors with 4 neighbours each, beyond k=4; lower alpha"),
        (dict(k=8, width=6, alpha=-1.0), "alpha=-1.0"),
    ],
)
def test_bad_input(attention, kwargs, message, unchecked):
    with pytest.raises(ValueError, match=message):
        hiprune(*attention, **kwargs)
    with pytest.raises(ValueError, match=r"one shape \(\*batch, n\)"):
        hiprune(attention[0], attention[1][:, :12], 4, width=6)
