"""Which of two forms of one computation to take: on one CPU device nothing is partitioned, and memory is what costs."""

from collections.abc import Callable

import jax
from jax import lax


def alone() -> bool:
    """One CPU device."""
    return jax.device_count() == 1 and jax.default_backend() == "cpu"


def fastest(alone_: Callable, anywhere: Callable) -> Callable:
    """The first form on one CPU device, the other on many and on accelerators (also when compiling for them here)."""
    if not alone():
        return anywhere
    return lambda *args: lax.platform_dependent(*args, cpu=alone_, default=anywhere)
