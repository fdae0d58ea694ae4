"""Pillar 1: which tokens become one? Every planner is a pure function that returns a `Plan` or a `SoftPlan`."""

from jaxmerge.tokens._bipartite import bipartite_matching as bipartite_matching, schedule as schedule
from jaxmerge.tokens._density import (
    density_centers as density_centers,
    density_peaks as density_peaks,
    in_order as in_order,
    nearest_center as nearest_center,
)
from jaxmerge.tokens._members import carry_positions as carry_positions, members as members, rope_positions as rope_positions
from jaxmerge.tokens._nearest import Nearest as Nearest, nearest as nearest
from jaxmerge.tokens._prune import keep as keep, keep_top_k as keep_top_k
