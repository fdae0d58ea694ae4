"""What a plan means to attention: one additive bias per key.

A key that stands for s tokens weighs log s (proportional attention); a softly deleted key weighs its gate; padding weighs
"minus infinity". All three add up to one vector, offered in two forms: as `bias=` for `jax.nn.dot_product_attention`, and as
extra feature columns, [q, 1]·[k, bias], which any attention kernel can take without change.
"""

from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Shaped

from jaxmerge import _segments as segments
from jaxmerge._kernels import _dispatch as dispatch, attend as kernels
from jaxmerge._kernels.attend import ref as reference
from jaxmerge._plan import Plan, SoftPlan

Attending = Literal["xla", "cudnn", "mosaic_gpu", "mosaic_tpu"]

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
"""The weight of a key that must not be seen: finite, so that a query with no key at all stays free of NaN."""


def key_bias(
    sizes: Plan | SoftPlan | Shaped[Array, "*batch m"] | None = None,
    *,
    gate: Float[Array, "*batch m"] | None = None,
    mask: Bool[Array, "*batch m"] | None = None,
) -> Float[Array, "*batch m"]:
    """The bias that each key adds to its attention logits: log size + gate, and `MASKED` where there is no key.

    Args:
      sizes: how many tokens each key stands for: a plan, or its sizes. Size 0 is an empty slot.
      gate: additive weights, 0 for a key that is fully there, very negative for one that is deleted (MrT5).
      mask: True where the key may be seen.

    Returns:
      float32, for `bias=bias[..., None, None, :]` or `append_bias`.

    Law:
      softmax(q·k + key_bias(sizes)) over merged keys equals softmax(q·k) over the unmerged ones, each group summed.

    Raises:
      ValueError: nothing was given, or shapes differ.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> bias = jm.attention.key_bias(jm.Plan(jnp.array([0, 0, 1]), 3))
      >>> [round(b, 3) for b in bias.tolist()[:2]], bias[2].item() < -1e38
      ([0.693, 0.0], True)

    Source: proportional attention, Token Merging (arXiv:2210.09461); the soft delete mask, MrT5 (arXiv:2410.20771).
    """
    if isinstance(sizes, Plan | SoftPlan):
        sizes = sizes.sizes
    given = {k: v.shape for k, v in dict(sizes=sizes, gate=gate, mask=mask).items() if v is not None}
    if not given:
        raise ValueError("key_bias: give at least one of sizes, gate and mask.")
    if len(set(given.values())) > 1:
        raise ValueError(f"key_bias: sizes, gate and mask must have one shape (*batch, m), got {given}.")
    bias = jnp.zeros(next(iter(given.values())), jnp.float32)
    if sizes is not None:
        there = sizes > 0
        bias = bias + jnp.log(jnp.where(there, sizes, 1).astype(jnp.float32))
        mask = there if mask is None else mask & there
    if gate is not None:
        bias = bias + gate.astype(jnp.float32)
    return bias if mask is None else jnp.where(mask, bias, MASKED)


