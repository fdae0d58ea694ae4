"""H-Net writes text: a step for any number of bytes, equal to the uncached forward, for any batch (the official takes one row).

    text, lengths = generate(model, ids, lengths, max_new=64, temperature=0)
    logits, state = step(model, ids, at, state)         prompts and single bytes alike, from `begin(model, batch, size)`

Each stage carries its caches, the query of its last position (the router compares the next key with it), how many chunks it has
begun, and where their moving average stands. A stage whose rows all stay within their chunks is not run.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Key

import jaxmerge as jm
from models.decoder import Places
from models.hnet import STOP, HNet, Isotropic, Stage
from models.sampling import sample
from models.t5 import lookup


class State(NamedTuple):
    """Of a stage that routes. The innermost stage's is its caches."""

    encoder: Any
    decoder: Any
    main: Any
    query: Float[Array, "b d"]
    """Of the last position, normed to 1; 0 before the first."""
    chunks: Int[Array, "b"]
    average: Float[Array, "b d"]


def begin(model: HNet, batch: int, size: int) -> State | list:
    """Before the first byte, with room for `size` of them in every stage: each byte may be a chunk."""

    def of(stage: Stage):
        caches = lambda part: [stack.cache(batch, size) for stack in part.stacks]
        if isinstance(stage.main, Isotropic):
            return caches(stage.main)
        width = stage.residual.out_features
        blank, none = jnp.zeros((batch, width), jnp.float32), jnp.zeros(batch, jnp.int32)
        return State(caches(stage.encoder), caches(stage.decoder), of(stage.main), blank, none, blank)

    return of(model.backbone)


def step(model: HNet, ids: Int[Array, "b t"], at: Places, state: Any) -> tuple[Float[Array, "b t v"], Any]:
    """Logits for the byte after each of t more in every row. A row may end in padding, which is not read."""
    x, state = _stage(model.backbone, lookup(model.embedding[...], ids), at, state)
    return model.head(x), state


def _stage(stage: Stage, x: Float[Array, "b t d"], at: Places, state: Any) -> tuple[Float[Array, "b t d"], Any]:
    d, x, there = x.shape[-1], stage.widen(x), at.segment >= 0
    main_stage = stage.main
    if isinstance(main_stage, Isotropic):
        y, state = _part(main_stage, x, at, state)
        return y[..., :d], state
    h, encoder = _part(stage.encoder, x, at, state.encoder)
    unit = lambda y: y * jax.lax.rsqrt(jnp.maximum(jnp.sum(y * y, axis=-1, keepdims=True), 1e-24))
    q, k = unit(stage.q(h)), unit(stage.k(h))
    before = jnp.concatenate([state.query[:, None], q[:, :-1]], axis=1)
    p = jnp.where(at.position == 0, 1.0, jnp.clip((1 - jnp.sum(before * k, axis=-1)) / 2, 0, 1))
    plan = jm.words.segments(p > 0.5, x.shape[1], mask=there)
    begun = plan.sizes > 0  # padding joins no chunk, and before the first start there is none
    position = state.chunks[:, None] + jnp.arange(x.shape[1])[None]
    within = Places(position, jnp.where(begun, 0, -1))
    run = lambda: _stage(main_stage, jm.merge(plan, h, reduce="first"), within, state.main)
    chunks, main = jax.lax.cond(jnp.any(begun), run, lambda: (jnp.zeros_like(h), state.main))

    # The average as it stood is one chunk more, in front: positions before the first start take it.
    weight = jnp.where(begun, jnp.clip(jm.merge(plan, p, reduce="first"), 1e-4, 1 - 1e-4), 0)
    weight = jnp.concatenate([jnp.ones_like(weight[:, :1]), weight], axis=1)
    averages = jm.words.moving_average(jnp.concatenate([state.average[:, None], chunks], axis=1), weight)
    z = jm.unmerge(jm.Plan(plan.segment_ids + 1, x.shape[1] + 1), averages)
    y, decoder = _part(stage.decoder, z + stage.residual(h), at, state.decoder)
    last = jnp.sum(there, axis=1) - 1
    query = jnp.where((last >= 0)[:, None], jax.vmap(lambda row, i: row[i])(q, jnp.maximum(last, 0)), state.query)
    count = state.chunks + jnp.sum(begun, axis=1, dtype=jnp.int32)
    return y[..., :d], State(encoder, decoder, main, query, count, averages[:, -1])


def _part(part: Isotropic, x: Float[Array, "b t d"], at: Places, caches: list) -> tuple[Float[Array, "b t d"], list]:
    out = []
    for stack, cache in zip(part.stacks, caches, strict=True):
        x, cache = stack.step(x, at, cache=cache)
        out.append(cache)
    return part.norm(x), out


def generate(
    model: HNet,
    ids: Int[Array, "b n"],
    lengths: Int[Array, "b"],
    *,
    max_new: int,
    key: Key[Array, ""] | None = None,
    stop: int = STOP,
    **how: Any,
) -> tuple[Int[Array, "b s"], Int[Array, "b"]]:
    """Go on from prompts of one byte or more (the official models begin a text with `hnet.BOS`).

    Args:
      ids: bytes; what lies beyond a row's length is not read.
      lengths: bytes per prompt.
      max_new: bytes to write, at most.
      key: for sampling; not needed at temperature 0.
      stop: the byte that ends a text.
      how: temperature, top_k, top_p, as `sampling.sample` takes them.

    Returns:
      Prompts with what follows them, and lengths; the byte that ended a text is not among them.

    Raises:
      ValueError: there is no room to write, or no key to draw with.
    """
    if max_new < 1:
        raise ValueError(f"generate: max_new must be 1 byte or more, got {max_new}.")
    if key is None and how.get("temperature", 1.0) != 0:
        raise ValueError("generate: sampling needs a key; give one, or temperature=0 for greedy.")
    (b, n), limit = ids.shape, lengths + max_new
    at = lambda position, active: Places(position, jnp.where(active, 0, -1))
    index = jnp.arange(n)[None] + jnp.zeros_like(lengths)[:, None]
    logits, state = step(model, ids, at(index, index < lengths[:, None]), begin(model, b, n + max_new))
    logits = jax.vmap(lambda row, i: row[i])(logits, lengths - 1)

    def byte(carry):
        text, length, done, logits, state, key = carry
        key, draw = jax.random.split(key)
        symbol = sample(logits, draw, **how)
        done |= symbol == stop
        where = jnp.where(done, text.shape[1], length)
        text = jax.vmap(lambda row, i, s: row.at[i].set(s, mode="drop"))(text, where, symbol)
        fresh, state = step(model, symbol[:, None], at(length[:, None], ~done[:, None]), state)
        length = length + ~done
        return text, length, done | (length >= limit), fresh[:, 0], state, key

    text = jnp.pad(jnp.where(index < lengths[:, None], ids, 0), ((0, 0), (0, max_new)))
    key = jax.random.key(0) if key is None else key
    carry = text, lengths, jnp.zeros(b, bool), logits, state, key
    text, length, *_ = jax.lax.while_loop(lambda c: jnp.any(~c[2]), byte, carry)
    return text, length
