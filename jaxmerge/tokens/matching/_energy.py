"""PiToMe: tokens that resemble many others have high energy and merge; the rare ones are protected."""

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import ArrayLike, Float

from jaxmerge import _segments as segments
from jaxmerge._kernels import match as kernels
from jaxmerge._kernels._dispatch import Implementation
from jaxmerge._kernels.match.ref import Kernel, resemblance
from jaxmerge._plan import Plan, from_parents, identity
from jaxmerge._rank import highest, ranks
from jaxmerge.tokens._checks import checked_metric, checked_r, protected_mask, python_int
from jaxmerge.tokens._nearest import cosine
from jaxmerge.tokens.matching._two_sided import look, per_row, sent

Split = Literal["alternate", "halves", "all"]


def energy(
    metric: Float[ArrayLike, "*batch n d"],
    margin: float,
    *,
    kernel: Kernel = "shifted",
    alpha: float = 1.0,
    implementation: Implementation | None = None,
) -> Float[Array, "*batch n"]:
    """How much each token resembles all tokens: E_i = mean_j f(cos(i, j)), itself included.

    Args:
      metric: what to compare tokens by (PiToMe: keys averaged over heads, without the class token).
      margin: m; similarities above it count, below it they pull down a little.
      kernel: f(w) = w - m where w > m, else alpha (exp(w - m) - 1)           "shifted", the released vision code (ELU);
        f(w) = w where w >= m, else alpha (exp(w - m) - 1)                      "paper", equation 4;
        f(w) = exp(-((1 - w) / s)² / 2) / (s √(2 pi)), s = 1 - m                "gaussian", the released text code.
      alpha: depth of the negative part.
      implementation: see `nearest`; in a kernel no similarity reaches memory.

    Raises:
      ValueError: an unknown kernel; "gaussian" with a margin of 1 or more; the implementation cannot run here.

    Cost: all n² similarities.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> x = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
      >>> print(jm.tokens.energy(x, 0.5, kernel="paper").round(3))
      [0.536 0.536 0.071]

    Source: PiToMe (arXiv:2405.16148).
    """
    metric = checked_metric("energy", metric)
    if kernel not in ("shifted", "paper", "gaussian"):
        raise ValueError(f'energy: kernel must be "shifted", "paper" or "gaussian", got {kernel!r}.')
    if kernel == "gaussian" and margin >= 1:
        raise ValueError(f'energy: kernel="gaussian" has width 1 - margin, so margin must be below 1; got {margin}.')
    xla = lambda: resemblance(cosine(metric, metric), margin, kernel, alpha).sum(axis=-1)
    total = kernels.energy(metric, margin=margin, kernel=kernel, alpha=alpha, implementation=implementation, xla=xla)
    return total / metric.shape[-2]


def energy_matching(
    metric: Float[ArrayLike, "*batch n d"],
    r: int,
    *,
    margin: float,
    protect: Sequence[int] = (),
    kernel: Kernel = "shifted",
    alpha: float = 1.0,
    split: Split = "alternate",
    prune: bool = False,
) -> Plan:
    """Merge r tokens among the 2r of highest energy, each into the one that it is most like; the others stay as they are.

    Args:
      metric: what to compare tokens by.
      r: how many tokens to remove, at most half of those that are not protected. The authors' keep ratio over T such
        tokens is r = math.floor(T - T * ratio).
      margin, kernel, alpha: of the energy; `margins` has the schedules.
      protect: positions outside it all, (0,) for a class token: they neither move, nor receive, nor count in the energy.
      split: who leaves and who receives, by rank of energy.
        "alternate": of the 2r highest, even ranks leave, odd ones receive       vision
        "halves": the r highest leave, the next r receive                       text, kernel="gaussian"
        "all": even ranks of all tokens leave, odd ones receive, and of these pairs the r most alike merge; nothing is
        protected by its energy                                                 the first half of the layers (`bsm_pitome`)
      prune: drop those that leave instead of merging them. Each slot then holds one token, and reduce="first" is a gather.

    Returns:
      A plan of n - r segments, in the order of the tokens that stay.

    Law:
      tokens of lower energy than the first 2r stay alone, except with split="all"; a constant added to every f changes nothing.

    Raises:
      ValueError: r out of range, an unknown split or kernel. TypeError: r is not an int.

    Cost: n² similarities, four times Token Merging's, and r² (n² / 4 with "all") for the choice.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> x = jnp.array([[0.0, 1.0], [1.0, 0.0], [1.0, 0.1], [-1.0, 0.2]])
      >>> jm.tokens.energy_matching(x, 1, margin=0.5).segment_ids.tolist()
      [0, 1, 1, 2]

    Source: PiToMe (arXiv:2405.16148), `pitome_vision`, `pitome_text`, `pitome_bsm`; its third variant, `bsm`, is
    `bipartite_matching(metric, r, protect=(0,))`. The official order is [class, by falling energy, receivers]; the groups are
    the same. merge(weight=sizes) is its weighted mean, prune=True its mode "prune".
    """
    name = "energy_matching"
    metric = checked_metric(name, metric)
    n = metric.shape[-2]
    free = np.flatnonzero(~protected_mask(name, protect, n))
    t = len(free)
    r = checked_r(name, r, t // 2, f"of {t} tokens that are not protected, at most half can leave")
    if split not in ("alternate", "halves", "all"):
        raise ValueError(f'{name}: split must be "alternate", "halves" or "all", got {split!r}.')
    if r == 0:
        return identity(metric.shape[-2], like=metric)
    free = per_row(free, metric)
    order = segments.take(_by_rank(energy(segments.take(free, metric), margin, kernel=kernel, alpha=alpha)), free)
    first = order if split == "all" else order[..., : 2 * r]
    leave, receive = (first[..., :r], first[..., r:]) if split == "halves" else (first[..., ::2], first[..., 1::2])
    leave, best, goal = look(metric, leave, receive)
    if prune:
        goal = jnp.full_like(goal, -1)
    if split == "all":
        goal = jnp.where(highest(best, r), goal, leave)
    return from_parents(sent(metric, leave, goal), n - r, hops=1)


def margins(depth: int, start: float = 0.75, stop: float = 0.0) -> list[float]:
    """A margin for each layer, start + (stop - start) l / L: falling, as layers make tokens more alike.

    The released vision code has start .75, the paper .9, both towards 0; BERT goes from .9 to .65, BLIP-2 from .75 to .35.

    Raises:
      ValueError: depth below 1.

    Example:
      >>> import jaxmerge as jm
      >>> jm.tokens.margins(3)
      [0.75, 0.5, 0.25]

    Source: PiToMe (arXiv:2405.16148).
    """
    if python_int("margins", "depth", depth) < 1:
        raise ValueError(f"margins: depth must be 1 or more, got {depth}.")
    return [start + (stop - start) * layer / depth for layer in range(depth)]


def _by_rank(score: Float[Array, "*batch n"]) -> Array:
    """Positions from the highest score to the lowest; of equal ones the first is ahead."""
    rank = ranks(score)
    put = lambda rank, here: jnp.zeros_like(rank).at[rank].set(here, mode="promise_in_bounds")
    return segments.batched(put, score.ndim - 1)(rank, segments.positions(rank))
