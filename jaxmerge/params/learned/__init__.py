"""Coefficients that are learned or searched for, and the statistics of data."""
