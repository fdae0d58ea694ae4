"""Adapters (LoRA, as PEFT keeps them): added to a model as it is read, or merged as they are.

An adapter's update of a weight (out, in) is scale B A, where scale is alpha / rank, or alpha / sqrt(rank).
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Sharding

from jaxmerge.checkpoint import Derived, Leaf, Source
from jaxmerge.checkpoint._source import Extent, Format, Index, derived, digest, place, renamed
from jaxmerge.recipe._tokenizer import Unfit, side_json

FACTOR = re.compile(
    r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<which>[AB])(?:\.\w+)?(?:\.weight)?$"
)
PREFIX = "base_model.model."


class Update(NamedTuple):
    """A low-rank update of one weight.

    Attributes:
      a, b: the factors' names in the adapter, (rank, in) and (out, rank).
      rank, scale: its rank, and the factor of its product.
      turned: whether the weight is (in, out): embeddings, and layers that say so.
    """

    a: str
    b: str
    rank: int
    scale: float
    turned: bool


def is_adapter(source: Source) -> bool:
    """Whether a checkpoint holds factors rather than weights."""
    return any(FACTOR.match(n) for n in source.leaves)


def updates(adapter: Source) -> dict[str, Update]:
    """{weight: its update}, by the names of the model.

    Raises:
      ValueError: half a pair of factors; a kind of adapter that is more than B A.
    """
    config = side_json(adapter, "adapter_config.json")
    if "lora_alpha" not in config:
        raise Unfit(
            adapter, f"{adapter.name} has no adapter_config.json with lora_alpha, which scales its updates; fetch it too."
        )
    strange = [n for n in adapter.leaves if "lora_magnitude_vector" in n] or (["use_dora"] if config.get("use_dora") else [])
    if strange:
        text = f"{adapter.name} is a DoRA adapter ({strange[0]}), whose update is no product; merge it into its base first."
        raise Unfit(adapter, text)
    found: dict[str, dict[str, tuple[str, bool]]] = {}
    for name in adapter.leaves:
        match = FACTOR.match(name)
        if match:
            found.setdefault(match["module"], {})[match["which"]] = (name, bool(match["embedding"]))
    half = sorted(m for m, pair in found.items() if len(pair) != 2)
    if half:
        raise Unfit(adapter, f"{adapter.name} has only one factor of {half[0]}; fetch it again.")
    result = {}
    for module, pair in found.items():
        (a, embedding), (b, _) = pair["A"], pair["B"]
        rank = adapter.leaves[a].shape[0]
        alpha = _of(config.get("alpha_pattern"), module, config["lora_alpha"])
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        turned = embedding or bool(config.get("fan_in_fan_out"))
        result[f"{module}.weight"] = Update(a, b, rank, scale, turned)
    return result


def _of(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """What a pattern says of a module: PEFT's keys are ends of names, or regular expressions for them."""
    return next((v for k, v in (pattern or {}).items() if re.fullmatch(rf"(?:.*\.)?{k}", module)), default)


def adapted(base: Source, adapter: Source) -> Source:
    """A model with an adapter in it: base + scale B A in float32, cast once; weights that the adapter has whole replace its.

    Raises:
      ValueError: the adapter does not fit the model.
    """
    if is_adapter(base) or not is_adapter(adapter):
        swapped = is_adapter(base) and not is_adapter(adapter)
        remedy = f"write {adapter.name}+{base.name}" if swapped else "write model+adapter"
        which = f"{base.name} is an adapter" if is_adapter(base) else f"{adapter.name} is no adapter (LoRA)"
        raise ValueError(f"{which}; {remedy}.")
    low = updates(adapter)
    whole = {_plain(n): n for n in adapter.leaves if not FACTOR.match(n)}
    strangers = [n for n in (*low, *whole) if n not in base.leaves]
    if strangers:
        raise ValueError(
            f"{adapter.name} does not fit {base.name}, which has no {strangers[0]}; name the model it was trained on."
        )
    for n, u in low.items():
        (out, _), (_, into) = adapter.leaves[u.b].shape, adapter.leaves[u.a].shape
        shape = (into, out) if u.turned else (out, into)
        if base.leaves[n].shape != shape:
            text = f"{adapter.name} updates {n} as {list(shape)}, {base.name} has {list(base.leaves[n].shape)}"
            raise ValueError(f"{text}; name the model it was trained on.")
    view = derived(base, {n: _whole(adapter, there, base.leaves[n]) for n, there in whole.items()}) if whole else base
    return Adapted(view, adapter, low)


def _plain(name: str) -> str:
    return name.removeprefix(PREFIX).replace(".modules_to_save.default", "")


def _whole(adapter: Source, there: str, leaf: Leaf) -> Derived:
    cast = lambda x: x.astype(leaf.dtype)
    return Derived(leaf._replace(shape=adapter.leaves[there].shape), ((adapter, there),), cast, f"from the adapter: {there}")


