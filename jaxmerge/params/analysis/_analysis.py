"""What there is to merge: how alike the task vectors are, how often they disagree, and where they changed most."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxmerge.params._transform import Stacked, named_leaves, total
from jaxmerge.params.sphere._sphere import norms, products


def cosines(stacked: Stacked) -> Float[Array, "K K"]:
    """The cosines between the task vectors, each model's leaves as one vector. Near 0: the tasks use different directions.

    Law:
      Symmetric; 1 on the diagonal (0 for a model that changed nothing).

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.params.cosines({"w": jnp.array([[1.0, 0.0], [0.0, 2.0]])}).tolist()
      [[1.0, 0.0], [0.0, 1.0]]

    Source: Editing models with task arithmetic (arXiv:2212.04089), figure 5.
    """
    g = sum(products(x).reshape(x.shape[0], -1) for x in named_leaves(stacked)[0].values())
    length = jnp.sqrt(jnp.diagonal(g))
    length = jnp.where(length == 0, 1, length)
    return g / (length[:, None] * length[None])


def sign_conflict(stacked: Stacked) -> dict[str, Float[Array, ""]]:
    """For each leaf, the share of the task vectors' mass that points against the sign of its entry's sum: what TIES erases.

    Law:
      0 where all models agree; under 1/2.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.params.sign_conflict({"w": jnp.array([[3.0, 3.0], [-1.0, 1.0]])})["w"].item()
      0.125

    Source: TIES-Merging (arXiv:2306.01708), figure 3 counts entries; weighed by magnitude, small noise does not count.
    """

    def share(x):
        mass = jnp.sum(jnp.abs(x))
        against = jnp.sum(jnp.where(x * jnp.sign(total(x)) < 0, jnp.abs(x), 0))
        return against / jnp.where(mass == 0, 1, mass)

    return {name: share(x) for name, x in named_leaves(stacked)[0].items()}


def task_norms(stacked: Stacked) -> dict[str, Float[Array, "K"]]:
    """For each leaf, the length of each model's task vector.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.params.task_norms({"w": jnp.array([[3.0, 4.0], [0.0, 1.0]])})["w"].tolist()
      [5.0, 1.0]
    """
    return {name: norms(products(x)).reshape(-1) for name, x in named_leaves(stacked)[0].items()}