def append_bias(
    q: Float[Array, "*batch t h d"],
    k: Float[Array, "*batch s g d"],
    v: Float[Array, "*batch s g d"],
    bias: Float[Array, "*batch s"],
    *,
    scale: float | None = None,
    multiple_of: int = 1,
) -> tuple[Float[Array, "*batch t h e"], Float[Array, "*batch s g e"], Float[Array, "*batch s g e"]]:
    """Write the key bias into extra feature columns, so that an attention kernel without `bias=` applies it unchanged.

    The logits become scale · [q, 1, ...]·[k, b_high, b_low, ...] with b = bias / scale split over as many columns as the
    dtype needs to carry 16 bits of it: one in float32, two in bfloat16 and float16. Pass the kernel the returned arrays
    and the *same* `scale` (its own default would read the new, larger d), and keep the first d features of what it returns.

    Args:
      q, k, v: queries, keys and values, heads before features, as `jax.nn.dot_product_attention` has them.
      bias: from `key_bias`.
      scale: the kernel's factor on q·k; by default 1 / sqrt(d) of the arrays given.
      multiple_of: pad the features with zeros up to a multiple, where a kernel demands 8, 64 or 128.

    Returns:
      q, k and v with e = d + columns (+ padding) features, in their own dtypes; v is padded with zeros, because kernels
      want one size.

    Law:
      attention(*append_bias(q, k, v, b), scale)[..., :d] = attention(q, k, v, bias=b), to the rounding of the dtype.

    Raises:
      ValueError: shapes that do not fit, `multiple_of` below 1.

    Example:
      >>> import jax, jax.numpy as jnp, jaxmerge as jm
      >>> q = k = v = jax.random.normal(jax.random.key(0), (1, 4, 2, 8))
      >>> bias = jm.attention.key_bias(jnp.array([[1, 2, 3, 4]]))
      >>> out = jax.nn.dot_product_attention(*jm.attention.append_bias(q, k, v, bias), scale=8**-0.5)[..., :8]
      >>> want = jm.attention.proportional_attention(q, k, v, bias)
      >>> bool(jnp.allclose(out, want, atol=1e-5))
      True
    """
    if k.shape != v.shape or k.shape[:-2] != bias.shape or q.shape[:-3] != k.shape[:-3] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            "append_bias: expected q (*batch, t, h, d), k and v (*batch, s, g, d) and bias (*batch, s); "
            f"got q {q.shape}, k {k.shape}, v {v.shape}, bias {bias.shape}."
        )
    if multiple_of < 1:
        raise ValueError(f"append_bias: multiple_of must be 1 or more, got {multiple_of}.")
    d = q.shape[-1]
    factor = d**-0.5 if scale is None else scale
    rest = jnp.clip(bias.astype(jnp.float32) / factor, MASKED, -MASKED)
    floor = float(jnp.finfo(k.dtype).min) * 0.7
    columns = []
    for _ in range(1 if jnp.finfo(k.dtype).nmant >= 23 else 2):
        part = jnp.maximum(rest, floor).astype(k.dtype)
        columns.append(part)
        rest = jnp.where(rest <= floor, 0, rest - part.astype(jnp.float32))
    pad = -(d + len(columns)) % multiple_of
    extra = jnp.stack([*columns, *[jnp.zeros_like(columns[0])] * pad], axis=-1)[..., None, :]
    ones = (jnp.arange(extra.shape[-1]) < len(columns)).reshape((1,) * (q.ndim - 1) + (-1,))
    blank = lambda x: jnp.zeros_like(x[..., :1])  # new columns take the layout of the array they widen
    widen = lambda x, columns: jnp.concatenate([x, blank(x) + columns.astype(x.dtype)], axis=-1)
    return widen(q, ones), widen(k, extra), widen(v, 0 * ones)


def proportional_attention(
    q: Float[Array, "*batch t h d"],
    k: Float[Array, "*batch s g d"],
    v: Float[Array, "*batch s g d"],
    bias: Float[Array, "*batch s"] | None,
    *,
    mask: Bool[Array, "..."] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    implementation: Attending | None = None,
) -> Float[Array, "*batch t h d"]:
    """Attention in which every key weighs what it stands for: `jax.nn.dot_product_attention` with a key bias.

    Args:
      q, k, v: heads before features, with one batch axis or none (vmap over more); fewer key heads than query heads are
        shared (GQA).
      bias: from `key_bias`; None before the first merge.
      mask, is_causal, scale, implementation: as in `jax.nn.dot_product_attention`. "cudnn" is given the bias as feature
        columns (`append_bias`): it would want one bias for every pair, written to memory, and its gradient. It has gradients
        for even lengths alone: where there are gradients to take and no mask, odd ones get one more row, that weighs nothing.
        "mosaic_gpu" (Hopper) and "mosaic_tpu" are flash kernels of our own that add the bias on chip; so are their gradients,
        which compute the weights again. They take no mask, and have no second derivatives.

    Law:
      with v merged as k is, and equal keys in each segment, the result is that of attention over the unmerged tokens.

    Example:
      >>> import jax, jax.numpy as jnp, jaxmerge as jm
      >>> x = jax.random.normal(jax.random.key(0), (3, 1, 4))
      >>> plan = jm.Plan(jnp.array([0, 1, 0]), 2)
      >>> short, long = jm.merge(plan, x), jm.unmerge(plan, jm.merge(plan, x))
      >>> a = jm.attention.proportional_attention(short, short, short, jm.attention.key_bias(plan))
      >>> b = jm.attention.proportional_attention(long, long, long, None)
      >>> bool(jnp.allclose(jm.unmerge(plan, a), b, atol=1e-6))
      True

    Raises:
      ValueError: a kernel of our own with a mask, or where it cannot run, with the reasons; its second derivatives.

    Source: Token Merging, section 3.2 (arXiv:2210.09461).
    """
    one_each = (k.shape[:-2], (1, *k.shape[-3:-2]), k.shape[-3:-2])  # a bias may be shared by the batch
    fit = q.ndim in (3, 4) and q.ndim == k.ndim and k.shape == v.shape and q.shape[:-3] == k.shape[:-3]
    fit = fit and q.shape[-1] == k.shape[-1] and q.shape[-2] % max(k.shape[-2], 1) == 0
    if not fit or (bias is not None and bias.shape not in one_each):
        raise ValueError(
            "proportional_attention: expected q (b, t, h, d), k and v (b, s, g, d), h a multiple of g, and bias (b, s), b "
            f"or not (jax.vmap over more axes); got {q.shape}, {k.shape}, {v.shape} and {None if bias is None else bias.shape}."
        )
    segments.check_whole("proportional_attention: k", k, k.ndim - 3)
    options: Any = dict(is_causal=is_causal, scale=v.shape[-1] ** -0.5 if scale is None else scale)
    if implementation == "cudnn":
        return _flash(q, k, v, bias, mask, **options) if mask is not None else _flash_of_any_length(q, k, v, bias, **options)
    if implementation in dispatch.KERNELS:
        if mask is not None or is_causal:
            raise ValueError(
                f'proportional_attention: {implementation} takes no mask; use "cudnn" or "xla" for masked attention.'
            )
        bias = None if bias is None else jnp.broadcast_to(bias, k.shape[:-2])
        ours: Any = implementation
        return kernels.attend(q, k, v, bias, scale=options["scale"], implementation=ours)[0]
    options |= dict(bias=None if bias is None else bias[..., None, None, :], mask=mask, implementation=implementation)
    return jax.nn.dot_product_attention(q, k, v, **options)


