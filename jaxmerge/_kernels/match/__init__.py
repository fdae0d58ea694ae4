"""For each query the key of largest cosine; sums over a row of cosines; density peaks. Over any batch axes, no gradients."""

from collections.abc import Callable
from functools import partial
from typing import Any

from jax import Array
from jaxtyping import Bool, Float, Int

from jaxmerge._kernels._dispatch import Implementation, folded, run
from jaxmerge._kernels.match import _peaks
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


def peaks(
    x: Float[Array, "*batch n k"],
    ok: Bool[Array, "*batch n"] | None,
    near: Int[Array, "*batch"] | None,
    *,
    count: int,
    implementation: Implementation | None = None,
    xla: Callable[[], Any],
) -> Float[Array, "*batch n"]:
    """`ref.peaks`; `xla` is what to run instead where no kernel is chosen."""
    call = lambda module, *arrays: (folded(partial(module.peaks, count=count))(*arrays),)
    found = run("peaks", (x, ok, near), ("nk", "n", ""), ("n",), implementation=implementation, call=call,
                xla=lambda: (xla(),), count=count)  # fmt: skip
    return found[0]


def closest(
    x: Float[Array, "*batch n k"],
    chosen: Bool[Array, "*batch n"],
    *,
    most: int,
    implementation: Implementation | None = None,
    xla: Callable[[], Any],
) -> Int[Array, "*batch n"]:
    """The position of the chosen row, of at most so many, that is nearest to each row; `xla` instead where no kernel is chosen.

    Any position where none is chosen.
    """
    call = lambda module, x, _, chosen: (folded(partial(_peaks.closest, module, most))(x, chosen),)
    arrays, roles = (x, x, chosen), ("nk", "mk", "n")
    found = run("nearest_ahead", arrays, roles, ("n",), implementation=implementation, call=call, xla=lambda: (xla(),))
    return found[0]
