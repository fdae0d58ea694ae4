"""Coefficients that are learned: merges that are differentiable in them, and a plain descent."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PyTree

from jaxmerge.params._aliases import task_arithmetic
from jaxmerge.params._stack import merge
from jaxmerge.params._transform import Hyperparameter, MergeTransform

Squash = Literal["clip", "softmax", "sigmoid", "none"]


def adamerging(coefficients: Any, *, squash: Squash = "clip") -> MergeTransform:
    """The base plus each task vector times its coefficient: one per task, or one per task and tensor. Made to be learned.

    Args:
      coefficients: (K,), one per task; or {leaf name: (K,)}, one per task and tensor ("layer-wise"). May be traced.
      squash: what is done to them first: "clip" to [0, 1], a "softmax" over the tasks, a "sigmoid", or "none".

    Law:
      Differentiable in the coefficients.

    Raises:
      ValueError: an unknown squash; a leaf without coefficients.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, models = {"w": jnp.array(1.0)}, [{"w": jnp.array(2.0)}, {"w": jnp.array(3.0)}]
      >>> jm.params.merge(jm.params.adamerging(jnp.array([0.5, 1.5])), base, models)["w"].item()
      3.5

    Source: AdaMerging (arXiv:2310.02575), which learns them by entropy on unlabelled inputs (`fit`, `entropy`), starting at 0.3
    with Adam at 1e-3; fusion_bench: "clip"; its normalized_merging_weights: "softmax", with clamp_weights of what is
    clipped to [0, 1] first.
    """
    f = _squash(squash, "adamerging")
    return task_arithmetic(_by_leaf(coefficients, f, "adamerging"))


def self_positioning(position: Any, size: Hyperparameter = 1.0) -> MergeTransform:
    """The base plus a step of a learned size along a learned direction: the softmax-weighted mean of the task vectors.

    Args:
      position: (K,) before the softmax; may be traced.
      size: how far to go; may be traced.

    Law:
      Differentiable in both.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, models = {"w": jnp.array(0.0)}, [{"w": jnp.array(2.0)}, {"w": jnp.array(4.0)}]
      >>> jm.params.merge(jm.params.self_positioning(jnp.zeros(2), 0.5), base, models)["w"].item()
      1.5

    Source: Self Positioning (Improving General Text Embedding Model: Tackling Task Conflict and Data Imbalance through Model
    Merging, arXiv:2410.15035): both are learned by SGD on a small probe set (`fit`).
    """
    return task_arithmetic(_by_leaf(position, _squash("softmax", "self_positioning"), "self_positioning"), scale=size)


def fit(
    loss: Callable[[PyTree, Any], Array],
    transform: Callable[[PyTree], MergeTransform],
    start: PyTree,
    *,
    base: PyTree | None,
    models: list[PyTree],
    batches: Iterable[Any],
    optimizer: Any,
    regularizer: Callable[[PyTree], Any] | None = None,
) -> tuple[PyTree, Float[Array, "steps"]]:
    """Learn a merge: descend the loss of the merged model in the merge's coefficients, one step per batch.

    Args:
      loss: (merged model, batch) -> scalar.
      transform: coefficients -> transform, such as `adamerging`.
      start: coefficients to start from, a pytree.
      base, models: see `merge`; integer leaves are the base's.
      batches: what `loss` takes; all of one shape, so that there is one compilation.
      optimizer: optax-like: `init(params)` and `update(gradients, state, params)` -> (updates, state).
      regularizer: coefficients -> scalar, added to the loss.

    Returns:
      The coefficients, and the loss at each step, before it.

    Example:
      >>> import types, jax, jax.numpy as jnp, jaxmerge as jm
      >>> base, models = {"w": jnp.zeros(2)}, [{"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 1.0])}]
      >>> descent = types.SimpleNamespace(
      ...     init=lambda p: (), update=lambda g, state, p: (jax.tree.map(lambda v: -0.5 * v, g), state)
      ... )
      >>> loss = lambda model, batch: jnp.sum((model["w"] - batch) ** 2)
      >>> batches = [jnp.array([0.25, 0.75])] * 20
      >>> found, losses = jm.params.fit(
      ...     loss, jm.params.adamerging, 0.5 * jnp.ones(2), base=base, models=models, batches=batches, optimizer=descent
      ... )
      >>> [round(v, 3) for v in found.tolist()]
      [0.25, 0.75]

    Source: AdaMerging (arXiv:2310.02575), Expert Merging (arXiv:2509.25712): learning is ordinary differentiation.
    """

    def objective(coefficients, given, batch):
        value = loss(merge(transform(coefficients), *given, integers="base"), batch)
        return value if regularizer is None else value + regularizer(coefficients)

    return descend(objective, start, (base, models), batches, optimizer, what="fit")


def descend(
    objective: Callable[[PyTree, Any, Any], Array],
    start: PyTree,
    given: Any,
    batches: Iterable[Any],
    optimizer: Any,
    *,
    what: str,
) -> tuple[PyTree, Float[Array, "steps"]]:
    """Descend (coefficients, given, batch) -> scalar, one step per batch; what is given enters the program as an argument."""

    @jax.jit
    def step(coefficients, state, given, batch):
        value, gradient = jax.value_and_grad(objective)(coefficients, given, batch)
        updates, state = optimizer.update(gradient, state, coefficients)
        return jax.tree.map(jnp.add, coefficients, updates), state, value

    coefficients, state, losses = start, optimizer.init(start), []
    for batch in batches:
        coefficients, state, value = step(coefficients, state, given, batch)
        losses.append(value)
    if not losses:
        raise ValueError(f"{what}: no batches; pass at least one.")
    return coefficients, jnp.stack(losses)


def entropy(logits: Float[Array, "*batch classes"]) -> Float[Array, ""]:
    """The mean entropy of the predictions: AdaMerging's loss, which needs no labels.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> round(jm.params.entropy(jnp.zeros((3, 4))).item(), 4)
      1.3863
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.mean(jnp.sum(jnp.exp(log_p) * log_p, axis=-1))


def _squash(name: str, what: str) -> Callable[[Array], Array]:
    functions = {"clip": lambda c: jnp.clip(c, 0, 1), "softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid, "none": lambda c: c}
    if name not in functions:
        raise ValueError(f"{what}: squash must be one of {tuple(functions)}, got {name!r}.")
    return functions[name]


def _by_leaf(coefficients: Any, f: Callable[[Array], Array], what: str) -> Any:
    if not isinstance(coefficients, Mapping):
        return f(jnp.asarray(coefficients, jnp.float32))

    def of(name):
        if name not in coefficients:
            raise ValueError(f"{what}: leaf {name!r} has no coefficients; there are some for {sorted(coefficients)}.")
        return f(jnp.asarray(coefficients[name], jnp.float32))

    return of
