"""`pack` on Hopper: where the kept rows are by XLA, a few integers; the rows by the kernel of `unmerge`, moved once."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxmerge import _segments as segments
from jaxmerge._kernels import _mosaic_gpu as mgpu
from jaxmerge._kernels.merge import mosaic_gpu as merging
from jaxmerge._kernels.pack.ref import slots


def pack(
    keep: Bool[Array, "B n"], x: Float[Array, "B n d"], *, capacity: int, interpret: Any = None
) -> tuple[Float[Array, "B c d"], Int[Array, "B c"], Int[Array, "B"]]:
    """`ref.pack`."""
    positions = segments.firsts(slots(keep), capacity)  # n where there is none: a row that unmerge leaves 0
    return merging.unmerge(positions, x, interpret=interpret), positions, keep.sum(axis=1, dtype=jnp.int32)


device_refusals = mgpu.device_refusals


def refusals(op: str, keep: Any, x: Any, *, capacity: int) -> list[str]:
    """Why this packing cannot be a kernel."""
    return mgpu.row_refusals(x) + ([] if min(keep.shape[1], capacity) else ["there is nothing to do"])


def faster(op: str, keep: Any, x: Any, *, capacity: int, kind: str) -> bool:
    """As `unmerge`: XLA's gather takes 1.4 times as long on an H200."""
    return True
