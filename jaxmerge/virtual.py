"""Attention as if no token had been merged: virtual unmerging with rotary positions.

A merged token stands at several positions at once, and a rotary embedding can turn it to one only. So queries and keys are
unmerged to where their tokens were, turned there, and attend; what comes out is merged again. Everything else in the layer
(projections, MLP, the residual stream) works on the short sequence.

    rotary(x, positions)                   turn queries or keys to where they stand
    virtual_attention(plan, q, k, v)       unmerge, turn, attend, merge
    merged_positions(plan)                 one position for each merged token, where a model wants just one
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Num

from jaxmerge import _segments as segments
from jaxmerge._plan import Plan, SoftPlan, merge, unmerge
from jaxmerge.attention import key_bias


def rotary(
    x: Float[Array, "*batch n h d"],
    positions: Num[Array, "*batch n"],
    *,
    base: float = 10_000.0,
    interleaved: bool = False,
) -> Float[Array, "*batch n h d"]:
    """Turn pairs of features by an angle that grows with the position: the rotary embedding.

    Args:
      x: queries or keys, heads before features; d is even.
      positions: where each token stands, whole or not (a merged token's mean position).
      base: pair i turns by positions · base^(-2i / d).
      interleaved: pairs are neighbours (features 0 and 1), as in the original; otherwise feature i goes with i + d/2, as in
        Llama's published weights.

    Returns:
      x's dtype; angles and products are float32.

    Law:
      <rotary(q, s), rotary(k, t)> depends on s and t through s - t alone; position 0 changes nothing.

    Raises:
      ValueError: d is odd, or shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmerge.virtual import rotary
      >>> rotary(jnp.array([[[1.0, 0.0]]]), jnp.array([jnp.pi / 2])).round(3).tolist()
      [[[-0.0, 1.0]]]

    Source: RoFormer (arXiv:2104.09864).
    """
    d = x.shape[-1]
    if d % 2 or positions.shape != x.shape[:-2]:
        raise ValueError(
            f"rotary: expected x (*batch, n, h, even d) and positions (*batch, n); got {x.shape}, {positions.shape}."
        )
    frequency = base ** (-jnp.arange(d // 2, dtype=jnp.float32) / (d // 2))
    angle = positions.astype(jnp.float32)[..., None, None] * frequency.reshape(*[1] * (x.ndim - 1), d // 2)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    wide = x.astype(jnp.float32)
    a, b = (wide[..., ::2], wide[..., 1::2]) if interleaved else (wide[..., : d // 2], wide[..., d // 2 :])
    turned = a * cos - b * sin, b * cos + a * sin
    out = jnp.stack(turned, axis=-1).reshape(x.shape) if interleaved else jnp.concatenate(turned, axis=-1)
    return out.astype(x.dtype)


def virtual_attention(
    plan: Plan,
    q: Float[Array, "*batch m h d"],
    k: Float[Array, "*batch m g d"],
    v: Float[Array, "*batch m g d"],
    positions: Num[Array, "*batch n"] | None = None,
    *,
    base: float = 10_000.0,
    interleaved: bool = False,
    is_causal: bool = False,
    scale: float | None = None,
    implementation: Literal["expanded", "compact"] = "expanded",
) -> Float[Array, "*batch m h d"]:
    """Attend as the unmerged sequence would, each token turned to its own position, and merge what comes out.

    Args:
      plan: n positions to m tokens. Dropped positions are neither seen nor do they look.
      q, k, v: of the merged tokens, not yet turned; fewer key heads than query heads are shared (GQA).
      positions: of the n original tokens; 0 to n - 1 by default.
      base, interleaved: see `rotary`.
      is_causal: an original position sees those before it, in the order of the plan's positions.
      scale: on q·k; 1 / sqrt(d) by default.
      implementation: "expanded" hands n queries, keys and values to `jax.nn.dot_product_attention`. "compact" never expands
        the values: it merges the attention weights over keys and queries to (m, m) first, which is exact, because equal values
        share their weights and the mean over a token's places is linear. 2 n² d + 2 m² d products a head in place of 4 n² d,
        and (n, n) weights in memory, so it is for lengths at which no flash kernel is needed.

    Returns:
      The mean, over each token's positions, of what attends from there; 0 in empty slots.

    Law:
      merge(plan, attention over the sequence unmerge(plan, ·) with rotary positions); both implementations agree.

    Raises:
      ValueError: shapes that do not fit, another implementation.

    Example:
      >>> import jax, jax.numpy as jnp, jaxmerge as jm
      >>> from jaxmerge.virtual import virtual_attention
      >>> plan = jm.Plan(jnp.array([0, 0, 1]), 2)
      >>> q = k = v = jax.random.normal(jax.random.key(0), (2, 1, 4))
      >>> a, b = (virtual_attention(plan, q, k, v, implementation=i) for i in ("expanded", "compact"))
      >>> bool(jnp.allclose(a, b, atol=1e-6))
      True

    Source: virtual token unmerging of DyMU (arXiv:2504.17040). Its exact kernel forms the products of merged tokens once per
    frequency and gathers n² of them: as many products as here, but not as a matrix product, and n² d / 2 numbers in memory.
    """
    batch, n, m = plan.segment_ids.shape[:-1], plan.num_positions, plan.num_segments
    positions = segments.positions(plan.segment_ids) if positions is None else positions
    lead = (*batch, m)
    if (
        q.shape[:-2] != lead
        or k.shape[:-2] != lead
        or k.shape != v.shape
        or q.shape[-1] != k.shape[-1]
        or k.shape[-2] == 0
        or q.shape[-2] % k.shape[-2]
        or positions.shape != (*batch, n)
    ):
        raise ValueError(
            f"virtual_attention: the plan takes {(*batch, n)} to {lead}, so expected q (*batch, {m}, h, d), k and v "
            f"(*batch, {m}, g, d) with g dividing h, and positions {(*batch, n)}; "
            f"got {q.shape}, {k.shape}, {v.shape} and {positions.shape}."
        )
    if implementation not in ("expanded", "compact"):
        raise ValueError(f'virtual_attention: implementation must be "expanded" or "compact", got {implementation!r}.')
    turn = lambda x: rotary(unmerge(plan, x), positions, base=base, interleaved=interleaved)
    bias = key_bias(mask=plan.kept)
    attend = _expanded if implementation == "expanded" else _compact
    row = lambda ids, q, k, v, bias: attend(Plan(ids, m), q, k, v, bias, is_causal=is_causal, scale=scale)
    return segments.batched(row, len(batch))(plan.segment_ids, turn(q), turn(k), v, bias)


def merged_positions(
    plan: Plan | SoftPlan,
    positions: Num[Array, "*batch n"] | None = None,
    *,
    reduce: Literal["first", "mean"] = "first",
    weight: Num[Array, "*batch n"] | None = None,
) -> Num[Array, "*batch m"]:
    """One position for each merged token: that of its first member, or the mean over its members.

    Args:
      plan: a SoftPlan has means only, weighted by its rows.
      positions: of the n tokens; 0 to n - 1 by default.
      reduce: "first" keeps whole positions and their order wherever segments are numbered by their first member; "mean" is the
        centre, float32.
      weight: of each position in the mean.

    Returns:
      (*batch, m); 0 in empty slots.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> from jaxmerge.virtual import merged_positions
      >>> plan = jm.Plan(jnp.array([0, 1, 0, 1]), 2)
      >>> merged_positions(plan).tolist(), merged_positions(plan, reduce="mean").tolist()
      ([0, 1], [1.0, 2.0])
    """
    at = segments.positions(plan.kept.astype(jnp.int32)) if positions is None else positions
    if reduce == "mean":
        return merge(plan, at.astype(jnp.float32), weight=weight)
    return merge(plan, at, weight=weight, reduce=reduce)


def _expanded(plan: Plan, q, k, v, bias, *, is_causal: bool, scale: float | None) -> Float[Array, "m h d"]:
    out = jax.nn.dot_product_attention(q, k, unmerge(plan, v), bias=bias[None, None], is_causal=is_causal, scale=scale)
    return merge(plan, out)


def _compact(plan: Plan, q, k, v, bias, *, is_causal: bool, scale: float | None) -> Float[Array, "m h d"]:
    (n, h, d), g = q.shape, k.shape[-2]
    q = q.reshape(n, g, h // g, d) * jnp.asarray(d**-0.5 if scale is None else scale, q.dtype)
    logits = jnp.einsum("tgrd,sgd->sgrt", q, k, preferred_element_type=jnp.float32) + bias[:, None, None, None]
    if is_causal:
        logits = jnp.where(jnp.triu(jnp.ones((n, n), bool))[:, None, None, :], logits, jnp.finfo(jnp.float32).min)
    p = jax.nn.softmax(logits, axis=0)
    p = merge(plan, p, reduce="sum")  # equal values share their weights: (m, g, r, n)
    p = merge(plan, jnp.moveaxis(p, -1, 0))  # the mean over a query's places: (m, m, g, r)
    out = jnp.einsum("tsgr,sgd->tgrd", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.reshape(-1, h, d).astype(v.dtype)
