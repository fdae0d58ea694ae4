"""BLT's patches: a new one begins where the next byte is hard to guess.

    H_j = entropy of the byte after byte j, given those before      byte j + 1 begins a patch where H_j is high, or rises

A patch at most s long, or always: `limit_patches`. The threshold for a wanted mean length: `patch_threshold`.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import ArrayLike, Bool, Float, Int

from jaxmerge.tokens import ranks
from jaxmerge.words._segment import document_starts, place_in_word

BLT_THRESHOLD = 1.335442066192627
"""The threshold that BLT ships, in nats. It belongs to its entropy model: for another, ask `patch_threshold`."""


def byte_entropy(logits: Float[Array, "*batch n v"]) -> Float[Array, "*batch n"]:
    """How hard the next byte is to guess: the entropy of softmax(logits), in nats and float32.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> round(jm.words.byte_entropy(jnp.zeros((1, 256))).item(), 3)
      5.545
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.sum(jnp.where(log_p == -jnp.inf, 0.0, jnp.exp(log_p) * log_p), axis=-1)


def entropy_starts(
    entropy: Float[Array, "*batch n"],
    *,
    threshold: float | Float[ArrayLike, ""] | None = None,
    rise: float | Float[ArrayLike, ""] | None = None,
    budget: int | None = None,
    mask: Bool[Array, "*batch n"] | None = None,
    documents: Int[Array, "*batch n"] | None = None,
    bos: bool = True,
) -> Bool[Array, "*batch n"]:
    """Where patches begin, from the entropy of the next byte. Give a threshold, a rise, both, or a budget.

    Args:
      entropy: H_j of the byte AFTER position j, from a byte model that read no other document.
      threshold: byte j + 1 begins a patch if H_j > threshold.
      rise: if H_j - H_{j-1} > rise (BLT's "monotonic"; with `threshold` both must hold). The first entropy of a document has
        none before it: its patch is forced, and with both criteria the byte after it begins none, as in the official code.
      budget: or the bytes after the highest entropies, so many patches to a row, all forced ones included.
      mask: True for a byte; no patch begins at padding.
      documents: ids of packed documents. The first byte of each begins a patch, and no rise is taken across.
      bos: every document begins with a mark, a patch of its own: two patches are then forced at its head, not one. BLT does so.

    Returns:
      Starts, for `segments`.

    Raises:
      ValueError: no criterion, or a budget beside another.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> h = jnp.array([5.0, 2.0, 0.1, 0.2, 3.0, 0.5])
      >>> jm.words.entropy_starts(h, threshold=1.3).astype(int).tolist()
      [1, 1, 1, 0, 0, 1]

    Source: BLT (arXiv:2412.09871), section 2.3; equal to blt_a. Its code flattens the batch before it takes entropies, so that
    one document is context to the next.
    """
    if budget is None and threshold is None and rise is None:
        raise ValueError("entropy_starts: give a threshold, a rise, both, or a budget of patches per row.")
    if budget is not None and not (threshold is None and rise is None):
        raise ValueError("entropy_starts: a budget stands alone; leave threshold and rise out.")
    back = lambda x: jnp.concatenate([x[..., :1], x[..., :-1]], axis=-1)  # what byte j + 1 knows of byte j
    h = back(entropy.astype(jnp.float32))
    place = _place(jnp.zeros_like(entropy, jnp.int32) if documents is None else documents)
    forced = place < 1 + bos + (rise is not None)
    if budget is not None:
        free = ~forced if mask is None else ~forced & mask
        taken = jnp.sum(forced if mask is None else forced & mask, axis=-1, keepdims=True, dtype=jnp.int32)
        chosen = free & (ranks(jnp.where(free, h, -jnp.inf)) < budget - taken)
    else:
        chosen = jnp.ones_like(forced)
        if threshold is not None:
            chosen &= h > threshold
        if rise is not None:
            chosen &= h - back(h) > rise
        if threshold is not None and rise is not None:
            chosen &= place != 2 + bos
    starts = forced | chosen
    return starts if mask is None else starts & mask


def limit_patches(starts: Bool[Array, "*batch n"], longest: int) -> Bool[Array, "*batch n"]:
    """Cut patches that are longer than `longest` every so many bytes. Of a row's, or documents', starts alone: static patches.

    Law:
      between two starts lie at most `longest` bytes, and every start remains.

    Raises:
      ValueError: longest is below 1.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.words.limit_patches(jnp.array([1, 0, 0, 0, 1, 0, 0], bool), 2).astype(int).tolist()
      [1, 0, 1, 0, 1, 0, 1]

    Source: BLT (arXiv:2412.09871), its `max_patch_length`; MegaByte (arXiv:2305.07185), whose patches are all of one length.
    """
    if longest < 1:
        raise ValueError(f"limit_patches: longest must be 1 or more, got {longest}.")
    return starts | (place_in_word(starts) % longest == 0)


