"""The families of models that `scripts.convert` and `scripts.generate` know: one row each, and a new family is a new row.

A model lies on disk in one of three layouts: Hugging Face's directory (config.json and weights), a T5X checkpoint, or our own:
`model.json` and an Orbax tree of parameters (in `params`, or where training put it).
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmerge import words
from models import decoding, hat, hat_decode, hnet, hnet_decode, load, mrt5, published, t5, t5x
from models.decoder import DecoderConfig, Places, RopeScaling
from models.fold import is_stacked, layer_paths
from models.lm import ByteLM
from models.mamba2 import MambaConfig
from scripts import state

Layout = Literal["hf", "t5x", "orbax"]
Step = Callable[[jax.Array, Any], tuple[jax.Array, Any]]
"""(ids of one row, cache) -> (logits of the next id, cache)."""


class Family(NamedTuple):
    """What the scripts need to know of a family.

    Attributes:
      kind: the class of its configs.
      config: from the fields of a model.json.
      make: a model of a config; takes `scan=`, `dtype=` and `rngs=`.
      names: for each layout, the function that maps our paths to its names, given the config.
      start: reads a prompt and returns the logits of the first new id, a cache and a `Step`; see `stream`.
      read_config, write_config: config.json, where the family has a published layout.
      stop: the byte that ends a text, where ids are bytes.
    """

    kind: type
    config: Callable[[dict], Any]
    make: Callable[..., Any]
    names: dict[Layout, Callable[[Any], Callable[[str], str]]]
    start: Callable[..., tuple[jax.Array, Any, Step]]
    read_config: Callable[[pathlib.Path], Any] | None = None
    write_config: Callable[[Any], dict] | None = None
    stop: int | None = None


def read_model(path: pathlib.Path, family: str, *, tied: published.Tied = "refuse", **how: Any) -> tuple[Any, Any]:
    """A model and its config, from whatever layout lies at `path`."""
    f, found = FAMILIES[family], layout_of(path)
    if found == "t5x":
        if "t5x" not in f.names:
            raise ValueError(f"read_model: {path} is a T5X checkpoint, and {family} has none; known are byt5's.")
        tensors = t5x.read_t5x(path)
        config = published.t5_config_of(tensors, t5.T5Config())
    elif found == "hf":
        if (read := f.read_config) is None:
            raise ValueError(f"read_model: {path} is in Hugging Face's layout, and {family} has none.")
        config, tensors = described(path / "config.json", family, lambda: read(path)), load.read(path)
        if family in ("byt5", "mrt5"):
            tensors = published.with_head(tensors, tied=tied)
    else:
        own = path / "model.json"
        file, tree = (own, path / "params") if own.exists() else (path.parent / "model.json", path)
        config = described(file, family, lambda: f.config(json.loads(file.read_text())))
        model = published.blank(f.make, config, **how)
        fill(model, read_orbax(tree))
        return config, model
    model = published.blank(f.make, config, **how)
    load.load(model, tensors, f.names[found](config))
    return config, model


def described(file: pathlib.Path, family: str, read: Callable[[], Any]) -> Any:
    """The config that a file describes, which must be one of this family."""
    kind = FAMILIES[family].kind
    try:
        config = read()
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"read_model: {file} describes no {family} ({type(error).__name__}: {error}).") from None
    if not isinstance(config, kind):
        others = ", ".join(name for name, f in FAMILIES.items() if isinstance(config, f.kind))
        raise ValueError(f"read_model: {file} describes no {family} but a model of family {others}.")
    return config


def write_model(
    path: pathlib.Path, family: str, config: Any, model: Any, to: Layout, *, shard_bytes: int | None = None
) -> None:
    """The inverse of `read_model`."""
    f = FAMILIES[family]
    if to != "orbax" and to not in f.names:
        raise ValueError(f"write_model: {family} has no layout {to!r}; it has {', '.join([*f.names, 'orbax'])}.")
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"write_model: {path} is not empty; choose another place.")
    if to == "t5x":
        t5x.write_t5x(path, load.export(model, f.names["t5x"](config)))
        return
    path.mkdir(parents=True, exist_ok=True)
    if to == "hf":
        assert f.write_config is not None
        load.write(path / "model.safetensors", load.export(model, f.names["hf"](config)), shard_bytes=shard_bytes)
        (path / "config.json").write_text(json.dumps(f.write_config(config), indent=2) + "\n")
    else:
        (path / "model.json").write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n")
        state.save(path / "params", state.to_tree(model))


def layout_of(path: pathlib.Path) -> Layout:
    """Which layout lies there."""
    if (path / "checkpoint").is_file() or any(path.glob("target.*")):
        return "t5x"
    if (path / "config.json").exists():
        return "hf"
    if (path / "model.json").exists() or (path.is_dir() and (path.parent / "model.json").exists()):
        return "orbax"
    raise ValueError(
        f"layout_of: {path} holds no model: neither config.json (Hugging Face), nor checkpoint and target.* (T5X), nor "
        "model.json in it or beside it (ours)."
    )


def read_orbax(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The leaves of an Orbax tree by dotted name, on the host."""
    from jaxmerge import checkpoint

    source = checkpoint.open(path.absolute())
    name = lambda path: ".".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
    return {name(leaf.path or (n,)): source.read(n) for n, leaf in source.leaves.items()}


