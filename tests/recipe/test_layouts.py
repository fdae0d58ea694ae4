"""One model in several libraries' layouts: round trips through the table, facts of each library, and merges across them."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmerge import checkpoint, recipe
from jaxmerge.recipe._layouts import LAYOUTS, from_hub, layout_of, to_hub

H, HEADS, KV, SIZE, F, V, L = 8, 2, 1, 4, 12, 6, 3


def maxtext(stacked, llama):
    """A MaxText decoder: names and shapes as its checkpoints have them."""
    layer = {
        "pre_self_attention_layer_norm/scale": (H,),
        "post_self_attention_layer_norm/scale": (H,),
        "self_attention/query/kernel": (H, HEADS, SIZE),
        "self_attention/key/kernel": (H, KV, SIZE),
        "self_attention/value/kernel": (H, KV, SIZE),
        "self_attention/out/kernel": (HEADS, SIZE, H),
        "mlp/wi_0/kernel": (H, F),
        "mlp/wi_1/kernel": (H, F),
        "mlp/wo/kernel": (F, H),
    }
    if not llama:
        layer |= {"self_attention/query_norm/scale": (SIZE,), "self_attention/key_norm/scale": (SIZE,)}
        layer |= {"self_attention/query/bias": (HEADS, SIZE)}
    top = {"token_embedder/embedding": (V, H), "decoder/decoder_norm/scale": (H,), "decoder/logits_dense/kernel": (H, V)}
    if stacked:
        inner = {f"decoder/layers/{n}": (s[0], L, *s[1:]) for n, s in layer.items()}
    else:
        inner = {f"decoder/layers_{i}/{n}": s for i in range(L) for n, s in layer.items()}
    return {f"params/params/{n}": s for n, s in (top | inner).items()}


def gemma(kind):
    layer = {
        "attn/q_einsum/w": (HEADS, H, SIZE),
        "attn/kv_einsum/w": (2, KV, H, SIZE),
        "attn/attn_vec_einsum/w": (HEADS, SIZE, H),
        "mlp/gating_einsum/w": (2, F, H) if kind == "gemma3" else (2, H, F),
        "mlp/linear/w": (F, H),
        "pre_attention_norm/scale": (H,),
        "pre_ffw_norm/scale": (H,),
    }
    if kind != "gemma":
        layer |= {f"{n}/scale": (H,) for n in ("post_attention_norm", "post_ffw_norm")}
    if kind == "gemma3":
        layer |= {f"attn/{n}/scale": (SIZE,) for n in ("_query_norm", "_key_norm")}
    top = {"embedder/input_embedding": (V, H), "final_norm/scale": (H,)}
    return {f"transformer/{n}": s for n, s in top.items()} | {
        f"transformer/layer_{i}/{n}": s for i in range(L) for n, s in layer.items()
    }


def t5x():
    attention = {"query/kernel": (H, 8), "key/kernel": (H, 8), "value/kernel": (H, 8), "out/kernel": (8, H)}
    mlp = {"mlp/wi_0/kernel": (H, F), "mlp/wi_1/kernel": (H, F), "mlp/wo/kernel": (F, H), "pre_mlp_layer_norm/scale": (H,)}
    encoder = {f"attention/{n}": s for n, s in attention.items()} | {"pre_attention_layer_norm/scale": (H,)} | mlp
    decoder = {f"{a}/{n}": s for a in ("self_attention", "encoder_decoder_attention") for n, s in attention.items()} | mlp
    decoder |= {"pre_self_attention_layer_norm/scale": (H,), "pre_cross_attention_layer_norm/scale": (H,)}
    found = {"token_embedder/embedding": (V, H), "decoder/logits_dense/kernel": (H, V)}
    for stack, layer in (("encoder", encoder), ("decoder", decoder)):
        found |= {f"{stack}/layers_{i}/{n}": s for i in range(2) for n, s in layer.items()}
        found |= {f"{stack}/{stack}_norm/scale": (H,), f"{stack}/relpos_bias/rel_embedding": (HEADS, 5)}
    return {f"target/{n}": s for n, s in found.items()}


MODELS = {
    "maxtext": maxtext(False, False),
    "maxtext_stacked": maxtext(True, False),
    "maxtext_llama": maxtext(False, True),
    "maxtext_llama_stacked": maxtext(True, True),
    "gemma": gemma("gemma"),
    "gemma2": gemma("gemma2"),
    "gemma3": gemma("gemma3"),
    "t5x": t5x(),
}


def saved(folder, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: np.ascontiguousarray(x) for n, x in tensors.items()}, folder / "model.safetensors")
    return checkpoint.open(folder)


def drawn(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_to_the_hub_and_back(tmp_path, layout):
    source = saved(tmp_path / "a", drawn(MODELS[layout]))
    assert layout_of(source) == layout
    hub = to_hub(source, layout)
    assert layout_of(hub) == "hf"
    assert all(hub.read(n).shape == leaf.shape for n, leaf in hub.leaves.items())
    assert sum(leaf.size for leaf in hub.leaves.values()) == sum(leaf.size for leaf in source.leaves.values())
    back = from_hub(hub, layout, source)
    assert list(back.leaves) == list(source.leaves)
    for n in source.leaves:  # the scale of a query is a rounding there and one back
        np.testing.assert_allclose(back.read(n), source.read(n), rtol=2.0**-22 if "query/kernel" in n else 0, err_msg=n)


def test_the_turns_mean_what_they_say(tmp_path):
    """By what the libraries compute with them: x @ kernel here, weight @ x on the Hub."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(H).astype(np.float32)
    for layout in ("maxtext", "maxtext_stacked"):
        tensors = drawn(MODELS[layout])
        hub = to_hub(saved(tmp_path / layout, tensors), layout)
        name = "params/params/decoder/layers{}/self_attention/query/kernel".format("_1" if layout == "maxtext" else "")
        kernel = tensors[name] if layout == "maxtext" else tensors[name][:, 1]
        expected = np.einsum("d,dhk->hk", x, kernel).reshape(-1)
        np.testing.assert_allclose(hub.read("model.layers.1.self_attn.q_proj.weight") @ x, expected, rtol=1e-5, atol=1e-6)
    tensors = drawn(MODELS["gemma3"])
    hub = to_hub(saved(tmp_path / "gemma3", tensors), "gemma3")
    value = np.einsum("d,hdk->hk", x, tensors["transformer/layer_2/attn/kv_einsum/w"][1]).reshape(-1)
    np.testing.assert_allclose(hub.read("model.layers.2.self_attn.v_proj.weight") @ x, value, rtol=1e-5, atol=1e-6)
    heads = rng.standard_normal((HEADS, SIZE)).astype(np.float32)
    out = np.einsum("hk,hkd->d", heads, tensors["transformer/layer_2/attn/attn_vec_einsum/w"])
    got = hub.read("model.layers.2.self_attn.o_proj.weight") @ heads.reshape(-1)
    np.testing.assert_allclose(got, out, rtol=1e-5, atol=1e-6)


