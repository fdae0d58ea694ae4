"""Matching across clips: the official vectors, one clip, order, bad input."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.tokens import bipartite_matching, clip_matching
from tests.conftest import GOLDEN

CASES = {c["name"]: c["params"] for c in json.loads((GOLDEN / "tokens/tempme_a.json").read_text())["cases"]}


@pytest.fixture(scope="module")
def tempme(golden):
    return golden("tokens/tempme_a")


@pytest.mark.parametrize("name", list(CASES))
def test_equals_the_official_code(tempme, name):
    a = {k.split("/")[1]: v for k, v in tempme.items() if k.startswith(f"{name}/")}
    c, r = CASES[name]["cls_num"], CASES[name]["r"]
    n = a["x"].shape[1]
    # the recorded input is joined already: [all classes][all others], a clip of its own
    plan = jax.jit(lambda m: clip_matching(m[:, None], r, classes=c))(a["metric"])
    first = c % 2  # the official sides are counted behind the classes: sources at odd places where the classes are odd
    source, receiver = c + first, c + 1 - first
    official = np.concatenate(
        [np.tile(np.arange(c), (2, 1)), source + 2 * a["unm_idx"], np.tile(np.arange(receiver, n, 2), (2, 1))], axis=1
    )
    ids = np.asarray(plan.segment_ids)
    goes = lambda at: np.take_along_axis(ids, at, 1)
    np.testing.assert_array_equal(goes(source + 2 * a["src_idx"]), goes(receiver + 2 * a["dst_idx"]))
    slots = goes(official)
    out = np.take_along_axis(np.asarray(jm.merge(plan, a["x"])), slots[..., None], 1)
    np.testing.assert_allclose(out, a["out"], rtol=0, atol=2e-5)
    np.testing.assert_array_equal(np.take_along_axis(np.asarray(plan.sizes), slots, 1), a["size"][..., 0])


def test_joining_is_the_official_layout_then_matching():
    clips, n, c, r, d = 2, 9, 1, 5, 8
    x = np.random.default_rng(0).standard_normal((3, clips, n, d)).astype(np.float32)
    joined = np.concatenate([x[:, :, :c].reshape(3, -1, d), x[:, :, c:].reshape(3, -1, d)], axis=1)
    flat = x.reshape(3, -1, d)

    @jax.jit
    def both(x, joined, flat):
        ours, theirs = clip_matching(x, r, classes=c), bipartite_matching(joined, r, protect=range(clips * c))
        merged = jm.merge(ours, flat)
        return merged, jm.merge(theirs, joined), jm.unmerge(ours, merged), jm.unmerge(theirs, merged)

    ours, theirs, back, joined_back = map(np.asarray, both(x, joined, flat))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(ours[:, : clips * c], x[:, :, 0])  # the classes, in the order of clips
    back = back.reshape(x.shape)  # unmerging finds the clips again
    np.testing.assert_array_equal(
        np.concatenate([back[:, :, :c].reshape(3, -1, d), back[:, :, c:].reshape(3, -1, d)], 1), joined_back
    )


def test_progressive_merging_composes():
    """Four frames become two clips, then one: the composed plan leads from the first tokens to the last."""
    x = np.random.default_rng(1).standard_normal((4, 8, 8)).astype(np.float32)
    match = jax.jit(clip_matching, static_argnums=1, static_argnames="classes")
    first = match(x.reshape(2, 2, 8, 8), 4)
    y = jm.merge(first, x.reshape(2, 16, 8))  # two clips of 12 tokens, 2 of them classes
    second = match(y, 6, classes=2)
    z = jm.merge(second, y.reshape(24, 8), weight=first.sizes.reshape(24))
    whole = jm.compose(second, jm.Plan(first.segment_ids.at[1].add(12).reshape(32), 24))
    np.testing.assert_allclose(z, jm.merge(whole, x.reshape(32, 8)), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(z[:4], x[:, 0])
    np.testing.assert_array_equal(whole.sizes[:4], 1)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x: clip_matching(x, 8), ValueError, "between 0 and 7, got r=8: 2 clips of 8 tokens, 1 of them classes"),
        (lambda x: clip_matching(x, 1, classes=9), ValueError, "between 0 and the tokens of a clip, 8; got 9"),
        (lambda x: clip_matching(x[0], 1), ValueError, r"\(\*batch, clips, n, d\), got \(8, 4\)"),
        (lambda x: clip_matching(x, 1.0), TypeError, "Python int"),
    ],
)
def test_bad_input(call, error, message, unchecked):
    with pytest.raises(error, match=message):
        call(jnp.ones((2, 8, 4)))
