"""Graph-based token propagation: what is pruned leaves its features, along a graph, to those that stay (GTP-ViT)."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import ArrayLike, Float

from jaxmerge import _segments as segments
from jaxmerge._kernels.match.ref import smallest
from jaxmerge._plan import Plan, SoftPlan, merge
from jaxmerge.tokens._checks import check_plan, check_sequences, checked_sizes
from jaxmerge.tokens._nearest import cosine, unit

Rule = Literal[
    "CLSAttnMean",
    "CLSAttnMax",
    "IMGAttnMean",
    "IMGAttnMax",
    "DiagAttnMean",
    "DiagAttnMax",
    "MixedAttnMean",
    "MixedAttnMax",
    "SumAttnMax",
    "CosSimMean",
    "CosSimMax",
]


def propagate(keep: Plan, graph: Float[ArrayLike, "*batch n n"], *, alpha: Float[ArrayLike, ""] | float = 0.1) -> SoftPlan:
    """Prune as `keep` says, and let every kept token take in alpha times its pruned neighbours.

        A = [I_keep | alpha · graph[kept, pruned]]

    Args:
      keep: a pruning plan: one position to a slot, such as `keep_top_k(attention_score(attention), n - r)`. The slots keep
        its order, which is that of the positions; the official tokens come by falling score.
      graph: weights between positions, such as `token_graph(x)`. Row i takes from column j. Gradients flow through it.
      alpha: how much of a neighbour arrives.

    Returns:
      A soft plan. Apply it with reduce="sum": rows are not normalised. merge(plan, scales, reduce="sum") are GTP-ViT's token
      scales; for scales of 1 they are plan.sizes. The next layer's graph is `subgraph(keep, graph)`.

    Law:
      propagate(keep, graph, alpha=0.0) is keep; kept columns hold the selection alone.

    Raises:
      ValueError: the graph is not (*batch, n, n).

    Cost: m n numbers of weights; applying it is one matrix product.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> keep = jm.Plan(jnp.array([0, -1, 1]), 2)
      >>> graph = jnp.array([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
      >>> plan = jm.tokens.propagate(keep, graph, alpha=0.5)
      >>> jm.merge(plan, jnp.array([1.0, 10.0, 100.0]), reduce="sum").tolist()
      [6.0, 105.0]

    Source: `propagate` of GTP-ViT (arXiv:2311.03035), standard="GraphProp"; "None" is `keep` itself, and "Mean" sends what is
    pruned to one more segment, Plan(where(keep.kept, keep.segment_ids, m), m + 1).
    """
    check_plan("propagate", keep, "keep")
    graph = jnp.asarray(graph)
    shape = (*keep.segment_ids.shape, keep.num_positions)
    if graph.shape != shape:
        raise ValueError(f"propagate: graph must have shape {shape} (the plan's batch, n, n), got {graph.shape}.")
    check_sequences("propagate", axes=(-1, -2), graph=graph)
    rows = merge(keep, graph, reduce="sum")
    pruned = jnp.broadcast_to(~keep.kept[..., None, :], rows.shape)
    return SoftPlan(keep.matrix.astype(rows.dtype) + jnp.where(pruned, alpha * rows, 0))


def subgraph(keep: Plan, graph: Float[ArrayLike, "*batch n n"]) -> Float[Array, "*batch m m"]:
    """The graph between the kept positions: what the next layer propagates along. Weights are not normalised again.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.tokens.subgraph(jm.Plan(jnp.array([0, -1, 1]), 2), jnp.arange(9.0).reshape(3, 3)).tolist()
      [[0.0, 2.0], [6.0, 8.0]]
    """
    check_sequences("subgraph", axes=(-1, -2), graph=graph)
    half = jnp.swapaxes(merge(keep, jnp.asarray(graph), reduce="first"), -1, -2)
    return jnp.swapaxes(merge(keep, half, reduce="first"), -1, -2)


def token_graph(
    x: Float[ArrayLike, "*batch n d"],
    *,
    grid: tuple[int, int] | None = None,
    neighbors: int | None = None,
    prefix: int = 0,
) -> Float[Array, "*batch n n"]:
    """Who is whose neighbour: the 8 around it on the grid, or the tokens most like it, or either; D^-1/2 A D^-1/2.

    Args:
      x: tokens, at the start of the network.
      grid: (height, width) of the tokens after the prefix, for spatial neighbours. None: there are none.
      neighbors: how many tokens of largest cosine are semantic neighbours; those equal to the last of them too. None: none.
      prefix: tokens at the front, such as the class token, that have no neighbours.

    Returns:
      float32 weights, D being the number of neighbours; a token without neighbours has zeros. No gradient flows through it.

    Law:
      the spatial graph is symmetric, and its largest eigenvalue is 1.

    Raises:
      ValueError: neither grid nor neighbors; a grid that is not n - prefix tokens; neighbors outside [1, n - prefix).

    Cost: n² d multiply-adds, and `neighbors` passes over n².

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> (jm.tokens.token_graph(jnp.ones((4, 2)), grid=(1, 4)) > 0).astype(int).tolist()
      [[0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0]]

    Source: GTP-ViT (arXiv:2311.03035), graph types Spatial, Semantic and Mixed. Without a class token the official code has
    one semantic neighbour more than asked for.
    """
    x = lax.stop_gradient(jnp.asarray(x))
    check_sequences("token_graph", axes=(-2,), x=x)
    n = x.shape[-2] - prefix
    if grid is None and neighbors is None:
        raise ValueError("token_graph: give grid=(height, width), neighbors=M, or both.")
    if grid is not None:
        h, w = checked_sizes("token_graph", "grid", grid, rank=2)
        if h * w != n:
            raise ValueError(f"token_graph: a grid of {grid} holds {h * w} tokens, but x has {n} after the prefix.")
    if neighbors is not None and not 1 <= neighbors < n:
        raise ValueError(f"token_graph: neighbors must be between 1 and {n - 1}, one less than the tokens; got {neighbors}.")
    spatial = _grid_neighbors(*grid) if grid is not None else np.zeros((n, n), bool)

    def row(x):
        edge = jnp.asarray(spatial)
        if neighbors is not None:
            far = -cosine(x[prefix:], x[prefix:])
            far = jnp.where(np.eye(n, dtype=bool), jnp.inf, far)
            edge = edge | (far <= smallest(far, neighbors)[:, -1:])
        edge = edge.astype(jnp.float32) + jnp.zeros_like(x[:1, :1], jnp.float32)
        degree = edge.sum(axis=-1)
        scale = jnp.where(degree > 0, lax.rsqrt(jnp.maximum(degree, 1)), 0)
        return jnp.pad(scale[:, None] * edge * scale[None, :], ((prefix, 0), (prefix, 0)))

    return segments.batched(row, x.ndim - 2)(x)


def attention_score(
    attention: Float[ArrayLike, "*batch h n n"], rule: Rule = "MixedAttnMax", *, prefix: int = 1
) -> Float[Array, "*batch n"]:
    """How much each token matters, read off an attention map: GTP-ViT's eleven rules, by their names.

    CLS: what the first token pays to it. IMG: what all pay to it. Diag: what it pays to itself. Mixed: Diag times IMG, each
    reduced over the heads first. Sum: Diag plus IMG. CosSim: minus its summed cosine with all rows of the map. Mean and Max
    are over the heads.

    Args:
      attention: after the softmax; rows are queries.
      rule: which of them.
      prefix: tokens at the front that always stay; their score is +inf.

    Returns:
      float32 scores for `keep_top_k`. No gradient flows through them.

    Raises:
      ValueError: an unknown rule; a CLS rule without a prefix.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> attention = jnp.array([[[0.25, 0.5, 0.25], [0.0, 1.0, 0.0], [0.25, 0.25, 0.5]]])
      >>> jm.tokens.attention_score(attention, "CLSAttnMean").tolist()
      [inf, 0.5, 0.25]

    Source: `select` of GTP-ViT (arXiv:2311.03035).
    """
    if rule not in get_args(Rule):
        raise ValueError(f"attention_score: rule must be one of {', '.join(get_args(Rule))}; got {rule!r}.")
    if rule.startswith("CLS") and prefix == 0:
        raise ValueError(f"attention_score: {rule} reads the class token's attention, but prefix=0 says there is none.")
    a = lax.stop_gradient(jnp.asarray(attention))
    if a.ndim < 3 or a.shape[-1] != a.shape[-2] or not 0 <= prefix <= a.shape[-1]:
        raise ValueError(
            "attention_score: expected attention (*batch, heads, n, n) and a prefix between 0 and n; "
            f"got {a.shape} and prefix={prefix}."
        )
    check_sequences("attention_score", axes=(-1, -2), attention=a)
    a = a.astype(segments.accumulator(a.dtype))
    heads = (lambda s: s.mean(axis=-2)) if rule.endswith("Mean") else (lambda s: s.max(axis=-2))
    eye = jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=bool), a.shape)
    diagonal = lambda: heads(jnp.sum(jnp.where(eye, a, 0), axis=-1))
    image = lambda: heads(a.sum(axis=-2))
    if rule.startswith("CLS"):
        score = heads(a[..., 0, :])
    elif rule.startswith("IMG"):
        score = image()
    elif rule.startswith("Diag"):
        score = diagonal()
    elif rule.startswith("Mixed"):
        score = diagonal() * image()
    elif rule.startswith("Sum"):
        score = diagonal() + image()
    else:
        rows = a[..., prefix:, :]
        u = unit(rows.mean(axis=-3) if rule.endswith("Mean") else rows.max(axis=-3))
        total = u.sum(axis=-2, keepdims=True)  # sum_j u_i·u_j = u_i · sum_j u_j
        score = jnp.pad(-(u * total).sum(axis=-1), [(0, 0)] * (u.ndim - 2) + [(prefix, 0)])
    first = jnp.broadcast_to(jnp.arange(score.shape[-1]) < prefix, score.shape)
    return jnp.where(first, jnp.inf, score)


def sparsify(attention: Float[ArrayLike, "*batch n m"], density: float) -> Float[Array, "*batch n m"]:
    """Set the small entries of each attention map to zero; the rest is not normalised again.

    Args:
      attention: after the softmax: one threshold for each (n, m) map, so for each head.
      density: the share that stays (GTP-ViT's `sparsity`). Entries equal to the threshold stay.

    Returns:
      The same dtype. Gradients flow through what stays.

    Law:
      sparsify(a, 1.0) = a.

    Raises:
      ValueError: density outside [0, 1].

    Cost: 32 passes that compare and count, in place of a sort.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.tokens.sparsify(jnp.array([[0.75, 0.25], [0.5, 0.5]]), 0.5).tolist()
      [[0.75, 0.0], [0.5, 0.5]]

    Source: `Attention` of GTP-ViT (arXiv:2311.03035): the threshold is the k-th smallest, k = int(n m (1 - density)).
    """
    if not 0 <= density <= 1:
        raise ValueError(f"sparsify: density must be between 0 and 1, got {density}.")
    attention = jnp.asarray(attention)
    check_sequences("sparsify", axes=(-1, -2), attention=attention)
    n, m = attention.shape[-2:]
    k = int(n * m * (1 - density))
    if k == 0:
        return attention
    # in the order of the numbers: negative floats have all bits flipped, the others the sign bit alone
    bits = jax.lax.bitcast_convert_type(lax.stop_gradient(attention).astype(jnp.float32), jnp.uint32)
    key = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))

    def step(threshold, bit):
        higher = threshold | (jnp.uint32(1) << bit)
        below = jnp.sum(key < higher[..., None, None], axis=(-2, -1), dtype=jnp.int32)
        return jnp.where(below < k, higher, threshold), None

    start = jnp.zeros_like(key[..., 0, 0])
    threshold, _ = lax.scan(step, start, jnp.arange(31, -1, -1, dtype=jnp.uint32))
    return jnp.where(key >= threshold[..., None, None], attention, jnp.zeros_like(attention))


def _grid_neighbors(height: int, width: int) -> np.ndarray:
    """The up to 8 cells around each cell, as a matrix."""
    row, column = np.divmod(np.arange(height * width), width)
    near = lambda v: np.abs(v[:, None] - v[None, :]) <= 1
    return near(row) & near(column) & ~np.eye(height * width, dtype=bool)
