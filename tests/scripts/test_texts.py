"""Text of one's own: read where it lies, divided without a byte lost or read twice, refused in one sentence."""

import itertools
import pathlib

import numpy as np
import pytest

from scripts import data, reading, texts

LINES = {
    "ru": "Все люди рождаются свободными и равными в своём достоинстве и правах.\n",
    "zh": "人人生而自由,在尊严和权利上一律平等。",  # no line ends
    "en": "All human beings are born free and equal in dignity and rights.\n",
}


def document(path: pathlib.Path, text: str) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def covered(corpus: data.Corpus) -> dict[pathlib.Path, list[tuple[int, int]]]:
    """The stretches of each file, trained on or held out, in order."""
    pieces = [p for text in (corpus.train, corpus.heldout) for p in text.pieces]  # pyright: ignore
    by_file: dict[pathlib.Path, list[tuple[int, int]]] = {}
    for p in sorted(pieces, key=lambda p: (p.path, p.start)):
        by_file.setdefault(p.path, []).append((p.start, p.start + p.size))
    return by_file


@pytest.mark.parametrize("language", LINES)
@pytest.mark.parametrize("times", [20, 10_000])
def test_stretches_of_one_file(tmp_path, language, times):
    """Each byte is on one side, an eighth is held out, and no character is cut."""
    path = document(tmp_path / "a.txt", LINES[language] * times)
    corpus = texts.load([str(path)])["text"]
    [parts] = covered(corpus).values()
    assert parts[0][0] == 0 and parts[-1][1] == path.stat().st_size
    assert all(a[1] == b[0] for a, b in itertools.pairwise(parts))
    assert len(parts) == (2 if times == 20 else 16)
    assert 0.08 < len(corpus.heldout) / path.stat().st_size < 0.15
    for piece in itertools.chain(corpus.train.pieces, corpus.heldout.pieces):  # pyright: ignore
        text = path.read_bytes()[piece.start : piece.start + piece.size].decode()
        assert language == "zh" or (text.startswith(LINES[language]) and text.endswith("\n"))


def test_pieces_are_the_text_in_one(tmp_path):
    """Slices are those of the pieces joined; windows too."""
    path = document(tmp_path / "a", "abcdefghij")
    pieces = texts.Pieces([texts.Piece(path, *p) for p in ((0, 3), (5, 0), (4, 1), (7, 3))])
    whole = b"abc\n\ne\n\nhij"
    assert len(pieces) == len(whole)
    for a, b in itertools.combinations(range(len(whole) + 1), 2):
        assert pieces[a:b].tobytes() == whole[a:b], (a, b)
    assert pieces[4:2].size == 0 and pieces[-3:].tobytes() == b"hij" and len(texts.Pieces([])) == 0
    array = np.frombuffer(whole, np.uint8)
    draw = lambda text: data.draw(text, np.random.default_rng(0), 5, 4)
    np.testing.assert_array_equal(draw(pieces), draw(array))
    np.testing.assert_array_equal(data.tile(pieces, 3, 6), data.tile(array, 3, 6))
    np.testing.assert_array_equal(data.excerpt(pieces), array)
    assert data.excerpt(np.arange(10_000) % 7, 512).shape == (512,)
    path.write_bytes(b"abc")
    with pytest.raises(ValueError, match="has become shorter"):
        pieces[3:9]


def test_many_documents_are_held_out_whole(tmp_path):
    for i in range(40):
        document(tmp_path / "x" / f"{i % 4}" / f"d {i}.txt", LINES["ru"] * (3 + i % 5))
    document(tmp_path / "x" / ".hidden" / "no.txt", "no")
    document(tmp_path / "x" / "empty.txt", "")
    by = lambda *given: texts.load(list(given))["text"]
    corpus = by(str(tmp_path / "x"))
    assert len(covered(corpus)) == 40 and all(len(parts) == 1 for parts in covered(corpus).values())
    assert 1 / 16 < len(corpus.heldout) / (len(corpus.train) + len(corpus.heldout)) < 1 / 4
    for given in ((str(tmp_path / "x/**/*.txt"),), (str(tmp_path / "x"), str(tmp_path / "x" / "0"))):  # each once
        assert by(*given).heldout.pieces == corpus.heldout.pieces  # pyright: ignore
    document(tmp_path / "x" / "large.txt", LINES["en"] * 20_000)  # most of the text: now stretches
    assert len(covered(by(str(tmp_path / "x")))[tmp_path / "x" / "large.txt"]) > 1


def test_names(tmp_path, monkeypatch):
    en, odd = document(tmp_path / "en.txt", LINES["en"] * 9), document(tmp_path / "a=b.txt", LINES["ru"] * 9)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(texts.load(["a=b.txt", "english=~/en.txt"])) == ["text", "english"]
    assert [texts.absolute(one) for one in ("en.txt", "x=~/en.txt")] == [f"text={en}", f"x={en}"]
    assert texts.load([texts.absolute("a=b.txt")])["text"].train.pieces[0].path == odd  # pyright: ignore


@pytest.mark.parametrize(
    "given, message",
    [
        (["absent.txt"], "no text is called absent.txt, or matches it; give a file, a folder or a quoted glob"),
        (["*.md"], r"no text is called \*.md"),
        (["nothing"], "the folder nothing holds no text"),
        (["empty.txt"], "empty.txt is empty"),
        (["wide.txt"], "wide.txt does not look like text.*turn UTF-16 into UTF-8"),
        (["a=en.txt", "b=en.txt"], "en.txt is given as a and as b"),
    ],
)
def test_what_is_refused(tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    document(tmp_path / "en.txt", LINES["en"])
    document(tmp_path / "empty.txt", "")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "wide.txt").write_bytes("wide".encode("utf-16"))
    with pytest.raises(ValueError, match=message):
        texts.load(given)


def test_too_short_for_a_window(tmp_path):
    path = document(tmp_path / "en.txt", LINES["en"])
    with pytest.raises(ValueError, match=r"en has 56 bytes to train on and 8 held out, too few for windows of 32 and 34; give"):
        data.check_room(texts.load([f"en={path}"]), 32, 34)


def test_a_run_remembers_its_text(tmp_path):
    path = document(tmp_path / "en.txt", LINES["en"] * 50)
    text = (texts.absolute(f"en={path}"),)
    read = reading.Reading(text, 32, 0.3, 6.0, reading.sizes(reading.corpora(text)))
    reading.save(tmp_path / "data.json", read)
    again = reading.load(tmp_path / "data.json")
    assert again == read and not reading.differences(read, again) and list(again.corpora()) == ["en"]
    document(path, LINES["en"] * 51)
    with pytest.raises(ValueError, match="the text has changed since training"):
        again.corpora()
    with pytest.raises(ValueError, match=r"data\.json is missing"):
        reading.load(tmp_path / "absent" / "data.json")
