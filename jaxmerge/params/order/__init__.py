"""Exact order statistics and sums, without a sort and without a gather: values stay where they are, counts travel."""
