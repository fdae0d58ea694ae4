"""Pillar 2: which bytes become one word? Splitters on the host; segments, gates and controllers as pure functions."""

from jaxmerge.words._control_gate import SEPARATORS as SEPARATORS, fixed_gate as fixed_gate, random_gate as random_gate
from jaxmerge.words._controller import (
    Controller as Controller,
    ControllerState as ControllerState,
    pi_controller as pi_controller,
)
from jaxmerge.words._exact import (
    END as END,
    ByteModel as ByteModel,
    Covers as Covers,
    bits_per_byte as bits_per_byte,
    byte_model as byte_model,
    canonical_after as canonical_after,
    canonical_pairs as canonical_pairs,
    cover_encodings as cover_encodings,
    next_symbol as next_symbol,
)
from jaxmerge.words._existence import (
    existence_bias as existence_bias,
    log_existence as log_existence,
    no_start_probability as no_start_probability,
    sample_starts as sample_starts,
    word_existence as word_existence,
)
from jaxmerge.words._gate import (
    delete_gate as delete_gate,
    deletion_rate as deletion_rate,
    gate_entropies as gate_entropies,
    kept as kept,
    log_sigmoid_gate as log_sigmoid_gate,
    masked_mean as masked_mean,
    masked_variance as masked_variance,
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
    place_in_word as place_in_word,
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
