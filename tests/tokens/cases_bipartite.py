"""Token Merging and plain pruning."""

import jaxmerge as jm
from tests.tokens.cases import Case

CASES = [
    Case("bipartite_matching", lambda x: jm.tokens.bipartite_matching(x, 5), ordered=False, duplicates=False),
    Case("bipartite_matching, all it can", lambda x: jm.tokens.bipartite_matching(x, 8), duplicates=True),
    Case("bipartite_matching, class token", lambda x: jm.tokens.bipartite_matching(x, 5, protect=(0,))),
    Case("keep", lambda x: jm.tokens.keep(x.sum(-1) > 0, 6), ordered=True, equivariant=False),
    Case("keep_top_k", lambda x: jm.tokens.keep_top_k(x.sum(-1), 5), ordered=True, equivariant=True),
]
