"""Span corruption, as ByT5 was trained: some spans of bytes leave the input and become the target. On the host, in numpy.

    text      T h a n k   y o u   f o r   i n v i t i n g         mask: the spans that leave
    inputs    T h a n <258>   f o r   i n <257> g </s>            one sentinel for each span that left
    targets   <258> k   y o u <257> v i t i n </s>                one sentinel for each span that stayed

Sentinels go down from 258, the id of byte 0xFF: bytes that UTF-8 does not have, for the first eleven of them.
"""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jaxmerge.words._vocabulary import EOS, OFFSET, PAD

SENTINEL = OFFSET + 255
"""ByT5's first sentinel. Those of the Hugging Face tokenizer, 259 to 383, pretraining never used."""

Rounding = Literal["t5", "flax"]


class Corrupted(NamedTuple):
    """A batch for an encoder and a decoder, each row ended by EOS and padded to the longest."""

    inputs: Int[np.ndarray, "b s"]
    targets: Int[np.ndarray, "b t"]


def span_counts(length: int, *, density: float = 0.15, mean: float = 20.0, rounding: Rounding = "t5") -> tuple[int, int]:
    """How many of so many bytes leave, and in how many spans: round(length · density), and that / mean, rounded.

    Args:
      length: bytes of text.
      density: the fraction that leaves.
      mean: length of a span, 20 for ByT5.
      rounding: "t5" counts as T5's own code, in float32. "flax" as Hugging Face's Flax script and MrT5, in float64, and there
        are no more spans than the smaller of what leaves and what stays would give. Below a density of 1/2 they differ only
        where length · density is half-way between two numbers: of 190 bytes 29 leave, or 28.

    Raises:
      ValueError: a length below 1, a density outside (0, 1), a mean below 1, an unknown rounding.

    Example:
      >>> import jaxmerge as jm
      >>> jm.words.span_counts(1193)
      (179, 9)

    Source: T5 (arXiv:1910.10683), ByT5 (arXiv:2105.13626); equal to span_a.
    """
    if length < 1:
        raise ValueError(f"span_counts: length must be 1 byte or more, got {length}.")
    if not 0 < density < 1:
        raise ValueError(f"span_counts: density must lie between 0 and 1, got {density}.")
    if mean < 1:
        raise ValueError(f"span_counts: mean must be 1 byte or more, got {mean}.")
    if rounding not in ("t5", "flax"):
        raise ValueError(f'span_counts: rounding must be "t5" or "flax", got {rounding!r}.')
    real = np.float32 if rounding == "t5" else np.float64
    length = max(length, 2)
    noise = min(max(int(np.round(real(length) * real(density))), 1), length - 1)
    spread = noise if rounding == "t5" else min(noise, length - noise)
    return noise, max(int(np.round(real(spread) / real(mean))), 1)


def span_lengths(inputs: int, *, density: float = 0.15, mean: float = 20.0, rounding: Rounding = "t5") -> tuple[int, int]:
    """How much text fills `inputs` ids once corrupted, and how many ids its targets have.

    Args:
      inputs: ids of the encoder, sentinels and EOS included.
      density, mean, rounding: as in `span_counts`.

    Returns:
      Bytes of text, ids of the targets.

    Raises:
      ValueError: too few inputs for any text.

    Example:
      >>> import jaxmerge as jm
      >>> jm.words.span_lengths(1024)
      (1193, 189)

    Source: T5's `random_spans_helper`; equal to span_a. It counts in float64 where its masks count in float32; here both agree.
    """

    def both(length: int) -> tuple[int, int]:
        noise, spans = span_counts(length, density=density, mean=mean, rounding=rounding)
        return length - noise + spans + 1, noise + spans + 1

    if inputs < both(2)[0]:
        raise ValueError(f"span_lengths: inputs must have room for {both(2)[0]} ids, got {inputs}.")
    length = 2
    step = max(inputs, 1)  # what one more byte adds is never negative: a search by halving finds the last that fits
    while step:
        if both(length + step)[0] <= inputs:
            length += step
        else:
            step //= 2
    targets = both(length)[1]
    if density == 0.5 and targets > inputs:  # T5 keeps both sides of one length
        return length - 1, targets - 1
    return length, targets


