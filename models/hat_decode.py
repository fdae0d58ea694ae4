"""HAT writes text on two clocks: the decoder steps once per byte, the backbone once per word. Batched, cached, under jit.

    text = generate(model, ids, starts, lengths, max_new=64, temperature=0)

Rows of a batch end their words at different bytes. Those that are through wait, so that the backbone steps once for all.

Where a word ends. In the paper's form the decoder says so: [W]. In the released form the splitter does, which needs whole
characters: until a character's last byte is there, its bytes belong to the word before; if it then begins a word, the decoder
reads its bytes again (at most four) with the prediction for that word. So every step is equal to the uncached forward of
the text so far, split as `starts_so_far` splits it. A last word in the prompt is open in both forms: it may go on.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Key

import jaxmerge as jm
from models.decoder import Places
from models.hat import HAT, RELEASED_STOP, STOP, WORD, Stream, TFreeHAT, Words, before, read_words, with_marks
from models.sampling import sample
from models.t5 import lookup

CHARACTER = 4
"""Bytes of the longest character in UTF-8."""


class State(NamedTuple):
    """Between two steps. `start` and `count` are of the open word: where it begins, how many came before it."""

    ids: Int[Array, "b s"]
    length: Int[Array, "b"]
    start: Int[Array, "b"]
    count: Int[Array, "b"]
    told: Float[Array, "b d"]
    """The backbone's prediction for the open word."""
    states: Float[Array, "b s d"] | Any
    """Of the released form's encoder, one per byte."""
    encoder: Any
    backbone: Any
    decoder: Any
    logits: Float[Array, "b v"]
    """Of the next symbol."""


class Text(NamedTuple):
    ids: Int[Array, "b s"]
    lengths: Int[Array, "b"]
    """In bytes, prompt included; what ended the text is not among them."""


def generate(
    model: HAT | TFreeHAT,
    ids: Int[Array, "b n"],
    starts: Bool[Array, "b n"],
    lengths: Int[Array, "b"],
    *,
    max_new: int,
    key: Key[Array, ""] | None = None,
    stop: int | None = None,
    **how: Any,
) -> Text:
    """Go on from prompts.

    Args:
      ids: bytes; what lies beyond a row's length is not read.
      starts: where words begin; of a prompt for the released form, from `starts_so_far`.
      lengths: bytes per prompt.
      max_new: bytes to write, at most.
      key: for sampling; not needed at temperature 0.
      stop: the symbol that ends a text; by default [S], or the released models' end of text.
      how: temperature, top_k, top_p, as `sampling.sample` takes them.

    Raises:
      ValueError: there is no room to write, or no key to draw with.
    """
    if max_new < 1:
        raise ValueError(f"generate: max_new must be 1 byte or more, got {max_new}.")
    stop = (STOP if isinstance(model, HAT) else RELEASED_STOP) if stop is None else stop
    if key is None and how.get("temperature", 1.0) != 0:
        raise ValueError("generate: sampling needs a key; give one, or temperature=0 for greedy.")
    key, limit = jax.random.key(0) if key is None else key, lengths + max_new

    def byte(carry):
        """All rows whose word goes on write a symbol."""
        state, new, done, key = carry
        key, draw = jax.random.split(key)
        active = ~done & (new == 0)
        symbol = sample(state.logits, draw, **how)
        done = done | (active & (symbol == stop))
        active &= ~done
        state, fresh = write(model, state, symbol, active)
        new = jnp.where(active, fresh, new)
        return state, new, done | (state.length >= limit), key

    def word(carry):
        """All rows write their words to the end; then the backbone steps."""
        state, new, done, key = jax.lax.while_loop(lambda c: jnp.any(~c[2] & (c[1] == 0)), byte, carry)
        return close(model, state, new, ~done), jnp.zeros_like(new), done, key

    state = begin(model, ids, starts, lengths, size=ids.shape[1] + max_new)
    carry = state, jnp.zeros_like(lengths), jnp.zeros_like(lengths, bool), key
    state, *_ = jax.lax.while_loop(lambda c: jnp.any(~c[2]), word, carry)
    return Text(state.ids, state.length)


