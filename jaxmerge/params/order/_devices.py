"""Which of two forms of one computation to take: on one CPU device nothing is partitioned, and memory is what costs."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

LARGE = 1 << 18
"""Entries from which on a form that takes a second to compile is worth it."""


def alone() -> bool:
    """One CPU device."""
    return jax.device_count() == 1 and jax.default_backend() == "cpu"


def fastest(alone_: Callable, anywhere: Callable) -> Callable:
    """The first form for large arrays on one CPU device; the other on many and on accelerators, also when compiled for here.

    Where arrays are split over Explicit axes, be they of length 1, only the other says what lies where.
    """

    def choose(*args: Any) -> Any:
        large = max(x.size for x in jax.tree.leaves(args)) >= LARGE
        split = any(any(jax.typeof(x).sharding.spec) for x in jax.tree.leaves(args))
        if split or not (large and alone()):
            return anywhere(*args)
        return lax.platform_dependent(*args, cpu=alone_, default=anywhere)

    return choose
