"""The budget's choice against every choice there is; wide networks solved for by least squares."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge import params

RNG = np.random.default_rng(0)
CHAIN = {"a": (None, "p"), "a_bias": ("p",), "b": ("p", "q"), "c": ("q", "r"), "d": ("r", None)}
STAR = {
    "in": (None, "hub"),
    "q": ("hub", "p"),
    "k": ("p", "hub"),
    "up": ("hub", "q"),
    "down": ("q", "hub"),
    "mix": ("hub", "hub"),
}
SIZES = {"p": 6, "q": 4, "r": 8, "hub": 4}


def network(spec):
    shape = lambda axes: tuple(3 if p is None else SIZES[p] for p in axes)
    return {name: jnp.asarray(RNG.standard_normal(shape(axes)), jnp.float32) for name, axes in spec.items()}


def cost(spec, kept, count, uses):
    def entries(axes):
        moved = [p for p in axes if p is not None]
        stored = np.prod([3 if p is None else SIZES[p] + kept[p] for p in axes])
        return stored - 2 * kept[moved[0]] * kept[moved[1]] if count == "nonzero" and len(moved) == 2 else stored

    return sum(uses[name] * entries(axes) for name, axes in spec.items())


def test_costs_are_those_of_the_widened_network():
    model = {name: np.ones([3 if p is None else SIZES[p] for p in axes]) for name, axes in CHAIN.items()}
    kept = {"p": 3, "q": 1, "r": 6}
    share = {p: 1 - k / SIZES[p] for p, k in kept.items()}
    identity = {p: np.arange(SIZES[p]) for p in kept}
    wide = params.merge_units(CHAIN, identity, model, model, share=share)
    once = dict.fromkeys(CHAIN, 1)
    assert sum(np.count_nonzero(x) for x in wide.values()) == cost(CHAIN, kept, "nonzero", once)
    assert sum(x.size for x in wide.values()) == cost(CHAIN, kept, "stored", once)


@pytest.mark.parametrize(("spec", "count"), [(CHAIN, "nonzero"), (CHAIN, "stored"), (STAR, "nonzero")])
def test_no_other_choice_gains_more(spec, count):
    """Every choice on the grid; gains per share, and per unit."""
    names = sorted({p for axes in spec.values() for p in axes if p is not None})
    model, levels = network(spec), 3
    uses = {n: float(RNG.integers(1, 4)) for n in spec}
    steps = [[i * SIZES[p] // levels for i in range(levels + 1)] for p in names]
    grid = [dict(zip(names, k, strict=True)) for k in itertools.product(*steps)]
    costs = [cost(spec, kept, count, uses) for kept in grid]
    per_share = {p: float(i + 1) for i, p in enumerate(names)}
    per_unit = {p: np.sort(RNG.uniform(size=SIZES[p]))[::-1] for p in names}
    for gains, worth in (
        (per_share, lambda kept: sum(per_share[p] * kept[p] / SIZES[p] for p in names)),
        (per_unit, lambda kept: sum(per_unit[p][: kept[p]].sum() for p in names)),
    ):
        for budget in (1.0, 1.2, 1.45, 4.0):
            share = params.unit_budget(spec, model, budget, gains, uses=uses, count=count, levels=levels, resolution=10**4)
            kept = {p: round((1 - share[p]) * SIZES[p]) for p in names}
            best = max(worth(k) for k, c in zip(grid, costs, strict=True) if c <= budget * costs[0] + 1e-6)
            assert costs[grid.index(kept)] <= budget * costs[0] + 1e-6
            np.testing.assert_allclose(worth(kept), best, rtol=1e-9)
        assert set(share.values()) == {0.0}  # a budget of 4 is enough for all


def test_rounded_costs_stay_within_the_budget():
    spec = {f"w{i}": (f"p{i - 1}" if i else None, f"p{i}" if i < 12 else None) for i in range(13)}
    model = {n: jax.ShapeDtypeStruct(tuple(300 if p is None else 257 for p in axes), jnp.float32) for n, axes in spec.items()}
    share = params.unit_budget(spec, model, 1.4, {f"p{i}": 1.0 + i % 3 for i in range(12)}, resolution=300)
    k = {p: round((1 - s) * 257) for p, s in share.items()} | {None: 0}
    size = lambda axes: np.prod([300.0 if p is None else 257.0 + k[p] for p in axes]) - 2.0 * k[axes[0]] * k[axes[1]]
    total = sum(size(axes) for axes in spec.values()) / sum(np.prod(x.shape) for x in model.values())
    assert 1.3 < total <= 1.4


def layers(model, x):
    for i in range(2):
        y = x @ model[f"{i}/kernel"] + model[f"{i}/bias"][None]
        yield x, y
        x = jnp.maximum(y, 0)


WIDE = {"0/kernel": (None, "p"), "0/bias": ("p",), "1/kernel": ("p", None)}
KERNELS = {"0/kernel": "0/bias", "1/kernel": "1/bias"}


@pytest.mark.slow
def test_a_wide_network_is_solved_for():
    """All apart: the mean of what both compute. In part: nearer to it than without least squares, and than narrower ones."""
    make = lambda: {
        f"{i}/{n}": jnp.asarray(RNG.standard_normal(s), jnp.float32)
        for i, (a, b) in enumerate([(5, 8), (8, 3)])
        for n, s in (("kernel", (a, b)), ("bias", (b,)))
    }
    a, b, x = make(), make(), jnp.asarray(RNG.standard_normal((200, 5)), jnp.float32)
    forward = lambda model: list(layers(model, x))
    run = lambda model: forward(model)[-1][1]
    solve = lambda share: params.pleas(
        lambda m, name: forward(m)[int(name[0])], a, b, KERNELS, pairs="mean", spec=WIDE, share=share
    )
    target = (run(a) + run(b)) / 2
    apart = solve(0.0)
    assert apart["1/kernel"].shape == (16, 3)
    np.testing.assert_allclose(run(apart), target, rtol=1e-3, atol=1e-3)
    identity = {"p": np.arange(8)}
    share = params.unit_budget(WIDE, a, 1.5, params.unit_gains(WIDE, identity, a, b))
    assert share == {"p": 0.5}
    error = lambda model: float(jnp.mean((run(model) - target) ** 2))
    plain, solved = params.merge_units(WIDE, identity, a, b, share=share), solve(share)
    assert {n: v.shape for n, v in plain.items()} == {n: v.shape for n, v in solved.items()}
    assert error(solved) < error(plain) < error(params.merge_units(WIDE, identity, a, b, share=1.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: params.unit_budget(CHAIN, network(CHAIN), 0.9, {}), "budget must be 1"),
        (lambda: params.unit_budget(CHAIN, network(CHAIN), 1.5, {}, levels=0), "levels and resolution 1 or more; got 1.5, 0"),
        (lambda: params.unit_budget(CHAIN, network(CHAIN), 1.5, {"p": 1.0}), "permutation 'q' needs one gain"),
        (lambda: params.unit_budget({"d": ("r", None)}, {"d": jnp.ones((8, 3))}, 1.5, {"r": [1.0]}), "each of its 8 units"),
        (
            lambda: params.unit_budget(
                {f"{i}{j}": (f"{i}", f"{j}") for i in range(8) for j in range(i)},
                {f"{i}{j}": jnp.ones((8, 8)) for i in range(8) for j in range(i)},
                1.5,
                {f"{i}": 1.0 for i in range(8)},
            ),
            "are coupled, too many for 8 levels",
        ),
        (lambda: params.pleas(lambda m, n: m, {}, {}, {}, spec={}), "hears both models at once"),
    ],
)
def test_wrong_arguments(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call()
