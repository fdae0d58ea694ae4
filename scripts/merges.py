"""Every merge of K experts into one model, or into one per task, at its defaults: what `scripts.compare_merges` compares.

`MERGES` maps what there is, a `Given`, to parameters, or to a list of them, one per task, where the merge keeps something of
each. Kernels are Flax's, (inputs, outputs): what reads a matrix as PyTorch has it is told so. Left out
are merges of two models (slerp and nuslerp, whose kin for more are multislerp and karcher; arcee_fusion, nearswap,
layer_swapping, pleas), of one or of one run (passthrough, update_selective, window_average), and of adapters (concatenate).
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import jaxmerge as jm
from scripts.experts import Head, Network, Params, cross_entropy, named, stacked
from scripts.tasks import Split

p = jm.params


@dataclasses.dataclass(frozen=True)
class Given:
    """What a merge may look at.

    Attributes:
      inputs: unlabelled inputs of each task.
      labelled: a few examples of each task with labels.
      grams, information: of each expert on its own task, for RegMean and for Fisher.
      steps, batch: how long coefficients are learned, and on how many inputs of each task at a time.
    """

    network: Network
    base: Params
    experts: list[Params]
    heads: list[Head]
    inputs: list[np.ndarray]
    labelled: list[Split]
    grams: list[dict]
    information: list[dict]
    steps: int = 300
    batch: int = 16
    seed: int = 0

    def of(self, tasks: list[int]) -> "Given":
        """The same for some of the tasks."""
        parts = ("experts", "heads", "inputs", "labelled", "grams", "information")
        return dataclasses.replace(self, **{part: [getattr(self, part)[k] for k in tasks] for part in parts})

    @property
    def vectors(self) -> Any:
        return p.task_vectors(self.base, self.experts)


Merged = Params | list[Params]


@dataclasses.dataclass(frozen=True)
class Merge:
    """A name, a family to stand in, and what it does; `own`: one model per task comes out."""

    name: str
    family: str
    work: Callable[[Given], Merged]
    own: bool = False


def chain_of(make: Callable[[Given], p.MergeTransform]) -> Callable[[Given], Merged]:
    """A transform of task vectors."""
    return lambda given: p.merge(make(given), given.base, given.experts)


def flat(make: Callable[[Given], p.MergeTransform]) -> Callable[[Given], Merged]:
    """A transform that looks at entries alone or at the whole model: on one vector of all leaves, which is a small program."""

    def work(given):
        base, back = ravel_pytree(given.base)
        return back(p.merge(make(given), base, [ravel_pytree(e)[0] for e in given.experts]))

    return work


def baseless(tx: p.MergeTransform) -> Callable[[Given], Merged]:
    """A transform of the models themselves."""
    return lambda given: p.merge(tx, None, given.experts)


# --- one per task ----------------------------------------------------------------------------------------------------


def emr(given: Given) -> Merged:
    masked = jax.jit(p.emr)(given.vectors)
    return [p.add(given.base, masked.task(k)) for k in range(len(given.experts))]


def tall_masks(given: Given) -> Merged:
    """Each task's mask over the sum of the task vectors."""
    vectors = given.vectors
    tx = p.sum_experts()
    merged = tx.merge(tx.match(vectors), vectors)
    masks = jax.jit(p.tall_masks)(vectors, merged)
    own = lambda k: jax.tree.map(lambda m, t: jnp.where(m[k : k + 1], t, 0), masks, merged)
    return [p.add(given.base, own(k)) for k in range(len(given.experts))]


def tsv_compress(given: Given) -> Merged:
    """Each task by the leading singular vectors that are its share of the rank."""
    own = p.dense(p.tsv_compress(given.vectors))
    return [p.add(given.base, jax.tree.map(lambda t, k=k: t[k : k + 1], own)) for k in range(len(given.experts))]


def twin(given: Given) -> Merged:
    """A router that knows the task: all weight on its expert."""
    shared, own = p.twin_split(given.vectors)
    ones = jnp.eye(len(given.experts))
    return [p.add(given.base, p.twin_serve(shared, own, ones[k])) for k in range(len(given.experts))]


# --- learned ---------------------------------------------------------------------------------------------------------


def batches(given: Given, parts: list[tuple[np.ndarray, ...]]) -> Iterable[tuple[jax.Array, ...]]:
    """`batch` examples of every task, (K, batch, ...), step by step."""
    rng = np.random.default_rng((given.seed, 6))
    least = min(len(task[0]) for task in parts)
    for _ in range(given.steps):
        at = rng.integers(0, least, (len(parts), given.batch))
        yield tuple(jnp.stack([a[i] for a, i in zip(arrays, at, strict=True)]) for arrays in zip(*parts, strict=True))


