"""Read a recipe: every unknown key and every wrong value with its place, all of them in one message."""

import re
from collections.abc import Iterable
from typing import Any

from jaxmerge.checkpoint._budget import parse_size
from jaxmerge.recipe._layouts import LAYOUTS
from jaxmerge.recipe._methods import METHODS, PARAMETERS, STATISTICS
from jaxmerge.recipe._open import window
from jaxmerge.recipe._schema import Input, Module, Path, Recipe, Reference, Slice, Tokenizer, TokenSource
from jaxmerge.recipe._settings import Settings, read_setting
from jaxmerge.recipe._yaml import Mark, Mistake, Node, RecipeError, documents, nearest, suggest

FLAGS = {"random_seed": "write seed", "out_shard_size": "pass --max-shard-bytes"} | dict.fromkeys(
    ("allow_crimes", "copy_tokenizer", "cuda", "lazy_unpickle", "low_cpu_memory", "trust_remote_code"), "leave it out"
)
DTYPES = ("float32", "float16", "bfloat16")
FLAGS["embed_slerp"] = "write t, or weight, as a condition: {part: embeddings, value: 0.5}"
SHORT = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
PROGRAMS = dict.fromkeys(("experts", "gate_mode", "experts_per_token"), "mergekit-moe") | {"genome": "mergekit-evolve"}
"""Keys of recipes that other programs read."""
OURS = ("seed", "format", "layout", "memory", "sharding", "integers", "nonfinite", "rank", "state", "dequantize")
TOP = (
    "merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template", "name", *OURS,
)  # fmt: skip


def read(text: str, name: str = "recipe") -> tuple[Recipe, ...]:
    """Every document of a recipe, checked as far as its words go.

    Raises:
      RecipeError: all that is wrong with them, in one message.

    Example:
      >>> import jaxmerge as jm
      >>> [recipe] = jm.recipe.read("merge_method: linear\\nmodels: [{model: a}, {model: org/b@v2}]\\n")
      >>> [str(model) for model in recipe.references()]
      ['a', 'org/b@v2']
    """
    mistakes: list[Mistake] = []
    nodes = list(documents(text, name))
    if not nodes:
        raise RecipeError([Mistake(None, "it is empty; it needs merge_method, and models, slices or modules.")], name)
    texts = [text] if len(nodes) == 1 else [t for t in re.split(r"(?m)^---[^\n]*\n?", text) if _says_something(t)]
    recipes = [_Reader(mistakes).recipe(node, part) for node, part in zip(nodes, texts, strict=False)]
    names = [r.name for r in recipes if r]
    for recipe in recipes:
        if recipe and names.count(recipe.name) > 1:
            what = f"the name {recipe.name!r} is given to two documents" if recipe.name else "two documents have no name"
            text = f"{what}; give each a name of its own, the last may go without."
            mistakes.append(Mistake(recipe.marks.get("name", recipe.marks[""]), text))
    if mistakes:
        raise RecipeError(mistakes, name)
    return tuple(r for r in recipes if r)


def _says_something(text: str) -> bool:
    return any(line.strip() and not line.lstrip().startswith(("#", "%")) for line in text.splitlines())


