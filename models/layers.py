"""Equal layers, one after another: kept in a list or stacked and scanned over, with a named choice of what to recompute."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

Remat = Literal["full", "dots", "dots_no_batch"] | None
POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Layers(nnx.Module):
    """Equal blocks, one after another: a list, or stacked and scanned over. Each maps (x, *others, cache) to (x, cache)."""

    def __init__(self, blocks: list[Any], *, scan: bool = False, remat: Remat = None):
        self.scan, self.remat, self.depth = scan, remat, len(blocks)
        if scan:
            graph, states = nnx.split(blocks[0])[0], [nnx.state(block) for block in blocks]
            self.blocks = nnx.merge(graph, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))
        else:
            self.blocks = nnx.List(blocks)

    def __call__(self, x: Float[Array, "b n d"], *others: Any) -> Float[Array, "b n d"]:
        return self.step(x, *others, cache=None)[0]

    def step(self, x: Float[Array, "b n d"], *others: Any, cache: Any) -> tuple[Float[Array, "b n d"], Any]:
        """With what earlier positions left in the cache. `others` are the same for every block."""

        def apply(graph, state, x, others, cache):
            return nnx.merge(graph, state)(x, *others, cache)

        if self.remat is not None:
            apply = jax.checkpoint(apply, policy=POLICIES[self.remat], static_argnums=(0,))
        if not self.scan:
            caches = []
            for i, block in enumerate(self.blocks):
                x, c = apply(*nnx.split(block), x, others, None if cache is None else cache[i])
                caches.append(c)
            return x, None if cache is None else caches
        graph, state = nnx.split(self.blocks)
        return jax.lax.scan(lambda x, layer: apply(graph, layer[0], x, others, layer[1]), x, (state, cache))

    def cache(self, batch: int, size: int) -> Any:
        """Room for `size` positions of every row, in every block."""
        if not self.scan:
            return [block.cache(batch, size) for block in self.blocks]
        one = self.blocks.cache(batch, size)
        return jax.tree.map(lambda leaf: jnp.zeros((self.depth, *leaf.shape), leaf.dtype), one)


def copy_layers(source: nnx.Module, target: nnx.Module) -> None:
    """Copy the parameters of a model into its twin whose layers are kept the other way, stacked or in a list.

    Published weights are loaded into the list form; this brings them to the form that trains.

    Raises:
      ValueError: the two differ in more than `scan`.
    """
    given, wanted = _by_layer(source), _by_layer(target)
    if given.keys() != wanted.keys():
        raise ValueError(f"copy_layers: only one of the two has {sorted(given.keys() ^ wanted.keys())[:5]}.")
    for path, put in wanted.items():
        put(given[path](None))


def _by_layer(model: nnx.Module) -> dict[tuple, Callable[[Array | None], Array]]:
    """Every parameter of every layer by the path that the list form has: called with a value it is set, and it is returned."""

    def access(leaf, index):
        def call(value):
            if value is not None:
                leaf[...] = value if index is None else leaf[...].at[index].set(value)
            return leaf[...] if index is None else leaf[index]

        return call

    out = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        i = next((i for i, name in enumerate(path) if name == "blocks"), None)
        if i is None or isinstance(path[i + 1], int):
            out[path] = access(leaf, None)
        else:
            out |= {(*path[: i + 1], layer, *path[i + 1 :]): access(leaf, layer) for layer in range(leaf.shape[0])}
    return out
