"""Keep the primary tokens, condense the rest, and look away from what does not matter (VMTC and CMAI)."""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import ArrayLike, Float, Shaped

from jaxmerge import _segments as segments
from jaxmerge._plan import Plan
from jaxmerge._rank import highest
from jaxmerge.attention import MASKED
from jaxmerge.tokens._checks import check_rows, check_sequences, checked_tokens, python_int
from jaxmerge.tokens.clustering._density import keep_apart
from jaxmerge.tokens.clustering._k_means import k_means
from jaxmerge.tokens.pruning._prune import keep_top_k


def primary_and_clusters(
    x: Float[ArrayLike, "*batch n d"], score: Shaped[Array, "*batch n"], keep: int, k: int, *, iterations: int = 10
) -> Plan:
    """Keep the tokens of highest score as they are, and average the others in k clusters.

    Args:
      x: tokens, clustered by cosine.
      score: what makes a token primary, such as the class token's attention to it.
      keep: how many primary tokens.
      k: how many clusters of the others.
      iterations: of k-means.

    Returns:
      A plan of keep + k segments, numbered by the first position they hold. No gradient flows through it.

    Law:
      primary tokens are alone; nothing is dropped.

    Raises:
      ValueError: keep or k do not fit n.

    Cost: see `k_means`.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> x = jnp.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, 0.2], [0.1, 1.0]])
      >>> jm.tokens.primary_and_clusters(x, jnp.array([9.0, 1, 1, 1, 1]), 1, 2).segment_ids.tolist()
      [0, 1, 2, 1, 2]

    Source: VMTC (arXiv:2411.15453): primary tokens are retained, redundant ones condensed by clustering and averaging. No
    official code; cosine, the deterministic start and the fixed number of iterations are ours.
    """
    x, score = checked_tokens("primary_and_clusters", x), jnp.asarray(score)
    check_rows("primary_and_clusters", x, score=score)
    n = x.shape[-2]
    if not 1 <= k <= n - keep:
        raise ValueError(f"primary_and_clusters: k={k} clusters need as many tokens, but {n} tokens less keep={keep} are left.")
    primary = keep_top_k(lax.stop_gradient(score), keep).kept
    return keep_apart(k_means(x, k, iterations=iterations, mask=~primary), primary, keep)


def attention_inhibition(
    text_to_text: Float[ArrayLike, "*batch t t"], text_to_image: Float[ArrayLike, "*batch t n"], keep: int
) -> Float[Array, "*batch t n"]:
    """An additive bias that keeps each text token from image tokens that its context pays no attention to.

        focus = text_to_text · text_to_image

    Args:
      text_to_text: attention among text tokens, rows are queries.
      text_to_image: attention of text tokens to image tokens.
      keep: how many image tokens each text token may still see.

    Returns:
      float32: 0 where focus is among the `keep` largest of its row (of equal ones the first), `attention.MASKED` elsewhere.
      Add it to the text-to-image logits. No gradient flows through it.

    Law:
      attention_inhibition(a, b, n) = 0.

    Raises:
      ValueError: keep outside [0, n].

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> text, image = jnp.array([[1.0, 0.0], [0.5, 0.5]]), jnp.array([[0.2, 0.1, 0.0], [0.0, 0.2, 0.4]])
      >>> (jm.tokens.attention_inhibition(text, image, 2) == 0).tolist()
      [[True, True, False], [False, True, True]]

    Source: CMAI (arXiv:2411.15453): text-to-image attention aggregated by text-to-text attention is the focus score, and pairs
    of low score are inhibited. No official code; the fixed number per text token, in place of a threshold, is ours.
    """
    a, b = (lax.stop_gradient(jnp.asarray(x)) for x in (text_to_text, text_to_image))
    if a.ndim != b.ndim or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        raise ValueError(
            "attention_inhibition: expected text_to_text (*batch, t, t) and text_to_image (*batch, t, n), "
            f"got {a.shape} and {b.shape}."
        )
    keep = python_int("attention_inhibition", "keep", keep)
    if not 0 <= keep <= b.shape[-1]:
        raise ValueError(f"attention_inhibition: keep must be between 0 and the image tokens, {b.shape[-1]}; got {keep}.")
    check_sequences("attention_inhibition", axes=(-1, -2), text_to_text=a, text_to_image=b)
    focus = segments.matmul(a, b)
    return jnp.where(highest(focus, keep), 0, MASKED).astype(jnp.float32)
