"""How far apart two float32 computations of one thing may be: bounds that follow from what is computed."""

from collections.abc import Callable, Iterable

import jax
import numpy as np

EPS = 2.0**-23


def entrywise(inputs: Iterable, operations: int, growth: float = 1.0) -> np.ndarray:
    """Of sums and products: each side rounds every operation by half an ulp of what is no larger than the inputs' magnitudes
    together, times growth."""
    return operations * EPS * growth * sum(np.abs(np.asarray(x, np.float64)) for x in inputs)


def backward(run: Callable, inputs, draws: int = 3):
    """Of factorisations, which are backward stable: each side is exact for matrices that differ by about an ulp of their
    largest entry, everywhere. So far each leaf is seen to move; twice for the two sides, twice for what draws do not see."""
    rng = np.random.default_rng(0)
    noisy = lambda x: (x + EPS * np.abs(x).max(initial=0) * rng.standard_normal(x.shape)).astype(np.float32)
    first = run(inputs)
    moved = [jax.tree.map(lambda a, b: float(abs(a - b).max()), run(jax.tree.map(noisy, inputs)), first) for _ in range(draws)]
    return jax.tree.map(lambda *of_draws: 4 * max(of_draws), *moved)


def assert_within(got, expected, bound, name: str = "") -> None:
    error = np.abs(np.asarray(got, np.float64) - np.asarray(expected, np.float64))
    worst = np.max(error / np.maximum(bound, 1e-300), initial=0)
    assert error.shape == np.shape(expected) and worst <= 1, f"{name}: off by {error.max():.3g}, {worst:.3g} times the bound"
