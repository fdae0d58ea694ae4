"""Tables of a row per token, in the order of the output's vocabulary, read block by block."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Sharding

from jaxmerge.checkpoint import Leaf, Source
from jaxmerge.checkpoint._source import Extent, Format, Index, digest, place
from jaxmerge.params import Alignment, align_vocabularies
from jaxmerge.recipe._names import embeddings_of, vocabulary_axis
from jaxmerge.recipe._resolve import Row
from jaxmerge.recipe._schema import Recipe, Reference, TokenSource
from jaxmerge.recipe._tokenizer import Tokens, read_tokens, union
from jaxmerge.recipe._yaml import Mistake

MANY = 32
"""Runs of rows beyond which one long read is cheaper than many short ones."""


class Vocabulary(NamedTuple):
    """What the rows of the output mean.

    Attributes:
      tokens: the output's tokenizer.
      size: rows of its tables, padding included.
      models: each model's tokenizer.
      sources: rows by decree: {token: (model, row) or None for zeros}.
      force: of these, those that hold for models too that have a row of their own.
      known: alignments that have been worked out.
    """

    tokens: Tokens
    size: int
    models: dict[Reference, Tokens]
    sources: dict[str, tuple[Reference, int] | None]
    force: tuple[str, ...]
    known: dict[Any, Alignment]

    def alignment(self, models: Sequence[Reference], base: Reference | None) -> Alignment:
        """Where each row of the output comes from, in each of these models."""
        key = (tuple(models), base)
        if key not in self.known:
            self.known[key] = self._align(models, base)
        return self.known[key]

    def _align(self, models: Sequence[Reference], base: Reference | None) -> Alignment:
        ids = self.tokens.rows
        holes = set(range(max(ids.values(), default=-1) + 1)) - set(ids.values())
        ids = ids | {f"\0row {i}": i for i in holes}  # rows without a token are nobody's
        sources = {t: None if s is None else (models.index(s[0]), s[1]) for t, s in self.sources.items()}
        return align_vocabularies(
            [self.models[m].rows for m in models],
            ids,
            base=models.index(base) if base in models and base is not None else None,
            sources=sources,
            force=self.force,
        )


def vocabulary(recipe: Recipe, sources: Mapping[Reference, Source]) -> tuple[Vocabulary | None, list[Mistake], list[Mistake]]:
    """The output's vocabulary as the recipe wants it; mistakes, and notes. None where the recipe wants none."""
    wanted = recipe.tokenizer
    if wanted is None:
        return None, [], []
    mistakes: list[Mistake] = []
    notes: list[Mistake] = []
    marks = recipe.references()
    base = recipe.base or next(iter(marks))
    found: dict[Reference, Tokens] = {}
    for model in dict.fromkeys((base, *marks)):
        leaves = sources[model].leaves
        table = embeddings_of(leaves)
        rows = leaves[table].shape[vocabulary_axis(table) or 0] if table else None
        try:
            tokens = read_tokens(sources[model], rows)
        except ValueError as e:
            mistakes.append(Mistake(marks.get(model), str(e)))
            continue
        except (KeyError, TypeError, AttributeError, IndexError):
            text = f"{model}: tokenizer.json is not one of the tokenizers library; fetch it again, or save the tokenizer anew."
            mistakes.append(Mistake(marks.get(model), text))
            continue
        if tokens is not None:
            found[model] = tokens
        elif model == base:
            text = (
                f"{base} has no tokenizer.json, which the output's vocabulary starts from; save its tokenizer beside it as one."
            )
            mistakes.append(Mistake(wanted.mark, text))
        elif base in found:
            found[model] = found[base]
            notes.append(
                Mistake(marks.get(model), f"{model} has no tokenizer.json; its rows are taken to mean what {base}'s do.")
            )
    if mistakes:
        return None, mistakes, notes
    if wanted.source == "union":
        tokens = union(found[base], [found[m] for m in found if m != base], list(wanted.tokens))
    else:
        whose = wanted.source if isinstance(wanted.source, Reference) else base
        if whose not in found:
            named = str(whose).removeprefix("model:")
            remedy = f"write {named}" if named in map(str, found) else "list it, or name one that is"
            text = f"the vocabulary is to be that of {whose}, which is no model of this recipe; {remedy}."
            return None, [Mistake(wanted.mark, text)], notes
        tokens = union(found[whose], [], list(wanted.tokens))
    decrees: dict[str, tuple[Reference, int] | None] = {}
    for token, source in wanted.tokens.items():
        if not source.given:
            continue
        row = _row(token, source, found)
        if isinstance(row, str):
            mistakes.append(Mistake(source.mark, row))
        else:
            decrees[token] = row
    forced = tuple(t for t, s in wanted.tokens.items() if s.force and t in decrees)
    size, pad = max(tokens.rows.values(), default=-1) + 1, wanted.pad_to_multiple_of or 1
    return Vocabulary(tokens, -(-size // pad) * pad, found, decrees, forced, {}), mistakes, notes


def _row(token: str, source: TokenSource, found: Mapping[Reference, Tokens]) -> tuple[Reference, int] | str | None:
    """Where a token's row comes from by decree, or what is wrong with that."""
    if source.model is None:
        return None
    if source.model not in found:
        return (
            f"token {token!r} is to come from {source.model}, which is no model of this recipe; list it, or name one that is."
        )
    if source.row is not None:
        return source.model, source.row
    wanted = token if source.token is None else source.token
    if wanted not in found[source.model].rows:
        has = [str(m) for m, tokens in found.items() if wanted in tokens.rows]
        whose = f"; {' and '.join(has)} has it" if has else "; no model has it: name another token, or {kind: zero}"
        return f"token {token!r} is to come from {source.model}, which has no token {wanted!r}{whose}."
    return source.model, found[source.model].rows[wanted]


class Aligned:
    """One model's table, its rows where the output has them.

    Rows that the model lacks are the mean of its donors', in float32; rows beyond the vocabulary are the mean of all others.
    """

    def __init__(self, name: str, tables: Sequence[tuple[Source, str]], which: int, alignment: Alignment, size: int):
        source, there = tables[which]
        self.name, self.path, self.metadata = source.name, source.path, source.metadata
        self.format: Format = source.format
        self.files: tuple[str, ...] = tuple(dict.fromkeys(f for s, _ in tables for f in s.files))
        self._tables, self._own, self._rows, self._donors = tables, which, alignment.rows[which], alignment.donors
        self._axis, leaf = vocabulary_axis(there) or 0, source.leaves[there]
        shape = (*leaf.shape[: self._axis], size, *leaf.shape[self._axis + 1 :])
        self.leaves: dict[str, Leaf] = {name: Leaf(shape, leaf.dtype, None, leaf.path)}

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        leaf = self.leaves[name]
        index = tuple(index) or (slice(None),) * len(leaf.shape)
        start, stop, _ = index[self._axis].indices(leaf.shape[self._axis])
        y = np.moveaxis(self._aligned(start, min(stop, len(self._rows)), index), self._axis, 0)
        if stop > len(self._rows):
            whole = y if start == 0 else np.moveaxis(self._aligned(0, len(self._rows), index), self._axis, 0)
            mean = np.mean(whole, axis=0, keepdims=True, dtype=np.float32).astype(whole.dtype)
            y = np.concatenate([y, np.repeat(mean, stop - max(start, len(self._rows)), axis=0)])
        return np.ascontiguousarray(np.moveaxis(y, 0, self._axis))

    def _aligned(self, start: int, stop: int, index: Index) -> np.ndarray:
        """Rows start to stop - 1 of the output's vocabulary."""
        rows, donors = self._rows[start:stop], self._donors[:, start:stop]
        shape = [max(stop - start, 0), *(len(range(n)[s]) for n, s in self._others(index))]
        y = np.zeros(shape, self.leaves[next(iter(self.leaves))].dtype)
        own = rows >= 0
        y[own] = self._take(self._own, rows[own], index)
        lacking = np.flatnonzero(~own & (donors >= 0).any(axis=0))
        if lacking.size:
            total = np.zeros((lacking.size, *shape[1:]), np.float32)
            for k in range(len(self._tables)):
                gives = np.flatnonzero(donors[k, lacking] >= 0)
                total[gives] += self._take(k, donors[k, lacking[gives]], index)
            givers = np.sum(donors[:, lacking] >= 0, axis=0).reshape(-1, *(1,) * (total.ndim - 1))
            y[lacking] = (total / givers).astype(y.dtype)
        return np.moveaxis(y, 0, self._axis)

    def _others(self, index: Index) -> list[tuple[int, slice]]:
        [leaf] = self.leaves.values()
        return [(n, s) for axis, (n, s) in enumerate(zip(leaf.shape, index, strict=True)) if axis != self._axis]

    def _take(self, k: int, rows: np.ndarray, index: Index) -> np.ndarray:
        """Rows of a table, the tokens first: in runs of neighbours, or where those are many all from the first to the last."""
        source, there = self._tables[k]

        def block(start, stop):
            where = tuple(slice(start, stop) if axis == self._axis else s for axis, s in enumerate(index))
            return np.moveaxis(source.read(there, where), self._axis, 0)

        runs = [run for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1) if run.size]
        if not runs:
            return block(0, 0)
        if len(runs) > MANY:
            first = int(rows.min())
            return block(first, int(rows.max()) + 1)[rows - first]
        return np.concatenate([block(int(run[0]), int(run[-1]) + 1) for run in runs])

    def load(self, shardings: Mapping[str, Sharding]) -> dict[str, Any]:
        return place({n: self.leaves[n] for n in shardings}, shardings, self.read)

    def extent(self, name: str) -> Extent | None:
        return None

    def granule(self, name: str) -> int | None:
        """Rows that stand in runs are read block by block; where they are scattered, a block is as dear as the whole."""
        scattered = np.count_nonzero(np.diff(self._rows) != 1) > MANY
        sizes = [source.granule(there) for source, there in self._tables]
        return None if scattered or self._axis or None in sizes else max(n for n in sizes if n is not None)

    def identity(self) -> str:
        tables = [(source.identity(), there) for source, there in self._tables]
        rows = [self._rows.tolist(), self._donors.tolist()]
        return digest(tables, self._own, rows, [list(leaf.shape) for leaf in self.leaves.values()])


def aligned(
    vocabulary: Vocabulary, row: Row, base: Reference | None, sources: Mapping[Reference, Source], model: Reference
) -> tuple[Source, str]:
    """Where a model's table is read, its rows as the output has them."""
    models = [m for m, _ in row.inputs]
    which = models.index(model)
    source, there = sources[model], row.inputs[which][1]
    alignment = vocabulary.alignment(models, base)
    rows = alignment.rows[which]
    size = source.leaves[there].shape[vocabulary_axis(there) or 0]
    if size == vocabulary.size == len(rows) and (rows == np.arange(size)).all():
        return source, there  # as it is, from its file
    tables = [(sources[m], n) for m, n in row.inputs]
    return Aligned(there, tables, which, alignment, vocabulary.size), there


def followed(vocabulary: Vocabulary, row: Row, base: Reference | None, model: Reference, data: Source) -> tuple[Source, str]:
    """Where the information of a model's table is read, its rows as the output has them: none, 0, of tokens that it lacks."""
    models = [m for m, _ in row.inputs]
    which = models.index(model)
    rows, there = vocabulary.alignment(models, base).rows[which], row.inputs[which][1]
    rows = np.concatenate([rows, np.full(vocabulary.size - len(rows), -1, rows.dtype)])[None]
    return Aligned(there, [(data, there)], 0, Alignment(rows, np.full_like(rows, -1)), vocabulary.size), there


def report(vocabulary: Vocabulary, models: Sequence[Reference], base: Reference | None) -> dict[str, dict[str, int]]:
    """{model: how many rows are its own, one donor's, the mean of several, zero}."""
    kinds = vocabulary.alignment(models, base).report()
    return {str(m): {kind: int(mask[k].sum()) for kind, mask in kinds.items()} for k, m in enumerate(models)}
