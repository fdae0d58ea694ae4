"""Every reduction that applies to a Vision Transformer, as a planner: from what a block has `Seen` and r to a plan.

`REDUCTIONS` is what `scripts.compare_reductions` compares. All of them keep the class token at position 0 and leave n - r
tokens, so that budgets are equal. Those that need a whole grid reduce once, after the first block; Token Merging does both.
Left out are planners whose length depends on the image (DyMU, FlowCut's budget, TokenCorrCompressor), which at an equal budget
are the fixed ones beside them; and those of video, prompts and language models.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

import jaxmerge as jm
from models.vit import Planner, Seen, token_merging


@dataclasses.dataclass(frozen=True)
class Reduction:
    """A planner, and how its plan is applied.

    Attributes:
      once: it reduces after the first block alone, by as many tokens as the others take in all of them.
      reduce: "sum" for soft plans whose rows are applied as they are.
      proportional: whether merged tokens weigh log size in the attention that follows.
    """

    name: str
    family: str
    planner: Planner
    once: bool = False
    reduce: Literal["mean", "sum"] = "mean"
    proportional: bool = True


tokens = jm.tokens


def with_class(plan: jm.Plan) -> jm.Plan:
    """A plan over the patches, with the class token in front, in a segment of its own."""
    ids = plan.segment_ids
    return jm.Plan(jnp.concatenate([0 * ids[:, :1], jnp.where(ids < 0, ids, ids + 1)], axis=1), plan.num_segments + 1)


def score(seen: Seen) -> Array:
    """(b, n): how much the class token looks at each token; most of all at itself, as far as planners are told."""
    return seen.attention[:, :, 0].mean(axis=1).at[:, 0].set(jnp.inf)


def received(seen: Seen) -> Array:
    """(b, n - 1): how much attention each patch receives from all."""
    return seen.attention.mean(axis=(1, 2))[:, 1:]


def left(seen: Seen, r: int) -> int:
    """How many tokens stay."""
    return seen.x.shape[1] - r


def grid(seen: Seen) -> tuple[int, int]:
    """Of the patches, while none has merged."""
    side = round((seen.x.shape[1] - 1) ** 0.5)
    return side, side


def random_score(seen: Seen) -> Array:
    """A number per token that has nothing to do with the image: the control."""
    return jax.random.uniform(jax.random.key(seen.x.shape[1]), seen.x.shape[:2]).at[:, 0].set(jnp.inf)


def flow(seen: Seen) -> Array:
    """FlowCut's score of the patches, in one layer."""
    value = seen.v.astype(jnp.float32)
    affinity = jax.nn.softmax(jnp.einsum("bhf,bnhf->bhn", value[:, 0], value) / value.shape[-1] ** 0.5, axis=-1).mean(axis=1)
    attention = seen.attention[:, :, 0].mean(axis=1)
    return tokens.flow_score(attention[:, 1:], affinity[:, 1:], value.mean(axis=2)[:, 1:])


def propagated(seen: Seen, r: int) -> jm.SoftPlan:
    """GTP-ViT, its graph built again from the tokens that are left."""
    importance = tokens.attention_score(seen.attention, "MixedAttnMax")
    keep = tokens.keep_top_k(importance.at[:, 0].set(jnp.inf), left(seen, r))
    return tokens.propagate(keep, tokens.token_graph(seen.x, neighbors=8, prefix=1), alpha=0.2)


def pooled(seen: Seen, r: int) -> jm.Plan | jm.SoftPlan:
    """Average pooling of the grid to a smaller square, the class token left in front."""
    side = round((left(seen, r) - 1) ** 0.5)
    if side * side + 1 != left(seen, r):
        raise ValueError(f"grid pooling: {left(seen, r) - 1} patches are no square; choose r accordingly.")
    matrix = tokens.grid_pool(grid(seen), (side, side), like=seen.x[:, 1:]).matrix.astype(jnp.float32)
    return jm.SoftPlan(jnp.pad(matrix, ((0, 0), (1, 0), (1, 0))).at[:, 0, 0].set(1.0))


def patches(f: Callable[[Any, int], jm.Plan]) -> Planner:
    """A planner of the patches alone, from what was seen and how many to leave."""
    return lambda seen, r: with_class(f(seen, left(seen, r) - 1))


REDUCTIONS = [
    Reduction("ToMe", "matching", token_merging),
    Reduction("PiToMe", "matching", lambda s, r: tokens.energy_matching(s.keys, r, margin=0.5, protect=(0,))),
    Reduction("PiToMe, all tokens", "matching",
              lambda s, r: tokens.energy_matching(s.keys, r, margin=0.5, protect=(0,), split="all")),
    Reduction("local matching (MergeDNA)", "matching", lambda s, r: tokens.local_matching(s.keys, r, window=14, protect=(0,))),
    Reduction("neighbours (MAELRE)", "matching", lambda s, r: tokens.adjacent_matching(s.keys, r, protect=(0,))),
    Reduction("random sources", "matching",
              lambda s, r: tokens.random_bipartite_matching(s.keys, r, jax.random.key(r), protect=(0,))),
    Reduction("class attention (EViT)", "pruning", lambda s, r: tokens.keep_top_k(score(s), left(s, r))),
    Reduction("FlowCut", "pruning", patches(lambda s, k: tokens.keep_top_k(flow(s), k))),
    Reduction("PageRank (AIM)", "pruning", lambda s, r: tokens.page_rank_pruning(
        jnp.log(s.attention), left(s, r) - 1, protect=jnp.zeros(s.x.shape[:2], bool).at[:, 0].set(True), capacity=left(s, r))),
    Reduction("HiPrune, one layer", "pruning",
              patches(lambda s, k: tokens.hiprune(received(s), received(s), k, width=grid(s)[1])), once=True),
    Reduction("random", "pruning", lambda s, r: tokens.keep_top_k(random_score(s), left(s, r))),
    Reduction("DiffRate, half and half", "prune and merge",
              lambda s, r: tokens.prune_and_merge(score(s), s.x, left(s, r // 2), left(s, r), protect=(0,))),
    Reduction("VisionZip", "prune and merge",
              lambda s, r: tokens.dominant_and_contextual(score(s), s.keys, left(s, r) - left(s, r) // 4, left(s, r) // 4)),
    Reduction("VMTC", "prune and merge",
              patches(lambda s, k: tokens.primary_and_clusters(s.x[:, 1:], score(s)[:, 1:], k // 2, k - k // 2))),
    Reduction("kept and nearest", "prune and merge",
              lambda s, r: tokens.assign(s.keys, tokens.ranks(score(s)) < left(s, r), left(s, r))),
    Reduction("density peaks (DPC-KNN)", "clustering", patches(lambda s, k: tokens.density_peaks(s.x[:, 1:], k))),
    Reduction("k-means", "clustering", patches(lambda s, k: tokens.k_means(s.x[:, 1:], k))),
    Reduction("GTP-ViT", "soft", propagated, reduce="sum"),
    Reduction("Token Transforming", "soft",
              lambda s, r: tokens.token_transform(s.x, tokens.keep_top_k(score(s), left(s, r)), temperature=0.1)),
    Reduction("ToMe, at once", "at once", token_merging, once=True),
    Reduction("grid (tomesd)", "at once",
              lambda s, r: with_class(tokens.grid_matching(s.keys[:, 1:], r, grid=grid(s))), once=True),
    Reduction("average pooling", "at once", pooled, once=True),
    Reduction("sequence pooling", "at once", patches(
        lambda s, k: tokens.sequence_pool(s.x.shape[1] - 1, k, like=s.x[:, 1:])), once=True),
]  # fmt: skip