def begin(model: HAT | TFreeHAT, ids: Array, starts: Array, lengths: Array, *, size: int) -> State:
    """Read the prompts: all words but the last are closed."""
    b, n = ids.shape
    docs = jnp.where(jnp.arange(n)[None] < lengths[:, None], 0, -1)
    words = read_words(starts, docs, max_word=_room(model))
    index = jnp.arange(words.plan.num_segments)[None]
    count = jnp.maximum(jnp.sum(words.plan.sizes > 0, axis=1) - 1, 0).astype(jnp.int32)
    last = _at(words.plan.sizes, count)
    if isinstance(model, HAT):
        count, last = jnp.where(last == _room(model), count + 1, count), jnp.where(last == _room(model), 0, last)
    closed = Places(words.at.position, jnp.where(index < count[:, None], 0, -1))
    told = lambda predicted: jnp.where(
        count[:, None] > 0, _at(predicted, jnp.maximum(count - 1, 0)), model.first[...].reshape(1, -1)
    )
    room, start = jnp.pad(jnp.where(docs >= 0, ids, 0), ((0, 0), (0, size - n))), lengths - last
    backbone = model.backbone.cache(b, size)
    if isinstance(model, HAT):
        predicted, backbone = model.backbone.step(model.encode(with_marks(ids, words)), closed, cache=backbone)
        first = told(model.backbone_norm(predicted).astype(jnp.float32))
        decoder, logits = model.decoder.cache(b, _room(model) + 1), jnp.zeros((b, STOP + 1))
        state = State(room, lengths, start, count, first, None, None, backbone, decoder, logits)
        return _tell(model, state, first, jnp.ones(b, bool), _room(model) + 1)
    at = Places(jnp.arange(n)[None] + jnp.zeros_like(docs), docs)
    x, encoder = model.encoder.step(lookup(model.embedding[...], ids), at, cache=model.encoder.cache(b, size))
    predicted, backbone = model.backbone.step(model.encode(x, at, words), closed, cache=backbone)
    heard = before(predicted, model.first[...], words.at)
    y, decoder = model.decoder.step(x, at, words.plan, heard, cache=model.decoder.cache(b, size))
    logits = model.predict(_at(y, jnp.maximum(lengths - 1, 0))[:, None])[:, 0]
    states = jnp.pad(x, ((0, 0), (0, size - n), (0, 0)))
    return State(room, lengths, start, count, told(predicted), states, encoder, backbone, decoder, logits)


def write(
    model: HAT | TFreeHAT, state: State, symbol: Int[Array, "b"], active: Bool[Array, "b"]
) -> tuple[State, Int[Array, "b"]]:
    """Append a symbol to the active rows; and with how many bytes of it a new word begins (or, [W], that one ends: 1).

    Rows in which a new word begins must be closed before they go on.
    """
    if isinstance(model, HAT):
        byte = active & (symbol != WORD)
        full = byte & (state.length + 1 - state.start >= model.c.max_word)
        at = _place(state.length - state.start + 1, byte)
        x, decoder = model.decoder.step(lookup(model.decoder_embedding[...], symbol[:, None]), at, cache=state.decoder)
        state = _append(state, symbol, byte)._replace(decoder=decoder, logits=_logits(model, state, x[:, 0], byte))
        return state, (active & ~byte | full).astype(jnp.int32)
    at = _place(state.length, active)
    x, encoder = model.encoder.step(lookup(model.embedding[...], symbol[:, None]), at, cache=state.encoder)
    states = _put(state.states, state.length, x[:, 0], active)
    state = _append(state, symbol, active)._replace(encoder=encoder, states=states)
    new = jnp.where(active, _new_bytes(model, state), 0)
    same = active & (new == 0)
    y, decoder = model.decoder.step(
        x, Places(at.position, _place(state.length, same).segment), *_one(state.told), cache=state.decoder
    )
    return state._replace(decoder=decoder, logits=_logits(model, state, y[:, 0], same)), new


