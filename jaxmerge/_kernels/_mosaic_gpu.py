"""What the Hopper kernels share: one way to launch."""

from collections.abc import Callable, Sequence
from typing import Any

from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu


def kernel(
    body: Callable[..., None],
    operands: Sequence[Array | None],
    scratch: dict[str, Any],
    *,
    out: Sequence[Any],
    grid: dict[str, int],
    threads: int,
    interpret: Any = None,
    params: dict[str, Any] | None = None,
) -> Any:
    """`body(*operands, *out, **scratch)` for every point of the grid; operands left out stay None."""
    given = [i for i, x in enumerate(operands) if x is not None]
    absent = {name: None for name, kind in scratch.items() if kind is None}

    def entry(*refs, **scratch):
        full = [None] * len(operands)
        for i, ref in zip(given, refs, strict=False):
            full[i] = ref
        body(*full, *refs[len(given) :], **absent, **scratch)

    entry.__name__ = body.__name__
    return plgpu.kernel(
        entry,
        out_type=tuple(out),
        scratch_types={name: kind for name, kind in scratch.items() if kind is not None},
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=threads,
        thread_name="thread",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup, **(params or {})),
    )(*[operands[i] for i in given])
