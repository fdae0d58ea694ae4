"""From logits to the next id: greedy, sampled, or the best of several beams. Pure functions of one step, for any decoder.

    next_id = sample(logits, key, temperature=0.8, top_p=0.95)
    beams, parents, ids = beam_step(beams, logits, eos=1)        the caller reorders its cache by `parents`

Sources: nucleus sampling (arXiv:1904.09751); beam search with a length penalty (arXiv:1609.08144), finished and running
beams kept apart as Hugging Face's `generate` keeps them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Key

NEVER = -1e9
"""The score of a beam that does not exist: finite, so that differences stay free of NaN."""


def sample(
    logits: Float[Array, "*batch v"],
    key: Key[Array, ""] | None = None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Int[Array, "*batch"]:
    """The next id of every row: its most likely one at temperature 0, a draw from what `filtered` leaves otherwise.

    Args:
      logits: of the next id.
      key: not needed, and not read, at temperature 0.
      temperature, top_k, top_p: as in `filtered`; Python numbers, fixed when the program is compiled.

    Raises:
      ValueError: a key is missing, or a number is out of its range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from models.sampling import sample
      >>> logits = jnp.log(jnp.array([[0.1, 0.6, 0.3]]))
      >>> sample(logits, temperature=0).item(), sample(logits, jax.random.key(0), top_p=0.5).item()
      (1, 1)
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if key is None:
        raise ValueError(f"sample: a temperature of {temperature} draws at random: give a key, or temperature=0 (greedy).")
    kept = filtered(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    return jax.random.categorical(key, kept, axis=-1).astype(jnp.int32)


def filtered(
    logits: Float[Array, "*batch v"], *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Float[Array, "*batch v"]:
    """The logits divided by the temperature, minus infinity where an id may not be drawn. In float32.

    Args:
      logits: of the next id.
      temperature: above 0.
      top_k: the k largest may be drawn, and whatever equals the smallest of them.
      top_p: an id may be drawn if those more likely than it weigh less than p together, the top-k rule applied first.

    Raises:
      ValueError: temperature not above 0, top_k below 1, top_p outside (0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> from models.sampling import filtered
      >>> filtered(jnp.log(jnp.array([1.0, 6.0, 3.0])), top_p=0.7) > -jnp.inf
      Array([False,  True,  True], dtype=bool)
    """
    if not temperature > 0:
        raise ValueError(f"filtered: temperature must be above 0 (`sample` takes 0 for greedy); got {temperature}.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"filtered: top_k must be 1 or more, or None for no limit; got {top_k}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"filtered: top_p must lie in (0, 1], or be None for no limit; got {top_p}.")
    x = logits.astype(jnp.float32) / temperature
    if top_k is not None and top_k < x.shape[-1]:
        least = jax.lax.top_k(x, top_k)[0][..., -1:]
        x = jnp.where(x >= least, x, -jnp.inf)
    if top_p is not None and top_p < 1:
        order = jnp.argsort(-x, axis=-1)
        p = jax.nn.softmax(jnp.take_along_axis(x, order, axis=-1), axis=-1)
        stays = jnp.cumsum(p, axis=-1) - p < top_p
        back = jnp.argsort(order, axis=-1)
        x = jnp.where(jnp.take_along_axis(stays, back, axis=-1), x, -jnp.inf)
    return x


class Beams(NamedTuple):
    """k hypotheses per row that are still written, and the k best that have ended. `length` counts ids, prompts apart."""

    score: Float[Array, "b k"]
    """Sum of log probabilities of what is still written, best first."""
    ids: Int[Array, "b k n"]
    done_score: Float[Array, "b k"]
    """Sum of log probabilities / length ^ length_penalty of what has ended, best first; `NEVER` where nothing has."""
    done_ids: Int[Array, "b k n"]
    done_length: Int[Array, "b k"]
    length: Int[Array, ""]
    open: Bool[Array, "b"]
    """False when nothing still written can beat what has ended."""


def beam_init(rows: int, beams: int, length: int, *, fill: int = 0) -> Beams:
    """Before the first id. Only the first beam of a row exists, so that the first step spreads over different ids."""
    if beams < 1 or length < 1:
        raise ValueError(f"beam_init: beams and length must be 1 or more; got {beams} and {length}.")
    score = jnp.broadcast_to(jnp.where(jnp.arange(beams) == 0, 0.0, NEVER), (rows, beams))
    ids = jnp.full((rows, beams, length), fill, jnp.int32)
    lengths = jnp.zeros((rows, beams), jnp.int32)
    return Beams(score, ids, jnp.full((rows, beams), NEVER), ids, lengths, jnp.int32(0), jnp.ones(rows, bool))


def beam_step(
    beams: Beams, logits: Float[Array, "b k v"], *, eos: int, length_penalty: float = 1.0, early_stopping: bool = False
) -> tuple[Beams, Int[Array, "b k"], Int[Array, "b k"]]:
    """One id more for every beam.

    Of all continuations the 2 k best are looked at. Those that end (with `eos`, or because there is room for no more) and are
    among the k best join the ended ones; the k best of the others are written on.

    Args:
      beams: from `beam_init` or the step before.
      logits: of each beam's next id.
      eos: the id that ends a text; it counts in the length.
      length_penalty: above 0 prefers long texts, below 0 short ones.
      early_stopping: close a row as soon as it has k ended texts. Otherwise it closes when its best running beam, scored at
        its present length, is behind the worst of them (Hugging Face's default).

    Returns:
      the beams, which old beam each new one continues, and with which id.
    """
    b, k, v = logits.shape
    n = beams.ids.shape[-1]
    length = beams.length + 1
    total = beams.score[..., None] + jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    looked_at = min(2 * k, k * v)
    top, at = jax.lax.top_k(total.reshape(b, k * v), looked_at)
    parent, new = at // v, (at % v).astype(jnp.int32)
    texts = jnp.take_along_axis(beams.ids, parent[..., None], axis=1)
    texts = jnp.where(jnp.arange(n)[None, None] == beams.length, new[..., None], texts)

    ends = (new == eos) | (length >= n)
    running, pick = jax.lax.top_k(jnp.where(ends, top + NEVER, top), k)
    at_pick = lambda x: jnp.take_along_axis(x, pick.reshape(b, k, *(1,) * (x.ndim - 2)), axis=1)

    full = jnp.all(beams.done_score > NEVER, axis=1)
    closed = ~beams.open | (full if early_stopping else False)
    joins = ends & (top > NEVER / 2) & (jnp.arange(looked_at) < k)[None] & ~closed[:, None]
    scored = jnp.where(joins, top / length.astype(jnp.float32) ** length_penalty, NEVER)
    done_score, best = jax.lax.top_k(jnp.concatenate([beams.done_score, scored], axis=1), k)
    at_best = lambda old, x: jnp.take_along_axis(
        jnp.concatenate([old, x], axis=1), best.reshape(b, k, *(1,) * (x.ndim - 2)), axis=1
    )
    done_ids, done_length = at_best(beams.done_ids, texts), at_best(beams.done_length, jnp.full_like(new, length))

    full = jnp.all(done_score > NEVER, axis=1)
    hope = running[:, 0] / length.astype(jnp.float32) ** length_penalty
    still = ~full if early_stopping else ~full | (hope > done_score[:, -1])
    after = Beams(running, at_pick(texts), done_score, done_ids, done_length, length, beams.open & still & (length < n))
    return after, at_pick(parent), at_pick(new)
