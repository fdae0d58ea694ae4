"""GTP-ViT: the official vectors, the rule, gradients, bad input."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.tokens import attention_score, keep_top_k, propagate, sparsify, subgraph, token_graph
from tests.conftest import GOLDEN

DETAILS = json.loads((GOLDEN / "tokens/gtp_a.json").read_text())
RULES = [c["name"].split("_")[1] for c in DETAILS["cases"] if c["name"].startswith("select_")]
score = jax.jit(attention_score, static_argnames=("rule", "prefix"))


@pytest.fixture(scope="module")
def gtp(golden):
    return golden("tokens/gtp_a")


def official(gtp, rule="MixedAttnMax"):
    """Our plan, and for each official output the slot of ours: theirs come by falling score, the class token first."""
    keep = keep_top_k(score(gtp["graph/attn"], rule=rule), 30)
    kept = gtp[f"select_{rule}/index_kept"]
    kept = np.concatenate([np.zeros_like(kept[:, :1]), kept], axis=1)
    slots = np.take_along_axis(np.asarray(keep.segment_ids), kept, axis=1)
    return keep, lambda y: np.take_along_axis(np.asarray(y), slots.reshape(*slots.shape, *[1] * (np.ndim(y) - 2)), axis=1)


def test_the_graph_is_the_official_one(gtp):
    graph = token_graph(gtp["graph/x"], grid=(6, 6), neighbors=4, prefix=1)
    assert (graph[:, 0] == 0).all() and (graph[:, :, 0] == 0).all()
    np.testing.assert_allclose(graph[:, 1:, 1:], gtp["graph/graph"], rtol=0, atol=2e-5)
    np.testing.assert_array_equal(graph[:, 1:, 1:] > 0, gtp["graph/mixed"])
    semantic = token_graph(gtp["graph/x"], neighbors=4, prefix=1)
    np.testing.assert_array_equal(semantic[:, 1:, 1:] > 0, gtp["graph/semantic"])


def test_all_rules_are_here():
    assert len(RULES) == 11


@pytest.mark.parametrize("rule", RULES)
def test_selections_are_the_official_ones(gtp, rule):
    s = np.asarray(score(gtp["graph/attn"], rule=rule))
    order = np.argsort(-s, axis=1, kind="stable")
    np.testing.assert_array_equal(order[:, 1:30], gtp[f"select_{rule}/index_kept"])
    np.testing.assert_array_equal(order[:, 30:], gtp[f"select_{rule}/index_prop"])


def test_propagation_is_the_official_one(gtp):
    keep, order = official(gtp)
    graph = jnp.pad(gtp["graph/graph"], ((0, 0), (1, 0), (1, 0)))
    plan = propagate(keep, graph, alpha=0.1)
    x, scales = gtp["graph/x"], gtp["propagate_GraphProp/token_scales_in"]
    close = lambda got, name: np.testing.assert_allclose(got, gtp[name], rtol=0, atol=2e-5)
    close(order(jm.merge(plan, x, reduce="sum")), "propagate_GraphProp/out")
    close(order(jm.merge(plan, scales, reduce="sum")), "propagate_GraphProp/token_scales")
    rows = order(subgraph(keep, graph))
    close(np.swapaxes(order(np.swapaxes(rows, 1, 2)), 1, 2)[:, 1:, 1:], "propagate_GraphProp/weight")
    close(order(jm.merge(keep, x)), "propagate_None/out")
    fused = jm.Plan(jnp.where(keep.kept, keep.segment_ids, 30), 31)
    mean = np.asarray(jm.merge(fused, x))
    close(np.concatenate([order(mean[:, :30]), mean[:, 30:]], axis=1), "propagate_Mean/out")


def test_sparse_attention_is_the_official_one(gtp):
    a = {k.split("/", 1)[1]: v for k, v in gtp.items() if k.startswith("sparse_attention/")}
    x = gtp["graph/x"]
    qkv = (x @ a["w/qkv.weight"].T + a["w/qkv.bias"]).reshape(2, 37, 3, 2, 4).transpose(2, 0, 3, 1, 4)
    bias = jm.attention.key_bias(jnp.asarray(gtp["propagate_GraphProp/token_scales_in"]))[:, None, None]
    dense = jax.nn.softmax(qkv[0] @ qkv[1].swapaxes(-1, -2) / 2 + jnp.broadcast_to(bias, (2, 2, 37, 37)), axis=-1)
    sparse = sparsify(dense, 0.6)
    np.testing.assert_allclose(sparse, a["attn"], rtol=0, atol=2e-5)
    np.testing.assert_array_equal(np.asarray(sparse) > 0, a["attn"] > 0)
    out = (np.asarray(sparse) @ qkv[2]).swapaxes(1, 2).reshape(2, 37, 8) @ a["w/proj.weight"].T + a["w/proj.bias"]
    np.testing.assert_allclose(out, a["out"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("density", [0.0, 0.31, 0.5, 1.0])
def test_sparsify_counts_as_a_sort_does(density):
    x = np.round(np.random.default_rng(0).standard_normal((2, 3, 7, 9)), 1).astype(np.float32)  # with ties and signs
    k = int(63 * (1 - density))
    threshold = np.sort(x.reshape(2, 3, -1))[..., k - 1, None, None] if k else -np.inf
    np.testing.assert_array_equal(sparsify(x, density), np.where(x >= threshold, x, 0))


def test_without_propagation_it_is_pruning(gtp):
    keep, _ = official(gtp)
    graph = token_graph(gtp["graph/x"], grid=(6, 6), prefix=1)
    np.testing.assert_array_equal(propagate(keep, graph, alpha=0.0).weights, keep.matrix)


def test_the_spatial_graph_is_a_walk():
    graph = token_graph(np.zeros((12, 1), np.float32), grid=(3, 4))
    np.testing.assert_array_equal(graph, graph.T)
    assert abs(np.linalg.eigvalsh(graph).max() - 1) < 1e-6
    assert [(graph[i] > 0).sum() for i in (0, 1, 5)] == [3, 5, 8]


def test_gradients_flow_along_the_graph(gtp):
    keep, _ = official(gtp)
    graph = token_graph(gtp["graph/x"], grid=(6, 6), prefix=1)
    loss = lambda graph, alpha: jnp.sum(jnp.sin(jm.merge(propagate(keep, graph, alpha=alpha), gtp["graph/x"], reduce="sum")))
    by_graph, by_alpha = jax.grad(loss, (0, 1))(graph, 0.3)
    v = jax.random.normal(jax.random.key(0), graph.shape)
    h = 1e-2
    slope = (loss(graph + h * v, 0.3) - loss(graph - h * v, 0.3)) / (2 * h)
    np.testing.assert_allclose(slope, jnp.vdot(by_graph, v), rtol=1e-2)
    np.testing.assert_allclose((loss(graph, 0.3 + h) - loss(graph, 0.3 - h)) / (2 * h), by_alpha, rtol=1e-2)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: token_graph(x, prefix=1), "give grid"),
        (lambda x: token_graph(x, grid=(6, 6)), "grid of .6, 6. holds 36 tokens, but x has 37"),
        (lambda x: token_graph(x, neighbors=37), "between 1 and 36, one less than the tokens; got 37"),
        (lambda x: attention_score(x[:, None], "Best"), "one of CLSAttnMean, .*got 'Best'"),
        (lambda x: attention_score(x[:, None], "CLSAttnMax", prefix=0), "reads the class token"),
        (lambda x: sparsify(x, 1.5), "between 0 and 1, got 1.5"),
        (lambda x: propagate(jm.identity(37), x), r"graph must have shape \(37, 37\)"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input(gtp, call, message):
    with pytest.raises(ValueError, match=message):
        call(gtp["graph/x"])
