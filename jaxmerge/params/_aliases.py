"""The field's methods, one chain each."""

from typing import Literal

from jaxmerge.params._transform import Hyperparameter, MergeTransform, chain
from jaxmerge.params.atoms._consensus import elect_sign, max_agreeing, mean_agreeing, sum_experts
from jaxmerge.params.atoms._random import random_mask, rank_mask
from jaxmerge.params.atoms._scale import rescale as rescaled, scale as scaled, weigh
from jaxmerge.params.atoms._trim import Scope, trim, trim_band
from jaxmerge.params.sphere._geometry import spherical


def linear(weight: Hyperparameter = 1.0, *, normalize: bool = True) -> MergeTransform:
    """The weighted mean of models: model soups. Without a base, the models themselves; with one, their task vectors.

    Args:
      weight: one number, one per model, or a function of the leaf's name.
      normalize: divide the weights by their sum.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.params.merge(jm.params.linear([3, 1]), None, [{"w": jnp.array(0.0)}, {"w": jnp.array(4.0)}])["w"].item()
      1.0

    Source: Model soups (arXiv:2203.05482); mergekit's `linear`.
    """
    return chain(weigh(weight, normalize=normalize), sum_experts())


def task_arithmetic(weight: Hyperparameter = 1.0, *, scale: Hyperparameter = 1.0, normalize: bool = False) -> MergeTransform:
    """Base plus scale times the weighted sum of the task vectors.

    Args:
      weight: one number, one per model, or a function of the leaf's name.
      scale: one factor for the sum.
      normalize: divide the weights by their sum.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, models = {"w": jnp.array(1.0)}, [{"w": jnp.array(2.0)}, {"w": jnp.array(4.0)}]
      >>> jm.params.merge(jm.params.task_arithmetic(scale=0.5), base, models)["w"].item()
      3.0

    Source: Editing models with task arithmetic (arXiv:2212.04089); mergekit's `task_arithmetic`.
    """
    return chain(weigh(weight, normalize=normalize), sum_experts(), scaled(scale))


def ties(
    density: Hyperparameter = 0.2,
    *,
    weight: Hyperparameter = 1.0,
    scale: Hyperparameter = 1.0,
    scope: Scope = "model",
    rounding: Literal["floor", "ceil"] = "floor",
    extra: int = 0,
    ties: Literal["first", "all"] = "first",
    rescale: bool = False,
    tie: Literal["+1", "majority"] = "+1",
    reduce: Literal["mean", "sum", "max"] = "mean",
) -> MergeTransform:
    """Trim each task vector, elect a sign for each entry, average the models that agree.

    Args:
      density: the share of entries to keep.
      weight: one number, one per model, or a function of the leaf's name.
      scale: a factor for the result.
      scope, rounding, extra, ties: see `trim`.
      rescale: restore each tensor's l1 norm after trimming.
      tie: see `elect_sign`; it looks where `scope` says (at scope "row": in the tensor).
      reduce: the weighted mean of those that agree, their sum, or the largest.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base = {"w": jnp.zeros(4)}
      >>> models = [{"w": jnp.array([4.0, 1.0, 3.0, 0.0])}, {"w": jnp.array([2.0, 0.5, -1.0, 0.1])}]
      >>> jm.params.merge(jm.params.ties(density=0.5), base, models)["w"].tolist()
      [3.0, 0.0, 3.0, 0.0]

    Source: TIES-Merging (arXiv:2306.01708). mergekit: scope="tensor". The official code and fusion_bench: extra=1, ties="all",
    tie="majority". MergeLLM: scope="tensor", rounding="ceil", extra=1, ties="all", tie="majority".
    """
    if reduce not in ("mean", "sum", "max"):
        raise ValueError(f'ties: reduce must be "mean", "sum" or "max", got {reduce!r}.')
    trimmed = trim(density, scope=scope, rounding=rounding, extra=extra, ties=ties)
    if rescale:
        trimmed = rescaled(trimmed, "l1")
    where = "model" if scope == "model" else "tensor"
    reduced = mean_agreeing(weight) if reduce == "mean" else sum_experts() if reduce == "sum" else max_agreeing()
    return chain(trimmed, weigh(weight), elect_sign(tie=tie, scope=where), reduced, scaled(scale))


