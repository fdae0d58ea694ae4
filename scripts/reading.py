"""What a model was trained to read: which text, in which windows. Training leaves it as data.json beside its checkpoints, so
that evaluation, pictures and `--resume` follow."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

from scripts import data, texts


@dataclasses.dataclass(frozen=True)
class Reading:
    """Text and windows.

    Attributes:
      text: as given to `--text`, paths absolute; empty: the prose and code that every Python carries.
      length: bytes of a window.
      noise, span: the share of them that is hidden, and the mean length of a hidden span.
      sizes: of each domain, the bytes to train on and those held out.
    """

    text: tuple[str, ...]
    length: int
    noise: float
    span: float
    sizes: dict[str, tuple[int, int]]

    def corpora(self) -> dict[str, data.Corpus]:
        """The text, which must be what it was."""
        found = corpora(self.text)
        if self.text and (now := sizes(found)) != self.sizes:
            raise ValueError(
                f"data.json: the text has changed since training: {self.sizes} bytes (trained on, held out) then, {now} now; "
                "what was held out is no longer known. Put the files back, or train again."
            )
        return found


def differences(a: Reading, b: Reading) -> str:
    """What is not the same in two of them, or ""."""
    a_, b_ = dataclasses.asdict(a), dataclasses.asdict(b)
    return ", ".join(f"{name} {a_[name]} and not {b_[name]}" for name in a_ if a_[name] != b_[name])


def corpora(text: Sequence[str]) -> dict[str, data.Corpus]:
    """The domains of `--text`; of none, prose and code."""
    return texts.load(text) if text else {domain: data.load(domain) for domain in data.DOMAINS}


def sizes(corpora: dict[str, data.Corpus]) -> dict[str, tuple[int, int]]:
    return {name: (len(c.train), len(c.heldout)) for name, c in corpora.items()}


def save(path: pathlib.Path, reading: Reading) -> None:
    path.write_text(json.dumps(dataclasses.asdict(reading), indent=1) + "\n")


def load(path: pathlib.Path) -> Reading:
    """The inverse of `save`."""
    if not path.exists():
        raise ValueError(f"load: {path} is missing; scripts.train_mrt5 writes it beside its checkpoints.")
    fields = json.loads(path.read_text())
    tuples = dict(text=tuple(fields["text"]), sizes={name: tuple(pair) for name, pair in fields["sizes"].items()})
    return Reading(**fields | tuples)
