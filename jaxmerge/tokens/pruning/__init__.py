"""Ranking and pruning: which tokens may go, and who takes in what they held?"""

from jaxmerge.tokens.pruning._assign import assign as assign
from jaxmerge.tokens.pruning._correlation import redundant as redundant, sample_by_correlation as sample_by_correlation
from jaxmerge.tokens.pruning._dominant import (
    dominant_and_contextual as dominant_and_contextual,
    representatives as representatives,
)
from jaxmerge.tokens.pruning._exit import exit_layer as exit_layer, exit_plan as exit_plan, visible_layers as visible_layers
from jaxmerge.tokens.pruning._flow import (
    flow_budget as flow_budget,
    flow_cut as flow_cut,
    flow_layers as flow_layers,
    flow_score as flow_score,
)
from jaxmerge.tokens.pruning._hiprune import hiprune as hiprune
from jaxmerge.tokens.pruning._page_rank import (
    linear_decay as linear_decay,
    page_rank as page_rank,
    page_rank_pruning as page_rank_pruning,
)
from jaxmerge.tokens.pruning._prune import Packed as Packed, keep as keep, keep_top_k as keep_top_k, pack as pack
from jaxmerge.tokens.pruning._recover import local_outlier_factor as local_outlier_factor, recover as recover
from jaxmerge.tokens.pruning._tail import merged_similarity as merged_similarity, prune_and_merge as prune_and_merge
