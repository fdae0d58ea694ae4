"""Training states: the parameters in them, without the state of an optimiser."""

import re

from jaxmerge.checkpoint import Source, subset
from jaxmerge.checkpoint._budget import show_size

PARAMETERS = re.compile(r"^(?:params|target|model)/")
"""Where a training state has them: Flax and MaxText; T5X; NNX and Levanter."""
STATE = re.compile(r"^(?:opt_states?|optimizer(?:_state)?|state|steps?|training_step|flax_mutables|rngs?|training_key)(?:/|$)")


def parameters_of(source: Source) -> tuple[Source, str | None]:
    """A source without the state of an optimiser, and what is left out, in words; None where nothing is."""
    left = [n for n in source.leaves if STATE.match(n)]
    if not left or not any(PARAMETERS.match(n) for n in source.leaves):
        return source, None
    size = show_size(sum(source.leaves[n].bytes for n in left))
    collections = ", ".join(dict.fromkeys(n.split("/")[0] for n in left))
    gone = set(left)
    return subset(source, lambda n: n not in gone), f"{collections} ({len(left)} leaves, {size})"
