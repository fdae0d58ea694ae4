"""A causal language model over bytes: T5's decoder by itself, with no encoder to read.

    model = ByteLM(T5Config(d_model=64, d_kv=16, d_ff=128, num_heads=4, num_decoder_layers=4, vocab_size=256), rngs=nnx.Rngs(0))
    logits = model(ids)                                 for the byte after each

Sources: T5 (arXiv:1910.10683), whose section 3.2 has the decoder alone as "language model".
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models.t5 import BlockSize, Stack, T5Config, lookup


class ByteLM(nnx.Module):
    """The model. Of the config the encoder's depth and the dropout are not read; the other arguments are those of `t5.T5`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> config = T5Config(d_model=16, d_kv=4, d_ff=32, num_heads=2, num_decoder_layers=1, vocab_size=256)
      >>> ByteLM(config, rngs=nnx.Rngs(0))(jnp.array([[72, 101, 108]])).shape
      (1, 3, 256)
    """

    def __init__(
        self,
        c: T5Config,
        *,
        dtype: Any = jnp.float32,
        scan: bool = False,
        remat: str | None = None,
        block_size: BlockSize = None,
        rngs: nnx.Rngs,
    ):
        how: Any = dict(dtype=dtype, scan=scan, remat=remat, block_size=block_size, rngs=rngs)
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (c.vocab_size, c.d_model)))
        self.decoder = Stack(c, decoder=True, cross=False, **how)
        init = nnx.initializers.normal(c.d_model**-0.5)
        self.head = nnx.Linear(c.d_model, c.vocab_size, use_bias=False, kernel_init=init, rngs=rngs)

    def __call__(self, ids: Int[Array, "b t"]) -> Float[Array, "b t v"]:
        """Logits for the byte after each of `ids`, float32."""
        hidden, _ = self.decoder(lookup(self.embedding[...], ids))
        return self.head(self.decoder.last(hidden[-1]).astype(jnp.float32))
