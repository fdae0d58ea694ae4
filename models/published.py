"""The byte models as their authors publish them: a directory with config.json and weights, read and written without PyTorch.

    config, model = load_byt5("byt5-small")                     google/byt5-*: pytorch_model.bin or model.safetensors
    config, model = load_mrt5("mrt5-small", scan=True)          stanfordnlp/mrt5-*
    save("out", config, model)

Unknown settings and unknown tensors are refused, on both sides. Whether the head is a table of its own or the embedding
again is checked, because transformers 5 ties fresh T5 v1.1 models, which the authors did not.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from models import load, mrt5, t5
from models.load import read, write

Tied = Literal["refuse", "copy"]
SAME = {  # their name: ours
    "vocab_size": "vocab_size",
    "d_model": "d_model",
    "d_kv": "d_kv",
    "d_ff": "d_ff",
    "num_layers": "num_layers",
    "num_decoder_layers": "num_decoder_layers",
    "num_heads": "num_heads",
    "relative_attention_num_buckets": "num_buckets",
    "relative_attention_max_distance": "max_distance",
    "dropout_rate": "dropout",
}
FIXED: dict[str, tuple] = {  # what the models here are, by their names; other values are other models
    "feed_forward_proj": ("gated-gelu",),
    "layer_norm_epsilon": (1e-6,),
    "is_encoder_decoder": (True,),
    "pad_token_id": (0,),
    "eos_token_id": (1,),
    "decoder_start_token_id": (0, None),
    "dense_act_fn": ("gelu_new",),
    "is_gated_act": (True,),
    "gate_layer_norm": (True,),
    "use_gumbel_noise": (False,),
    "has_absolute_position_embeddings": (False,),
    "deletion_type": (None, "scaled_sigmoid"),
    "scale_decoder_outputs": (False,),
    "is_decoder": (False,),
}
INERT = {  # notes for other programs
    "_name_or_path", "architectures", "auto_map", "classifier_dropout", "dtype", "initializer_factor", "model_type",
    "gradient_checkpointing", "n_positions", "output_past", "task_specific_params", "tokenizer_class", "torch_dtype",
    "transformers_version", "use_cache", "random_deletion_probability", "fixed_deletion_amount", "train_language",
    "eval_language", "tie_word_embeddings", "tie_encoder_decoder", "bos_token_id", "id2label", "label2id",
}  # fmt: skip


def config_from_json(fields: Mapping[str, Any]) -> t5.T5Config | mrt5.MrT5Config:
    """Our config from a published one.

    Raises:
      ValueError: a setting that these models do not have, or one that is missing; all of them in one message.
    """
    fields = dict(fields)
    kind = fields.get("model_type", "t5")
    problems = [] if kind in ("t5", "mrt5") else [f"  model_type is {kind!r}; known are t5 (T5 v1.1, ByT5) and mrt5"]
    gates = (
        {"sigmoid_mask_scale", "deletion_threshold", "delete_gate_layer", "use_softmax1"}
        if kind == "mrt5"
        else {"use_softmax1"}
    )
    problems += [f"  {k} is missing" for k in SAME if k not in fields]
    problems += [
        f"  {k} is {fields[k]!r}; these models have {' or '.join(map(repr, allowed))}"
        for k, allowed in FIXED.items()
        if k in fields and fields[k] not in allowed
    ]
    unknown = sorted(fields.keys() - SAME.keys() - FIXED.keys() - INERT - gates)
    problems += [f"  {k} ({str(fields[k])[:60]}) is not known" for k in unknown]
    if kind == "mrt5":
        problems += [f"  {k} is missing" for k in ("sigmoid_mask_scale", "delete_gate_layer") if k not in fields]
    if problems:
        raise ValueError("config.json does not describe a model that is here:\n" + "\n".join(problems))
    base = t5.T5Config(**{ours: fields[theirs] for theirs, ours in SAME.items()}, softmax1=fields.get("use_softmax1", False))
    if kind == "t5":
        return base
    config = mrt5.MrT5Config(base, fields["delete_gate_layer"], fields["sigmoid_mask_scale"])
    if fields.get("deletion_threshold") not in (None, config.threshold):
        raise ValueError(
            f"config.json has deletion_threshold {fields['deletion_threshold']}; here a byte is deleted at half of the gate's "
            f"scale, {config.threshold}. Set it to that, and pass threshold= to `encode` for another."
        )
    return config


def config_to_json(config: t5.T5Config | mrt5.MrT5Config) -> dict[str, Any]:
    """The config as Hugging Face's T5 (or the official MrT5) reads it."""
    base = config.base if isinstance(config, mrt5.MrT5Config) else config
    out: dict[str, Any] = {theirs: getattr(base, ours) for theirs, ours in SAME.items()}
    out |= {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "feed_forward_proj": "gated-gelu"}
    out |= {
        "layer_norm_epsilon": 1e-6,
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
        "tokenizer_class": "ByT5Tokenizer",
    }
    out |= {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    if base.softmax1:
        out["use_softmax1"] = True
    if isinstance(config, mrt5.MrT5Config):
        out |= {"architectures": ["MrT5ForConditionalGeneration"], "model_type": "mrt5", "deletion_type": "scaled_sigmoid"}
        out |= {"sigmoid_mask_scale": config.gate_scale, "deletion_threshold": config.threshold, "gate_layer_norm": True}
        out |= {"delete_gate_layer": config.gate_layer, "use_softmax1": base.softmax1}
        out |= {"has_absolute_position_embeddings": False, "use_gumbel_noise": False}
    return out


def with_head(tensors: Mapping[str, np.ndarray], *, tied: Tied = "refuse") -> dict[str, np.ndarray]:
    """The tensors with a head that is a table of its own, and without repeats of the embedding.

    Args:
      tensors: by Hugging Face's names.
      tied: what to do if there is no `lm_head.weight`, or if it is the embedding again, number for number: "refuse", or "copy"
        the embedding (the model computes the same, and has more parameters to train).

    Raises:
      ValueError: the head is tied and that was not expected; a repeat of the embedding differs from it.
    """
    out = dict(tensors)
    for alias in t5.ALIASES:
        if alias in out and not ("shared.weight" in out and np.array_equal(out[alias], out["shared.weight"])):
            raise ValueError(f"with_head: {alias} differs from shared.weight, which it must repeat.")
        out.pop(alias, None)
    shared, head = out.get("shared.weight"), out.get("lm_head.weight")
    same = head is not None and shared is not None and np.array_equal(head, shared)
    if shared is not None and (head is None or same) and tied == "refuse":
        raise ValueError(
            f"with_head: lm_head.weight {'equals shared.weight' if same else 'is missing'}: the head is tied to the embedding, "
            "which ByT5's is not (transformers 5 ties every fresh T5 v1.1). If this is meant, pass tied='copy'."
        )
    if head is None and shared is not None:
        out["lm_head.weight"] = shared
    return out


def load_byt5(path: str | pathlib.Path, *, tied: Tied = "refuse", **how: Any) -> tuple[t5.T5Config, t5.T5]:
    """A ByT5 or T5 v1.1 from a directory in Hugging Face's layout. `how`: the arguments of `T5` (dtype, scan, ...)."""
    config = read_config(path)
    if not isinstance(config, t5.T5Config):
        raise ValueError(f"load_byt5: {path} is an MrT5; read it with load_mrt5.")
    model = blank(t5.T5, config, **how)
    load.load(model, with_head(read(path), tied=tied), t5.torch_name)
    return config, model


def load_mrt5(path: str | pathlib.Path, *, tied: Tied = "refuse", **how: Any) -> tuple[mrt5.MrT5Config, mrt5.MrT5]:
    """An MrT5 from a directory in the layout of stanfordnlp/mrt5-*. `how`: the arguments of `MrT5`."""
    config = read_config(path)
    if not isinstance(config, mrt5.MrT5Config):
        raise ValueError(f"load_mrt5: {path} has no delete gate; read it with load_byt5.")
    model = blank(mrt5.MrT5, config, **how)
    load.load(model, with_head(read(path), tied=tied), functools.partial(mrt5.torch_name, gate_layer=config.gate_layer))
    return config, model


def save(
    path: str | pathlib.Path, config: t5.T5Config | mrt5.MrT5Config, model: nnx.Module, *, shard_bytes: int | None = None
) -> None:
    """Write config.json and safetensors, in one file or in several with an index, as the loaders here and theirs read them."""
    name = (
        functools.partial(mrt5.torch_name, gate_layer=config.gate_layer)
        if isinstance(config, mrt5.MrT5Config)
        else t5.torch_name
    )
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    write(path / "model.safetensors", load.export(model, name), shard_bytes=shard_bytes)
    (path / "config.json").write_text(json.dumps(config_to_json(config), indent=2) + "\n")


def read_config(path: str | pathlib.Path) -> t5.T5Config | mrt5.MrT5Config:
    """Our config from a directory's config.json."""
    file = pathlib.Path(path) / "config.json"
    if not file.exists():
        raise ValueError(f"read_config: {file} is missing; a published model's directory has it beside the weights.")
    return config_from_json(json.loads(file.read_text()))


def blank(make: Any, config: Any, **how: Any) -> Any:
    """A model of this form without the cost of a random start: its parameters are zeros, to be loaded."""
    abstract = nnx.eval_shape(lambda: make(config, **how, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    return nnx.merge(graph, jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), state))


def t5_config_of(tensors: Mapping[str, np.ndarray], base: t5.T5Config) -> t5.T5Config:
    """`base` with the sizes that T5X tensors (in PyTorch's orientation) show: T5X keeps its config elsewhere."""
    depth = lambda stack: (
        1 + max(int(n.split(".")[1].removeprefix("layers_")) for n in tensors if n.startswith(f"{stack}.layers_"))
    )
    vocab, width = tensors["token_embedder.embedding"].shape
    inner = tensors["encoder.layers_0.attention.query.kernel"].shape[0]
    buckets, heads = tensors["encoder.relpos_bias.rel_embedding"].shape
    return dataclasses.replace(
        base, d_model=width, d_kv=inner // heads, d_ff=tensors["encoder.layers_0.mlp.wo.kernel"].shape[1], num_heads=heads,
        num_layers=depth("encoder"), num_decoder_layers=depth("decoder"), vocab_size=vocab, num_buckets=buckets,
    )  # fmt: skip
