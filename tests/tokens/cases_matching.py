"""The matching family: who leaves, who receives, who is most like whom."""

import jax
import numpy as np

import jaxmerge as jm
from tests.tokens.cases import Case

t = jm.tokens
EVEN, ODD = np.arange(0, 16, 2), np.arange(1, 16, 2)
KEY = jax.random.key(0)
CASES = [
    Case("two_sided_matching", lambda x: t.two_sided_matching(x, np.arange(1, 14, 3), np.array([0, 5, 8]), 3)),
    Case("two_sided_matching, all of them", lambda x: t.two_sided_matching(x, EVEN, ODD), duplicates=True),
    Case("kth_bipartite_matching", lambda x: t.kth_bipartite_matching(x, 3)),
    Case("kth_bipartite_matching, pairs", lambda x: t.kth_bipartite_matching(x, 2), duplicates=True),
    Case("kth_bipartite_matching, dropping", lambda x: t.kth_bipartite_matching(x, 3, remainder="drop")),
    Case("random_bipartite_matching", lambda x: t.random_bipartite_matching(x, 5, KEY, protect=(0,))),
    Case("grid_matching", lambda x: t.grid_matching(x, 6, grid=(4, 4))),
    Case("grid_matching, all it can", lambda x: t.grid_matching(x, 8, grid=(2, 8), stride=(1, 2)), duplicates=True),
    Case("grid_matching, random", lambda x: t.grid_matching(x, 6, grid=(2, 8), stride=(2, 3), key=KEY)),
    Case("energy_matching", lambda x: t.energy_matching(x, 5, margin=0.5), equivariant=True),
    Case(
        "energy_matching, text",
        lambda x: t.energy_matching(x, 5, margin=0.5, kernel="gaussian", split="halves"),
        equivariant=True,
    ),
    Case("energy_matching, all", lambda x: t.energy_matching(x, 5, margin=0.5, kernel="paper", split="all"), equivariant=True),
    Case("energy_matching, pruning", lambda x: t.energy_matching(x, 5, margin=0.5, protect=(0,), prune=True), ordered=True),
    Case("threshold_matching", lambda x: t.threshold_matching(x, 0.4, 14)),
    Case("threshold_matching, twins", lambda x: t.threshold_matching(x, 0.99, 16), duplicates=True),
    Case("threshold_matching, masked", lambda x: t.threshold_matching(x, 0.2, 12, protect=(0,), valid=x[..., 0] > -1, max_r=4)),
    Case("earlier_matching", lambda x: t.earlier_matching(x, 0.75, 12), ordered=True),
    Case("earlier_matching, one hop", lambda x: t.earlier_matching(x, 0.99, 16, hops=1), ordered=True, duplicates=True),
    Case("clip_matching", lambda x: t.clip_matching(x.reshape(*x.shape[:-2], 2, 8, 8), 5)),
    Case("in_rounds", lambda x: t.in_rounds(t.bipartite_matching, x, [8, 4, 1])[0]),
    Case("in_rounds, plain means", lambda x: t.in_rounds(t.bipartite_matching, x, [4, 4], sizes=False)[0], duplicates=True),
    Case("local_matching", lambda x: t.local_matching(x, 5, window=2, protect=(0,))),
    Case("local_matching, pairs", lambda x: t.local_matching(x, 8, window=0), ordered=True, duplicates=True),
    Case("block_matching", lambda x: t.block_matching(x, 2, block=8)),
    Case("block_matching, pairs", lambda x: t.block_matching(x, 1, block=2), ordered=True, duplicates=True),
    Case("adjacent_matching", lambda x: t.adjacent_matching(x, 5, protect=(3,)), ordered=True),
    Case("adjacent_matching, twins", lambda x: t.adjacent_matching(x, 8), ordered=True, duplicates=True),
    Case("trajectory_matching", lambda x: t.trajectory_matching(x, grid=(2, 2), window=1)),
    Case(
        "trajectory_matching, new ones",
        lambda x: t.trajectory_matching(x, grid=(1, 4), window=2, threshold=0.3, capacity=10),
    ),
]