@overload
def packed_attention(
    qkv: Float[Array, "..."],
    bias: Float[Array, "..."] | None,
    *,
    offset: Float[Array, "..."] | None = ...,
    length: int | None = ...,
    scale: float | None = ...,
    mean_keys: Literal[False] = ...,
    implementation: Attending | None = ...,
) -> Float[Array, "..."]: ...
@overload
def packed_attention(
    qkv: Float[Array, "..."],
    bias: Float[Array, "..."] | None,
    *,
    offset: Float[Array, "..."] | None = ...,
    length: int | None = ...,
    scale: float | None = ...,
    mean_keys: Literal[True],
    implementation: Attending | None = ...,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]: ...
def packed_attention(
    qkv: Float[Array, "*batch rows three h d"],
    bias: Float[Array, "*batch n"] | None,
    *,
    offset: Float[Array, "_ _ _"] | None = None,
    length: int | None = None,
    scale: float | None = None,
    mean_keys: bool = False,
    implementation: Attending | None = None,
) -> Float[Array, "*batch n h d"] | tuple[Float[Array, "*batch n h d"], Float[Array, "*batch n d"]]:
    """Self-attention from one product that holds queries, keys and values; our kernels read them where they lie.

    Args:
      qkv: (*batch, rows, 3, h, d), queries, keys and values, each with all heads, as timm's and DeiT's `qkv` gives them.
      bias, scale, implementation: as in `proportional_attention`.
      offset: (3, h, d), what every row of `qkv` still lacks, the bias of its product: our kernels add it on the way.
      length: how many of the rows are there, n of the result and of the bias; all of them where it is left out. "mosaic_gpu"
        reads rows in eights, and copies `qkv` first if they are not: padding what the product is of costs less. What lies
        behind must be finite.
      mean_keys: return the mean of the keys over heads too, (*batch, n, d), Token Merging's metric: summed in float32, in the
        dtype of `qkv`, `offset` added. Our kernels add them up on the way, in the same launch.

    Law:
      packed_attention(jnp.stack([q, k, v], axis=-3), bias) = proportional_attention(q, k, v, bias)
      with `mean_keys`, the second is k.mean(axis=-2)

    Raises:
      ValueError: the third axis from the right is not 3, shapes that do not fit, fewer rows than `length`; a kernel
        where it cannot run, with the reasons, and its second derivatives.

    Example:
      >>> import jax, jax.numpy as jnp, jaxmerge as jm
      >>> qkv = jax.random.normal(jax.random.key(0), (2, 5, 3, 4, 8))
      >>> jm.attention.packed_attention(qkv, jm.attention.key_bias(jnp.ones((2, 5)))).shape
      (2, 5, 4, 8)
      >>> out, keys = jm.attention.packed_attention(qkv, None, mean_keys=True)
      >>> keys.shape
      (2, 5, 8)

    Source: Token Merging, section 3.2 (arXiv:2210.09461); the packed form, FlashAttention (arXiv:2205.14135).
    """
    if qkv.ndim < 4 or qkv.shape[-3] != 3:
        raise ValueError(f"packed_attention: qkv must be (*batch, n, 3, heads, features), got {qkv.shape}.")
    segments.check_whole("packed_attention: qkv", qkv, qkv.ndim - 4)
    n = qkv.shape[-4] if length is None else length
    if offset is not None and offset.shape != qkv.shape[-3:]:
        raise ValueError(f"packed_attention: offset must have the shape {qkv.shape[-3:]} of a row of qkv, got {offset.shape}.")
    if not 0 <= n <= qkv.shape[-4] or (bias is not None and bias.shape != (*qkv.shape[:-4], n)):
        there = "no bias" if bias is None else f"a bias of shape {bias.shape}"
        raise ValueError(f"packed_attention: length {n} and {there} do not fit qkv of shape {qkv.shape}.")
    factor = qkv.shape[-1] ** -0.5 if scale is None else scale
    wide = None if offset is None else offset.astype(jnp.float32).reshape(*[1] * (qkv.ndim - 4), *offset.shape)
    if implementation in dispatch.KERNELS:
        options: Any = dict(scale=factor, length=length, mean_keys=mean_keys, implementation=implementation)
        found: Any = kernels.attend(qkv, None, None, bias, wide, **options)
    else:
        q, k, v = reference.unpacked(qkv, wide, length)
        out = proportional_attention(q, k, v, bias, scale=factor, implementation=implementation)
        found = (out, reference.over_heads(k)) if mean_keys else (out,)
    return found if mean_keys else found[0]


