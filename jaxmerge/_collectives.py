"""Read a compiled program: which collectives it holds, and what each moves."""

import math
import re
from typing import Any, NamedTuple

_NAMES = "all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"
_LINE = re.compile(rf"= (?P<result>.*?) (?P<name>{_NAMES})(?P<start>-start)?\(")
_SHAPE = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
      name: such as "all-reduce".
      shapes: its results on one device, as HLO writes them: ("u32[3]",).
      bytes: their size. In the body of a loop it moves so much in every turn.
    """

    name: str
    shapes: tuple[str, ...]
    bytes: int


def collectives(compiled: Any) -> list[Collective]:
    """The collectives of an optimised program, in the order of its text.

    Args:
      compiled: what `jax.jit(f).lower(...).compile()` returns.

    Example:
      >>> import jax, jax.numpy as jnp, jaxmerge as jm
      >>> jm.testing.collectives(jax.jit(jnp.sin).lower(jnp.ones(3)).compile())
      []
    """
    found = []
    for line in compiled.as_text().splitlines():
        match = _LINE.search(line)
        if match is None:
            continue
        shapes = [(m[0], _bytes(m)) for m in _SHAPE.finditer(match["result"])]
        if match["start"] and match["name"] != "all-reduce":  # (operands, results) and maybe counters
            shapes = shapes[1:2] if len(shapes) < 4 else shapes[len(shapes) // 2 :]
        found.append(Collective(match["name"], tuple(s for s, _ in shapes), sum(size for _, size in shapes)))
    return found


def _bytes(shape: re.Match) -> int:
    bits = int(shape[2] or 8)
    return math.prod(int(n) for n in shape[3].split(",") if n) * bits // 8
