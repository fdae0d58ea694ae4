"""Models of different vocabularies: bring their embeddings into the order of one vocabulary, then merge them as ever.

Where each row comes from is worked out on the host (`align_vocabularies`) and applied to any table of a row per token
(`align_embeddings`): embeddings and heads alike.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from jaxmerge.params._layout import whole


class Alignment(NamedTuple):
    """Where the rows of a vocabulary come from, in each of K models.

    Attributes:
      rows: each model's own row of each token, or -1.
      donors: what a model takes that has none of its own: the mean of these rows, one of each model, -1 where it gives none.
    """

    rows: Int[np.ndarray, "K V"]
    donors: Int[np.ndarray, "K V"]

    def report(self) -> dict[str, Bool[np.ndarray, "K V"]]:
        """Which rows of each model are its own ("exact"), those of one donor ("borrowed"), a mean ("averaged"), or "zero".

        Example:
          >>> import jaxmerge as jm
          >>> plan = jm.params.align_vocabularies([{"a": 0, "b": 1}, {"b": 0}])
          >>> {kind: mask[1].tolist() for kind, mask in plan.report().items() if mask.any()}
          {'exact': [False, True], 'borrowed': [True, False]}
        """
        own, givers = self.rows >= 0, np.sum(self.donors >= 0, axis=0, keepdims=True)
        without = lambda which: ~own & which
        return {"exact": own, "borrowed": without(givers == 1), "averaged": without(givers > 1), "zero": without(givers == 0)}


def align_vocabularies(
    vocabularies: Sequence[Mapping[str, int]],
    union: Mapping[str, int] | None = None,
    *,
    base: int | None = None,
    sources: Mapping[str, tuple[int, int] | None] | None = None,
    force: Collection[str] = (),
) -> Alignment:
    """Find, for each token of one vocabulary, its row in each model, or rows to make do with.

    A model that lacks a token takes the base's row; where the base lacks it too, the row of the one model that has it, or the
    mean of those that do; where none does, zeros.

    Args:
      vocabularies: {token: row} of each model.
      union: {token: row} of the vocabulary to align to, rows 0 to V - 1; None is every token, in the order of the models and
        their rows.
      base: the number of the model to ask first; None asks all alike.
      sources: {token: (model, row) to take in its place, or None for zeros}, for tokens of your choice.
      force: of these, the tokens that even models take from there that have a row of their own.

    Law:
      Models of one vocabulary keep their rows.

    Raises:
      ValueError: rows of the union that are not 0 to V - 1; a base or source that is not there; a forced token without one.

    Example:
      >>> import jaxmerge as jm
      >>> plan = jm.params.align_vocabularies([{"a": 0, "b": 1}, {"b": 0, "c": 1}])
      >>> plan.rows.tolist(), plan.donors.tolist()
      ([[0, 1, -1], [-1, 0, 1]], [[0, 1, -1], [-1, 0, 1]])

    Source: mergekit's `tokenizer: {source: union}`, its `tokens`, `force` and fallbacks.
    """
    if union is None:
        tokens = [token for v in vocabularies for token in sorted(v, key=v.__getitem__)]
        union = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    ordered = sorted(union, key=union.__getitem__)
    if [union[token] for token in ordered] != list(range(len(ordered))):
        raise ValueError(f"align_vocabularies: the union's rows must be 0 to {len(ordered) - 1}, each once.")
    models, sources = range(len(vocabularies)), sources or {}
    wrong = [m for m in (*(s[0] for s in sources.values() if s), *(() if base is None else (base,))) if m not in models]
    missing = sorted({*sources, *force} - {*union}) + sorted({*force} - {*sources})
    if wrong or missing:
        raise ValueError(
            f"align_vocabularies: models {wrong} are not among the {len(vocabularies)}; tokens {missing} are not in the union, "
            "or forced without a source."
        )
    rows = np.array([[v.get(token, -1) for token in ordered] for v in vocabularies], np.int32).reshape(len(models), -1)
    donors = rows.copy()
    if base is not None:
        donors[:, rows[base] >= 0] = -1
        donors[base] = rows[base]
        alone = np.sum(rows >= 0, axis=0) > 0  # whoever has it, where the base has not
        donors = np.where((rows[base] < 0) & alone, rows, donors)
    for token, source in sources.items():
        donors[:, union[token]] = -1
        if source is not None:
            donors[source[0], union[token]] = source[1]
    rows[:, [union[token] for token in force]] = -1
    return Alignment(rows, donors)


def align_embeddings(
    plan: Alignment, tables: Sequence[Float[ArrayLike, "_ d"]], *, size: int | None = None
) -> list[Float[Array, "V d"]]:
    """Each model's table in the order of the aligned vocabulary.

    Args:
      plan: what `align_vocabularies` found.
      tables: the models' embeddings, or heads, a row per token; rows beyond a model's vocabulary are left behind.
      size: how many rows the result has; those beyond the vocabulary are the mean of the others.

    Law:
      Rows that a model has keep their bits; the sum of donors is taken in float32.

    Raises:
      ValueError: as many tables as the plan has not; tables of different widths; a row that a table lacks; a size below V.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> plan = jm.params.align_vocabularies([{"a": 0, "b": 1}, {"b": 0, "c": 1}])
      >>> first, second = jm.params.align_embeddings(plan, [jnp.array([[1.0], [2.0]]), jnp.array([[4.0], [5.0]])])
      >>> first.tolist(), second.tolist()
      ([[1.0], [2.0], [5.0]], [[1.0], [4.0], [5.0]])

    Source: mergekit's aligned embeddings; `size` is its `pad_to_multiple_of`.
    """
    models, vocabulary = plan.rows.shape
    size = vocabulary if size is None else size
    shapes = [np.shape(t) for t in tables]
    least = (np.maximum(plan.rows, plan.donors).max(axis=1, initial=-1) + 1).tolist()
    fits = len(shapes) == models and all(s[0] >= n and s[1:] == shapes[0][1:] for s, n in zip(shapes, least, strict=True))
    if not fits:
        raise ValueError(f"align_embeddings: pass {models} tables of one width, of {least} rows or more; got shapes {shapes}.")
    if size < vocabulary:
        raise ValueError(f"align_embeddings: size must be {vocabulary} or more, the size of the vocabulary; got {size}.")
    everywhere = [whole(jnp.asarray(t), (0,)) for t in tables]
    take = lambda table, rows: jnp.take(table, np.maximum(rows, 0), axis=0)
    has = lambda rows: (rows >= 0)[:, None]
    given = [jnp.where(has(r), take(t, r).astype(jnp.float32), 0) for t, r in zip(everywhere, plan.donors, strict=True)]
    givers = np.maximum(np.sum(plan.donors >= 0, axis=0), 1)[:, None].astype(np.float32)
    fallback = sum(given[1:], given[0]) / givers

    def aligned(table, rows):
        y = jnp.where(has(rows), take(table, rows), fallback.astype(table.dtype))
        mean = jnp.mean(y.astype(jnp.float32), axis=0, keepdims=True).astype(y.dtype)
        return jnp.concatenate([y, jnp.repeat(mean, size - vocabulary, axis=0)]) if size > vocabulary else y

    return [aligned(t, r) for t, r in zip(everywhere, plan.rows, strict=True)]
