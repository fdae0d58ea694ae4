"""Random masks that are the same on one device, on eight, and on many hosts."""

import hashlib

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import UInt32

from jaxmerge.params._quantile import coordinates
from jaxmerge.params._transform import Hyperparameter, MergeTransform, Step, atom, over
from jaxmerge.params._trim import _density


def random_mask(density: Hyperparameter, *, seed: int) -> MergeTransform:
    """Keep each entry with probability `density`, independently; zero the rest.

    The choice is a function of (seed, leaf name, expert, index in the leaf) and of nothing else: no order of execution, no
    sharding, no number of devices enters. Multiply by 1 / density with `rescale(random_mask(...), "inv_p")`.

    Args:
      density: the share to keep, in [0, 1].
      seed: an integer; another seed, another mask.

    Law:
      density = 1 changes nothing; the result has the same bits on any sharding.

    Raises:
      ValueError: density outside [0, 1].

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> tx, stacked = jm.params.random_mask(0.5, seed=0), {"w": jnp.ones((1, 1000))}
      >>> 400 < tx.merge(tx.match(stacked), stacked)["w"].sum() < 600
      Array(True, dtype=bool)

    Source: DARE (arXiv:2311.03099). The bits are Threefry-2x32 (Salmon et al. 2011, doi:10.1145/2063384.2063405).
    """

    def settings(name, shape):
        d = _density(density, name, shape[0], "random_mask")
        keys = [hashlib.sha256(f"{int(seed)}/{k}/{name}".encode()).digest()[:8] for k in range(shape[0])]
        below = np.minimum(np.round(d * 2.0**32), 2.0**32 - 1).astype(np.uint32)
        return {
            "key": np.stack([np.frombuffer(k, "<u4") for k in keys]).astype(np.uint32),
            "below": below,
            "density": d.astype(np.float32),
        }

    def merge(plan, x):
        _, _, row, column = coordinates(x.shape[1:])
        key = jnp.asarray(plan["key"])
        bits = threefry((over(key[:, 0], x), over(key[:, 1], x)), (row[None], column[None]))
        keep = (bits < over(plan["below"], x)) | over(jnp.asarray(plan["density"]) >= 1, x)
        return jnp.where(keep, x, 0)

    return atom(Step(settings, lambda settings, x: settings, merge))


def threefry(key: tuple[Array, Array], counter: tuple[Array, Array]) -> UInt32[Array, "..."]:
    """The first word of Threefry-2x32 with 20 rounds: random bits for a 64-bit counter under a 64-bit key."""
    ks = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    a, b = counter[0] + ks[0], counter[1] + ks[1]
    for group in range(5):
        for r in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            a = a + b
            b = ((b << r) | (b >> (32 - r))) ^ a
        a = a + ks[(group + 1) % 3]
        b = b + ks[(group + 2) % 3] + jnp.uint32(group + 1)
    return a
