"""PageRank of attention: the official vectors, a walk in numpy, protected text, the schedule, bad input."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge.tokens import linear_decay, page_rank, page_rank_pruning
from tests.conftest import GOLDEN

DETAILS = json.loads((GOLDEN / "tokens/aim_a.json").read_text())
PARAMS = {c["name"]: c["params"] for c in DETAILS["cases"]}


@pytest.fixture(scope="module")
def logits():
    return jax.random.normal(jax.random.key(0), (2, 3, 12, 12))


@pytest.mark.parametrize("name", ["importance0", "importance1"])
def test_equals_the_official_code(golden, name):
    aim, p = golden("tokens/aim_a"), PARAMS[name]
    ours = page_rank(aim[f"{name}/logits"], temperature=p["tau_imp"], steps=p["iters"], teleport=p["d"])
    np.testing.assert_allclose(ours, aim[f"{name}/importance"], rtol=0, atol=2e-5)


def test_equals_the_walk(logits):
    """Where every row is even, one step ends at even ranks; in general, at a matrix power."""
    m = np.exp(np.asarray(logits, np.float64) / 0.5)
    m /= m.sum(-1, keepdims=True)
    walk = np.full((2, 3, 12), 1 / 12)
    for _ in range(4):
        walk = 0.9 * np.einsum("bhi,bhij->bhj", walk, m) + 0.1 / 12
    np.testing.assert_allclose(
        page_rank(logits, temperature=0.5, steps=4, teleport=0.1), np.sqrt((walk**2).mean(1)), rtol=0, atol=1e-6
    )


def test_ranks_of_one_head_sum_to_one(logits):
    np.testing.assert_allclose(page_rank(logits[:, :1]).sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(page_rank(jnp.zeros((1, 4, 4))), 0.25, rtol=1e-6)


def test_what_nobody_sees_and_what_sees_nobody(logits):
    causal = jnp.where(jnp.tril(jnp.ones((2, 3, 12, 12), bool)), logits, -jnp.inf)
    unseen = page_rank(causal.at[..., 5].set(-jnp.inf), teleport=0.2)
    np.testing.assert_allclose(unseen[:, 5], 0.2 / 12, rtol=1e-6)
    padded = page_rank(causal.at[:, :, 7].set(-jnp.inf))  # a query without a key: NaN in the official code
    assert jnp.isfinite(padded).all()
    same = page_rank(causal.at[:, :, 7].set(0.0))
    np.testing.assert_allclose(padded, same, rtol=1e-6)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf, 1e38])
def test_no_value_breaks_a_plan(logits, value):
    odd = logits.at[0, 0, 3].set(value).at[1, 1, 2, 2].set(value)
    plan = page_rank_pruning(odd, 5)
    np.testing.assert_array_equal(plan.sizes, jnp.ones((2, 5)))
    assert jnp.isfinite(page_rank(odd)).all()


def test_text_stays_and_each_row_keeps_its_own_number(logits):
    """The official code protects as many tokens of every row as the first has text; here each keeps its own and k others."""
    text = np.zeros((2, 12), bool)
    text[0, :3], text[1, :6] = True, True
    plan = page_rank_pruning(logits, 4, protect=jnp.asarray(text), capacity=10)
    rank = np.asarray(page_rank(logits))
    for row in range(2):
        others = [i for i in np.argsort(-rank[row]) if not text[row, i]][:4]
        assert np.flatnonzero(plan.kept[row]).tolist() == sorted([*np.flatnonzero(text[row]), *others])
    np.testing.assert_array_equal(plan.sizes.sum(-1), [7, 10])
    np.testing.assert_array_equal(page_rank_pruning(logits, 4, protect=jnp.asarray(text), capacity=8).overflow, [0, 2])


def test_official_schedule():
    rates = DETAILS["retain_rate_default_28_layers"]
    for tokens in (100, 729, 10):
        assert linear_decay(28, tokens, start=14, step=1 / 8) == [int(tokens * rate) for rate in rates]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: page_rank(x[0, 0]), r"\(\*batch, heads, n, n\), got \(12, 12\)"),
        (lambda x: page_rank(x[..., :4]), r"got \(2, 3, 12, 4\)"),
        (lambda x: page_rank(x, temperature=0.0), "got 0.0, 5 and 0.0"),
        (lambda x: page_rank(x, steps=0), "got 0.1, 0 and 0.0"),
        (lambda x: page_rank(x, teleport=1.5), "got 0.1, 5 and 1.5"),
        (lambda x: page_rank_pruning(x, 13), "between 0 and the number of tokens, 12; got 13"),
        (lambda x: linear_decay(0, 5, start=1, step=0.1), "got 0, 5, 1 and 0.1"),
        (lambda x: linear_decay(3, 5, start=1, step=1.5), "got 3, 5, 1 and 1.5"),
    ],
)
def test_bad_input(call, message, logits, unchecked):
    with pytest.raises(ValueError, match=message):
        call(logits)
