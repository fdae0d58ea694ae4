"""Clustering: which tokens lie around one centre?"""

from jaxmerge.tokens.clustering._density import (
    density_centers as density_centers,
    density_peaks as density_peaks,
    in_order as in_order,
    keep_apart as keep_apart,
    nearest_center as nearest_center,
)
from jaxmerge.tokens.clustering._holitom import (
    Weighted as Weighted,
    attention_and_density as attention_and_density,
    attention_and_similarity as attention_and_similarity,
    center_weight as center_weight,
    holitom as holitom,
)
from jaxmerge.tokens.clustering._k_means import (
    adaptive_k_means as adaptive_k_means,
    inertia as inertia,
    k_means as k_means,
    silhouette as silhouette,
)
from jaxmerge.tokens.clustering._members import (
    carry_positions as carry_positions,
    members as members,
    rope_positions as rope_positions,
)
from jaxmerge.tokens.clustering._primary import (
    attention_inhibition as attention_inhibition,
    primary_and_clusters as primary_and_clusters,
)
from jaxmerge.tokens.clustering._static import (
    Windows as Windows,
    frame_similarity as frame_similarity,
    static_merging as static_merging,
    static_windows as static_windows,
)
