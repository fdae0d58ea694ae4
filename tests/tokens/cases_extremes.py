"""Removing nothing, and as much as there is: r = 0 and the largest r of every planner that takes one."""

import jax
import numpy as np

import jaxmerge as jm
from tests.tokens.cases import Case

t = jm.tokens
SIDES = np.arange(0, 16, 2), np.arange(1, 16, 2)
TAKES_R = {  # the planner, and the largest r
    "bipartite_matching": (t.bipartite_matching, 8),
    "two_sided_matching": (lambda x, r: t.two_sided_matching(x, *SIDES, r), 8),
    "random_bipartite_matching": (lambda x, r: t.random_bipartite_matching(x, r, jax.random.key(0)), 15),
    "grid_matching": (lambda x, r: t.grid_matching(x, r, grid=(4, 4)), 12),
    "energy_matching": (lambda x, r: t.energy_matching(x, r, margin=0.5), 8),
    "local_matching": (lambda x, r: t.local_matching(x, r, window=2), 8),
    "block_matching": (lambda x, r: t.block_matching(x, r, block=8), 4),
    "adjacent_matching": (t.adjacent_matching, 15),
    "clip_matching": (lambda x, r: t.clip_matching(x.reshape(*x.shape[:-2], 2, 8, 8), r), 7),
}
LEAVES_K = {  # the planner, and the fewest that it can leave
    "keep_top_k": (lambda x, k: t.keep_top_k(x.sum(-1), k), 0),
    "assign": (lambda x, k: t.assign(x, t.keep_top_k(x.sum(-1), k).kept, k), 1),
    "density_peaks": (t.density_peaks, 1),
    "k_means": (t.k_means, 1),
    "prune_and_merge": (lambda x, k: t.prune_and_merge(x.sum(-1), x, 16, k), 1),
    "dominant_and_contextual": (lambda x, k: t.dominant_and_contextual(x.sum(-1), x, k - 1, 1), 1),
    "sequence_pool": (lambda x, k: t.sequence_pool(16, k, like=x), 1),
    "grid_pool": (lambda x, k: t.grid_pool((16,), (k,), like=x), 1),
}
CASES = [
    *(Case(f"{name}, r = {r}", lambda x, f=f, r=r: f(x, r)) for name, (f, most) in TAKES_R.items() for r in (0, most)),
    *(Case(f"{name}, k = {k}", lambda x, f=f, k=k: f(x, k)) for name, (f, least) in LEAVES_K.items() for k in (least, 16)),
]
