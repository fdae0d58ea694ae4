"""A whole step of Token Merging at once: matching and merging, in one kernel where there is one."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import ArrayLike, Float

from jaxmerge._kernels._dispatch import Implementation
from jaxmerge._kernels.step import step
from jaxmerge._kernels.step.ref import added
from jaxmerge._plan import Plan, merge
from jaxmerge.tokens._checks import checked_metric, checked_r, protected_mask
from jaxmerge.tokens.matching._bipartite import bipartite_matching, largest, why_not


class MergeStep(NamedTuple):
    """The tokens after a step: `x`, how many of the first tokens each stands for (`sizes`), and the `plan` that was applied."""

    x: Float[Array, "*batch m d"]
    sizes: Float[Array, "*batch m"]
    plan: Plan


def merge_step(
    metric: Float[ArrayLike, "*batch n k"],
    x: Float[ArrayLike, "*batch n d"],
    r: int,
    *,
    sizes: Float[ArrayLike, "*batch n"] | None = None,
    residual: Float[ArrayLike, "*batch n d"] | None = None,
    protect: Sequence[int] = (),
    implementation: Implementation | None = None,
) -> MergeStep:
    """Match, choose the r most similar pairs, merge them: a step of Token Merging, between a block's attention and its MLP.

    Args:
      metric: what to compare tokens by (ToMe: the keys of the attention just computed, averaged over heads).
      x: the tokens.
      r: how many tokens to remove, a Python int; `schedule` gives one per layer.
      sizes: how many tokens each token stands for, whole numbers; None is 1 each. Sums of them stay exact.
      residual: what the block adds to x, the output of its attention: x + residual is merged, and the sum stays on chip.
      protect: positions that neither move nor receive: (0,) for a class token.
      implementation: "xla", or a kernel ("mosaic_tpu", "mosaic_gpu") that reads x once, writes it once, and is one launch. None
        takes the kernel where it is known to run and believed to be faster; `jaxmerge doctor` says where.

    Returns:
      x (*batch, n - r, d) in its dtype, means taken in float32; sizes in float32; the plan. Gradients flow through x and
      the residual alone.

    Law:
      plan = bipartite_matching(metric, r, protect=protect); x = merge(plan, x + residual, weight=sizes);
      sizes = merge(plan, sizes, reduce="sum").

    Raises:
      ValueError: r out of range, a protected position outside [-n, n), metric, x and residual of different tokens; the
        implementation cannot run here (all reasons are named). TypeError: r is not a Python int; `protect` is a mask.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> x = jnp.array([[9.0, 9.0], [1.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
      >>> step = jm.tokens.merge_step(x, x, 1, protect=(0,))
      >>> step.x.tolist(), step.sizes.tolist()
      ([[9.0, 9.0], [2.0, 0.0], [0.0, 1.0]], [1.0, 2.0, 1.0])

    Source: Token Merging (arXiv:2210.09461): `bipartite_soft_matching` and `merge_wavg`.
    """
    name = "merge_step"
    metric, x = checked_metric(name, metric), jnp.asarray(x)
    n = metric.shape[-2]
    if x.shape[:-1] != metric.shape[:-1]:
        raise ValueError(f"{name}: metric {metric.shape} and x {x.shape} must be of the same tokens: (*batch, n, features).")
    if sizes is not None:
        sizes = lax.stop_gradient(jnp.asarray(sizes).astype(jnp.float32))
        if sizes.shape != x.shape[:-1]:
            raise ValueError(f"{name}: sizes must have one number per token, {x.shape[:-1]}, got {sizes.shape}.")

    if residual is not None:
        residual = jnp.asarray(residual)
        if residual.shape != x.shape:
            raise ValueError(f"{name}: residual must have the shape of x, {x.shape}, got {residual.shape}.")

    def apart() -> tuple[Any, Any, Any]:
        plan = bipartite_matching(metric, r, protect=protect)
        merged = plan.sizes.astype(jnp.float32) if sizes is None else merge(plan, sizes, reduce="sum")
        return merge(plan, added(x, residual), weight=sizes), merged, plan.segment_ids

    fixed = protected_mask(name, protect, n)
    r = checked_r(name, r, largest(n, fixed), why_not(n, fixed))
    if r == 0:
        y, merged, ids = apart()
    else:
        y, merged, ids = step(
            metric, x, sizes, residual, r=r, protected=tuple(fixed.tolist()), implementation=implementation, xla=apart
        )
    return MergeStep(y, merged, Plan(ids, n - r))