def close(model: HAT | TFreeHAT, state: State, new: Int[Array, "b"], active: Bool[Array, "b"]) -> State:
    """End the open word of the active rows, and open the next with their last `new` bytes."""
    active &= new > 0
    at = _place(state.count, active)
    if isinstance(model, HAT):
        x = model.encode(_open_word(model, state))
        predicted, backbone = model.backbone.step(x, at, cache=state.backbone)
        predicted = model.backbone_norm(predicted).astype(jnp.float32)
        state = state._replace(backbone=backbone, **_next_word(state, state.length, active))
        return _tell(model, state, jnp.where(active[:, None], predicted[:, 0], state.told), active, 1)
    start = state.length - new
    span = jnp.arange(_room(model) + CHARACTER)[None]
    position = state.start[:, None] + span
    plan = jm.Plan(jnp.where(position < start[:, None], 0, -1), 1)
    words = Words(plan, Places(state.count[:, None], jnp.zeros_like(state.count)[:, None]))
    x = model.encode(_rows(state.states, position), Places(position, plan.segment_ids), words)
    predicted, backbone = model.backbone.step(x, at, cache=state.backbone)
    told = jnp.where(active[:, None], predicted[:, 0], state.told)
    position = start[:, None] + jnp.arange(CHARACTER)[None]
    again = Places(position, jnp.where(active[:, None] & (position < state.length[:, None]), 0, -1))
    y, decoder = model.decoder.step(_rows(state.states, position), again, *_one(told, CHARACTER), cache=state.decoder)
    logits = _logits(model, state, _at(y, jnp.maximum(new - 1, 0)), active)
    return state._replace(told=told, backbone=backbone, decoder=decoder, logits=logits, **_next_word(state, start, active))


def starts_so_far(text: bytes, *, max_word: int = 100) -> np.ndarray:
    """Where words begin in a text that may end within a character: the released rule, on the host.

    The bytes of an unfinished character belong to the word before them.

    Example:
      >>> starts_so_far("ab €".encode()[:-1]).astype(int).tolist(), starts_so_far("ab €".encode()).astype(int).tolist()
      ([1, 0, 1, 0, 0], [1, 0, 1, 0, 0, 0])
    """
    tail = unfinished(text)
    whole = jm.words.starts(text[: len(text) - tail], rule="hat", max_bytes=max_word)
    return np.concatenate([whole, np.zeros(tail, bool)])


def unfinished(text: bytes) -> int:
    """How many bytes at the end are the beginning of a character.

    Example:
      >>> [unfinished("€".encode()[:n]) for n in range(4)]
      [0, 1, 2, 0]
    """
    for back in range(1, min(CHARACTER, len(text) + 1)):
        lead = text[-back]
        if lead >= 0xC0:
            return back if back < 2 + (lead >= 0xE0) + (lead >= 0xF0) else 0
        if lead < 0x80:
            return 0
    return 0


def new_bytes(word: bytes, *, max_word: int = 100) -> int:
    """How many bytes at the end of an open word begin another, its last byte having just come: 0 if it goes on.

    Bytes that are no UTF-8 stay with their word, as in the official code; but no word outgrows the limit by a character.

    Example:
      >>> new_bytes(b"Hello,"), new_bytes(b"Hello, "), new_bytes("Hi€".encode()), new_bytes("Hi€".encode()[:-1])
      (0, 1, 3, 0)
    """
    try:
        word.decode("utf-8")
    except UnicodeDecodeError:
        return int(len(word) >= max_word + CHARACTER)
    last = int(np.flatnonzero(jm.words.starts(word, rule="hat", max_bytes=max_word))[-1])
    return len(word) - last if last else 0


