"""Mamba-2: a linear recurrence whose matrix decays by one number per head, computed in chunks as attention without softmax.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t'        y_t = h_t C_t + D x_t

Within a chunk, y = (C B' * decay) x; from chunk to chunk the state is carried. A block has the shape of `models.decoder.Block`:
it maps (x, places, cache) to (x, cache), and documents do not see each other.

Source: Mamba-2 (arXiv:2405.21060), the block that H-Net's outer stages are made of.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxmerge import words
from jaxmerge.attention import MASKED
from models.decoder import DecoderConfig, FeedForward, Places, RMSNorm, linear


@dataclasses.dataclass(frozen=True)
class MambaConfig:
    """Sizes of the recurrence. `state`: of a head's memory, per feature. `chunk`: positions computed at once."""

    state: int = 128
    conv: int = 4
    expand: int = 2
    head_dim: int = 64
    chunk: int = 256


class Memory(NamedTuple):
    """What a row remembers: the last inputs of the convolution, and the state."""

    inputs: Float[Array, "b w c"]
    state: Float[Array, "b h p s"]


class Mamba2(nnx.Module):
    """The mixer: project, convolve, recur, gate, norm, project."""

    def __init__(self, c: DecoderConfig, m: MambaConfig, *, dtype: Any, rngs: nnx.Rngs):
        inner = m.expand * c.width
        if inner % m.head_dim:
            raise ValueError(f"Mamba2: head_dim {m.head_dim} must divide expand · width, {inner}.")
        heads, channels = inner // m.head_dim, inner + 2 * m.state
        uniform = lambda shape, low, high: jax.random.uniform(rngs.params(), shape, minval=low, maxval=high)
        self.in_proj = linear(c.width, inner + channels + heads, c, dtype, rngs)
        self.conv = nnx.Param(uniform((channels, 1, m.conv), -(m.conv**-0.5), m.conv**-0.5))
        self.conv_bias = nnx.Param(uniform((channels,), -(m.conv**-0.5), m.conv**-0.5))
        dt = jnp.maximum(jnp.exp(uniform((heads,), math.log(1e-3), math.log(0.1))), 1e-4)
        self.dt_bias = nnx.Param(dt + jnp.log(-jnp.expm1(-dt)))  # softplus of it is dt
        self.A_log = nnx.Param(jnp.log(uniform((heads,), 1, 16)))
        self.D = nnx.Param(jnp.ones(heads))
        self.norm = RMSNorm(inner, dtype=dtype, epsilon=1e-5)
        self.out_proj = linear(inner, c.width, c, dtype, rngs, residual=True)
        self.m, self.inner, self.heads = m, inner, heads

    def __call__(
        self, x: Float[Array, "b n d"], at: Places, memory: Memory | None = None
    ) -> tuple[Float[Array, "b n d"], Memory | None]:
        m, there = self.m, at.segment >= 0
        # Rows number their documents; what a cached row goes on with is its document 0, and without a cache there is none.
        cached, docs = memory is not None, jnp.zeros_like(at.segment)
        if memory is None:
            docs = jnp.cumsum(words.document_starts(at.segment) & there, axis=1, dtype=jnp.int32)
            memory = self.memory(x)
        z, u, dt = jnp.split(self.in_proj(x), [self.inner, 2 * self.inner + 2 * m.state], axis=-1)
        u, inputs = self.convolve(u, docs, there, memory.inputs)
        v, B, C = jnp.split(u, [self.inner, self.inner + m.state], axis=-1)
        v = v.reshape(*v.shape[:-1], self.heads, m.head_dim)
        dt = jnp.where(there[..., None], jax.nn.softplus(dt.astype(jnp.float32) + row(self.dt_bias)), 0)  # padding is not felt
        y, state = recur(v, dt, -jnp.exp(self.A_log[...]), B, C, docs=docs, state=memory.state, chunk=m.chunk)
        y = (y + v.astype(jnp.float32) * self.D[...].reshape(1, 1, -1, 1)).reshape(*x.shape[:-1], -1)
        out = self.out_proj(self.norm(y * jax.nn.silu(z.astype(jnp.float32))))
        return out, Memory(inputs, state) if cached else None

    def convolve(
        self, u: Float[Array, "b n c"], docs: Int[Array, "b n"], there: Bool[Array, "b n"], before: Float[Array, "b w c"]
    ) -> tuple[Float[Array, "b n c"], Float[Array, "b w c"]]:
        """Each channel over its last few inputs of the same document, then silu; and the inputs that the next call needs."""
        back, n = self.m.conv - 1, u.shape[1]
        u = jnp.concatenate([before.astype(u.dtype), jnp.where(there[..., None], u, 0)], axis=1)
        of = jnp.concatenate([jnp.zeros_like(docs[:, :1])] * back + [docs], axis=1)
        total = row(self.conv_bias) + jnp.zeros_like(u[:, back:], jnp.float32)
        for i in range(back + 1):
            same = (of[:, i : i + n] == docs)[..., None]
            total = total + jnp.where(same, u[:, i : i + n], 0).astype(jnp.float32) * self.conv[:, 0, i].reshape(1, 1, -1)
        last = jnp.sum(there, axis=1)[:, None] + jnp.arange(back)[None]
        return jax.nn.silu(total).astype(u.dtype), jax.vmap(lambda u, i: u[i])(u, last).astype(before.dtype)

    def memory(self, x: Float[Array, "b n d"]) -> Memory:
        """Nothing remembered yet, laid out as x's batch is."""
        blank = jnp.zeros_like(x[:, 0, 0], jnp.float32)
        inputs = blank[:, None, None] + jnp.zeros((1, self.m.conv - 1, self.inner + 2 * self.m.state))
        return Memory(inputs, blank[:, None, None, None] + jnp.zeros((1, self.heads, self.m.head_dim, self.m.state)))


