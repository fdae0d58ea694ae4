"""What there is to merge, as a picture."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmerge.params._names import layer_of
from jaxmerge.params._transform import Stacked, named_leaves
from jaxmerge.params.analysis._analysis import Label, cosines, sign_conflict, task_norms

LAYER = r"(?:^|/|\.)(?:layers?|blocks?|h)[/._](\d+)(?:/|\.|$)"


def draw_tasks(stacked: Stacked, names: Sequence[str] | None = None, label: Label | None = None) -> Any:
    """Draw how alike the task vectors are, where their signs disagree, and where each model changed most.

    Three panels: the cosines between the models, with their numbers; the share of mass against the elected sign, by layer;
    the length of the task vectors by layer, one line per model.

    Args:
      stacked: task vectors, leaves (K, *shape).
      names: of the K models; None numbers them.
      label: leaf name -> group along the axes. None is the number of the layer (after "layers", "blocks" or "h"), and "rest"
        for what is in none. Numbers come first, in order, and then other labels in the order of the leaves.

    Returns:
      A `matplotlib.figure.Figure`, bound to no display: `figure.savefig("tasks.png")`.

    Raises:
      ImportError: matplotlib is missing. ValueError: not one name per model; no leaves.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> stacked = {"layers": [{"w": jnp.array([[1.0, 0.0], [1.0, 1.0]])}] * 2, "head": jnp.ones((2, 3))}
      >>> figure = jm.params.draw_tasks(stacked, ["math", "code"])
      >>> [axis.get_title() for axis in figure.axes[:3]]
      ['cosines of the task vectors', 'mass against the elected sign', 'length of the task vectors']
      >>> [tick.get_text() for tick in figure.axes[1].get_xticklabels()]
      ['0', '1', 'rest']

    Source: Editing models with task arithmetic (arXiv:2212.04089), figure 5; TIES-Merging (arXiv:2306.01708), figure 3.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('draw_tasks needs matplotlib: pip install "jaxmerge[viz]".') from error
    leaves = named_leaves(stacked)[0]
    if not leaves:
        raise ValueError("draw_tasks: there are no task vectors to draw; got a tree without leaves.")
    models = next(iter(leaves.values())).shape[0]
    names = [str(k) for k in range(models)] if names is None else list(names)
    if len(names) != models:
        raise ValueError(f"draw_tasks: pass one name for each of the {models} models; got {len(names)}: {names}.")
    of = layer_of(LAYER) if label is None else label

    def group(name):
        found = of(name)
        return "rest" if found is None else found

    conflict, norms = sign_conflict(stacked, group), task_norms(stacked, group)
    order = sorted(g for g in conflict if isinstance(g, int)) + [g for g in conflict if not isinstance(g, int)]
    side, width = 2 + 0.45 * models, max(3.0, 0.3 * len(order))
    figure = Figure(figsize=(side + 2 * width, side), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3, width_ratios=[side, width, width])
    _matrix(left, np.asarray(cosines(stacked)), names)
    middle.bar(range(len(order)), [100 * float(conflict[g]) for g in order], color="0.5")
    middle.set(title="mass against the elected sign", ylabel="%", ylim=(0, 50))
    lengths = np.array([np.asarray(norms[g]) for g in order])
    for k, name in enumerate(names):
        right.plot(range(len(order)), lengths[:, k], marker=".", linewidth=1, label=name, color=f"C{k % 10}")
    right.set(title="length of the task vectors", ylim=(0, None))
    right.legend(fontsize=6)
    for axis in (middle, right):
        long = any(len(str(g)) > 4 for g in order)
        axis.set_xticks(range(len(order)), [str(g) for g in order], rotation=90 if long else 0, fontsize=8)
        axis.set_xlabel("layer" if label is None else "")
        axis.grid(axis="y", alpha=0.3)
    return figure


def _matrix(axis: Any, values: np.ndarray, names: list[str]) -> None:
    """Numbers in coloured squares, white on dark."""
    axis.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1)
    for (i, j), v in np.ndenumerate(values):
        axis.text(j, i, f"{v:.2f}", ha="center", va="center", fontsize=7, color="white" if abs(v) > 0.6 else "black")
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_title("cosines of the task vectors")
