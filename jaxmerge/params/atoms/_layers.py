"""Which layers from which model; and which checkpoints of one run, with which weights."""

from collections.abc import Callable, Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np

from jaxmerge.params._names import Layer, layer_of
from jaxmerge.params._transform import Hyperparameter, MergeTransform, Step, atom, chain, float32, over, resolve, total
from jaxmerge.params.atoms._scale import scale as scaled
from jaxmerge.params.atoms._trim import Scope, trim
from jaxmerge.params.entries._swap import one_model


def select_layers(
    sources: Sequence[int | Sequence[float]],
    *,
    rest: int | Sequence[float] | Callable[[str], int | Sequence[float]] = 0,
    layer: Layer | None = None,
) -> MergeTransform:
    """Take each layer from one of the models, or from a mix of them.

    Args:
      sources: for each layer the number of a model, from 0, or a weight for each model.
      rest: the same for leaves that are in no layer: embeddings, norms, heads; may be a function of the leaf's name.
      layer: leaf name -> number of its layer or None; None is `layer_of()`.

    Law:
      What is taken from one model has its bits; what is not taken is not looked at (NaN, say).

    Raises:
      ValueError: a layer without a source; a number that no model has; weights that are not one per model.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> model = lambda v: {"layers": [jnp.array(v)] * 3, "norm": jnp.array(v)}
      >>> merged = jm.params.merge(jm.params.select_layers([0, 1, [0.5, 0.5]]), None, [model(1.0), model(2.0)])
      >>> [x.item() for x in merged["layers"]], merged["norm"].item()
      ([1.0, 2.0, 1.5], 1.0)

    Source: mergekit's `passthrough` over slices.
    """
    of = layer_of() if layer is None else layer

    def settings(name, shape):
        i = of(name)
        if i is not None and not 0 <= i < len(sources):
            raise ValueError(f"select_layers: leaf {name!r} is of layer {i}, but there are sources for {len(sources)}.")
        source = sources[i] if i is not None else rest(name) if callable(rest) else rest
        if isinstance(source, int) and not 0 <= source < shape[0]:
            raise ValueError(f"select_layers: leaf {name!r} is to come from model {source}, but there are {shape[0]}, from 0.")
        one = np.eye(shape[0])[source] if isinstance(source, int) else source
        return {"weight": float32(resolve(one, name, shape[0], "select_layers: weight"))}

    def merge(plan, x):
        w = over(plan["weight"], x)
        return total(jnp.where(w == 0, 0, x * w))

    return atom(Step(settings, lambda settings, x: settings, merge, models=1, blocks=True))


def layer_swapping(
    layers: int,
    *,
    bottom: int,
    top: int,
    transition: int | tuple[int, int] = 0,
    rest: Sequence[float] = (0.5, 0.5),
    layer: Layer | None = None,
) -> MergeTransform:
    """The first and last layers from the first model, those between from the second, averaged where they meet.

    Args:
      layers: how many there are.
      bottom, top: how many of the first and of the last come from the first model (the language expert).
      transition: how many layers inside each border are the mean of both; or so many at the lower and at the upper border.
      rest: weights of the two models for leaves that are in no layer: embeddings, norms, heads.
      layer: leaf name -> number of its layer or None; None is `layer_of()`.

    Raises:
      ValueError: more swapped layers than there are; not two models; a layer that is out of range.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> model = lambda v: {"layers": [jnp.array(v)] * 4}
      >>> tx = jm.params.layer_swapping(4, bottom=1, top=1)
      >>> [x.item() for x in jm.params.merge(tx, None, [model(1.0), model(2.0)])["layers"]]
      [1.0, 2.0, 2.0, 1.0]

    Source: Layer Swapping for zero-shot cross-lingual transfer (arXiv:2410.01335).
    """
    lower, upper = transition if isinstance(transition, tuple) else (transition, transition)
    middle = layers - bottom - top - lower - upper
    if min(bottom, top, lower, upper, middle) < 0:
        raise ValueError(
            f"layer_swapping: bottom={bottom}, top={top} and transition={(lower, upper)} do not fit {layers} layers."
        )
    first, both, second = [1.0, 0.0], [0.5, 0.5], [0.0, 1.0]
    sources = [first] * bottom + [both] * lower + [second] * middle + [both] * upper + [first] * top
    return select_layers(sources, rest=rest, layer=layer)


