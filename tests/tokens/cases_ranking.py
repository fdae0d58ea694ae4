"""Ranking and pruning: scores out of attention maps, made here out of x."""

import jax
import jax.numpy as jnp

import jaxmerge as jm
from tests.tokens.cases import Case

t = jm.tokens


def logits(x):
    """Attention logits of one head, (*batch, 1, 16, 16)."""
    return jnp.matmul(x, jnp.swapaxes(x, -1, -2), precision="highest")[..., None, :, :]


def received(x):
    """The attention that each token receives from all: (*batch, 16)."""
    return jax.nn.softmax(logits(x), axis=-1).mean(axis=(-3, -2))


def flow(x):
    attention = received(x)
    return t.flow_score(attention, attention, x), attention


def visual(x):
    """True for all but the first and the last three tokens, laid out as x is."""
    place = jnp.cumsum(jnp.ones_like(x[..., 0], int), axis=-1) - 1
    return (place > 2) & (place < 13)


CASES = [
    Case("assign", lambda x: t.assign(x, t.keep_top_k(x.sum(-1), 6).kept, 6), equivariant=True),
    Case("hiprune", lambda x: t.hiprune(received(x), x[..., 0], 9, width=4, alpha=0.6), ordered=True),
    Case("hiprune, wrapped", lambda x: t.hiprune(received(x), x[..., 0], 9, width=4, alpha=0.6, wrap=True), ordered=True),
    Case(
        "flow_cut",
        lambda x: t.flow_cut(flow(x)[0], t.flow_budget(flow(x)[1], 2, 4), 12),
        ordered=True,
        equivariant=True,
    ),
    Case("page_rank_pruning", lambda x: t.page_rank_pruning(logits(x), 6, temperature=4.0), ordered=True, equivariant=True),
    Case(
        "page_rank_pruning beside text",
        lambda x: t.page_rank_pruning(logits(x), 4, protect=~visual(x), capacity=10),
        ordered=True,
    ),
    Case("dominant_and_contextual", lambda x: t.dominant_and_contextual(received(x), x, 4, 3)),
    Case("representatives", lambda x: t.representatives(received(x), 4, 3), ordered=True),
    Case("prune_and_merge", lambda x: t.prune_and_merge(received(x), x, 12, 7, protect=(0,))),
    Case("prune_and_merge, all", lambda x: t.prune_and_merge(received(x), x, 16, 8), equivariant=True),
    Case(
        "sample_by_correlation",
        lambda x: t.sample_by_correlation(received(x), x, 14, threshold=0.3, repeats=2),
        ordered=True,
        equivariant=True,
    ),
    Case("recover", lambda x: t.recover(x[..., 0], x[..., 1], x, 10, neighbours=3)),
    Case(
        "recover, the rest in pairs",
        lambda x: t.recover(x[..., 0], x[..., 1], x, 10, neighbours=3, rest=lambda x, _: t.bipartite_matching(x, 8)),
    ),
    Case("exit_plan", lambda x: t.exit_plan(x[..., 0, 0] > 0, visual(x), 12), ordered=True),
]
