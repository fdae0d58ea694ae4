"""DyVTE's exit of all visual tokens: first layer that says so, masks and plans, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.tokens import exit_layer, exit_plan, keep, visible_layers


@pytest.fixture(scope="module")
def visual():
    return jnp.zeros((3, 10), bool).at[:, 2:7].set(True)


def test_the_first_layer_that_says_exit():
    logits = np.random.default_rng(0).standard_normal((50, 4, 2)).astype(np.float32)
    logits[0] = [[1, 0]] * 4
    logits[1, :, 1] = logits[1, :, 0]  # equal: stay
    logits[2, :2, 1] = np.nan
    want = [next((i for i, (stay, leave) in enumerate(row) if stay < leave), 4) for row in logits]
    np.testing.assert_array_equal(exit_layer(jnp.asarray(logits)), want)
    assert want[0] == want[1] == 4 and set(want) == {0, 1, 2, 3, 4}


def test_masks_and_plans_say_the_same(visual):
    leaves_after = jnp.array([0, 2, 4])
    seen = visible_layers(leaves_after, visual, 4)
    for layer in range(4):
        plan = exit_plan(leaves_after < layer, visual, 10)
        np.testing.assert_array_equal(seen[:, layer], plan.kept)
    assert np.asarray(seen.sum(-1)).tolist() == [[10, 5, 5, 5], [10, 10, 10, 5], [10] * 4]


def test_all_leave_or_none(visual):
    everyone = jnp.ones(3, bool)
    np.testing.assert_array_equal(exit_plan(everyone, visual, 5).segment_ids, keep(~visual, 5).segment_ids)
    np.testing.assert_array_equal(exit_plan(~everyone, visual, 10).segment_ids, jm.identity(10, (3,)).segment_ids)
    np.testing.assert_array_equal(exit_plan(~everyone, visual, 5).overflow, 5)


def test_attention_under_the_mask_is_attention_over_the_short_sequence(visual):
    """A row that left sees the same through the mask as it would see alone, with its visual tokens gone."""
    x = jax.random.normal(jax.random.key(0), (3, 10, 1, 4))
    seen = visible_layers(jnp.zeros(3, jnp.int32), visual, 2)[:, 1]
    long = jm.attention.proportional_attention(x, x, x, jm.attention.key_bias(mask=seen))
    plan = exit_plan(jnp.ones(3, bool), visual, 5)
    short = jm.merge(plan, x, reduce="first")
    want = jm.attention.proportional_attention(short, short, short, None)
    np.testing.assert_allclose(jm.merge(plan, long, reduce="first"), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda v: exit_layer(jnp.ones((3, 4))), r"\(\*batch, layers, 2\), got \(3, 4\)"),
        (lambda v: visible_layers(jnp.zeros(2, int), v, 3), r"got \(2,\), \(3, 10\) and 3"),
        (lambda v: visible_layers(jnp.zeros(3, int), v, 0), "depth of 1 or more.* and 0"),
        (lambda v: exit_plan(jnp.ones(2, bool), v, 3), r"got \(2,\) and \(3, 10\)"),
    ],
)
def test_bad_input(call, message, visual, unchecked):
    with pytest.raises(ValueError, match=message):
        call(visual)
