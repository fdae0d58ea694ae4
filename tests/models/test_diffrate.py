"""DiffRate: the official proxy, evaluation and training with their gradients; the laws that the official sizes break."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.load import load
from models.reducers.diffrate import DiffRate, Rate, masked_softmax
from models.vit import ViT, ViTConfig, torch_name
from tests.conftest import GOLDEN

PARAMS = {c["name"]: c["params"] for c in json.loads((GOLDEN / "tokens/diffrate_a.json").read_text())["cases"]}
P = PARAMS["model"]


@pytest.fixture(scope="module")
def official(golden):
    return golden("tokens/diffrate_a")


def build(vectors, **kwargs):
    """The official model's weights in ours, and its rates."""
    config = ViTConfig(
        width=P["embed_dim"], depth=P["depth"], num_heads=P["num_heads"], patch_size=P["patch_size"],
        image_size=P["img_size"], mlp_ratio=float(P["mlp_ratio"]), num_classes=P["num_classes"],
    )  # fmt: skip
    vit = ViT(config, rngs=nnx.Rngs(0))
    load(vit, {k.split("/w/")[1]: v for k, v in vectors.items() if "/w/" in k}, torch_name)
    model = DiffRate(vit, **kwargs)
    for i in range(P["depth"]):
        for name in ("prune", "merge"):
            getattr(model, name)[i].logits[...] = jnp.asarray(vectors[f"model_train/ddp/{i}/{name}_ddp"])
    return model


def images(official):
    return official["model/img"].transpose(0, 2, 3, 1)


# --- the proxy


