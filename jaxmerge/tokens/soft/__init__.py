"""Soft plans: tokens that go to several places, gradients included."""

from jaxmerge.tokens.soft._frame_attention import frame_attention as frame_attention
from jaxmerge.tokens.soft._propagate import (
    attention_score as attention_score,
    propagate as propagate,
    sparsify as sparsify,
    subgraph as subgraph,
    token_graph as token_graph,
)
from jaxmerge.tokens.soft._saliency import saliency_gather as saliency_gather, soft_gather as soft_gather
from jaxmerge.tokens.soft._transform import token_transform as token_transform