class _Reader:
    """One document: what it says, while mistakes are collected."""

    def __init__(self, mistakes: list[Mistake]):
        self.mistakes, self.notes = mistakes, []
        self.parts: dict[Reference, tuple[Mark, Mark]] = {}

    def wrong(self, mark: Mark, text: str) -> None:
        self.mistakes.append(Mistake(mark, text))

    def recipe(self, node: Node, text: str) -> Recipe | None:
        if not isinstance(node.value, dict):
            self.wrong(node.mark, f"a recipe is a mapping of keys to values, got {node.plain!r}.")
            return None
        for key, program in PROGRAMS.items():
            if key in node.value:
                text = f"{key!r} makes this a recipe of {program}, which builds something else than a merge of weights"
                self.wrong(node.keys[key], f"{text}; write merge_method and models.")
                return None
        fields = self.mapping(node, "a recipe", TOP)
        marks = node.keys | {"": node.mark}
        known = fields["merge_method"].plain if "merge_method" in fields else None
        known = known if isinstance(known, str) else str(known)
        if "merge_method" not in fields:
            self.wrong(node.mark, f"merge_method is missing{suggest('', METHODS)}")
        elif known not in METHODS:
            self.wrong(fields["merge_method"].mark, f"unknown merge_method {known!r}{suggest(known, METHODS)}")
        method = METHODS.get(known, METHODS["linear"])
        self.name, self.method = known if known in METHODS else "linear", method
        self.lenient = known not in METHODS  # parameters cannot be judged without a method

        given = [k for k in ("models", "slices", "modules") if k in fields and fields[k].value]
        empty = next((k for k in ("models", "slices", "modules") if k in fields), None)
        if not given and empty is not None:
            self.wrong(marks[empty], f"{empty} is empty; name one or more.")
        elif len(given) != 1:
            what = f"{' and '.join(given)} are given" if given else "none of models, slices and modules is given"
            self.wrong(node.keys[given[1]] if given else node.mark, f"{what}; a recipe has exactly one of them.")
        modules: tuple[Module, ...] = ()
        if given[:1] == ["models"]:
            modules = (Module("", (self.models(fields["models"], marks["models"]),), {}, marks["models"]),)
        elif given[:1] == ["slices"]:
            modules = (Module("", self.slices(fields["slices"]), {}, marks["slices"]),)
        elif given[:1] == ["modules"]:
            modules = self.modules(fields["modules"])
        for key in ("dtype", "out_dtype"):
            self.word(fields, key, DTYPES)
        dtype, out_dtype = ((self.text(fields, k) or "").removeprefix("torch.") or None for k in ("dtype", "out_dtype"))
        base = self.reference(fields["base_model"]) if self.there(fields, "base_model") else None
        template = self.text(fields, "chat_template")
        return Recipe(
            name=self.text(fields, "name"),
            method_name=self.name,
            method=method,
            base=base,
            modules=modules,
            parameters=self.parameters(fields.get("parameters"), own=False),
            dtype=dtype,
            out_dtype=out_dtype,
            tokenizer=self.tokenizer(fields),
            chat_template=template,
            own=self.own(fields),
            text=text,
            marks=marks,
            parts=self.parts,
            notes=tuple(self.notes),
        )

    # --- models ---

    def models(self, node: Node, mark: Mark) -> Slice:
        inputs = []
        for entry in self.sequence(node, "models"):
            fields = self.mapping(entry, "a model", ("model", "parameters"))
            for model in self.window(fields.get("model")):
                inputs.append(self.input(entry, fields | ({} if model is None else {"model": model}), None))
        return Slice(tuple(i for i in inputs if i), None, {}, mark, {})

    def window(self, node: Node | None) -> list[Node | None]:
        """Ours: run/{1000..2000} is every checkpoint of a run whose number lies there, in the order of the numbers."""
        if node is None or not isinstance(node.value, str):
            return [node]
        try:
            return [node._replace(value=path) for path in window(node.value)]
        except ValueError as e:
            self.wrong(node.mark, str(e))
            return []

    def slices(self, node: Node) -> tuple[Slice, ...]:
        found = []
        for entry in self.sequence(node, "slices"):
            fields = self.mapping(entry, "a slice", ("sources", "base_model", "residual_weight", "parameters"))
            if "sources" not in fields:
                self.wrong(entry.mark, "a slice needs sources, each with model and layer_range.")
                continue
            inputs = []
            for source in self.sequence(fields["sources"], "sources"):
                parts = self.mapping(source, "a source", ("model", "layer_range", "parameters"))
                inputs.append(self.input(source, parts, self.layers(source, parts)))
            if "residual_weight" in fields:
                self.notes.append(Mistake(fields["residual_weight"].mark, "residual_weight has no effect, as in mergekit."))
            base = self.reference(fields["base_model"]) if self.there(fields, "base_model") else None
            parameters = self.parameters(fields.get("parameters"), own=False)
            found.append(Slice(tuple(i for i in inputs if i), base, parameters, entry.mark, entry.keys))
        return tuple(found)

    def modules(self, node: Node) -> tuple[Module, ...]:
        if not isinstance(node.value, dict):
            self.wrong(node.mark, "modules is a mapping of a module's name to its slices or models.")
            return ()
        found = []
        for name, entry in node.value.items():
            fields = self.mapping(entry, f"module {name}", ("slices", "models", "parameters"))
            given = [k for k in ("models", "slices") if k in fields and fields[k].value]
            if len(given) != 1:
                self.wrong(node.keys[name], f"module {name} needs either models or slices.")
                continue
            inside, parameters = fields[given[0]], self.parameters(fields.get("parameters"), own=False)
            slices = self.slices(inside) if given == ["slices"] else (self.models(inside, entry.keys["models"]),)
            found.append(Module(name, slices, parameters, node.keys[name]))
        return tuple(found)

    def input(self, node: Node, fields: dict[str, Node], layers: tuple[int, int] | None) -> Input | None:
        if not self.there(fields, "model"):
            if isinstance(node.value, dict):
                self.wrong(node.mark, "model is missing: name a path, or a model on the Hub.")
            return None
        model = self.reference(fields["model"])
        parameters = self.parameters(fields.get("parameters"), own=True)
        return Input(model, layers, parameters, fields["model"].mark, node.keys, self.statistics(fields)) if model else None

    def statistics(self, fields: dict[str, Node]) -> tuple[Path, Mark] | None:
        """Ours: a checkpoint of what a method looks at beside a model."""
        inside = fields["parameters"].value if "parameters" in fields else None
        if not self.method.data or not isinstance(inside, dict) or STATISTICS not in inside:
            return None
        node = inside[STATISTICS]
        if not isinstance(node.value, str | dict) or not node.value:
            self.wrong(node.mark, f"statistics is the path of a checkpoint, one for each model; got {node.plain!r}.")
            return None
        return self.path(node), node.mark

    def layers(self, node: Node, fields: dict[str, Node]) -> tuple[int, int] | None:
        if "layer_range" not in fields:
            self.wrong(node.mark, "layer_range is missing: name the first layer and the one after the last, such as [0, 16].")
            return (0, 0)
        value = fields["layer_range"].plain
        whole = isinstance(value, list) and len(value) == 2 and all(type(v) is int for v in value)
        if not whole or not 0 <= value[0] < value[1]:
            text = f"layer_range must be [first, last + 1] with first < last + 1, counted from 0; got {value!r}."
            self.wrong(fields["layer_range"].mark, text)
            return (0, 0)
        return value[0], value[1]

    def reference(self, node: Node) -> Reference | None:
        """mergekit's "model@revision+adapter@revision", or the same as a mapping."""
        if isinstance(node.value, dict):
            fields = self.mapping(node, "a model", ("model", "lora", "override_architecture"))
            parts = {k: self.path(fields[k]) for k in ("model", "lora") if self.there(fields, k)}
            if "model" not in parts:
                self.wrong(node.mark, "model is missing: name a path, or a model on the Hub.")
                return None
            found = Reference(parts["model"], parts.get("lora"))
            model, lora = (self.begin(fields[k]) if k in parts else node.mark for k in ("model", "lora"))
            self.parts.setdefault(found, (model, lora))
            return found
        if not isinstance(node.value, str) or not node.value.strip():
            self.wrong(node.mark, f"a model is named by its path, or its name on the Hub; got {node.plain!r}.")
            return None
        parts = [part.strip() for part in node.value.split("+")]
        if len(parts) > 2 or not all(parts):
            self.wrong(node.mark, f"{node.value!r} is not model+adapter; merge several adapters in documents of their own.")
            return None
        paths = [self.path(node._replace(value=part)) for part in parts]
        return Reference(paths[0], paths[1] if len(paths) > 1 else None)

    def path(self, node: Node) -> Path:
        if isinstance(node.value, dict):
            fields = self.mapping(node, "a path", ("path", "revision"))
            return Path(self.text(fields, "path") or "", self.text(fields, "revision"))
        path, _, revision = str(node.value).partition("@")
        if "@" in revision:
            self.wrong(node.mark, f"{node.value!r} has two revisions; write path@revision.")
        return Path(path, revision or None)

    def begin(self, node: Node) -> Mark:
        """Where a path stands, of one that is written with its revision as a mapping."""
        return (node.value.get("path", node) if isinstance(node.value, dict) else node).mark

    # --- parameters ---

    def parameters(self, node: Node | None, *, own: bool) -> Settings:
        """Parameters of the method; `own` are those beside a model."""
        if node is None or node.value is None:
            return {}
        if not isinstance(node.value, dict):
            self.wrong(node.mark, f"parameters is a mapping of names to values, got {node.plain!r}.")
            return {}
        found = {}
        for name, value in node.value.items():
            p = self.method.parameters.get(name)
            if self.lenient:
                continue
            if name == STATISTICS and self.method.data:
                if not own:
                    text = f"statistics are those of one model; write {STATISTICS}: path under the parameters of each model."
                    self.wrong(node.keys[name], text)
            elif p is None and name in PARAMETERS:
                self.notes.append(Mistake(node.keys[name], f"{name} has no effect on {self.name}."))
            elif p is None:
                text = f"{self.name} has no parameter {name!r}{self.hint(name, own=own)}"
                self.wrong(node.keys[name], text)
            elif own and p.scope == "shared":
                text = (
                    f"{name} is one value for all models and has no effect beside one; write it under the slice or the recipe."
                )
                self.notes.append(Mistake(node.keys[name], text))
            if p is not None:
                found[name] = read_setting(value, name, p, self.name, self.mistakes)
        return found

    def hint(self, name: str, *, own: bool) -> str:
        if name.isdigit():
            return f"; decimals have a point: write 0.{name}, not 0,{name}."
        if name == "embed_slerp":
            return ": mergekit dropped it; write t, or weight, as a condition: {part: embeddings, value: 0.5}."
        return suggest(name, [*self.method.parameters, *([STATISTICS] if own and self.method.data else [])])

    # --- the rest ---

    def tokenizer(self, fields: dict[str, Node]) -> Tokenizer | None:
        if self.there(fields, "tokenizer") and self.there(fields, "tokenizer_source"):
            self.wrong(
                fields["tokenizer"].mark, "tokenizer and tokenizer_source are given; tokenizer: {source: ...} says it all."
            )
        if self.there(fields, "tokenizer_source"):
            node = fields["tokenizer_source"]
            return Tokenizer(self.vocabulary(node), {}, None, node.mark)
        if not self.there(fields, "tokenizer"):
            return None
        node = fields["tokenizer"]
        if isinstance(node.value, str):
            self.wrong(node.mark, f"tokenizer is a mapping: write tokenizer: {{source: {node.value}}}.")
            return None
        parts = self.mapping(node, "tokenizer", ("source", "tokens", "pad_to_multiple_of"))
        tokens = {}
        if self.there(parts, "tokens"):
            if isinstance(parts["tokens"].value, dict):
                marks = parts["tokens"].keys
                tokens = {t: self.token(n, t)._replace(mark=marks[t]) for t, n in parts["tokens"].value.items()}
            else:
                self.wrong(parts["tokens"].mark, "tokens is a mapping of a token to where its row comes from.")
        pad = None
        if self.there(parts, "pad_to_multiple_of"):
            pad = parts["pad_to_multiple_of"].value
            if type(pad) is not int or pad < 1:
                self.wrong(
                    parts["pad_to_multiple_of"].mark, f"pad_to_multiple_of must be a whole number of 1 or more, got {pad!r}."
                )
                pad = None
        source = self.vocabulary(parts["source"]) if self.there(parts, "source") else "union"
        return Tokenizer(source, tokens, pad, node.keys.get("source", node.mark))

    def vocabulary(self, node: Node) -> str | Reference:
        return node.value if node.value in ("union", "base") else self.reference(node) or "base"

    def token(self, node: Node, token: str) -> TokenSource:
        fields = self.mapping(node, f"token {token!r}", ("source", "force"))
        force = fields["force"].value if "force" in fields else False
        if not isinstance(force, bool):
            self.wrong(fields["force"].mark, f"force must be true or false, got {force!r}.")
            force = False
        if not self.there(fields, "source"):
            if force:
                self.wrong(node.mark, f"token {token!r} is forced, but has no source; name a model, or {{kind: zero}}.")
            return TokenSource(None, force=force, given=False)
        source = fields["source"]
        if not isinstance(source.value, dict) or "kind" not in source.value:
            return TokenSource(self.reference(source), force=force)
        kind = source.value["kind"].value
        if kind == "zero":
            self.mapping(source, "kind: zero", ("kind",))
            return TokenSource(None, force=force)
        if kind != "model_token":
            self.wrong(source.value["kind"].mark, f"unknown kind {kind!r}{suggest(str(kind), ('model_token', 'zero'))}")
            return TokenSource(None, force=force)
        parts = self.mapping(source, "kind: model_token", ("kind", "model", "token", "token_id"))
        given = [k for k in ("token", "token_id") if self.there(parts, k)]
        if len(given) != 1 or not self.there(parts, "model"):
            self.wrong(source.mark, "kind: model_token needs a model, and either token or token_id.")
            return TokenSource(None, force=force)
        row = parts["token_id"].value if "token_id" in given else None
        if row is not None and (type(row) is not int or row < 0):
            self.wrong(parts["token_id"].mark, f"token_id must be a row from 0 on, got {row!r}.")
            row = 0
        return TokenSource(self.reference(parts["model"]), self.text(parts, "token"), row, force)

    def own(self, fields: dict[str, Node]) -> dict[str, Any]:
        """Our keys, with what holds where they are absent."""
        self.word(fields, "format", ("safetensors", "orbax"))
        self.word(fields, "layout", ("hf", *LAYOUTS))
        self.word(fields, "integers", ("agree", "base"))
        self.word(fields, "nonfinite", ("refuse", "allow"))
        self.word(fields, "state", ("skip", "keep"))
        if self.there(fields, "memory"):
            try:
                parse_size(fields["memory"].value, "memory")
            except (ValueError, TypeError):
                text = f"memory is bytes, or such as 2GB; got {fields['memory'].plain!r}."
                self.wrong(fields["memory"].mark, text)
        if self.there(fields, "sharding") and not isinstance(fields["sharding"].value, str):
            self.wrong(fields["sharding"].mark, f"sharding is words such as fsdp=4, got {fields['sharding'].plain!r}.")
        if self.there(fields, "dequantize") and not isinstance(fields["dequantize"].value, bool):
            self.wrong(fields["dequantize"].mark, f"dequantize must be true or false, got {fields['dequantize'].plain!r}.")
        seed = fields["seed"].value if "seed" in fields else 0
        if type(seed) is not int:
            self.wrong(fields["seed"].mark, f"seed must be a whole number, got {seed!r}.")
        rank = fields["rank"].value if self.there(fields, "rank") else 1
        if type(rank) is not int or rank < 1:
            self.wrong(
                fields["rank"].mark, f"rank, of a merge of adapters alone, must be a whole number from 1 on, got {rank!r}."
            )
        found = {"seed": seed, "integers": "agree", "nonfinite": "refuse", "state": "skip"}
        return found | {k: fields[k].value for k in OURS if self.there(fields, k)}

    def mapping(self, node: Node, what: str, known: Iterable[str]) -> dict[str, Node]:
        """The fields of a mapping, unknown ones reported."""
        known = tuple(known)
        if not isinstance(node.value, dict):
            meant = f"; write {known[0]}: {node.plain}" if isinstance(node.value, str) else ""
            self.wrong(node.mark, f"{what} is a mapping with {', '.join(known)}; got {node.plain!r}{meant}.")
            return {}
        for key, mark in node.keys.items():
            if key in known:
                continue
            meant = nearest(key, PARAMETERS) if "parameters" in known and not nearest(key, known) else None
            if key in PARAMETERS and meant:
                beside = ", ".join(k for k in node.keys if k in known)
                self.wrong(mark, f"{key!r} stands beside {beside}; it belongs under parameters.")
            elif key in ("model", "models", "layer_range") and "sources" in known:
                self.wrong(mark, f"{what} lists its models under sources, each with model and layer_range.")
            elif key in FLAGS:
                what = "a key that mergekit dropped" if key == "embed_slerp" else "a flag of mergekit's command line, not a key"
                self.wrong(mark, f"{key!r} is {what}; {FLAGS[key]}.")
            elif key in TOP and "parameters" in known:
                self.wrong(mark, f"{key!r} is a key of the recipe, not of {what}; move it to the top level.")
            elif meant:
                self.wrong(mark, f"unknown key {key!r} in {what}; did you mean {meant!r}, under parameters?")
            else:
                self.wrong(mark, f"unknown key {key!r} in {what}{suggest(key, known)}")
        return {k: v for k, v in node.value.items() if k in known}

    def sequence(self, node: Node, what: str) -> list[Node]:
        if not isinstance(node.value, list):
            self.wrong(node.mark, f"{what} is a list; begin each entry with a dash. Got {node.plain!r}.")
            return []
        if not node.value:
            self.wrong(node.mark, f"{what} is empty; name one or more.")
        return node.value

    def there(self, fields: dict[str, Node], key: str) -> bool:
        return key in fields and fields[key].value is not None

    def text(self, fields: dict[str, Node], key: str) -> str | None:
        if not self.there(fields, key):
            return None
        if not isinstance(fields[key].value, str | int | float):
            self.wrong(fields[key].mark, f"{key} must be a word, got {fields[key].plain!r}.")
        return str(fields[key].value)

    def word(self, fields: dict[str, Node], key: str, words: tuple[str, ...]) -> None:
        if self.there(fields, key) and str(fields[key].value).removeprefix("torch.") not in words:
            value = fields[key].plain
            more = "; float64 cannot be merged exactly in float32" if value == "float64" else ""
            near = SHORT.get(str(value)) if words == DTYPES else None
            near = near or nearest(str(value), words)
            hint = f"; did you mean {near!r}?" if near else "."
            self.wrong(fields[key].mark, f"{key} must be one of {', '.join(words)}, got {value!r}{more}{hint}")
