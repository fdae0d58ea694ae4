"""What a tensor's name says: which layer of which stack it belongs to, what part of the model it is, where its vocabulary lies.

Names follow habits, and the habits of Hugging Face, MaxText, T5X and Gemma fit one screen; there is no code for single models.
"""

import functools
import re
from collections.abc import Iterable
from typing import NamedTuple

LAYER = re.compile(r"(?:^|[./])(?:layers?|blocks?|h|resblocks|encoderblock)[./_](\d+)(?=[./]|$)")
NUMBER = re.compile(r"[./](\d+)(?=[./])")

EMBEDDINGS = r"(?:embed_tokens|tok_embeddings|word_embeddings|wte|embed_in|shared|backbone[./]embeddings)[./]weight$"
HEADS = r"(?:^|[./])(?:lm_head|embed_out|output|output_layer|vocab_projector|cls[./]predictions[./]decoder)[./](?:weight|bias)$"
VOCABULARY = (  # (name, axis of the tokens)
    (re.compile(EMBEDDINGS), 0),
    (re.compile(HEADS), 0),
    (re.compile(r"(?:token_embedder[./]embedding|embedder[./]input_embedding)$"), 0),
    (re.compile(r"logits_dense[./]kernel$"), 1),
)
HEAD = re.compile(rf"{HEADS}|logits_dense[./]kernel$|(?:^|[./])score[./]weight$")
FIRST = re.compile(rf"{EMBEDDINGS}|embed|(?:^|[./])(?:wte|wpe)[./]|position|rotary|patch")  # before the layers, like embeddings
BUFFERS = re.compile(r"rotary(?:_pos)?_emb[./]inv_freq$|[./]attn[./](?:masked_)?bias$|[./]position_ids$")
"""Constants that some files carry and others do not: left out where they are not everywhere."""

VISION, PROJECTOR = re.compile(r"vision|visual"), re.compile(r"multi_modal_projector|mm_projector|merger")


def regex(what: str, pattern: str) -> re.Pattern[str]:
    """A regular expression of names, as somebody wrote it.

    Raises:
      ValueError: it is none.
    """
    try:
        return re.compile(pattern)
    except re.error as e:
        raise ValueError(f"{what}: {pattern!r} is no regular expression: {e}; a backslash makes a sign a letter.") from None


class Place(NamedTuple):
    """Where a tensor belongs.

    Attributes:
      stack: the name up to the number of the layer; None in no layer.
      layer: that number.
      rest: the name after it.
      part: "embeddings", "head", "layers" or "rest".
    """

    stack: str | None
    layer: int
    rest: str
    part: str

    def at(self, layer: int) -> str:
        """The name of the same tensor in another layer."""
        return f"{self.stack}{layer}{self.rest}"


@functools.lru_cache(maxsize=1 << 16)
def place(name: str) -> Place:
    """Where a tensor belongs.

    Example:
      >>> place("model.layers.12.mlp.up_proj.weight")
      Place(stack='model.layers.', layer=12, rest='.mlp.up_proj.weight', part='layers')
      >>> place("encoder.block.3.layer.0.SelfAttention.q.weight").layer, place("lm_head.weight").part
      (3, 'head')
    """
    found = LAYER.search(name) or NUMBER.search(name)
    if found:
        return Place(name[: found.start(1)], int(found[1]), name[found.end(1) :], "layers")
    part = "head" if HEAD.search(name) else "embeddings" if FIRST.search(name) else "rest"
    return Place(None, 0, "", part)


def vocabulary_axis(name: str) -> int | None:
    """The axis of a tensor that tokens number, or None."""
    return next((axis for pattern, axis in VOCABULARY if pattern.search(name)), None)


def stacks(names: Iterable[str]) -> dict[str, int]:
    """{stack: number of layers}, in the order of the names.

    Example:
      >>> import jaxmerge as jm
      >>> jm.recipe.stacks(["model.embed.weight", "model.layers.0.up.weight", "model.layers.11.up.weight"])
      {'model.layers.': 12}
    """
    found: dict[str, int] = {}
    for name in names:
        at = place(name)
        if at.stack is not None:
            found[at.stack] = max(found.get(at.stack, 0), at.layer + 1)
    return found


def embeddings_of(names: Iterable[str]) -> str | None:
    """The table of a model's input embeddings."""
    return next((n for n in names if vocabulary_axis(n) is not None and place(n).part == "embeddings"), None)


def in_module(name: str, module: str) -> bool:
    """Whether a tensor is part of a module of that name: those of mergekit's multimodal and encoder-decoder models."""
    if module in ("", "default"):
        return True
    if module == "multi_modal_projector":
        return PROJECTOR.search(name) is not None
    if module in ("vision_tower", "vision_model"):
        return VISION.search(name) is not None and not PROJECTOR.search(name)
    if module == "text_decoder":
        return not VISION.search(name) and not PROJECTOR.search(name)
    if module == "shared" and place(name).part == "head":
        return True
    return re.search(rf"(?:^|[./]){re.escape(module)}[./]", name) is not None
