"""Merging across the clips of a video: neighbouring clips are laid side by side and matched as one."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float, Int

from jaxmerge._plan import Plan
from jaxmerge.tokens._checks import check_sequences, checked_r, python_int
from jaxmerge.tokens.matching._bipartite import bipartite_matching


def clip_matching(metric: Float[ArrayLike, "*batch clips n d"], r: int, *, classes: int = 1) -> Plan:
    """Join clips into one and remove the r tokens most like another, class tokens of all clips first.

    Args:
      metric: what to compare tokens by; each clip is its class tokens, then its other tokens. TempMe compares features
        before attention when it joins two clips, and keys after attention inside of one (clips = 1).
      r: how many tokens to remove from the joined clip.
      classes: class tokens at the front of each clip; they never merge. After joining there are clips x classes of them,
        the next call's number.

    Returns:
      A plan from clips x n positions (clip by clip, x.reshape(*batch, clips * n, ...)) to clips x n - r: first the class
      tokens, then the others, clip by clip. A learned embedding per clip is added to x before merging.

    Law:
      clip_matching(x[None], r, classes=c) = bipartite_matching(x, r, protect=range(c)): one clip is plain matching;
      clip_matching(x, 0) is a permutation.

    Raises:
      ValueError: r out of range, classes outside [0, n], a metric of rank below 3. TypeError: r is not an int.

    Cost: that of `bipartite_matching` over all tokens of the joined clip.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> x = jnp.array([[[9.0, 9.0], [1.0, 0.0], [0.0, 1.0]], [[9.0, 9.0], [0.1, 1.0], [-1.0, 1.0]]])
      >>> jm.tokens.clip_matching(x, 1).segment_ids.tolist()
      [0, 2, 3, 1, 3, 4]

    Source: TempMe (arXiv:2409.01156), `bipartite_soft_matching` with `cls_num`. Its parity flip, where the number of class
    tokens is odd, is Token Merging's parity counted from the first class token.
    """
    name = "clip_matching"
    shape = np.shape(metric)
    if len(shape) < 3:
        raise ValueError(f"{name}: metric must have shape (*batch, clips, n, d), got {shape}.")
    check_sequences(name, axes=(-3, -2), metric=metric)
    *batch, clips, n, d = shape
    classes = python_int(name, "classes", classes)
    if not 0 <= classes <= n:
        raise ValueError(f"{name}: classes must be between 0 and the tokens of a clip, {n}; got {classes}.")
    total, lead = clips * n, clips * classes
    odd = total // 2 - lead // 2
    r = checked_r(name, r, min(odd, total - lead - odd), f"{clips} clips of {n} tokens, {classes} of them classes each")
    order, slot = _side_by_side(clips, n, classes)
    joined = jnp.asarray(metric).reshape(*batch, total, d)[..., order, :]
    plan = bipartite_matching(joined, r, protect=range(lead))
    return Plan(plan.segment_ids[..., slot], plan.num_segments)


def _side_by_side(clips: int, n: int, classes: int) -> tuple[Int[np.ndarray, "total"], Int[np.ndarray, "total"]]:
    """Positions in the joined order, [all classes][all others], and the place of each position in it."""
    at = np.arange(clips * n).reshape(clips, n)
    order = np.concatenate([at[:, :classes].reshape(-1), at[:, classes:].reshape(-1)])
    return order, np.argsort(order)
