"""Merge checkpoints on disk: leaf by leaf, on the target sharding, without gathering, in bounded memory.

plan(tx, base, models)              headers only: bytes, batches, passes, every mismatch
merge(tx, base, models, out)        refuses what plan refuses; the output appears whole or not at all
fsdp(mesh)                          a sharding rule: split the largest dimension
"""

from jaxmerge.checkpoint._merge import MergeReport as MergeReport, Progress as Progress, merge as merge
from jaxmerge.checkpoint._plan import (
    CheckpointPlan as CheckpointPlan,
    MergeError as MergeError,
    plan as plan,
)
from jaxmerge.checkpoint._sharding import fsdp as fsdp
