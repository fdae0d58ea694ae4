"""Clustering, propagation and soft merging."""

import jaxmerge as jm
from tests.tokens.cases import Case

CASES = [
    Case("density_peaks", lambda x: jm.tokens.density_peaks(x, 5), ordered=True, equivariant=True),
    Case("density_peaks, twins", lambda x: jm.tokens.density_peaks(x, 8, neighbors=2), ordered=True, duplicates=True),
    Case("density_peaks, masked", lambda x: jm.tokens.density_peaks(x, 4, mask=x[..., 0] > 0), ordered=True),
]
