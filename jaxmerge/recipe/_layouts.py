"""Layouts: how one and the same model is named and turned in different libraries, so that their checkpoints merge.

A table says for each tensor of the Hub's layout where it lies elsewhere and how it is turned; every turn can be undone.
"{}" is the number of the layer. A layout of one array for all layers has the same tables, with an axis for the layers.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeVar

import numpy as np

from jaxmerge.checkpoint import Derived, Leaf, Source, derived, renamed
from jaxmerge.recipe._state import STATE

Shape = tuple[int, ...]
T = TypeVar("T")


class Turn(NamedTuple):
    """there(array of the Hub, shape elsewhere) -> array elsewhere; back(array elsewhere) -> array of the Hub; shape of that."""

    there: Callable[[np.ndarray, Shape], np.ndarray]
    back: Callable[[np.ndarray], np.ndarray]
    shape: Callable[[Shape], Shape]


def _spread(y: np.ndarray) -> np.ndarray:
    """Rotary pairs side by side, from halves one after the other."""
    half = y.shape[-1] // 2
    return np.stack([y[..., :half], y[..., half:]], axis=-1).reshape(y.shape)


def _halves(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)


def _scaled(x: np.ndarray, power: float) -> np.ndarray:
    return (x.astype(np.float32) * np.float32(x.shape[-1] ** power)).astype(x.dtype)


def _in(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), -1).T


_IN = lambda s: (math.prod(s[1:]), s[0])
TURNS = {
    "as it is": Turn(lambda y, s: y.reshape(s), lambda x: x, lambda s: s),
    "flat": Turn(lambda y, s: y.reshape(s), lambda x: x.reshape(-1), lambda s: (math.prod(s),)),
    "in": Turn(lambda y, s: y.T.reshape(s), _in, _IN),  # (in, *out) is (out, in)
    "out": Turn(  # (*in, out) is (out, in)
        lambda y, s: y.T.reshape(s), lambda x: x.reshape(-1, x.shape[-1]).T, lambda s: (s[-1], math.prod(s[:-1]))
    ),
    "heads": Turn(  # (heads, in, size) is (heads size, in)
        lambda y, s: y.reshape(s[0], s[2], s[1]).swapaxes(1, 2),
        lambda x: x.swapaxes(1, 2).reshape(-1, x.shape[1]),
        lambda s: (s[0] * s[2], s[1]),
    ),
    "rotary": Turn(lambda y, s: _spread(y.T.reshape(s)), lambda x: _in(_halves(x)), _IN),
    "query": Turn(  # the scale of the scores is in the kernel
        lambda y, s: _scaled(_spread(y.T.reshape(s)), -0.5), lambda x: _in(_halves(_scaled(x, 0.5))), _IN
    ),
}

INFORMATION = TURNS | {  # of squared gradients: what multiplies a weight divides its gradient
    "query": Turn(lambda y, s: _scaled(_spread(y.T.reshape(s)), 1.0), lambda x: _in(_halves(_scaled(x, -1.0))), _IN),
}

LAYER = "model.layers.{}."
DECODER = {
    "model.embed_tokens.weight": ("token_embedder/embedding", "as it is"),
    "lm_head.weight": ("decoder/logits_dense/kernel", "in"),
    "model.norm.weight": ("decoder/decoder_norm/scale", "as it is"),
    LAYER + "input_layernorm.weight": ("decoder/{}/pre_self_attention_layer_norm/scale", "as it is"),
    LAYER + "post_attention_layernorm.weight": ("decoder/{}/post_self_attention_layer_norm/scale", "as it is"),
    LAYER + "self_attn.q_proj.weight": ("decoder/{}/self_attention/query/kernel", "in"),
    LAYER + "self_attn.k_proj.weight": ("decoder/{}/self_attention/key/kernel", "in"),
    LAYER + "self_attn.v_proj.weight": ("decoder/{}/self_attention/value/kernel", "in"),
    LAYER + "self_attn.o_proj.weight": ("decoder/{}/self_attention/out/kernel", "out"),
    LAYER + "self_attn.q_proj.bias": ("decoder/{}/self_attention/query/bias", "flat"),
    LAYER + "self_attn.k_proj.bias": ("decoder/{}/self_attention/key/bias", "flat"),
    LAYER + "self_attn.v_proj.bias": ("decoder/{}/self_attention/value/bias", "flat"),
    LAYER + "self_attn.q_norm.weight": ("decoder/{}/self_attention/query_norm/scale", "as it is"),
    LAYER + "self_attn.k_norm.weight": ("decoder/{}/self_attention/key_norm/scale", "as it is"),
    LAYER + "mlp.gate_proj.weight": ("decoder/{}/mlp/wi_0/kernel", "in"),
    LAYER + "mlp.up_proj.weight": ("decoder/{}/mlp/wi_1/kernel", "in"),
    LAYER + "mlp.down_proj.weight": ("decoder/{}/mlp/wo/kernel", "out"),
}
LLAMA = DECODER | {
    LAYER + "self_attn.q_proj.weight": ("decoder/{}/self_attention/query/kernel", "query"),
    LAYER + "self_attn.k_proj.weight": ("decoder/{}/self_attention/key/kernel", "rotary"),
}
GEMMA3 = {
    "model.embed_tokens.weight": ("embedder/input_embedding", "as it is"),
    "model.norm.weight": ("final_norm/scale", "as it is"),
    LAYER + "input_layernorm.weight": ("{}/pre_attention_norm/scale", "as it is"),
    LAYER + "post_attention_layernorm.weight": ("{}/post_attention_norm/scale", "as it is"),
    LAYER + "pre_feedforward_layernorm.weight": ("{}/pre_ffw_norm/scale", "as it is"),
    LAYER + "post_feedforward_layernorm.weight": ("{}/post_ffw_norm/scale", "as it is"),
    LAYER + "self_attn.q_proj.weight": ("{}/attn/q_einsum/w", "heads"),
    LAYER + "self_attn.k_proj.weight": ("{}/attn/kv_einsum/w[0]", "heads"),  # [0]: the first of several, stacked
    LAYER + "self_attn.v_proj.weight": ("{}/attn/kv_einsum/w[1]", "heads"),
    LAYER + "self_attn.o_proj.weight": ("{}/attn/attn_vec_einsum/w", "out"),
    LAYER + "self_attn.q_norm.weight": ("{}/attn/_query_norm/scale", "as it is"),
    LAYER + "self_attn.k_norm.weight": ("{}/attn/_key_norm/scale", "as it is"),
    LAYER + "mlp.gate_proj.weight": ("{}/mlp/gating_einsum/w[0]", "as it is"),
    LAYER + "mlp.up_proj.weight": ("{}/mlp/gating_einsum/w[1]", "as it is"),
    LAYER + "mlp.down_proj.weight": ("{}/mlp/linear/w", "out"),
}
GATES = {
    LAYER + "mlp.gate_proj.weight": ("{}/mlp/gating_einsum/w[0]", "in"),
    LAYER + "mlp.up_proj.weight": ("{}/mlp/gating_einsum/w[1]", "in"),
}
GEMMA2 = GEMMA3 | GATES
GEMMA = {hf: row for hf, row in GEMMA2.items() if "feedforward" not in hf} | {
    LAYER + "post_attention_layernorm.weight": ("{}/pre_ffw_norm/scale", "as it is"),  # the Hub's name of the second norm
}


def _t5(stack: str, layers: Mapping[str, tuple[str, str, str]]) -> Iterator[tuple[str, tuple[str, str]]]:
    """A stack of T5X: {number within a block: (name here, name there, its norm there)}."""
    for number, (here, there, norm) in layers.items():
        prefix = f"{stack}.block.{{}}.layer.{number}."
        yield prefix + "layer_norm.weight", (f"{stack}/{{}}/{norm}_layer_norm/scale", "as it is")
        attention = {"q": "query", "k": "key", "v": "value", "o": "out"}
        names = {n: n for n in ("wi", "wi_0", "wi_1", "wo")} if there == "mlp" else attention
        for a, b in names.items():
            yield f"{prefix}{here}.{a}.weight", (f"{stack}/{{}}/{there}/{b}/kernel", "in")
    yield f"{stack}.final_layer_norm.weight", (f"{stack}/{stack}_norm/scale", "as it is")
    bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    yield bias, (f"{stack}/relpos_bias/rel_embedding", "in")


ENCODER_LAYERS = {"0": ("SelfAttention", "attention", "pre_attention"), "1": ("DenseReluDense", "mlp", "pre_mlp")}
DECODER_LAYERS = {
    "0": ("SelfAttention", "self_attention", "pre_self_attention"),
    "1": ("EncDecAttention", "encoder_decoder_attention", "pre_cross_attention"),
    "2": ("DenseReluDense", "mlp", "pre_mlp"),
}
T5X = {
    "shared.weight": ("token_embedder/embedding", "as it is"),
    "lm_head.weight": ("decoder/logits_dense/kernel", "in"),
    **dict(_t5("encoder", ENCODER_LAYERS)),
    **dict(_t5("decoder", DECODER_LAYERS)),
}


class Layout(NamedTuple):
    """A library's layout.

    Attributes:
      table: {name on the Hub: (name there, turn)}.
      layer: how it writes the number of a layer; without "{}" one array holds all layers.
      axis: of the layers in such an array.
    """

    table: Mapping[str, tuple[str, str]]
    layer: str
    axis: int | None = None


LAYOUTS = {
    "maxtext": Layout(DECODER, "layers_{}"),
    "maxtext_stacked": Layout(DECODER, "layers", 1),
    "maxtext_llama": Layout(LLAMA, "layers_{}"),
    "maxtext_llama_stacked": Layout(LLAMA, "layers", 1),
    "gemma": Layout(GEMMA, "layer_{}"),
    "gemma2": Layout(GEMMA2, "layer_{}"),
    "gemma3": Layout(GEMMA3, "layer_{}"),
    "t5x": Layout(T5X, "layers_{}"),
}
AROUND = re.compile(r"^(?P<before>(?:(?:params|target|model|transformer|base)/)*)(?P<name>.*?)(?P<after>(?:/value)?)$")
"""Collections that a tree may stand in, and what stands after a name: they are kept."""


class Found(NamedTuple):
    """A tensor of the Hub inside a leaf elsewhere: which layer of it (or None), which of several, how it is turned."""

    hf: str
    leaf: str
    layer: int | None
    part: int | None
    turn: str


def bare(name: str) -> str:
    """A name without collections around it."""
    found = AROUND.match(name)
    return found["name"] if found else name


@functools.cache
def _patterns(layout: str) -> tuple[tuple[re.Pattern, str, int | None, str], ...]:
    """(pattern of a bare name, name on the Hub, part, turn) for each row."""
    kind, found = LAYOUTS[layout], []
    for hf, (there, turn) in kind.table.items():
        name, _, part = there.partition("[")
        layer = kind.layer.replace("{}", r"(\d+)") if "{}" in kind.layer else kind.layer
        pattern = re.escape(name.removesuffix("/w")).replace(r"\{\}", layer) + ("(?:/w)?" if name.endswith("/w") else "")
        found.append((re.compile(pattern), hf, int(part[0]) if part else None, turn))
    return tuple(found)


def find(source: Source, layout: str) -> list[Found]:
    """Every tensor of the Hub's layout that lies in a source of another."""
    kind, found = LAYOUTS[layout], []
    for leaf, header in source.leaves.items():
        name = bare(leaf)
        for pattern, hf, part, turn in _patterns(layout):
            match = pattern.fullmatch(name)
            if match is None:
                continue
            if "{}" not in hf:
                found.append(Found(hf, leaf, None, part, turn))
            elif kind.axis is None:
                found.append(Found(hf.format(match[1]), leaf, None, part, turn))
            else:
                layers = header.shape[min(kind.axis, len(header.shape) - 1)]
                found += [Found(hf.format(i), leaf, i, part, turn) for i in range(layers)]
    return found


