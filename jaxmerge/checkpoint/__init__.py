"""Merge checkpoints on disk: leaf by leaf, on the target sharding, without gathering, in bounded memory.

plan(tx, base, models)              headers only: bytes, batches, passes, every mismatch
merge(tx, base, models, out)        refuses what plan refuses; the output appears whole or not at all
fsdp(mesh)                          a sharding rule: split the largest dimension
receipt(out)                        what a merge says it was made of
verify(out, tx)                     files, parents and a sample of the tensors against the receipt of a merge
open(path)                          a source: one checkpoint, lazily; headers alone are read
renamed subset derived dequantized  views of a source, which are sources again
"""

from jaxmerge.checkpoint._merge import MergeReport as MergeReport, Progress as Progress, merge as merge
from jaxmerge.checkpoint._open import open as open
from jaxmerge.checkpoint._plan import (
    CheckpointPlan as CheckpointPlan,
    MergeError as MergeError,
    plan as plan,
)
from jaxmerge.checkpoint._quantised import dequantized as dequantized
from jaxmerge.checkpoint._receipt import receipt as receipt
from jaxmerge.checkpoint._sharding import fsdp as fsdp
from jaxmerge.checkpoint._source import (
    Derived as Derived,
    Leaf as Leaf,
    Source as Source,
    derived as derived,
    renamed as renamed,
    subset as subset,
)
from jaxmerge.checkpoint._verify import Verified as Verified, verify as verify
