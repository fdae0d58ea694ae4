"""Converting between layouts and writing text: every layout gives the same model, and the stream the text of `generate`."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmerge import words
from models import decoding, hat, hat_decode, hnet, hnet_decode, load, mrt5, t5
from models.decoder import DecoderConfig
from models.lm import ByteLM
from scripts import convert, families, generate, state

TINY = t5.T5Config(d_model=16, d_kv=4, d_ff=32, num_heads=2, num_layers=2, num_decoder_layers=2, dropout=0.0)
GATED = mrt5.MrT5Config(dataclasses.replace(TINY, softmax1=True), gate_layer=1)


def same(a, b):
    a, b = (load.export(m, lambda path: path) for m in (a, b))
    assert a.keys() == b.keys()
    for name, value in a.items():
        np.testing.assert_array_equal(value, b[name], err_msg=name)


def run(source, target, family, to, **how):
    return convert.convert(convert.Flags(source=source, target=target, family=family, to=to, **how))


def test_round_about_all_layouts_of_byt5(tmp_path):
    model = t5.T5(TINY, rngs=nnx.Rngs(0))
    families.write_model(tmp_path / "a", "byt5", TINY, model, "hf", shard_bytes=20_000)
    said = run(tmp_path / "a", tmp_path / "b", "byt5", "t5x")
    assert "(hf)" in said and "(t5x): byt5, " in said
    run(tmp_path / "b", tmp_path / "c", "byt5", "orbax", scan=True)
    run(tmp_path / "c", tmp_path / "d", "byt5", "hf")
    config, again = families.read_model(tmp_path / "d", "byt5")
    assert dataclasses.replace(config, dropout=0.0) == TINY  # T5X does not keep the dropout
    same(model, again)
    with pytest.raises(ValueError, match="is not empty"):
        run(tmp_path / "a", tmp_path / "b", "byt5", "hf")
    with pytest.raises(ValueError, match="mrt5 has no layout 't5x'; it has hf, orbax"):
        families.write_model(tmp_path / "e", "mrt5", GATED, model, "t5x")


def test_what_training_leaves_is_read(tmp_path):
    model = mrt5.MrT5(GATED, rngs=nnx.Rngs(0))
    state.save_config(tmp_path / "model.json", GATED)
    state.save(tmp_path / "base", state.to_tree(model))
    config, again = families.read_model(tmp_path / "base", "mrt5", scan=True)
    assert config == GATED
    same(model, again)
    run(tmp_path / "base", tmp_path / "hf", "mrt5", "hf")
    assert json.loads((tmp_path / "hf/config.json").read_text())["delete_gate_layer"] == 1


def test_the_stream_is_the_text_of_generate(tmp_path, capsys):
    model = mrt5.MrT5(GATED, rngs=nnx.Rngs(3))
    families.write_model(tmp_path / "m", "mrt5", GATED, model, "orbax")
    flags = generate.Flags(checkpoint=tmp_path / "m", prompt="Größe", length=24, capacity=8)
    text = "".join(generate.generate(flags))
    ids = jnp.asarray(np.append(words.to_ids("Größe"), words.EOS))[None]
    want = jax.jit(lambda: decoding.generate(model, encoded=model.encode(ids, capacity=8), length=24))()
    assert text == words.to_bytes(np.asarray(want.ids[0])).decode("utf-8", "replace")


def test_hidden_spans_are_filled_in(tmp_path):
    """The prompt's marks are the sentinels of training, and the text comes back whole."""
    text = "Größe: a b"
    parts = [p.encode() for p in ("Gr", "e: a", "b")]
    mask = np.isin(np.arange(12), [2, 3, 4, 5, 10])
    inputs, targets = words.corrupt(words.to_ids(text)[None], mask[None])
    assert generate.with_sentinels(parts) == words.to_bytes(inputs[0])
    spelled = lambda row: (words.to_bytes(row[i : i + 1]) for i in range(len(row)))
    assert b"".join(generate.filled(parts, spelled(targets[0]))).decode() == text
    unread = [b"x", b"\xff", b"y", b"\xff", b"z"]  # before the first mark, and after a mark that is not the next
    assert b"".join(generate.filled(parts, iter(unread))) == b"Grye: ab"
    flags = generate.Flags(checkpoint=tmp_path, prompt="a ___", hidden="___", family="byt5")
    for wrong, said in (
        (dict(hidden="..."), "1 to 11 times; it is 0 times"),
        (dict(family="lm"), "is for byt5 and mrt5; got '___' for lm"),
        (dict(hidden=""), "--hidden MARK is for byt5"),
    ):
        with pytest.raises(ValueError, match=said):
            next(generate.generate(dataclasses.replace(flags, **wrong)))
    families.write_model(tmp_path / "m", "byt5", TINY, t5.T5(TINY, rngs=nnx.Rngs(0)), "orbax")
    shown = "".join(generate.generate(dataclasses.replace(flags, checkpoint=tmp_path / "m", prompt="a ___ z", length=3)))
    assert shown.startswith("a ") and shown.endswith(" z")