def dare_linear(
    density: Hyperparameter = 0.5,
    *,
    seed: int,
    weight: Hyperparameter = 1.0,
    scale: Hyperparameter = 1.0,
    rescale: Literal["inv_p", "l1"] = "inv_p",
    normalize: bool = False,
) -> MergeTransform:
    """Drop entries of the task vectors at random, rescale the rest, add them up.

    Args:
      density: the probability to keep an entry.
      seed: the mask depends on it, on the leaf's name and on the expert; never on the sharding.
      weight: one number, one per model, or a function of the leaf's name.
      scale: a factor for the result.
      rescale: by 1 / density, or to the l1 norm of each tensor.
      normalize: divide the weights by their sum.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, models = {"w": jnp.zeros(2000)}, [{"w": jnp.ones(2000)}]
      >>> merged = jm.params.merge(jm.params.dare_linear(density=0.5, seed=0), base, models)["w"]
      >>> sorted(set(merged.tolist())), bool(abs(merged.mean() - 1) < 0.1)
      ([0.0, 2.0], True)

    Source: DARE (arXiv:2311.03099), MergeLM, fusion_bench: rescale="inv_p"; mergekit's `dare_linear`: rescale="l1".
    """
    drop = rescaled(random_mask(density, seed=seed), rescale)
    return chain(drop, weigh(weight, normalize=normalize), sum_experts(), scaled(scale))


def dare_ties(
    density: Hyperparameter = 0.5,
    *,
    seed: int,
    weight: Hyperparameter = 1.0,
    scale: Hyperparameter = 1.0,
    rescale: Literal["inv_p", "l1"] = "inv_p",
    tie: Literal["+1", "majority"] = "+1",
    reduce: Literal["mean", "sum"] = "sum",
) -> MergeTransform:
    """Drop entries at random and rescale the rest, as DARE; elect signs and reduce those that agree, as TIES.

    Args:
      density, seed, weight, scale, rescale: see `dare_linear`.
      tie: see `elect_sign`.
      reduce: the sum of those that agree (mergekit's default here), or their weighted mean.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, models = {"w": jnp.zeros(2)}, [{"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, -1.0])}]
      >>> jm.params.merge(jm.params.dare_ties(density=1.0, seed=0), base, models)["w"].tolist()
      [4.0, 2.0]

    Source: DARE (arXiv:2311.03099) before TIES-Merging (arXiv:2306.01708); mergekit's `dare_ties`: rescale="l1".
    """
    if reduce not in ("mean", "sum"):
        raise ValueError(f'dare_ties: reduce must be "mean" or "sum", got {reduce!r}.')
    drop = rescaled(random_mask(density, seed=seed), rescale)
    reduced = mean_agreeing(weight) if reduce == "mean" else sum_experts()
    return chain(drop, weigh(weight), elect_sign(tie=tie), reduced, scaled(scale))


def slerp(t: Hyperparameter = 0.5, *, threshold: float = 0.9995) -> MergeTransform:
    """Spherical interpolation between two models, tensor by tensor; without a base, between the models themselves.

    Args:
      t: 0 is the first model, 1 the second; may be a function of the leaf's name.
      threshold: |cos| beyond which the line is taken.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> a, b = {"w": jnp.array([2.0, 0.0])}, {"w": jnp.array([0.0, 2.0])}
      >>> [round(v, 4) for v in jm.params.merge(jm.params.slerp(0.5), None, [a, b])["w"].tolist()]
      [1.4142, 1.4142]

    Source: Shoemake 1985, doi:10.1145/325334.325242; mergekit's and fusion_bench's `slerp`.
    """
    return spherical(t, threshold=threshold)


def breadcrumbs(
    density: Hyperparameter = 0.9,
    gamma: Hyperparameter = 0.01,
    *,
    weight: Hyperparameter = 1.0,
    scale: Hyperparameter = 1.0,
    scope: Scope = "tensor",
    rounding: Literal["floor", "ceil"] = "floor",
    extra: int = 0,
    ties: Literal["first", "all"] = "first",
) -> MergeTransform:
    """Drop the largest and the smallest entries of the task vectors, add up the rest.

    Args:
      density: the share to keep.
      gamma: the share of outliers, the largest magnitudes, to drop.
      weight: one number, one per model, or a function of the leaf's name.
      scale: a factor for the result.
      scope, rounding, extra, ties: see `trim_band`.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, models = {"w": jnp.zeros(4)}, [{"w": jnp.array([9.0, -4.0, 2.0, 1.0])}]
      >>> jm.params.merge(jm.params.breadcrumbs(0.5, 0.25), base, models)["w"].tolist()
      [0.0, -4.0, 2.0, 0.0]

    Source: Model Breadcrumbs (arXiv:2312.06795); mergekit's `breadcrumbs`. MergeLLM: rounding="ceil", extra=1, ties="all".
    """
    kept = trim_band(density, gamma, scope=scope, rounding=rounding, extra=extra, ties=ties)
    return chain(kept, weigh(weight), sum_experts(), scaled(scale))


