"""Pooling: M3's official vectors, PyTorch's windows, laws of nesting, layouts, bad input."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxmerge as jm
from jaxmerge.tokens import depth_to_space, grid_pool, matryoshka_pool, sequence_pool, space_to_depth, temporal_pairs
from tests.hlo import collectives


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (4, 16, 8))


shared = jax.vmap(jm.merge, in_axes=(None, 0))  # one constant plan for every row


@pytest.mark.parametrize("tokens", [576, 144, 36, 9, 1])
def test_equals_the_official_m3(golden, tokens):
    m3 = golden("tokens/m3_a")
    x = m3["s576/x"]
    plan = matryoshka_pool((24, 24), tokens, like=x)
    assert plan.num_segments == tokens and plan.segment_ids.shape == (2, 576)
    np.testing.assert_allclose(jm.merge(plan, x), m3[f"s{tokens}/out"], rtol=0, atol=2e-5)
    np.testing.assert_array_equal(jm.merge(plan, x), shared(matryoshka_pool((24, 24), tokens), x))


def test_pooled_grids_nest():
    fine, coarse = matryoshka_pool((24, 24), 144), grid_pool((12, 12), (3, 3))
    np.testing.assert_array_equal(jm.compose(coarse, fine).segment_ids, matryoshka_pool((24, 24), 9).segment_ids)


def windows(x, grid, out):
    """PyTorch's adaptive average pooling over the leading axes of one grid of tokens, written down again."""
    x = np.asarray(x, np.float64).reshape(*grid, -1)
    result = np.zeros((*out, x.shape[-1]))
    for place in np.ndindex(*out):
        cut = [slice(i * n // m, math.ceil((i + 1) * n / m)) for i, n, m in zip(place, grid, out, strict=True)]
        result[place] = x[tuple(cut)].reshape(-1, x.shape[-1]).mean(0)
    return result.reshape(-1, x.shape[-1])


@pytest.mark.parametrize(
    "grid, out",
    [((16,), (5,)), ((4, 4), (3, 2)), ((4, 4), (2, 2)), ((4, 4), (4, 3)), ((2, 2, 4), (1, 2, 3)), ((2, 8), (1, 1))],
)
def test_equals_pytorchs_windows(x, grid, out):
    plan = grid_pool(grid, out, like=x)
    assert isinstance(plan, jm.Plan) == all(n % m == 0 for n, m in zip(grid, out, strict=True))
    np.testing.assert_allclose(jm.merge(plan, x), [windows(row, grid, out) for row in x], rtol=0, atol=1e-6)


def test_sixty_four_tokens_of_tokenflex():
    plan = grid_pool((32, 32), (12, 12))  # 144 of 1024: windows overlap, as its middle size does
    y = np.random.default_rng(0).standard_normal((1024, 3)).astype(np.float32)
    np.testing.assert_allclose(jm.merge(plan, y), windows(y, (32, 32), (12, 12)), rtol=0, atol=1e-6)


def split(n, rate):
    """ARC-Encoder's rule: a positive rate is a number of runs, a negative one the length of a run."""
    runs = min(n, rate) if rate > 0 else math.ceil(n / -rate)
    return [n // runs + (i < n % runs) for i in range(runs)]


@pytest.mark.parametrize("rate", [1, 5, 16, -2, -3, -7, -20])
def test_runs_of_a_sequence(rate):
    m = min(16, rate) if rate > 0 else -(-16 // -rate)
    plan = sequence_pool(16, m)
    assert plan.sizes.tolist() == split(16, rate)
    assert (np.diff(plan.segment_ids) >= 0).all()


@pytest.mark.parametrize("frames", [4, 5])
def test_pairs_of_frames(frames):
    video = np.random.default_rng(frames).standard_normal((frames, 3, 2)).astype(np.float32)
    merged = [video[t : t + 2].mean(0) for t in range(0, frames, 2)]
    keep, drop = temporal_pairs(frames, 3), temporal_pairs(frames, 3, last="drop")
    flat = video.reshape(frames * 3, 2)
    np.testing.assert_allclose(jm.merge(keep, flat), np.concatenate(merged), atol=1e-6)
    np.testing.assert_allclose(jm.merge(drop, flat), np.concatenate(merged[: frames // 2]), atol=1e-6)
    assert drop.overflow == 0
    np.testing.assert_array_equal(drop.kept, np.repeat(np.arange(frames) < frames // 2 * 2, 3))


def test_windows_side_by_side(x):
    y = space_to_depth(x, (4, 4), 2)
    np.testing.assert_array_equal(y[:, 1, 8:16], x[:, 3])  # second window, its second token: row 0, column 3
    np.testing.assert_array_equal(depth_to_space(y, (4, 4), 2), x)
    np.testing.assert_array_equal(space_to_depth(x, (4, 4), 1), x)
    mean = y.reshape(4, 4, 4, 8).mean(axis=2)
    np.testing.assert_allclose(jm.merge(grid_pool((4, 4), (2, 2), like=x), x), mean, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(jax.vmap(lambda x: space_to_depth(x, (4, 4), 2))(x), y)
    grad = jax.grad(lambda x: (space_to_depth(x, (4, 4), 2) ** 2).sum())(x)
    np.testing.assert_allclose(grad, 2 * x, rtol=1e-6)


@pytest.mark.parametrize("out", [(2, 2), (3, 2)])
def test_a_constant_takes_the_layout_of_the_tokens(mesh, x, out):
    def step(x):
        plan = grid_pool((4, 4), out, like=x)
        y = jm.merge(plan, x)
        return y, jm.unmerge(plan, y)

    layout = NamedSharding(mesh, P("data", None, "model"))
    with jax.set_mesh(mesh):
        args = jax.device_put(x, layout)
        pooled, back = (compiled := jax.jit(step).lower(args).compile())(args)
        rows = jax.device_put(x, NamedSharding(mesh, P("data")))  # features whole, as space_to_depth wants them
        shuffle = jax.jit(lambda x: space_to_depth(x, (4, 4), 2)).lower(rows).compile()
    assert collectives(compiled) == collectives(shuffle) == []
    assert pooled.sharding.is_equivalent_to(layout, 3) and back.sharding.is_equivalent_to(layout, 3)
    np.testing.assert_allclose(pooled, step(x)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: grid_pool((4, 4), (2,)), ValueError, r"as long as grid.*\(4, 4\) to \(2,\)"),
        (lambda: grid_pool((4, 4), (2, 5)), ValueError, r"no size larger.*\(4, 4\) to \(2, 5\)"),
        (lambda: grid_pool((4, 0), (2, 2)), ValueError, r"grid must be sizes of 1 or more, got \(4, 0\)"),
        (lambda: grid_pool((), ()), ValueError, r"grid must be sizes of 1 or more, got \(\)"),
        (lambda: grid_pool((4, 2.0), (2, 2)), TypeError, r"Python ints, because shapes are static; got \(4, 2.0\)"),
        (lambda: grid_pool((4, 4), (2, 2), like=jnp.ones((3, 8, 2))), ValueError, r"\(\*batch, 16, d\); got \(3, 8, 2\)"),
        (lambda: matryoshka_pool((24, 24), 100), ValueError, r"24 x 24 into 100 tokens; possible are \[1, 4, 9, 16"),
        (lambda: matryoshka_pool((24, 24), 1000), ValueError, "grid_pool takes any other size"),
        (lambda: matryoshka_pool((24,), 1), ValueError, "grid must be 2 sizes of 1 or more, got 24"),
        (lambda: matryoshka_pool((24, 24), 0), ValueError, "tokens must be sizes of 1 or more, got 0"),
        (lambda: sequence_pool(4, 5), ValueError, "between 1 and n=4, got 5"),
        (lambda: sequence_pool(4, 0), ValueError, "m must be sizes of 1 or more, got 0"),
        (lambda: temporal_pairs(4, last="repeat"), ValueError, '"keep" or "drop", got \'repeat\''),
        (lambda: temporal_pairs(1, last="drop"), ValueError, "nothing would be left"),
        (lambda: space_to_depth(jnp.ones((16, 2)), (4, 4), 3), ValueError, "must divide the grid; got window 3 and grid 4 x 4"),
        (lambda: space_to_depth(jnp.ones((15, 2)), (4, 4), 2), ValueError, r"4 x 4 = 16 tokens.*got \(15, 2\)"),
        (lambda: depth_to_space(jnp.ones((4, 6)), (4, 4), 2), ValueError, r"\(\*batch, 4, a multiple of 4\), got \(4, 6\)"),
        (lambda: depth_to_space(jnp.ones((4, 8)), (4, 4), 0), ValueError, "window 0"),
    ],
)
def test_bad_input(call, error, message, unchecked):
    with pytest.raises(error, match=message):
        call()
