"""Merging by least squares: the weights whose outputs are nearest to every model's on its own inputs."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jaxmerge.params._layout import along, einsum, like, locally, whole
from jaxmerge.params._transform import (
    Hyperparameter,
    MergeTransform,
    Need,
    Step,
    atom,
    chain,
    each,
    float32,
    models,
    resolve,
    total,
)
from jaxmerge.params.atoms._scale import scale as scaled
from jaxmerge.params.spectral._spectral import Select, per_matrix, turned


def gram(x: Float[Array, "*batch n"]) -> Float[Array, "n n"]:
    """X^T X over all axes but the last, in float32: a linear layer's inputs as `regmean` needs them. Add them up over batches.

    The inputs of all linear layers of a flax.nnx model, caught on their way (the names are those of the kernels in
    `nnx.to_pure_dict(nnx.state(model, nnx.Param))`; not for use inside jit):

      >>> from unittest import mock
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> from flax import nnx
      >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), jnp.tanh, nnx.Linear(3, 1, rngs=nnx.Rngs(1)))
      >>> kernel = {id(m): "/".join([*map(str, path), "kernel"]) for path, m in nnx.iter_modules(model)}
      >>> grams, linear = {}, nnx.Linear.__call__
      >>> def caught(layer, x):
      ...     name = kernel[id(layer)]
      ...     grams[name] = grams.get(name, 0) + jm.params.gram(x)
      ...     return linear(layer, x)
      >>> with mock.patch.object(nnx.Linear, "__call__", caught):
      ...     for batch in (jnp.ones((5, 2)), jnp.zeros((5, 2))):
      ...         _ = model(batch)
      >>> {name: g.shape for name, g in sorted(grams.items())}
      {'layers/0/kernel': (2, 2), 'layers/2/kernel': (3, 3)}

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.params.gram(jnp.array([[1.0, 2.0], [0.0, 1.0]])).tolist()
      [[1.0, 2.0], [2.0, 5.0]]
    """
    x = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    return einsum("mi,mj->ij", x, x)


def regmean(grams: Sequence[Mapping[str, Any]], *, shrink: float = 0.9, ridge: float = 1e-6, axis: int = 0) -> MergeTransform:
    """Least squares: W = (sum of G_k)^-1 (sum of G_k W_k), where G_k is the Gram matrix of model k's inputs.

    What the inputs do not determine stays at the models' mean. Leaves without a Gram matrix are averaged. A matrix split along
    its inputs is laid out along its outputs first (an all-to-all under Explicit axes, where they divide evenly; else it is
    brought together along its inputs); then nothing moves.

    Args:
      grams: for each model {leaf name: (n, n)}; `gram` makes them.
      shrink: what off-diagonal entries are multiplied by.
      ridge: added to the diagonal, in units of its mean.
      axis: of a matrix's two axes the one of its inputs: 0 for Flax kernels, 1 for PyTorch's.

    Law:
      Identical models give the model back; equal multiples of the identity give the mean.

    Raises:
      ValueError: not one mapping per model; a Gram matrix that does not fit its leaf.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> grams = [{"w": jnp.diag(jnp.array([1.0, 0.0]))}, {"w": jnp.diag(jnp.array([0.0, 1.0]))}]
      >>> models = [{"w": jnp.array([[1.0], [2.0]])}, {"w": jnp.array([[3.0], [4.0]])}]
      >>> jm.params.merge(jm.params.regmean(grams), None, models)["w"].round(3).tolist()
      [[1.0], [4.0]]

    Source: RegMean (arXiv:2212.09849); fusion_bench, axis=1, with an explicit inverse in the place of a ridge.
    """
    if axis not in (0, 1):
        raise ValueError(f"regmean: axis must be 0 or 1, the axis of a matrix's inputs; got {axis}.")

    def settings(name, shape):
        if len(grams) != shape[0]:
            raise ValueError(f"regmean: pass Gram matrices for each of the {shape[0]} models; got {len(grams)}.")
        if name not in grams[0]:
            return {"rest": ()}
        n = shape[1 + axis] if len(shape) == 3 else None
        if any(np.shape(g[name]) != (n, n) for g in grams):
            raise ValueError(
                f"regmean: leaf {name!r} of shape {shape[1:]} needs Gram matrices of shape {(n, n)} (axis={axis}); "
                f"got {[np.shape(g[name]) for g in grams]}."
            )
        return {"gram": jnp.stack([jnp.asarray(g[name], jnp.float32) for g in grams])}

    def merge(plan, x):
        mean = total(x) / x.shape[0]
        if "rest" in plan:
            return mean
        g = whole(plan["gram"], (1, 2))  # a system is solved where it is whole
        g = g * (shrink + (1 - shrink) * jnp.eye(g.shape[-1]))[None]
        w = x - mean if axis == 0 else jnp.swapaxes(x - mean, 1, 2)
        w = along(w, 2)  # outputs may be split: the system is the same for each
        solved = _solve(jnp.sum(g, axis=0), einsum("kij,kjm->im", g, w), ridge)[None]
        return mean + like(solved if axis == 0 else jnp.swapaxes(solved, 1, 2), x)

    needs = (Need("data", "tensor"), Need("spectral", "tensor"))
    return atom(Step(settings, lambda settings, x: settings, merge, models=1, needs=needs))


def _solve(a: Float[Array, "n n"], b: Float[Array, "n m"], ridge: float) -> Float[Array, "n m"]:
    """(a + ridge mean(diag a) I)^-1 b, refined once; 0 where a is 0."""
    eye = jnp.eye(a.shape[0])
    unit = jnp.trace(a) / a.shape[0]
    regular = a / jnp.where(unit > 0, unit, 1) + ridge * eye
    invert = lambda a: jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(a), jnp.eye(a.shape[0]))
    inverse = locally(invert, regular + jnp.where(unit > 0, 0, 1) * eye)  # b may be split; a is not
    b = b / jnp.where(unit > 0, unit, 1)
    x = einsum("ij,jm->im", inverse, b)
    return x + einsum("ij,jm->im", inverse, b - einsum("ij,jm->im", regular, x)) * (unit > 0)


def fisher(
    weights: Sequence[Any], *, weight: Hyperparameter = 1.0, normalize: bool = True, floor: float = 1e-6
) -> MergeTransform:
    """The mean of the models, entry by entry, weighted by how sure each model is of it: its diagonal Fisher information.

    Args:
      weights: for each model {leaf name: array of the leaf's shape}: mean squared gradients of its log-likelihood.
      weight: one number, one per model, or a function of the leaf's name, times the Fisher information.
      normalize: divide each model's by its l2 norm over the whole model.
      floor: added to the information and to the norms.

    Law:
      Identical models give the model back.

    Raises:
      ValueError: not one mapping per model; a leaf without information, or of another shape.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> tx = jm.params.fisher([{"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 1.0])}])
      >>> models = [{"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 4.0])}]
      >>> jm.params.merge(tx, None, models)["w"].round(3).tolist()
      [1.0, 4.0]

    Source: Merging models with Fisher-weighted averaging (arXiv:2111.09832); fusion_bench.
    """
    leaves = [{n: jnp.asarray(v, jnp.float32) for n, v in model.items()} for model in weights]
    square = jnp.stack([sum((jnp.sum(v * v) for v in model.values()), jnp.float32(0)) for model in leaves])
    size = 1 / (jnp.sqrt(square) + floor)
    factor = size / jnp.sum(size) if normalize else jnp.ones_like(size)

    def settings(name, shape):
        if len(leaves) != shape[0]:
            raise ValueError(f"fisher: pass the information of each of the {shape[0]} models; got {len(leaves)}.")
        if any(name not in model or model[name].shape != shape[1:] for model in leaves):
            raise ValueError(f"fisher: every model needs information of shape {shape[1:]} for leaf {name!r}.")
        w = float32(resolve(weight, name, shape[0], "fisher: weight"))
        return {"fisher": [model[name] for model in leaves], "factor": w * factor}

    def merge(plan, x):
        f = jnp.stack([(one + floor) * times for one, times in zip(plan["fisher"], models(plan["factor"]), strict=True)])
        return total(each(jnp.multiply, x, f)) / total(f)

    return atom(Step(settings, lambda settings, x: settings, merge, models=1, needs=(Need("data", "entry"),)))


def wudi(
    optimizer: Any = None,
    *,
    steps: int = 300,
    scale: float = 1.0,
    select: Select = None,
    cutoff: float = 1e-6,
    axis: int = 1,
) -> MergeTransform:
    """The task matrix that interferes least with any task: it minimises the sum of |(T - T_k) T_k^T|^2 / |T_k|^2.

    A task's rows stand for its inputs, so this is least squares with Gram matrices T_k^T T_k. What they leave open stays at the
    sum of the tasks. Leaves that are not matrices are averaged. A matrix is laid out along its rows (an all-to-all under
    Explicit axes, where they divide evenly); what is added up over devices are the K Gram matrices.

    Args:
      optimizer: None solves; an optax-like one (`init`, `update`) descends instead, from the sum, and stops early.
      steps: how often it does.
      scale: a factor for the result.
      select: leaf name -> whether it is merged so; None takes every matrix.
      cutoff: eigenvalues below this share of the largest count as 0.
      axis: of a matrix's two axes the one of its inputs: 1 for PyTorch's weights, as the formula has it, 0 for Flax kernels.

    Law:
      One model comes back as it is.

    Raises:
      ValueError: an axis that is neither 0 nor 1.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, a, b = (jnp.zeros((1, 2)), jnp.array([[2.0, 0.0]]), jnp.array([[0.0, 4.0]]))
      >>> jm.params.merge(jm.params.wudi(), {"w": base}, [{"w": a}, {"w": b}])["w"].round(3).tolist()
      [[2.0, 4.0]]

    Source: WUDI-Merging (arXiv:2503.08099); the official code and fusion_bench: optax.adam(1e-5), steps=300.
    """
    if axis not in (0, 1):
        raise ValueError(f"wudi: axis must be 0 or 1, the axis of a matrix's inputs; got {axis}.")

    def work(x):
        x = along(x, 1)
        square = jnp.sum(x * x, axis=(1, 2), keepdims=True)
        g = einsum("kmi,kmj->kij", x, x / jnp.where(square == 0, 1, square))  # T_k^T T_k / |T_k|^2
        a, b = jnp.sum(g, axis=0), einsum("kmi,kij->mj", x, g)
        t = jnp.sum(x, axis=0)
        if optimizer is None:
            values, vectors = locally(jnp.linalg.eigh, a)
            there = values > cutoff * values[-1:]
            inverse = jnp.where(there, 1 / jnp.where(there, values, 1), 0)
            for _ in range(2):  # the second pass makes up for the rounding of the first
                rest = einsum("mj,ji->mi", b - einsum("mi,ij->mj", t, a), vectors)
                t = t + einsum("mi,ji->mj", rest * inverse[None], vectors)
            return t[None]

        def step(_, carry):
            t, state = carry
            updates, state = optimizer.update(2 * (einsum("mi,ij->mj", t, a) - b), state, t)
            return t + updates, state

        return jax.lax.fori_loop(0, steps, step, (t, optimizer.init(t)))[0][None]

    return chain(per_matrix(work if axis == 1 else turned(work), select), scaled(scale))
