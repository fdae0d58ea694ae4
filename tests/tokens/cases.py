"""One row per planner, by family in cases_*.py, for the laws that every planner obeys (test_every_planner.py)."""

import dataclasses
import importlib
import pathlib
from collections.abc import Callable

from jaxtyping import Array, Float

import jaxmerge as jm

N, D = 16, 8


@dataclasses.dataclass(frozen=True)
class Case:
    """A planner as a function of x (*batch, 16, 8) alone; what it needs besides is made out of x.

    Attributes:
      ordered: segments are numbered by the first position that they hold.
      equivariant: where no two scores are equal, permuting the tokens permutes the groups.
      duplicates: of 8 distinct tokens that each stand there twice, it merges the twins, or leaves them apart.
      low_precision: bfloat16 input makes sense.
    """

    name: str
    plan: Callable[[Float[Array, "*batch 16 8"]], jm.Plan | jm.SoftPlan]
    ordered: bool = False
    equivariant: bool = False
    duplicates: bool = False
    low_precision: bool = True

    def __repr__(self):
        return self.name


def every_case() -> list[Case]:
    """All rows of all families."""
    families = sorted(p.stem for p in pathlib.Path(__file__).parent.glob("cases_*.py"))
    return [case for family in families for case in importlib.import_module(f"tests.tokens.{family}").CASES]
