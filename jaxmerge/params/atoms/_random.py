"""Random masks that are the same on one device, on eight, and on many hosts."""

import functools
import hashlib
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import UInt8, UInt32

from jaxmerge.params._deferred import Entries, defer, entries, last
from jaxmerge.params._layout import like
from jaxmerge.params._transform import Hyperparameter, MergeTransform, Need, Step, atom, each, models, resolve
from jaxmerge.params.atoms._trim import _density
from jaxmerge.params.order._blocks import by_rows
from jaxmerge.params.order._devices import alone
from jaxmerge.params.order._quantile import ORIGIN, coordinates, magnitude_bits
from jaxmerge.params.order._rows import as_rows, columns, outranks, rank_in_row
from jaxmerge.params.order._words import quotient


def random_mask(density: Hyperparameter, *, seed: int) -> MergeTransform:
    """Keep each entry with probability `density`, independently; zero the rest.

    The choice is a function of (seed, leaf name, expert, index in the leaf) and of nothing else: no order of execution, no
    sharding, no number of devices enters. Multiply by 1 / density with `rescale(random_mask(...), "inv_p")`.

    Args:
      density: the share to keep, in [0, 1].
      seed: an integer; another seed, another mask.

    Law:
      density = 1 changes nothing; the result has the same bits on any sharding.

    Raises:
      ValueError: density outside [0, 1]. TypeError: a seed that is no integer.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> tx, stacked = jm.params.random_mask(0.5, seed=0), {"w": jnp.ones((1, 1000))}
      >>> 400 < tx.merge(tx.match(stacked), stacked)["w"].sum() < 600
      Array(True, dtype=bool)

    Source: DARE (arXiv:2311.03099). Keys come from Threefry-2x32 (Salmon et al. 2011, doi:10.1145/2063384.2063405), an entry's
    bits from a hash of its index under its key (`hashed`), which takes a quarter of the time.
    """

    seed = _seed(seed, "random_mask")

    def settings(name, shape):
        d = _density(density, name, shape[0], "random_mask")
        below = np.minimum(np.round(d * 2.0**32), 2.0**32 - 1).astype(np.uint32)
        return {
            "key": _keys(seed, name, shape[0]),
            "below": below,
            "density": d.astype(np.float32),
            "origin": ORIGIN,
        }

    def keep(plan, x, start):
        below, everything = jnp.asarray(plan["below"]), jnp.asarray(plan["density"]) >= 1
        return [(u < below[k]) | everything[k] for k, u in enumerate(_words(plan["key"], start, x, plan["origin"]))]

    @jax.jit
    def kept(plan, x):
        return jnp.stack([jnp.where(kept, one, 0) for kept, one in zip(keep(plan, x, np.uint32(0)), models(x), strict=True)])

    def merge(plan, x):
        return defer(kept, plan, x)

    def written(plan, x):
        return _masked(x, functools.partial(keep, plan))

    needs = (Need("random", "entry"),)
    return atom(Step(settings, lambda settings, x: settings, merge, needs=needs, lazy=True, blocks=True, written=written))


