"""Pictures of what byte models do: marks by byte and by character, one page for several models."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmerge import words
from models.decoder import ByteDecoder, DecoderConfig
from models.hat import HATConfig
from models.hnet import HNet, HNetConfig
from models.mrt5 import MrT5Config
from models.t5 import T5Config
from scripts import bytes_models, show_bytes, state
from scripts.bytes_views import View, characters, read, splitter, views

SMALL = DecoderConfig(16, 1, 2, 16)
T5 = T5Config(16, 8, 16, 2, 2, 1, softmax1=True, dropout=0.0)
CONFIGS = {
    "mrt5": MrT5Config(T5, 1),
    "plain": SMALL,
    "hat": HATConfig(SMALL, SMALL, SMALL, max_word=12),
    "h-net": HNetConfig(("t1", ("t1", ("t1",), "t1"), "t1"), (16,) * 3, (0,) * 3, (2,) * 3, ratios=(2.0, 2.0)),
}
TEXT = "Grüße & <b>\n".encode() + b"\xff" + "漢字 end of it, at last. ".encode() * 2


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of each family, as compare_bytes leaves them."""
    out = tmp_path_factory.mktemp("saved")
    for name, config in CONFIGS.items():
        (out / name).mkdir()
        state.save(out / name / "params", state.to_tree(bytes_models.build(config, nnx.Rngs(0))))
        bytes_models.save_config(out / name / "model.json", config)
    (out / "page.txt").write_bytes(TEXT)
    return out


def test_one_page_of_all(saved, capsys):
    flags = show_bytes.Flags(
        tuple(saved / name / "params" for name in CONFIGS),
        ("hat",),
        saved / "page.html",
        saved / "page.txt",
        inputs=32,
        patch=3.0,
    )
    show_bytes.main(flags)
    text, columns = show_bytes.show(flags)
    assert text == TEXT and [c.kind for c in columns] == ["words", "deletion"] + ["words"] * 4
    assert [c.title.split(":")[0] for c in columns] == [
        "the hat rule", "mrt5", "plain", "hat", "h-net, stage 1", "h-net, stage 2"
    ]  # fmt: skip
    html = flags.out.read_text()
    assert html.count("<section>") == 6 and "&lt;b&gt;" not in html and "&lt;" in html
    for column in re.findall(r"<pre[^>]*>(.*?)</pre>", html, re.S):
        assert len(re.findall("<span", column)) == len(TEXT.decode("utf-8", "replace"))
    assert not re.search(r'(src|href)="', html)  # nothing from elsewhere
    printed = capsys.readouterr().out
    assert "deleted" in printed and "bytes each" in printed
    inner, outer = columns[5].marks, columns[4].marks
    assert not (inner & ~outer).any() and outer[::32].all() and inner[::32].all()  # a piece begins with a chunk


def test_marks_are_the_models_own(saved):
    ids = np.frombuffer(TEXT, np.uint8).astype(np.int32)[None, :32]
    model = show_bytes.load(saved / "h-net" / "params")
    assert isinstance(model, HNet)
    starts = jax.jit(lambda ids: model(ids)[1][0].routing.starts)(jnp.asarray(ids))
    np.testing.assert_array_equal(next(views("x", model, TEXT[:32], inputs=32, patch=3.0)).marks, starts[0])
    mrt5 = show_bytes.load(saved / "mrt5" / "params")
    (view,) = views("x", mrt5, TEXT, inputs=40, patch=3.0)
    gate = jax.jit(lambda ids: mrt5.encode(ids).gate)(jnp.asarray(ids) + words.OFFSET)[0]
    (short,) = views("x", mrt5, TEXT[:32], inputs=32, patch=3.0)
    np.testing.assert_allclose(short.values, gate, rtol=1e-5)
    assert len(view.marks) == len(TEXT) and not np.allclose(view.values[:32], short.values)  # it sees more
    plain = show_bytes.load(saved / "plain" / "params")
    assert isinstance(plain, ByteDecoder)
    (view,) = views("x", plain, TEXT, inputs=len(TEXT), patch=3.0)
    ids = jnp.asarray(np.frombuffer(TEXT, np.uint8).astype(np.int32))[None]
    entropy = jax.jit(lambda ids: words.byte_entropy(plain(ids)))(ids)[0]
    np.testing.assert_allclose(view.values[1:], entropy[:-1], rtol=1e-5)
    assert len(TEXT) / view.marks.sum() == pytest.approx(3, abs=0.5)


def test_padding_is_no_text():
    seen = []
    read(lambda ids, docs: seen.append(docs.shape) or docs, b"abcde", 4)
    assert seen == [(2, 4)]
    assert read(lambda ids, docs: ids, b"abcde", 4).tolist() == list(b"abcde")
    assert read(lambda ids, docs: jnp.sum(docs < 0, keepdims=True) + 0 * ids, b"abcde", 4).tolist() == [3] * 5


def test_characters_of_several_bytes():
    text = "aß漢".encode()
    gone = View("", "deletion", np.array([1, 1, 0, 1, 1, 1], bool), np.arange(6.0), "gate")
    assert characters(text, gone) == [("a", True, 0.0), ("ß", False, 2.0), ("漢", True, 5.0)]
    begins = dataclasses.replace(gone, kind="words", marks=np.array([1, 0, 1, 0, 0, 0], bool))
    assert [marked for _, marked, _ in characters(text, begins)] == [True, True, False]
    assert gone.summary == "83.3% of 6 bytes deleted" and begins.summary == "2 words, 3.00 bytes each"
    assert splitter(b"two words", "whitespace").marks.sum() == 2
    assert show_bytes.coloured(text, gone).plain == "aß漢" and show_bytes.coloured(text, begins).plain == "|a|ß漢"
    assert show_bytes.coloured(text, gone, strikes=False).plain == "⟦a⟧ß⟦漢⟧"  # in a file nothing can be struck through


def test_bad_flags(saved):
    with pytest.raises(ValueError, match="nothing to show"):
        show_bytes.show(show_bytes.Flags())
    with pytest.raises(ValueError, match="there is no file"):
        show_bytes.show(show_bytes.Flags((), ("hat",), file=saved / "absent"))
    (saved / "t5").mkdir()
    bytes_models.save_config(saved / "t5" / "model.json", T5)
    assert json.loads((saved / "t5" / "model.json").read_text())["family"] == "T5Config"
    state.save(saved / "t5" / "params", state.to_tree(bytes_models.build(T5, nnx.Rngs(0))))
    with pytest.raises(ValueError, match="t5 is a T5, which neither deletes bytes nor makes words"):
        show_bytes.show(show_bytes.Flags((saved / "t5" / "params",), file=saved / "page.txt", out=saved / "x.html"))
    (saved / "t5" / "model.json").write_text('{"family": "RNN"}')
    with pytest.raises(ValueError, match="names the family 'RNN'; known are"):
        show_bytes.load(saved / "t5" / "params")
