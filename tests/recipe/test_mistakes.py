"""Wrong recipes: each is refused from the headers alone, with its line, what was expected, and what to do."""

import copy
import random
import shutil
import time

import pytest
import yaml

from jaxmerge import recipe
from scripts.bench import mergekit_cases as cases

BASE = 'base_model: "@base"\n'
A, B, AB = '  - model: "@a"\n', '  - model: "@b"\n', 'models: [{model: "@a"}, {model: "@b"}]\n'
TIES = "merge_method: ties\n" + BASE + AB
LINEAR = "merge_method: linear\n" + AB
SLICE = 'slices:\n  - sources:\n      - {model: "@a", layer_range: %s}\n      - {model: "@%s", layer_range: %s}\n'
WORDS = 'merge_method: linear\nmodels: [{model: "@words0"}, {model: "@words2"}]\nparameters: {weight: 1}\n'
WEIGH = "parameters: {weight: 1}\n"

# (recipe, where, what the message says, what it advises)
WRONG = {
    "misspelt method": (
        "merge_method: dare-tiess\n" + AB,
        "1:15",
        "unknown merge_method 'dare-tiess'",
        "did you mean 'dare_ties'",
    ),
    "hyphens": ("merge_method: dare-ties\n" + BASE + AB, "1:15", "unknown merge_method", "'dare_ties'"),
    "no method": (AB, "1:1", "merge_method is missing", "linear"),
    "misspelt key": (LINEAR + WEIGH + "dtpye: float16\n", "4:1", "unknown key 'dtpye'", "did you mean 'dtype'"),
    "misspelt parameter": (TIES + "parameters: {weight: 1, densty: 0.5}\n", "4:25", "no parameter 'densty'", "'density'"),
    "weight beside the model": (
        'merge_method: linear\nmodels:\n  - model: "@a"\n    weight: 0.5\n',
        "4:5",
        "'weight' stands beside model",
        "under parameters",
    ),
    "a key in the wrong place": (
        'merge_method: linear\nmodels:\n  - model: "@a"\n    dtype: float16\n',
        "4:5",
        "'dtype' is a key of the recipe",
        "top level",
    ),
    "no base": ("merge_method: ties\n" + AB + WEIGH, "2:", "needs what they were trained from", "name base_model"),
    "no base of slerp": ("merge_method: slerp\n" + AB + "parameters: {t: 0.5}\n", "2:", "slerp needs base_model", "t = 0"),
    "no weight": (LINEAR, "2:", "weight is missing for", "write it under parameters"),
    "the base without a weight": (
        "merge_method: linear\n" + BASE + 'models:\n  - {model: "@a", parameters: {weight: 1}}\n',
        "2:",
        "weight is missing for",
        "an input of linear like any other",
    ),
    "two documents' worth": (
        LINEAR + "slices: []\nmodules: {}\n" + SLICE % ("[0, 2]", "b", "[0, 2]"),
        "",
        "occurs twice",
        "check",
    ),
    "models and slices": (LINEAR + SLICE % ("[0, 2]", "b", "[0, 2]"), "", "models and slices are given", "exactly one"),
    "neither models nor slices": ("merge_method: linear\n", "1:1", "none of models, slices and modules", "exactly one"),
    "layer counts": (
        'merge_method: linear\nmodels: [{model: "@a"}, {model: "@deep"}]\n' + WEIGH,
        "2:",
        "has 6 layers",
        "slices of as many layers",
    ),
    "layer_range out of bounds": (
        "merge_method: linear\n" + SLICE % ("[0, 2]", "b", "[3, 5]") + WEIGH,
        "5:",
        "ends beyond its 4 layers",
        "layer_range [3, 5]",
    ),
    "layer_range upside down": (
        "merge_method: linear\n" + SLICE % ("[2, 0]", "b", "[0, 2]") + WEIGH,
        "4:",
        "first < last + 1",
        "got [2, 0]",
    ),
    "slices of different lengths": (
        "merge_method: linear\n" + SLICE % ("[0, 2]", "b", "[1, 4]") + WEIGH,
        "5:",
        "as many layers as each other",
        "[1, 4]",
    ),
    "a slice without its base": (
        "merge_method: ties\n" + BASE + SLICE % ("[0, 2]", "b", "[0, 2]") + WEIGH,
        "4:",
        "not among the sources",
        "add it with its layer_range",
    ),
    "vocabularies": (WORDS, "2:", "other vocabularies: 11 rows against 8", "tokenizer: {source: union}"),
    "another width": (
        'merge_method: linear\nmodels: [{model: "@a"}, {model: "@words0"}]\n' + WEIGH,
        "2:",
        "has 1 layers",
        "models of one depth",
    ),
    "a dtype that is none": (LINEAR + WEIGH + "dtype: bfloat15\n", "4:8", "dtype must be one of", "did you mean 'bfloat16'"),
    "float64": (LINEAR + WEIGH + "dtype: float64\n", "4:8", "got 'float64'", "float32"),
    "weights that sum to zero": (
        'merge_method: linear\nmodels:\n  - {model: "@a", parameters: {weight: 1}}\n'
        '  - {model: "@b", parameters: {weight: -1}}\n',
        "3:",
        "sum to 0",
        "normalize: false",
    ),
    "weights that sum to zero in one layer": (
        'merge_method: linear\nmodels:\n  - {model: "@a", parameters: {weight: [1, 0]}}\n'
        '  - {model: "@b", parameters: {weight: [1, 0]}}\n',
        "3:",
        "layers.3",
        "change them",
    ),
    "an empty gradient": (LINEAR + "parameters: {weight: []}\n", "3:22", "an empty list", "one value or more"),
    "t outside": (
        "merge_method: slerp\n" + BASE + 'models: [{model: "@base"}, {model: "@a"}]\nparameters: {t: [0, 1.5]}\n',
        "4:21",
        "between 0 and 1",
        "got 1.5",
    ),
    "density outside": (
        TIES + "parameters: {weight: 1, density: 50}\n",
        "4:34",
        "density of ties must be a number between 0 and 1",
        "got 50",
    ),
    "a word for a number": (LINEAR + "parameters: {weight: half}\n", "3:22", "weight of linear must be a number", "got 'half'"),
    "a number for a flag": (LINEAR + "parameters: {weight: 1, normalize: 2}\n", "3:36", "must be true or false", "got 2"),
    "three models for slerp": (
        "merge_method: slerp\n" + BASE + AB + "parameters: {t: 0.5}\n",
        "3:",
        "takes 1 model beside the base, got 2",
        "slerp",
    ),
    "one model for model_stock": (
        "merge_method: model_stock\n" + BASE + "models:\n" + A,
        "3:1",
        "takes 2 or more models beside the base, got 1",
        "model_stock",
    ),
    "two models for passthrough": ("merge_method: passthrough\n" + AB, "2:", "takes 1 model, got 2", "passthrough"),
    "the base alone": (
        "merge_method: ties\n" + BASE + 'models: [{model: "@base"}]\n',
        "3:",
        "got 0",
        "the base alone gives the base",
    ),
    "a model twice": ("merge_method: linear\nmodels:\n" + A + A + WEIGH, "4:", "listed twice", "the sum of its weights"),
    "a filter that fits nothing": (
        LINEAR + "parameters:\n  weight:\n    - {filter: self_atn, value: 1}\n    - value: 0.5\n",
        "5:7",
        "'self_atn' fits no tensor",
        "'self_attn'",
    ),
    "a regex that is none": (
        LINEAR + "parameters:\n  weight:\n    - {regex: '(', value: 1}\n    - value: 0.5\n",
        "5:15",
        "is not a regex",
        "(",
    ),
    "conditions without an end": (
        LINEAR + "parameters:\n  weight:\n    - {filter: mlp, value: 1}\n",
        "5:7",
        "no condition of weight",
        "a value that has no filter",
    ),
    "a condition in the shade": (
        LINEAR + "parameters:\n  weight:\n    - value: 1\n    - {filter: mlp, value: 0}\n",
        "5:7",
        "fits every tensor",
        "put it last",
    ),
    "della's epsilon": (
        "merge_method: della\n" + BASE + AB + "parameters: {weight: 1, density: 0.1, epsilon: 0.2}\n",
        "4:48",
        "leaves the range",
        "below 0.1",
    ),
    "a path that is not there": (
        'merge_method: linear\nmodels: [{model: "@a"}, {model: "@words7"}]\n' + WEIGH,
        "2:",
        "there is nothing at",
        "did you mean",
    ),
    "a model that is not in the cache": (
        'merge_method: linear\nmodels: [{model: "@a"}, {model: org/model}]\n' + WEIGH,
        "2:",
        "is no path here",
        "hf download org/model",
    ),
    "a token that is not there": (WORDS + 'tokenizer: {tokens: {dog: {source: "@words2"}}}\n', "4:", "'dog'", "words2"),
    "a vocabulary of a model without one": (LINEAR + WEIGH + "tokenizer: {source: union}\n", "4:", "tokenizer.json", "@a"),
    "two vocabularies": (WORDS + "tokenizer: {source: union}\ntokenizer_source: base\n", "4:", "are given", "says it all"),
    "an unknown kind of row": (WORDS + "tokenizer: {tokens: {dog: {source: {kind: none}}}}\n", "4:", "unknown kind", "zero"),
    "two documents of one name": (
        "name: x\n" + LINEAR + WEIGH + "---\nname: x\n" + LINEAR + WEIGH,
        "6:1",
        "given to two documents",
        "a name of its own",
    ),
    "documents in a circle": (
        "name: x\nmerge_method: linear\nmodels: [{model: y}]\n"
        + WEIGH
        + "---\nname: y\nmerge_method: linear\nmodels: [{model: x}]\n"
        + WEIGH,
        "1:1",
        "need each other",
        "one must come first",
    ),
    "a recipe of another program": (
        BASE + "gate_mode: hidden\nexperts: []\n",
        "3:1",
        "mergekit-moe",
        "merge_method and models",
    ),
    "not YAML": ("merge_method: [linear\nmodels: x: y\n", "2:", "not YAML", "colons"),
    "a scope with gradients": (
        TIES + "parameters: {weight: [0, 1], density: 0.5, scope: model}\n",
        "4:22",
        "one weight",
        "scope: tensor",
    ),
    "models without their key": ('merge_method: linear\nmodels:\n  - "@a"\n', "3:5", "a mapping with model", "write model: @a"),
    "models in a slice": (
        'merge_method: passthrough\nslices:\n  - models: [{model: "@a", layer_range: [0, 2]}]\n',
        "3:5",
        "lists its models under sources",
        "layer_range",
    ),
    "a range in words": (
        'merge_method: passthrough\nslices:\n  - sources: [{model: "@a", layer_range: 0-2}]\n',
        "3:",
        "layer_range must be [first, last + 1]",
        "got '0-2'",
    ),
    "a percentage": (TIES + "parameters: {weight: 1, density: 50%}\n", "4:34", "between 0 and 1, got '50%'", "50 % is 0.5"),
    "a percentage without its sign": (TIES + "parameters: {weight: 1, density: 20}\n", "4:34", "got 20", "20 % is 0.2"),
    "a decimal comma": (
        'merge_method: linear\nmodels:\n  - {model: "@a", parameters: {weight: 0,5}}\n',
        "3:",
        "no parameter '5'",
        "write 0.5, not 0,5",
    ),
    "tabs": ('merge_method: linear\nmodels:\n\t- model: "@a"\n', "3:1", "cannot start any token", "spaces, not with tabs"),
    "a flag of mergekit": (LINEAR + WEIGH + "random_seed: 7\n", "4:1", "a flag of mergekit's command line", "write seed"),
    "a flag that nothing needs": (LINEAR + WEIGH + "lazy_unpickle: true\n", "4:1", "'lazy_unpickle' is a flag", "leave it out"),
    "a document that is not there": (
        'merge_method: linear\nmodels: [{model: "@a"}, {model: step1}]\n' + WEIGH,
        "2:",
        "nothing at 'step1'",
        "no document of the recipe has this name",
    ),
    "a quantised model": (
        "merge_method: linear\nmodels: [{model: '%s'}]\n" + WEIGH,
        "2:",
        "is quantised (GGUF)",
        "safetensors",
    ),
    "a vocabulary in one word": (WORDS + "tokenizer: union\n", "4:12", "tokenizer is a mapping", "{source: union}"),
    "t beside a model": (
        "merge_method: slerp\n" + BASE + 'models: [{model: "@base"}, {model: "@a", parameters: {t: 0.5}}]\n',
        "3:",
        "t is missing: slerp needs it",
        "for the recipe",
    ),
    "a sharding of more devices than are here": (
        LINEAR + WEIGH + "format: orbax\nsharding: fsdp=64\n",
        "5:1",
        "needs 64 devices, here are 8",
        "xla_force_host_platform_device_count=64",
    ),
    "a sharding in other words": (LINEAR + WEIGH + "sharding: 4\n", "4:", "sharding is words such as fsdp=4", "got 4"),
    "a sharding of one word": (LINEAR + WEIGH + "format: orbax\nsharding: fsdp\n", "5:1", "not of the form", "fsdp=4"),
    "a sharding of files": (LINEAR + WEIGH + "sharding: fsdp=8\n", "4:1", "safetensors are written by ranges", "leave it out"),
    "too little memory": (
        "merge_method: tsvm\n" + BASE + AB + "memory: 1kB\n",
        "4:1",
        "must see a tensor whole",
        "raise memory= (--memory)",
    ),
    "a layout that none has": (LINEAR + WEIGH + "layout: gemma\n", "4:1", "no model of this recipe is in", "there are a (hf)"),
    "layers beyond the last, in lines": (
        'merge_method: passthrough\nslices:\n  - sources:\n      - model: "@a"\n        layer_range: [3, 5]\n',
        "5:9",
        "ends beyond its 4 layers",
        "layer_range [3, 5]",
    ),
    "a shared parameter that is missing": (
        "merge_method: slerp\n" + BASE + 'models:\n  - model: "@base"\n  - model: "@a"\nparameters:\n  densty: 1\n',
        "7:3",
        "slerp has no parameter 'densty'",
        "there are: t",
    ),
    "a shared parameter that nobody writes": (
        BASE + 'models:\n  - model: "@base"\n  - model: "@a"\nmerge_method: slerp\n',
        "5:1",
        "t is missing",
        "for the recipe",
    ),
    "a value that a function refuses": (
        "merge_method: pcb\n" + BASE + AB + "parameters:\n  density: 0.5\n  tail: 2\n",
        "6:9",
        "tail must be between 0 and 0.5",
        "got 2",
    ),
    "a token of another model, in lines": (
        WORDS + 'tokenizer:\n  source: union\n  tokens:\n    dog:\n      source: "@a"\n',
        "7:5",
        "'dog' is to come from",
        "list it, or name one that is",
    ),
    "a vocabulary of another model, in lines": (
        WORDS + 'tokenizer:\n  tokens: {}\n  source: "@a"\n',
        "6:3",
        "the vocabulary is to be that of",
        "list it, or name one that is",
    ),
    "a base of a slice that is not there": (
        'merge_method: ties\nslices:\n  - sources:\n      - {model: "@a", layer_range: [0, 4]}\n    base_model: "@bse"\n'
        + WEIGH,
        "5:5",
        "there is nothing at",
        "did you mean",
    ),
    "two models for one": (
        "merge_method: update_selective\n" + BASE + AB + "parameters: {density: 0.5}\n",
        "3:1",
        "takes 1 model beside the base, got 2",
        "update_selective",
    ),
    "embed_slerp at the top": (
        LINEAR + WEIGH + "embed_slerp: true\n",
        "4:1",
        "a key that mergekit dropped",
        "part: embeddings",
    ),
    "half a recipe of experts": (LINEAR + WEIGH + "experts_per_token: 2\n", "4:1", "mergekit-moe", "merge_method and models"),
    "a dtype in short": (LINEAR + WEIGH + "dtype: fp16\n", "4:8", "got 'fp16'", "did you mean 'float16'"),
    "fences of Markdown": ("```yaml\n" + LINEAR + WEIGH + "```\n", "1:1", "not YAML", "take the lines ```"),
    "a variable of the shell": (
        "merge_method: linear\nmodels: [{model: $HOME/none}]\n" + WEIGH,
        "2:",
        "not filled in",
        "write '/",
    ),
    "a regex as a filter": (
        LINEAR + "parameters:\n  weight:\n    - {filter: mlp.*_proj, value: 1}\n    - value: 0.5\n",
        "5:7",
        "'mlp.*_proj' fits no tensor",
        "write regex",
    ),
    "models in a slice, one": (
        'merge_method: passthrough\nslices:\n  - model: "@a"\n    layer_range: [0, 2]\n',
        "3:5",
        "lists its models under sources",
        "layer_range",
    ),
    "no models at all": ("merge_method: linear\nmodels: []\n", "2:1", "models is empty", "name one or more"),
    "a vocabulary as it was written": (
        WORDS + "tokenizer_source: model:@words2\n",
        "4:19",
        "is no model of this recipe",
        "write @words2",
    ),
    "embed_slerp": (
        LINEAR + "parameters: {weight: 1, embed_slerp: true}\n",
        "3:25",
        "no parameter 'embed_slerp'",
        "part: embeddings",
    ),
}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    cases.write(root, cases.Size())
    return root


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_recipe_is_told_what_to_do(models, monkeypatch, tmp_path, name):
    text, where, *parts = WRONG[name]
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    began = time.monotonic()
    (tmp_path / "model.gguf").touch()
    with pytest.raises(recipe.RecipeError) as refused:
        recipe.plan(text.replace("@", f"{models}/").replace("'%s'", str(tmp_path)))
    assert time.monotonic() - began < 5
    message = str(refused.value)
    print(message)
    for part in parts:
        assert part.replace("@", f"{models}/") in message, message
    assert f"recipe:{where}" in message if where else "recipe" in message, message


