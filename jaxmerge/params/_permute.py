"""Units of a network have no order: permute those of one model until they match another's, then merge.

A specification names the permutation of each axis: {leaf name: (name or None per axis)}. Axes that carry one name are permuted
together: a layer's outputs and the next one's inputs.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from jaxmerge.params._assignment import assign
from jaxmerge.params._transform import named_leaves

Spec = Mapping[str, tuple[str | None, ...]]
Permutations = dict[str, Int[np.ndarray, "n"]]


def match_weights(spec: Spec, a: PyTree, b: PyTree, *, rounds: int = 100, tolerance: float = 1e-12) -> Permutations:
    """The permutations of b's units under which its weights are most like a's: coordinate descent over the named permutations.

    Each in turn becomes the best assignment given the others, in the order of their names, until a round improves nothing.
    Runs on the host.

    Args:
      spec: {leaf name: (name of the permutation or None, per axis)}; leaves that are not named stay as they are.
      a, b: models of one structure.
      rounds: how often to go over all permutations, at most.
      tolerance: an improvement of the scalar product of the weights no larger than this counts as none.

    Returns:
      {name: indices}: unit i of the permuted b is unit indices[i] of b.

    Law:
      match_weights(spec, a, a) is the identity, if no two units of a layer are alike; the scalar product of a and the permuted
      b is never under that of a and b.

    Raises:
      ValueError: a leaf that the models lack; a specification that does not fit the axes.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> spec = {"in": (None, "p"), "out": ("p", None)}
      >>> a = {"in": jnp.array([[1.0, 2.0]]), "out": jnp.array([[3.0], [4.0]])}
      >>> b = {"in": jnp.array([[2.0, 1.0]]), "out": jnp.array([[4.0], [3.0]])}
      >>> p = jm.params.match_weights(spec, a, b)
      >>> p["p"].tolist(), jm.params.permute(spec, p, b)["in"].tolist()
      ([1, 0], [[1.0, 2.0]])

    Source: Git Re-Basin (arXiv:2209.04836), weight matching; its order of the permutations is random.
    """
    (ours, _), (theirs, _) = named_leaves(a), named_leaves(b)
    sizes = _sizes(spec, ours)
    ours, theirs = ({n: np.asarray(x, np.float64) for n, x in leaves.items() if n in spec} for leaves in (ours, theirs))
    found = {p: np.arange(n) for p, n in sizes.items()}
    for _ in range(rounds):
        improved = False
        for p in sorted(found):
            score = np.zeros((sizes[p], sizes[p]))
            for name, axes in spec.items():
                for axis, q in enumerate(axes):
                    if q != p:
                        continue
                    w = _permuted(theirs[name], axes, found, leave=axis)
                    rows = lambda x, axis=axis: np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)
                    score += rows(ours[name]) @ rows(w).T
            best = assign(score)
            gain = score[np.arange(len(best)), best].sum() - score[np.arange(len(best)), found[p]].sum()
            if gain > tolerance:
                found[p], improved = best, True
        if not improved:
            break
    return found


def permute(spec: Spec, permutations: Mapping[str, Int[np.ndarray, "n"] | Int[Array, "n"]], model: PyTree) -> PyTree:
    """The model with its units in another order. What it computes does not change.

    Args:
      spec: see `match_weights`.
      permutations: {name: indices}.
      model: a pytree.

    Law:
      The identity changes nothing; permuting by p, then by its inverse, changes nothing.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.params.permute({"w": ("p",)}, {"p": jnp.array([1, 0])}, {"w": jnp.array([5.0, 6.0])})["w"].tolist()
      [6.0, 5.0]

    Source: Git Re-Basin (arXiv:2209.04836).
    """
    leaves, treedef = named_leaves(model)
    _sizes(spec, leaves)
    for name, axes in spec.items():
        for axis, p in enumerate(axes):
            if p is not None:
                leaves[name] = jnp.take(leaves[name], jnp.asarray(permutations[p]), axis=axis)
    return jax.tree.unflatten(treedef, list(leaves.values()))


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

    Source: PLeaS (arXiv:2407.02447), partial merging; its budget over the layers is what `share` says, layer by layer.
    """
    b = permute(spec, permutations, b)
    (ours, treedef), (theirs, _) = named_leaves(a), named_leaves(b)
    sizes = _sizes(spec, ours)
    shares = share if isinstance(share, Mapping) else dict.fromkeys(sizes, share)
    wrong = {p: shares.get(p) for p in sizes if p not in shares or not 0 <= shares[p] <= 1}
    if wrong:
        raise ValueError(f"merge_units: every permutation needs a share between 0 and 1; got {wrong}.")
    alike = {p: np.zeros(n) for p, n in sizes.items()}
    for name, axes in spec.items():
        for i, p in enumerate(axes):
            if p is not None:
                product = np.asarray(ours[name], np.float64) * np.asarray(theirs[name], np.float64)
                alike[p] += product.sum(axis=tuple(j for j in range(product.ndim) if j != i))
    merged, apart = {}, {}
    for p, n in sizes.items():
        order = np.argsort(-alike[p], kind="stable")
        m = int(shares[p] * n)
        merged[p], apart[p] = np.sort(order[:m]), np.sort(order[m:])

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
) -> PyTree:
    """Layer by layer, the kernel and bias that are nearest, in their outputs, to what two models' layers do to their inputs.

    Permute b first (`match_weights`, `permute`). Solved by least squares, the bias with the kernel.

    Args:
      forward: (model, kernel's name) -> (inputs (*batch, n), outputs before the activation (*batch, m)) of that layer.
      a, b: two models that compute alike.
      kernels: {kernel's leaf name: bias' leaf name or None}; kernels are (n, m).
      pairs: each model's inputs are to give its own outputs, or the mean of the inputs the mean of the outputs.

    Returns:
      The mean of the two models, with those kernels and biases solved for.

    Law:
      pleas(forward, a, a, ...) computes what a computes.

    Raises:
      ValueError: an unknown pairing.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
      >>> forward = lambda model, name: (x, x @ model["w"])
      >>> jm.params.pleas(forward, {"w": jnp.zeros((2, 1))}, {"w": jnp.ones((2, 1))}, {"w": None})["w"].round(3).tolist()
      [[0.5], [0.5]]

    Source: PLeaS (arXiv:2407.02447), its least squares in closed form (the official code descends with Adam).
    """
    if pairs not in ("separate", "mean"):
        raise ValueError(f'pleas: pairs must be "separate" or "mean", got {pairs!r}.')
    (ours, treedef), (theirs, _) = named_leaves(a), named_leaves(b)
    merged = {n: (ours[n] + theirs[n]) / 2 for n in ours}
    for kernel, bias in kernels.items():
        seen = [[v.astype(jnp.float32).reshape(-1, v.shape[-1]) for v in forward(model, kernel)] for model in (a, b)]
        z, y = (jnp.concatenate(v) if pairs == "separate" else (v[0] + v[1]) / 2 for v in zip(*seen, strict=True))
        z = jnp.concatenate([z, jnp.ones_like(z[:, :1])], axis=1) if bias is not None else z
        solution = jnp.linalg.lstsq(z, y)[0]
        merged[kernel] = solution[: merged[kernel].shape[0]].astype(merged[kernel].dtype)
        if bias is not None:
            merged[bias] = solution[-1].astype(merged[bias].dtype)
    return jax.tree.unflatten(treedef, list(merged.values()))


def _sizes(spec: Spec, leaves: Mapping[str, Any]) -> dict[str, int]:
    """How many units each permutation has; every contradiction in one message."""
    problems, sizes = [], {}
    for name, axes in spec.items():
        if name not in leaves:
            problems.append(f"  there is no leaf {name!r}")
            continue
        shape = np.shape(leaves[name])
        if len(shape) != len(axes):
            problems.append(f"  {name}: {len(axes)} axes are named, the leaf has shape {shape}")
            continue
        for n, p in zip(shape, axes, strict=True):
            if p is not None and sizes.setdefault(p, n) != n:
                problems.append(f"  {name}: permutation {p!r} is of {sizes[p]} units elsewhere, here of {n}")
    if problems:
        raise ValueError("the specification does not fit the model:\n" + "\n".join(problems))
    return sizes


def _permuted(x: np.ndarray, axes: tuple[str | None, ...], found: Permutations, leave: int) -> np.ndarray:
    for axis, p in enumerate(axes):
        if p is not None and axis != leave:
            x = np.take(x, found[p], axis=axis)
    return x
