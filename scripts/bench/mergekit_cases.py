"""Small models, and recipes for them, to compare with mergekit: every method, gradients, slices, vocabularies, dtypes."""

import json
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np


class Size(NamedTuple):
    """A small Llama. Where all sizes are equal there are few shapes, and little to compile."""

    hidden: int = 8
    inner: int = 8
    vocabulary: int = 8
    heads: int = 2
    kv_heads: int = 2
    layers: int = 4


PARTS = re.split(r"(?m)^--- # (\w+)\n", pathlib.Path(__file__).with_name("mergekit_recipes.yml").read_text())
RECIPES = dict(zip(PARTS[1::2], PARTS[2::2], strict=True))
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
SPECIAL = ["<unk>", "<s>", "</s>"]
WORDS = {
    "words0": [*SPECIAL, "cat", "dog", "fish", "bird"],
    "words1": [*SPECIAL, "dog", "cat", "tree", "bird", "rock"],
    "words2": [*SPECIAL, "fish", "tree", "sun", "cat", "moon", "rock"],
}
ROWS = {"words0": 8, "words1": 8, "words2": 11}  # rows beyond the vocabulary are padding


def shapes(size: Size, *, tied: bool = False) -> dict[str, tuple[int, ...]]:
    """The tensors of a model."""
    h, kv = size.hidden, size.hidden // size.heads * size.kv_heads
    layer = {
        "input_layernorm": (h,),
        "self_attn.q_proj": (h, h),
        "self_attn.k_proj": (kv, h),
        "self_attn.v_proj": (kv, h),
        "self_attn.o_proj": (h, h),
        "post_attention_layernorm": (h,),
        "mlp.up_proj": (size.inner, h),
        "mlp.gate_proj": (size.inner, h),
        "mlp.down_proj": (h, size.inner),
    }
    found = {"model.embed_tokens.weight": (size.vocabulary, h), "model.norm.weight": (h,)}
    found |= {f"model.layers.{i}.{name}.weight": shape for i in range(size.layers) for name, shape in layer.items()}
    return found if tied else found | {"lm_head.weight": (size.vocabulary, h)}


def gpt2(size: Size) -> dict[str, tuple[int, ...]]:
    """The tensors of a GPT-2: kernels (in, out), biases, positions; the head is tied."""
    h = size.hidden
    layer = {
        "ln_1.weight": (h,),
        "ln_1.bias": (h,),
        "attn.c_attn.weight": (h, 3 * h),
        "attn.c_attn.bias": (3 * h,),
        "attn.c_proj.weight": (h, h),
        "attn.c_proj.bias": (h,),
        "ln_2.weight": (h,),
        "ln_2.bias": (h,),
        "mlp.c_fc.weight": (h, size.inner),
        "mlp.c_fc.bias": (size.inner,),
        "mlp.c_proj.weight": (size.inner, h),
        "mlp.c_proj.bias": (h,),
    }
    found = {"wte.weight": (size.vocabulary, h), "wpe.weight": (10, h), "ln_f.weight": (h,), "ln_f.bias": (h,)}
    found |= {f"h.{i}.{n}": s for i in range(size.layers) for n, s in layer.items()}
    return {f"transformer.{n}": s for n, s in found.items()}


def t5(size: Size) -> dict[str, tuple[int, ...]]:
    """The tensors of a T5 v1.1: two stacks, the decoder one block shorter."""
    h, found = size.hidden, dict[str, tuple[int, ...]]()
    found |= {"shared.weight": (size.vocabulary, h), "lm_head.weight": (size.vocabulary, h)}
    attention = lambda name: {f"{name}.{n}": (h, h) for n in "qkvo"}
    feed = {f"DenseReluDense.{n}": (size.inner, h) for n in ("wi_0", "wi_1")} | {"DenseReluDense.wo": (h, size.inner)}
    stacks = {
        "encoder": [attention("SelfAttention"), feed],
        "decoder": [attention("SelfAttention"), attention("EncDecAttention"), feed],
    }
    for stack, parts in stacks.items():
        found[f"{stack}.final_layer_norm.weight"] = (h,)
        found[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, size.heads)
        for i in range(size.layers - (stack == "decoder")):
            for k, part in enumerate(parts):
                found |= {f"{stack}.block.{i}.layer.{k}.{n}.weight": s for n, s in part.items()}
                found[f"{stack}.block.{i}.layer.{k}.layer_norm.weight"] = (h,)
    return found


