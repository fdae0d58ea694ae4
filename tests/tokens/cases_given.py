"""Pooling and given groups: from x (*batch, 16, 8) to a plan."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tokens
from tests.tokens.cases import Case

PHRASES = np.array([-1, 0, 0, -1, 1, 2, 1, 1, -1, 2, -1, -1, 3, 3, -1, -1], np.int32)
ATTRIBUTES = np.array([0, 1, 0, 0, 1, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0], bool)  # the third phrase has no noun


def signs(x):
    """Groups out of tokens: one of eight, by the signs of three features."""
    bits = (x[..., :3] > 0).astype(jnp.int32)
    return bits[..., 0] + 2 * bits[..., 1] - 4 * bits[..., 2]


def phrases(x):
    """The same phrases in every row, laid out as x is."""
    rows = jnp.zeros_like(x[..., 0], jnp.int32)
    return rows + PHRASES.reshape((1,) * (x.ndim - 2) + (16,))


def attributes(x):
    return (phrases(x) >= -1) & ATTRIBUTES.reshape((1,) * (x.ndim - 2) + (16,))


CASES = [
    Case("grid_pool", lambda x: tokens.grid_pool((4, 4), (2, 2), like=x), ordered=True),
    Case("grid_pool, a sequence", lambda x: tokens.grid_pool((16,), (8,), like=x), ordered=True, duplicates=True),
    Case("grid_pool, overlapping windows", lambda x: tokens.grid_pool((4, 4), (3, 2), like=x)),
    Case("matryoshka_pool", lambda x: tokens.matryoshka_pool((4, 4), 4, like=x), ordered=True),
    Case("sequence_pool", lambda x: tokens.sequence_pool(16, 5, like=x), ordered=True),
    Case("temporal_pairs", lambda x: tokens.temporal_pairs(16, like=x), ordered=True, duplicates=True),
    Case("from_groups", lambda x: tokens.from_groups(signs(x), 8), ordered=True, equivariant=True),
    Case(
        "from_groups, the rest alone",
        lambda x: tokens.from_groups(signs(x), 10, mask=x[..., 3] > 0, rest="alone"),
        ordered=True,
    ),
    Case("bind", lambda x: tokens.bind(phrases(x), weight=jax.nn.softplus(x[..., 4].astype(jnp.float32)))),
    Case("bind_attributes", lambda x: tokens.bind_attributes(phrases(x), attributes(x))),
]
