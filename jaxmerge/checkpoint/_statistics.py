"""Data that comes with the models of a merge, one checkpoint for each: whether it fits them, from the headers alone."""

from collections.abc import Container, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from jaxmerge.checkpoint._source import Source
from jaxmerge.params._transform import Step

HOW = "params.fisher_information and params.gram make them, safetensors or Orbax keep them"


def misfits(steps: Sequence[Step], data: Sequence[Source], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is wrong with the data of a merge.

    Args:
      steps: of the transform.
      data: a source for each model, or none.
      shapes: {leaf: its stacked shape} of the leaves that are merged.
    """
    takes = [i for i, step in enumerate(steps) if step.data is not None]
    if not takes:
        return ["  statistics: this method looks at none; leave them out"] if data else []
    count = next(iter(shapes.values()))[0]
    if not data:
        need = f"  this method needs statistics of each of the {count} models; pass statistics= (--statistics)"
        return [f"{need}: {HOW}"]
    if len(data) != count:
        return [f"  statistics: name one for each of the {count} models, in their order; got {len(data)}"]
    if any(step.resolve is not None or step.survey is not None for step in steps[takes[0] + 1 :]) or len(takes) > 1:
        return ["  statistics: a step that comes after such a merge may not look at what it leaves; end the chain with it"]
    problems = []
    for source in data:
        if wrong := stranger(source, shapes):
            problems.append(f"  {wrong}")
        for n, leaf in source.leaves.items():
            if leaf.dtype is None or not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype == np.float64:
                problems.append(f"  statistics {source.name}: {n} is {leaf.dtype or 'no array'}; save it as float32")
                break
    for name, shape in shapes.items():
        found = [source.leaves[name].shape if name in source.leaves else None for source in data]
        try:
            for step in steps:
                if step.data is not None:
                    step.data(name, shape, found)
        except ValueError as e:
            problems.append(f"  {e}")
            break
    return problems


def stranger(source: Source, names: Container[str]) -> str | None:
    """What is wrong with the names of a model's data, if anything is."""
    strangers = [n for n in source.leaves if n not in names]
    if not strangers:
        return None
    more = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
    sums = all(n == "count" or n.startswith("total/") for n in source.leaves)
    remedy = "save Information.mean()" if sums else "name each array as the leaf that it belongs to"
    return f"statistics {source.name}: {strangers[0]}{more} is no leaf that is merged; {remedy}"
