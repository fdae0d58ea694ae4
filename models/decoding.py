"""Cached decoding for T5, MrT5 and the byte language model: each new byte costs one row, and equals the uncached forward.

    encoded = model.encode(ids)                                       MrT5: softly, or packed with `capacity=`
    out = generate(model, encoded=encoded, length=200)                greedy; temperature=, top_k=, top_p= and a key to sample
    out = beam_search(model, encoded=encoded, length=200, beams=4)
    out.ids, out.length                                               lengths count bytes, the end mark included

    logits, cache = start(model, encoded=encoded, room=200)           the same by hand, a byte at a time:
    logits, cache = step(model, ids, cache)                           ids (b, t), any t

Prompts are ragged and padded on either side. Everything is pure and of static shape: wrap it in `jax.jit`, with `length` and
the sampling numbers static. The encoder's keys and values are computed once; beams share them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Key

from jaxmerge import words
from jaxmerge.attention import key_bias
from models.fold import fold
from models.sampling import beam_init, beam_step, sample
from models.t5 import lookup


class Cache(NamedTuple):
    """What the decoder remembers. Slot j of every row is written in step j; a row's text begins at slot `start`."""

    k: Float[Array, "l b s h d"]
    v: Float[Array, "l b s h d"]
    start: Int[Array, "b"]
    length: Int[Array, ""]
    """Slots written; `step` writes the next ones, and there must be room for them."""
    cross: tuple[Float[Array, "l r m h d"], Float[Array, "l r m h d"]] | None
    """Keys and values of what the encoder gave, r rows that b // r beams each share."""
    cross_bias: Float[Array, "r m"] | None


class Generated(NamedTuple):
    """Texts without their prompts. `length` counts ids, that is bytes, with the end mark; after it the ids are padding."""

    ids: Int[Array, "*batch n"]
    length: Int[Array, "*batch"]
    score: Float[Array, "*batch"]
    """Sum of the log probabilities of the ids (of beams: divided by length ^ length_penalty)."""


def start(
    model: Any,
    prompt: Int[Array, "b p"] | None = None,
    *,
    room: int,
    prompt_mask: Bool[Array, "b p"] | None = None,
    encoded: Any = None,
) -> tuple[Float[Array, "b v"], Cache]:
    """Read the prompts: the logits of the first new id, and a cache with room for `room` ids more.

    Args:
      model: a `T5`, `MrT5` or `ByteLM`.
      prompt: what the text begins with. T5 and MrT5 need none: they begin with their start mark, which is put before it here.
      room: how many ids `step` will be given.
      prompt_mask: True where the prompt has an id; padding may lie left or right. Without it nothing is padding.
      encoded: from `encode`; None for a model without an encoder. MrT5's may be packed.

    Raises:
      ValueError: a T5 without `encoded`, a language model with it, or without a prompt.
    """
    model = getattr(model, "t5", model)
    reads = hasattr(model, "encoder")
    if reads != (encoded is not None):
        raise ValueError(
            f"start: {type(model).__name__} {'needs' if reads else 'takes no'} encoded= "
            f"({'model.encode(ids)' if reads else 'it has no encoder'})."
        )
    if prompt is None and not reads:
        raise ValueError("start: a language model needs a prompt of at least one id per row.")
    if reads:
        begin = jnp.full((encoded.states.shape[0], 1), words.PAD, jnp.int32)
        if prompt is not None:
            mask = jnp.ones(prompt.shape, bool) if prompt_mask is None else prompt_mask
            prompt_mask = jnp.concatenate([jnp.ones(begin.shape, bool), mask], axis=1)
        prompt = begin if prompt is None else jnp.concatenate([begin, prompt], axis=1)
    assert prompt is not None
    first = jnp.zeros(prompt.shape[0], jnp.int32)
    if prompt_mask is not None:
        order = jnp.argsort(prompt_mask, axis=1, stable=True)  # padding to the left
        prompt = jnp.take_along_axis(prompt, order, axis=1)
        first = jnp.sum(~prompt_mask, axis=1, dtype=jnp.int32)
    stack = model.decoder
    cross = None
    if encoded is not None:
        pair = lambda block, x, _: (x, block.cross.keys_values(x.astype(block.dtype)))
        _, pairs = fold(stack.blocks, pair, encoded.states)
        cross = jax.tree.map(lambda *x: jnp.stack(x), *pairs)
    c = stack.shape
    blank = jnp.zeros((len(stack.blocks), prompt.shape[0], prompt.shape[1] + room, c.num_heads, c.d_kv), stack.norm.dtype)
    bias = None if encoded is None else encoded.key_bias
    logits, cache = step(model, prompt, Cache(blank, blank, first, jnp.int32(0), cross, bias))
    return logits[:, -1], cache


