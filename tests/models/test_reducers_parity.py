"""The reducers against outputs of the official modules, on random weights and inputs.

tests/golden/reducers: hkzhang-git/FcaFormer 7dcd8e0 (`FcaBlock` with the cross tokens of two blocks), changsn/FlexDiT ad9fb50
(`DumbbellBlock` with one block of each kind, `PoolingformerBlock`), kyutai-labs/ARC-Encoder 3e04c97 (`PoolingModule`, rotary
embedding); torch 2.13 on CPU. Of timm they use `Mlp` and a `DropPath` of rate 0, which were written out for it.
`sd/` is the state dict, `in/` and `out/` what goes in and comes out.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmerge as jm
from jaxmerge.virtual import rotary
from models.reducers import fcaformer, flexdit

TOLERANCE = dict(rtol=2e-5, atol=2e-5)


def fill(module, tensors):
    """Our dotted names and arrays in our layout, all of them, into a module."""
    leaves = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))}
    assert leaves.keys() == tensors.keys()
    for name, leaf in leaves.items():
        leaf[...] = jnp.asarray(tensors[name]).reshape(leaf.shape)
    return module


def linear(sd, ours, theirs):
    return {f"{ours}.kernel": sd[f"sd/{theirs}.weight"].T, f"{ours}.bias": sd[f"sd/{theirs}.bias"]}


def norm(sd, ours, theirs):
    return {f"{ours}.scale": sd[f"sd/{theirs}.weight"], f"{ours}.bias": sd[f"sd/{theirs}.bias"]}


def adaptive(sd, ours, theirs):
    names = {"fc1": "mlp.fc1", "fc2": "mlp.fc2", "modulation": "adaLN_modulation.1"}
    parts = [linear(sd, f"{ours}adaptive.{a}", theirs + b) for a, b in names.items()]
    return {**parts[0], **parts[1], **parts[2]}


def block(sd, ours, theirs):
    """Self-attention has q, k and v fused there, cross attention k and v."""
    sd = dict(sd)
    for part in ("weight", "bias"):
        if f"sd/{theirs}attn.qkv.{part}" in sd:
            q, k, v = np.split(sd[f"sd/{theirs}attn.qkv.{part}"], 3)
            sd[f"sd/{theirs}attn.q.{part}"], sd[f"sd/{theirs}attn.kv.{part}"] = q, np.concatenate([k, v])
    maps = [linear(sd, ours + name, f"{theirs}attn.{name}") for name in ("q", "kv", "proj")]
    return {**maps[0], **maps[1], **maps[2], **adaptive(sd, ours, theirs)}


def test_flexdit_sparse_and_dense_tokens(golden):
    sd = golden("reducers/flexdit_a")
    recover = "token_recover_blocks.0."
    module = fill(
        flexdit.SparseDense(8, 2, (4, 4), (2, 2), depths=(1, 1, 1), mlp_ratio=2.0, rngs=nnx.Rngs(0)),
        {
            **block(sd, "merge.0.", "token_merge_blocks.0."),
            **block(sd, "middle.0.", "semantic_blocks.0."),
            **block(sd, "recover.block.", recover),
            **linear(sd, "recover.from_sparse", recover + "merged_layer1"),
            **linear(sd, "recover.from_dense", recover + "merged_layer2"),
            **block(sd, "after.0.", "normal_blocks.0."),
        },
    )
    np.testing.assert_allclose(module(sd["in/y"], sd["in/c"]), sd["out/o"], **TOLERANCE)


def test_flexdit_pooling(golden):
    sd = golden("reducers/flexdit_pooling_a")
    module = fill(
        flexdit.PoolingBlock(8, mlp_ratio=2.0, rngs=nnx.Rngs(0)),
        {**linear(sd, "v", "attn.v"), **linear(sd, "proj", "attn.proj"), **adaptive(sd, "", "")},
    )
    np.testing.assert_allclose(module(sd["in/y"], sd["in/c"]), sd["out/o"], **TOLERANCE)


def test_fcaformer_cross_tokens(golden):
    """Attention over tokens and cross tokens, then the tokens that the block hands on; a 4 x 5 grid."""
    sd = golden("reducers/fcaformer_a")
    table = np.zeros((2, 20), np.float32)  # theirs lists distances as they turn up, ours by (|dy|, |dx|)
    table[:, fcaformer._distances((4, 5)).ravel()] = sd["sd/attention_biases"][:, sd["idx"].ravel()]
    attend = fill(
        fcaformer.CrossTokenAttention(8, 2, (4, 5), 2, rngs=nnx.Rngs(0)),
        {
            **linear(sd, "qkv", "qkv"),
            **linear(sd, "proj", "proj"),
            **norm(sd, "norm", "norm1"),
            **norm(sd, "cross_norm", "s_norm"),
            "gamma": sd["sd/gamma_1"],
            "bias": table,
            "cross_scale": sd["sd/s_scale_factors"],
            "cross_bias": sd["sd/s_token_bias"],
        },
    )
    merge = fill(
        fcaformer.TokenMergeEnhance(8, rngs=nnx.Rngs(0)), {"conv.kernel": sd["sd/dw_conv.weight"].transpose(2, 3, 1, 0)}
    )
    x = attend(sd["in/x"], sd["in/s"])
    np.testing.assert_allclose(x, sd["out/attn"], **TOLERANCE)
    np.testing.assert_allclose(merge(x, (4, 5)), sd["out/su"], **TOLERANCE)


@pytest.mark.parametrize("n", [3, 7, 16])
@pytest.mark.parametrize("rate", [-20, -3, -2, 5])
def test_arc_encoders_runs(golden, n, rate):
    """A rate of 5 leaves five tokens, one of -3 makes runs of three."""
    want = golden("reducers/arc_encoder_a")[f"out/{n}_{rate}"]
    plan = jm.tokens.sequence_pool(n, min(n, rate) if rate > 0 else -(-n // -rate))
    np.testing.assert_allclose(np.asarray(plan.matrix) / np.asarray(plan.sizes)[:, None], want, rtol=1e-6)


def test_arc_encoders_rotary_embedding(golden):
    z = golden("reducers/arc_encoder_a")
    for name, n in (("q", 5), ("k", 16)):
        got = rotary(jnp.asarray(z[name]), jnp.arange(n), base=1e6, interleaved=True)
        np.testing.assert_allclose(got, z[f"{name}o"], **TOLERANCE)
