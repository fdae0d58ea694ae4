"""Vocabularies: what each model's rows mean, what the output's mean, and the tokenizer that goes with it.

Tokenizers are read and written as the Hub keeps them, tokenizer.json and what lies beside it, without a tokenizer library.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxmerge.checkpoint import Source
from jaxmerge.recipe._templates import TEMPLATES

FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json", "normalizer.json",
)  # fmt: skip
"""What goes from the base to the output as it is."""


class Unfit(ValueError):
    """A checkpoint cannot be used, in words.

    Attributes:
      source: which.
    """

    def __init__(self, source: Source, text: str):
        super().__init__(text)
        self.source = source


class Damaged(Unfit):
    """A file beside a checkpoint's tensors is not what it should be."""

    def __init__(self, source: Source, text: str):
        super().__init__(source, f"{source.name}: {text}; fetch it again.")


def side_file(source: Source, name: str) -> bytes | None:
    """A file beside a checkpoint's tensors."""
    beside = getattr(source, "beside", None)  # of a result that is not there yet
    if beside is not None:
        content = beside.get(name)
        return content.encode() if isinstance(content, str) else content
    path = source.path if source.path.is_dir() else source.path.parent
    return (path / name).read_bytes() if (path / name).exists() else None


def side_json(source: Source, name: str) -> dict[str, Any]:
    """A JSON file beside a checkpoint's tensors; empty where there is none.

    Raises:
      Damaged: it is.
    """
    content = side_file(source, name)
    if content is None:
        return {}
    try:
        found = json.loads(content)
    except ValueError as e:
        raise Damaged(source, f"{name} is not JSON: {e}") from None
    if not isinstance(found, dict):
        raise Damaged(source, f"{name} is not an object")
    return found


class Tokens(NamedTuple):
    """A model's tokenizer.

    Attributes:
      rows: {token: row}, only rows that the model's table has.
      added: {token: its entry in tokenizer.json}, of tokens that are no part of the tokenizer's own model.
      data: tokenizer.json.
    """

    rows: dict[str, int]
    added: dict[str, dict[str, Any]]
    data: dict[str, Any]


def read_tokens(source: Source, size: int | None) -> Tokens | None:
    """A model's tokenizer; None where it has none that can be read.

    Args:
      source: a model.
      size: rows of its table; tokens beyond are padding, and left out.
    """
    data = side_json(source, "tokenizer.json")
    if not data:
        return None
    vocabulary = data.get("model", {}).get("vocab", {})
    rows = dict(vocabulary) if isinstance(vocabulary, dict) else {piece[0]: i for i, piece in enumerate(vocabulary)}
    added = {entry["content"]: entry for entry in data.get("added_tokens", [])}
    rows |= {token: entry["id"] for token, entry in added.items()}
    inside = {t: i for t, i in rows.items() if size is None or i < size}
    return Tokens(dict(sorted(inside.items(), key=lambda item: item[1])), {t: e for t, e in added.items() if t in inside}, data)


def union(base: Tokens, others: Sequence[Tokens], more: Sequence[str]) -> Tokens:
    """The base's tokenizer, and after its last row what others have beside it, in the order of the models and their rows.

    Tokens of the models' own vocabularies come first, added ones after them, with the settings that they have there.

    Args:
      base: keeps its rows.
      others: whose tokens join it; none for the base's vocabulary alone.
      more: tokens that the recipe names.
    """
    data = json.loads(json.dumps(base.data))
    rows, added = dict(base.rows), dict(base.added)
    new: dict[str, dict[str, Any]] = {}
    for mine in (False, True):
        for tokens in others:
            for token in tokens.rows:
                if token not in rows and token not in new and (token in tokens.added) == mine:
                    new[token] = dict(tokens.added.get(token) or plain(token))
    new |= {token: plain(token) for token in more if token not in rows and token not in new}
    top = max(rows.values(), default=-1) + 1
    for i, (token, entry) in enumerate(new.items()):
        rows[token] = entry["id"] = top + i
        added[token] = entry
    strip(data, base.rows)
    data["added_tokens"] = sorted(added.values(), key=lambda entry: entry["id"])
    return Tokens(rows, added, data)


def plain(token: str) -> dict[str, Any]:
    """The entry of a token that is text like any other."""
    return {
        "id": -1,
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": True,
        "special": False,
    }


def strip(data: dict[str, Any], keep: Mapping[str, int]) -> None:
    """Take tokens that have no row out of a tokenizer's model."""
    model = data.get("model", {})
    vocabulary = model.get("vocab", {})
    if isinstance(vocabulary, dict):
        gone = {t for t in vocabulary if t not in keep}
        model["vocab"] = {t: i for t, i in vocabulary.items() if t in keep}
        if gone and "merges" in model:
            pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
            wholes = zip(model["merges"], pairs, strict=True)
            model["merges"] = [m for m, pair in wholes if not gone & {*pair, "".join(pair)}]
    else:
        model["vocab"] = [piece for piece in vocabulary if piece[0] in keep]


# --- templates -------------------------------------------------------------------------------------------------------


def template_of(source: Source) -> str | None:
    """A model's chat template."""
    content = side_file(source, "chat_template.jinja")
    if content is not None:
        return content.decode()
    found = side_json(source, "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}
    return found.get("default") if isinstance(found, dict) else found


def template(name: str, sources: Sequence[Source]) -> str | None:
    """What `chat_template` means: the models' most common one ("auto"), a well-known one, or itself. None: no model has one.

    Raises:
      LookupError: it is neither.
    """
    if name == "auto":
        found = [t.strip() for t in map(template_of, sources) if t]
        return max(dict.fromkeys(found), key=found.count) if found else None
    if name in TEMPLATES:
        return TEMPLATES[name]
    if "{" not in name:
        raise LookupError(name)
    return name


def files(donor: Source, tokens: Tokens | None, chat: str | None) -> dict[str, str | bytes]:
    """What lies beside the output's tensors of a tokenizer.

    Args:
      donor: whose files they are, where nothing changes them.
      tokens: the output's vocabulary, where it is made anew.
      chat: the chat template, where the recipe names one.
    """
    found: dict[str, str | bytes] = {}
    for name in FILES:
        content = side_file(donor, name)
        if content is not None:
            found[name] = content
    if tokens is not None and tokens.data != side_json(donor, "tokenizer.json"):
        for stale in ("tokenizer.model", "added_tokens.json", "vocab.json", "merges.txt"):
            found.pop(stale, None)  # they say what the donor's vocabulary was
        found["tokenizer.json"] = dump(tokens.data)
        settings = side_json(donor, "tokenizer_config.json")
        if "added_tokens_decoder" in settings:
            fields = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
            settings["added_tokens_decoder"] = {
                str(e["id"]): {k: e[k] for k in fields if k in e} for e in tokens.data["added_tokens"]
            }
            found["tokenizer_config.json"] = dump(settings)
    if chat is not None:
        settings = json.loads(found.get("tokenizer_config.json", "{}"))
        settings["chat_template"] = chat
        found["tokenizer_config.json"] = dump(settings)
        found["chat_template.jinja"] = chat
        found.pop("chat_template.json", None)
    return found


def dump(data: Any) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"
