"""A whole step of Token Merging at once: matching and merging, in one kernel where there is one."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import ArrayLike, Float

from jaxmerge._kernels._dispatch import Implementation
from jaxmerge._kernels.step import step
from jaxmerge._kernels.step.ref import Result, added, normalised
from jaxmerge._plan import Plan, merge
from jaxmerge.tokens._checks import checked_metric, checked_r, protected_mask
from jaxmerge.tokens.matching._bipartite import bipartite_matching, largest, why_not


class LayerNorm(NamedTuple):
    """The layer norm that comes next, as flax's: (x - mean) / sqrt(variance + epsilon) times `scale`, plus `bias`, in float32.

    Attributes:
      scale, bias: one number for each feature.
      dtype: of the result, such as that of the product which reads it; None is x's.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> x = jnp.array([[1.0, 3.0], [1.0, 3.0], [5.0, 1.0]])
      >>> norm = jm.tokens.LayerNorm(jnp.ones(2), jnp.zeros(2))
      >>> jm.tokens.merge_step(x, x, 1, norm=norm).normed.round(3).tolist()
      [[-1.0, 1.0], [1.0, -1.0]]
    """

    scale: Float[ArrayLike, "d"]
    bias: Float[ArrayLike, "d"]
    epsilon: float = 1e-6
    dtype: Any = None


class MergeStep(NamedTuple):
    """The tokens after a step.

    Attributes:
      x: the tokens that are left.
      sizes: how many of the first tokens each stands for.
      plan: what was applied.
      normed: x behind the layer norm that was asked for, or None.
    """

    x: Float[Array, "*batch m d"]
    sizes: Float[Array, "*batch m"]
    plan: Plan
    normed: Float[Array, "*batch m d"] | None = None


def merge_step(
    metric: Float[ArrayLike, "*batch n k"],
    x: Float[ArrayLike, "*batch n d"],
    r: int,
    *,
    sizes: Float[ArrayLike, "*batch n"] | None = None,
    residual: Float[ArrayLike, "*batch n d"] | None = None,
    offset: Float[ArrayLike, "d"] | None = None,
    norm: LayerNorm | None = None,
    protect: Sequence[int] = (),
    implementation: Implementation | None = None,
) -> MergeStep:
    """Match, choose the r most similar pairs, merge them: a step of Token Merging, between a block's attention and its MLP.

    Args:
      metric: what to compare tokens by (ToMe: the keys of the attention just computed, averaged over heads, which
        `attention.packed_attention` gives with `mean_keys=True`).
      x: the tokens.
      r: how many tokens to remove, a Python int; `schedule` gives one per layer.
      sizes: how many tokens each token stands for, whole numbers; None is 1 each. Sums of them stay exact.
      residual: what the block adds to x, the output of its attention: x + residual is merged, and the sum stays on chip.
      offset: what every token still lacks, the bias of the product that made the residual: added on the way.
      norm: the layer norm before the block's MLP: its result is `normed`, made of each token before it leaves the chip.
      protect: positions that neither move nor receive: (0,) for a class token.
      implementation: "xla", or a kernel ("mosaic_tpu", "mosaic_gpu") that reads x once, writes it once, and is one launch. None
        takes the kernel where it is known to run and believed to be faster; `jaxmerge doctor` says where.

    Returns:
      x (*batch, n - r, d) in its dtype, means taken in float32; sizes in float32; the plan; `normed`. Gradients flow through
      x, residual, offset and norm.

    Law:
      plan = bipartite_matching(metric, r, protect=protect); x = merge(plan, x + residual + offset, weight=sizes);
      sizes = merge(plan, sizes, reduce="sum"); normed is the layer norm of the merged x.

    Raises:
      ValueError: r out of range, a protected position outside [-n, n), metric, x and residual of different tokens, an offset
        or a norm of another width; the implementation cannot run here (all reasons are named). TypeError: r is not a Python
        int; `protect` is a mask.

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

    def vector(what: str, a: Any) -> Array:
        a = jnp.asarray(a)
        if a.shape != x.shape[-1:]:
            raise ValueError(f"{name}: {what} must have one number for each of {x.shape[-1]} features, got {a.shape}.")
        return a

    offset = None if offset is None else vector("offset", offset)
    scale = shift = None
    how: dict[str, Any] = {}
    if norm is not None:
        scale, shift = vector("norm's scale", norm.scale), vector("norm's bias", norm.bias)
        how = {"epsilon": float(norm.epsilon), "dtype": jnp.dtype(x.dtype if norm.dtype is None else norm.dtype)}

    def apart() -> Result:
        plan = bipartite_matching(metric, r, protect=protect)
        merged = plan.sizes.astype(jnp.float32) if sizes is None else merge(plan, sizes, reduce="sum")
        y = merge(plan, added(x, residual, offset), weight=sizes)
        normed = None if scale is None or shift is None else normalised(y, scale, shift, **how)
        return Result(y, merged, plan.segment_ids, normed)

    fixed = protected_mask(name, protect, n)
    r = checked_r(name, r, largest(n, fixed), why_not(n, fixed))
    if r == 0:
        found = apart()
    else:
        arrays = metric, x, sizes, residual, offset, scale, shift
        found = step(*arrays, r=r, protected=tuple(fixed.tolist()), implementation=implementation, xla=apart, **how)
    return MergeStep(found.x, found.sizes, Plan(found.ids, n - r), found.normed)
