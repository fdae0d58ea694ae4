"""Pillar 2: which bytes become one word? Splitters on the host; segments, gates and controllers as pure functions."""

from jaxmerge.words._controller import (
    Controller as Controller,
    ControllerState as ControllerState,
    pi_controller as pi_controller,
)
from jaxmerge.words._gate import (
    delete_gate as delete_gate,
    deletion_rate as deletion_rate,
    kept as kept,
    masked_mean as masked_mean,
    softmax1 as softmax1,
)
from jaxmerge.words._hash import ngram_hash as ngram_hash
from jaxmerge.words._pack import Packed as Packed, pack as pack, pack_stream as pack_stream, unpack as unpack
from jaxmerge.words._patch import (
    BLT_THRESHOLD as BLT_THRESHOLD,
    byte_entropy as byte_entropy,
    entropy_starts as entropy_starts,
    limit_patches as limit_patches,
    patch_threshold as patch_threshold,
    space_starts as space_starts,
)
from jaxmerge.words._router import (
    Routing as Routing,
    dechunk as dechunk,
    moving_average as moving_average,
    ratio_loss as ratio_loss,
    route as route,
    straight_through as straight_through,
)
from jaxmerge.words._segment import (
    capacity_for as capacity_for,
    document_starts as document_starts,
    segments as segments,
    shift as shift,
)
from jaxmerge.words._span import (
    SENTINEL as SENTINEL,
    Corrupted as Corrupted,
    corrupt as corrupt,
    span_counts as span_counts,
    span_lengths as span_lengths,
    span_mask as span_mask,
)
from jaxmerge.words._split import split as split, starts as starts
from jaxmerge.words._vocabulary import (
    EOS as EOS,
    OFFSET as OFFSET,
    PAD as PAD,
    SIZE as SIZE,
    UNK as UNK,
    to_bytes as to_bytes,
    to_ids as to_ids,
)
