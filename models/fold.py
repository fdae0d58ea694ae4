"""A stack of equal layers, written out or scanned, recomputed on the way back or not. For any model whose layers are alike.

Written out, layer i has its own parameters ("blocks.3.ffn.wi.kernel") and its own piece of the program. Scanned, there is one
set of parameters with an axis of layers ("blocks.each.ffn.wi.kernel", and `each` in a path says so to `models.load` and
`models.sharding`), and one piece of program: a deep model compiles as fast as a shallow one.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

EACH = "each"
"""The component of a parameter's path that stands for all layers at once."""


class Scanned(nnx.Module):
    """Layers whose parameters are stacked: what `nnx.List(layers)` is when they are not."""

    def __init__(self, layers: list):
        if not layers:
            raise ValueError("Scanned: there must be at least one layer to stack.")
        graphs, states = zip(*(nnx.split(layer) for layer in layers), strict=True)
        self.each = nnx.merge(graphs[0], jax.tree.map(lambda *x: jnp.stack(x), *states))
        self.depth = len(layers)

    def __len__(self) -> int:
        return self.depth


def stack(layers: list, *, scan: bool) -> Any:
    """The layers as a list or, if `scan`, as one with stacked parameters: the same numbers in either form."""
    return Scanned(layers) if scan else nnx.List(layers)


def fold(
    layers: Any,
    f: Callable[[Any, Any, Any], tuple[Any, Any]],
    x: Any,
    xs: Any = None,
    *,
    start: int = 0,
    stop: int | None = None,
    remat: str | None = None,
) -> tuple[Any, list]:
    """x, y_i = f(layer_i, x, xs_i) from layer `start` to before layer `stop`.

    Args:
      layers: from `stack`.
      f: one layer's part; pure, as `jax.lax.scan` wants it.
      x: what goes through all layers.
      xs: a pytree with a leading axis of layers (all of them), or None.
      start, stop: which layers.
      remat: what the backward pass finds in memory, see `checkpointed`.

    Returns:
      the last x, and the list of what each layer gave beside.

    Law:
      the result does not depend on the form of the layers, nor on `remat`.
    """
    stop = len(layers) if stop is None else stop
    part = lambda tree, at: jax.tree.map(lambda a: a[at], tree)
    if isinstance(layers, Scanned):
        graph, params = nnx.split(layers.each)
        inputs = (params, xs) if (start, stop) == (0, len(layers)) else part((params, xs), slice(start, stop))
        body = lambda x, inputs: f(nnx.merge(graph, inputs[0]), x, inputs[1])
        x, ys = jax.lax.scan(checkpointed(body, remat, scan=True), x, inputs, length=stop - start)
        return x, [part(ys, i) for i in range(stop - start)]
    ys = []
    for i in range(start, stop):
        graph, params = nnx.split(layers[i])
        body = lambda params, x, given, graph=graph: f(nnx.merge(graph, params), x, given)
        x, y = checkpointed(body, remat)(params, x, part(xs, i))
        ys.append(y)
    return x, ys


def checkpointed(f: Callable, remat: str | None, *, scan: bool = False) -> Callable:
    """f, with what its backward pass needs kept (None or "none"), all computed again ("full"), or kept by a policy.

    "dots" keeps the results of products with parameters (`dots_with_no_batch_dims_saveable`); any other name is one of
    `jax.checkpoint_policies`.
    """
    if remat in (None, "none"):
        return f
    names = {"full": "nothing_saveable", "dots": "dots_with_no_batch_dims_saveable"}
    policy = getattr(jax.checkpoint_policies, names.get(remat, remat), None)
    if policy is None:
        known = sorted(n for n in dir(jax.checkpoint_policies) if not n.startswith("_"))
        raise ValueError(f'checkpointed: remat must be "none", "full", "dots" or one of {known}; got {remat!r}.')
    return jax.checkpoint(f, policy=policy, prevent_cse=not scan)


def is_stacked(path: str) -> bool:
    """Whether a parameter's first axis counts layers."""
    return EACH in path.split(".")


def layer_paths(path: str, depth: int) -> list[str]:
    """The paths of the single layers that a stacked parameter holds; the path itself, alone, if it is not stacked.

    Example:
      >>> from models.fold import layer_paths
      >>> layer_paths("blocks.each.norm.scale", 2), layer_paths("norm.scale", 16)
      (['blocks.0.norm.scale', 'blocks.1.norm.scale'], ['norm.scale'])
    """
    parts = path.split(".")
    if EACH not in parts:
        return [path]
    at = parts.index(EACH)
    return [".".join([*parts[:at], str(i), *parts[at + 1 :]]) for i in range(depth)]
