"""What a model makes of a text, byte by byte: what it deletes, or where its words begin. For `scripts.show_bytes`.

MrT5: the delete gate. HAT: its splitter. H-Net: its routers, a view for each. A byte decoder: BLT's patches, from the entropy
of its next byte. And any splitter by itself.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jaxmerge as jm
from jaxmerge import words
from models.decoder import ByteDecoder
from models.hat import HAT, TFreeHAT
from models.hnet import HNet, Routed
from models.mrt5 import MrT5

Rule = Literal["hat", "unicode", "whitespace"]


@dataclasses.dataclass(frozen=True)
class View:
    """One column of the picture.

    Attributes:
      kind: "deletion": marked bytes are gone. "words": at marked bytes a word begins.
      values: of every byte, float, by what they were marked; `unit` says what they are.
    """

    title: str
    kind: Literal["deletion", "words"]
    marks: np.ndarray
    values: np.ndarray
    unit: str

    @property
    def summary(self) -> str:
        if self.kind == "deletion":
            return f"{self.marks.mean():.1%} of {len(self.marks):,} bytes deleted"
        return f"{self.marks.sum():,} words, {len(self.marks) / max(self.marks.sum(), 1):.2f} bytes each"


def views(name: str, model: Any, text: bytes, *, inputs: int, patch: float) -> Iterator[View]:
    """What a model makes of a text that it reads in pieces of `inputs` bytes.

    Raises:
      ValueError: the model neither deletes bytes nor makes words.
    """
    match model:
        case MrT5():
            gate = read(lambda ids, docs: model.encode(ids + words.OFFSET, docs >= 0).gate, text, inputs)
            yield View(name, "deletion", gate <= model.threshold, gate, "gate")
        case HAT():
            yield splitter(text, "whitespace", max_bytes=model.c.max_word, title=name)
        case TFreeHAT():
            yield splitter(text, "hat", max_bytes=model.c.max_word, title=name)
        case HNet():
            stages = read(lambda ids, docs: routers(model(ids, docs)[1]), text, inputs)
            for s, (starts, p) in enumerate(stages, 1):
                yield View(f"{name}, stage {s}" if len(stages) > 1 else name, "words", starts, p, "probability")
        case ByteDecoder():
            entropy = read(lambda ids, docs: words.byte_entropy(model(ids, docs)), text, inputs)
            threshold = words.patch_threshold(entropy, patch, bos=False)
            starts = np.asarray(words.entropy_starts(jnp.asarray(entropy), threshold=threshold, bos=False))
            title = f"{name}: BLT's patches, entropy above {threshold:.2f}"
            yield View(title, "words", starts, np.r_[np.nan, entropy[:-1]], "entropy before it")
        case _:
            raise ValueError(f"views: {name} is a {type(model).__name__}, which neither deletes bytes nor makes words.")


def splitter(text: bytes, rule: Rule, *, max_bytes: int | None = None, title: str | None = None) -> View:
    """Where a splitter's words begin."""
    starts = words.starts(text, rule=rule, max_bytes=max_bytes)
    return View(f"the {rule} rule" if title is None else title, "words", starts, starts.astype(float), "begins")


def routers(routed: list[Routed]) -> list[tuple[Array, Array]]:
    """Of every router, inner ones too, by byte: where its chunks begin, and its probability."""
    out, plan = [], None
    for r in routed:
        starts, p = r.routing.starts, r.routing.p
        if plan is not None:  # positions of an inner stage are chunks of the one around it
            starts, p = out[-1][0] & (jm.unmerge(plan, starts.astype(p.dtype)) > 0), jm.unmerge(plan, p)
        out.append((starts, p))
        plan = r.plan if plan is None else jm.compose(r.plan, plan)
    return out


def read(f: Callable[[Array, Array], Any], text: bytes, inputs: int) -> Any:
    """f(ids, docs) of a text in pieces, every array of its result as one row as long as the text; padding has a docs of -1."""
    pieces = max(-(-len(text) // inputs), 1)
    ids, docs = np.zeros(pieces * inputs, np.int32), np.full(pieces * inputs, -1, np.int32)
    ids[: len(text)], docs[: len(text)] = np.frombuffer(text, np.uint8), 0
    found = jax.jit(f)(jnp.asarray(ids.reshape(pieces, inputs)), jnp.asarray(docs.reshape(pieces, inputs)))
    return jax.tree.map(lambda x: np.asarray(x).reshape(-1)[: len(text)], found)


def characters(text: bytes, view: View) -> list[tuple[str, bool, float]]:
    """Characters, whether each is marked, and its value.

    A character is gone when all its bytes are; a word begins at it when one begins at any of its bytes.
    """
    every = np.logical_and.reduce if view.kind == "deletion" else np.logical_or.reduce
    out, at = [], 0
    for char in text.decode("utf-8", "replace"):
        width = 1 if char == "\ufffd" and text[at : at + 3] != b"\xef\xbf\xbd" else len(char.encode())
        here = slice(at, at + width)
        out.append((char, bool(every(view.marks[here])), float(view.values[here].max(initial=-np.inf))))
        at += width
    return out