def breadcrumbs_ties(
    density: Hyperparameter = 0.9,
    gamma: Hyperparameter = 0.01,
    *,
    weight: Hyperparameter = 1.0,
    scale: Hyperparameter = 1.0,
    scope: Scope = "tensor",
    reduce: Literal["mean", "sum"] = "sum",
) -> MergeTransform:
    """Drop the largest and the smallest entries, as Breadcrumbs; elect signs and reduce those that agree, as TIES.

    Args:
      density, gamma, weight, scale, scope: see `breadcrumbs`.
      reduce: the sum of those that agree (mergekit's default here), or their weighted mean.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, models = {"w": jnp.zeros(2)}, [{"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, -1.0])}]
      >>> jm.params.merge(jm.params.breadcrumbs_ties(1.0), base, models)["w"].tolist()
      [4.0, 2.0]

    Source: Model Breadcrumbs (arXiv:2312.06795) before TIES-Merging (arXiv:2306.01708); mergekit's `breadcrumbs_ties`.
    """
    if reduce not in ("mean", "sum"):
        raise ValueError(f'breadcrumbs_ties: reduce must be "mean" or "sum", got {reduce!r}.')
    reduced = mean_agreeing(weight) if reduce == "mean" else sum_experts()
    return chain(trim_band(density, gamma, scope=scope), weigh(weight), elect_sign(), reduced, scaled(scale))


def della(
    density: Hyperparameter = 0.5,
    epsilon: Hyperparameter = 0.15,
    *,
    seed: int,
    weight: Hyperparameter = 1.0,
    scale: Hyperparameter = 1.0,
    rescale: Literal["inv_p", "l1"] = "inv_p",
    reduce: Literal["mean", "sum"] = "mean",
) -> MergeTransform:
    """Drop entries at random, small ones rather than large ones, rescale the rest; elect signs and reduce those that agree.

    Args:
      density, epsilon, seed: see `rank_mask`.
      weight: one number, one per model, or a function of the leaf's name.
      scale: a factor for the result.
      rescale: divide each entry by its own probability (the paper), or restore the l1 norm of each tensor.
      reduce: the weighted mean of the models that agree, or their sum.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, models = {"w": jnp.zeros(2)}, [{"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, -1.0])}]
      >>> jm.params.merge(jm.params.della(1.0, seed=0), base, models)["w"].tolist()
      [2.0, 2.0]

    Source: DELLA-Merging (arXiv:2406.11617); mergekit's `della`: rescale="l1".
    """
    if reduce not in ("mean", "sum"):
        raise ValueError(f'della: reduce must be "mean" or "sum", got {reduce!r}.')
    reduced = mean_agreeing(weight) if reduce == "mean" else sum_experts()
    return chain(_magprune(density, epsilon, seed, rescale), weigh(weight), elect_sign(), reduced, scaled(scale))


def della_linear(
    density: Hyperparameter = 0.5,
    epsilon: Hyperparameter = 0.15,
    *,
    seed: int,
    weight: Hyperparameter = 1.0,
    scale: Hyperparameter = 1.0,
    rescale: Literal["inv_p", "l1"] = "inv_p",
    normalize: bool = False,
) -> MergeTransform:
    """Drop entries at random, small ones rather than large ones, rescale the rest, add them up.

    Args:
      density, epsilon, seed, weight, scale, rescale: see `della`.
      normalize: divide the weights by their sum.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, models = {"w": jnp.zeros(2)}, [{"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, -1.0])}]
      >>> jm.params.merge(jm.params.della_linear(1.0, seed=0), base, models)["w"].tolist()
      [4.0, 1.0]

    Source: DELLA-Merging (arXiv:2406.11617); mergekit's `della_linear`: rescale="l1".
    """
    drop = _magprune(density, epsilon, seed, rescale)
    return chain(drop, weigh(weight, normalize=normalize), sum_experts(), scaled(scale))


def _magprune(density: Hyperparameter, epsilon: Hyperparameter, seed: int, rescale: str) -> MergeTransform:
    if rescale not in ("inv_p", "l1"):
        raise ValueError(f'della: rescale must be "inv_p" or "l1", got {rescale!r}.')
    drop = rank_mask(density, epsilon, seed=seed, divide=rescale == "inv_p")
    return rescaled(drop, "l1") if rescale == "l1" else drop


def magmax(*, scale: Hyperparameter = 1.0) -> MergeTransform:
    """Of the task vectors take, entry by entry, the one of largest magnitude; of equal ones the last.

    Args:
      scale: a factor for the result.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, models = {"w": jnp.zeros(2)}, [{"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([-1.0, 1.0])}]
      >>> jm.params.merge(jm.params.magmax(), base, models)["w"].tolist()
      [-1.0, 2.0]

    Source: MagMax (arXiv:2407.06322) and fusion_bench, whose default there is scale=0.5.
    """
    return chain(max_agreeing(tie="last"), scaled(scale))