def _even_lengths(q: Array, k: Array, v: Array, bias: Array | None) -> tuple[Array, Array, Array, Array | None]:
    """Queries and keys of even number: a row of zeros at the end where there is one too few, of weight 0."""
    rows = lambda x, count: jnp.pad(x, (*[(0, 0)] * (x.ndim - 3), (0, count), (0, 0), (0, 0)))
    t, s = q.shape[-3] % 2, k.shape[-3] % 2
    if s:
        bias = jnp.zeros(k.shape[:-2], jnp.float32) if bias is None else bias
        bias = jnp.pad(bias, (*[(0, 0)] * (bias.ndim - 1), (0, 1)), constant_values=MASKED)
    return rows(q, t), rows(k, s), rows(v, s), bias


def _flash(q, k, v, bias, mask=None, *, is_causal, scale):
    """cuDNN's attention, the bias in feature columns."""
    d = v.shape[-1]
    if bias is not None:
        q, k, v = append_bias(q, k, v, bias, scale=scale, multiple_of=8)
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=is_causal, scale=scale, implementation="cudnn")
    return out[..., :d]


def _flash_of_any_length(q, k, v, bias, **options):
    """`_flash` as it is, but for its gradient, which is that at even lengths."""
    flash = jax.custom_vjp(lambda *a: _flash(*a, **options))

    def forward(q, k, v, bias):
        return jax.vjp(lambda *a: _flash(*_even_lengths(*a), **options)[..., : q.shape[-3], :, :], q, k, v, bias)

    flash.defvjp(forward, lambda back, g: back(g))
    return flash(q, k, v, bias)


def segment_mask(plan: Plan, *, causal: bool = False) -> Bool[Array, "*batch n n"]:
    """Which positions may see which, inside their own segment only: block-diagonal attention.

    Args:
      plan: words, windows, documents.
      causal: see no later position.

    Returns:
      True where query i may see key j. A dropped position sees itself alone, so that no row is empty.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.attention.segment_mask(jm.Plan(jnp.array([0, 0, 1]), 2)).astype(int).tolist()
      [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    """
    ids, n = plan.segment_ids, plan.num_positions
    same = (ids[..., :, None] == ids[..., None, :]) & plan.kept[..., None, :]
    same = jnp.tril(same) if causal else same
    return same | jnp.eye(n, dtype=bool)
