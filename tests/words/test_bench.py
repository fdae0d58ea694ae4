"""`scripts.bench.words` runs on any text, without the released splitter."""

import json

from scripts.bench import words as bench


def test_bench_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.bench.meter.pin", lambda: 0)
    monkeypatch.setattr(bench, "released", lambda: None)
    text = tmp_path / "en.txt"
    text.write_text("One line, and\nanother one.\n" * 200)
    bench.main(text=(text,), out=tmp_path / "out", rounds=1, row=512)
    figures = json.loads((tmp_path / "out/words.json").read_text())["texts"]["en"]
    assert 0 <= figures["waste"] < 0.5 and all(figures[name] > 0 for name in ("hat", "unicode", "to_ids", "spans", "pack"))
