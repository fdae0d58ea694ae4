"""Permutations of units: what a network computes stays, what merges does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from jaxmerge import params
from jaxmerge.params.units._assignment import assign
from tests.rounding import assert_within, backward, entrywise

SPEC = {
    "Dense_0/kernel": (None, "P_0"),
    "Dense_0/bias": ("P_0",),
    "Dense_1/kernel": ("P_0", "P_1"),
    "Dense_1/bias": ("P_1",),
    "Dense_2/kernel": ("P_1", None),
}
KERNELS = {f"Dense_{i}/kernel": f"Dense_{i}/bias" for i in range(3)}


@pytest.fixture(scope="module")
def case(golden):
    vectors = golden("params/gitrebasin_a")
    return lambda prefix: (
        {k.removeprefix(prefix + "/"): v for k, v in vectors.items() if k.startswith(prefix + "/")} or vectors[prefix]
    )


def layers(model, x):
    """(inputs, outputs before the activation) of each layer."""
    for i in range(3):
        y = x @ model[f"Dense_{i}/kernel"] + model[f"Dense_{i}/bias"][None]
        yield x, y
        x = jnp.maximum(y, 0)


@pytest.mark.parametrize("n", [1, 2, 7, 60])
def test_assignment_is_optimal(n):
    rng = np.random.default_rng(n)
    for score in (rng.standard_normal((n, n)), np.round(rng.standard_normal((n, n))), np.zeros((n, n))):
        columns = assign(score)
        assert sorted(columns) == list(range(n))
        rows, best = linear_sum_assignment(score, maximize=True)
        np.testing.assert_allclose(score[np.arange(n), columns].sum(), score[rows, best].sum(), rtol=1e-12, atol=1e-12)


def test_git_rebasin_equals_the_peer(case):
    a, b = case("in/A"), case("in/B")
    found = params.match_weights(SPEC, a, b)
    for name, expected in case("out/perm").items():
        np.testing.assert_array_equal(found[name], expected)
    permuted = params.permute(SPEC, found, b)
    merged = params.merge(params.linear(), None, [a, permuted])
    for name in a:
        np.testing.assert_array_equal(permuted[name], case("out/B_permuted")[name])
        assert_within(merged[name], case("out/merged")[name], entrywise([a[name], permuted[name]], 3), name)


def test_permuting_changes_nothing_that_is_computed(case):
    a, b, x = case("in/A"), case("in/B"), case("aux/X")
    found = params.match_weights(SPEC, a, b)
    (*_, (_, before)), (*_, (_, after)) = layers(b, x), layers(params.permute(SPEC, found, b), x)
    np.testing.assert_allclose(before, after, rtol=1e-5, atol=1e-5)
    for p in params.match_weights(SPEC, a, a).values():
        np.testing.assert_array_equal(p, np.arange(len(p)))
    inverse = {name: np.argsort(p) for name, p in found.items()}
    back = params.permute(SPEC, inverse, params.permute(SPEC, found, b))
    jax.tree.map(np.testing.assert_array_equal, back, b)
    (*_, (_, again)) = layers(
        params.merge(params.linear(), None, [b, params.permute(SPEC, params.match_weights(SPEC, b, back), back)]), x
    )
    np.testing.assert_allclose(before, again, rtol=1e-5, atol=1e-5)


def test_pleas_least_squares(case):
    a, x = case("in/A"), case("aux/X")
    b = case("out/B_permuted")
    forward = lambda model, kernel: list(layers(model, jnp.asarray(x)))[int(kernel[6])]
    solve = lambda models: params.pleas(forward, *models, KERNELS)
    solved, bounds = solve([a, b]), backward(solve, [a, b])
    for name, expected in case("out/pleas_ls_separate").items():
        assert_within(solved[name], expected, bounds[name], name)
    same = params.pleas(forward, a, a, KERNELS, pairs="mean")
    (*_, (_, before)), (*_, (_, after)) = layers(a, x), layers(same, x)
    np.testing.assert_allclose(before, after, rtol=1e-3, atol=1e-3)


def test_units_merged_in_part(case):
    """None merged: an ensemble of the two; all: the mean of the weights; between: as wide as was asked for."""
    a, b, x = case("in/A"), case("in/B"), case("aux/X")
    found = params.match_weights(SPEC, a, b)
    run = lambda model: [y for _, y in layers(model, x)][-1]
    both = params.merge_units(SPEC, found, a, b, share=0.0)
    assert both["Dense_1/kernel"].shape == (24, 24)
    np.testing.assert_allclose(run(both), (run(a) + run(b)) / 2, rtol=1e-4, atol=1e-5)
    one = params.merge_units(SPEC, found, a, b, share=1.0)
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-6), one, case("out/merged"))
    part = params.merge_units(SPEC, found, a, b, share={"P_0": 0.5, "P_1": 0.75})
    assert {n: x.shape for n, x in part.items()} == {
        "Dense_0/kernel": (6, 18), "Dense_0/bias": (18,), "Dense_1/kernel": (18, 15), "Dense_1/bias": (15,),
        "Dense_2/kernel": (15, 5), "Dense_2/bias": (5,),
    }  # fmt: skip
    same = params.merge_units(SPEC, {p: np.arange(12) for p in found}, a, a, share=0.5)
    np.testing.assert_allclose(run(same), run(a), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="every permutation needs a share"):
        params.merge_units(SPEC, found, a, b, share={"P_0": 0.5})


def test_specifications_that_do_not_fit(unchecked):
    model = {"w": jnp.zeros((2, 3)), "v": jnp.zeros(3)}
    with pytest.raises(
        ValueError, match=r"(?s)no leaf 'u'.*v: 2 axes are named.*w: permutation 'p' is of 2 units elsewhere, here of 3"
    ):
        params.permute({"u": ("p",), "v": ("p", None), "w": ("p", "p")}, {"p": np.arange(2)}, model)
    with pytest.raises(ValueError, match="pairs must be"):
        params.pleas(lambda model, name: (model, model), model, model, {}, pairs="both")