@pytest.mark.slow
def test_a_language_model_of_raw_bytes_goes_on(tmp_path):
    config = dataclasses.replace(TINY, vocab_size=256)
    model = ByteLM(config, rngs=nnx.Rngs(0))
    got = b"".join(generate.stream("lm", model, b"ab", length=6, temperature=1.0, seed=1))
    assert len(got) == 6 and got != b"".join(generate.stream("lm", model, b"ab", length=6, temperature=1.0, seed=2))
    greedy = decoding.generate(model, jnp.array([[97, 98]]), length=6, eos=None).ids[0]
    assert b"".join(generate.stream("lm", model, b"ab", length=6)) == bytes(greedy.tolist())
    with pytest.raises(ValueError, match="needs a prompt of at least one byte"):
        next(generate.stream("lm", model, b"", length=6))
    with pytest.raises(ValueError, match="deletes nothing"):
        next(generate.stream("lm", model, b"a", length=6, capacity=3))


STACK = dict(d_ff=16, num_heads=2)
HAT = hat.TFreeConfig(
    *(DecoderConfig(width, 1, window=window, **STACK) for width, window in ((8, 16), (16, None), (8, 16))),
    hat.CrossConfig(8, 2, 2), hat.CrossConfig(8, 2, 2), max_word=12,
)  # fmt: skip
HNET = hnet.HNetConfig(("T1", ("T1",), "T1"), width=(8, 16), d_ff=(16, 16), num_heads=(2, 2))
BOTH = [("hat", HAT, hat.TFreeHAT), ("hnet", HNET, hnet.HNet)]


@pytest.mark.slow
@pytest.mark.parametrize("family, config, make", BOTH, ids=["hat", "hnet"])
def test_hierarchies_are_converted_and_streamed(tmp_path, family, config, make):
    model = make(config, rngs=nnx.Rngs(0))
    families.write_model(tmp_path / "hf", family, config, model, "hf")
    run(tmp_path / "hf", tmp_path / "ours", family, "orbax", scan=True)
    found, again = families.read_model(tmp_path / "ours", family)
    same(model, again)
    assert found.to_published() == config.to_published()
    assert json.loads((tmp_path / "hf/config.json").read_text()) == json.loads(json.dumps(config.to_published()))
    prompt, length = b"Hello, wor", 14
    text = b"".join(generate.stream(family, again, prompt, length=length))
    if family == "hat":
        starts = jnp.asarray(hat_decode.starts_so_far(prompt, max_word=12))[None]
        ids = jnp.asarray(list(prompt))[None]
        want = hat_decode.generate(model, ids, starts, jnp.array([len(prompt)]), max_new=length, temperature=0)
        want = want.ids[0, len(prompt) : want.lengths[0]]
    else:
        ids = jnp.asarray([hnet.BOS, *prompt])[None]
        found, lengths = hnet_decode.generate(model, ids, jnp.array([ids.shape[1]]), max_new=length, temperature=0)
        want = found[0, ids.shape[1] : lengths[0]]
    assert text == bytes(want.tolist())


def test_characters_wait_for_their_last_byte():
    pieces = [bytes([b]) for b in "a€ü".encode()] + [b"\xff", b"\xe2", b"\x82"]
    assert list(generate.characters(iter(pieces))) == ["a", "€", "ü", "\ufffd", "\ufffd"]


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no model: neither config\.json"):
        families.layout_of(tmp_path / "nothing")
    with pytest.raises(ValueError, match="--family must be one of byt5, mrt5, lm, hat, hnet; got 'gpt'"):
        run(pathlib.Path("x"), tmp_path / "y", "gpt", "hf")
    with pytest.raises(ValueError, match="must be 1 or more, got 0"):
        next(generate.stream("lm", None, b"a", length=0))
    write = lambda model, prompt=b"hello", **how: next(generate.stream("mrt5", model, prompt, length=1, **how))
    gated, plain = mrt5.MrT5(GATED, rngs=nnx.Rngs(0)), t5.T5(TINY, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="the encoder needs something to read"):
        write(gated, b"", end_mark=False)
    with pytest.raises(ValueError, match=r"\d bytes that stay found no room; make --capacity 1 so much larger"):
        write(gated, capacity=1)
    with pytest.raises(ValueError, match="deletes nothing; leave --capacity out"):
        write(plain, capacity=3)


def test_another_family_is_named(tmp_path):
    (tmp_path / "own").mkdir()
    state.save_config(tmp_path / "own" / "model.json", GATED)
    with pytest.raises(ValueError, match=r"model\.json describes no byt5 .*unexpected keyword"):
        families.read_model(tmp_path / "own", "byt5")
    with pytest.raises(ValueError, match=r"model\.json describes no hat \(KeyError: 'encoder'\)"):
        families.read_model(tmp_path / "own", "hat")
    families.write_model(tmp_path / "hf", "mrt5", GATED, mrt5.MrT5(GATED, rngs=nnx.Rngs(0)), "hf")
    with pytest.raises(ValueError, match=r"config\.json describes no byt5 but a model of family mrt5"):
        families.read_model(tmp_path / "hf", "byt5")
