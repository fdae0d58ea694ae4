"""DyVTE: a small router beside each layer of a language model says when the visual tokens may leave.

    routers = nnx.List([ExitRouter(width, rngs=rngs) for _ in range(depth)])
    logits = jnp.stack([r(text_state(x, text)) for r, x in zip(routers, states)], axis=-2)      (b, depth, 2)
    leaves_after = jm.tokens.exit_layer(logits)

Inference asks layer by layer: where all rows say exit, `lax.cond` or the host goes on with `jm.merge(exit_plan, x)`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Bool, Float, Int


class ExitRouter(nnx.Module):
    """Two linear maps with the exact GELU between: from the state of the text to logits of [stay, exit].

    Args:
      width: of the language model; the state is twice as wide.
      hidden: the official 2048.
      dtype: of the matrix products; logits are float32.
      rngs: `nnx.Rngs(seed)`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> router = ExitRouter(8, hidden=16, rngs=nnx.Rngs(0))
      >>> router(text_state(jnp.ones((2, 5, 8)), jnp.ones((2, 5), bool))).shape
      (2, 2)

    Source: `Router` of DyVTE (arXiv:2411.19628); its dropout is made and never called. Initialised as its script does.
    """

    def __init__(self, width: int, *, hidden: int = 2048, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        init = nnx.initializers.xavier_uniform()
        self.w1 = nnx.Linear(2 * width, hidden, use_bias=False, dtype=dtype, kernel_init=init, rngs=rngs)
        self.w2 = nnx.Linear(hidden, 2, use_bias=False, dtype=dtype, kernel_init=init, rngs=rngs)

    def __call__(self, state: Float[Array, "b d"]) -> Float[Array, "b 2"]:
        return self.w2(jax.nn.gelu(self.w1(state), approximate=False)).astype(jnp.float32)


def text_state(x: Float[Array, "b n d"], text: Bool[Array, "b n"]) -> Float[Array, "b 2*d"]:
    """What the routers look at: the mean of the question's tokens but the last, and the last. No gradient flows back.

    Args:
      x: the hidden states after a layer.
      text: True for the tokens of the question, which stand after the visual ones. A row without any has state 0.

    Returns:
      float32. Of a question of one token the mean is 0 (official: NaN).

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.arange(4.0)[None, :, None]
      >>> text_state(x, jnp.array([[False, True, True, True]])).tolist()
      [[1.5, 3.0]]

    Source: DyVTE (arXiv:2411.19628).
    """
    n = x.shape[1]
    place = jnp.where(text, jnp.arange(n)[None], -1)
    is_last = text & (place == place.max(axis=1, keepdims=True))
    x = lax.stop_gradient(x).astype(jnp.float32)
    pick = lambda mask: jnp.where(mask[..., None], x, 0).sum(axis=1)
    count = jnp.maximum((text & ~is_last).sum(axis=1), 1)[:, None]
    return jnp.concatenate([pick(text & ~is_last) / count, pick(is_last)], axis=-1)


def may_exit(
    with_images: Float[Array, "b n v"],
    without_images: Float[Array, "b n v"],
    labels: Int[Array, "b n"],
    *,
    agreement: float = 0.99,
    slack: float = 1.03,
) -> Int[Array, "b"]:
    """The routers' targets: 1 where the answer is the same without the visual tokens, 0 where it is not.

    Args:
      with_images, without_images: logits of the next token from a forward pass with the visual tokens in all layers, and from
        one in which they left after the layer whose router is trained.
      labels: the answer, aligned with the logits (`labels[i]` is predicted by `logits[i]`); below 0 where there is none.
      agreement: the part of the answer's predictions above which they are the same.
      slack: times the loss with images, below which the loss without may be.

    Returns:
      Class labels for a cross entropy on `ExitRouter`'s logits. A row without an answer may exit.

    Example:
      >>> import jax.numpy as jnp
      >>> logits = jnp.array([[[2.0, 0.0], [0.0, 2.0]]])
      >>> may_exit(logits, logits, jnp.array([[0, 1]])).tolist(), may_exit(logits, -logits, jnp.array([[0, 1]])).tolist()
      ([1], [0])

    Source: DyVTE (arXiv:2411.19628), `LlamaForCausalLM.forward`: accuracy above 0.99 and loss below 1.03 times the other.
    """
    answer = labels >= 0
    count = jnp.maximum(answer.sum(axis=1), 1)

    def loss(logits):
        gold = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        return -jnp.where(answer, gold, 0).sum(axis=1) / count

    same = (with_images.argmax(axis=-1) == without_images.argmax(axis=-1)) | ~answer
    agree = 1 - (~same).sum(axis=1) / count
    good = (agree > agreement) & ((loss(without_images) < slack * loss(with_images)) | ~answer.any(axis=1))
    return good.astype(jnp.int32)
