"""The Vision Transformer: the official vectors, timm's layout, meshes, dtypes, bad input."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxmerge as jm
from jaxmerge._kernels import _dispatch as dispatch
from models.load import export, load
from models.vit import VARIANTS, Block, Seen, ViT, ViTConfig, torch_name
from tests.conftest import GOLDEN
from tests.hlo import collectives

CASES = [c for c in json.loads((GOLDEN / "tokens/tome_vit_a.json").read_text())["cases"] if "r" in c["params"]]
TINY = ViTConfig(width=32, depth=3, num_heads=2, patch_size=4, image_size=16, num_classes=10)


@pytest.fixture(scope="module")
def tome(golden):
    return golden("tokens/tome_vit_a")


@pytest.fixture(scope="module")
def official(tome):
    """The official model's weights in ours."""
    config = ViTConfig(width=48, depth=4, num_heads=4, patch_size=4, image_size=32, num_classes=10)
    model = ViT(config, rngs=nnx.Rngs(0))
    load(model, {k.split("/w/")[1]: v for k, v in tome.items() if "/w/" in k}, torch_name)
    return nnx.split(model)


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(0), (8, 16, 16, 3))


def official_order(seen, r):
    """Our matching, its segments numbered as the official code orders its tokens: even ones first, then odd ones.

    The next layer's sides are the parities of *this* order, so that parity in depth needs it.
    """
    plan = jm.tokens.bipartite_matching(seen.keys, r, protect=seen.protect)
    n, ids = plan.num_positions, plan.segment_ids
    even = jnp.broadcast_to(jnp.arange(n) % 2 == 0, ids.shape)
    joined = jnp.take_along_axis(plan.sizes, ids, axis=1) > 1
    moved = even & joined
    rank = jnp.where(even, jnp.cumsum(jnp.where(even, ~moved, False), axis=1) - 1, (n + 1) // 2 - r + jnp.arange(n) // 2)
    to = jnp.zeros((len(ids), n - r), jnp.int32)  # our slot -> the official one
    to = jax.vmap(lambda t, i, v: t.at[i].set(v, mode="drop"))(to, jnp.where(moved, n, ids), rank.astype(jnp.int32))
    return jm.compose(jm.Plan(to, n - r), plan)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_equals_the_official_model(tome, official, case):
    name, p = case["name"], case["params"]
    r = tuple(p["r"]) if p["r_kind"] == "tuple" else p["r"]
    assert jm.tokens.schedule(4, r, n=65, protected=1)[:3] == p["schedule"][:3]
    graph, state = official

    @jax.jit
    def run(img, cot):
        def forward(img):
            model = nnx.merge(graph, state)
            x, plan = model.features(img.transpose(0, 2, 3, 1), r=r, proportional=p["prop_attn"], planner=official_order)
            return model.classify(x, plan), plan

        if f"{name}/grad_img" not in tome:
            return *forward(img), None
        logits, vjp, plan = jax.vjp(forward, img, has_aux=True)
        return logits, plan, vjp(cot)[0]

    logits, plan, gradient = run(tome["cls_model/img"], tome[f"{name}/cot"])
    np.testing.assert_allclose(logits, tome[f"{name}/logits"], rtol=0, atol=2e-4)
    assert plan.num_segments == p["tokens_per_block"][-1]
    if gradient is not None:
        np.testing.assert_allclose(gradient, tome[f"{name}/grad_img"], rtol=0, atol=2e-3)
    if f"{name}/size" in tome:
        np.testing.assert_array_equal(plan.sizes, tome[f"{name}/size"][..., 0])
    if f"{name}/source" in tome:
        np.testing.assert_array_equal(plan.matrix, tome[f"{name}/source"])


def test_the_metric_is_the_mean_key_of_the_official_model(tome, official):
    @jax.jit
    def first_metric(images):
        seen = []

        def record(block, r):
            seen.append(block.keys)
            return jm.tokens.bipartite_matching(block.keys, r, protect=block.protect)

        nnx.merge(*official).features(images, r=[8], planner=record)
        return seen[0]

    got = first_metric(tome["cls_model/img"].transpose(0, 2, 3, 1))
    np.testing.assert_allclose(got, tome["cls_p_8/metric0"], rtol=0, atol=2e-5)


def test_planners_may_look_at_the_attention(images):
    """Pruning by what the class token attends to, and a soft plan whose rows are summed."""
    model = ViT(TINY, rngs=nnx.Rngs(0))

    def attended(seen, r):
        score = seen.attention.mean(axis=1)[:, 0].at[:, 0].set(jnp.inf)
        return jm.tokens.keep_top_k(score, score.shape[-1] - r)

    def halves(seen, r):
        n = seen.x.shape[1]
        return jm.SoftPlan(0.5 * jnp.eye(n)[None, : n - r] + jnp.zeros_like(seen.x[:, :1, :1]))

    @jax.jit
    def run(images):
        x, plan = model.features(images, r=[12], planner=attended)
        rows = [model.features(images, r=[3], planner=halves, reduce=reduce) for reduce in ("mean", "sum")]
        return x, plan, rows

    x, plan, (mean, total) = run(images)
    assert x.shape == (8, 5, 32) and plan.matrix[:, 0, 0].all() and (np.asarray(plan.sizes) == 1).all()
    assert mean[0].shape == total[0].shape == (8, 14, 32) and not np.allclose(mean[0], total[0])
    np.testing.assert_allclose(total[1].sizes, 0.5, rtol=1e-6)


def test_the_attention_that_planners_see_is_the_blocks_own(images):
    block = Block(TINY, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 5, 32))
    bias = jnp.log(jnp.arange(1.0, 11.0)).reshape(2, 5)
    out, (q, k, v) = block.attn(x, bias)
    seen = Seen(x, q, k, v, bias, (0,), None)
    again = jnp.einsum("bhqk,bkhf->bqhf", seen.attention, v).reshape(2, 5, 32)
    np.testing.assert_allclose(block.attn.proj(again), out + block.attn.proj.bias[...][None, None], rtol=0, atol=1e-5)


