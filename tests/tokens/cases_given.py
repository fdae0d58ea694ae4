"""Pooling and given groups, as rows for the laws that every planner obeys: from x (*batch, 16, 8) to a plan."""

import jax
import jax.numpy as jnp

from jaxmerge import tokens
from tests.tokens.cases import Case


def signs(x):
    """Groups out of tokens: one of eight by the signs of three features."""
    bits = (x[..., :3] > 0).astype(jnp.int32)
    return bits[..., 0] + 2 * bits[..., 1] - 4 * bits[..., 2]


def phrases(x):
    """Two phrases among tokens that stay, and which members are attributes."""
    groups = jnp.where(x[..., 0] > 0.5, 0, jnp.where(x[..., 1] > 0.5, 1, -1)).astype(jnp.int32)
    return groups, x[..., 2] > 0


CASES = [
    Case("grid_pool", lambda x: tokens.grid_pool((4, 4), (2, 2), like=x), ordered=True),
    Case("grid_pool, one axis", lambda x: tokens.grid_pool((16,), (8,), like=x), ordered=True, duplicates=True),
    Case("grid_pool, overlapping", lambda x: tokens.grid_pool((4, 4), (3, 2), like=x)),
    Case("matryoshka_pool", lambda x: tokens.matryoshka_pool((4, 4), 4, like=x), ordered=True),
    Case("sequence_pool", lambda x: tokens.sequence_pool(16, 5, like=x), ordered=True),
    Case("temporal_pairs", lambda x: tokens.temporal_pairs(16, like=x), ordered=True, duplicates=True),
    Case("temporal_pairs, drop", lambda x: tokens.temporal_pairs(5, 3, last="drop", like=x[..., :15, :]), ordered=True),
    Case("from_groups", lambda x: tokens.from_groups(signs(x), 8), ordered=True, equivariant=True),
    Case(
        "from_groups, alone",
        lambda x: tokens.from_groups(signs(x), 10, mask=x[..., 3] > 0, rest="alone"),
        ordered=True,
        equivariant=True,
    ),
    Case("bind", lambda x: tokens.bind(phrases(x)[0], weight=jax.nn.softplus(x[..., 4].astype(jnp.float32)))),
    Case("bind_attributes", lambda x: tokens.bind_attributes(*phrases(x))),
]