def space_starts(
    ids: Int[Array, "*batch n"], *, offset: int = 3, bos: bool = False, mask: Bool[Array, "*batch n"] | None = None
) -> Bool[Array, "*batch n"]:
    """SpaceByte's patches: one ends with the first spacelike byte of a run, and the byte after it begins another.

    Spacelike is what is no letter, no digit and no inner byte of a UTF-8 character: spaces, punctuation, the lead byte of a
    character outside ASCII, and any special id.

    Args:
      ids: byte b is b + offset; what lies below is special.
      offset: 3 is ByT5's, 4 is BLT's.
      bos: the second position begins a patch too.
      mask: True for a byte.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.words.space_starts(jnp.asarray(jm.words.to_ids("Hi, you"))).astype(int).tolist()
      [1, 0, 0, 1, 0, 0, 0]

    Source: SpaceByte (arXiv:2404.14408), as BLT has it; equal to blt_a.
    """
    b = ids - offset
    between = lambda low, high: (b >= ord(low)) & (b <= ord(high))
    spacelike = ~(between("0", "9") | between("A", "Z") | between("a", "z") | ((b >= 0x80) & (b < 0xC0)))
    shifted = lambda x, head: jnp.concatenate([jnp.full_like(x[..., :1], head), x[..., :-1]], axis=-1)
    ends = (spacelike & ~shifted(spacelike, False)) | (b < 0)
    place = _place(jnp.zeros_like(ids))
    starts = (place < 1 + bos) | shifted(ends, False)
    return starts if mask is None else starts & mask


def patch_threshold(
    entropy: Float[ArrayLike, "*batch n"],
    size: float,
    *,
    by: Literal["threshold", "rise"] = "threshold",
    rise: float | None = None,
    longest: int | None = None,
    mask: Bool[ArrayLike, "*batch n"] | None = None,
    documents: Int[ArrayLike, "*batch n"] | None = None,
    bos: bool = True,
) -> float:
    """The threshold at which patches of a sample have a wanted mean length, found by bisection over its entropies. On the host.

    Args:
      entropy: of a sample of the data, as `entropy_starts` wants it.
      size: bytes per patch.
      by: what to calibrate, the `threshold` or the `rise`.
      rise: held fixed while the threshold is sought.
      longest: patches are cut to it (`limit_patches`), which is counted.
      mask, documents, bos: as in `entropy_starts`.

    Returns:
      A number half-way between two entropies of the sample, so that rounding decides nothing.

    Raises:
      ValueError: no threshold gives that size: the most and the least are named.

    Example:
      >>> import jax, jaxmerge as jm
      >>> h = jax.random.exponential(jax.random.key(0), (4, 1000))
      >>> theta = jm.words.patch_threshold(h, 4.0)
      >>> round(h.size / jm.words.entropy_starts(h, threshold=theta).sum().item(), 2)
      4.0

    Source: ours. BLT (arXiv:2412.09871) names the method; its shipped threshold gives other sizes on other data.
    """
    if by not in ("threshold", "rise"):
        raise ValueError(f'patch_threshold: by must be "threshold" or "rise", got {by!r}.')
    if by == "rise" and rise is not None:
        raise ValueError('patch_threshold: rise is what by="rise" looks for; leave it out.')
    h = jnp.asarray(entropy, jnp.float32)
    given = [None if a is None else jnp.asarray(a) for a in (mask, documents)]
    total = h.size if given[0] is None else int(given[0].sum())

    @jax.jit
    def count(theta: Array) -> Array:
        level, step = (theta, rise) if by == "threshold" else (None, theta)
        starts = entropy_starts(h, threshold=level, rise=step, mask=given[0], documents=given[1], bos=bos)
        if longest is not None:
            starts = limit_patches(starts, longest)
            starts = starts if given[0] is None else starts & given[0]
        return jnp.sum(starts, dtype=jnp.int32)

    values = np.asarray(h if by == "threshold" else jnp.diff(h, axis=-1))
    return _nearest_size(lambda theta: total / max(int(count(jnp.float32(theta))), 1), np.unique(values), size)


def _nearest_size(mean: Callable[[float], float], values: np.ndarray, size: float) -> float:
    """The point between two values, or beyond all, at which a mean that grows with it comes nearest to `size`."""
    points = np.r_[values[:1] - 1, (values[1:] + values[:-1]) / 2, values[-1:] + 1]
    low, high = 0, len(points) - 1
    least, most = mean(points[low]), mean(points[high])
    if not least <= size <= most:
        raise ValueError(f"patch_threshold: patches of this sample are {least:.3g} to {most:.3g} bytes long, not {size:.3g}.")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if mean(points[middle]) <= size else (low, middle)
    return float(min(points[low], points[high], key=lambda point: abs(mean(point) - size)))


def _place(documents: Int[Array, "*batch n"]) -> Int[Array, "*batch n"]:
    """The position of each byte in its document."""
    return place_in_word(document_starts(documents))