@pytest.mark.parametrize("name", ["ddp0", "ddp1"])
def test_proxy_equals_the_official_one(official, name):
    p = PARAMS[name]
    a = {k.split("/")[1]: v for k, v in official.items() if k.startswith(f"{name}/")}
    rate = Rate(p["patch_number"], granularity=p["granularity"])
    rate.logits[...] = jnp.asarray(a["logits"])
    np.testing.assert_array_equal(rate.candidates, a["candidates"])

    def loss(rate):
        mask, kept = rate.mask(p["token_number"]), rate.kept()
        return (mask * a["cot"]).sum() + 0.3 * kept, (mask, kept)

    (_, (mask, kept)), grads = nnx.value_and_grad(loss, has_aux=True)(rate)
    assert kept == a["kept"]
    np.testing.assert_allclose(rate.probability(), a["token_probability"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(mask, a["mask"], rtol=0, atol=2e-5)
    assert set(np.asarray(mask).tolist()) <= {0.0, 1.0}  # exactly; theirs is off by a rounding
    np.testing.assert_allclose(grads["logits"][...], a["grad_logits"], rtol=0, atol=2e-5)


def test_one_candidate_keeps_everything():
    rate = Rate(25, granularity=26)
    assert rate.candidates.tolist() == [25] and rate.kept() == 26
    np.testing.assert_array_equal(rate.mask(26), 1)


# --- the model


def test_evaluation_equals_the_official_one(official):
    p = PARAMS["model_eval"]
    counts = list(zip(p["prune_kept"], p["merge_kept"], strict=True))
    logits, plan, size = nnx.jit(lambda m, x: m(x, counts))(build(official, official=True), images(official))
    np.testing.assert_allclose(logits, official["model_eval/logits"], rtol=0, atol=2e-4)
    # theirs come sorted by importance: find each of our groups among theirs
    source = official["model_eval/source"].astype(bool)
    for b in range(2):
        match = [source[b].tolist().index(row) for row in np.asarray(plan.matrix[b]).tolist()]
        assert sorted(match) == list(range(14))
        np.testing.assert_allclose(size[b], official["model_eval/size"][b, match, 0], rtol=0, atol=2e-5)


def test_training_equals_the_official_one(official):
    a = {k.removeprefix("model_train/"): v for k, v in official.items() if k.startswith("model_train/")}
    model = build(official, official=True)

    def loss(model, x):
        y, mask, size = model.soft_features(x)
        logits = model.vit.head(model.vit.norm(y[:, 0]))
        flops = model.flops(mlp_ratio=4.0)
        return (logits * a["cot"]).sum() + 1e-5 * flops, (logits, mask, size, flops)

    rates = nnx.DiffState(0, nnx.All(nnx.Param, lambda path, _: path[-1] == "logits"))
    grad = nnx.jit(nnx.value_and_grad(loss, argnums=rates, has_aux=True))
    (_, (logits, mask, size, flops)), grads = grad(model, images(official))
    np.testing.assert_allclose(logits, a["logits"], rtol=0, atol=2e-4)
    assert flops == PARAMS["model_train"]["flops"]
    for ours, theirs in ((mask, a["mask"]), (size, a["size"][..., 0])):  # theirs sorted by the last block's importance
        np.testing.assert_allclose(np.sort(ours), np.sort(theirs), rtol=0, atol=2e-5)
    for i in range(P["depth"]):
        for name in ("prune", "merge"):
            got = grads[name][i]["logits"][...]
            np.testing.assert_allclose(got, a[f"ddp_grad/{i}/{name}_ddp"], rtol=0, atol=2e-3)
    want = [tuple(pair) for pair in zip(*PARAMS["model_train"]["kept"], strict=True)]
    assert model.counts() == want


def test_flops_equal_the_official_ones(official):
    p, model = PARAMS["model_eval"], build(official)
    for rates, kept in ((model.prune, p["prune_kept"]), (model.merge, p["merge_kept"])):
        for rate, k in zip(list(rates)[1:], kept[1:], strict=True):
            rate.logits[...] = jnp.where(jnp.asarray(rate.candidates) == k - 1, 50.0, 0.0)
    assert abs(model.flops(mlp_ratio=4.0) - p["flops"]) < 1e-3 * p["flops"]


@pytest.mark.slow
def test_training_sees_what_evaluation_sees_and_sizes_obey_the_law(official):
    """Masked tokens weigh nothing: the soft forward gives the logits of the hard one, up to the epsilon of its softmax."""
    model = build(official)
    counts = tuple(model.counts())
    hard, plan, size = nnx.jit(lambda m, x: m(x, counts))(model, images(official))
    soft, flops = nnx.jit(lambda m, x: m.soft(x))(model, images(official))
    np.testing.assert_allclose(soft, hard, rtol=0, atol=2e-4)
    assert jnp.isfinite(flops)
    np.testing.assert_allclose(size, plan.sizes, rtol=1e-6)  # every token once, however it got there
    np.testing.assert_array_equal(plan.segment_ids[:, 0], 0)
    np.testing.assert_array_equal(plan.sizes[:, 0], 1)


def test_rates_learn_to_save(official):
    """A few steps on FLOPs alone take tokens away, from every block but the first."""
    model = build(official)
    before, grad = model.flops(), nnx.jit(nnx.grad(lambda m: m.flops() / 1e5))
    for _ in range(4):
        grads = grad(model)
        for name in ("prune", "merge"):
            for i, rate in enumerate(getattr(model, name)):
                assert i == 0 or jnp.any(grads[name][i]["logits"][...] != 0)
                rate.logits[...] = rate.logits[...] - 20 * grads[name][i]["logits"][...]
    assert model.flops() < before
    assert model.counts()[0] == (26, 26)


def test_masked_softmax_is_softmax_where_nothing_is_masked():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 8, 8))
    np.testing.assert_allclose(masked_softmax(logits, jnp.ones((2, 8))), jax.nn.softmax(logits), rtol=0, atol=2e-6)
    alone = masked_softmax(logits, jnp.zeros((2, 8)))  # everything masked: each sees itself
    np.testing.assert_allclose(alone, jnp.broadcast_to(jnp.eye(8), alone.shape), rtol=0, atol=1e-4)


def test_bad_input(official):
    model = build(official)
    with pytest.raises(ValueError, match="one pair of counts for each of 4 blocks, got 1"):
        model(images(official), [(26, 26)])
    with pytest.raises(ValueError, match="patches and granularity must be 1 or more, got 0 and 1"):
        Rate(0)
    config = ViTConfig(width=8, depth=1, num_heads=1, patch_size=4, image_size=8, num_classes=2, pool="mean", class_token=False)
    with pytest.raises(ValueError, match="ranked by the class token"):
        DiffRate(ViT(config, rngs=nnx.Rngs(0)))
