"""`jaxmerge demo [OUT]`: a base and three experts made on the spot, merged by a recipe; commands are printed as they run."""

import json
import pathlib
import shlex
import sys
from collections.abc import Iterator

import numpy as np

HIDDEN, INNER, LAYERS, HEADS = 128, 256, 6, 4
EXPERTS = ("math", "code", "chat")
WORDS = ["<unk>", "<s>", "</s>", *(chr(c) for c in range(32, 127)), *(f"word{i}" for i in range(926))]
RECIPE = """# TIES: of each expert's change the largest fifth is kept, and where signs disagree the heavier side wins.
merge_method: ties                  # mergekit's language, and its names: `jaxmerge plan` checks every word of it
base_model: {out}/base              # paths are relative to where you are; names on the Hub (org/name@revision) do as well
models:
  - model: {out}/math
    parameters:
      weight: 1.0
  - model: {out}/code
    parameters:
      weight: [0.2, 1.0]            # a gradient: from 0.2 in the first layer to 1.0 in the last
  - model: {out}/chat
    parameters:
      weight:
        - filter: self_attn         # tensors with this in their names
          value: 0.8
        - value: 0.4                # all others
parameters:
  density: 0.2
  normalize: true
tokenizer:
  source: union                     # code has a token of its own, <|fim|>: it gets a row of the output's embeddings
dtype: bfloat16
"""


def main(argv: list[str]) -> int:
    """Make the checkpoints, write the recipe, and run plan, merge, verify and inspect on them; 0 if all went well.

    Args:
      argv: the folder to work in, jaxmerge-demo if none is given; it must not exist.
    """
    if len(argv) > 1 or any(word.startswith("-") for word in argv):
        print(
            f"usage: jaxmerge demo [OUT]\n\n{__doc__}\n\nOUT: a folder that is not there yet; jaxmerge-demo if none is named."
        )
        return 0 if {"-h", "--help"} & set(argv) else 2
    out = pathlib.Path(argv[0] if argv else "jaxmerge-demo")
    if out.exists():
        print(f"jaxmerge: error: {out} exists; name another folder: jaxmerge demo OUT", file=sys.stderr)
        return 2
    from jaxmerge._commands import verbs

    trees = make(out)
    (out / "recipe.yml").write_text(RECIPE.format(out=out))
    print(
        f"{out}: a base and {len(EXPERTS)} experts of {sum(v.size for v in trees['base'].values()):,} parameters; recipe.yml:\n"
    )
    print(RECIPE.format(out=out))
    for command in (
        ["plan", f"{out}/recipe.yml", "--coefficients", "embed|layers.[05].(self_attn.q|mlp.up)|model.norm"],
        ["merge", f"{out}/recipe.yml", f"{out}/merged"],
        ["verify", f"{out}/merged"],
        ["inspect", f"{out}/merged", f"{out}/base", "--by-layer"],
    ):
        print(f"\n$ jaxmerge {shlex.join(command)}", flush=True)
        code = verbs.main(command)
        if code:
            return code
    return draw(out, trees)


def make(out: pathlib.Path) -> dict[str, dict[str, np.ndarray]]:
    """Write the checkpoints, as folders of the Hub; {name: tensors}. Each learned in layers of its own, two of them alike."""
    import ml_dtypes

    from jaxmerge.recipe._extract import write

    rng, trees = np.random.default_rng(0), {}
    base = {n: (np.ones(s) if len(s) == 1 else rng.normal(0, 0.02, s)).astype(np.float32) for n, s in shapes(len(WORDS))}
    shared = {n: rng.normal(0, 1, s) for n, s in shapes(len(WORDS))}
    for k, name in enumerate(("base", *EXPERTS)):
        tokens = [*WORDS, "<|fim|>"] if name == "code" else WORDS
        tree: dict[str, np.ndarray] = dict(base)
        for n, shape in shapes(len(tokens)):
            old = base[n] if base[n].shape == shape else np.concatenate([base[n], rng.normal(0, 0.02, (1, HIDDEN))])
            layer = int(n.split(".")[2]) if ".layers." in n else LAYERS / 2
            size = 0.0 if name == "base" or len(shape) == 1 else 0.004 * np.exp(-(((layer + 1 - 2 * k) / 3) ** 2))
            lesson = rng.normal(0, 1, shape)
            lesson[: len(shared[n])] += (0, 0.7, 0.7, -0.3)[k] * shared[n]  # math and code are akin, chat is not
            tree[n] = (old + size * lesson).astype(ml_dtypes.bfloat16)
        trees[name] = tree
        write(out / name, tree, beside(tokens))
    return trees


def shapes(vocabulary: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of a Llama."""
    yield "model.embed_tokens.weight", (vocabulary, HIDDEN)
    for i in range(LAYERS):
        for part, shape in {
            "input_layernorm": (HIDDEN,),
            **{f"self_attn.{n}_proj": (HIDDEN if n in "qo" else HIDDEN // 2, HIDDEN) for n in "qkvo"},
            "post_attention_layernorm": (HIDDEN,),
            **{f"mlp.{n}_proj": (INNER, HIDDEN) for n in ("gate", "up")},
            "mlp.down_proj": (HIDDEN, INNER),
        }.items():
            yield f"model.layers.{i}.{part}.weight", shape
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (vocabulary, HIDDEN)


def beside(tokens: list[str]) -> dict[str, str]:
    """A configuration and a tokenizer of whole words."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "vocab_size": len(tokens),
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    model = {"type": "WordLevel", "vocab": {t: i for i, t in enumerate(tokens)}, "unk_token": "<unk>"}
    tokenizer = {"version": "1.0", "pre_tokenizer": {"type": "WhitespaceSplit"}, "added_tokens": [], "model": model}
    return {"config.json": json.dumps(config, indent=1), "tokenizer.json": json.dumps(tokenizer)}


def draw(out: pathlib.Path, trees: dict[str, dict[str, np.ndarray]]) -> int:
    """The picture of what the experts learned, where matplotlib is there."""
    from jaxmerge import params

    rows = lambda name, x: x[: len(WORDS)] if name in ("model.embed_tokens.weight", "lm_head.weight") else x
    experts = [{n: rows(n, x) for n, x in trees[e].items()} for e in EXPERTS]
    print("\n>>> stacked = jaxmerge.params.task_vectors(base, experts)\n>>> jaxmerge.params.draw_tasks(stacked, names)")
    try:
        params.draw_tasks(params.task_vectors(trees["base"], experts), EXPERTS).savefig(out / "tasks.png")
        print(f"{out}/tasks.png: how alike the experts' changes are, where signs disagree, which layers changed most")
    except ImportError as e:
        print(f"no picture: {e}")
    return 0
