"""Segment sums and means of a plan, and their transpose."""