def layout_of(source: Source) -> str:
    """The layout that a source is in: "hf" where no other fits every one of its names. State of an optimiser does not count."""
    names = [n for n in source.leaves if not STATE.match(n)]
    if not any("/" in n for n in names):  # all layouts of `LAYOUTS` have paths
        return "hf"
    known = lambda layout, name: any(pattern.fullmatch(bare(name)) for pattern, *_ in _patterns(layout))
    fits = [layout for layout in LAYOUTS if names and all(known(layout, n) for n in names)]
    if any(f.startswith("maxtext") for f in fits):  # of the same names: Llama's, without norms and biases, is turned otherwise
        plain = not any(re.search(r"self_attention/(?:(?:query|key)_norm|\w+/bias)", n) for n in names)
        fits = [f for f in fits if ("llama" in f) == plain]
    if "gemma3" in fits:  # of the same names: its gates are turned, and the first has fewer norms
        gates = next((source.leaves[n].shape[1:] for n in names if "gating_einsum" in n), ())
        turned = any(source.leaves[n].shape == gates for n in names if "mlp/linear" in n)
        fits = ["gemma3"] if turned else ["gemma" if "gemma" in fits else "gemma2"]
    return fits[0] if fits else "hf"


def to_hub(source: Source, layout: str, turns: Mapping[str, Turn] = TURNS) -> Source:
    """A source in the Hub's layout; leaves are turned as they are read: `TURNS` for weights, `INFORMATION` for Fisher's."""
    if layout == "hf":
        return source
    axis = LAYOUTS[layout].axis
    leaves = {}
    for f in find(source, layout):
        header = source.leaves[f.leaf]

        def back(x: np.ndarray, f: Found = f) -> np.ndarray:
            if f.layer is not None:
                x = np.take(x, f.layer, axis=min(axis or 0, x.ndim - 1))
            return np.ascontiguousarray(turns[f.turn].back(x if f.part is None else x[f.part]))

        shape = header.shape
        if f.layer is not None:
            along = min(axis or 0, len(shape) - 1)
            shape = (*shape[:along], *shape[along + 1 :])
        shape = turns[f.turn].shape(shape if f.part is None else shape[1:])
        note = f"{layout}: {f.leaf} {f.layer} {f.part} {f.turn}{'' if turns is TURNS else ' of information'}"
        leaves[f.hf] = Derived(Leaf(shape, header.dtype), ((source, f.leaf),), back, note)
    view = derived(source, leaves)
    return renamed(view, {n: n for n in leaves})


