"""Pooling and given groups: known before any token is, or by somebody else."""

from jaxmerge.tokens.given._groups import bind as bind, bind_attributes as bind_attributes, from_groups as from_groups
from jaxmerge.tokens.given._pool import (
    grid_pool as grid_pool,
    matryoshka_pool as matryoshka_pool,
    sequence_pool as sequence_pool,
    temporal_pairs as temporal_pairs,
)
from jaxmerge.tokens.given._shuffle import depth_to_space as depth_to_space, space_to_depth as space_to_depth
