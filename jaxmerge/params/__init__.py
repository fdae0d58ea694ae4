"""Pillar 3: which weights become one? Merges of whole models as chains of atoms, in optax's grammar."""
