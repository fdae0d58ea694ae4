"""What goes beside the tensors: the model's configuration, a card for the Hub, the recipe, the tokenizer's files."""

import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmerge.checkpoint import Leaf, Source, _hub
from jaxmerge.recipe._methods import ARXIV, METHODS
from jaxmerge.recipe._names import place
from jaxmerge.recipe._resolve import Row
from jaxmerge.recipe._schema import Path, Recipe, Reference
from jaxmerge.recipe._templates import TEMPLATES
from jaxmerge.recipe._tokenizer import dump, files, side_file, side_json, template, template_of
from jaxmerge.recipe._vocabulary import Vocabulary
from jaxmerge.recipe._yaml import Mistake, suggest

DEPTHS = {  # module: keys of a configuration that say how many layers it has
    "": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "text_decoder": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "encoder": ("num_layers", "num_hidden_layers", "encoder_layers"),
    "decoder": ("num_decoder_layers", "decoder_layers"),
    "vision_tower": ("num_hidden_layers", "depth"),
    "vision_model": ("num_hidden_layers", "depth"),
}
INNER = {"": "text_config", "text_decoder": "text_config", "vision_tower": "vision_config", "vision_model": "vision_config"}
ELSEWHERE = {"widen": ("WIDEN", f"{ARXIV}2408.03092")}
"""Title and source of methods that recipes have not."""


def beside(
    recipe: Recipe,
    rows: Sequence[Row],
    sources: Mapping[Reference, Source],
    *,
    vocabulary: Vocabulary | None,
    out: Mapping[str, Leaf],
    title: str,
) -> tuple[dict[str, str | bytes], list[Mistake]]:
    """Every file beside the tensors, and what is wrong with them.

    Args:
      recipe, rows, sources: a document, resolved.
      vocabulary: of the output, where the recipe wants one.
      out: the output's tensors.
      title: what the card is headed.
    """
    donor = sources[recipe.base or next(iter(recipe.references()))]
    chat, mistakes = None, []
    if recipe.chat_template:
        try:
            chat = template(recipe.chat_template, [sources[m] for m in recipe.references()])
        except LookupError:
            text = f"unknown chat_template {recipe.chat_template!r}{suggest(recipe.chat_template, ('auto', *TEMPLATES))}"
            mistakes.append(Mistake(recipe.marks["chat_template"], text))
    wanted = recipe.tokenizer.source if recipe.tokenizer else "base"
    whose = sources[wanted] if isinstance(wanted, Reference) and wanted in sources else donor
    found = files(whose, vocabulary.tokens if vocabulary else None, chat)
    config = configuration(recipe, rows, sources, vocabulary, out)
    if config:
        found["config.json"] = dump(config)
    found["mergekit_config.yml"] = recipe.text
    found["README.md"] = card(recipe, sources, title, template_of(whose) is not None or chat is not None)
    return found, mistakes


# --- config.json -----------------------------------------------------------------------------------------------------


def configuration(
    recipe: Recipe,
    rows: Sequence[Row],
    sources: Mapping[Reference, Source],
    vocabulary: Vocabulary | None,
    out: Mapping[str, Leaf],
) -> dict[str, Any]:
    """The base's configuration with the output's depth, vocabulary and dtype."""
    config = side_json(sources[recipe.base or next(iter(recipe.references()))], "config.json")
    if not config:
        return {}
    if recipe.own.get("dequantize"):
        config.pop("quantization_config", None)
    for module in recipe.modules:
        name = "" if module.name == "default" else module.name
        if not any(i.layers for part in module.slices for i in part.inputs):
            continue
        firsts = [part.inputs[0] for part in module.slices]
        order = [(i.model, layer) for i in firsts for layer in range(*(i.layers or (0, 0)))]
        holder = _holder(config, name)
        key = next((k for k in DEPTHS.get(name, DEPTHS[""]) if k in holder), None)
        if key is not None:
            _per_layer(holder, holder[key], order, name, sources)
            holder[key] = len(order)
    _say_dtype(config, out)
    if vocabulary is not None:
        _holder(config, "", "vocab_size")["vocab_size"] = vocabulary.size
    heads = [n for n in out if place(n).part == "head"]
    if heads and config.get("tie_word_embeddings"):  # a parent was not tied
        config["tie_word_embeddings"] = False
    return config


