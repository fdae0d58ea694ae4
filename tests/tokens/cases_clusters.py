"""Clustering, temporal merging, propagation and soft merging."""

import jax
import jax.numpy as jnp

import jaxmerge as jm
from jaxmerge.tokens._nearest import cosine
from tests.tokens.cases import Case

t = jm.tokens


def attention(x, heads=1):
    """An attention map made of tokens: (*batch, heads, n, n)."""
    return jnp.repeat(jax.nn.softmax(3 * cosine(x, x), axis=-1)[..., None, :, :], heads, axis=-3)


def video(x):
    """16 tokens as 4 frames of 4."""
    return x.reshape(*x.shape[:-2], 4, 4, x.shape[-1])


def received(x):
    return attention(x).sum(axis=(-3, -2))


def some(x, mask, k):
    """A pruning plan that x does not decide: a selection that flips has no slope."""
    return t.keep(jnp.broadcast_to(mask, x.shape[:-1]) | jnp.zeros_like(x[..., 0], bool), k)


def propagated(x):
    graph = t.token_graph(x, grid=(3, 5), prefix=1) * attention(x)[..., 0, :, :]
    return t.propagate(some(x, jnp.arange(16) % 3 != 1, 11), graph, alpha=0.3)


def first_five(x):
    return some(x, jnp.arange(16) < 5, 5)


CASES = [
    Case("density_peaks", lambda x: t.density_peaks(x, 5), ordered=True, equivariant=True),
    Case("density_peaks, twins", lambda x: t.density_peaks(x, 8, neighbors=2), ordered=True, duplicates=True),
    Case("density_peaks, masked", lambda x: t.density_peaks(x, 4, mask=x[..., 0] > 0), ordered=True),
    Case("density_peaks, by centre", lambda x: t.density_peaks(x, 5, order="center"), equivariant=True),
    Case("k_means", lambda x: t.k_means(x, 5), ordered=True),
    Case("k_means, euclidean", lambda x: t.k_means(x, 8, metric="euclidean"), ordered=True, duplicates=True),
    Case("k_means++", lambda x: t.k_means(x, 5, init="k-means++", key=jax.random.key(0)), ordered=True),
    Case("adaptive_k_means", lambda x: t.adaptive_k_means(x, (3, 5), iterations=3), ordered=True),
    Case("primary_and_clusters", lambda x: t.primary_and_clusters(x, received(x), 4, 3), ordered=True),
    Case("attention_and_density", lambda x: t.attention_and_density(x, received(x), 4, 3).plan, ordered=True),
    Case("attention_and_similarity", lambda x: t.attention_and_similarity(x, received(x), 5).plan, equivariant=True),
    Case("static_merging", lambda x: t.static_merging(video(x), threshold=0.3), ordered=True),
    Case(
        "holitom",
        lambda x: t.holitom(video(x), video(x)[..., 0], ratio=0.6, threshold=0.3, density=0.5, capacity=14).plan,
        ordered=True,
    ),
    Case("attention_score", lambda x: t.keep_top_k(t.attention_score(attention(x, heads=2)), 10), ordered=True),
    Case("token_graph", lambda x: t.keep_top_k(t.token_graph(x, neighbors=3, prefix=1).sum(axis=-2), 10), ordered=True),
    Case("propagate", propagated),
    Case("token_transform", lambda x: t.token_transform(x, first_five(x), temperature=0.5)),
    Case("token_transform, over tokens", lambda x: t.token_transform(x, first_five(x), temperature=0.5, over="tokens")),
    Case("saliency_gather", lambda x: t.saliency_gather(*[cosine(x[..., :3, :], x)] * 2, jax.nn.sigmoid(x[..., 0]))),
    Case("frame_attention", lambda x: t.frame_attention(x / (1 + jnp.abs(x)), x / (1 + jnp.abs(x)), alpha=0.5)),
]
