"""Adapters by any method: their updates are merged as the dense matrices they are, and taken apart again to a rank.

A sum of updates has the sum of their ranks at most (`concatenated`, exact); signs elected entry by entry make any rank. So a
rank is chosen, each merged update becomes the nearest of that rank (randomized subspace iteration), and how near is measured on
what was written.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.checkpoint import Derived, Leaf, Source, derived, renamed
from jaxmerge.checkpoint._journal import fingerprint, pack
from jaxmerge.checkpoint._source import digest
from jaxmerge.params._partition import inner_steps, run, settings_of
from jaxmerge.params.spectral._sketch import leading
from jaxmerge.recipe._adapters import Adapted, Update, as_weights, of_ranks, updates
from jaxmerge.recipe._schema import Path, Reference
from jaxmerge.recipe._tokenizer import side_json
from jaxmerge.recipe._transform import Work

BASE = Reference(Path("what the adapters were trained on"))
"""The base of task vectors that are updates: it changed nothing."""
OVERSAMPLE, ITERATIONS = 16, 4


class LowRank(NamedTuple):
    """What becomes of adapters.

    Attributes:
      source: the adapter to be, whose factors are computed as they are read.
      config: its adapter_config.json.
      merged: weight -> its merged update, dense.
      low: {weight: its update in the adapter to be}.
      bytes: what one weight takes in memory while it is merged, at the most.
    """

    source: Source
    config: dict[str, Any]
    merged: Callable[[str], np.ndarray]
    low: dict[str, Update]
    bytes: int


def dense(adapters: Mapping[Any, Source]) -> dict[Any, Source]:
    """Each adapter's updates as the weights of a model that is zero without it; under `BASE` that model."""
    zeros = as_weights(adapters)
    found: dict[Any, Source] = {key: Adapted(zeros[key], adapter, updates(adapter)) for key, adapter in adapters.items()}
    return found | {BASE: next(iter(zeros.values()))}


def low_rank(adapters: Mapping[Any, Source], work: Work, rank: int | None, dtype: Any) -> LowRank:
    """Merge adapters as `work` merges their updates, and keep of each its leading singular vectors.

    Args:
      adapters: by reference.
      work: the transform, and `dense` sources.
      rank: what each update keeps; None: the largest rank of its inputs.
      dtype: of the factors; None: as the first adapter has them.

    Raises:
      ValueError: the transform needs a statistic of the whole model.
    """
    steps = inner_steps(work.tx, "adapters are merged one weight at a time")
    inputs = work.models if work.base is None else (work.base, *work.models)

    def merged(name: str) -> np.ndarray:
        read = [jnp.asarray(s.read(name), jnp.float32) for s in inputs]
        zero = 0.0 if work.base is None else read.pop(0)
        x = jnp.stack([m - zero for m in read])
        return np.asarray(zero + run(steps, settings_of(steps, name, x.shape), x)[0])

    def how(name: str, shape: tuple[int, ...]) -> str:
        return digest(fingerprint(steps), pack(list(settings_of(steps, name, (len(work.models), *shape)))))

    keep = jax.jit(leading("adapters", "randomized", OVERSAMPLE, ITERATIONS), static_argnums=1)
    low: dict[str, Update] = {}

    @functools.lru_cache(maxsize=1)  # the two factors of a weight are read one after the other
    def factors(name: str) -> tuple[np.ndarray, np.ndarray]:
        change, u = jnp.asarray(merged(name)), low[name]
        left, s, right = (v[0] for v in keep((change.T if u.turned else change)[None], u.rank))
        root = jnp.sqrt(s)
        return np.asarray(root[:, None] * right), np.asarray(left * root[None])

    leaves: dict[str, Derived] = {}
    pairs = [(adapter, updates(adapter)) for adapter in adapters.values()]
    size = 0
    for name in inputs[0].leaves:
        theirs = [(adapter, known[name]) for adapter, known in pairs if name in known]
        adapter, first = theirs[0]
        into, out = adapter.leaves[first.a].shape[1], adapter.leaves[first.b].shape[0]
        k = min(rank or max(u.rank for _, u in theirs), into, out)
        low[name] = first._replace(rank=k, scale=1.0)
        read = tuple((a, factor) for a, u in theirs for factor in (u.a, u.b))
        kind = np.dtype(jnp.dtype(dtype)) if dtype else adapter.leaves[first.b].dtype
        for i, (factor, shape) in enumerate(((first.a, (k, into)), (first.b, (out, k)))):
            note = f"{name} {'AB'[i]} {k} {how(name, inputs[0].leaves[name].shape)}"

            def one(*_: np.ndarray, name: str = name, i: int = i, kind: Any = kind) -> np.ndarray:
                return factors(name)[i].astype(kind)

            leaves[factor] = Derived(Leaf(shape, kind), read, one, note)
        size = max(size, 4 * into * out * (2 * len(inputs) + 3))
    ranks = {name.removesuffix(".weight"): u.rank for name, u in low.items()}
    first = next(iter(adapters.values()))
    config = side_json(first, "adapter_config.json") | of_ranks(ranks) | {"use_rslora": False, "inference_mode": True}
    view = renamed(derived(first, leaves), {n: n for n in leaves})
    return LowRank(view, config, merged, low, size)


def lost(made: LowRank, out: Source) -> dict[str, float]:
    """{weight: the norm of what the adapter that was written misses, over the norm of the merged update}."""
    found = {}
    for name, u in made.low.items():
        update = made.merged(name)
        a, b = (out.read(n).astype(np.float32) for n in (u.a, u.b))
        kept = (b @ a).T if u.turned else b @ a
        norm = float(np.linalg.norm(update))
        found[name] = float(np.linalg.norm(update - kept)) / norm if norm else 0.0
    return found


def said(found: Mapping[str, float]) -> str:
    """How much is lost, in words."""
    worst = max(found, key=found.__getitem__)
    mean = math.sqrt(math.fsum(v * v for v in found.values()) / len(found))
    return (
        f"of the merged updates the adapter misses {100 * mean:.3g} % (root mean square over {len(found)} weights), at most "
        f"{100 * found[worst]:.3g} %, of {worst}; a higher rank: misses less."
    )
