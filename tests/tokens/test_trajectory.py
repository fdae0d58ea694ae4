"""Matching along trajectories: the rule written down again, moving pictures, thresholds, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.tokens import trajectory_matching

H, W, FRAMES, D = 3, 4, 4, 8
N = H * W * FRAMES


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).standard_normal((2, N, D)).astype(np.float32)


def rule(video, window, threshold=None):
    """Follow each token to the first frame, one frame at a time."""
    unit = video / np.linalg.norm(video, axis=-1, keepdims=True)
    goes = np.arange(N)
    for i in range(H * W, N):
        t, y, x = i // (H * W), i // W % H, i % W
        near = [
            (t - 1) * H * W + v * W + u
            for v in range(max(y - window, 0), min(y + window + 1, H))
            for u in range(max(x - window, 0), min(x + window + 1, W))
        ]
        score = unit[near] @ unit[i]
        if threshold is None or score.max() > threshold:
            goes[i] = goes[near[score.argmax()]]
    return np.searchsorted(np.unique(goes), goes)


@pytest.mark.parametrize("window, threshold", [(0, None), (1, None), (2, 0.5), (10**6, None)])
def test_equals_the_rule(x, window, threshold):
    capacity = None if threshold is None else N
    match = jax.jit(lambda x: trajectory_matching(x, grid=(H, W), window=window, threshold=threshold, capacity=capacity))
    np.testing.assert_array_equal(match(x).segment_ids, [rule(video, window, threshold) for video in x])


def test_a_moving_picture_is_followed():
    """A torus of distinct tokens that moves one step to the right per frame: what leaves at one side is not what enters."""
    wide = np.random.default_rng(1).standard_normal((H, W + FRAMES, D)).astype(np.float32)
    video = np.stack([wide[:, FRAMES - t : FRAMES - t + W] for t in range(FRAMES)]).reshape(N, D)
    plan = trajectory_matching(video, grid=(H, W), window=1, threshold=0.999, capacity=H * (W + FRAMES - 1))
    assert plan.overflow == 0 and (np.asarray(plan.sizes) > 0).all()
    np.testing.assert_allclose(jm.unmerge(plan, jm.merge(plan, video)), video, rtol=0, atol=1e-6)
    short = trajectory_matching(video, grid=(H, W), window=1, threshold=0.999, capacity=H * W)
    assert short.overflow == sum(H * (FRAMES - t) for t in range(1, FRAMES))  # what entered, as long as it is seen


def test_a_still_picture_is_one_frame(x):
    still = np.tile(x[0, : H * W], (FRAMES, 1))
    plan = trajectory_matching(still, grid=(H, W), window=2)
    np.testing.assert_array_equal(plan.segment_ids, np.tile(np.arange(H * W), FRAMES))


def test_one_frame_is_the_identity(x):
    plan = trajectory_matching(x[:, : H * W], grid=(H, W), window=1)
    np.testing.assert_array_equal(plan.segment_ids, np.tile(np.arange(H * W), (2, 1)))


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda x: trajectory_matching(x, grid=(5, 4), window=1),
            r"n=48 tokens are no whole number of frames of grid \(5, 4\)",
        ),
        (lambda x: trajectory_matching(x, grid=(H, W), window=-1), "window must be 0 or more, got -1"),
        (lambda x: trajectory_matching(x, grid=(H, W), window=1, threshold=0.5), "come together.*capacity=None"),
        (lambda x: trajectory_matching(x, grid=(H, W), window=1, capacity=20), "come together.*threshold=None"),
        (lambda x: trajectory_matching(x[0, 0], grid=(H, W), window=1), r"\(\*batch, n, d\)"),
    ],
)
def test_bad_input(call, message, unchecked):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((2, N, D)))
