"""Guidance: push tokens away from what they must not become."""

from typing import Literal

import jax.numpy as jnp
from jax import Array
from jaxtyping import ArrayLike, Bool, Float

from jaxmerge import _segments as segments
from jaxmerge.tokens._checks import check_sequences, spreads
from jaxmerge.tokens._nearest import nearest


def negative_merge(
    x: Float[ArrayLike, "*batch n d"],
    reference: Float[ArrayLike, "*#batch m d"],
    *,
    alpha: float = 0.9,
    threshold: float = 0.65,
    mask: Bool[ArrayLike, "*#batch n m"] | None = None,
    match: Literal["reference", "tokens"] = "reference",
) -> Float[Array, "*batch n d"]:
    """Move each token away from the reference token most like it: x + alpha (x - match), where their cosine passes a threshold.

    The opposite of merging, which moves both to their mean. Length does not change, so there is no plan.

    Args:
      x: tokens, after attention.
      reference: tokens to keep away from, with as many axes as x; a batch axis of length 1 is one reference for all rows
        (images of one prompt away from the first: `negative_merge(x, x[:1])`).
      alpha: how far, in differences.
      threshold: cosine above which a token moves.
      mask: True where token i may look at reference token j.
      match: "reference" gives each token i its best reference token, argmax_j cos(x_i, ref_j), as the paper draws it.
        "tokens" is what the official code computes: position j has the cosine max_i cos(x_i, ref_j), and moves away from
        ref at argmax_i, an index of a token read as one of the reference (so n = m).

    Returns:
      Tokens in x's dtype. Gradients flow through x and the reference, not through who matched whom.

    Law:
      alpha = 0 changes nothing; a token that matches itself stays; match="tokens" is match="reference" where the nearest
      neighbour is mutual and in the same place.

    Raises:
      ValueError: x and the reference differ in rank, batch or features, n ≠ m with match="tokens", another `match`.

    Cost: one (n, m) similarity.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> x, other = jnp.array([[1.0, 0.5], [-1.0, 0.0]]), jnp.array([[1.0, 0.0]])
      >>> jm.tokens.negative_merge(x, other, alpha=1.0).tolist()
      [[1.0, 1.0], [-1.0, 0.0]]

    Source: negative token merging (arXiv:2412.01339), `negtome` of `1jsingh/negtome`.
    """
    x, reference = jnp.asarray(x), jnp.asarray(reference)
    if match not in ("reference", "tokens"):
        raise ValueError(f'negative_merge: match must be "reference" or "tokens", got {match!r}.')
    if x.ndim < 2 or x.ndim != reference.ndim or x.shape[-1] != reference.shape[-1]:
        raise ValueError(
            f"negative_merge: x (*batch, n, d) and the reference (*batch, m, d) must have as many axes and the same d, got "
            f"{x.shape} and {reference.shape}; a batch axis of length 1 shares one reference."
        )
    if not spreads(reference.shape[:-2], x.shape[:-2]):
        raise ValueError(
            f"negative_merge: the reference's batch axes must be x's, {x.shape[:-2]}, or of length 1; "
            f"got {reference.shape[:-2]}."
        )
    check_sequences("negative_merge", axes=(-2,), x=x, reference=reference)
    n, m = x.shape[-2], reference.shape[-2]
    if match == "tokens" and n != m:
        raise ValueError(f'negative_merge: match="tokens" reads positions of x in the reference, so n = m; got {n} and {m}.')
    reference = reference.astype(x.dtype) + jnp.zeros_like(x[..., :1, :])  # one for each row, laid out as x is
    if match == "reference":
        found = nearest(x, reference, mask=mask)
    else:
        found = nearest(reference, x, mask=None if mask is None else jnp.swapaxes(jnp.asarray(mask), -1, -2))
    away = x + alpha * (x - segments.take(found.index, reference))
    return jnp.where((found.similarity > threshold)[..., None], away, x).astype(x.dtype)