def span_mask(
    rng: np.random.Generator,
    batch: int,
    length: int,
    *,
    density: float = 0.15,
    mean: float = 20.0,
    rounding: Rounding = "t5",
    roll: bool = False,
) -> Bool[np.ndarray, "b n"]:
    """Draw which bytes leave: spans that stay and spans that leave in turn, beginning with one that stays.

    Args:
      rng: numpy's generator.
      batch, length: rows, and bytes of each.
      density, mean, rounding: as in `span_counts`; every row has those counts exactly.
      roll: turn each row by a random number of bytes, so that ends are like the middle; T5 has it switched off.

    Returns:
      True where a byte leaves.

    Example:
      >>> import numpy as np, jaxmerge as jm
      >>> mask = jm.words.span_mask(np.random.default_rng(0), 2, 100)
      >>> mask.sum(axis=1).tolist(), mask[:, 0].tolist()
      ([15, 15], [False, False])

    Source: T5's `random_spans_noise_mask`: the same distribution, not the same draws.
    """
    noise, spans = span_counts(length, density=density, mean=mean, rounding=rounding)
    n = max(length, 2)
    stay, leave = _partition(rng, batch, n - noise, spans), _partition(rng, batch, noise, spans)
    runs = np.stack([stay, leave], axis=-1).reshape(-1)
    mask = np.repeat(np.tile(np.array([False, True]), batch * spans), runs).reshape(batch, n)
    if roll:
        turn = rng.integers(0, n, (batch, 1))
        mask = np.take_along_axis(mask, (np.arange(n) - turn) % n, axis=1)
    return mask[:, :length]


def corrupt(
    ids: Int[np.ndarray, "b n"],
    mask: Bool[np.ndarray, "b n"],
    *,
    lengths: Int[np.ndarray, "b"] | None = None,
    sentinel: int = SENTINEL,
    eos: int = EOS,
    pad: int = PAD,
) -> Corrupted:
    """Take the spans of a mask out of every row: inputs without them, targets with nothing else.

    Args:
      ids: bytes as `to_ids` numbers them.
      mask: True where a byte leaves, from `span_mask` or any other.
      lengths: how much of each row is text; all of it by default.
      sentinel: the id of a row's first span; those after it count down.
      eos, pad: what ends a row, and what fills it.

    Returns:
      Inputs and targets, int32.

    Law:
      with the spans of the targets put back for the sentinels of the inputs, in turn, the text is whole.

    Raises:
      ValueError: shapes that differ, or a row with more spans than there are ids below the first sentinel.

    Example:
      >>> import numpy as np, jaxmerge as jm
      >>> text = jm.words.to_ids("Thank you")[None]
      >>> inputs, targets = jm.words.corrupt(text, np.array([[0, 0, 0, 1, 1, 0, 0, 0, 0]], bool))
      >>> jm.words.to_bytes(inputs[0]), jm.words.to_bytes(targets[0])
      (b'Tha\\xff you', b'\\xffnk\\xfe')

    Source: ByT5 (arXiv:2105.13626); equal to span_a.
    """
    if mask.shape != ids.shape:
        raise ValueError(f"corrupt: mask must have the shape of ids, {ids.shape}, got {mask.shape}.")
    valid = None if lengths is None else np.arange(ids.shape[1])[None] < np.asarray(lengths)[:, None]
    side = lambda gone: _side(np.asarray(ids), gone, valid, sentinel=sentinel, eos=eos, pad=pad)
    return Corrupted(side(mask), side(~mask))


def _partition(rng: np.random.Generator, batch: int, items: int, parts: int) -> np.ndarray:
    """(batch, parts) lengths that add up to `items`, each 1 or more, every such row as likely as another.

    A row is `parts` - 1 cuts among `items` - 1 places. If there are too few items, the last parts are empty.
    """
    cuts = min(parts, items) - 1
    out = np.zeros((batch, parts), np.int64)
    if cuts == 0:
        out[:, 0] = items
        return out
    places = np.argpartition(rng.random((batch, items - 1), np.float32), cuts - 1, axis=1)[:, :cuts]
    edges = np.sort(places, axis=1) + 1
    out[:, : cuts + 1] = np.diff(edges, axis=1, prepend=0, append=items)
    return out


def _side(ids: np.ndarray, gone: np.ndarray, valid: np.ndarray | None, *, sentinel: int, eos: int, pad: int) -> np.ndarray:
    """Each run of what is gone becomes one sentinel; the rest moves together; EOS follows."""
    batch = len(ids)
    gone = gone if valid is None else gone & valid
    first = gone.copy()
    first[:, 1:] &= ~gone[:, :-1]
    kept = first | ~gone
    kept = kept if valid is None else kept & valid
    runs = np.count_nonzero(first, axis=1)
    if runs.max(initial=0) > sentinel + 1:
        raise ValueError(f"corrupt: a row has {runs.max()} spans, more than the {sentinel + 1} ids from {sentinel} down.")
    out = ids.astype(np.int32)
    before = np.repeat(np.cumsum(runs) - runs, runs)
    out[first] = sentinel - (np.arange(len(before)) - before)
    count = np.count_nonzero(kept, axis=1)
    side = np.full((batch, count.max(initial=0) + 1), pad, np.int32)
    side[np.arange(side.shape[1]) < count[:, None]] = out[kept]
    side[np.arange(batch), count] = eos
    return side