def fill(model: nnx.Module, leaves: dict[str, np.ndarray]) -> None:
    """Fill a model's parameters, in place, from our own names, whichever of the two keeps its layers stacked."""
    tensors = {}
    for path, value in leaves.items():
        several = layer_paths(path, value.shape[0]) if is_stacked(path) else [path]
        for name, one in zip(several, value if is_stacked(path) else [value], strict=True):
            turn = path.endswith("kernel") and one.ndim in load.TO_TORCH
            tensors[name] = one.transpose(load.TO_TORCH[one.ndim]) if turn else one
    load.load(model, tensors, lambda path: path)


# --- writing ----------------------------------------------------------------------------------------------------------------


def stepper(model: Any) -> Step:
    """One compiled step of a T5, MrT5 or ByteLM."""
    graph, params = nnx.split(model)
    step = jax.jit(lambda p, ids, cache: decoding.step(nnx.merge(graph, p), ids, cache), donate_argnums=2)

    def one(ids: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        logits, cache = step(params, ids[:, None], cache)
        return logits[:, 0], cache

    return one


def start_encoder_decoder(
    model: Any, prompt: bytes, *, room: int, capacity: int | None = None, end_mark: bool = True
) -> tuple[jax.Array, Any, Step]:
    """The encoder reads the prompt, with the end mark that ByT5's tokeniser adds; the decoder writes from its start."""
    if not (prompt or end_mark):
        raise ValueError("start_encoder_decoder: the encoder needs something to read: a prompt, or the end mark.")
    ids = jnp.asarray(np.append(words.to_ids(prompt), words.EOS) if end_mark else words.to_ids(prompt))[None]
    if not isinstance(model, mrt5.MrT5):
        _no_capacity("start_encoder_decoder", capacity)
    extra: dict[str, Any] = {} if capacity is None else dict(capacity=capacity)
    graph, params = nnx.split(model)

    def begin(p, ids):
        m = nnx.merge(graph, p)
        encoded: Any = m.encode(ids, **extra)
        return decoding.start(m, encoded=encoded, room=room), encoded.plan.overflow if extra else 0

    started, lost = jax.jit(begin)(params, ids)
    if lost:
        raise ValueError(
            f"start_encoder_decoder: {int(lost[0])} bytes that stay found no room; make --capacity {capacity} so much larger."
        )
    return *started, stepper(model)


def start_lm(
    model: Any, prompt: bytes, *, room: int, capacity: int | None = None, end_mark: bool = True
) -> tuple[jax.Array, Any, Step]:
    """The model goes on where the prompt ends. With a table of 256 rows ids are bytes, and there is no end mark."""
    if capacity is not None:
        raise ValueError("start_lm: a byte language model deletes nothing; leave --capacity out.")
    if not prompt:
        raise ValueError("start_lm: a byte language model needs a prompt of at least one byte.")
    offset = 0 if model.embedding.shape[0] == 256 else words.OFFSET
    ids = jnp.asarray(words.to_ids(prompt) - words.OFFSET + offset)[None]
    graph, params = nnx.split(model)
    begin = jax.jit(lambda p, ids: decoding.start(nnx.merge(graph, p), ids, room=room))
    return *begin(params, ids), stepper(model)


def start_hat(
    model: Any, prompt: bytes, *, room: int, capacity: int | None = None, end_mark: bool = True
) -> tuple[jax.Array, Any, Step]:
    """Words end where the released splitter says, which is asked after every byte."""
    _no_capacity("start_hat", capacity)
    if not prompt:
        raise ValueError("start_hat: the released HAT needs a prompt of at least one byte.")
    graph, params = nnx.split(model)
    ids = jnp.asarray(np.frombuffer(prompt, np.uint8).astype(np.int32))[None]
    starts = jnp.asarray(hat_decode.starts_so_far(prompt, max_word=model.c.max_word))[None]
    lengths, size = jnp.array([len(prompt)]), len(prompt) + room + 1
    begin = jax.jit(lambda p, *a: hat_decode.begin(nnx.merge(graph, p), *a, size=size))

    @jax.jit
    def write(p: Any, id: jax.Array, state: Any) -> Any:
        m, all_ = nnx.merge(graph, p), jnp.ones(1, bool)
        state, new = hat_decode.write(m, state, id, all_)
        return jax.lax.cond(new[0] > 0, lambda s: hat_decode.close(m, s, new, all_), lambda s: s, state)

    def one(id: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        state = write(params, id, state)
        return state.logits, state

    state = begin(params, ids, starts, lengths)
    return state.logits, state, one


def start_hnet(
    model: Any, prompt: bytes, *, room: int, capacity: int | None = None, end_mark: bool = True
) -> tuple[jax.Array, Any, Step]:
    """The prompt follows the byte with which the official models begin a text."""
    _no_capacity("start_hnet", capacity)
    graph, params = nnx.split(model)
    ids = jnp.asarray([hnet.BOS, *prompt])[None]
    size = ids.shape[1] + room

    @jax.jit
    def step(p: Any, ids: jax.Array, state: Any, length: jax.Array) -> tuple[jax.Array, Any]:
        m = nnx.merge(graph, p)
        state = hnet_decode.begin(m, 1, size) if state is None else state
        position = length + jnp.arange(ids.shape[1])[None]
        logits, state = hnet_decode.step(m, ids, Places(position, jnp.zeros_like(position)), state)
        return logits[:, -1], (state, length + ids.shape[1])

    logits, cache = step(params, ids, None, jnp.int32(0))
    return logits, cache, lambda id, cache: step(params, id[:, None], *cache)


def _no_capacity(name: str, capacity: int | None) -> None:
    if capacity is not None:
        raise ValueError(f"{name}: this model deletes nothing; leave --capacity out.")


def hat_config(fields: dict[str, Any]) -> hat.TFreeConfig:
    def stack(fields: dict[str, Any]) -> DecoderConfig:
        scaling = fields.pop("rope_scaling")
        return DecoderConfig(rope_scaling=None if scaling is None else RopeScaling(**scaling), **fields)

    encoder, backbone, decoder = (stack(fields[k]) for k in ("encoder", "backbone", "decoder"))
    encoder_cross, decoder_cross = (hat.CrossConfig(**fields[k]) for k in ("encoder_cross", "decoder_cross"))
    return hat.TFreeConfig(encoder, backbone, decoder, encoder_cross, decoder_cross, max_word=fields["max_word"])


def make_hat(config: hat.TFreeConfig, *, scan: bool = False, **how: Any) -> hat.TFreeHAT:
    parts = {k: dataclasses.replace(getattr(config, k), scan=scan) for k in ("encoder", "backbone", "decoder")}
    return hat.TFreeHAT(dataclasses.replace(config, **parts), **how)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


FAMILIES: dict[str, Family] = {
    "byt5": Family(
        kind=t5.T5Config,
        config=lambda fields: t5.T5Config(**fields),
        make=t5.T5,
        names={"hf": lambda config: t5.torch_name, "t5x": lambda config: t5x.t5x_name},
        start=start_encoder_decoder,
        read_config=published.read_config,
        write_config=published.config_to_json,
    ),
    "mrt5": Family(
        kind=mrt5.MrT5Config,
        config=lambda fields: mrt5.MrT5Config(**{**fields, "base": t5.T5Config(**fields["base"])}),
        make=mrt5.MrT5,
        names={"hf": lambda config: functools.partial(mrt5.torch_name, gate_layer=config.gate_layer)},
        start=start_encoder_decoder,
        read_config=published.read_config,
        write_config=published.config_to_json,
    ),
    "lm": Family(kind=t5.T5Config, config=lambda fields: t5.T5Config(**fields), make=ByteLM, names={}, start=start_lm),
    "hat": Family(
        kind=hat.TFreeConfig,
        config=hat_config,
        make=make_hat,
        names={"hf": lambda config: hat.torch_name},
        start=start_hat,
        read_config=lambda path: hat.TFreeConfig.published(read_json(path)),
        write_config=lambda config: config.to_published(),
        stop=hat.RELEASED_STOP,
    ),
    "hnet": Family(
        kind=hnet.HNetConfig,
        config=lambda fields: hnet.HNetConfig(**fields | dict(mamba=MambaConfig(**fields["mamba"]))),
        make=lambda config, scan=False, **how: hnet.HNet(dataclasses.replace(config, scan=scan), **how),
        names={"hf": lambda config: functools.partial(hnet.torch_name, layout=config.layout)},
        start=start_hnet,
        read_config=lambda path: hnet.HNetConfig.published(
            fields := read_json(path), ratios=(6.0,) if hnet.depth_of(fields["arch_layout"]) == 2 else (3.0, 3.0)
        ),
        write_config=lambda config: config.to_published(),
        stop=hnet.STOP,
    ),
}
