"""Images to train small Vision Transformers on, from what scikit-learn bundles, or from a file of your own.

digits()        1,797 handwritten digits, enlarged to 32 x 32
photo_digits()  the same digits at random sizes and places over crops of two photographs, 28 x 28 x 3
from_file(p)    your own: train_images, train_labels, test_images, test_labels in one .npz

Nothing that is held out was trained on: digits are split once, and held-out crops come from other parts of the photographs.
"""

import dataclasses
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits, load_sample_image

HELD_OUT = 448
REQUIRED = ("train_images", "train_labels", "test_images", "test_labels")


@dataclasses.dataclass(frozen=True)
class Images:
    """Float32 images (count, height, width, channels) in [-1, 1] and integer labels, to train on and held out."""

    train: np.ndarray
    train_labels: np.ndarray
    held_out: np.ndarray
    held_out_labels: np.ndarray
    classes: tuple[str, ...]


def digits(seed: int) -> Images:
    """8 x 8 digits enlarged to 32 x 32, one channel."""
    pixels, labels = (np.asarray(a) for a in load_digits(return_X_y=True))
    images = jax.image.resize(pixels.reshape(-1, 8, 8, 1) / 8 - 1, (len(pixels), 32, 32, 1), "bicubic")
    order = np.random.default_rng((seed, 1)).permutation(len(pixels))
    images, labels = np.asarray(images, np.float32)[order], labels[order]
    return Images(images[HELD_OUT:], labels[HELD_OUT:], images[:HELD_OUT], labels[:HELD_OUT], tuple("0123456789"))


def photo_digits(seed: int, count: int = 16_384, held_out: int = 1024, size: int = 28) -> Images:
    """Digits of 18 to 26 pixels, anywhere on a darkened crop of a photograph, in a random light colour."""
    pixels, labels = (np.asarray(a) for a in load_digits(return_X_y=True))
    rng = np.random.default_rng((seed, 2))
    order = rng.permutation(len(pixels))
    photos = [load_sample_image(name)[::2, ::2] / 255 for name in ("china.jpg", "flower.jpg")]
    width = photos[0].shape[1] * 3 // 4  # the right quarter is for held-out crops

    def compose(which: np.ndarray, photos: list[np.ndarray], count: int) -> tuple[np.ndarray, np.ndarray]:
        some = rng.choice(which, count)
        scale = rng.uniform(18, 26, count) / 8
        corner = rng.uniform(0, 1, (count, 2)) * (size - 8 * scale[:, None])
        ink = np.asarray(_place(jnp.asarray(pixels[some].reshape(-1, 8, 8) / 16), scale, corner, size))[..., None]
        ground = np.stack([_crop(photos[i % len(photos)], size, rng) for i in range(count)])
        colour = rng.uniform(0.6, 1.0, (count, 1, 1, 3))
        return (2 * (ground * 0.4 * (1 - ink) + colour * ink) - 1).astype(np.float32), labels[some]

    train = compose(order[HELD_OUT:], [p[:, :width] for p in photos], count)
    test = compose(order[:HELD_OUT], [p[:, width:] for p in photos], held_out)
    return Images(*train, *test, tuple("0123456789"))


def from_file(path: pathlib.Path) -> Images:
    """Images of your own: (count, height, width, channels) of uint8, or of floats in [0, 1]."""
    with np.load(path, allow_pickle=False) as z:
        if missing := [name for name in REQUIRED if name not in z.files]:
            raise ValueError(f"{path} lacks {', '.join(missing)}; it holds {', '.join(z.files)}. Save it with np.savez.")
        parts = {name: z[name] for name in REQUIRED}
        classes = tuple(map(str, z["classes"])) if "classes" in z.files else ()
    for name in ("train_images", "test_images"):
        images = parts[name]
        if images.ndim != 4 or images.shape[1] != images.shape[2]:
            raise ValueError(f"{path}: {name} must have shape (count, size, size, channels), got {images.shape}.")
        images = images / np.float32(255) if images.dtype == np.uint8 else images
        parts[name] = (2 * images - 1).astype(np.float32)
    train, train_labels, held_out, held_out_labels = (parts[name] for name in REQUIRED)
    return Images(train, train_labels, held_out, held_out_labels, classes or tuple(map(str, np.unique(train_labels))))


@partial(jax.jit, static_argnums=3)
def _place(ink, scale, corner, size):
    """Each 8 x 8 picture enlarged and moved, bilinear, on a sheet of zeros."""
    one = lambda p, s, c: jax.image.scale_and_translate(
        p, (size, size), (0, 1), jnp.stack([s, s]), c, "linear", antialias=False
    )
    return jnp.clip(jax.vmap(one)(ink, scale.astype(jnp.float32), corner.astype(jnp.float32)), 0, 1)


def _crop(photo: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    y, x = (rng.integers(0, side - size + 1) for side in photo.shape[:2])
    crop = photo[y : y + size, x : x + size]
    return crop[:, ::-1] if rng.integers(2) else crop
