"""Which tensors go into which, with which values: names of several libraries, modules, stacks, methods of our own."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxmerge import params, recipe
from jaxmerge.recipe._methods import MERGEKIT, METHODS
from jaxmerge.recipe._names import in_module, place, stacks, vocabulary_axis
from scripts.bench import mergekit_cases as cases


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    cases.write(root, cases.Size())
    return root


@pytest.mark.parametrize(
    ("name", "stack", "layer", "part", "axis"),
    [
        ("model.embed_tokens.weight", None, 0, "embeddings", 0),
        ("lm_head.weight", None, 0, "head", 0),
        ("model.norm.weight", None, 0, "rest", None),
        ("model.layers.31.self_attn.q_proj.bias", "model.layers.", 31, "layers", None),
        ("transformer.h.7.attn.c_attn.weight", "transformer.h.", 7, "layers", None),
        ("transformer.wte.weight", None, 0, "embeddings", 0),
        ("transformer.wpe.weight", None, 0, "embeddings", None),
        ("gpt_neox.embed_in.weight", None, 0, "embeddings", 0),
        ("embed_out.weight", None, 0, "head", 0),
        ("encoder.block.3.layer.0.SelfAttention.q.weight", "encoder.block.", 3, "layers", None),
        ("model.layers.2.block_sparse_moe.experts.5.w1.weight", "model.layers.", 2, "layers", None),
        ("bert.encoder.layer.11.output.dense.weight", "bert.encoder.layer.", 11, "layers", None),
        ("bert.embeddings.word_embeddings.weight", None, 0, "embeddings", 0),
        ("bert.embeddings.position_embeddings.weight", None, 0, "embeddings", None),
        ("params/params/decoder/layers_4/mlp/wi_0/kernel", "params/params/decoder/layers_", 4, "layers", None),
        ("params/params/decoder/layers/mlp/wi_0/kernel", None, 0, "rest", None),
        ("params/decoder/logits_dense/kernel", None, 0, "head", 1),
        ("transformer/layer_12/attn/q_einsum/w", "transformer/layer_", 12, "layers", None),
        ("transformer/embedder/input_embedding", None, 0, "embeddings", 0),
        ("target/encoder/layers_0/attention/query/kernel", "target/encoder/layers_", 0, "layers", None),
        ("Transformer/encoderblock_3/LayerNorm_0/scale", "Transformer/encoderblock_", 3, "layers", None),
        ("layers/3/kernel", "layers/", 3, "layers", None),
        ("visual.blocks.8.norm1.weight", "visual.blocks.", 8, "layers", None),
    ],
)
def test_what_a_name_says(name, stack, layer, part, axis):
    at = place(name)
    assert (at.stack, at.layer if at.stack else 0, at.part, vocabulary_axis(name)) == (stack, layer, part, axis)
    assert at.stack is None or at.at(at.layer) == name
    assert stacks([name]) == ({stack: layer + 1} if stack else {})


def test_modules_of_multimodal_models():
    text, vision, projector = "model.layers.0.mlp.up_proj.weight", "visual.blocks.0.norm1.weight", "visual.merger.mlp.0.weight"
    assert [in_module(n, "text_decoder") for n in (text, vision, projector)] == [True, False, False]
    assert [in_module(n, "vision_tower") for n in (text, vision, projector)] == [False, True, False]
    assert [in_module(n, "multi_modal_projector") for n in (text, vision, projector)] == [False, False, True]
    assert in_module("lm_head.weight", "shared") and not in_module("lm_head.weight", "decoder")


def t5(root, name, seed, blocks=(4, 3)):
    rng = np.random.default_rng(seed)
    x = {"shared.weight": rng.standard_normal((6, 4)), "lm_head.weight": rng.standard_normal((6, 4))}
    for stack, n in zip(("encoder", "decoder"), blocks, strict=True):
        x |= {f"{stack}.block.{i}.layer.0.SelfAttention.q.weight": rng.standard_normal((4, 4)) for i in range(n)}
        x[f"{stack}.final_layer_norm.weight"] = rng.standard_normal(4)
    save_file({k: v.astype(np.float32) for k, v in x.items()}, root / f"{name}.safetensors")
    return x


def test_an_encoder_and_a_decoder(tmp_path):
    """Gradients run along each stack; slices are written module by module."""
    a, b = t5(tmp_path, "a", 0), t5(tmp_path, "b", 1)
    text = f"""
