"""Bytes as ids, as ByT5 numbers them: byte b is b + 3, below are pad, end of sequence and unknown."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import ArrayLike, Int, UInt8

Text = str | bytes | bytearray | memoryview | UInt8[np.ndarray, "bytes"]

PAD, EOS, UNK = 0, 1, 2
OFFSET = 3
SIZE = 384
"""Rows of ByT5's table: 256 bytes, three specials, and the rest unused."""


def to_ids(text: Text) -> np.ndarray:
    """The ids of a text's UTF-8 bytes, int32. No end mark is added.

    Raises:
      TypeError: neither text nor bytes. ValueError: a str with lone surrogates that stand for no byte.

    Example:
      >>> import jaxmerge as jm
      >>> jm.words.to_ids("Hi").tolist()
      [75, 108]

    Source: ByT5 (arXiv:2105.13626).
    """
    return np.frombuffer(utf8("to_ids", text), np.uint8).astype(np.int32) + OFFSET


def utf8(name: str, text: Text) -> bytes:
    """A text's bytes: a str in UTF-8, where U+DC80 to U+DCFF stand for the bytes that are no character; bytes as they are."""
    if isinstance(text, bytes):
        return text
    if isinstance(text, bytearray | memoryview) or (isinstance(text, np.ndarray) and text.dtype == np.uint8):
        return bytes(text)
    if not isinstance(text, str):
        raise TypeError(f"{name}: a text must be str or bytes, got {type(text).__name__}.")
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        point = ord(text[error.start])
        raise ValueError(f"{name}: the text has a lone surrogate, U+{point:04X}, that no bytes encode; pass bytes.") from None


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
