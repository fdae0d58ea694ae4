"""Comparing reductions: the images, the table at equal budgets, the pictures, bad flags."""

import json

import numpy as np
import pytest

from scripts import compare_reductions, images


def test_digits_over_photographs():
    data = images.photo_digits(0, count=32, held_out=16)
    assert data.train.shape == (32, 28, 28, 3) and data.held_out.shape == (16, 28, 28, 3)
    assert data.train.dtype == np.float32 and data.train.min() >= -1 and data.train.max() <= 1
    np.testing.assert_array_equal(data.train, images.photo_digits(0, count=32, held_out=16).train)
    assert not np.array_equal(data.train, images.photo_digits(1, count=32, held_out=16).train)


@pytest.fixture
def own(tmp_path):
    """Images of one's own: bright above or bright below."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 48)
    pictures = rng.integers(0, 100, (48, 16, 16, 3)).astype(np.uint8)
    for picture, label in zip(pictures, labels, strict=True):
        picture[8 * label : 8 * label + 8] += 100
    names = dict(zip(images.REQUIRED, (pictures[:32], labels[:32], pictures[32:], labels[32:]), strict=True))
    np.savez(tmp_path / "own.npz", **names)
    return tmp_path / "own.npz"


def test_the_whole_comparison(own, tmp_path):
    compare_reductions.main(
        out=tmp_path, data=own, patch=4, width=16, depth=2, heads=2, steps=2, batch=8, rs=(2, 4), rounds=1, held_out=16,
        only=("ToMe", "class attention (EViT)"),
    )  # fmt: skip
    rows = json.loads((tmp_path / "reductions.json").read_text())["rows"]
    assert [(row["name"], row["tokens"]) for row in rows] == [
        ("all tokens", 17), ("ToMe", 15), ("ToMe", 13), ("class attention (EViT)", 15), ("class attention (EViT)", 13),
    ]  # fmt: skip
    assert all(0 <= row["accuracy"] <= 1 and row["images_per_second"] > 0 for row in rows)
    assert rows[0]["mflops"] > rows[1]["mflops"] > rows[2]["mflops"]
    assert (tmp_path / "accuracy.png").stat().st_size > 1000 and (tmp_path / "pictures.png").stat().st_size > 1000


def test_bad_flags(own, tmp_path):
    run = lambda **flags: compare_reductions.main(out=tmp_path, data=own, patch=4, **flags)
    with pytest.raises(ValueError, match="--only ToMee: not among ToMe, "):
        run(only=("ToMee",))
    with pytest.raises(ValueError, match="--rs 5: 3 blocks would remove 15 of 16 patches"):
        run(rs=(5,))
    np.savez(tmp_path / "poor.npz", train_images=np.zeros((1, 2, 2, 3)))
    with pytest.raises(ValueError, match=r"poor.npz lacks train_labels, test_images, test_labels; it holds train_images"):
        compare_reductions.main(out=tmp_path, data=tmp_path / "poor.npz")
    np.savez(tmp_path / "flat.npz", **dict.fromkeys(images.REQUIRED, np.zeros((1, 4))))
    with pytest.raises(ValueError, match=r"train_images must have shape \(count, size, size, channels\), got \(1, 4\)"):
        images.from_file(tmp_path / "flat.npz")
