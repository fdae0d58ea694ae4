"""Pillar 2: which bytes become one word? Splitters and packing on the host; patches, routers, gates as pure functions.

What runs on a device is jit-able, has static shapes and stays local to a row of the batch, means apart; what runs on the host
is numpy over whole texts. Words become a plan by `segments`, and every model over bytes goes on from there: `jm.merge`,
`jm.unmerge`, `shift`. "Equal to" names the vectors in tests/golden, outputs of the official code, or what stands in for it;
each docstring says where that code differs. Ids of documents in one row, `documents=`, part what must not mix.

    function                       method (seed)                    in -> out                            equal to
    words, on the host
      starts, split                HAT, UAX #29, whitespace         text -> bool per byte, words         hat_splitter, Unicode
      to_ids, to_bytes             ByT5's bytes                     text <-> ids                         round trip
        EOS, OFFSET, PAD, SIZE, UNK                                 their numbers
      span_mask, corrupt,          ByT5's span corruption           ids -> Corrupted                     span
        span_counts, span_lengths, SENTINEL
      pack, pack_stream, unpack    best fit, bytes and words        texts -> Packed                      its laws
      dynamic_tokens,              dynamic tokenization (15)        tokens of a batch -> DynamicTokens   plain BPE
        cached_embeddings                                           new tokens -> embeddings
    segments
      segments, shift              HAT, BLT, H-Net                  starts -> Plan; words one on         HAT's mask
        capacity_for, document_starts, place_in_word
    patches (BLT, MegaByte, SpaceByte)
      byte_entropy, entropy_starts threshold, rise, both, budget    entropies -> starts                  blt
        patch_threshold, BLT_THRESHOLD                              a wanted mean length -> threshold    its law
      space_starts                 SpaceByte                        ids -> starts                        blt
      limit_patches                longest, or static patches       starts -> starts                     blt
      ngram_hash                   hash embeddings                  ids -> rows of a table               blt
    routers (H-Net)
      route, Routing               cosine router                    states -> p, starts, confidence      hnet
      ratio_loss                   N bytes per chunk; ATDC          p, starts -> loss                    hnet
      dechunk, moving_average      smoothing over chunks            chunks -> bytes                      hnet
      straight_through             decide forwards, learn backwards                                      its gradient
    gates (MrT5)
      delete_gate, kept            sigmoid gate, Gumbel noise       logits -> gate -> bytes that stay    mrt5
      log_sigmoid_gate             without a floor                  logits -> gate                       the rule
      random_gate, fixed_gate,     the controls                     a key, ids -> gate                   the official pattern
        SEPARATORS
      deletion_rate, masked_mean,  rate and regularisers            gate -> scalar                       mrt5
        masked_variance, gate_entropies
      pi_controller, Controller,   the regulariser's weight         rate -> ControllerState              mrt5
        ControllerState
      softmax1                     may attend to nothing            scores -> weights                    mrt5
    existence (Zonkey, 102)
      log_existence,               probabilistic attention          p of starts -> bias on keys          the products
        existence_bias, word_existence
      sample_starts,               segment splitter, its loss       p of starts -> starts, scalar        the rule
        no_start_probability
    bytes of models over tokens (67)
      byte_model, ByteModel,       exact byte probabilities         tokenizer, model -> next byte        brute force
        Covers, END, canonical_after, canonical_pairs, cover_encodings
      next_symbol                  its last step on a device        covers, tokens -> next symbol        exact_byte_probs
      bits_per_byte                of whole texts                   texts -> bits                        brute force

The models that these are for live in `models`.
"""

from jaxmerge.words._control_gate import SEPARATORS as SEPARATORS, fixed_gate as fixed_gate, random_gate as random_gate
from jaxmerge.words._controller import (
    Controller as Controller,
    ControllerState as ControllerState,
    pi_controller as pi_controller,
)
from jaxmerge.words._dynamic import (
    DynamicTokens as DynamicTokens,
    cached_embeddings as cached_embeddings,
    dynamic_tokens as dynamic_tokens,
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
