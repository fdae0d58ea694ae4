"""Expert Merging: a factor for each piece of each tensor of each expert, learned by what the experts say and see.

    raw = expert_coefficients(stacked)                                 every factor is 0.1
    loss = distillation(teacher's logits, student's) + 0.1 hidden_mse(teacher's states, student's) + 0.1 drift(raw)

`fit` descends it. Expert Merging++ then cuts tensors in pieces where they matter (`allocate_chunks`), and starts anew.
"""

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jaxmerge.params._transform import MergeTransform, Stacked, Step, atom, named_leaves, total


def expert_merging(coefficients: Mapping[str, Any], *, rest: float | None = None) -> MergeTransform:
    """The base plus each task vector times the sigmoid of its coefficient, one for each chunk of the flattened tensor.

    Args:
      coefficients: {leaf name: (K, chunks)}, before the sigmoid. A tensor of n entries is cut into pieces of ceil(n / chunks),
        the last one shorter; there may be fewer pieces than chunks. `expert_coefficients` makes them.
      rest: the factor of leaves that have no coefficients or no chunks; None refuses them.

    Law:
      Differentiable in the coefficients.

    Raises:
      ValueError: a leaf without coefficients, or with those of another number of models.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, models = {"w": jnp.zeros(4)}, [{"w": jnp.ones(4)}]
      >>> raw = {"w": jnp.array([[0.0, 100.0]])}
      >>> jm.params.merge(jm.params.expert_merging(raw), base, models)["w"].tolist()
      [0.5, 0.5, 1.0, 1.0]

    Source: Expert Merging (arXiv:2509.25712), one chunk; Expert Merging++, chunks where a tensor matters.
    """

    def settings(name, shape):
        found = jnp.shape(coefficients[name]) if name in coefficients else None
        if rest is not None and (found is None or 0 in found):
            return {"weight": jnp.full((shape[0], 1), rest, jnp.float32)}
        if found is None or len(found) != 2 or found[0] != shape[0]:
            raise ValueError(f"expert_merging: leaf {name!r} needs coefficients of shape ({shape[0]}, chunks); got {found}.")
        return {"weight": jax.nn.sigmoid(jnp.asarray(coefficients[name], jnp.float32))}

    def merge(plan, x):
        w = plan["weight"]
        n, chunks = max(x[0].size, 1), w.shape[1]
        piece, stride = jnp.zeros((1,) * x.ndim, jnp.uint32), 1
        for axis in range(x.ndim - 1, 0, -1):  # the flat index, which 32 bits must hold
            line = jnp.arange(x.shape[axis], dtype=jnp.uint32) * jnp.uint32(stride)
            piece = piece + line.reshape(*(-1 if a == axis else 1 for a in range(x.ndim)))
            stride *= x.shape[axis]
        piece = (piece // jnp.uint32(-(-n // chunks)))[0]
        return total(x * w[:, piece]) if chunks > 1 else total(x * w.reshape(-1, *(1,) * (x.ndim - 1)))

    return atom(Step(settings, lambda settings, x: settings, merge, models=1))


def expert_coefficients(
    stacked: Stacked, chunks: int | Mapping[str, int] = 1, *, start: float = 0.1
) -> dict[str, Float[Array, "K chunks"]]:
    """Coefficients for `expert_merging`, before its sigmoid, that all mean one factor.

    Args:
      stacked: task vectors, leaves (K, *shape); shapes will do (`jax.eval_shape`).
      chunks: into how many pieces to cut each tensor, or {leaf name: so many}; leaves with 0, or not named, get none.
      start: the factor, above 0 and below 1.

    Raises:
      ValueError: a start that no sigmoid gives; chunks for leaves that are not there.

    Example:
      >>> import jax, jax.numpy as jnp, jaxmerge as jm
      >>> raw = jm.params.expert_coefficients({"w": jnp.ones((2, 3)), "b": jnp.ones((2, 1))}, {"w": 3})
      >>> {name: x.shape for name, x in raw.items()}, round(jax.nn.sigmoid(raw["w"])[0, 0].item(), 6)
      ({'w': (2, 3)}, 0.1)

    Source: Expert Merging (arXiv:2509.25712): sigmoid(raw) = 0.1, not raw = 0.1.
    """
    if not 0 < start < 1:
        raise ValueError(f"expert_coefficients: start must be between 0 and 1, as a sigmoid is; got {start}.")
    leaves, _ = named_leaves(stacked)
    counts = chunks if isinstance(chunks, Mapping) else dict.fromkeys(leaves, chunks)
    unknown = sorted(set(counts) - set(leaves))
    if unknown:
        raise ValueError(f"expert_coefficients: there are no leaves {unknown}, only {sorted(leaves)}.")
    raw = np.log(start) - np.log1p(-start)
    return {name: jnp.full((leaves[name].shape[0], n), raw, jnp.float32) for name, n in counts.items() if n > 0}


def chunk_importance(coefficients: Mapping[str, Any], stacked: Stacked) -> dict[str, float]:
    """How much each tensor matters in a merge that was learned: the mean factor times the length of the task vector, averaged
    over the experts, times the number of entries; all tensors together 1. Runs on the host.

    Args:
      coefficients: {leaf name: (K, chunks)}, before the sigmoid.
      stacked: task vectors, leaves (K, *shape).

    Raises:
      ValueError: coefficients of a leaf that is not there.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> stacked = {"w": jnp.ones((1, 4)), "b": jnp.ones((1, 1))}
      >>> importance = jm.params.chunk_importance(jm.params.expert_coefficients(stacked), stacked)
      >>> {name: round(v, 3) for name, v in importance.items()}
      {'b': 0.111, 'w': 0.889}

    Source: Expert Merging++ (arXiv:2509.25712); the official code takes the numbers of chunks as an argument.
    """
    leaves, _ = named_leaves(stacked)
    unknown = sorted(set(coefficients) - set(leaves))
    if unknown:
        raise ValueError(f"chunk_importance: there are no leaves {unknown}, only {sorted(leaves)}.")

    def one(raw, x):
        factor = jnp.mean(jax.nn.sigmoid(jnp.asarray(raw, jnp.float32)), axis=1)
        length = jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=tuple(range(1, x.ndim))))
        return float(jnp.mean(factor * length)) * x[0].size

    found = {name: one(raw, leaves[name]) for name, raw in coefficients.items()}
    whole = sum(found.values())
    return {name: v / whole if whole else 1 / len(found) for name, v in found.items()}


