"""H-Net's dynamic chunking as pure functions: a router says where chunks begin, an average hands them back to the bytes.

p_t = (1 - cos(q_{t-1}, k_t)) / 2      a chunk begins where p_t > 1/2: `route`, then `segments`
z_j = P_j c_j + (1 - P_j) z_{j-1}      over chunks, then every byte takes its chunk's z: `dechunk`
N/(N-1) · ((N-1) F G + (1-F)(1-G))     F chunks per byte, G the mean of p: `ratio_loss`
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxmerge._plan import Plan, merge, unmerge
from jaxmerge.words._gate import masked_mean
from jaxmerge.words._segment import document_starts


class Routing(NamedTuple):
    """What the router says of each byte. A pytree."""

    p: Float[Array, "*batch n"] | Any
    """The probability that a chunk begins here, float32; gradients flow through it."""
    starts: Bool[Array, "*batch n"] | Any
    """Where a chunk begins: for `segments`."""

    @property
    def confidence(self) -> Float[Array, "*batch n"]:
        """The probability of what was decided: max(p, 1 - p). H-Net scales a byte's output by its straight-through value."""
        return jnp.maximum(self.p, 1 - self.p)


def route(
    q: Float[Array, "*batch n d"],
    k: Float[Array, "*batch n d"],
    *,
    mask: Bool[Array, "*batch n"] | None = None,
    documents: Int[Array, "*batch n"] | None = None,
) -> Routing:
    """Begin a chunk where a byte's key points away from the query of the byte before it.

        p_t = (1 - cos(q_{t-1}, k_t)) / 2, and 1 at the first byte of a document

    Args:
      q, k: two projections of the same states, W_q h and W_k h; H-Net initialises both to the identity.
      mask: True for a byte; no chunk begins at padding.
      documents: ids of packed documents; the first byte of each begins a chunk, whatever came before.

    Returns:
      Probabilities and starts.

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> h = jnp.array([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
      >>> routing = jm.words.route(h, h)
      >>> routing.p.tolist(), routing.starts.tolist()
      ([1.0, 0.0, 1.0, 0.5], [True, False, True, False])

    Source: H-Net (arXiv:2507.07955), section 2.2; equal to hnet_a.
    """
    if q.shape != k.shape:
        raise ValueError(f"route: q and k must have one shape, got {q.shape} and {k.shape}.")
    for name, a in dict(mask=mask, documents=documents).items():
        if a is not None and a.shape != q.shape[:-1]:
            raise ValueError(f"route: {name} must have shape {q.shape[:-1]}, one per byte; got {a.shape}.")
    q, k = (x * jax.lax.rsqrt(jnp.maximum((x**2).sum(-1, keepdims=True), 1e-24)) for x in (_f32(q), _f32(k)))
    before = jnp.concatenate([q[..., :1, :], q[..., :-1, :]], axis=-2)
    p = jnp.clip((1 - (before * k).sum(-1)) / 2, 0, 1)
    first = document_starts(jnp.zeros_like(p, jnp.int32) if documents is None else documents)
    p = jnp.where(first, 1.0, p)
    return Routing(p, p > 0.5 if mask is None else (p > 0.5) & mask)


def ratio_loss(
    routing: Routing, ratio: float | Float[Array, ""], *, mask: Bool[Array, "*batch n"] | None = None
) -> Float[Array, ""]:
    """What drives the router to one chunk in `ratio` bytes: 1 at the target, for a router that is sure of itself.

        N/(N-1) · ((N-1) F G + (1-F)(1-G))       F the mean of starts, G that of p

    Args:
      routing: from `route`; gradients flow through p alone.
      ratio: N, bytes per chunk, above 1. It may be traced: raising it step by step from low to high compression
        is ATDC's curriculum (`optax.linear_schedule(2.0, 6.0, steps)`).
      mask: True for a byte. The official code averages per device and over padding too; this is the mean over all bytes of the
        batch.

    Raises:
      ValueError: ratio is 1 or less.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> p = jnp.array([1.0, 0.0, 0.0, 0.0])
      >>> jm.words.ratio_loss(jm.words.Routing(p, p > 0.5), 4.0).item()
      1.0

    Source: H-Net (arXiv:2507.07955), section 2.3; ATDC (arXiv:2605.30080).
    """
    if isinstance(ratio, (int, float)) and ratio <= 1:
        raise ValueError(f"ratio_loss: ratio must be above 1 byte per chunk, got {ratio}.")
    mask = jnp.ones_like(routing.starts) if mask is None else mask
    f, g = masked_mean(_f32(routing.starts), mask), masked_mean(routing.p, mask)
    return ratio / (ratio - 1) * ((ratio - 1) * f * g + (1 - f) * (1 - g))


