"""Directions and lengths: between two models, means on the sphere, model stock."""
