"""Pillar 1: which tokens become one? Every planner is a pure function that returns a `Plan` or a `SoftPlan`."""

from jaxmerge.tokens._bipartite import bipartite_matching as bipartite_matching, schedule as schedule
from jaxmerge.tokens._groups import bind as bind, bind_attributes as bind_attributes, from_groups as from_groups
from jaxmerge.tokens._guide import negative_merge as negative_merge
from jaxmerge.tokens._nearest import Nearest as Nearest, nearest as nearest
from jaxmerge.tokens._pool import (
    grid_pool as grid_pool,
    matryoshka_pool as matryoshka_pool,
    sequence_pool as sequence_pool,
    temporal_pairs as temporal_pairs,
)
from jaxmerge.tokens._prune import keep as keep, keep_top_k as keep_top_k
from jaxmerge.tokens._shuffle import depth_to_space as depth_to_space, space_to_depth as space_to_depth
