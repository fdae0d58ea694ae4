"""Write with a trained byte model, a character at a time as it comes.

    python -m scripts.generate --checkpoint runs/quickstart/base --prompt "def main():" --length 200
    python -m scripts.generate --checkpoint byt5-small --family byt5 --prompt "..." --temperature 0.8 --top-p 0.95
    python -m scripts.generate --checkpoint runs/quickstart/base --prompt "for i in ___(10):" --hidden ___

With `--hidden` an encoder-decoder does what it was trained for: it fills the spans that a mark stands for, and the whole text
is written. The model lies in any of the layouts of `scripts.families`. A character is printed when its last byte has come.
Lengths count bytes.
"""

import codecs
import dataclasses
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxmerge import words
from models.sampling import sample
from scripts.families import FAMILIES, read_model
from scripts.refusals import refusals


@dataclasses.dataclass
class Flags:
    """What to write."""

    checkpoint: pathlib.Path
    prompt: str
    """What the encoder reads or, for a language model, what the text begins with."""
    family: str = "mrt5"
    """byt5, mrt5, lm, hat (the released form) or hnet."""
    length: int = 256
    """How many bytes at most."""
    temperature: float = 0.0
    """0 takes the most likely byte."""
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    capacity: int | None = None
    """For MrT5: delete bytes for good, with room for that many; by default deletion is soft, as in training."""
    end_mark: bool = True
    """Add the end mark to what the encoder reads, as ByT5's tokeniser and scripts.train_mrt5 do."""
    hidden: str | None = None
    """What stands for a hidden span in the prompt of byt5 or mrt5, such as ___; at most eleven of them."""


def stream(
    family: str,
    model: Any,
    prompt: bytes,
    *,
    length: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    **how: Any,
) -> Iterator[bytes]:
    """The bytes that a model writes after a prompt, one at a time, until its end mark or `length` of them."""
    if length < 1:
        raise ValueError(f"generate: length counts the bytes to write and must be 1 or more, got {length}.")
    logits, cache, step = FAMILIES[family].start(model, prompt, room=length - 1, **how)
    draw = jax.jit(lambda logits, key: sample(logits, key, temperature=temperature, top_k=top_k, top_p=top_p))
    raw = logits.shape[-1] == 256  # ids are bytes
    for i, key in enumerate(jax.random.split(jax.random.key(seed), length)):
        if i:
            logits, cache = step(new, cache)
        new = draw(logits, key)
        id = int(new[0])
        if id == (FAMILIES[family].stop if raw else words.EOS):
            return
        yield bytes([id]) if raw else words.to_bytes(np.array([id]))


def characters(pieces: Iterator[bytes]) -> Iterator[str]:
    """Whole characters: bytes are held back until theirs is complete; what can be none becomes U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for piece in pieces:
        if text := decoder.decode(piece):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


SPANS = range(0xFF, 0xF4, -1)
"""The bytes that UTF-8 does not have: in turn, the sentinels of hidden spans (`jaxmerge.words.corrupt`)."""


def with_sentinels(parts: list[bytes]) -> bytes:
    """What the encoder reads of a text in parts, with a hidden span between any two."""
    if not 2 <= len(parts) <= len(SPANS) + 1:
        raise ValueError(f"generate: --hidden must be in the prompt, 1 to {len(SPANS)} times; it is {len(parts) - 1} times.")
    return b"".join(part + bytes([mark]) for part, mark in zip(parts[:-1], SPANS, strict=False)) + parts[-1]


def filled(parts: list[bytes], pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The whole text: each span where its sentinel says, until a sentinel comes that is not the next one's."""
    at = 0
    for piece in pieces:
        if piece[:1] and piece[0] in SPANS:
            if at == len(parts) - 1 or piece[0] != SPANS[at]:
                break
            yield parts[at]
            at += 1
        elif at:
            yield piece
    yield from parts[at:]


def generate(flags: Flags) -> Iterator[str]:
    if flags.family not in FAMILIES:
        raise ValueError(f"generate: --family must be one of {', '.join(FAMILIES)}; got {flags.family!r}.")
    prompt, parts = flags.prompt.encode("utf-8", "surrogateescape"), []
    if flags.hidden is not None:
        if flags.family not in ("byt5", "mrt5") or not flags.hidden:
            raise ValueError(f"generate: --hidden MARK is for byt5 and mrt5; got {flags.hidden!r} for {flags.family}.")
        parts = prompt.split(flags.hidden.encode("utf-8", "surrogateescape"))
        prompt = with_sentinels(parts)
    _, model = read_model(flags.checkpoint, flags.family)
    rules = dict(temperature=flags.temperature, top_k=flags.top_k, top_p=flags.top_p, seed=flags.seed)
    how: dict[str, Any] = dict(capacity=flags.capacity, end_mark=flags.end_mark)
    pieces = stream(flags.family, model, prompt, length=flags.length, **rules, **how)
    return characters(filled(parts, pieces) if parts else pieces)


if __name__ == "__main__":
    import tyro

    with refusals():
        for text in generate(tyro.cli(Flags, prog=f"python -m {__spec__.name}", description=__doc__)):
            sys.stdout.write(text)
            sys.stdout.flush()
        print()