# --- timm's layout


@pytest.mark.parametrize("name, millions", [
    ("Ti/16", 5.7), ("S/16", 22.1), ("B/16", 86.6), ("B/32", 88.2),
    *(pytest.param(*size, marks=pytest.mark.slow) for size in (("L/16", 304.3), ("L/32", 306.5), ("H/14", 632.0))),
])  # fmt: skip
def test_variants_have_the_published_sizes(name, millions):
    model = nnx.eval_shape(lambda: ViT(VARIANTS[name], rngs=nnx.Rngs(0)))
    count = sum(np.prod(p.shape) for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert round(count / 1e6, 1) == millions


@pytest.mark.parametrize("kind", ["token", "distilled", "mean"])
def test_checkpoints_survive_a_round_trip(kind, images):
    kinds = dict(token={}, distilled=dict(distilled=True), mean=dict(pool="mean"))
    config = ViTConfig(**{**vars(TINY), **kinds[kind]})
    one, two = ViT(config, rngs=nnx.Rngs(0)), ViT(config, rngs=nnx.Rngs(1))
    tensors = export(one, torch_name)
    heads = {"head.weight", "head.bias"} | ({"head_dist.weight", "head_dist.bias"} if kind == "distilled" else set())
    norm = "fc_norm" if kind == "mean" else "norm"
    assert heads | {f"{norm}.weight", "patch_embed.proj.weight", "blocks.2.attn.qkv.bias", "pos_embed"} <= tensors.keys()
    assert tensors["patch_embed.proj.weight"].shape == (32, 3, 4, 4)
    assert tensors["blocks.0.mlp.fc1.weight"].shape == (128, 32)
    run = nnx.jit(lambda model: model(images, r=[3]))
    assert not np.allclose(run(one), run(two))
    load(two, tensors, torch_name)
    np.testing.assert_array_equal(run(one), run(two))


# --- what merging means to the model


def test_features_and_the_plan(images):
    model = ViT(TINY, rngs=nnx.Rngs(0))
    x, plan = nnx.jit(lambda m, i: m.features(i, r=[3, 0, 4]))(model, images)
    assert x.shape == (8, 10, 32) and (plan.num_positions, plan.num_segments) == (17, 10)
    np.testing.assert_array_equal(plan.sizes.sum(-1), 17)
    np.testing.assert_array_equal(np.asarray(plan.segment_ids)[:, 0], 0)
    np.testing.assert_array_equal(np.asarray(plan.sizes)[:, 0], 1)
    _, whole = model.features(images)
    np.testing.assert_array_equal(whole.segment_ids, np.tile(np.arange(17), (8, 1)))


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_merging_equal_tokens_changes_nothing(pool, images):
    config = ViTConfig(**{**vars(TINY), "pool": pool, "class_token": pool == "token"})
    model = ViT(config, rngs=nnx.Rngs(0))
    first = config.num_prefix
    position = jnp.repeat(model.pos_embed[...][:, first::2], 2, axis=1)[:, :16]
    model.pos_embed[...] = jnp.concatenate([model.pos_embed[...][:, :first], position], axis=1)
    pairs = jnp.repeat(images[:, :, ::8], 2, axis=2).repeat(4, axis=2)  # neighbouring patches are equal
    whole, merged = (nnx.jit(lambda m, i, r=r: m(i, r=[r]))(model, pairs) for r in (0, 7))
    # float32 through three blocks on logits of order 1, summed in another order
    np.testing.assert_allclose(whole, merged, rtol=0, atol=2e-5)
    if pool == "token":
        other = nnx.jit(lambda m, i: m(i, r=[7], proportional=False))(model, pairs)
        assert np.abs(whole - other).max() > 2e-5


def test_bfloat16_stays_near_float32(images):
    models = [ViT(TINY, dtype=d, rngs=nnx.Rngs(0)) for d in (jnp.float32, jnp.bfloat16)]
    exact, rough = (nnx.jit(lambda m, i: m(i))(m, images) for m in models)
    assert rough.dtype == jnp.float32
    # a few roundings of 2**-9 in each of three blocks, on logits of order 1
    assert 0 < np.abs(exact - rough).max() < 0.1
    x, plan = nnx.jit(lambda m, i: m.features(i, r=4))(models[1], images)
    assert x.dtype == jnp.float32 and plan.num_segments == 5
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(nnx.state(models[1], nnx.Param)))