def companions(donor: Source, out: Mapping[str, Leaf], *, dequantized: bool = False) -> dict[str, str | bytes]:
    """What goes beside the tensors of a merge without a recipe: the donor's configuration and its tokenizer, as they are.

    Args:
      donor: the base, or the first model.
      out: the output's tensors, whose dtype the configuration names.
      dequantized: whether the donor's codes were read as numbers, and how they were coded is no longer true.
    """
    found = files(donor, None, None)
    config = side_json(donor, "config.json")
    if config:
        if dequantized:
            config.pop("quantization_config", None)
        _say_dtype(config, out)
        found["config.json"] = dump(config)
    return found


def _say_dtype(config: dict[str, Any], out: Mapping[str, Leaf]) -> None:
    """Name the dtype of the output's tensors, where they have one."""
    dtypes = {leaf.dtype for leaf in out.values() if leaf.dtype is not None and leaf.dtype.kind not in "iub"}
    if len(dtypes) != 1:
        return
    dtype = np.dtype(next(iter(dtypes))).name
    for holder in (config, config.get("text_config")):
        for key in ("torch_dtype", "dtype"):
            if isinstance(holder, dict) and key in holder:
                holder[key] = dtype
    if "torch_dtype" not in config and "dtype" not in config:
        config["torch_dtype"] = dtype


def _holder(config: dict[str, Any], module: str, key: str = "") -> dict[str, Any]:
    """The part of a configuration that a module's numbers stand in."""
    inner = config.get(INNER.get(module, ""))
    keys = (key,) if key else DEPTHS.get(module, DEPTHS[""])
    return inner if isinstance(inner, dict) and not any(k in config for k in keys) else config


def _per_layer(
    holder: dict[str, Any], depth: int, order: Sequence[tuple[Reference, int]], module: str, sources: Mapping[Reference, Source]
) -> None:
    """Lists with an entry for each layer (their kinds, say) follow the layers."""
    theirs = {m: _holder(side_json(sources[m], "config.json"), module) for m, _ in order}
    for key, value in list(holder.items()):
        if isinstance(value, list) and len(value) == depth and depth > 1:
            columns = [(theirs[m].get(key) or [], layer) for m, layer in order]
            if all(layer < len(column) for column, layer in columns):
                holder[key] = [column[layer] for column, layer in columns]


# --- the card --------------------------------------------------------------------------------------------------------


def card(recipe: Recipe, sources: Mapping[Reference, Source], title: str, chats: bool) -> str:
    """README.md of a merge by a recipe: what the Hub reads (front matter), and what people read."""
    masked = recipe.own["seed"] or recipe.method_name.startswith(("dare", "della"))
    return _page(
        title,
        recipe.method_name,
        {m: sources[m] for m in recipe.references()},
        recipe.base if recipe.method.base != "input" and recipe.base in sources else None,
        statistics=[path.path for path, _ in recipe.statistics().values()],
        asked=["## Recipe", "", "```yaml", recipe.text.strip(), "```", ""],
        seed=recipe.own["seed"] if masked else None,
        again="`jaxmerge merge mergekit_config.yml out`",
        chats=chats,
    )


def card_of_method(
    method: str,
    options: Mapping[str, Any],
    parents: Sequence[tuple[str, Source]],
    *,
    based: bool,
    statistics: Sequence[str],
    command: str,
    title: str,
) -> str:
    """README.md of a merge by a method.

    Args:
      method, options: its name on the command line, and what it is told.
      parents: each as it is named, and opened; the base is the first, if `based`.
      statistics: where those of the models lie.
      command: that makes it again.
      title: what the card is headed.
    """
    sources = {_reference(name): source for name, source in parents}
    donor = parents[0][1]
    plain = {name: [*value] if isinstance(value, tuple) else value for name, value in options.items()}
    told = ["## Options", "", "```yaml", _yaml(plain), "```", ""] if plain else []
    return _page(
        title,
        method.replace("-", "_"),
        sources,
        next(iter(sources)) if based else None,
        statistics=statistics,
        asked=["## Command", "", "```sh", command, "```", "", *told],
        seed=options.get("seed"),
        again="the command above",
        chats=template_of(donor) is not None,
    )