def test_a_file_that_came_damaged_is_its_models_mistake(models, tmp_path):
    shutil.copytree(models / "words0", tmp_path / "words0")
    text = f'merge_method: linear\nmodels:\n  - model: "{models}/words0"\n  - model: "{tmp_path}/words0"\n' + WEIGH
    text += "chat_template: auto\ntokenizer:\n  source: union\n"
    for name, content, what in (
        ("tokenizer_config.json", "{", "is not JSON"),
        ("tokenizer.json", '{"added_tokens": [{}]}', "is not one of the tokenizers library"),
        ("tokenizer.json", "[]", "is not an object"),
    ):
        was = (tmp_path / "words0" / name).read_bytes()
        (tmp_path / "words0" / name).write_text(content)
        with pytest.raises(recipe.RecipeError) as refused:
            recipe.plan(text)
        assert "recipe:4:12: " in str(refused.value) and f"{name} {what}" in str(refused.value), str(refused.value)
        assert "fetch it again" in str(refused.value)
        (tmp_path / "words0" / name).write_bytes(was)


def test_what_an_option_says_is_no_mistake_of_a_line(models):
    text = (LINEAR + WEIGH + "format: orbax\nsharding: fsdp=8\n").replace("@", f"{models}/")
    with pytest.raises(recipe.RecipeError) as refused:
        recipe.plan(text, format="safetensors")
    assert "recipe:5:1: sharding" in str(refused.value)
    with pytest.raises(recipe.RecipeError) as refused:
        recipe.plan(text, format="safetensors", sharding="fsdp=4")
    assert "recipe: sharding" in str(refused.value)