def learned(given: Given, loss: Callable, transform: Callable, start: Any, *, parts: list, **how: Any) -> Merged:
    """Descend `loss(logits, *labels)` of the merged model on all tasks; coefficients start at `start`."""
    heads = stacked(given.heads)
    logits = jax.vmap(given.network.logits, (None, 0, 0))
    found, _ = p.fit(
        lambda model, batch: loss(logits(model, heads, batch[0]), *batch[1:]), transform, start,
        base=given.base, models=given.experts, batches=batches(given, parts), **how,
    )  # fmt: skip
    return p.merge(transform(found), given.base, given.experts)


def adamerging(given: Given) -> Merged:
    """One coefficient per task and tensor, from 0.3, by the entropy of the predictions. (Ten times the rate collapses them.)"""
    start = {name: jnp.full(len(given.experts), 0.3) for name in named(given.base)}
    return learned(given, p.entropy, p.adamerging, start, parts=[(x,) for x in given.inputs], optimizer=optax.adam(1e-3))


def expert_merging(given: Given) -> Merged:
    """One coefficient per task and tensor, from 0.1, by the experts' soft labels; hidden states are not compared."""
    answer = jax.jit(given.network.logits)
    seen = zip(given.inputs, given.experts, given.heads, strict=True)
    taught = [(x, np.asarray(answer(expert, head, x))) for x, expert, head in seen]
    loss = lambda logits, teacher: p.distillation(teacher, logits)
    start = p.expert_coefficients(given.vectors)
    pull = lambda raw: 0.1 * p.drift(raw)
    return learned(given, loss, p.expert_merging, start, parts=taught, optimizer=optax.adam(3e-2), regularizer=pull)


def self_positioning(given: Given) -> Merged:
    """A direction and a size, by cross-entropy on the few labelled examples."""
    start = (jnp.zeros(len(given.experts)), jnp.float32(1.0))
    parts, transform = [tuple(s) for s in given.labelled], lambda c: p.self_positioning(*c)
    return learned(given, cross_entropy, transform, start, parts=parts, optimizer=optax.adam(5e-2))


MERGES = [
    Merge("linear", "average", flat(lambda g: p.linear())),
    Merge("multislerp", "average", baseless(p.multislerp())),
    Merge("karcher", "average", baseless(p.karcher())),
    Merge("model_stock", "average", chain_of(lambda g: p.model_stock())),
    Merge("task_arithmetic", "task vectors", flat(lambda g: p.task_arithmetic())),
    Merge("ties", "task vectors", flat(lambda g: p.ties())),
    Merge("dare_linear", "task vectors", flat(lambda g: p.dare_linear(seed=g.seed))),
    Merge("dare_ties", "task vectors", flat(lambda g: p.dare_ties(seed=g.seed))),
    Merge("breadcrumbs", "task vectors", chain_of(lambda g: p.breadcrumbs())),
    Merge("breadcrumbs_ties", "task vectors", chain_of(lambda g: p.breadcrumbs_ties())),
    Merge("della", "task vectors", chain_of(lambda g: p.della(seed=g.seed))),
    Merge("della_linear", "task vectors", chain_of(lambda g: p.della_linear(seed=g.seed))),
    Merge("magmax", "task vectors", flat(lambda g: p.magmax())),
    Merge("pcb", "task vectors", flat(lambda g: p.pcb())),
    Merge("consensus", "task vectors", flat(lambda g: p.consensus())),
    Merge("sce", "task vectors", chain_of(lambda g: p.sce())),
    Merge("varm", "task vectors", chain_of(lambda g: p.varm())),
    Merge("ram", "task vectors", chain_of(lambda g: p.ram())),
    Merge("ramplus_tl", "task vectors", chain_of(lambda g: p.ramplus_tl())),
    Merge("widen", "task vectors", lambda g: p.merge(p.widen(axis=1), None, [g.base, *g.experts])),
    Merge("tsvm", "spectral", chain_of(lambda g: p.tsvm())),
    Merge("r_tsvm", "spectral", chain_of(lambda g: p.r_tsvm())),
    Merge("iso_c", "spectral", chain_of(lambda g: p.iso_c())),
    Merge("iso_cts", "spectral", chain_of(lambda g: p.iso_cts())),
    Merge("knots(ties)", "spectral", chain_of(lambda g: p.knots(p.ties(scope="tensor"), axis=0))),
    Merge("wudi", "spectral", chain_of(lambda g: p.wudi(axis=0))),
    Merge("fisher", "data", lambda g: p.merge(p.fisher(g.information), None, g.experts)),
    Merge("regmean", "data", lambda g: p.merge(p.regmean(g.grams), None, g.experts)),
    Merge("adamerging", "learned", adamerging),
    Merge("expert_merging", "learned", expert_merging),
    Merge("self_positioning", "learned", self_positioning),
    Merge("emr", "one per task", emr, own=True),
    Merge("tall_masks", "one per task", tall_masks, own=True),
    Merge("tsv_compress", "one per task", tsv_compress, own=True),
    Merge("twin_merging", "one per task", twin, own=True),
]
