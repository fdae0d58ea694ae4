"""Draw a plan over the image whose patches it merges: one colour and one outline per group.

picture = merged_patches(image, plan, grid=(rows, columns))    # (height, width, 3), in [0, 1]
gallery([[("before", image), ("after", picture)]], "picture.png")
"""

import colorsys
import pathlib
from collections.abc import Sequence

import numpy as np

import jaxmerge as jm


def merged_patches(
    image: np.ndarray,
    plan: jm.Plan | jm.SoftPlan,
    grid: tuple[int, int],
    *,
    zoom: int = 1,
    line: int = 1,
    fill: bool = True,
) -> np.ndarray:
    """The image with every group of merged patches in its mean colour and outlined in a colour of its own.

    A patch that merged with none keeps its pixels and gets no outline; a dropped one turns grey.

    Args:
      image: (height, width) or (height, width, 3), in [0, 1]; height and width are multiples of the grid's.
      plan: for one image, over rows * columns patches in reading order. Of a soft plan, each patch's largest weight.
      grid: rows, columns.
      zoom: screen pixels per image pixel.
      line: thickness of the outline in screen pixels.
      fill: False leaves the pixels and only outlines.

    Returns:
      (height * zoom, width * zoom, 3) in [0, 1].
    """
    rows, columns = grid
    ids = np.where(plan.kept, np.argmax(plan.matrix, axis=0), -1).reshape(rows, columns)
    image = np.asarray(image, float)
    image = np.repeat(image[..., None], 3, axis=-1) if image.ndim == 2 else image
    if image.shape[0] % rows or image.shape[1] % columns:
        raise ValueError(f"merged_patches: image {image.shape[:2]} is not a multiple of the grid {grid}; crop it first.")
    patch = image.shape[0] // rows, image.shape[1] // columns
    spread = lambda a, k: np.repeat(np.repeat(a, k[0], axis=0), k[1], axis=1)
    pixel_ids = spread(ids, patch)
    _, group, count = np.unique(ids, return_inverse=True, return_counts=True)
    group = group.reshape(ids.shape)
    merged = (count[group] > 1) & (ids >= 0)

    out = image.copy()
    if fill:
        index = spread(group, patch)
        mass = np.bincount(index.ravel())
        mean = np.stack([np.bincount(index.ravel(), image[..., c].ravel()) / mass for c in range(3)], axis=-1)
        out = np.where(spread(merged, patch)[..., None], mean[index], out)
    out[pixel_ids < 0] = 0.5

    out = spread(out, (zoom, zoom))
    edge = _edges(spread(pixel_ids, (zoom, zoom)), line)
    colours = _colours(len(count))[spread(spread(group, patch), (zoom, zoom))]
    outline = edge & spread(spread(merged, patch), (zoom, zoom))
    return np.where(outline[..., None], colours, out)


def _edges(ids: np.ndarray, line: int) -> np.ndarray:
    """Pixels within `line` of one that belongs to another group. The border of the image is an edge too."""
    padded = np.pad(ids, line, constant_values=ids.min() - 1)
    height, width = ids.shape
    edge = np.zeros(ids.shape, bool)
    for dy in range(-line, line + 1):
        for dx in range(-line, line + 1):
            edge |= padded[line + dy : line + dy + height, line + dx : line + dx + width] != ids
    return edge


def _colours(count: int) -> np.ndarray:
    """As many colours, neighbours far apart in hue: steps of the golden ratio."""
    return np.array([colorsys.hsv_to_rgb((0.1 + i * 0.618034) % 1, 0.75, 1.0) for i in range(count)])


def gallery(rows: Sequence[Sequence[tuple[str, np.ndarray]]], path: str | pathlib.Path, *, dpi: int = 150) -> None:
    """Write rows of captioned pictures to one file, without a display; about one screen pixel for each of theirs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height, width = max(p.shape[0] for r in rows for _, p in r), max(p.shape[1] for r in rows for _, p in r)
    columns = max(map(len, rows))
    figure = Figure(figsize=((width + 12) * columns / dpi, (height + 40) * len(rows) / dpi), dpi=dpi)
    FigureCanvasAgg(figure)
    for i, row in enumerate(rows):
        for j, (caption, picture) in enumerate(row):
            axis = figure.add_subplot(len(rows), columns, i * columns + j + 1)
            axis.imshow(picture, interpolation="antialiased")
            axis.set_title(caption, fontsize=8, loc="left", pad=3)
            axis.axis("off")
    figure.subplots_adjust(0.005, 0.005, 0.995, 1 - 24 / dpi / figure.get_figheight(), wspace=0.03, hspace=0.15)
    figure.savefig(path)
