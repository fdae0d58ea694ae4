"""Matrices: singular vectors, polar factors, least squares; updates that stay factors."""
