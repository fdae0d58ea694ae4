"""`jaxmerge verify OUT`: whether a merge is what its receipt says."""

import dataclasses
import pathlib
from typing import Any


@dataclasses.dataclass(frozen=True)
class Verify:
    """Compare a merge with its receipt: files and parents by their hashes, a sample of the tensors by merging them again."""

    leaves: int = 8
    """Of how many tensors, drawn at random, a part is computed again."""
    seed: int = 0
    """Another seed, another sample."""
    parts: pathlib.Path | None = None
    """Where the results lie that it was merged from; None: beside it, with .parts after its name."""


def verify(files: Any, options: Verify) -> int:
    from jaxmerge import checkpoint, recipe

    sample: dict[str, Any] = {"leaves": options.leaves, "seed": options.seed}
    asked = checkpoint.receipt(files.out)["recipe"]
    if isinstance(asked, str):
        found = recipe.verify(files.out, parts=options.parts, **sample)
    else:
        found = checkpoint.verify(files.out, _made_by(asked, files.out), **_numbers(files.out, asked), **sample)
    for note in found.notes:
        print(f"note: {note}")
    for problem in found.problems:
        print(f"not as the receipt says: {problem}")
    if not found.problems:
        print(f"{files.out} is what its receipt says; computed again, bit for bit:", *found.leaves, sep="\n  ")
    return 1 if found.problems else 0


def _made_by(recipe: Any, out: str) -> Any:
    """The transform of a merge by METHOD, from its receipt.

    Raises:
      ValueError: it was made in another way.
    """
    from jaxmerge._methods import METHODS

    if not isinstance(recipe, dict) or recipe.get("method") not in METHODS:
        raise ValueError(f"{out} was not made by `jaxmerge merge`; use checkpoint.verify with its transform.")
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in recipe["options"].items()}
    return METHODS[recipe["method"]](**options).transform()


def _numbers(out: str, asked: dict[str, Any]) -> dict[str, Any]:
    """The parents of a merge by METHOD, where they were read as numbers; else as its receipt names them."""
    from jaxmerge import checkpoint
    from jaxmerge.recipe._dequantize import as_numbers

    if not asked.get("dequantize"):
        return {}
    receipt = checkpoint.receipt(out)
    base = receipt["base"] and as_numbers(receipt["base"]["path"])
    return {"base": base, "models": [as_numbers(m["path"]) for m in receipt["models"]]}