def tensors(size: Size) -> dict[str, dict[str, np.ndarray]]:
    """Every model of the recipes: a base, what was trained from it (heavy-tailed changes, some entries none), and others."""
    import ml_dtypes

    rng = np.random.default_rng(20)
    draw = lambda shape: rng.standard_normal(shape).astype(np.float32)
    change = lambda x: draw(x.shape) * np.abs(draw(x.shape)) * (draw(x.shape) > -1.5) * np.float32(0.02)
    model = lambda size, tied=False: {n: draw(s) * np.float32(0.1) for n, s in shapes(size, tied=tied).items()}
    base = model(size)
    shared = {n: change(x) for n, x in base.items()}
    found = {"base": base} | {k: {n: x + shared[n] + change(x) for n, x in base.items()} for k in "abc"}
    found |= {"deep": model(size._replace(layers=6)), "tied": model(size, tied=True)}
    found["tied2"] = {n: x + change(x) for n, x in found["tied"].items()}
    found["half"] = {n: (x + change(x)).astype(ml_dtypes.bfloat16) for n, x in base.items()}
    words = model(size._replace(layers=1, vocabulary=1))
    for name, rows in ROWS.items():
        found[name] = {n: draw((rows, size.hidden)) if x.shape[0] == 1 else x + change(x) for n, x in words.items()}
    for family, named in (("gpt", gpt2), ("t5", t5)):
        first = {n: draw(s) * np.float32(0.1) for n, s in named(size).items()}
        found |= {f"{family}{k}": {n: x + change(x) for n, x in first.items()} if k else first for k in range(3)}
    return found


def recipe(name: str, root: pathlib.Path) -> str:
    """A recipe on models in a folder."""
    return RECIPES[name].replace("@", f"{root}/")


def write(root: pathlib.Path, size: Size) -> None:
    """The models as folders of the Hub's layout."""
    from safetensors.numpy import save_file

    for name, model in tensors(size).items():
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        save_file(model, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config(name, model, size), indent=2))
        if name in WORDS:
            (folder / "tokenizer.json").write_text(json.dumps(tokenizer(WORDS[name]), indent=2))
            (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=2))


def config(name: str, model: dict[str, np.ndarray], size: Size) -> dict[str, Any]:
    if name.startswith("gpt"):
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_embd": size.hidden,
            "n_inner": size.inner,
            "n_layer": size.layers,
            "n_head": size.heads,
            "n_positions": 10,
            "vocab_size": size.vocabulary,
        }
    if name.startswith("t5"):
        return {
            "architectures": ["T5ForConditionalGeneration"],
            "model_type": "t5",
            "d_model": size.hidden,
            "d_kv": size.hidden // size.heads,
            "d_ff": size.inner,
            "num_layers": size.layers,
            "num_decoder_layers": size.layers - 1,
            "num_heads": size.heads,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "vocab_size": size.vocabulary,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size.hidden,
        "intermediate_size": size.inner,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "num_hidden_layers": 1 + max(int(n.split(".")[2]) for n in model if ".layers." in n),
        "vocab_size": len(model["model.embed_tokens.weight"]),
        "tie_word_embeddings": "lm_head.weight" not in model,
        "torch_dtype": str(model["model.norm.weight"].dtype),
    }


TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
}


def tokenizer(words: list[str]) -> dict[str, Any]:
    added = [
        {"id": i, "content": w, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for i, w in enumerate(words[: len(SPECIAL)])
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(words)}, "unk_token": "<unk>"},
    }