def rank_mask(density: Hyperparameter, epsilon: Hyperparameter = 0.15, *, seed: int, divide: bool = False) -> MergeTransform:
    """Keep each entry with a probability that grows with its magnitude's rank in its row: MAGPRUNE.

    The smallest entry of a row is kept with probability density - epsilon, the largest with density + epsilon, linear in the
    rank between (equal magnitudes: the entry further left ranks lower). A row of one entry has probability density. Where the
    random word falls between the two, its place there names another entry of the row: whether that ranks lower has just the
    probability that is left. So nothing is sorted, but with `divide`. A matrix that is split along its last axis is
    laid out by rows for this (an all-to-all under Explicit axes, where they divide evenly), a vector is brought together.

    Args:
      density: the share to keep; 1 keeps everything, 0 nothing.
      epsilon: half of how much the probability grows along the ranks.
      seed: see `random_mask`.
      divide: divide what is kept by its own probability (the paper). mergekit restores the l1 norm instead:
        `rescale(rank_mask(...), "l1")`.

    Law:
      density = 1 changes nothing; the result has the same bits on any sharding.

    Raises:
      ValueError: density outside [0, 1]; density +- epsilon outside (0, 1). TypeError: a seed that is no integer.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> tx, stacked = jm.params.rank_mask(0.5, 0.4, seed=0), {"w": jnp.arange(1.0, 1001.0)[None]}
      >>> merged = tx.merge(tx.match(stacked), stacked)["w"][0]
      >>> int((merged[:500] != 0).sum()) < 200, int((merged[500:] != 0).sum()) > 300
      (True, True)

    Source: DELLA-Merging (arXiv:2406.11617): divide=True; mergekit's `della`, `della_linear`: the l1 norm.
    """

    seed = _seed(seed, "rank_mask")

    def settings(name, shape):
        d = _density(density, name, shape[0], "rank_mask")
        e = np.asarray(resolve(epsilon, name, shape[0], "rank_mask: epsilon"), np.float64)
        inner = (d > 0) & (d < 1)
        if (inner & ((d + e >= 1) | (d - e <= 0))).any():
            raise ValueError(
                f"rank_mask: density +- epsilon must lie between 0 and 1; got density {d.tolist()} and epsilon {e.tolist()} "
                f"at leaf {name!r}; choose a smaller epsilon."
            )
        # probabilities in units of 2^-32, so that no rounding depends on the sharding
        last = (shape[-1] if len(shape) > 1 else 1) - 1
        low = np.where(inner, d - e if last else d, 0)
        step = np.where(inner, 2 * e / last if last else 0, 0)
        return {
            "key": _keys(seed, name, shape[0]),
            "density": d.astype(np.float32),
            "low": np.round(low * 2.0**32).astype(np.uint32),
            "step": np.floor(step * 2.0**32).astype(np.uint32),
            "origin": ORIGIN,
        }

    def drawn(plan, x):
        """Kept below low; in the 2 epsilon above it, where the entry of the row that the place there names ranks lower."""

        chances = [jnp.asarray(plan[name]) for name in ("low", "step", "density")]
        n = x.shape[-1] if x.ndim > 1 else 1

        def rival(u, low, step, density):
            """The entry of its row that each has to outrank; n where it is kept anyway, n + 1 where it is not."""
            place = u - low
            other = jnp.minimum(quotient(place, jnp.maximum(step, 1)), np.uint32(max(n - 2, 0)))
            other = other + (other >= columns(other))
            open_ = (u >= low) & (place < step * np.uint32(n - 1))
            found = jnp.where(u < low, np.uint32(n), jnp.where(open_, other, np.uint32(n + 1)))
            found = jnp.where(density >= 1, np.uint32(n), jnp.where(density > 0, found, np.uint32(n + 1)))
            return found.astype(jnp.uint16 if n < (1 << 16) - 1 else jnp.uint32)

        def draw(x, start):
            words = map(jnp.atleast_1d, _words(plan["key"], start, x, plan["origin"]))
            return [(m, rival(u, *chance)) for m, u, *chance in zip(models(x), words, *chances, strict=True)]

        def keep(drawn):
            return [outranks(jnp.atleast_1d(m), rival).reshape(m.shape) for m, rival in drawn]

        return _masked(x, draw, keep)

    def divided(plan, x):
        chances, x = _chances(plan, entries(x)), entries(x)

        def one(x, u, below, density):
            keep = (u < below) & (density > 0)
            rescaled = x / jnp.where(keep, below.astype(jnp.float32) * 2.0**-32, 1)
            return jnp.where(density >= 1, x, jnp.where(keep, rescaled, 0))

        words = _words(plan["key"], np.uint32(0), x, plan["origin"])
        return jnp.stack([one(*parts) for parts in zip(models(x), words, chances, jnp.asarray(plan["density"]), strict=True)])

    needs = (Need("order", "row"), Need("random", "entry"))
    merge = divided if divide else drawn
    return atom(Step(settings, lambda settings, x: settings, merge, needs=needs, lazy=True, blocks="rows"))