def update_selective(density: float = 0.2, *, scale: Hyperparameter = 1.0, scope: Scope = "model") -> MergeTransform:
    """The largest part of what a training run changed, scaled: DLER's merge.

    Args:
      density: the share of the changes to keep, the largest.
      scale: a factor for them.
      scope: see `trim`.

    Raises:
      ValueError: more than one model.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, model = {"w": jnp.zeros(4)}, {"w": jnp.array([4.0, 1.0, -3.0, 0.0])}
      >>> jm.params.merge(jm.params.update_selective(0.5), base, [model])["w"].tolist()
      [4.0, 0.0, -3.0, 0.0]

    Source: DLER (arXiv:2510.15110), whose share and factor are tuned on validation data.
    """
    return chain(one_model("update_selective"), trim(density, scope=scope), scaled(scale))


def window_average(
    decay: Literal["linear", "cosine", "minus_sqrt", "ema"] | Sequence[float] = "linear",
    *,
    window: int | None = None,
    beta: float = 0.8,
) -> MergeTransform:
    """Average the last checkpoints of one run, as if the learning rate had decayed.

    The updates between checkpoints are to count as a decay schedule says: a checkpoint's weight is how much it falls after it.
    "linear" is the plain mean of the checkpoints.

    Args:
      decay: the schedule of updates ("linear" falls to 0 evenly, "cosine" as half a cosine, "minus_sqrt" as 1 - sqrt, "ema" so
        that the result is an exponential moving average, begun at the first checkpoint); or the multiplier of each update
        itself, one fewer than checkpoints in the window, none above the one before or 1.
      window: how many checkpoints, the last ones, take part; None is all. Oldest first, no base.
      beta: of "ema": what each checkpoint leaves of the average before it.

    Law:
      With multipliers f_1 >= f_2 ..., the result is the first checkpoint plus the sum of f_i times the i-th update.

    Raises:
      ValueError: an unknown schedule; a window of more checkpoints than there are; multipliers that rise or do not fit; a beta
        that is not between 0 and 1.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> run = [{"w": jnp.array(v)} for v in (0.0, 1.0, 2.0)]
      >>> jm.params.merge(jm.params.window_average([1.0, 0.5]), None, run)["w"].item()
      1.5

    Source: WSM: decay-free learning rate schedule via checkpoint merging (arXiv:2507.17634).
    """
    shapes = {
        "linear": lambda u, n: 1 - u,
        "cosine": lambda u, n: (1 + np.cos(np.pi * u)) / 2,
        "minus_sqrt": lambda u, n: 1 - np.sqrt(u),
        "ema": lambda u, n: np.where(u > 0, 1 - float(beta) ** (n * (1 - u)), 1),
    }
    if not 0 <= beta <= 1:
        raise ValueError(f"window_average: beta must be between 0 and 1, got {beta}.")
    if isinstance(decay, str) and decay not in shapes:
        raise ValueError(f"window_average: decay must be one of {tuple(shapes)} or numbers, got {decay!r}.")

    def settings(name, shape):
        models = shape[0]
        n = models if window is None else window
        if not 1 <= n <= models:
            raise ValueError(f"window_average: a window of {n} checkpoints does not fit the {models} that there are.")
        f = shapes[decay](np.arange(n + 1) / n, n) if isinstance(decay, str) else np.array([1.0, *decay, 0.0])
        if len(f) != n + 1 or (np.diff(f) > 0).any():
            raise ValueError(
                f"window_average: {n} checkpoints need {n - 1} multipliers that fall from at most 1 to at least 0; got {decay}."
            )
        return {"weight": np.concatenate([np.zeros(models - n), f[:-1] - f[1:]]).astype(np.float32)}

    return atom(
        Step(settings, lambda settings, x: settings, lambda plan, x: total(x * over(plan["weight"], x)), models=1, blocks=True)
    )
