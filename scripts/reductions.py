"""Every reduction that applies to a Vision Transformer, as a planner: from what a block has `Seen` and r to a plan.

`REDUCTIONS` is what `scripts.compare_reductions` compares. A class token at position 0 must survive.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp

import jaxmerge as jm
from models.vit import Planner, Seen, token_merging


@dataclasses.dataclass(frozen=True)
class Reduction:
    """A planner, and how its plan is applied.

    Attributes:
      proportional: whether merged tokens weigh log size in the attention that follows.
    """

    name: str
    family: str
    planner: Planner
    reduce: Literal["mean", "sum"] = "mean"
    proportional: bool = True


def attended(seen: Seen, r: int) -> jm.Plan:
    """Keep what the class token looks at most."""
    score = seen.attention[:, :, 0].mean(axis=1).at[:, 0].set(jnp.inf)
    return jm.tokens.keep_top_k(score, score.shape[-1] - r)


REDUCTIONS = [
    Reduction("ToMe", "matching", token_merging),
    Reduction("class attention", "pruning", attended),
]