def dechunk(
    plan: Plan,
    chunks: Float[Array, "*batch m d"],
    p: Float[Array, "*batch n"],
    *,
    documents: Int[Array, "*batch n"] | None = None,
) -> Float[Array, "*batch n d"]:
    """Give every byte its chunk, smoothed over the chunks before it by how sure the router was of each.

        z_j = P_j c_j + (1 - P_j) z_{j-1},  P_j the probability of the chunk's first byte, clamped to [1e-4, 1 - 1e-4]

    Args:
      plan: `segments(routing.starts, m, mask=mask)`.
      chunks: what a model over chunks put out.
      p: `routing.p`.
      documents: ids of packed documents; z starts anew at each.

    Returns:
      The smoothed chunks, one row per byte, in the dtype of `chunks`; 0 at bytes of no chunk. Sums are taken in float32
      (the official kernel computes in bfloat16).

    Raises:
      ValueError: the shapes do not fit the plan.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> plan = jm.words.segments(jnp.array([True, False, True]), 2)
      >>> jm.words.dechunk(plan, jnp.array([[1.0], [3.0]]), jnp.array([1.0, 0.0, 0.75])).round(2).tolist()
      [[1.0], [1.0], [2.5]]

    Source: H-Net (arXiv:2507.07955), section 2.2; equal to hnet_a.
    """
    ids = plan.segment_ids
    if p.shape != ids.shape or chunks.shape[:-1] != (*ids.shape[:-1], plan.num_segments):
        raise ValueError(
            f"dechunk: the plan takes {ids.shape} bytes to {plan.num_segments} chunks, so expected p of that shape and chunks "
            f"{(*ids.shape[:-1], plan.num_segments, 'd')}; got {p.shape} and {chunks.shape}."
        )
    p = jnp.clip(merge(plan, _f32(p), reduce="first"), 1e-4, 1 - 1e-4)
    resets = None if documents is None else document_starts(merge(plan, documents, reduce="first"))
    return unmerge(plan, moving_average(chunks, p, resets=resets).astype(chunks.dtype))


def moving_average(
    x: Float[Array, "*batch m d"], p: Float[Array, "*batch m"], *, resets: Bool[Array, "*batch m"] | None = None
) -> Float[Array, "*batch m d"]:
    """z_j = p_j x_j + (1 - p_j) z_{j-1} from z = 0, for all j at once: an associative scan of depth log m, in float32.

    Args:
      x: what to average.
      p: the weight of each.
      resets: True where z_{j-1} counts as 0.

    Law:
      equal to the loop, for any m, and so are its gradients.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.words.moving_average(jnp.ones((3, 1)), jnp.array([0.5, 0.5, 0.5])).tolist()
      [[0.5], [0.75], [0.875]]
    """
    if p.shape != x.shape[:-1]:
        raise ValueError(f"moving_average: p must have shape {x.shape[:-1]}, one per row of x; got {p.shape}.")
    p = _f32(p)[..., None]
    fade = 1 - p if resets is None else jnp.where(resets[..., None], 0.0, 1 - p)

    def join(earlier, later):
        (a, y), (b, z) = earlier, later
        return a * b, b * y + z

    return jax.lax.associative_scan(join, (fade, p * _f32(x)), axis=x.ndim - 2)[1]


def straight_through(x: Float[Array, "..."], value: Float[Array, "..."] | float = 1.0) -> Float[Array, "..."]:
    """`value` on the way forward, x on the way back: a decision whose gradient is that of its probability.

    Example:
      >>> import jax, jaxmerge as jm
      >>> jax.value_and_grad(lambda p: 2 * jm.words.straight_through(p))(0.8)
      (Array(2., dtype=float32, weak_type=True), Array(2., dtype=float32, weak_type=True))

    Source: Bengio et al., arXiv:1308.3432.
    """
    return value + (x - jax.lax.stop_gradient(x))


def _f32(x: Array) -> Array:
    return x.astype(jnp.float32)
