"""`merge` and `unmerge` on Hopper: every row of the result is read from its members, added in float32 and written once.

A block has some segments, and finds of each how many members, which is first and which last (`_gpu_merge`: in one of two ways).
Then each thread takes rows in turn, several at a time, and asks for the next before it writes: a segment of one is copied, of
two added up, a longer one looks for the members between. So nothing is sorted and no sum is atomic: members are added in the
order of their positions. It suits plans that keep most tokens as they are, and those whose segments are runs.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jaxtyping import Float, Int

from jaxmerge._kernels import _mosaic_gpu as mgpu
from jaxmerge._kernels._dispatch import target, tuned, usual
from jaxmerge._kernels.merge._gpu_merge import LANES, THREADS, compare, or_zero, scatter

FORMS = {"merge": ({"find": "compare"}, {"find": "scatter"})}
"""Ways that differ in more than sizes; the first is used until a measurement says otherwise."""
CANDIDATES = {"merge": ({"find": "compare"}, *({"find": "scatter", "tile": tile} for tile in (16, 32, 64)))}
MOST_POSITIONS = 8192


def merge(
    ids: Int[Array, "B n"],
    x: Float[Array, "B n d"],
    weight: Float[Array, "B n"] | None = None,
    *,
    m: int,
    mean: bool,
    find: Literal["compare", "scatter"] | None = None,
    interpret: Any = None,
    **sizes: Any,
) -> tuple[Float[Array, "B m d"], Float[Array, "B m"]]:
    """`ref.merge`; `find` and the sizes of `_gpu_merge.compare` or `scatter` as measured, where no `find` is given."""
    how = settings("merge", ids, x, m=m) if find is None else {"find": find}
    form: Any = {"compare": compare, "scatter": scatter}[how.pop("find")]
    ids = jnp.pad(ids, ((0, 0), (0, max(0, LANES - ids.shape[1]))), constant_values=-1)
    return form(ids, x, weight, m=m, mean=mean, interpret=interpret, **how | sizes)


def settings(op: str, ids: Any, x: Any, *rest: Any, m: int | None = None, mean: bool = False) -> dict[str, Any]:
    """How a merge is run on the target: as was fastest there for such rows, with weights or without; where they were never
    measured, as was fastest most often; where nothing was, by the first of FORMS."""
    if op not in FORMS:
        return {}
    kind, weight = target().kind, jax.ShapeDtypeStruct(ids.shape, jnp.float32)
    found = tuned(op, "mosaic_gpu", kind, (ids, x, weight), m=m, mean=True) or usual(op, "mosaic_gpu", kind)
    return FORMS[op][0] | {name: found[name] for name in ("find", "tile") if name in found}


def unmerge(
    ids: Int[Array, "B n"],
    y: Float[Array, "B m d"],
    before: Float[Array, "B m"] | None = None,
    after: Float[Array, "B n"] | None = None,
    *,
    at_once: int = 4,
    interpret=None,
) -> Float[Array, "B n d"]:
    B, n = ids.shape
    m, d = y.shape[1:]

    def unmerge_rows(ids, y, before, after, x):
        b, block, t = lax.axis_index("row"), lax.axis_index("block"), lax.axis_index("thread")
        some = [(block * THREADS + t) * at_once + u for u in range(at_once)]
        at = [ids[b, jnp.minimum(i, n - 1)] for i in some]
        inside = [(s >= 0) & (s < m) for s in at]
        safe = [jnp.where(ok, s, 0) for ok, s in zip(inside, at, strict=True)]
        read = [mgpu.read_row(y, b, s) for s in safe]  # all asked for before any is waited for
        ones = [jnp.float32(1)] * at_once
        first = ones if before is None else [before[b, s] for s in safe]
        then = ones if after is None else [after[b, jnp.minimum(i, n - 1)] for i in some]
        for u, i in enumerate(some):

            @pl.when(i < n)
            def _(u=u, i=i):
                plain = before is None and after is None
                scaled = lambda row: row if plain else row.astype(jnp.float32) * (first[u] * then[u])
                mgpu.write_row(x, b, i, mgpu.per_part(lambda row: or_zero(inside[u], scaled(row)), read[u]))

    return mgpu.kernel(
        unmerge_rows, (ids, y, before, after), {},
        out=(jax.ShapeDtypeStruct((B, n, d), y.dtype),),
        grid=dict(row=B, block=-(-n // (THREADS * at_once))), threads=THREADS, interpret=interpret,
        unsafe_no_auto_barriers=True,  # nothing that is written is read here
    )[0]  # fmt: skip


device_refusals = mgpu.device_refusals


def refusals(op: str, ids: Any, x: Any, *rest: Any, m: int | None = None, mean: bool = False) -> list[str]:
    """Why this merge or unmerge cannot be a kernel."""
    why, n = mgpu.row_refusals(x), ids.shape[1]
    if min(n, x.shape[1], x.shape[1] if m is None else m) == 0:
        why.append("there is nothing to do")
    if op == "merge" and n > MOST_POSITIONS:
        why.append(f"{n} positions: each block reads all ids, of at most {MOST_POSITIONS}")
    return why


def faster(op: str, ids: Any, x: Any, *rest: Any, m: int | None = None, mean: bool = False, kind: str) -> bool:
    """Unmerge everywhere; merge where a search among all ids is short beside the rows. Measured on an H200."""
    return op == "unmerge" or ids.shape[1] <= 2048