def _chances(plan: dict, x: Array) -> list[UInt32[Array, "..."]]:
    """MAGPRUNE's probability for each entry of every model of x (K, *shape), in units of 2^-32."""
    small = jnp.uint16 if x.shape[-1] <= 1 << 16 else jnp.uint32
    rank = rank_in_row(as_rows(each(magnitude_bits, x))).astype(small).reshape(x.shape)
    chances = zip(models(rank), models(x), jnp.asarray(plan["low"]), jnp.asarray(plan["step"]), strict=True)
    return [low + step * like(rank, one).astype(jnp.uint32) for rank, one, low, step in chances]


def _seed(seed: Any, what: str) -> int:
    try:
        return operator.index(seed)
    except TypeError:
        raise TypeError(f"{what}: seed must be an integer, the same for the same masks; got {seed!r}.") from None


def _keys(seed: int, name: str, models: int) -> UInt32[np.ndarray, "pairs 2"]:
    """One for every two models."""
    keys = [hashlib.sha256(f"{seed}/{pair}/{name}".encode()).digest()[:8] for pair in range((models + 1) // 2)]
    return np.stack([np.frombuffer(k, "<u4") for k in keys]).astype(np.uint32)


def _words(keys: Array, start: Array | np.uint32, x: Array, origin: Any = ORIGIN) -> list[UInt32[Array, "..."]]:
    """A random word of each model for every entry of x (K, *shape): a leaf, or a block of one that begins `start` entries
    behind its `origin`."""
    _, _, row, column = coordinates(x.shape[1:], origin)
    of = lambda k: threefry(tuple(jnp.asarray(keys)[k // 2]), (row, jnp.full_like(row, k % 2)))
    return [hashed(column + start, of(k)) for k in range(x.shape[0])]


def _masked(x: Entries, *draw: Callable) -> Entries:
    """x where it is kept, else 0. What is kept of eight models is written down as the bits of a byte: who looks at what is left
    need not draw anew.

    Args:
      draw: functions for `by_rows`; the last returns for each model what is kept.
    """
    *begin, keep = draw

    once = x if alone() else last(x)  # not told apart, what is drawn for two readers is drawn and laid out once

    def byte(some):
        bits = lambda *args: [kept.astype(jnp.uint8) << i for i, kept in enumerate(keep(*args)[some])]
        kept = by_rows(once, *begin, lambda *args: functools.reduce(jnp.bitwise_or, bits(*args)))
        return like(kept, models(last(x))[0])

    return defer(_where, [byte(slice(k, k + 8)) for k in range(0, x.shape[0], 8)], x)


def _where(kept: list[UInt8[Array, "..."]], x: Array) -> Array:
    return jnp.stack([jnp.where(kept[k // 8] >> (k % 8) & 1, one, 0) for k, one in enumerate(models(x))])


def hashed(index: Array, key: tuple[Array, Array]) -> Array:
    """A word of random bits for each index under a key: three rounds of multiplication and shift, each after a word of the key.

    For one key a permutation of the 32-bit numbers. The constants are those of `triple32`, found by Wellons' search for the
    least biased avalanche (github.com/skeeto/hash-prospector).
    """
    x, words = index, (*key, key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))
    for word, shift, times in zip(words, (17, 11, 15), (0xED5AD4BB, 0xAC4C1B51, 0x31848BAB), strict=True):
        x = x + word
        x = (x ^ (x >> shift)) * np.uint32(times)
    return x ^ (x >> 14)


def threefry(key: tuple[Array, Array], counter: tuple[Array, Array]) -> tuple[Array, Array]:
    """Threefry-2x32 with 20 rounds: two words of random bits for a 64-bit counter under a 64-bit key."""
    ks = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    a, b = counter[0] + ks[0], counter[1] + ks[1]
    for group in range(5):
        for r in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            a = a + b
            b = ((b << r) | (b >> (32 - r))) ^ a
        a = a + ks[(group + 1) % 3]
        b = b + ks[(group + 2) % 3] + jnp.uint32(group + 1)
    return a, b
