"""Attention weights that compute the same and cannot be merged: locks, and how to see one."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmerge.params.spectral._spectral import matmul


class Attention(NamedTuple):
    """The projections of an attention layer; PyTorch's orientation (out, in).

    Attributes:
      q: (heads * d, model). k, v: (kv_heads * d, model). o: (model, heads * d).
      q_bias, k_bias, v_bias: of as many entries as their projection has rows, or None. The output's bias plays no part.
    """

    q: Float[Array, "hd model"]
    k: Float[Array, "kd model"]
    v: Float[Array, "kd model"]
    o: Float[Array, "model hd"]
    q_bias: Float[Array, "hd"] | None = None
    k_bias: Float[Array, "kd"] | None = None
    v_bias: Float[Array, "kd"] | None = None


def lock_matrices(
    key: Array, kv_heads: int, d: int, *, rotary: Literal["half", "interleaved"] | None = None, spread: float = 1.0
) -> tuple[Float[Array, "kv_heads d d"], Float[Array, "kv_heads d d"]]:
    """Random invertible matrices for `lock`.

    With rotary positions p turns and stretches the pairs of features that they turn, and so commutes with them.

    Args:
      key: a random key.
      kv_heads, d: how many matrices, and of what size.
      rotary: which features are a pair: i and i + d/2 ("half", as in Llama's published weights) or neighbours ("interleaved");
        None where there are no rotary positions.
      spread: stretches lie between e^-spread and e^spread, which bounds how much rounding the locks add.

    Returns:
      p and r.

    Raises:
      ValueError: rotary pairs of an odd number of features; an unknown kind of pairs.

    Example:
      >>> import jax, jaxmerge as jm
      >>> p, r = jm.params.lock_matrices(jax.random.key(0), 2, 4, rotary="half")
      >>> p.shape, r.shape, p[0].astype(bool).astype(int).tolist()
      ((2, 4, 4), (2, 4, 4), [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]])

    Source: MergeLock (arXiv:2509.01548).
    """
    if rotary not in (None, "half", "interleaved") or (rotary is not None and d % 2):
        raise ValueError(
            f'lock_matrices: rotary must be None, "half" or "interleaved", and d even with it; got {rotary!r}, d={d}.'
        )
    for_p, for_r = jax.random.split(key)

    def stretched(key):
        turn, stretch = jax.random.split(key)
        q = jax.random.orthogonal(turn, d, (2, kv_heads))
        sizes = jnp.exp(jax.random.uniform(stretch, (kv_heads, 1, d), jnp.float32, -spread, spread))
        return matmul(q[0] * sizes, q[1])

    if rotary is None:
        return stretched(for_p), stretched(for_r)
    turn, stretch = jax.random.split(for_p)
    angle = jax.random.uniform(turn, (kv_heads, d // 2), jnp.float32, 0, 2 * jnp.pi)
    size = jnp.exp(jax.random.uniform(stretch, (kv_heads, d // 2), jnp.float32, -spread, spread))
    first = jnp.arange(d // 2) if rotary == "half" else 2 * jnp.arange(d // 2)
    second = first + (d // 2 if rotary == "half" else 1)
    c, s = size * jnp.cos(angle), size * jnp.sin(angle)
    p = jnp.zeros((kv_heads, d, d)).at[:, first, first].set(c).at[:, second, second].set(c)
    return p.at[:, first, second].set(-s).at[:, second, first].set(s), stretched(for_r)


def lock(
    weights: Attention,
    p: Float[Array, "kv_heads d d"] | None,
    r: Float[Array, "kv_heads d d"],
    *,
    transpose: bool = True,
) -> Attention:
    """Multiply matrices into the heads that cancel: q by p^T and k by p^-1, v by r and o by r^-1; biases with their rows.

    Args:
      weights: the projections; grouped queries share the matrices of their key and value head.
      p, r: one invertible matrix per key and value head. With rotary positions p must commute with the rotations
        (`lock_matrices`). None leaves q and k as they are, which layers must that normalise queries and keys.
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

    Source: MergeLock (arXiv:2509.01548).
    """
    kv_heads, d, _ = r.shape
    rows = weights.q.shape[0]
    fits = p is None or p.shape == r.shape
    if not fits or weights.k.shape[0] != kv_heads * d or rows % (kv_heads * d) or weights.o.shape[1] != rows:
        raise ValueError(
            f"lock: matrices of shapes {None if p is None else p.shape} and {r.shape} do not fit projections of shapes "
            f"{tuple(w.shape for w in weights[:4])}; there must be one per key and value head."
        )
    groups = rows // (kv_heads * d)
    swap = lambda m: jnp.swapaxes(m, -1, -2)
    per_query = lambda m: jnp.repeat(m, groups, axis=0)

    def times(m, w):
        """m on the rows of each head, of a projection or of its bias."""
        return matmul(m, w.reshape(-1, d, 1 if w.ndim == 1 else w.shape[1])).reshape(w.shape)

    biased = lambda m, b: None if b is None else times(m, b)
    o = times(per_query(swap(jnp.linalg.inv(r))), weights.o.T).T
    locked = weights._replace(v=times(r, weights.v), v_bias=biased(r, weights.v_bias), o=o)
    if p is None:
        return locked
    turn, back = (swap(p), jnp.linalg.inv(p)) if transpose else (p, swap(jnp.linalg.inv(p)))
    return locked._replace(
        q=times(per_query(turn), weights.q),
        q_bias=biased(per_query(turn), weights.q_bias),
        k=times(back, weights.k),
        k_bias=biased(back, weights.k_bias),
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
    stored = [alike([getattr(w, name).reshape(-1) for w in models]) for name in ("q", "k", "v", "o")]
    return jnp.maximum(sum(computed) / 2 - sum(stored) / 4, 0)
