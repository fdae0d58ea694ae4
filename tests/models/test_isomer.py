"""Isomer's block: the official order of operations on one image at a time, and images with one side only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.reducers.isomer import SGST

B, N, D, K = 3, 12, 8, 4


def make(threshold):
    return SGST(width=D, num_heads=2, hidden=16, layers=2, tokens=K, threshold=threshold, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def streams():
    return jax.random.normal(jax.random.key(0), (2, B, N, D))


def linear(m, x):
    return x @ np.asarray(m.kernel[...]) + np.asarray(m.bias[...])


def norm(m, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * np.asarray(m.scale[...]) + np.asarray(m.bias[...])


def side(m, x, heat, mask):
    """The positions of one side, packed, as the official loop sees them."""
    scaled = x * heat[:, None]
    tokens = linear(m.weights, scaled).T @ scaled
    q = x[mask]
    for attention, mlp in zip(m.attention, m.mlp, strict=True):
        split = lambda a: a.reshape(len(a), 2, D // 2).swapaxes(0, 1)
        query, key, value = (split(linear(layer, a)) for layer, a in
                             ((attention.query, q), (attention.key, tokens), (attention.value, tokens)))  # fmt: skip
        weights = np.exp(query @ key.swapaxes(1, 2) / np.sqrt(D // 2))
        weights /= weights.sum(-1, keepdims=True)
        q = norm(attention.norm, q + linear(attention.out, (weights @ value).swapaxes(0, 1).reshape(len(q), D)))
        h = np.pad(linear(mlp.fc1, q), ((1, 1), (0, 0)))
        kernel = np.asarray(mlp.conv.kernel[...])[:, 0]
        h = sum(h[i : i + len(q)] * kernel[i] for i in range(3)) + np.asarray(mlp.conv.bias[...])
        q = norm(mlp.norm, q + linear(mlp.fc2, np.maximum(h, 0)))
    return q


@pytest.mark.parametrize("threshold", [0.5, 0.6])
def test_equals_the_official_loop_scattered(streams, threshold):
    block = make(threshold)
    y, logits = nnx.jit(lambda m, a, b: m(a, b))(block, *streams)
    for b in range(B):
        x = linear(block.project, np.concatenate([streams[0, b], streams[1, b]], axis=-1))
        heat = 1 / (1 + np.exp(-linear(block.saliency, x)[:, 0]))
        front, back = heat >= threshold, heat < 1 - threshold
        assert front.any() and back.any()
        want = x.copy()
        want[front] = side(block.foreground, x, heat, front)
        want[back] = side(block.background, x, 1 - heat, back)
        np.testing.assert_allclose(y[b], want, rtol=0, atol=2e-5)
        np.testing.assert_allclose(jax.nn.sigmoid(logits[b]), heat, rtol=0, atol=1e-6)


def test_an_image_with_one_side_passes(streams):
    block = make(1.1)  # nothing is that salient
    y, _ = block(*streams)
    np.testing.assert_allclose(y, block.project(jnp.concatenate(list(streams), axis=-1)), rtol=1e-6, atol=1e-6)


def test_gradients_reach_every_weight(streams):
    grads = nnx.grad(lambda m: jnp.sum(jnp.sin(m(*streams)[0])))(make(0.5))
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        assert jnp.isfinite(leaf).all(), name
        assert (leaf != 0).any() or "['key']['bias']" in name, name  # softmax does not see a bias of all keys
