"""Dynamic tokenization: the most frequent neighbours of a batch become one token, as in BPE, batch by batch. On the host.

A model retrofitted to it reads fewer, longer tokens, whose embeddings a hypernetwork makes from their bytes.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxmerge._plan import Plan

Embed = Callable[[list[bytes]], np.ndarray]

SPACELIKE = frozenset(b" \t\n")


class DynamicTokens(NamedTuple):
    """A batch in longer tokens."""

    plan: Plan
    """From the tokens of each row to its longer ones."""
    ids: Int[np.ndarray, "b m"]
    """The longer tokens: ids of the vocabulary, then from V up those of `new`; -1 where there is none."""
    new: list[bytes]
    """What the vocabulary does not have."""
    merges: list[tuple[bytes, bytes]]
    """What was joined, in turn."""


def dynamic_tokens(
    ids: Int[np.ndarray, "b n"],
    vocabulary: Sequence[bytes],
    num_merges: int,
    *,
    starts: Bool[np.ndarray, "b n"] | None = None,
    mask: Bool[np.ndarray, "b n"] | None = None,
    capacity: int | None = None,
    least: int = 1,
    across_spaces: bool = False,
    across_characters: bool = True,
) -> DynamicTokens:
    """Join the most frequent pair of neighbours in the whole batch, again and again; the first seen wins a tie.

    Args:
      ids: tokens of every row.
      vocabulary: the bytes of each token; one of none (a special token) is never joined.
      num_merges: at most so many pairs are joined; what is saved depends on the text.
      starts: True where a token begins a word, or a sentence: nothing is joined to what comes before it.
      mask: True for a token, False for padding.
      capacity: m of the plan; by default the longest row's.
      least: stop when no pair occurs so often.
      across_spaces: let a space, tab or newline stand inside a token. Without it a token may begin with one, or be nothing
        else; two newlines alone stay apart. These are the official rules.
      across_characters: let a token be no valid UTF-8, as when a character's bytes are joined one by one.

    Returns:
      The plan, the longer tokens, and what is new.

    Law:
      a row's longer tokens spell its bytes; no segment of the plan holds a start but at its head.

    Raises:
      ValueError: shapes that differ, ids outside the vocabulary, negative num_merges.

    Example:
      >>> import numpy as np, jaxmerge as jm
      >>> ids = np.array([[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]])
      >>> out = jm.words.dynamic_tokens(ids, [b"a", b"b", b"c"], 2)
      >>> out.new, out.ids.tolist(), out.plan.segment_ids.tolist()
      ([b'ab', b'abc'], [[4, 3], [3, 4]], [[0, 0, 0, 1, 1], [0, 0, 1, 1, 1]])

    Source: Retrofitting Large Language Models with Dynamic Tokenization (arXiv:2411.18553), section 3.1.
    """
    for name, a in dict(starts=starts, mask=mask).items():
        if a is not None and a.shape != ids.shape:
            raise ValueError(f"dynamic_tokens: {name} must have the shape of ids, {ids.shape}, got {a.shape}.")
    if num_merges < 0:
        raise ValueError(f"dynamic_tokens: num_merges must be 0 or more, got {num_merges}.")
    there = np.ones(ids.shape, bool) if mask is None else mask
    if ids[there].size and not 0 <= ids[there].min() <= ids[there].max() < len(vocabulary):
        raise ValueError(f"dynamic_tokens: ids must lie between 0 and {len(vocabulary) - 1}; mask padding out.")
    spell, number = list(vocabulary), {token: i for i, token in reversed(list(enumerate(vocabulary))) if token}
    place = np.flatnonzero(there)  # where each token begins, in the flat batch; tokens that are left are its lines
    token = ids[there].astype(np.int64)
    alone = np.array([not t for t in spell], bool)[token]
    head = np.diff(np.r_[-1, place // max(ids.shape[1], 1)]) != 0
    head |= alone | np.r_[False, alone[:-1]] | (False if starts is None else starts[there])
    may = _rules(spell, across_spaces, across_characters)
    merges: list[tuple[bytes, bytes]] = []
    while len(merges) < num_merges:
        pair = _most_frequent(token, head, may, least)
        if pair is None:
            break
        left, right = pair
        joined = spell[left] + spell[right]
        merges.append((spell[left], spell[right]))
        if joined not in number:
            number[joined] = len(spell)
            spell.append(joined)
        at = np.flatnonzero((token[:-1] == left) & (token[1:] == right) & ~head[1:])
        if left == right:  # of a run of them every other one, from the left
            run = at[np.maximum.accumulate(np.where(np.diff(at, prepend=-9) != 1, np.arange(len(at)), 0))]
            at = at[(at - run) % 2 == 0]
        token[at] = number[joined]
        keep = np.ones(len(token), bool)
        keep[at + 1] = False
        token, head, place = token[keep], head[keep], place[keep]
    return _result(ids.shape, there, token, place, capacity, spell[len(vocabulary) :], merges)


def cached_embeddings(embed: Embed, vocabulary: Float[np.ndarray, "V d"], size: int) -> Callable[[DynamicTokens], np.ndarray]:
    """Embeddings of a batch's tokens: rows of a table, and for new tokens those that `embed` makes, the latest of them kept.

    Args:
      embed: from the bytes of k tokens to (k, d), such as a hypernetwork. It is asked once for all that are not at hand.
      vocabulary: the table of the others.
      size: how many made embeddings are kept; the one used longest ago goes first.

    Returns:
      From `DynamicTokens` to (b, m, d), zeros where there is no token.

    Raises:
      ValueError: size below 1, or `embed` returns another shape.

    Example:
      >>> import numpy as np, jaxmerge as jm
      >>> embeddings = jm.words.cached_embeddings(lambda tokens: np.array([[len(t)] for t in tokens]), np.zeros((3, 1)), 100)
      >>> tokens = jm.words.dynamic_tokens(np.array([[0, 1, 2]]), [b"a", b"b", b"c"], 1)
      >>> embeddings(tokens).tolist()
      [[[2.0], [0.0]]]

    Source: arXiv:2411.18553.
    """
    if size < 1:
        raise ValueError(f"cached_embeddings: size must be 1 or more, got {size}.")
    kept: OrderedDict[bytes, np.ndarray] = OrderedDict()

    def embeddings(tokens: DynamicTokens) -> np.ndarray:
        used = [tokens.new[i] for i in np.unique(tokens.ids[tokens.ids >= len(vocabulary)]) - len(vocabulary)]
        missing = [token for token in used if token not in kept]
        made = np.asarray(embed(missing), vocabulary.dtype) if missing else vocabulary[:0]
        if made.shape != (len(missing), vocabulary.shape[1]):
            raise ValueError(f"cached_embeddings: embed must return {(len(missing), vocabulary.shape[1])}, got {made.shape}.")
        kept.update(zip(missing, made, strict=True))
        for token in used:
            kept.move_to_end(token)
        new = np.zeros((len(tokens.new), vocabulary.shape[1]), vocabulary.dtype)
        for i, token in enumerate(tokens.new):
            new[i] = kept.get(token, 0)
        while len(kept) > size:
            kept.popitem(last=False)
        table = np.concatenate([vocabulary, new])
        return np.where((tokens.ids >= 0)[..., None], table[tokens.ids], 0)

    return embeddings


def _rules(spell: list[bytes], across_spaces: bool, across_characters: bool) -> Callable[[int, int], bool]:
    """Whether two tokens may become one; asked once per pair."""
    known: dict[tuple[int, int], bool] = {}

    def may(left: int, right: int) -> bool:
        if (left, right) not in known:
            joined = spell[left] + spell[right]
            inner = any(b in SPACELIKE for b in joined[1:])
            apart = inner and (joined == b"\n\n" or not all(b in SPACELIKE for b in joined))
            whole = across_characters or joined.decode("utf-8", "ignore").encode() == joined
            known[left, right] = whole and (across_spaces or not apart)
        return known[left, right]

    return may


def _most_frequent(token: np.ndarray, head: np.ndarray, may: Callable[[int, int], bool], least: int) -> tuple[int, int] | None:
    """The pair of neighbours that occurs most, of those that may be joined; of equals the first in the batch."""
    free = np.flatnonzero(~head[1:])
    if not len(free):
        return None
    base = int(token.max()) + 1
    pair, first, count = np.unique(token[free] * base + token[free + 1], return_index=True, return_counts=True)
    for i in np.lexsort((first, -count)):
        left, right = divmod(int(pair[i]), base)
        if count[i] < least:
            return None
        if may(left, right):
            return left, right
    return None


def _result(
    shape: tuple[int, ...], there: np.ndarray, token: np.ndarray, place: np.ndarray, capacity: int | None, *lists: Any
) -> DynamicTokens:
    b, n = shape
    begins = np.zeros(b * n, bool)
    begins[place] = True
    begins = begins.reshape(b, n)
    segment_ids = np.where(there, np.cumsum(begins, axis=1) - 1, -1)
    m = int(begins.sum(axis=1).max(initial=0)) if capacity is None else capacity
    ids = np.full((b, m), -1, np.int32)
    row, column = place // n, segment_ids.reshape(-1)[place]
    fits = column < m
    ids[row[fits], column[fits]] = token[fits]
    return DynamicTokens(Plan(jnp.asarray(segment_ids, jnp.int32), m), ids, *lists)
