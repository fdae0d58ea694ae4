"""From one layout of a byte model to another: Hugging Face, T5X, and our own.

    python -m scripts.convert byt5-small byt5-small-ours --family byt5 --to orbax
    python -m scripts.convert checkpoint_1000000 byt5-small-hf --family byt5 --to hf
    python -m scripts.convert runs/quickstart/base mrt5-mine --family mrt5 --to hf

What is read is found out from what lies there. Nothing is downloaded, PyTorch is not needed, and a PyTorch file is read
without running anything in it. Unknown names are refused on both sides before anything is written.
"""

import dataclasses
import pathlib
from typing import Annotated

import tyro
from flax import nnx

from models.published import Tied
from scripts.families import FAMILIES, Layout, layout_of, read_model, write_model
from scripts.refusals import refusals


@dataclasses.dataclass
class Flags:
    """What to convert."""

    source: Annotated[pathlib.Path, tyro.conf.Positional]
    """Where the model lies."""
    target: Annotated[pathlib.Path, tyro.conf.Positional]
    """Where it goes; must not be there yet, or be empty."""
    family: str
    """byt5, mrt5, lm, hat (the released form) or hnet."""
    to: Layout
    tied: Tied = "refuse"
    """If the head is the embedding again: refuse, or copy it to a table of its own."""
    scan: bool = False
    """For --to orbax: keep the layers stacked."""
    shard_bytes: int | None = None
    """For --to hf: the size at which another file is begun."""


def convert(flags: Flags) -> str:
    """Read, write, and say what was done."""
    if flags.family not in FAMILIES:
        raise ValueError(f"convert: --family must be one of {', '.join(FAMILIES)}; got {flags.family!r}.")
    config, model = read_model(flags.source, flags.family, tied=flags.tied, scan=flags.scan)
    write_model(flags.target, flags.family, config, model, flags.to, shard_bytes=flags.shard_bytes)
    count = sum(p.size for _, p in nnx.to_flat_state(nnx.state(model, nnx.Param)))
    return f"{flags.source} ({layout_of(flags.source)}) -> {flags.target} ({flags.to}): {flags.family}, {count:,} parameters"


if __name__ == "__main__":
    with refusals():
        print(convert(tyro.cli(Flags, prog=f"python -m {__spec__.name}", description=__doc__)))