def rotated(v, position, interleaved):
    """Rotary embedding of one head: pairs side by side, or halves."""
    angle = position * 10000.0 ** (-np.arange(SIZE // 2) / (SIZE // 2))
    a, b = (v[::2], v[1::2]) if interleaved else (v[: SIZE // 2], v[SIZE // 2 :])
    x, y = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
    return np.stack([x, y], axis=1).reshape(-1) if interleaved else np.concatenate([x, y])


def test_scores_of_a_llama_are_the_same_in_both(tmp_path):
    """MaxText rotates neighbours and has the scale in its query; the Hub rotates halves and divides."""
    tensors = drawn(MODELS["maxtext_llama"])
    hub = to_hub(saved(tmp_path / "a", tensors), "maxtext_llama")
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((2, H)).astype(np.float32)
    q, k = (tensors[f"params/params/decoder/layers_0/self_attention/{n}/kernel"][:, 0] for n in ("query", "key"))
    there = rotated(x @ q, 5, True) @ rotated(y @ k, 2, True)
    q, k = (hub.read(f"model.layers.0.self_attn.{n}_proj.weight")[:SIZE] for n in "qk")
    here = rotated(q @ x, 5, False) @ rotated(k @ y, 2, False) / np.sqrt(SIZE)
    np.testing.assert_allclose(here, there, rtol=1e-5)


@pytest.mark.parametrize("layout", ["maxtext_stacked", "t5x", "gemma"])
def test_parents_of_two_layouts_merge(tmp_path, layout):
    """In the layout of the base; and in the Hub's, where that is asked for."""
    a, b = (drawn(MODELS[layout], seed) for seed in (0, 1))
    saved(tmp_path / "a", a)
    hub = to_hub(saved(tmp_path / "b", b), layout)
    saved(tmp_path / "hub", {n: hub.read(n) for n in hub.leaves})
    text = f"merge_method: linear\nmodels: [{{model: {tmp_path}/a}}, {{model: {tmp_path}/hub}}]\nparameters: {{weight: 1}}\n"
    recipe.merge(text, tmp_path / "out")
    out = load_file(tmp_path / "out/model.safetensors")
    assert out.keys() == a.keys()
    for n in a:
        np.testing.assert_allclose(out[n], (a[n] + b[n]) / 2, rtol=1e-6, atol=1e-7, err_msg=n)
    [plan] = recipe.plan(text + "layout: hf\n")
    assert set(plan.headers.out) == set(hub.leaves)
    n = next(iter(hub.leaves))
    np.testing.assert_array_equal(plan.work.models[1].read(n), hub.read(n))


def test_mistakes_of_layouts(tmp_path):
    saved(tmp_path / "a", drawn(MODELS["maxtext_stacked"]))
    saved(tmp_path / "b", drawn(MODELS["maxtext_stacked"], 1))
    models = f"models: [{{model: {tmp_path}/a}}, {{model: {tmp_path}/b}}]\n"
    for more, message in (
        ("parameters: {weight: [0, 1]}\n", "layers are stacked.*layout: hf"),
        ("parameters: {weight: 1}\nlayout: maxtxt\n", "did you mean 'maxtext'"),
        ("parameters: {weight: 1}\nlayout: gemma\n", "no model of this recipe is in the layout gemma"),
    ):
        with pytest.raises(recipe.RecipeError, match=message):
            recipe.plan("merge_method: linear\n" + models + more)
    more = "parameters: {weight: [0, 1], normalize: false}\nlayout: hf\n"
    [plan] = recipe.plan("merge_method: linear\n" + models + more)
    assert {r.values["weight"][0] for r in plan.rows} == {0, 0.5, 1}


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_recipe_of_orbax_checkpoints(tmp_path):
    """Trees of layers, with a gradient along them, onto a mesh; and into the layout of the Hub."""
    import jax
    from orbax.checkpoint import v1 as ocp

    def tree(flat):
        root: dict = {}
        for name, x in flat.items():
            *path, last = name.split("/")
            at = root
            for key in path:
                at = at.setdefault(key, {})
            at[last] = jax.device_put(x)
        return root

    a, b = (drawn(MODELS["maxtext"], seed) for seed in (0, 1))
    ocp.save(tmp_path / "a", tree(a))
    ocp.save(tmp_path / "b", tree(b))
    text = f"merge_method: slerp\nbase_model: {tmp_path}/a\nmodels: [{{model: {tmp_path}/b}}]\nparameters: {{t: [0, 1]}}\n"
    recipe.merge(text + "sharding: fsdp=2\n", tmp_path / "out")
    out = ocp.load(tmp_path / "out")
    first = out["params"]["params"]["decoder"]["layers_0"]["mlp"]["wo"]["kernel"]
    np.testing.assert_allclose(first, a["params/params/decoder/layers_0/mlp/wo/kernel"], rtol=1e-6)
    assert len(first.sharding.device_set) == 2
    last = out["params"]["params"]["decoder"][f"layers_{L - 1}"]["mlp"]["wo"]["kernel"]
    np.testing.assert_allclose(last, b[f"params/params/decoder/layers_{L - 1}/mlp/wo/kernel"], rtol=1e-6)
    recipe.merge(text + "layout: hf\n", tmp_path / "hub")
    hub = load_file(tmp_path / "hub/model.safetensors")
    np.testing.assert_allclose(hub["model.layers.0.mlp.down_proj.weight"], np.asarray(first).T, rtol=1e-6)
    with pytest.raises(recipe.RecipeError, match="needs 64 devices"):
        recipe.plan(text + "sharding: fsdp=64\n")
