"""Merge only the units that match: a network between one model's width and both models'; its layers solved for."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from jaxmerge.params._transform import named_leaves
from jaxmerge.params.units._permute import Spec, permute, spec_sizes


def merge_units(
    spec: Spec,
    permutations: Mapping[str, Int[np.ndarray, "n"] | Int[Array, "n"]],
    a: PyTree,
    b: PyTree,
    *,
    share: float | Mapping[str, float],
    axis: int = -1,
) -> PyTree:
    """Merge only the units that match best, and keep the others of both models side by side: a network up to twice as wide.

    A merged unit is the mean of two; it feeds whatever either of them fed. A unit kept apart hears its own model alone. Where
    nothing is permuted (the network's outputs) the two models are averaged.

    Args:
      spec, permutations: see `match_weights`; unit i of a matches unit permutations[p][i] of b.
      a, b: two models of one structure.
      share: of the units of each permutation, how many are merged; or {permutation: share}. The best matches by the scalar
        product of the weights that feed and leave the units are merged; of equal ones the first.
      axis: of a kernel's axes the one of its outputs: -1 for Flax, 0 for PyTorch. A leaf of one axis has outputs only.

    Returns:
      A model in which a permutation of n units, m of them merged, has 2 n - m: the merged, then a's, then b's.

    Law:
      share = 1 is the mean of a and the permuted b; share = 0 computes the mean of what a and b compute (if activations are
      taken entry by entry).

    Raises:
      ValueError: a share outside [0, 1]; a specification that does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> spec = {"in": (None, "p"), "out": ("p", None)}
      >>> a = {"in": jnp.array([[1.0, 2.0]]), "out": jnp.array([[3.0], [4.0]])}
      >>> b = {"in": jnp.array([[1.0, -2.0]]), "out": jnp.array([[3.0], [-4.0]])}
      >>> merged = jm.params.merge_units(spec, {"p": jnp.arange(2)}, a, b, share=0.5)
      >>> merged["in"].tolist(), merged["out"].tolist()
      ([[1.0, 2.0, -2.0]], [[3.0], [2.0], [-2.0]])

    Source: PLeaS (arXiv:2407.02447), partial merging; `unit_budget` finds the shares.
    """
    b = permute(spec, permutations, b)
    (ours, treedef), (theirs, _) = named_leaves(a), named_leaves(b)
    merged, apart = _blocks(spec, ours, theirs, share)

    def lift(x, axes, mine):
        """x of one model, into the places of its units; what feeds a merged unit counts half."""
        x = jnp.asarray(x, jnp.float32)
        out = axis % x.ndim
        for i, p in enumerate(axes):
            if p is None:
                x = x / 2 if i == out else x
                continue
            common, own = jnp.take(x, merged[p], axis=i), jnp.take(x, apart[p], axis=i)
            rest = [own, jnp.zeros_like(own)]
            x = jnp.concatenate([common / 2 if i == out else common, *(rest if mine else rest[::-1])], axis=i)
        return x

    result = {}
    for name, x in ours.items():
        axes = spec.get(name, (None,) * np.ndim(x))
        result[name] = (lift(x, axes, True) + lift(theirs[name], axes, False)).astype(jnp.result_type(x))
    return jax.tree.unflatten(treedef, list(result.values()))


def pleas(
    forward: Callable[[PyTree, str], tuple[Array, Array]],
    a: PyTree,
    b: PyTree,
    kernels: Mapping[str, str | None],
    *,
    pairs: Literal["separate", "mean"] = "separate",
    spec: Spec | None = None,
    share: float | Mapping[str, float] = 1.0,
) -> PyTree:
    """Layer by layer, the kernel and bias that are nearest, in their outputs, to what two models' layers do to their inputs.

    Permute b first (`match_weights`, `permute`). Solved by least squares, the bias with the kernel.

    Args:
      forward: (model, kernel's name) -> (inputs (*batch, n), outputs before the activation (*batch, m)) of that layer.
      a, b: two models that compute alike.
      kernels: {kernel's leaf name: bias' leaf name or None}; kernels are (n, m).
      pairs: each model's inputs are to give its own outputs, or the mean of the inputs the mean of the outputs.
      spec, share: see `merge_units`: with a specification only a share of the units is merged, and the network becomes wider.
        Merged units hear all others, a unit kept apart hears the merged ones and those of its own model. pairs must be "mean":
        a wide network hears both models at once.

    Returns:
      The mean of the two models (`merge_units` where units are kept apart), with those kernels and biases solved for.

    Law:
      pleas(forward, a, a, ...) computes what a computes.

    Raises:
      ValueError: an unknown pairing, or one that does not go with units kept apart; a specification that does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
      >>> forward = lambda model, name: (x, x @ model["w"])
      >>> jm.params.pleas(forward, {"w": jnp.zeros((2, 1))}, {"w": jnp.ones((2, 1))}, {"w": None})["w"].round(3).tolist()
      [[0.5], [0.5]]

    Source: PLeaS (arXiv:2407.02447), its least squares in closed form (the official code descends with Adam, and for units
    kept apart masks the transposed gradient).
    """
    if pairs not in ("separate", "mean"):
        raise ValueError(f'pleas: pairs must be "separate" or "mean", got {pairs!r}.')
    if spec is not None and pairs != "mean":
        raise ValueError('pleas: where units are kept apart pairs must be "mean": the wide network hears both models at once.')
    (ours, treedef), (theirs, _) = named_leaves(a), named_leaves(b)
    merged, apart = ({}, {}) if spec is None else _blocks(spec, ours, theirs, share)
    if spec is None:
        result = {n: (ours[n] + theirs[n]) / 2 for n in ours}
    else:
        identity = {p: np.arange(n) for p, n in spec_sizes(spec, ours).items()}
        result = named_leaves(merge_units(spec, identity, a, b, share=share))[0]
    for kernel, bias in kernels.items():
        seen = [[v.astype(jnp.float32).reshape(-1, v.shape[-1]) for v in forward(model, kernel)] for model in (a, b)]
        if pairs == "separate":
            z, y = (jnp.concatenate(v) for v in zip(*seen, strict=True))
            solution = _least_squares(z, y, bias is not None)
        else:
            axes = (None, None) if spec is None else spec.get(kernel, (None, None))
            blocks = [
                (merged.get(p, np.arange(v.shape[1])), apart.get(p, np.arange(0))) for p, v in zip(axes, seen[0], strict=True)
            ]
            solution = _wide_least_squares(seen, blocks, bias is not None)
        result[kernel] = solution[: result[kernel].shape[0]].astype(result[kernel].dtype)
        if bias is not None:
            result[bias] = solution[-1].astype(result[bias].dtype)
    return jax.tree.unflatten(treedef, list(result.values()))


def _least_squares(z: Array, y: Array, bias: bool) -> Array:
    return jnp.linalg.lstsq(jnp.concatenate([z, jnp.ones_like(z[:, :1])], axis=1) if bias else z, y)[0]


def _wide_least_squares(seen: list, blocks: list, bias: bool) -> Array:
    """The kernel (and bias) between units in the order merged, a's, b's; what leads from one model to the other stays 0."""
    (za, ya), (zb, yb) = seen
    (common_in, own_in), (common, own) = blocks
    z = (za[:, common_in] + zb[:, common_in]) / 2
    m, k = len(common_in), len(own_in)
    each = [(za, ya, np.arange(m, m + k)), (zb, yb, np.arange(m + k, m + 2 * k))]
    wide = jnp.concatenate([z, *(v[:, own_in] for v, _, _ in each)], axis=1)
    columns = [_least_squares(wide, (ya[:, common] + yb[:, common]) / 2, bias)]
    for inputs, outputs, places in each:
        found = _least_squares(jnp.concatenate([z, inputs[:, own_in]], axis=1), outputs[:, own], bias)
        rows = np.concatenate([np.arange(m), places, *([[m + 2 * k]] if bias else [])])
        columns.append(jnp.zeros((m + 2 * k + bias, len(own)), jnp.float32).at[rows].set(found))
    return jnp.concatenate(columns, axis=1)


def units_alike(spec: Spec, ours: Mapping[str, Any], theirs: Mapping[str, Any], sizes: Mapping[str, int]) -> dict:
    """For each permutation's units: the order in which they are merged, the most alike first; and their squared distances."""
    product, distance = ({p: np.zeros(n) for p, n in sizes.items()} for _ in range(2))
    for name, axes in spec.items():
        x, y = np.asarray(ours[name], np.float64), np.asarray(theirs[name], np.float64)
        for i, p in enumerate(axes):
            if p is not None:
                others = tuple(j for j in range(x.ndim) if j != i)
                product[p] += (x * y).sum(axis=others)
                distance[p] += ((x - y) ** 2).sum(axis=others)
    return {p: (np.argsort(-product[p], kind="stable"), distance[p]) for p in sizes}


def _blocks(spec: Spec, ours: Mapping, theirs: Mapping, share: float | Mapping[str, float]) -> tuple[dict, dict]:
    """The units that are merged, and those kept apart, of each permutation."""
    sizes = spec_sizes(spec, ours)
    shares = share if isinstance(share, Mapping) else dict.fromkeys(sizes, share)
    wrong = {p: shares.get(p) for p in sizes if p not in shares or not 0 <= shares[p] <= 1}
    if wrong:
        raise ValueError(f"merge_units: every permutation needs a share between 0 and 1; got {wrong}.")
    merged, apart = {}, {}
    for p, (order, _) in units_alike(spec, ours, theirs, sizes).items():
        m = int(shares[p] * sizes[p] + 1e-9)  # a share that is a count over the size gives the count back
        merged[p], apart[p] = np.sort(order[:m]), np.sort(order[m:])
    return merged, apart
