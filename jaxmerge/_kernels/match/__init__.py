"""For each query the key of largest cosine; sums over a row of cosines; the k nearest."""
