"""The spec of `attend` in plain XLA."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float


def attend(
    q: Float[Array, "B t *three h f"],
    k: Float[Array, "B s g f"] | None,
    v: Float[Array, "B s g f"] | None,
    bias: Float[Array, "B s"] | None,
    offset: Float[Array, "one three h f"] | None = None,
    *,
    scale: float,
    length: int | None = None,
    mean_keys: bool = False,
) -> tuple[Array, ...]:
    """softmax(scale q·k + bias) v: one number for each key, shared by heads and queries; (B, n, h, f).

    Without k and v, q is all three, (B, t, 3, h, f), of whose rows the first `length` are there; to each the offset is added.
    With `mean_keys` the mean of the keys over heads comes second, (B, s, f).
    """
    if k is None or v is None:
        q, k, v = unpacked(q, offset, length)
    b = None if bias is None else bias[:, None, None, :]
    out = jax.nn.dot_product_attention(q, k, v, bias=b, scale=scale)
    return (out, over_heads(k)) if mean_keys else (out,)


def attend_vjp(
    q: Float[Array, "B t *three h f"],
    k: Float[Array, "B s g f"] | None,
    v: Float[Array, "B s g f"] | None,
    bias: Float[Array, "B s"] | None,
    offset: Float[Array, "one three h f"] | None,
    g: Float[Array, "B n h f"],
    *kept: Array,
    scale: float,
    length: int | None = None,
) -> tuple[Array | None, ...]:
    """How a loss moves with q, k, v and bias, where g is how it moves with what `attend` gives.

    `kept` is what an implementation's own `attend` gave with `for_vjp`: the result and what comes last. Without, it is found
    again. With the offset the loss moves as with what that is added to.
    """
    given = {i: x for i, x in enumerate((q, k, v, bias)) if x is not None}
    every = lambda some: (some.get(0, q), some.get(1), some.get(2), some.get(3))
    call = lambda some: attend(*every(some), offset, scale=scale, length=length)[0]
    (found,) = jax.vjp(call, given)[1](g)
    return tuple(found.get(i) for i in range(4))


def over_heads(k: Float[Array, "*batch s g f"]) -> Float[Array, "*batch s f"]:
    """The mean of keys over heads, summed in float32, in their own dtype."""
    return k.mean(axis=-2, dtype=jnp.float32).astype(k.dtype)


def unpacked(
    qkv: Float[Array, "*batch rows three h f"], offset: Float[Array, "*one three h f"] | None, length: int | None
) -> tuple[Array, Array, Array]:
    """Queries, keys and values of one product: the rows that are there, with what they lack."""
    qkv = qkv if offset is None else (qkv + offset[..., None, :, :, :]).astype(qkv.dtype)
    q, k, v = (qkv[..., :length, i, :, :] for i in range(3))
    return q, k, v