def from_hub(source: Source, layout: str, like: Source, turns: Mapping[str, Turn] = TURNS) -> Source:
    """A source of the Hub's layout with the leaves of another one, which says their names and shapes.

    Raises:
      ValueError: tensors that the source lacks.
    """
    if layout == "hf":
        return source
    axis = LAYOUTS[layout].axis
    by_leaf: dict[str, list[Found]] = {}
    for f in find(like, layout):
        by_leaf.setdefault(f.leaf, []).append(f)
    missing = sorted(f.hf for found in by_leaf.values() for f in found if f.hf not in source.leaves)
    if missing:
        raise ValueError(f"{source.name} lacks {missing[0]}{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}.")
    leaves = {}
    for leaf, found in by_leaf.items():
        header = like.leaves[leaf]

        def there(*arrays: np.ndarray, found: list[Found] = found, header: Leaf = header) -> np.ndarray:
            along = min(axis or 0, len(header.shape) - 1)
            out = np.empty(header.shape, arrays[0].dtype)
            for f, y in zip(found, arrays, strict=True):
                block = out if f.layer is None else np.moveaxis(out, along, 0)[f.layer]
                block = block if f.part is None else block[f.part]
                block[...] = turns[f.turn].there(y, block.shape)
            return out

        dtype = source.leaves[found[0].hf].dtype
        inputs = tuple((source, f.hf) for f in found)
        note = f"to {layout}: {leaf}{'' if turns is TURNS else ' of information'}"
        leaves[leaf] = Derived(Leaf(header.shape, dtype, None, header.path), inputs, there, note)
    view = derived(source, leaves)
    return renamed(view, {n: n for n in like.leaves if n in leaves})


