"""Whoever merges must see all of a sequence: one that is split over a mesh is refused in one sentence that says what to do."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jaxmerge as jm

t = jm.tokens
MESH = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
SPLIT = r"^{name}: .*is split along its positions, over mesh axis 'model'.* jax\.reshard\(x, jax\.P\('data',"


def put(*shape: int, at: int, dtype=jnp.float32) -> jax.Array:
    """Ones on the mesh, split over `data` along the first axis and over `model` along another."""
    spec = ["data"] + [None] * (len(shape) - 1)
    spec[at] = "model"
    return jax.device_put(jnp.ones(shape, dtype), NamedSharding(MESH, P(*spec)))


X, SCORE = put(4, 16, 4, at=1), put(4, 16, at=1)
WHOLE = jax.device_put(jnp.ones((4, 16, 4)), NamedSharding(MESH, P("data")))
ROWS, MASK, GROUPS = put(4, 3, 16, at=2), put(4, 16, at=1, dtype=bool), put(4, 16, at=1, dtype=jnp.int32)
MAP, HEADS, FRAMES = put(4, 16, 16, at=2), put(4, 2, 16, 16, at=2), put(4, 2, 16, 4, at=2)
PLAN, SIDES = jm.Plan(GROUPS, 3), np.arange(4)

CALLS = {
    "bipartite_matching": lambda: t.bipartite_matching(X, 3),
    "merge_step": lambda: t.merge_step(X, X, 3),
    "kth_bipartite_matching": lambda: t.kth_bipartite_matching(X, 4),
    "random_bipartite_matching": lambda: t.random_bipartite_matching(X, 3, jax.random.key(0)),
    "two_sided_matching": lambda: t.two_sided_matching(X, SIDES, SIDES + 8),
    "grid_matching": lambda: t.grid_matching(X, 3, grid=(4, 4)),
    "energy_matching": lambda: t.energy_matching(X, 3, margin=0.5),
    "energy": lambda: t.energy(X, 0.5),
    "threshold_matching": lambda: t.threshold_matching(X, 0.5, 8),
    "matching_threshold": lambda: t.matching_threshold(X, 3),
    "earlier_matching": lambda: t.earlier_matching(X, 0.5, 8),
    "clip_matching": lambda: t.clip_matching(FRAMES, 3),
    "in_rounds": lambda: t.in_rounds(t.bipartite_matching, X, [3, 2]),
    "local_matching": lambda: t.local_matching(X, 3, window=4),
    "block_matching": lambda: t.block_matching(X, 1, block=8),
    "adjacent_matching": lambda: t.adjacent_matching(X, 3),
    "trajectory_matching": lambda: t.trajectory_matching(FRAMES, grid=(4, 4), window=1),
    "keep": lambda: t.keep(MASK, 8),
    "keep_top_k": lambda: t.keep_top_k(SCORE, 8),
    "pack": lambda: t.pack(MASK, X, 8),
    "ranks": lambda: t.ranks(SCORE),
    "hiprune": lambda: t.hiprune(SCORE, SCORE, 8, width=4),
    "flow_cut": lambda: t.flow_cut(SCORE, 4, 8),
    "page_rank": lambda: t.page_rank(HEADS),
    "page_rank_pruning": lambda: t.page_rank_pruning(HEADS, 8),
    "dominant_and_contextual": lambda: t.dominant_and_contextual(SCORE, X, 4, 4),
    "representatives": lambda: t.representatives(SCORE, 4, 4),
    "redundant": lambda: t.redundant(X),
    "sample_by_correlation": lambda: t.sample_by_correlation(SCORE, X, 8),
    "local_outlier_factor": lambda: t.local_outlier_factor(X),
    "recover": lambda: t.recover(SCORE, SCORE, X, 8),
    "prune_and_merge": lambda: t.prune_and_merge(SCORE, X, 9, 5),
    "merged_similarity": lambda: t.merged_similarity(SCORE, X, 9, 5),
    "assign": lambda: t.assign(X, MASK, 8),
    "exit_plan": lambda: t.exit_plan(jnp.ones(4, bool), MASK, 8),
    "density_peaks": lambda: t.density_peaks(X, 3),
    "density_centers": lambda: t.density_centers(X, 3),
    "nearest_center": lambda: t.nearest_center(X, MASK, 3),
    "frame_similarity": lambda: t.frame_similarity(put(4, 2, 16, 4, at=1)),
    "static_windows": lambda: t.static_windows(ROWS),
    "static_merging": lambda: t.static_merging(FRAMES),
    "holitom": lambda: t.holitom(FRAMES, put(4, 2, 16, at=2), ratio=0.5),
    "attention_and_density": lambda: t.attention_and_density(X, SCORE, 3, 2),
    "attention_and_similarity": lambda: t.attention_and_similarity(X, SCORE, 3),
    "attention_inhibition": lambda: t.attention_inhibition(put(4, 3, 3, at=0), ROWS, 2),
    "center_weight": lambda: t.center_weight(PLAN, MASK, 0.5),
    "k_means": lambda: t.k_means(X, 3),
    "adaptive_k_means": lambda: t.adaptive_k_means(X, (2, 3)),
    "silhouette": lambda: t.silhouette(X, PLAN),
    "inertia": lambda: t.inertia(X, PLAN),
    "primary_and_clusters": lambda: t.primary_and_clusters(X, SCORE, 3, 2),
    "members": lambda: t.members(PLAN, 2),
    "carry_positions": lambda: t.carry_positions(PLAN, X, 2),
    "in_order": lambda: t.in_order(PLAN),
    "keep_apart": lambda: t.keep_apart(PLAN, MASK, 3),
    "propagate": lambda: t.propagate(PLAN, MAP),
    "subgraph": lambda: t.subgraph(PLAN, MAP),
    "token_graph": lambda: t.token_graph(X, grid=(4, 4)),
    "attention_score": lambda: t.attention_score(HEADS),
    "token_transform": lambda: t.token_transform(X, PLAN),
    "soft_gather": lambda: t.soft_gather(ROWS),
    "saliency_gather": lambda: t.saliency_gather(ROWS, ROWS, SCORE),
    "frame_attention": lambda: t.frame_attention(X, X),
    "grid_pool": lambda: t.grid_pool((4, 4), (2, 2), like=X),
    "matryoshka_pool": lambda: t.matryoshka_pool((4, 4), 4, like=X),
    "sequence_pool": lambda: t.sequence_pool(16, 4, like=X),
    "temporal_pairs": lambda: t.temporal_pairs(16, like=X),
    "space_to_depth": lambda: t.space_to_depth(X, (4, 4), 2),
    "depth_to_space": lambda: t.depth_to_space(X, (8, 8), 2),
    "from_groups": lambda: t.from_groups(GROUPS, 3),
    "bind": lambda: t.bind(GROUPS),
    "bind_attributes": lambda: t.bind_attributes(GROUPS, MASK),
    "nearest": lambda: t.nearest(WHOLE, X),
    "negative_merge": lambda: t.negative_merge(X, WHOLE),
    "sparsify": lambda: t.sparsify(MAP, 0.5),
    "merge": lambda: jm.merge(PLAN, X),
    "unmerge": lambda: jm.unmerge(PLAN, WHOLE),
    "compose": lambda: jm.compose(PLAN, PLAN),
    "sizes": lambda: PLAN.sizes,
    "from_parents": lambda: jm.from_parents(GROUPS, 3),
    "identity": lambda: jm.identity(16, like=X),
}
ANOTHERS_NAME = {  # what is called by several, or calls another at once, is named after whom it asks
    "adaptive_k_means": "k_means", "density_peaks": "density_centers", "merged_similarity": "prune_and_merge",
    "grid_pool": "pooling", "matryoshka_pool": "pooling", "sequence_pool": "pooling", "temporal_pairs": "pooling",
}  # fmt: skip
NO_SEQUENCE = {  # numbers of layers and rates, what is over other axes, and what each position computes by itself
    "exit_layer", "flow_budget", "flow_layers", "flow_score", "halvings", "head_mean", "keep_schedule", "linear_decay",
    "margins", "rope_positions", "schedule", "visible_layers",
}  # fmt: skip


def test_no_function_is_forgotten():
    public = {name for name, f in vars(t).items() if inspect.isfunction(f)}
    assert public == (CALLS.keys() & vars(t).keys() | NO_SEQUENCE)


@pytest.mark.parametrize("name", CALLS)
def test_refused_in_words(name, unchecked):
    """Under jit, where nobody can look at an array; no error of JAX's own comes first."""
    with jax.set_mesh(MESH), pytest.raises(ValueError, match=SPLIT.format(name=ANOTHERS_NAME.get(name, name))):
        jax.eval_shape(CALLS[name])


@pytest.mark.parametrize(
    "f",
    [
        lambda: t.flow_score(SCORE, SCORE, X),
        lambda: t.flow_budget(SCORE, 1, 4),
        lambda: t.visible_layers(jnp.ones(4, jnp.int32), MASK, 2),
        lambda: jm.merge(jm.SoftPlan(ROWS), WHOLE),
        lambda: jm.unmerge(jm.SoftPlan(ROWS), WHOLE[:, :3]),
    ],
)
def test_what_needs_no_whole_sequence_asks_for_none(f, unchecked):
    with jax.set_mesh(MESH):
        jax.eval_shape(f)