def recur(
    x: Float[Array, "b n h p"],
    dt: Float[Array, "b n h"],
    A: Float[Array, "h"],
    B: Float[Array, "b n s"],
    C: Float[Array, "b n s"],
    *,
    docs: Int[Array, "b n"],
    state: Float[Array, "b h p s"],
    chunk: int,
) -> tuple[Float[Array, "b n h p"], Float[Array, "b h p s"]]:
    """y_t = h_t C_t with h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t', chunk by chunk, in float32.

    The state handed in is that of document 0; a document begins from zero. The last state comes back.
    """
    n, size = x.shape[1], min(chunk, x.shape[1])
    count = -(-n // size)

    def cut(a, fill=None):
        tail = [(0, 0), (0, count * size - n)] + [(0, 0)] * (a.ndim - 2)
        a = jnp.pad(a, tail, mode="edge") if fill is None else jnp.pad(a, tail, constant_values=fill)
        return jnp.moveaxis(a.reshape(a.shape[0], count, size, *a.shape[2:]), 1, 0)

    f32 = lambda a: a.astype(jnp.float32)
    log = f32(dt) * A.reshape(1, 1, -1)
    inputs = cut(f32(x) * dt[..., None], 0), cut(log, 0), cut(f32(B), 0), cut(f32(C), 0), cut(docs)  # padding changes nothing
    causal = jnp.tril(jnp.ones((size, size), bool))[None]

    def one(carry, given):
        (state, before), (x, log, B, C, docs) = carry, given
        log = jnp.cumsum(log, axis=1)
        last = docs[:, -1:]
        seen = causal & (docs[:, :, None] == docs[:, None, :])
        decay = jnp.exp(jnp.where(seen[..., None], log[:, :, None] - log[:, None, :], MASKED))
        y = jnp.einsum("bij,bijh,bjhp->bihp", jnp.einsum("bis,bjs->bij", C, B), decay, x)
        goes_on = (docs == before)[..., None]
        y = y + jnp.einsum("bih,bis,bhps->bihp", jnp.where(goes_on, jnp.exp(log), 0), C, state)
        left = jnp.where((docs == last)[..., None], jnp.exp(log[:, -1:] - log), 0)
        kept = jnp.where(last == before, jnp.exp(log[:, -1]), 0)
        state = kept[..., None, None] * state + jnp.einsum("bjh,bjs,bjhp->bhps", left, B, x)
        return (state, last), y

    (state, _), y = jax.lax.scan(one, (f32(state), jnp.zeros_like(docs[:, :1])), inputs)
    return jnp.moveaxis(y, 0, 1).reshape(x.shape[0], -1, *x.shape[2:])[:, :n], state


class MambaBlock(nnx.Module):
    """The mixer, then feed-forward where the config has one, each normed and added."""

    def __init__(self, c: DecoderConfig, m: MambaConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.mixer_norm = RMSNorm(c.width, dtype=dtype, epsilon=c.epsilon)
        self.mixer = Mamba2(c, m, dtype=dtype, rngs=rngs)
        if c.d_ff:
            self.ffn_norm = RMSNorm(c.width, dtype=dtype, epsilon=c.epsilon)
            self.ffn = FeedForward(c, dtype=dtype, rngs=rngs)
        self.c = c

    def __call__(
        self, x: Float[Array, "b n d"], at: Places, cache: Memory | None = None
    ) -> tuple[Float[Array, "b n d"], Memory | None]:
        h, cache = self.mixer(self.mixer_norm(x), at, cache)
        x = x + h.astype(jnp.float32)
        return x + self.ffn(self.ffn_norm(x)).astype(jnp.float32) if self.c.d_ff else x, cache

    def cache(self, batch: int, size: int) -> Memory:
        """Of one size, however long the text."""
        del size
        return self.mixer.memory(jnp.zeros((batch, 1, 1)))


def row(a: nnx.Param) -> Float[Array, "one one d"]:
    return a[...].reshape(1, 1, -1)