def test_all_mistakes_in_one_message(models):
    text = "merge_methd: ties\nmodels:\n  - model: 7\n  - modl: x\nparameters: {weight: [1, a]}\ndtype: x\n"
    with pytest.raises(recipe.RecipeError) as refused:
        recipe.plan(text)
    message = str(refused.value)
    for part in ("unknown key 'merge_methd'", "merge_method is missing", "got 7", "unknown key 'modl'", "dtype must be one of"):
        assert part in message, message
    assert message.startswith("the recipe has ") and len(refused.value.mistakes) >= 5


def test_choices_are_listed_once():
    with pytest.raises(recipe.RecipeError, match=r"one of float32, float16, bfloat16, got 'int7'\.$"):
        recipe.plan(LINEAR.replace(AB, "") + WEIGH + "models: [{model: a}]\nout_dtype: int7\n")


def test_two_mistakes_of_two_models(models, tmp_path):
    text = 'merge_method: linear\nmodels: [{model: "@x"}, {model: "@y"}]\n' + WEIGH
    with pytest.raises(recipe.RecipeError) as refused:
        recipe.plan(text.replace("@", f"{models}/"))
    assert len(refused.value.mistakes) == 2


ODD = [
    None, True, 0, -1, 1.5, float("nan"), float("inf"), 10**30, "", "x", "1e-3", "a+b+c", "a@b@c", "union", [], {}, [1], ["a"],
    [None], [[1]], {"a": 1}, [{"value": 1}], {"value": [0, 1]}, [{"filter": 3, "value": 1}], {"source": "union"},
]  # fmt: skip
KEYS = ["weigth", "dtype", "t", "parameters", "model", "tokenizer", "layer_range", "layout", "memory", "seed", "sharding"]


def places(x, path=()):
    yield path
    for k, v in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ():
        yield from places(v, (*path, k))


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_written_is_planned_or_refused(models, seed):
    """Recipes with a value exchanged, a key added, a character lost: never an error of another kind."""
    rng = random.Random(seed)
    planned = refused = 0
    for _ in range(150):
        data = yaml.safe_load(cases.recipe(rng.choice(list(cases.RECIPES)), models))
        path = rng.choice([p for p in places(data) if p])
        at = data
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = copy.deepcopy(rng.choice(ODD))
        if isinstance(at, dict) and rng.random() < 0.3:
            at[rng.choice(KEYS)] = copy.deepcopy(rng.choice(ODD))
        text = yaml.safe_dump(data)
        if rng.random() < 0.3:
            i = rng.randrange(len(text))
            text = text[:i] + rng.choice(["", ":", "\n", "- ", "{", "]", "&a ", "*a"]) + text[i + 1 :]
        try:
            recipe.plan(text + "\n")
            planned += 1
        except recipe.RecipeError:
            refused += 1
    assert planned and refused > 50
