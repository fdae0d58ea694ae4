"""Attention weights that compute the same and cannot be merged: locks, and how to see one."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmerge.params._spectral import matmul


class Attention(NamedTuple):
    """The projections of an attention layer, without biases, without rotary positions; PyTorch's orientation (out, in).

    Attributes:
      q: (heads * d, model). k, v: (kv_heads * d, model). o: (model, heads * d).
    """

    q: Float[Array, "hd model"]
    k: Float[Array, "kd model"]
    v: Float[Array, "kd model"]
    o: Float[Array, "model hd"]


def lock(
    weights: Attention, p: Float[Array, "kv_heads d d"], r: Float[Array, "kv_heads d d"], *, transpose: bool = True
) -> Attention:
    """Multiply matrices into the heads that cancel: q by p^T and k by p^-1, v by r and o by r^-1.

    Args:
      weights: the projections; grouped queries share the matrices of their key and value head.
      p, r: one invertible matrix per key and value head.
      transpose: whether q gets p^T (and k p^-1), or p (and k p^-T).

    Law:
      The layer's output does not change. Its merge with a layer that is not locked so does.

    Raises:
      ValueError: shapes that do not fit; `d` does not divide the rows.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> weights = jm.params.Attention(*(jnp.eye(2) for _ in range(4)))
      >>> locked = jm.params.lock(weights, 2 * jnp.eye(2)[None], jnp.eye(2)[None])
      >>> locked.q.tolist(), locked.k.tolist()
      ([[2.0, 0.0], [0.0, 2.0]], [[0.5, 0.0], [0.0, 0.5]])

    Source: MergeLock (arXiv:2509.01548). With rotary positions p must commute with the rotations; the caller sees to that.
    """
    kv_heads, d, _ = p.shape
    rows = weights.q.shape[0]
    if p.shape != r.shape or weights.k.shape[0] != kv_heads * d or rows % (kv_heads * d) or weights.o.shape[1] != rows:
        raise ValueError(
            f"lock: matrices of shapes {p.shape} and {r.shape} do not fit projections of shapes "
            f"{tuple(w.shape for w in weights)}; there must be one per key and value head."
        )
    groups = rows // (kv_heads * d)
    turn = jnp.swapaxes(p, 1, 2) if transpose else p
    back = jnp.linalg.inv(p) if transpose else jnp.swapaxes(jnp.linalg.inv(p), 1, 2)
    per_query = lambda m: jnp.repeat(m, groups, axis=0)
    heads = lambda w: w.reshape(-1, d, w.shape[1])
    return Attention(
        matmul(per_query(turn), heads(weights.q)).reshape(weights.q.shape),
        matmul(back, heads(weights.k)).reshape(weights.k.shape),
        matmul(r, heads(weights.v)).reshape(weights.v.shape),
        jnp.swapaxes(matmul(per_query(jnp.swapaxes(jnp.linalg.inv(r), 1, 2)), heads(weights.o.T)).reshape(rows, -1), 0, 1),
    )


def lock_suspicion(models: Sequence[Attention], *, kv_heads: int) -> Float[Array, "K K"]:
    """How much less alike two models' projections are than what these compute: near 0 for relatives, near 1 for a lock.

    What an attention layer computes depends on q^T k and o v of each head alone. Where these agree but q, k, v and o do not, a
    merge of the projections is no merge of the layers.

    Args:
      models: K layers of one shape.
      kv_heads: how many key and value heads.

    Returns:
      For each two models, the mean cosine of the products less that of the projections.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> weights = jm.params.Attention(*(jnp.eye(2) for _ in range(4)))
      >>> turn = jnp.array([[[0.0, 1.0], [-1.0, 0.0]]])
      >>> jm.params.lock_suspicion([weights, jm.params.lock(weights, turn, turn)], kv_heads=1).round(3).tolist()
      [[0.0, 1.0], [1.0, 0.0]]

    Source: ours; the invariance is that of MergeLock (arXiv:2509.01548).
    """
    d = models[0].k.shape[0] // kv_heads
    groups = models[0].q.shape[0] // (kv_heads * d)

    def products(w):
        heads = lambda x: x.reshape(-1, d, x.shape[1])
        wide = lambda x: jnp.repeat(heads(x), groups, axis=0)
        qk = matmul(jnp.swapaxes(heads(w.q), 1, 2), wide(w.k))
        vo = matmul(jnp.swapaxes(heads(w.o.T), 1, 2), wide(w.v))
        return [qk.reshape(-1), vo.reshape(-1)]

    def alike(vectors):
        x = jnp.stack(vectors)
        length = jnp.linalg.norm(x, axis=1, keepdims=True)
        x = x / jnp.where(length == 0, 1, length)
        return matmul(x, x.T)

    computed = [alike([products(w)[i] for w in models]) for i in range(2)]
    stored = [alike([w[i].reshape(-1) for w in models]) for i in range(4)]
    return jnp.maximum(sum(computed) / 2 - sum(stored) / 4, 0)
