"""Hard deletion as a product: the kept rows keep their order, so that `merge` visits each block of them once or twice."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jaxmerge._kernels.merge import mosaic_tpu as merge
from jaxmerge._kernels.pack.ref import slots


def pack(
    keep: Bool[Array, "B n"],
    x: Float[Array, "B n d"],
    *,
    capacity: int,
    block: tuple[int, int] | None = None,
    interpret: Any = None,
) -> tuple[Array, Array, Array]:
    """`ref.pack`; a position is found by counting how many rows end before it, which the vector unit does at once."""
    packed, _ = merge.merge(slots(keep), x, m=capacity, mean=False, block=block, interpret=interpret)
    so_far = jnp.cumsum(keep, axis=1, dtype=jnp.int32)
    before = so_far[:, :, None] <= jnp.arange(capacity, dtype=jnp.int32)[None, None, :]
    return packed, jnp.sum(before, axis=1, dtype=jnp.int32), so_far[:, -1]


def refusals(op: str, keep: Any, x: Any, *, capacity: int) -> list[str]:
    """Why this cannot be a kernel."""
    return merge.refusals("merge", keep, x, None, m=capacity)


def faster(op: str, keep: Any, x: Any, *, capacity: int, kind: str) -> bool:
    """XLA packs by a scatter of positions and a gather of rows, one row at a time each."""
    return True


CANDIDATES = {"pack": merge.CANDIDATES["merge"]}
