"""The search for coefficients: deterministic, inside its bounds, to be gone on with, and better than where it started."""

import pickle

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge import params

BASE = {"w": jnp.zeros((3, 4)), "steps": jnp.int32(3)}
RNG = np.random.default_rng(0)
MODELS = [BASE | {"w": jnp.asarray(RNG.standard_normal((3, 4)), jnp.float32)} for _ in range(3)]
TARGET = np.array([0.7, -0.4, 0.2])
WANTED = sum(t * np.asarray(m["w"]) for t, m in zip(TARGET, MODELS, strict=True))


def score(model):
    assert model["steps"] == 3
    return -float(np.sum((np.asarray(model["w"]) - WANTED) ** 2))


def search(generations, **options):
    return params.evolve(score, params.task_arithmetic, np.full(3, 0.3), base=BASE, models=MODELS, generations=generations,
                         **options)  # fmt: skip


def test_finds_signed_weights_and_goes_on_where_it_stopped():
    whole, first = search(40, seed=1), search(15, seed=1)
    np.testing.assert_allclose(whole.best, TARGET, atol=0.02)
    np.testing.assert_allclose(whole.mean, TARGET, atol=0.02)
    assert whole.score == whole.scores.max() and whole.scores.shape == (40, 7)
    on = search(25, resume=pickle.loads(pickle.dumps(first)))
    np.testing.assert_array_equal(on.scores, whole.scores)
    np.testing.assert_array_equal(on.best, whole.best)
    again = search(1, resume=first)  # what was resumed is as it was
    np.testing.assert_array_equal(again.scores[-1], whole.scores[15])
    assert (search(1, seed=2).scores != whole.scores[:1]).any()


def test_bounds_population_and_progress():
    seen = []
    found = search(8, bounds=(0.0, np.array([1.0, 1.0, 0.5])), population=5, callback=seen.append)
    assert len(seen) == 8 and found.scores.shape == (8, 5) and seen[-1].score == found.score
    assert [s.score for s in seen] == sorted(s.score for s in seen)
    assert all((s.best >= 0).all() and (s.best <= [1, 1, 0.5]).all() for s in seen)


def test_densities_are_concrete():
    make = lambda c: params.evo_merging(c["density"], c["weight"])
    start = {"density": np.full(2, 0.5), "weight": np.array([0.5, -0.5])}
    bounds = ({"density": 0.0, "weight": -2.0}, {"density": 1.0, "weight": 2.0})
    models = [{"w": jnp.arange(1.0, 5)}, {"w": jnp.ones(4)}]
    goal = jnp.array([0.0, 0, 3, 4]) - jnp.ones(4)
    run = lambda **options: params.evolve(lambda m: -jnp.sum((m["w"] - goal) ** 2), make, start, base={"w": jnp.zeros(4)},
                                          models=models, generations=15, bounds=bounds, **options)  # fmt: skip
    found = run(jit=False, seed=3)
    assert found.score > -0.5 and 0.5 <= found.best["density"][0] < 0.75, found
    one, other = make(start), make(found.best)
    assert all(a.match is b.match and a.merge is b.merge for a, b in zip(one.match.steps, other.match.steps, strict=True))
    merged = params.merge(make(found.best), {"w": jnp.zeros(4)}, models)
    assert found.score == found.scores.max() == -jnp.sum((merged["w"] - goal) ** 2)
    with pytest.raises(ValueError, match="pass jit=False"):
        run()


def test_one_coefficient():
    found = params.evolve(lambda m: -abs(m["w"] - 3.0), params.task_arithmetic, 1.0, base={"w": jnp.array(0.0)},
                          models=[{"w": jnp.array(2.0)}], generations=25, bounds=(0.0, 2.0))  # fmt: skip
    assert found.best.shape == () and abs(found.best - 1.5) < 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(generations=0), "generations must be 1 or more, got 0"),
        (dict(population=3), "4 candidates or more"),
        (dict(start={}), "no coefficients in start"),
        (dict(score=lambda m: float("nan")), "is NaN; return -inf"),
        (dict(bounds=(0.5, 1.0)), "start between its bounds"),
    ],
)
def test_wrong_arguments(options, message):
    options = dict(score=score, transform=params.task_arithmetic, start=np.full(3, 0.3), generations=1) | options
    with pytest.raises(ValueError, match=message):
        params.evolve(base=BASE, models=MODELS, **options)


def test_useless_models_rank_last():
    found = search(2, seed=0)
    worse = params.evolve(lambda m: -np.inf, params.task_arithmetic, np.full(3, 0.3), base=BASE, models=MODELS, generations=2)
    assert np.isfinite(found.scores).all() and worse.score == -np.inf and worse.best.shape == (3,)
