"""Parents that are read by ranges from a server: as if they were here, a break is taken up, a server without ranges refused."""

import contextlib
import http.server
import json
import pathlib
import threading

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxmerge import checkpoint, cli, params, recipe
from jaxmerge.checkpoint import _http


class Server(http.server.BaseHTTPRequestHandler):
    """Files of a folder. Class attributes say how it behaves; `sent` counts bytes of answers."""

    root, ranges, cut, refuse, sent, tag = pathlib.Path(), True, 0, 0, 0, "one"

    def do_GET(self):
        kind, path = type(self), self.root / self.path.lstrip("/").split("?")[0]
        if self.path.startswith("/moved/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/moved"))
            self.end_headers()
            return
        if not path.is_file():
            self.send_error(404)
            return
        data, asked = path.read_bytes(), self.headers.get("Range")
        long = asked is not None and len(asked) > len("bytes=0-0")
        if long and kind.refuse:
            kind.refuse -= 1
            self.send_error(503)
            return
        start, stop = 0, len(data)
        if self.ranges and asked:
            start, last = (int(n) for n in asked.removeprefix("bytes=").split("-"))
            stop = min(last + 1, len(data))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("ETag", kind.tag)
        self.end_headers()
        if stop - start > 1000 and kind.cut:
            kind.cut -= 1
            stop = start + (stop - start) // 2 if kind.cut < 100 else start
        kind.sent += stop - start
        with contextlib.suppress(ConnectionError):
            self.wfile.write(data[start:stop])

    def log_message(self, format, *args):
        pass


@pytest.fixture
def server(models, monkeypatch):
    monkeypatch.setattr(_http, "PAUSE", 0.001)
    kind = type("Fresh", (Server,), {"root": models[0]["base"].parent})
    here = http.server.ThreadingHTTPServer(("localhost", 0), kind)
    thread = threading.Thread(target=here.serve_forever, daemon=True)
    thread.start()
    yield f"http://localhost:{here.server_address[1]}", kind
    here.shutdown()
    here.server_close()
    thread.join()


def test_parents_on_a_server(models, server, tmp_path):
    """Folder, file, index and redirection; the output and its receipt are those of local parents."""
    url, kind = server
    paths, trees = models
    root = kind.root / "sharded"
    root.mkdir()
    names = sorted(trees["b"])
    for i, part in enumerate((names[:3], names[3:]), 1):
        save_file({n: trees["b"][n] for n in part}, root / f"model-{i:05d}-of-00002.safetensors")
    where = {n: f"model-{1 + (n in names[3:]):05d}-of-00002.safetensors" for n in names}
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    source = checkpoint.open(f"{url}/moved/sharded/")
    np.testing.assert_array_equal(source.read("big"), trees["b"]["big"])
    before = kind.sent
    np.testing.assert_array_equal(source.read("big", (slice(3, 4), slice(10, 90))), trees["b"]["big"][3:4, 10:90])
    assert kind.sent - before == 160  # bfloat16: no byte beyond
    tx, remote = params.ties(0.3), [f"{url}/a/model.safetensors", f"{url}/sharded"]
    report = checkpoint.merge(tx, f"{url}/base", remote, tmp_path / "out")
    checkpoint.merge(tx, paths["base"], [paths["a"], paths["b"]], tmp_path / "want")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "want/model.safetensors").read_bytes()
    assert report.headers.bytes_read > 0
    hashes = lambda out: sorted(checkpoint.receipt(out)["models"][0]["files"].values())
    assert hashes(tmp_path / "out") == hashes(tmp_path / "want")
    assert not checkpoint.verify(tmp_path / "out", tx).problems
    again = checkpoint.open(f"file://{paths['a']}")  # as buckets are read, through tensorstore
    assert again.files == (f"file://{paths['a']}/model.safetensors",)
    np.testing.assert_array_equal(again.read("big", (slice(1, 3),)), trees["a"]["big"][1:3])
    assert not checkpoint.plan(tx, f"file://{paths['base']}", [again]).problems
    (root / "model.safetensors").write_bytes((kind.root / "a/model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"holds two models: .* name the one that is meant"):
        checkpoint.open(f"{url}/sharded")
    named = checkpoint.open(f"{url}/sharded/model.safetensors.index.json")
    np.testing.assert_array_equal(named.read("big"), trees["b"]["big"])


def test_a_recipe_of_remote_models(models, server, tmp_path, capsys):
    url, kind = server
    (kind.root / "a/config.json").write_text('{"model_type": "llama"}')
    text = f"merge_method: linear\nmodels: [{{model: {url}/a}}, {{model: {url}/b}}]\nparameters: {{weight: 1}}\n"
    (tmp_path / "recipe.yml").write_text(text)
    assert cli.main(["plan", str(tmp_path / "recipe.yml")]) == 0
    assert kind.sent < 0.1 * (kind.root / "a/model.safetensors").stat().st_size  # headers alone
    assert cli.main(["merge", str(tmp_path / "recipe.yml"), str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "llama"
    assert cli.main(["inspect", f"{url}/a"]) == 0
    capsys.readouterr()
    (kind.root / "a/config.json").unlink()
    for wrong, message in (
        (f"{url}/nothing", "none of model.safetensors.index.json, .* only those are read over https"),
        (f"{url}/nothing/model.safetensors", "the server says 404"),
        ("ftp://host/a", r"local paths, the Hub .org/name., https://, gs:// and s3://"),
        (f"{url}/run/{{1..9}}", "folders cannot be listed over https"),
    ):
        with pytest.raises(recipe.RecipeError, match=message):
            recipe.plan(text.replace(f"{url}/b", f'"{wrong}"'))


def test_a_server_that_fails(models, server, tmp_path):
    """Breaks and refusals that pass are not noticed; those that stay are one error, and the merge goes on later."""
    url, kind = server
    read = lambda: checkpoint.open(f"{url}/a").read("big")
    kind.cut, kind.refuse = 3, 2
    np.testing.assert_array_equal(read(), models[1]["a"]["big"])
    assert kind.cut == kind.refuse == 0
    source = checkpoint.open(f"{url}/a")
    kind.cut = 1000
    with pytest.raises(OSError, match=r"the connection broke 5 times at byte \d+ \(it ended early\); 0 of 96000 bytes"):
        source.read("big")
    kind.cut, kind.refuse = 0, 1000
    with pytest.raises(OSError, match="cannot be read: the server says 503"):
        source.read("big")
    kind.refuse, kind.tag = 0, "two"
    with pytest.raises(OSError, match="has changed since its header was read"):
        source.read("big")
    assert read().shape == (96, 500)
    kind.ranges = False
    with pytest.raises(OSError, match="sends whole files only"):
        checkpoint.plan(params.linear(), f"{url}/base", [f"{url}/a"])
    with pytest.raises(OSError, match=r"localhost:9/a.* cannot be read: .*refused"):
        checkpoint.open("http://localhost:9/a")
    with pytest.raises(checkpoint.MergeError, match="safetensors are written to local directories, not to s3://b/out"):
        checkpoint.merge(params.linear(), models[0]["base"], [models[0]["a"]], "s3://b/out")