def _page(
    title: str,
    method: str,
    sources: Mapping[Reference, Source],
    base: Reference | None,
    *,
    statistics: Sequence[str],
    asked: Sequence[str],
    seed: int | None,
    again: str,
    chats: bool,
) -> str:
    """A card: the models and their licences, what was asked for, and how it is made again."""
    hub = [_hub.parted(name)[0] for m in sources for p in (m.model, m.lora) if p is not None and (name := on_hub(p))]
    licences = {str(m): licence for m, source in sources.items() if (licence := licence_of(source))}
    front: dict[str, Any] = {
        "base_model": list(dict.fromkeys(hub)),
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "jaxmerge", method],
    }
    if chats:
        front["pipeline_tag"] = "text-generation"
    if licences and len(set(licences.values())) == 1 and len(licences) == len(sources):
        front["license"] = next(iter(licences.values()))
    name, url = (METHODS[method].title, METHODS[method].url) if method in METHODS else ELSEWHERE[method]
    linked = f"[{name}]({url})" if url else name
    lines = ["---", _yaml(front), "---", f"# {title}", ""]
    lines += [
        f"Merged with {linked}" + (f" from {link(base)}." if base is not None else "."),
        "",
        "| model | revision | licence |",
        "|---|---|---|",
    ]
    for m, source in sources.items():
        shown = f"{link(m)} (base)" if m == base else link(m)
        lines.append(f"| {shown} | {revision_of(m, source)} | {licences.get(str(m), '')} |")
    if statistics:
        named = ", ".join(os.path.basename(path.rstrip("/")) for path in statistics)
        lines += ["", f"Weighted by statistics of the models: {named}."]
    if len(set(licences.values())) > 1:
        lines += ["", "The parents' licences differ: whoever shares this merge must keep to all of them."]
    lines += ["", *asked]
    if seed is not None:
        lines += [f"Masks were drawn with seed {seed}; they do not depend on devices or order.", ""]
    version = importlib.metadata.version("jaxmerge")
    lines += [
        f"Made with jaxmerge {version}: {again} makes it again,",
        "`jaxmerge verify` checks it against its parents; `jaxmerge.json` holds their hashes and the value of every parameter.",
        "",
    ]
    return "\n".join(lines)


def _reference(name: str) -> Reference:
    """A model as it is named on the command line: what is here is a path, whatever signs are in it."""
    split = None if os.path.exists(name) else _hub.split(name)
    return Reference(Path(*split) if split else Path(name))


def _yaml(values: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True).rstrip()


def on_hub(path: Path) -> str | None:
    """The name of a model on the Hub, and of a folder in it; None of a place on this machine."""
    named = None if os.path.exists(path.path) else _hub.split(str(path))
    return named and named[0]


def link(model: Reference) -> str:
    """A model as a card names it; of a place on this machine, its last part."""
    parts = []
    for path in (model.model, model.lora):
        if path is not None:
            hub = on_hub(path)
            name = str(path) if hub else os.path.basename(str(path).rstrip("/"))
            parts.append(f"[{name}](https://huggingface.co/{_hub.parted(hub)[0]})" if hub else name)
    return " + ".join(parts)


def revision_of(model: Reference, source: Source) -> str:
    """The commit that was merged, of a model of the Hub; else what the recipe says."""
    commit = _hub.at(source.path)
    return commit.commit if commit else model.model.revision or ""


def licence_of(source: Source) -> str | None:
    """What a parent's card says of its licence."""
    import yaml

    text = (side_file(source, "README.md") or b"").decode(errors="replace")
    if not text.startswith("---"):
        return None
    try:
        front = yaml.safe_load(text.split("---")[1])
    except yaml.YAMLError:
        return None
    return str(front["license"]) if isinstance(front, dict) and front.get("license") else None
