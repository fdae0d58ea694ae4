"""Bytes as ids, as ByT5 numbers them: byte b is b + 3, below are pad, end of sequence and unknown."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import ArrayLike, Int

PAD, EOS, UNK = 0, 1, 2
OFFSET = 3
SIZE = 384
"""Rows of ByT5's table: 256 bytes, three specials, and the rest unused."""


def to_ids(text: str | bytes) -> np.ndarray:
    """The ids of a text's UTF-8 bytes, int32. No end mark is added.

    Example:
      >>> import jaxmerge as jm
      >>> jm.words.to_ids("Hi").tolist()
      [75, 108]

    Source: ByT5 (arXiv:2105.13626).
    """
    raw = text if isinstance(text, bytes) else text.encode("utf-8")
    return np.frombuffer(raw, np.uint8).astype(np.int32) + OFFSET


def to_bytes(ids: Int[ArrayLike, "n"] | Sequence[int]) -> bytes:
    """The bytes that a row of ids spells, specials and unused ids left out.

    Law:
      to_bytes(to_ids(b)) = b for any bytes b.

    Example:
      >>> import jaxmerge as jm
      >>> jm.words.to_bytes([75, 108, 1, 0])
      b'Hi'

    Source: ByT5 (arXiv:2105.13626).
    """
    ids = np.asarray(ids)
    return (ids[(ids >= OFFSET) & (ids < OFFSET + 256)] - OFFSET).astype(np.uint8).tobytes()
