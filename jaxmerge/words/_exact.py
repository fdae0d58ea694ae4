"""What a model over tokens says of bytes, exactly.

A text's bytes can end inside a token. So the probability of a byte prefix is a sum over its cover encodings: the sequences of
tokens whose bytes begin with it, and whose last token is the first to reach its end.

    P(x_1..n) = sum of P(t) over the covers t of x_1..n          P(next byte) = P(x_1..n+1) / P(x_1..n)

A tokenizer never writes most sequences. Only canonical covers count, t = encode(decode(t)), and every one of them but for its
last token is the encoding of a shorter prefix: one call of the model per byte is enough.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxmerge._plan import Plan, merge

Encode = Callable[[bytes], Sequence[int]]
LogProbs = Callable[[tuple[int, ...]], np.ndarray]
Canonical = Callable[[tuple[int, ...]], np.ndarray]

END = 256
"""The symbol that ends a text, after the 256 bytes."""


class Covers(NamedTuple):
    """The cover encodings of a prefix, by what of their last token lies beyond it."""

    prefix: bytes
    tokens: tuple[int, ...]
    """encode(prefix): the cover that ends with it."""
    log_p: float
    """Its log-probability."""
    beyond: tuple[tuple[bytes, float], ...]
    """The other covers: the bytes beyond the prefix, and log-probabilities."""

    @property
    def log_prob(self) -> float:
        """log P(prefix), the sum over all covers."""
        return float(np.logaddexp.reduce([self.log_p, *(log_p for _, log_p in self.beyond)]))


class ByteModel(NamedTuple):
    """Three pure functions over `Covers`. On the host: they call the model and the tokenizer."""

    init: Callable[..., Covers]
    """The covers of a prompt, b"" by default."""
    predict: Callable[[Covers], np.ndarray]
    """Log-probabilities of the next symbol, (257,): 256 bytes and END."""
    append: Callable[[Covers, int], Covers]
    """The covers of one byte more."""


def byte_model(
    vocabulary: Sequence[bytes],
    encode: Encode,
    log_probs: LogProbs,
    *,
    end: int | None = None,
    canonical: Canonical | None = None,
    renormalize: bool = False,
) -> ByteModel:
    """A model over tokens, as a model over bytes: the same distribution over texts, read one byte at a time.

    Args:
      vocabulary: the bytes of every token; b"" for those that stand for none.
      encode: the tokenizer, from bytes to tokens. Prefixes of what it writes must be what it writes for shorter texts, as is so
        for BPE without a rule that looks ahead.
      log_probs: the model: (V,) log-probabilities after a context of tokens, the mark of the beginning understood.
      end: the token that ends a text, if there is one.
      canonical: which tokens may follow a context, (V,) bool. `canonical_pairs` suits BPE, and is asked once per last token. By
        default every token is tried with the whole context, V encodings per byte: for small vocabularies.
      renormalize: give what the model spends on sequences that the tokenizer never writes to those it does, step by step. By
        default it is lost to `Covers.log_prob`, and `predict` is normalised at the end, as in the official code.

    Returns:
      init, predict and append. Each appended byte costs one call of the model at most, made when it is needed.

    Law:
      P(prefix) is the sum over all texts that begin with it. With `renormalize` its logarithm grows by predict[b] for each b.

    Raises:
      ValueError: from `append`, a byte that no text has there.

    Example:
      >>> import numpy as np, jaxmerge as jm
      >>> encode = lambda text: [2] if text == b"ab" else [b"ab".index(c) for c in text]
      >>> model = jm.words.byte_model([b"a", b"b", b"ab"], encode, lambda tokens: np.log([0.3, 0.5, 0.2]))
      >>> np.exp(model.predict(model.init()))[[97, 98]].round(3).tolist()
      [0.5, 0.5]
      >>> np.exp(model.predict(model.init(b"a")))[[97, 98]].round(3).tolist()  # b: of the token ab
      [0.31, 0.69]

    Source: Exact Byte-Level Probabilities from Tokenized Language Models (arXiv:2410.09303); equal to exact_byte_probs.
    """
    if not any(vocabulary):
        raise ValueError("byte_model: no token of the vocabulary has a byte.")
    first = np.array([token[0] if token else -1 for token in vocabulary])
    if end is not None:
        first[end] = END
    by_first = {symbol: np.flatnonzero(first == symbol) for symbol in set(first.tolist()) - {-1}}
    allowed = canonical or (lambda tokens: canonical_after(vocabulary, encode, tokens, end=end))
    seen: dict[tuple[int, ...], np.ndarray] = {}

    def after(tokens: tuple[int, ...]) -> np.ndarray:
        """Log-probabilities of what may follow; those of the last context are kept."""
        if tokens not in seen:
            log_p = np.asarray(log_probs(tokens), np.float64)
            log_p = np.where(allowed(tokens) & (first >= 0), log_p, -np.inf)
            seen.clear()
            seen[tokens] = log_p - np.logaddexp.reduce(log_p) if renormalize else log_p
        return seen[tokens]

    def init(prompt: bytes = b"") -> Covers:
        covers = Covers(b"", (), 0.0, ())
        for byte in prompt:
            covers = append(covers, byte)
        return covers

    def predict(covers: Covers) -> np.ndarray:
        beyond = [rest[0] for rest, _ in covers.beyond]
        symbols = np.concatenate([np.where(first < 0, 0, first), np.array(beyond, np.int64)])
        log_p = np.concatenate([covers.log_p + after(covers.tokens), [log_p for _, log_p in covers.beyond]])
        out = np.full(END + 1, -np.inf)
        np.logaddexp.at(out, symbols, log_p)
        return out - np.logaddexp.reduce(out)

    def append(covers: Covers, byte: int) -> Covers:
        prefix = covers.prefix + bytes([byte])
        grown = [(rest, log_p) for rest, log_p in covers.beyond if rest[0] == byte]
        if np.isfinite(covers.log_p):
            follow = after(covers.tokens)
            new = by_first.get(byte, np.zeros(0, int))
            grown += [(vocabulary[t], float(covers.log_p + follow[t])) for t in new[np.isfinite(follow[new])].tolist()]
        whole = [log_p for rest, log_p in grown if len(rest) == 1]  # one at most, if encodings of prefixes are prefixes
        beyond = tuple((rest[1:], log_p) for rest, log_p in grown if len(rest) > 1)
        if not whole and not beyond:
            raise ValueError(f"byte_model: no text has byte {byte} after {covers.prefix[-20:]!r}.")
        log_p = float(np.logaddexp.reduce(whole)) if whole else -np.inf
        return Covers(prefix, tuple(encode(prefix)), log_p, beyond)

    return ByteModel(init, predict, append)


def canonical_after(
    vocabulary: Sequence[bytes], encode: Encode, tokens: tuple[int, ...], *, end: int | None = None
) -> np.ndarray:
    """Which tokens the tokenizer itself could write after a context: every one is tried.

    Returns:
      `Bool[np.ndarray, "V"]`; `end` always may follow, other tokens without bytes never.

    Example:
      >>> import jaxmerge as jm
      >>> encode = lambda text: [2] if text == b"ab" else [b"ab".index(c) for c in text]
      >>> jm.words.canonical_after([b"a", b"b", b"ab"], encode, (0,)).tolist()
      [True, False, False]

    Source: arXiv:2410.09303.
    """
    text = b"".join(vocabulary[t] for t in tokens)
    follows = lambda t, token: token != b"" and list(encode(text + token)) == [*tokens, t]
    return np.array([t == end or follows(t, token) for t, token in enumerate(vocabulary)])


def canonical_pairs(vocabulary: Sequence[bytes], encode: Encode, *, end: int | None = None) -> Canonical:
    """`canonical_after` for BPE, where a sequence is canonical if each two neighbours are: the last token decides.

    Returns:
      For `byte_model(canonical=...)`. It remembers its answers, V bools for every last token that it met.

    Example:
      >>> import jaxmerge as jm
      >>> encode = lambda text: [2] if text == b"ab" else [b"ab".index(c) for c in text]
      >>> jm.words.canonical_pairs([b"a", b"b", b"ab"], encode)((1, 1, 0)).tolist()
      [True, False, False]

    Source: Vieira et al., Language Models over Canonical Byte-Pair Encodings (arXiv:2506.07956).
    """
    known: dict[tuple[int, ...], np.ndarray] = {}

    def canonical(tokens: tuple[int, ...]) -> np.ndarray:
        last = tokens[-1:]
        if last not in known:
            known[last] = canonical_after(vocabulary, encode, last, end=end)
        return known[last]

    return canonical


def cover_encodings(vocabulary: Sequence[bytes], encode: Encode, text: bytes) -> list[tuple[int, ...]]:
    """All canonical covers of a text, by definition: for each place to cut, the encoding before it and one token from there on.

    Law:
      `byte_model`'s covers are these, and P(text) is the sum over them.

    Example:
      >>> import jaxmerge as jm
      >>> encode = lambda text: [2] if text == b"ab" else [b"ab".index(c) for c in text]
      >>> jm.words.cover_encodings([b"a", b"b", b"ab"], encode, b"a")
      [(0,), (2,)]

    Source: arXiv:2410.09303.
    """
    covers = []
    for i in range(len(text)):
        tokens = tuple(encode(text[:i]))
        before = b"".join(vocabulary[t] for t in tokens)
        for t, token in enumerate(vocabulary):
            if token.startswith(text[i:]) and list(encode(before + token)) == [*tokens, t]:
                covers.append((*tokens, t))
    return covers


def bits_per_byte(
    texts: Sequence[bytes], encode: Encode, log_probs: LogProbs, *, end: int | None = None, canonical: Canonical | None = None
) -> float:
    """Bits that a model over tokens spends per byte of whole texts, to be set beside those of a model over bytes.

    A whole text has one canonical encoding, so that its probability is that of its tokens, and of the end mark.

    Args:
      texts: whole documents.
      encode, log_probs, end: as in `byte_model`; with `end`, saying that the text is over costs bits too.
      canonical: renormalise over what the tokenizer could write, as `byte_model(renormalize=True)` does.

    Raises:
      ValueError: no bytes at all.

    Example:
      >>> import numpy as np, jaxmerge as jm
      >>> jm.words.bits_per_byte([b"ab"], lambda text: [2], lambda tokens: np.log([0.5, 0.25, 0.25]))
      1.0

    Source: arXiv:2410.09303.
    """
    size = sum(map(len, texts))
    if not size:
        raise ValueError("bits_per_byte: the texts have no bytes.")
    nats = 0.0
    for text in texts:
        tokens = [*encode(text), *([] if end is None else [end])]
        for i, token in enumerate(tokens):
            log_p = np.asarray(log_probs(tuple(tokens[:i])), np.float64)
            if canonical is not None:
                log_p = log_p - np.logaddexp.reduce(np.where(canonical(tuple(tokens[:i])), log_p, -np.inf))
            nats -= log_p[token]
    return float(nats / np.log(2) / size)


def next_symbol(
    cover_symbols: Int[Array, "*batch c"],
    cover_log_p: Float[Array, "*batch c"],
    log_p: Float[Array, "*batch"],
    token_symbols: Int[Array, "v"],
    token_log_p: Float[Array, "*batch v"],
    *,
    valid: Bool[Array, "*batch v"] | None = None,
    num_symbols: int = END + 1,
) -> Float[Array, "*batch s"]:
    """The last step of `byte_model` on a device, for a batch: from covers and the model's output to the next symbol.

        u[x] = sum of p_k over covers that go on with x + p · sum of P(t) over tokens that begin with x;  u / sum u

    Args:
      cover_symbols: the next byte of each cover beyond the prefix; below 0 where there is none.
      cover_log_p: their log-probabilities.
      log_p: that of the cover that ends with the prefix.
      token_symbols: the first byte of each token of the vocabulary, or another symbol; below 0 for none.
      token_log_p: the model's log-probabilities after that cover.
      valid: which tokens may follow.
      num_symbols: s, static.

    Returns:
      Log-probabilities, in float32.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> token_log_p = jnp.log(jnp.array([0.5, 0.5]))
      >>> half = jnp.log(jnp.array([0.5]))
      >>> out = jm.words.next_symbol(jnp.array([1]), half, half[0], jnp.array([0, 1]), token_log_p, num_symbols=2)
      >>> jnp.exp(out).tolist()
      [0.25, 0.75]

    Source: arXiv:2410.09303; equal to exact_byte_probs.
    """
    token_log_p = token_log_p.astype(jnp.float32) + log_p[..., None]
    token_log_p = token_log_p if valid is None else jnp.where(valid, token_log_p, -jnp.inf)
    symbols = jnp.concatenate([cover_symbols, jnp.broadcast_to(token_symbols, token_log_p.shape)], axis=-1)
    every = jnp.concatenate([cover_log_p.astype(jnp.float32), token_log_p], axis=-1)
    every = jnp.where(symbols < 0, -jnp.inf, every)
    p = jnp.exp(every - jnp.max(every, axis=-1, keepdims=True))
    u = merge(Plan(symbols, num_symbols), p, reduce="sum")
    return jnp.log(u) - jnp.log(jnp.sum(u, axis=-1, keepdims=True))