class Adapted:
    """A model and an adapter, added up block by block."""

    def __init__(self, base: Source, adapter: Source, low: Mapping[str, Update]):
        self.name, self.path, self.metadata = f"{base.name}+{adapter.name}", base.path, base.metadata
        self.format: Format = base.format
        self.files: tuple[str, ...] = (*base.files, *adapter.files)
        self.leaves = dict(base.leaves)
        self._base, self._adapter, self._low = base, adapter, dict(low)

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        x = self._base.read(name, index)
        u = self._low.get(name)
        if u is None:
            return x
        rows, columns = index or (slice(None), slice(None))
        a, b = (self._adapter.read(n).astype(np.float32) for n in (u.a, u.b))
        if u.turned:
            change = (a.T[rows] @ b.T[:, columns]) * np.float32(u.scale)
        else:
            change = (b[rows] @ a[:, columns]) * np.float32(u.scale)
        return (x.astype(np.float32) + change).astype(x.dtype)

    def load(self, shardings: Mapping[str, Sharding]) -> dict[str, Any]:
        plain = {n: s for n, s in shardings.items() if n not in self._low}
        return self._base.load(plain) | place({n: self.leaves[n] for n in self._low if n in shardings}, shardings, self.read)

    def extent(self, name: str) -> Extent | None:
        return None if name in self._low else self._base.extent(name)

    def granule(self, name: str) -> int | None:
        return self._base.granule(name)

    def identity(self) -> str:
        return digest(self._base.identity(), self._adapter.identity(), {n: list(u) for n, u in self._low.items()})


# --- adapters alone --------------------------------------------------------------------------------------------------


def as_weights(adapters: Mapping[Any, Source]) -> dict[Any, Source]:
    """Adapters as models of the weights they update, all zero: a recipe's names, filters and gradients mean those.

    Raises:
      ValueError: adapters that do not update the same model, or do more than update it.
    """
    shapes: dict[str, Leaf] = {}
    for adapter in adapters.values():
        whole = next((n for n in adapter.leaves if not FACTOR.match(n)), None)
        if whole is not None:
            raise Unfit(adapter, f"{adapter.name} has {whole} as a whole, which is no update; merge model+adapter instead.")
        for n, u in updates(adapter).items():
            shape = (adapter.leaves[u.b].shape[0], adapter.leaves[u.a].shape[1])
            shapes.setdefault(n, Leaf(shape[::-1] if u.turned else shape, np.dtype(np.float32)))
            if shapes[n].shape != (shape[::-1] if u.turned else shape):
                text = f"{adapter.name} updates {n} as {list(shape)}, another adapter as {list(shapes[n].shape)}"
                raise Unfit(adapter, f"{text}; merge adapters of one model.")
    found = {}
    for key, adapter in adapters.items():
        zero = lambda leaf: lambda: np.zeros(leaf.shape, leaf.dtype)
        leaves = {n: Derived(leaf, (), zero(leaf), "an update of rank 0") for n, leaf in shapes.items()}
        found[key] = renamed(derived(adapter, leaves), {n: n for n in leaves})
    return found


def concatenated(adapters: Mapping[Any, Source], weights: Mapping[str, Mapping[Any, float]]) -> tuple[Source, dict[str, Any]]:
    """The weighted sum of adapters as one adapter of the summed rank: exact, without cross terms. And its configuration.

    Args:
      adapters: any number, of any ranks.
      weights: {weight: {adapter: its factor}}.
    """
    low = {key: updates(adapter) for key, adapter in adapters.items()}
    first = next(iter(adapters.values()))
    leaves: dict[str, Derived] = {}
    ranks: dict[str, int] = {}
    for name, factors in weights.items():
        parts = [(adapters[k], low[k][name], w) for k, w in factors.items() if name in low[k]]
        if not parts:
            continue
        module = name.removesuffix(".weight")
        ranks[module] = rank = sum(u.rank for _, u, _ in parts)
        dtype = parts[0][0].leaves[parts[0][1].b].dtype
        into, out = parts[0][0].leaves[parts[0][1].a].shape[1], parts[0][0].leaves[parts[0][1].b].shape[0]
        scales = [np.float32(u.scale * w) for _, u, w in parts]
        cast = lambda x, dtype=dtype: x.astype(dtype)

        def a(*factors: np.ndarray, cast=cast) -> np.ndarray:
            return cast(np.concatenate(factors, axis=0))

        def b(*factors: np.ndarray, cast=cast, scales=scales) -> np.ndarray:
            return cast(np.concatenate([f.astype(np.float32) * s for f, s in zip(factors, scales, strict=True)], axis=1))

        names = {"A": next(u.a for _, u, _ in parts), "B": next(u.b for _, u, _ in parts)}
        leaves[names["A"]] = Derived(Leaf((rank, into), dtype), tuple((s, u.a) for s, u, _ in parts), a, f"{name} A")
        note = f"{name} B {[float(s) for s in scales]}"
        leaves[names["B"]] = Derived(Leaf((out, rank), dtype), tuple((s, u.b) for s, u, _ in parts), b, note)
    config = side_json(first, "adapter_config.json") | of_ranks(ranks) | {"use_rslora": False, "inference_mode": True}
    view = derived(first, leaves)
    return renamed(view, {n: n for n in leaves}), config


def of_ranks(ranks: Mapping[str, int]) -> dict[str, Any]:
    """A configuration's words for ranks by module, every scale 1."""
    most = max(ranks.values(), default=1)
    other = {module: r for module, r in ranks.items() if r != most}
    return {"r": most, "lora_alpha": most, "rank_pattern": other, "alpha_pattern": other}
