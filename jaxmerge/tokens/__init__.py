"""Pillar 1: which tokens become one? Every planner is a pure function that returns a `Plan` or a `SoftPlan`."""

from jaxmerge.tokens._bipartite import bipartite_matching as bipartite_matching, schedule as schedule
from jaxmerge.tokens._nearest import Nearest as Nearest, nearest as nearest
from jaxmerge.tokens._prune import keep as keep, keep_top_k as keep_top_k