def grams_to_hub(grams: Source, layout: str, parent: Source) -> Source:
    """Gram matrices of the inputs of a layout's leaves, under the names of the Hub: turns are of outputs, or keep the order of
    inputs, and so a matrix (n, n) stays as it is. Of a leaf of several tensors it is that of each; of one of all layers there
    is a matrix for each, the layers first: (layers, n, n).

    Raises:
      ValueError: all layers lie in one array, and the matrices do not.
    """
    if layout == "hf":
        return grams
    names: dict[str, str] = {}
    leaves: dict[str, Derived] = {}
    for f in find(parent, layout):
        if f.leaf not in grams.leaves:
            continue
        header = grams.leaves[f.leaf]
        if f.layer is None:
            names[f.hf] = f.leaf
            continue
        axis = min(LAYOUTS[layout].axis or 0, len(parent.leaves[f.leaf].shape) - 1)
        layers = parent.leaves[f.leaf].shape[axis]
        if len(header.shape) != 3 or header.shape[0] != layers:
            need = f"holds {layers} layers, and its Gram matrices must be ({layers}, n, n), the layers first"
            raise ValueError(f"statistics {grams.name}: {f.leaf} {need}; got {list(header.shape)}")
        leaf, take = Leaf(header.shape[1:], header.dtype), lambda g, i=f.layer: g[i]
        leaves[f.hf] = Derived(leaf, ((grams, f.leaf),), take, f"{layout}: Gram matrix {f.layer} of {f.leaf}")
    return renamed(derived(grams, leaves), names | {n: n for n in leaves})


