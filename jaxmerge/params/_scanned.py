"""Scanned layers: a leaf that stacks the weights of all layers is merged layer by layer, as the unstacked model would be."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxmerge.params._partition import inner_steps, models_left, run, settings_of
from jaxmerge.params._transform import MergeTransform, Step, atom


def per_layer(tx: MergeTransform, layers: Callable[[str], str | None]) -> MergeTransform:
    """Merge every layer of a scanned model for itself: thresholds, norms and singular vectors are each layer's own.

    Args:
      tx: a chain of this package's atoms, such as `tsvm()` or `ties(0.2, scope="tensor")`.
      layers: leaf name -> the name of one layer's leaf with {} for its number ("layers/kernel" -> "layers/{}/kernel"), if the
        leaf's first axis counts layers; None for the others.

    Law:
      The result is that of the unstacked models, stacked again: hyperparameters by name and random masks too.

    Raises:
      ValueError: a statistic of the whole model (which does not care how layers are stored: leave `per_layer` out); a name
        without {}; a scalar that is said to hold layers; layers of one leaf that are to be treated in different ways.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> tx = jm.params.per_layer(jm.params.iso_c(), lambda name: "layers/{}/kernel" if name == "layers/kernel" else None)
      >>> base, task = jnp.zeros((2, 2, 2)), jnp.stack([jnp.diag(jnp.array(v)) for v in ([3.0, 1.0], [6.0, 2.0])])
      >>> merged = jm.params.merge(tx, {"layers": {"kernel": base}}, [{"layers": {"kernel": task}}])["layers"]["kernel"]
      >>> merged[:, 0, 0].round(3).tolist()
      [2.0, 4.0]

    Source: the layout of scan over layers (`nn.scan`, `nnx.scan`, MaxText); the papers' and mergekit's tensors are one layer's.
    """
    steps = inner_steps(tx, "per_layer")

    def settings(name, shape):
        pattern = layers(name)
        if pattern is None:
            return {"leaf": settings_of(steps, name, shape)}
        if "{}" not in pattern or len(shape) < 2:
            raise ValueError(
                f"per_layer: leaf {name!r} of shape {shape[1:]} needs an axis of layers and a name with {{}} for their number; "
                f"got {pattern!r}."
            )
        each = [settings_of(steps, pattern.replace("{}", str(i)), (shape[0], *shape[2:])) for i in range(shape[1])]
        if any(jax.tree.structure(s) != jax.tree.structure(each[0]) for s in each):
            raise ValueError(
                f"per_layer: layers of leaf {name!r} are to be merged in different ways; let `select`, `label` and the like "
                "treat them alike, or unstack the model."
            )
        return {"layers": jax.tree.map(_stack, *each)}

    def merge(plan, x):
        if "leaf" in plan:
            return run(steps, plan["leaf"], x)
        one = lambda layer: run(steps, *layer)
        return jnp.moveaxis(lax.map(one, (plan["layers"], jnp.moveaxis(x, 1, 0))), 0, 1)

    needs = tuple(dict.fromkeys(need for step in steps for need in step.needs))
    return atom(Step(settings, lambda settings, x: settings, merge, models=models_left(steps), needs=needs))


def _stack(*values) -> Array | np.ndarray:
    return (jnp if any(isinstance(v, Array) for v in values) else np).stack(values)
