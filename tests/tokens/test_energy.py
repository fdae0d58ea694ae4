"""Matching by energy: the official vectors, the rule itself, margins, bad input."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.tokens import bipartite_matching, energy, energy_matching, margins
from tests.conftest import GOLDEN

CASES = {c["name"]: c["params"] for c in json.loads((GOLDEN / "tokens/pitome_a.json").read_text())["cases"]}
N, D = 17, 8


@pytest.fixture(scope="module")
def pitome(golden):
    return golden("tokens/pitome_a")


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).standard_normal((2, N, D)).astype(np.float32)


@pytest.mark.parametrize("name", list(CASES))
def test_equals_the_official_code(pitome, name):
    a, p = {k.split("/")[1]: v for k, v in pitome.items() if k.startswith(f"{name}/")}, CASES[name]
    first = int(p["class_token"])
    protect, text = tuple(range(first)), name.startswith("text")
    n = p["N"] - (0 if p.get("use_bsm") else first)  # its third variant counts the class token
    assert p["r"] == int(n - n * p["ratio"])
    kernel = "gaussian" if text else "shifted"

    def plan(metric, prune=False):
        if p.get("use_bsm"):
            return bipartite_matching(metric, p["r"], protect=protect)
        split = "halves" if text else "all" if p["use_bsm_pitome"] else "alternate"
        options = dict(margin=p["margin"], protect=protect, kernel=kernel, split=split, prune=prune)
        return energy_matching(metric, p["r"], **options)

    @jax.jit
    def ours(a):
        groups = plan(a["metric"])
        size = a["size"][..., 0]
        out = dict(
            energy=energy(a["metric"][:, first:], p["margin"], kernel=kernel),
            source=groups.matrix,
            merged_mean=jm.merge(groups, a["x"]),
            wavg_x=jm.merge(groups, a["x"], weight=size),
            wavg_size=jm.merge(groups, size, reduce="sum")[..., None],
        )
        if "pruned" in a:
            out["pruned"] = jm.merge(plan(a["metric"], prune=True), a["x"], reduce="first")
        return groups, out

    groups, got = jax.tree.map(np.asarray, ours(a))
    assert groups.num_segments == p["N_out"]
    unscaled = (1 - p["margin"]) * np.sqrt(2 * np.pi) if text else 1  # recorded without the factor of a density
    np.testing.assert_allclose(got["energy"] * unscaled, a["energy"], rtol=0, atol=2e-5)
    # the official order of segments is [class, by falling energy, receivers]: found by the tokens that each holds
    slots = np.take_along_axis(groups.segment_ids, a["source"].argmax(-1), 1)
    order = lambda y: np.take_along_axis(y, slots.reshape(*slots.shape, *[1] * (y.ndim - 2)), 1)
    np.testing.assert_array_equal(order(got["source"]), a["source"])
    for key in ("merged_mean", "wavg_x", "wavg_size", *(["pruned"] if "pruned" in a else [])):
        np.testing.assert_allclose(order(got[key]), a[key], rtol=0, atol=2e-5, err_msg=key)
    assert (np.sort(slots, 1) == np.arange(p["N_out"])).all()


# --- the rules, written down again


def rule(row, r, f, split):
    n = len(row)
    unit = row / np.linalg.norm(row, axis=-1, keepdims=True)
    w = unit @ unit.T
    order = np.argsort(-f(w).mean(-1), kind="stable")
    a, b = {
        "alternate": (order[: 2 * r : 2], order[1 : 2 * r : 2]),
        "halves": (order[:r], order[r : 2 * r]),
        "all": (order[::2], order[1::2]),
    }[split]
    score = w[np.ix_(a, b)]
    go = np.argsort(-score.max(-1), kind="stable")[:r]
    goes = np.arange(n)
    goes[a[go]] = b[score[go].argmax(-1)]
    return np.searchsorted(np.unique(goes), goes)


KERNELS = {
    "shifted": lambda w, m: np.where(w > m, w - m, np.exp(w - m) - 1),
    "paper": lambda w, m: np.where(w >= m, w, np.exp(w - m) - 1),
    "gaussian": lambda w, m: np.exp(-(((1 - w) / (1 - m)) ** 2) / 2),
}


@pytest.mark.parametrize("kernel, split", [("shifted", "alternate"), ("paper", "all"), ("gaussian", "halves")])
def test_equals_the_rule(x, kernel, split):
    f = lambda w: KERNELS[kernel](w, 0.2)
    plan = jax.jit(lambda x: energy_matching(x, 5, margin=0.2, kernel=kernel, split=split))(x)
    np.testing.assert_array_equal(plan.segment_ids, [rule(row, 5, f, split) for row in x])


def test_the_kernels_are_their_formulas(x):
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    w = unit @ unit.swapaxes(1, 2)
    for kernel, f in KERNELS.items():
        want = f(w, 0.2).mean(-1) / (0.8 * np.sqrt(2 * np.pi) if kernel == "gaussian" else 1)
        np.testing.assert_allclose(energy(x, 0.2, kernel=kernel), want, rtol=0, atol=2e-6)
    # the paper's f and the released one differ by the margin wherever a similarity is above it
    gap = np.asarray(energy(x, 0.2, kernel="paper")) - np.asarray(energy(x, 0.2))
    np.testing.assert_allclose(gap, 0.2 * (w > 0.2).mean(-1), rtol=0, atol=2e-6)


def test_rare_tokens_are_protected(x):
    crowd = np.tile(x[:, :1], (1, N, 1)) + 0.01 * x
    crowd[:, 5] = -x[:, 0]
    plan = jax.jit(lambda x: energy_matching(x, 8, margin=0.5))(crowd)
    ids, sizes = np.asarray(plan.segment_ids), np.asarray(plan.sizes)
    assert (np.take_along_axis(sizes, ids[:, 5:6], 1) == 1).all()


def test_margins_of_the_authors():
    assert margins(4) == [0.75, 0.5625, 0.375, 0.1875]
    np.testing.assert_allclose(margins(12, 0.9), [0.9 - 0.9 * i / 12 for i in range(12)], rtol=1e-12)
    np.testing.assert_allclose(margins(12, 0.9, 0.65), [0.9 - 0.25 * i / 12 for i in range(12)], rtol=1e-12)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x: energy_matching(x, 9, margin=0.5), ValueError, "between 0 and 8, got r=9: of 17 tokens.*at most half"),
        (lambda x: energy_matching(x, 8, margin=0.5, protect=(0, 1)), ValueError, "between 0 and 7, got r=8: of 15"),
        (lambda x: energy_matching(x, 2.0, margin=0.5), TypeError, "Python int"),
        (lambda x: energy_matching(x, 2, margin=0.5, split="odd"), ValueError, '"alternate", "halves" or "all", got \'odd\''),
        (lambda x: energy_matching(x, 2, margin=0.5, kernel="rbf"), ValueError, '"paper" or "gaussian", got \'rbf\''),
        (lambda x: energy_matching(x, 2, margin=1.0, kernel="gaussian"), ValueError, "margin must be below 1; got 1.0"),
        (lambda x: energy(x[0, 0], 0.5), ValueError, r"\(\*batch, n, d\)"),
        (lambda x: margins(0), ValueError, "depth must be 1 or more, got 0"),
    ],
)
def test_bad_input(call, error, message, x, unchecked):
    with pytest.raises(error, match=message):
        call(jnp.asarray(x))
