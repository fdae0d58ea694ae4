"""For each query the key of largest cosine; sums over a row of cosines; the k nearest. Over any batch axes, no gradients."""

from collections.abc import Callable
from functools import partial
from typing import Any

from jax import Array
from jaxtyping import Float, Int

from jaxmerge._kernels._dispatch import Implementation, folded, run
from jaxmerge._kernels.match.ref import Kernel


def match(
    a: Float[Array, "*batch n k"],
    b: Float[Array, "*batch m k"],
    *,
    implementation: Implementation | None = None,
    xla: Callable[[], Any],
) -> tuple[Float[Array, "*batch n"], Int[Array, "*batch n"]]:
    """`ref.match`, all keys allowed; `xla` is what to run instead where no kernel is chosen."""
    call = lambda module, a, b: folded(module.match)(a, b)
    return run("match", (a, b), ("nk", "mk"), ("n", "n"), implementation=implementation, call=call, xla=xla)


def energy(
    a: Float[Array, "*batch n k"],
    *,
    margin: float,
    kernel: Kernel,
    alpha: float,
    implementation: Implementation | None = None,
    xla: Callable[[], Any],
) -> Float[Array, "*batch n"]:
    """`ref.energy` of rows with themselves; `xla` is what to run instead where no kernel is chosen."""
    static: dict[str, Any] = {"margin": margin, "kernel": kernel, "alpha": alpha}
    call = lambda module, a, b: (folded(partial(module.energy, **static))(a, b),)
    found = run(
        "energy", (a, a), ("nk", "mk"), ("n",), implementation=implementation, call=call, xla=lambda: (xla(),), **static
    )
    return found[0]
