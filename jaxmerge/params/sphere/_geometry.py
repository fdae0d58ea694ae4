"""Between two models: on the line, or on the sphere."""

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmerge.params._transform import Hyperparameter, MergeTransform, Need, Step, atom, chain, each, over, resolve, total
from jaxmerge.params.atoms._consensus import sum_experts
from jaxmerge.params.atoms._scale import weigh
from jaxmerge.params.sphere._sphere import products, with_products, without_products


def interpolate(t: Hyperparameter) -> MergeTransform:
    """The point at t on the line from the first model to the second.

    Args:
      t: 0 is the first, 1 the second; may be a function of the leaf's name.

    Raises:
      ValueError: not two models.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.params.merge(jm.params.interpolate(0.25), None, [{"w": jnp.array(0.0)}, {"w": jnp.array(4.0)}])["w"].item()
      1.0
    """

    def weights(name):
        (v,) = resolve(t, name, 1, "interpolate: t")
        return jnp.stack([1 - v, v]) if isinstance(v, Array) else np.array([1 - v, v])

    return chain(weigh(weights), sum_experts())


def spherical(t: Hyperparameter, *, threshold: float = 0.9995, floor: float = 1e-8) -> MergeTransform:
    """The point at t on the great circle from the first model to the second, each tensor as one vector.

    The angle is that between the directions; the ends keep their lengths. Nearly parallel tensors (|cos| > threshold) are
    interpolated on the line instead.

    Args:
      t: 0 is the first, 1 the second; may be a function of the leaf's name.
      threshold: the cosine beyond which the line is taken.
      floor: a tensor no longer than this counts as of length 1.

    Raises:
      ValueError: not two models.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> a, b = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 1.0])}
      >>> [round(v, 4) for v in jm.params.merge(jm.params.spherical(0.5), None, [a, b])["w"].tolist()]
      [0.7071, 0.7071]

    Source: Shoemake 1985, doi:10.1145/325334.325242; as mergekit and fusion_bench have it.
    """

    def settings(name, shape):
        if shape[0] != 2:
            raise ValueError(f"spherical: slerp lies between two models, got {shape[0]}; merge two at a time.")
        return {"t": resolve(t, name, 1, "spherical: t").astype(np.float32)}

    def match(settings, x):
        g = (settings["products"] if "products" in settings else products(x)).reshape(2, 2)
        length = jnp.sqrt(jnp.diagonal(g))
        length = jnp.where(length > floor, length, 1)
        cos = jnp.clip(g[0, 1] / (length[0] * length[1]), -1, 1)
        v = jnp.asarray(settings["t"])[0]
        flat = jnp.abs(cos) > threshold
        angle = jnp.arccos(jnp.where(flat, 0, cos))
        arc = jnp.stack([jnp.sin((1 - v) * angle), jnp.sin(v * angle)]) / jnp.sin(angle)
        return {"coefficient": jnp.where(flat, jnp.stack([1 - v, v]), arc), "cosine": cos}

    needs = (Need("sum", "tensor"),)
    merge = lambda plan, x: total(each(lambda x, c: x * over(c, x), x, plan["coefficient"]))
    more = {"blocks": True, "resolve": with_products, "open": without_products}
    return atom(Step(settings, match, merge, models=1, needs=needs, **more))
