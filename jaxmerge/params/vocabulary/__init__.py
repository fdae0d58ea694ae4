"""Embeddings: models of different vocabularies, tokens that a model lacks."""
