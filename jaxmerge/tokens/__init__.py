"""Pillar 1: which tokens become one? Every planner is a pure function that returns a `Plan` or a `SoftPlan`."""

from jaxmerge.tokens._bipartite import bipartite_matching as bipartite_matching, schedule as schedule
from jaxmerge.tokens._density import (
    density_centers as density_centers,
    density_peaks as density_peaks,
    in_order as in_order,
    keep_apart as keep_apart,
    nearest_center as nearest_center,
)
from jaxmerge.tokens._frame_attention import frame_attention as frame_attention
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
from jaxmerge.tokens._members import carry_positions as carry_positions, members as members, rope_positions as rope_positions
from jaxmerge.tokens._nearest import Nearest as Nearest, nearest as nearest
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
from jaxmerge.tokens._saliency import saliency_gather as saliency_gather, soft_gather as soft_gather
from jaxmerge.tokens._static import (
    Windows as Windows,
    frame_similarity as frame_similarity,
    static_merging as static_merging,
    static_windows as static_windows,
)
from jaxmerge.tokens._transform import token_transform as token_transform
