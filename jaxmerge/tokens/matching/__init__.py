"""Matching: which tokens are alike enough to become one?"""

from jaxmerge.tokens.matching._bipartite import bipartite_matching as bipartite_matching, schedule as schedule
from jaxmerge.tokens.matching._clips import clip_matching as clip_matching
from jaxmerge.tokens.matching._energy import energy as energy, energy_matching as energy_matching, margins as margins
from jaxmerge.tokens.matching._grid import grid_matching as grid_matching
from jaxmerge.tokens.matching._kth import (
    kth_bipartite_matching as kth_bipartite_matching,
    random_bipartite_matching as random_bipartite_matching,
)
from jaxmerge.tokens.matching._local import (
    adjacent_matching as adjacent_matching,
    block_matching as block_matching,
    local_matching as local_matching,
)
from jaxmerge.tokens.matching._rounds import (
    halvings as halvings,
    head_mean as head_mean,
    in_rounds as in_rounds,
    keep_schedule as keep_schedule,
)
from jaxmerge.tokens.matching._step import LayerNorm as LayerNorm, MergeStep as MergeStep, merge_step as merge_step
from jaxmerge.tokens.matching._threshold import (
    RunningThreshold as RunningThreshold,
    earlier_matching as earlier_matching,
    matching_threshold as matching_threshold,
    threshold_matching as threshold_matching,
)
from jaxmerge.tokens.matching._trajectory import trajectory_matching as trajectory_matching
from jaxmerge.tokens.matching._two_sided import two_sided_matching as two_sided_matching