def test_it_trains_through_the_merge(images):
    graph, state = nnx.split(ViT(TINY, rngs=nnx.Rngs(0)))
    loss = lambda state: (nnx.merge(graph, state)(images, r=4) ** 2).mean()
    for gradient in jax.tree.leaves(jax.jit(jax.grad(loss))(state)):
        assert jnp.isfinite(gradient).all() and (gradient != 0).any()


def test_it_trains_alike_by_kernels(images):
    """With every kernel of a merging block, forward and back, as without."""
    config = ViTConfig(width=128, depth=2, num_heads=2, patch_size=4, image_size=16, num_classes=10)

    def slopes(attention):
        model = ViT(config, attention=attention, rngs=nnx.Rngs(0))
        return jax.tree.leaves(nnx.jit(nnx.grad(lambda m: jnp.sum(jnp.square(m(images, r=3)))))(model))

    wanted = slopes(None)
    with dispatch.aim("tpu", interpret=True):
        found = slopes("mosaic_tpu")
    for one, other in zip(found, wanted, strict=True):
        # sums of up to 8 x 17 x 512 products, a few in a row: rounded 2^-24 a time, at random
        assert jnp.abs(one - other).max() <= 8 * (8 * 17 * 512) ** 0.5 * 2.0**-24 * max(float(jnp.abs(other).max()), 1.0)


@pytest.mark.parametrize("r", [0, 4])
def test_the_forward_needs_no_collective(mesh, r, images):
    graph, state = nnx.split(ViT(TINY, rngs=nnx.Rngs(0)))

    def run(state, images):
        model = nnx.merge(graph, state)
        x, plan = model.features(images, r=r)
        return x, model.classify(x, plan)

    with jax.set_mesh(mesh):
        place = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
        args = place(state), place(images, "data")
        compiled = jax.jit(run).lower(*args).compile()
        outs = compiled(*args)
    assert collectives(compiled) == []
    for array in outs:
        assert array.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), array.ndim)
    alone = nnx.jit(lambda m, i: m(i, r=r))(nnx.merge(graph, state), images)
    np.testing.assert_allclose(outs[1], alone, rtol=0, atol=1e-5)


# --- bad input


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(image_size=18), "image_size 18 is not a multiple of patch_size 4"),
        (dict(num_heads=3), "width 32 is not a multiple of num_heads 3"),
        (dict(class_token=False), 'only pool="mean"'),
        (dict(distilled=True, pool="mean"), 'use pool="token"'),
    ],
)
def test_bad_configs(change, message):
    with pytest.raises(ValueError, match=message):
        ViTConfig(**{**vars(TINY), **change})


def test_bad_images(images):
    with pytest.raises(ValueError, match=r"\(batch, 16, 16, 3\), got \(8, 16, 15, 3\)"):
        ViT(TINY, rngs=nnx.Rngs(0))(images[:, :, 1:])