def grams_from_hub(grams: Source, layout: str, like: Source) -> Source:
    """Gram matrices under the names of the Hub, under those of a layout whose leaves the matrices of a layer are.

    Raises:
      ValueError: a leaf there holds several matrices, or none.
    """
    if layout == "hf":
        return grams
    names: dict[str, str] = {}
    for f in find(like, layout):
        if f.hf not in grams.leaves:
            continue
        shape = like.leaves[f.leaf].shape
        if f.layer is not None or f.part is not None or len(shape) != 2:
            what = f"{f.leaf} of the layout {layout} is {list(shape)} and not one matrix of inputs and outputs"
            raise ValueError(f"statistics {grams.name}: {f.hf} has a Gram matrix, but {what}; merge with layout: hf")
        names[f.leaf] = f.hf
    return renamed(grams, names)


def in_one_layout(sources: Mapping[T, Source], first: T, wanted: str | None) -> tuple[dict[T, Source], str]:
    """Sources in the layout of the first of them, or in the one that is wanted; and that layout.

    Raises:
      ValueError: none of them is in the layout that is wanted; tensors that one lacks.
    """
    layouts = {key: layout_of(source) for key, source in sources.items()}
    target = wanted or layouts[first]
    if set(layouts.values()) == {target}:
        return dict(sources), target
    like = next((sources[key] for key, layout in layouts.items() if layout == target), None)
    if target != "hf" and like is None:
        names = ", ".join(f"{sources[key].name} ({layout})" for key, layout in layouts.items())
        raise ValueError(f"no model of this recipe is in the layout {target}, which would say its shapes; there are {names}.")
    found = {}
    for key, source in sources.items():
        same = layouts[key] == target
        found[key] = source if same else to_hub(source, layouts[key])
        if not same and like is not None:
            found[key] = from_hub(found[key], target, like)
    return found, target
