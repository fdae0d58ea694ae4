"""Matching on a grid: the official vectors, the rule itself, a whole block with unmerging, bad input."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.tokens import grid_matching, two_sided_matching
from tests.conftest import GOLDEN

CASES = {c["name"]: c["params"] for c in json.loads((GOLDEN / "tokens/tomesd_a.json").read_text())["cases"]}


@pytest.fixture(scope="module")
def tomesd(golden):
    return golden("tokens/tomesd_a")


def case(vectors, name):
    return {k.removeprefix(f"{name}/"): v for k, v in vectors.items() if k.startswith(f"{name}/")}


def take(x, i):
    return np.take_along_axis(np.asarray(x), i.reshape(*i.shape, *[1] * (np.ndim(x) - 2)), axis=1)


@pytest.mark.parametrize("name", ["c0", "c1", "c2", "c3"])
def test_equals_the_official_code(tomesd, name):
    a, p = case(tomesd, name), CASES[name]
    sources, receivers = np.sort(a["a_idx"]), np.sort(a["b_idx"])
    if p["no_rand"]:
        plan = grid_matching(a["metric"], p["r_effective"], grid=(p["h"], p["w"]), stride=(p["sy"], p["sx"]))
    else:  # with the receivers that it drew
        plan = jax.jit(lambda m: two_sided_matching(m, jnp.asarray(sources), jnp.asarray(receivers), p["r_effective"]))(
            a["metric"]
        )
    assert plan.num_segments == p["N_out"]
    # the official order: what stayed, by rank, in the order of its list of sources; then its list of receivers
    official = np.concatenate([a["a_idx"][a["unm_idx"]], np.broadcast_to(a["b_idx"], (2, p["num_dst"]))], axis=1)
    slots = take(plan.segment_ids, official)
    np.testing.assert_array_equal(
        take(plan.segment_ids, a["a_idx"][a["src_idx"]]), take(plan.segment_ids, a["b_idx"][a["dst_idx"]])
    )
    mean = jm.merge(plan, a["x"])
    np.testing.assert_allclose(take(mean, slots), a["merged"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(take(jm.merge(plan, a["x"], reduce="sum"), slots), a["merged_sum"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(jm.unmerge(plan, mean), a["unmerged"], rtol=0, atol=2e-5)


def test_where_the_official_code_clips_ours_names_the_largest(tomesd):
    p = CASES["c2"]
    with pytest.raises(ValueError, match=f"between 0 and {p['r_effective']}, got r={p['r']}.*16 receivers and 48 sources"):
        grid_matching(tomesd["c2/metric"], p["r"], grid=(8, 8))


@pytest.mark.parametrize("name", ["block_attn", "block_all", "block_off"])
def test_a_block_with_unmerging_equals_the_official_one(tomesd, name):
    a, p = case(tomesd, "block"), CASES[name]
    w = {k.removeprefix("w/"): v.astype(np.float32) for k, v in a.items() if k.startswith("w/")}

    def norm(x, k):
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / jnp.sqrt(var + 1e-5) * _row(w[f"norm{k}.weight"]) + _row(w[f"norm{k}.bias"])

    def attend(name, x, context):
        q, k, v = x @ w[f"{name}.q.weight"].T, context @ w[f"{name}.k.weight"].T, context @ w[f"{name}.v.weight"].T
        heads = lambda a: a.reshape(*a.shape[:2], 2, -1)
        out = jax.nn.dot_product_attention(heads(q), heads(k), heads(v)).reshape(x.shape)
        return out @ w[f"{name}.o.weight"].T + _row(w[f"{name}.o.bias"])

    def feed(x):
        x = x @ w["ff.0.weight"].T + _row(w["ff.0.bias"])
        return jax.nn.gelu(x, approximate=False) @ w["ff.2.weight"].T + _row(w["ff.2.bias"])

    @jax.jit
    def block(x, context):
        plan = grid_matching(x, p["r"], grid=(8, 8))  # of the input, before any norm

        def around(f, merged):
            return (lambda y: jm.unmerge(plan, f(jm.merge(plan, y)))) if merged else f

        x = x + around(lambda y: attend("attn1", y, y), p["merge_attn"])(norm(x, 1))
        x = x + around(lambda y: attend("attn2", y, context), p["merge_crossattn"])(norm(x, 2))
        return x + around(feed, p["merge_mlp"])(norm(x, 3))

    np.testing.assert_allclose(block(a["x"], a["context"]), tomesd[f"{name}/out"], rtol=0, atol=2e-5)


def _row(b):
    return jnp.asarray(b)[None, None]


# --- the rule, written down again


def rule(row, r, receivers):
    n = len(row)
    unit = row / np.linalg.norm(row, axis=-1, keepdims=True)
    sources = np.setdiff1d(np.arange(n), receivers)
    score = unit[sources] @ unit[receivers].T
    goes = np.arange(n)
    first = np.argsort(-score.max(-1), kind="stable")[:r]
    goes[sources[first]] = receivers[score[first].argmax(-1)]
    return np.searchsorted(np.unique(goes), goes)


@pytest.mark.parametrize("grid, stride", [((4, 6), (2, 2)), ((5, 5), (2, 2)), ((3, 8), (3, 1)), ((4, 6), (1, 4))])
def test_equals_the_rule(grid, stride):
    (h, w), (sy, sx) = grid, stride
    x = np.random.default_rng(0).standard_normal((2, h * w, 8)).astype(np.float32)
    receivers = [y * w + c for y in range(0, h - sy + 1, sy) for c in range(0, w - sx + 1, sx)]
    for r in (1, h * w - len(receivers)):
        plan = jax.jit(lambda x, r=r: grid_matching(x, r, grid=grid, stride=stride))(x)
        np.testing.assert_array_equal(plan.segment_ids, [rule(row, r, np.array(receivers)) for row in x])


def test_random_receivers_lie_one_in_each_cell_and_are_shared():
    h = w = 8
    rows = jnp.zeros((3, h * w, 4)).at[:, :, 0].set(1.0)  # all alike: every source joins the first receiver
    draw = jax.jit(lambda key: grid_matching(rows, 48, grid=(h, w), key=key).segment_ids)
    seen = set()
    for seed in range(12):
        ids = np.asarray(draw(jax.random.key(seed)))
        assert (ids == ids[:1]).all()
        receivers = [ids[0].tolist().index(s) for s in range(1, 16)]  # of the first, which all sources joined, not known
        cells = {(p // w // 2, p % w // 2) for p in receivers}
        assert len(cells) == 15
        seen |= {(p // w % 2, p % w % 2) for p in receivers}
    assert len(seen) == 4
    own = draw(jax.random.split(jax.random.key(0), 3))
    assert (own != own[:1]).any()


def test_no_merging_is_the_identity():
    x = jnp.ones((2, 12, 4))
    np.testing.assert_array_equal(grid_matching(x, 0, grid=(3, 4)).segment_ids, np.tile(np.arange(12), (2, 1)))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x: grid_matching(x, 1, grid=(3, 5)), ValueError, r"grid \(3, 5\) holds 15 tokens, metric has n=12"),
        (lambda x: grid_matching(x, 1, grid=(3, 4), stride=(4, 1)), ValueError, r"stride \(4, 1\).*fit into grid \(3, 4\)"),
        (lambda x: grid_matching(x, 1, grid=(3, 4), stride=(0, 1)), ValueError, "stride must be 2 sizes of 1 or more"),
        (lambda x: grid_matching(x, -1, grid=(3, 4)), ValueError, "between 0 and 10, got r=-1"),
        (lambda x: grid_matching(x, 1.0, grid=(3, 4)), TypeError, "Python int"),
        (lambda x: grid_matching(x[0, 0], 1, grid=(2, 2)), ValueError, r"\(\*batch, n, d\)"),
    ],
)
def test_bad_input(call, error, message, unchecked):
    with pytest.raises(error, match=message):
        call(jnp.ones((2, 12, 4)))
