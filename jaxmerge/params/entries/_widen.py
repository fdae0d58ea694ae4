"""WIDEN: weigh experts column by column, by how far magnitude and direction have moved."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jaxmerge.params._transform import MergeTransform, Need, Step, atom, each, models, total
from jaxmerge.params.order._quantile import magnitude_bits
from jaxmerge.params.order._rows import rank_in_row
from jaxmerge.params.spectral._spectral import Select


def widen(*, ratio: float = 1.0, calibration: float = 1.0, rows: Select = None, axis: int = 0) -> MergeTransform:
    """Add the task vectors, each column weighted by how much it changed in its expert, compared across experts.

    A column's change is that of its length and of its direction; each is ranked within the expert, softmaxed over the experts,
    and set to `calibration` where the rank is well above the middle. Vectors are weighed entry by entry, by their change.
    Merge without a base and name it first: `merge(widen(), None, [base, *models])`. A matrix stays split; to be ranked, two
    numbers per column and expert are brought together.

    Args:
      ratio: a rank above ratio times the mean rank (a change above ratio times the mean change) is calibrated; ranks are
        compared as whole numbers, so that no rounding decides.
      calibration: the score of such columns.
      rows: leaf name -> whether rows are scored in the place of columns: embeddings, whose rows are tokens.
      axis: of a matrix's two axes the one that a column runs along, the outputs: 0 for PyTorch's weights, 1 for Flax kernels.

    Law:
      A column that is zero has no direction and counts as unmoved. Scores do not add up to 1.

    Raises:
      ValueError: fewer than two models; an axis that is neither 0 nor 1.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, a, b = {"w": jnp.zeros(2)}, {"w": jnp.array([3.0, 0.0])}, {"w": jnp.array([0.0, 1.0])}
      >>> jm.params.merge(jm.params.widen(), None, [base, a, b])["w"].tolist()
      [3.0, 1.0]

    Source: WIDEN (arXiv:2408.03092); the official MergeLLM code, where `rows` are those of model.embed_tokens.weight.
    """
    if axis not in (0, 1):
        raise ValueError(f"widen: axis must be 0 or 1, the axis of a matrix's outputs; got {axis}.")

    def settings(name, shape):
        if shape[0] < 2:
            raise ValueError(f"widen: pass the base first, [base, *models]; got {shape[0]} model.")
        if len(shape) != 3:
            return {"entries": ()}
        # 2 rank > ratio (n - 1), ranks from 0: the largest rank that is not calibrated
        flip = rows is not None and rows(name)
        n = shape[1 + axis] if flip else shape[2 - axis]
        return {"rows" if flip else "columns": {"last": np.int32(np.floor(ratio * (n - 1) / 2))}}

    def merge(plan, x):
        base, *others = models(x)
        tau = jnp.stack([one - base for one in others])
        if "entries" in plan:
            change = jnp.abs(tau)
            mean = jnp.mean(change, axis=tuple(range(1, x.ndim)), keepdims=True)
            return base[None] + total(tau * _scores(change, change > mean * ratio, calibration))
        flip = "rows" in plan
        last = plan["rows" if flip else "columns"]["last"]
        along = 1 - axis if flip else axis
        dot = lambda a, b: jnp.sum(a * b, axis=along, keepdims=True)
        length = jnp.sqrt(jnp.stack([dot(one, one) for one in models(x)]))
        product = jnp.stack([dot(one, base) for one in others])
        some = jnp.where(length == 0, 1, length)
        turned = jnp.where((length[1:] == 0) | (length[:1] == 0), 0, 1 - product / some[1:] / some[:1])
        stretched = jnp.abs(length[1:] - length[:1])
        parts = [_column_scores(v, 1 + along, last, calibration) for v in (stretched, turned)]
        return base[None] + total(each(jnp.multiply, tau, total(jnp.stack(parts))[0] / 2))

    needs = (Need("sum", "tensor"), Need("sum", "column"), Need("order", "tensor"))
    return atom(Step(settings, lambda settings, x: settings, merge, models=1, needs=needs))


def _column_scores(change: Float[Array, "K _ _"], along: int, last: Array, calibration: float) -> Float[Array, "K _ _"]:
    line = jnp.squeeze(change, along)
    rank = rank_in_row(magnitude_bits(jnp.maximum(line, 0)))
    n = line.shape[-1]
    score = _scores(rank.astype(jnp.float32) / n, rank > last, calibration)
    return jnp.expand_dims(score, along)


def _scores(significance: Array, above: Array, calibration: float) -> Array:
    return jnp.where(above, calibration, jax.nn.softmax(significance, axis=0))