def allocate_chunks(
    importance: Mapping[str, float], budget: int, *, least: int = 1, most: int | Mapping[str, int] | None = None
) -> dict[str, int]:
    """Hand out a number of chunks in proportion to importance: the next goes where there is most of it per chunk.

    Args:
      importance: {leaf name: importance}, none negative.
      budget: how many chunks, all leaves together.
      least: how many each leaf has at least; 0 leaves the least important without (they keep the factor `rest`).
      most: how many a leaf has at most, or {leaf name: so many}; None is the budget.

    Law:
      The more important leaf never has fewer, up to `most`; they are `budget` in all, if `most` admits it.

    Raises:
      ValueError: a budget that is not enough for `least`; a negative importance.

    Example:
      >>> import jaxmerge as jm
      >>> jm.params.allocate_chunks({"q": 0.6, "up": 0.3, "norm": 0.1}, 10)
      {'q': 6, 'up': 3, 'norm': 1}

    Source: Expert Merging++ (arXiv:2509.25712) gives more chunks to the more important; the rule here is D'Hondt's.
    """
    if budget < least * len(importance) or least < 0:
        raise ValueError(f"allocate_chunks: {budget} chunks are not enough for {least} in each of {len(importance)} leaves.")
    negative = {name: v for name, v in importance.items() if not v >= 0}
    if negative:
        raise ValueError(f"allocate_chunks: importance must not be negative; got {negative}.")
    limit = most if isinstance(most, Mapping) else dict.fromkeys(importance, budget if most is None else most)
    chunks = dict.fromkeys(importance, least)
    order = {name: i for i, name in enumerate(importance)}
    heap = [(-v / (least + 1), order[name], name) for name, v in importance.items() if least < limit[name]]
    heapq.heapify(heap)
    for _ in range(budget - least * len(importance)):
        if not heap:
            break
        _, _, name = heapq.heappop(heap)
        chunks[name] += 1
        if chunks[name] < limit[name]:
            heapq.heappush(heap, (-importance[name] / (chunks[name] + 1), order[name], name))
    return chunks


def distillation(
    teacher: Float[Array, "*batch classes"], student: Float[Array, "*batch classes"], temperature: float = 3.0
) -> Float[Array, ""]:
    """The cross-entropy of the student's predictions under the teacher's, both softened, times the square of the temperature.

    Args:
      teacher, student: logits.
      temperature: what the logits are divided by.

    Law:
      Least where the student's predictions are the teacher's; its gradient is then 0.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> round(jm.params.distillation(jnp.zeros((2, 4)), jnp.zeros((2, 4)), temperature=2.0).item(), 4)  # 4 log 4
      5.5452

    Source: Expert Merging (arXiv:2509.25712), temperature 3; Distilling the knowledge in a neural network (arXiv:1503.02531).
    """
    soft = lambda x: x.astype(jnp.float32) / temperature
    return -(temperature**2) * jnp.mean(jnp.sum(jax.nn.softmax(soft(teacher)) * jax.nn.log_softmax(soft(student)), axis=-1))


def hidden_mse(teacher: Sequence[Float[Array, "..."]], student: Sequence[Float[Array, "..."]]) -> Float[Array, ""]:
    """The mean squared difference of two models' hidden states, averaged over the layers that are compared.

    Args:
      teacher, student: the states of as many layers, of equal shapes.

    Raises:
      ValueError: no layers, or not as many of both.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.params.hidden_mse([jnp.zeros(2), jnp.zeros(2)], [jnp.ones(2), jnp.full(2, 2.0)]).item()
      2.5

    Source: Expert Merging (arXiv:2509.25712), which adds 0.1 of it.
    """
    if not teacher or len(teacher) != len(student):
        raise ValueError(f"hidden_mse: pass the states of as many layers of both; got {len(teacher)} and {len(student)}.")
    wide = lambda x: x.astype(jnp.float32)
    return jnp.mean(jnp.stack([jnp.mean((wide(a) - wide(b)) ** 2) for a, b in zip(teacher, student, strict=True)]))


def drift(coefficients: Mapping[str, Any], start: float = 0.1) -> Float[Array, ""]:
    """How far the factors have moved from where they started: the mean over all pieces of the sum over the experts.

    Args:
      coefficients: {leaf name: (K, chunks)}, before the sigmoid.
      start: the factor that they started from.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.params.drift({"w": jnp.zeros((2, 3))}, start=0.25).item()
      0.5

    Source: Expert Merging (arXiv:2509.25712), which adds 0.1 of it (`fit`'s `regularizer`).
    """
    moved = [jnp.abs(jax.nn.sigmoid(jnp.asarray(raw, jnp.float32)) - start) for raw in coefficients.values()]
    return jnp.sum(jnp.stack([jnp.sum(m) for m in moved])) / sum(m.shape[1] for m in moved)