merge_method: linear
models:
  - {{model: {tmp_path}/a.safetensors, parameters: {{weight: [0, 1]}}}}
  - {{model: {tmp_path}/b.safetensors, parameters: {{weight: 0}}}}
parameters: {{normalize: false}}
"""
    [plan] = recipe.plan(text)
    weight = {r.name: r.values["weight"][0] for r in plan.rows}
    at = "{}.block.{}.layer.0.SelfAttention.q.weight"
    assert [weight[at.format("encoder", i)] for i in range(4)] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert [weight[at.format("decoder", i)] for i in range(3)] == [0, 0.5, 1]
    slices = f"""
merge_method: passthrough
modules:
  encoder:
    slices:
      - sources: [{{model: {tmp_path}/a.safetensors, layer_range: [0, 3]}}]
      - sources: [{{model: {tmp_path}/b.safetensors, layer_range: [1, 4]}}]
  decoder:
    models: [{{model: {tmp_path}/b.safetensors}}]
"""
    with pytest.raises(recipe.RecipeError, match=r"2 tensors belong to none of the modules encoder, decoder, such as lm_head"):
        recipe.plan(slices)
    [plan] = recipe.plan(slices + f"  shared:\n    models: [{{model: {tmp_path}/a.safetensors}}]\n")
    source = plan.work.models[0]
    for i, (x, j) in enumerate([(a, 0), (a, 1), (a, 2), (b, 1), (b, 2), (b, 3)]):
        np.testing.assert_array_equal(source.read(at.format("encoder", i)), x[at.format("encoder", j)].astype(np.float32))
    np.testing.assert_array_equal(
        source.read("encoder.final_layer_norm.weight"), b["encoder.final_layer_norm.weight"].astype("f4")
    )
    assert source.leaves.keys() >= {"lm_head.weight", "shared.weight"} and at.format("encoder", 6) not in source.leaves
    with pytest.raises(recipe.RecipeError, match=r"one stack of layers, here are decoder\.block \(3\), encoder\.block \(4\)"):
        recipe.plan(
            f"merge_method: passthrough\nslices:\n  - sources: [{{model: {tmp_path}/a.safetensors, layer_range: [0, 2]}}]\n"
        )


@pytest.mark.parametrize("name", sorted(n for n, m in METHODS.items() if n not in MERGEKIT and m.base == "required"))
def test_methods_of_our_own(models, name):
    """Their parameters are those of the function, and they end in one model."""
    needed = "weight: [0.5, 1]" if "weight" in METHODS[name].parameters else "axis: 1" if name == "wudi" else ""
    one = name == "update_selective"
    others = "{model: ROOT/a}" if one else "{model: ROOT/a}, {model: ROOT/b}"
    text = f"merge_method: {name}\nbase_model: ROOT/base\nmodels: [{others}]\nparameters: {{{needed}}}\n".replace(
        "ROOT", str(models)
    )
    [plan] = recipe.plan(text)
    assert isinstance(plan.work.tx, params.MergeTransform) and len(plan.headers.out) == 39


def test_scope_of_the_whole_model(models):
    """TIES as the paper has it: one threshold over all tensors."""
    text = cases.recipe("ties", models) + "parameters: {scope: model}\n"
    [plan] = recipe.plan(text)
    assert plan.headers.passes > 1 and ("order", "model") in [tuple(n) for n in params.needs(plan.work.tx)]
    with pytest.raises(recipe.RecipeError, match="has one density for them"):
        recipe.plan(text.replace("density: 0.35", "density: [0.3, 0.4]"))


def test_a_base_for_each_slice_and_slices_of_different_numbers_of_models(models):
    [plan] = recipe.plan(cases.recipe("slices_bases", models))
    by_name = {r.name: r for r in plan.rows}
    first, second = (by_name[f"model.layers.{i}.mlp.up_proj.weight"] for i in (0, 2))
    assert [str(r.inputs[r.base][0]).rsplit("/", 1)[-1] for r in (first, second)] == ["base", "a"]
    assert [len(first.experts), len(second.experts)] == [2, 2] and second.inputs[0][1] == "model.layers.2.mlp.up_proj.weight"
    [plan] = recipe.plan(cases.recipe("slices_filtered", models))
    assert {len(r.inputs) for r in plan.rows} == {2, 3} and len(plan.work.models) == 3