def step(model: Any, ids: Int[Array, "b t"], cache: Cache) -> tuple[Float[Array, "b t v"], Cache]:
    """The logits of the id after each of `ids`, which follow what the cache holds.

    Law:
      the logits are those of the uncached model over everything so far.
    """
    model = getattr(model, "t5", model)
    stack, slots = model.decoder, cache.k.shape[2]
    here, all_slots = cache.length + jnp.arange(ids.shape[1])[None], jnp.arange(slots)[None]
    position_bias = stack.position_bias(here, all_slots)
    there = key_bias(mask=all_slots >= cache.start[:, None])

    def one(block, carry, given):
        (x, k, v), (layer, cross) = carry, given
        h = block.attention_norm(x)
        write = lambda old, new: jax.lax.dynamic_update_slice(old, new[None], (layer, 0, cache.length, 0, 0))
        k, v = (write(old, new) for old, new in zip((k, v), block.attention.keys_values(h), strict=True))
        x = block.add(x, block.attention(h, (k[layer], v[layer]), key_bias=there, position_bias=position_bias)[0])
        if cross is not None:  # beams of one row are so many queries to one memory
            h = block.cross_norm(x)
            y, _ = block.cross(h.reshape(cross[0].shape[0], -1, h.shape[-1]), cross, key_bias=cache.cross_bias)
            x = block.add(x, y.reshape(h.shape))
        return (block.add(x, block.ffn(block.ffn_norm(x))), k, v), None

    carry = (lookup(model.embedding[...], ids), cache.k, cache.v)
    (x, k, v), _ = fold(stack.blocks, one, carry, (jnp.arange(len(stack.blocks)), cache.cross))
    logits = model.head(stack.last(x).astype(jnp.float32))
    return logits, cache._replace(k=k, v=v, length=cache.length + ids.shape[1])


def generate(
    model: Any,
    prompt: Int[Array, "b p"] | None = None,
    *,
    length: int,
    prompt_mask: Bool[Array, "b p"] | None = None,
    encoded: Any = None,
    eos: int | None = words.EOS,
    key: Key[Array, ""] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Generated:
    """Write at most `length` bytes after each prompt; stop when every row has ended.

    Args:
      model, prompt, prompt_mask, encoded: as in `start`.
      length: how many bytes at most. It counts bytes (ids), not words or characters.
      eos: the id that ends a text; None goes on to `length`.
      key, temperature, top_k, top_p: as in `sampling.sample`; greedy by default.

    Law:
      at temperature 0 every id is the most likely one under the uncached model.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from models.lm import ByteLM
      >>> from models.t5 import T5Config
      >>> config = T5Config(d_model=16, d_kv=4, d_ff=32, num_heads=2, num_decoder_layers=1, vocab_size=256)
      >>> generate(ByteLM(config, rngs=nnx.Rngs(0)), jnp.array([[72, 105]]), length=5, eos=None).ids.shape
      (1, 5)
    """
    _check(length)
    draw = lambda logits, key: sample(logits, key, temperature=temperature, top_k=top_k, top_p=top_p)
    keys = None if key is None else jax.random.split(key, length)
    logits, cache = start(model, prompt, room=length - 1, prompt_mask=prompt_mask, encoded=encoded)
    out = jnp.full((logits.shape[0], length), words.PAD, jnp.int32)

    def write(t, logits, state):
        out, done, count, score = state
        new = jnp.where(done, words.PAD, draw(logits, None if keys is None else keys[t]))
        gain = jnp.take_along_axis(jax.nn.log_softmax(logits), new[:, None], axis=1)[:, 0]
        out = jax.lax.dynamic_update_slice(out, new[:, None], (0, t))
        after = done if eos is None else done | (new == eos)
        return new, (out, after, count + ~done, score + jnp.where(done, 0.0, gain))

    none = jnp.zeros(logits.shape[0], jnp.int32)
    first, state = write(0, logits, (out, none > 0, none, none * 0.0))

    def body(carry):
        t, last, cache, state = carry
        logits, cache = step(model, last[:, None], cache)
        last, state = write(t, logits[:, 0], state)
        return t + 1, last, cache, state

    going = lambda carry: (carry[0] < length) & ~jnp.all(carry[3][1])
    *_, (out, _, count, score) = jax.lax.while_loop(going, body, (jnp.int32(1), first, cache, state))
    return Generated(out, count, score)


def beam_search(
    model: Any,
    prompt: Int[Array, "b p"] | None = None,
    *,
    length: int,
    beams: int,
    prompt_mask: Bool[Array, "b p"] | None = None,
    encoded: Any = None,
    eos: int = words.EOS,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
) -> Generated:
    """The `beams` best texts of at most `length` bytes that beam search finds for each row, best first: ids (b, beams, n).

    Args:
      model, prompt, prompt_mask, encoded: as in `start`.
      length: how many bytes at most, not words or characters.
      eos, length_penalty, early_stopping: as in `sampling.beam_step`, with Hugging Face's meaning and defaults.

    Law:
      one beam is greedy decoding.
    """
    _check(length)
    logits, cache = start(model, prompt, room=length - 1, prompt_mask=prompt_mask, encoded=encoded)
    b = logits.shape[0]
    many = lambda x, axis: jnp.repeat(x, beams, axis=axis)
    cache = cache._replace(k=many(cache.k, 1), v=many(cache.v, 1), start=many(cache.start, 0))
    choose = lambda state, logits: beam_step(
        state, logits.reshape(b, beams, -1), eos=eos, length_penalty=length_penalty, early_stopping=early_stopping
    )
    first = choose(beam_init(b, beams, length, fill=words.PAD), many(logits, 0))

    def body(carry):
        state, parents, ids, cache = carry
        rows = (jnp.arange(b)[:, None] * beams + parents).reshape(-1)
        cache = cache._replace(k=cache.k[:, rows], v=cache.v[:, rows])
        logits, cache = step(model, ids.reshape(-1, 1), cache)
        return *choose(state, logits), cache

    state, *_ = jax.lax.while_loop(lambda carry: jnp.any(carry[0].open), body, (*first, cache))
    return Generated(state.done_ids, state.done_length, state.done_score)


def _check(length: int) -> None:
    if length < 1:
        raise ValueError(f"generate: length counts the bytes to write and must be 1 or more, got {length}.")
