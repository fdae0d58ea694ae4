"""Pillar 1: which tokens become one? Every planner is a pure function that returns a `Plan` or a `SoftPlan`."""

from jaxmerge.tokens._assign import assign as assign
from jaxmerge.tokens._bipartite import bipartite_matching as bipartite_matching, schedule as schedule
from jaxmerge.tokens._clips import clip_matching as clip_matching
from jaxmerge.tokens._correlation import redundant as redundant, sample_by_correlation as sample_by_correlation
from jaxmerge.tokens._density import (
    density_centers as density_centers,
    density_peaks as density_peaks,
    in_order as in_order,
    keep_apart as keep_apart,
    nearest_center as nearest_center,
)
from jaxmerge.tokens._dominant import dominant_and_contextual as dominant_and_contextual, representatives as representatives
from jaxmerge.tokens._energy import energy as energy, energy_matching as energy_matching, margins as margins
from jaxmerge.tokens._exit import exit_layer as exit_layer, exit_plan as exit_plan, visible_layers as visible_layers
from jaxmerge.tokens._flow import (
    flow_budget as flow_budget,
    flow_cut as flow_cut,
    flow_layers as flow_layers,
    flow_score as flow_score,
)
from jaxmerge.tokens._frame_attention import frame_attention as frame_attention
from jaxmerge.tokens._grid import grid_matching as grid_matching
from jaxmerge.tokens._groups import bind as bind, bind_attributes as bind_attributes, from_groups as from_groups
from jaxmerge.tokens._guide import negative_merge as negative_merge
from jaxmerge.tokens._hiprune import hiprune as hiprune
from jaxmerge.tokens._holitom import (
    Weighted as Weighted,
    attention_and_density as attention_and_density,
    attention_and_similarity as attention_and_similarity,
    center_weight as center_weight,
    holitom as holitom,
)
from jaxmerge.tokens._k_means import (
    adaptive_k_means as adaptive_k_means,
    inertia as inertia,
    k_means as k_means,
    silhouette as silhouette,
)
from jaxmerge.tokens._kth import (
    kth_bipartite_matching as kth_bipartite_matching,
    random_bipartite_matching as random_bipartite_matching,
)
from jaxmerge.tokens._local import (
    adjacent_matching as adjacent_matching,
    block_matching as block_matching,
    local_matching as local_matching,
)
from jaxmerge.tokens._members import carry_positions as carry_positions, members as members, rope_positions as rope_positions
from jaxmerge.tokens._nearest import Nearest as Nearest, nearest as nearest
from jaxmerge.tokens._page_rank import (
    linear_decay as linear_decay,
    page_rank as page_rank,
    page_rank_pruning as page_rank_pruning,
)
from jaxmerge.tokens._pool import (
    grid_pool as grid_pool,
    matryoshka_pool as matryoshka_pool,
    sequence_pool as sequence_pool,
    temporal_pairs as temporal_pairs,
)
from jaxmerge.tokens._primary import (
    attention_inhibition as attention_inhibition,
    primary_and_clusters as primary_and_clusters,
)
from jaxmerge.tokens._propagate import (
    attention_score as attention_score,
    propagate as propagate,
    sparsify as sparsify,
    subgraph as subgraph,
    token_graph as token_graph,
)
from jaxmerge.tokens._prune import keep as keep, keep_top_k as keep_top_k
from jaxmerge.tokens._rank import ranks as ranks
from jaxmerge.tokens._recover import local_outlier_factor as local_outlier_factor, recover as recover
from jaxmerge.tokens._rounds import (
    halvings as halvings,
    head_mean as head_mean,
    in_rounds as in_rounds,
    keep_schedule as keep_schedule,
)
from jaxmerge.tokens._saliency import saliency_gather as saliency_gather, soft_gather as soft_gather
from jaxmerge.tokens._shuffle import depth_to_space as depth_to_space, space_to_depth as space_to_depth
from jaxmerge.tokens._static import (
    Windows as Windows,
    frame_similarity as frame_similarity,
    static_merging as static_merging,
    static_windows as static_windows,
)
from jaxmerge.tokens._tail import merged_similarity as merged_similarity, prune_and_merge as prune_and_merge
from jaxmerge.tokens._threshold import (
    RunningThreshold as RunningThreshold,
    earlier_matching as earlier_matching,
    matching_threshold as matching_threshold,
    threshold_matching as threshold_matching,
)
from jaxmerge.tokens._trajectory import trajectory_matching as trajectory_matching
from jaxmerge.tokens._transform import token_transform as token_transform
from jaxmerge.tokens._two_sided import two_sided_matching as two_sided_matching
