"""`jaxmerge extract MODEL BASE OUT`: what a model learned, as an adapter of low rank."""

import dataclasses
import pathlib
from typing import Any


@dataclasses.dataclass(frozen=True)
class Extract:
    """Take what a model learned out of it as an adapter (LoRA): of each matrix the nearest update of low rank."""

    rank: int = 32
    """The most that a matrix keeps."""
    error: float = 0.0
    """A matrix keeps no more than it needs to lose at most this share of its change; 0: all of the rank."""
    include: str = ""
    """Take matrices whose names this regular expression is found in."""
    exclude: str = "embed|lm_head|head$"
    """And not those that this one is found in."""


def extract(files: Any, options: Extract) -> None:
    from rich.console import Console

    from jaxmerge import checkpoint, recipe
    from jaxmerge.recipe._extract import write

    if pathlib.Path(files.out).exists():
        raise FileExistsError(f"{files.out} exists; choose another place.")
    model, base = checkpoint.open(files.model), checkpoint.open(files.base)
    tensors, beside, found = recipe.extract(model, base, **dataclasses.asdict(options))
    write(files.out, tensors, beside)
    ranks, console = found.ranks.values(), Console()
    console.print(
        f"{files.out}: {len(ranks)} matrices, of rank {min(ranks, default=0)} to {max(ranks, default=0)}", markup=False
    )
    if found.errors:
        worst = max(found.errors, key=found.errors.__getitem__)
        console.print(f"at most {100 * found.errors[worst]:.3g} % of a change is lost, that of {worst}", markup=False)
    for name, norm in found.left.items():
        console.print(f"left behind: {name}, which changed by {norm:.3g}", markup=False)