def _new_bytes(model: TFreeHAT, state: State) -> Int[Array, "b"]:
    """`new_bytes` of every row: the host is asked, from within the program."""

    def ask(words, sizes):
        rows = zip(np.asarray(words, np.uint8), np.asarray(sizes), strict=True)
        return np.array([new_bytes(word[:size].tobytes(), max_word=model.c.max_word) for word, size in rows], np.int32)

    span = state.start[:, None] + jnp.arange(_room(model) + CHARACTER)[None]
    like = jax.ShapeDtypeStruct(state.length.shape, jnp.int32)
    return jax.pure_callback(ask, like, _rows(state.ids, span), state.length - state.start)


def _room(model: HAT | TFreeHAT) -> int:
    """The longest word there can be."""
    return model.c.max_word + (0 if isinstance(model, HAT) else CHARACTER - 1)


def _open_word(model: HAT, state: State) -> Stream:
    """[W] and the bytes of the open word."""
    slot = jnp.arange(model.c.max_word + 1)[None]
    ids = jnp.where(slot == 0, WORD, _rows(state.ids, state.start[:, None] + slot - 1))
    inside = jnp.where(slot <= (state.length - state.start)[:, None], 0, -1)
    return Stream(ids, jm.Plan(inside, 1), Places(slot + jnp.zeros_like(inside), inside))


def _tell(model: HAT, state: State, told: Float[Array, "b d"], active: Bool[Array, "b"], width: int) -> State:
    """Begin the open word's decoder, and read those of its first bytes that are there: `width` slots, [W] counted."""
    ids, plan, at = _open_word(model, state)
    ids, inside = ids[:, :width], plan.segment_ids[:, :width]
    x = model.decoder_input(Stream(ids, jm.Plan(jnp.zeros_like(inside), 1), at), told[:, None])
    seen = Places(at.position[:, :width], jnp.where(active[:, None], inside, -1))
    x, decoder = model.decoder.step(x, seen, cache=state.decoder)
    x = _at(x, jnp.minimum(state.length - state.start, width - 1))
    return state._replace(told=told, decoder=decoder, logits=_logits(model, state, x, active))


def _one(told: Float[Array, "b d"], t: int = 1) -> tuple[jm.Plan, Float[Array, "b one d"]]:
    """One word for all of t bytes."""
    return jm.Plan(jnp.zeros((told.shape[0], t), jnp.int32), 1), told[:, None]


def _place(position: Int[Array, "b"], active: Bool[Array, "b"]) -> Places:
    return Places(position[:, None], jnp.where(active, 0, -1)[:, None])


def _next_word(state: State, start: Int[Array, "b"], active: Bool[Array, "b"]) -> dict[str, Array]:
    return dict(start=jnp.where(active, start, state.start), count=state.count + active)


def _append(state: State, symbol: Int[Array, "b"], active: Bool[Array, "b"]) -> State:
    return state._replace(ids=_put(state.ids, state.length, symbol, active), length=state.length + active)


def _logits(model: HAT | TFreeHAT, state: State, x: Float[Array, "b d"], active: Bool[Array, "b"]) -> Float[Array, "b v"]:
    return jnp.where(active[:, None], model.predict(x[:, None])[:, 0], state.logits)


def _put(rows: Array, position: Int[Array, "b"], x: Array, active: Bool[Array, "b"]) -> Array:
    """x into one place of each active row."""
    where = jnp.where(active, position, rows.shape[1])
    return jax.vmap(lambda row, i, x: row.at[i].set(x.astype(row.dtype), mode="drop"))(rows, where, x)


def _at(rows: Array, position: Int[Array, "b"]) -> Array:
    """One place of each row."""
    return jax.vmap(lambda row, i: row[i])(rows, position)


def _rows(rows: Array, position: Int[Array, "b t"]) -> Array:
    """Several places of each row; those outside repeat the last."""
    return jax.vmap(lambda row, i: row[jnp.clip(i, 0, row.shape[0] - 1)])(rows, position)
