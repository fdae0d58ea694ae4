"""The Hub as far as a reader asks it, of a folder: commits, listings, and files, of which large ones lie on another host."""

import contextlib
import http.server
import json
import pathlib
import threading
import urllib.parse
from collections.abc import Iterator

FIRST, SECOND = "1" * 40, "2" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """Models in root/COMMIT/org/name. Class attributes are those of one server; `asked` is (path, token shown, range)."""

    root: pathlib.Path
    store: str  # where large files lie
    asked: list[tuple[str, str | None, str | None]]
    refs: dict[str, str]
    gated, private, slow = "org/gated", "org/private", 0

    def do_GET(self):
        shown = self.headers.get("Authorization")
        self.asked.append((self.path, shown, self.headers.get("Range")))
        parts = urllib.parse.urlsplit(self.path).path.removeprefix("/api/models").strip("/").split("/")
        model, revision = "/".join(parts[:2]), urllib.parse.unquote(parts[3])
        if model == "old/name":
            return self._answer(307, b"", Location=self.path.replace("old/name", "org/a"))
        commit = self.refs.get(revision, revision)
        folder = self.root / commit / model
        if type(self).slow:
            type(self).slow -= 1
            return self._answer(429, b"", RateLimit='"resolvers";r=0;t=0')
        if (model == self.private and shown != "Bearer good") or not any(self.root.glob(f"*/{model}")):
            return self._answer(401, b"{}", **{"X-Error-Code": "RepoNotFound"})
        if not folder.is_dir():
            return self._answer(404, b"{}", **{"X-Error-Code": "RevisionNotFound"})
        if self.path.startswith("/api/"):
            names = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file()]
            said = {"id": model, "sha": commit, "siblings": [{"rfilename": n} for n in names]}
            return self._answer(200, json.dumps(said).encode())
        if model == self.gated and shown != "Bearer good":
            return self._answer(403 if shown else 401, b"{}", **{"X-Error-Code": "GatedRepo"})
        file = "/".join(parts[4:])
        if not (folder / file).is_file():
            return self._answer(404, b"", **{"X-Error-Code": "EntryNotFound"})
        if file.endswith(".safetensors") or "/d/" in file:
            signed = f"{self.store}/{commit}/{model}/{file}?signature=1"
            return self._answer(302, b"", Location=signed, **{"X-Linked-Etag": '"x"', "X-Repo-Commit": commit})
        return self._answer(200, (folder / file).read_bytes(), ETag='"y"')

    def _answer(self, status: int, data: bytes, **headers: str) -> None:
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(data))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, format, *args):
        pass


class Store(Hub):
    """Where large files lie: by ranges, for whoever has the address. ETags differ from one answer to the next."""

    sent, expired = 0, 0

    def do_GET(self):
        kind, path = type(self), urllib.parse.urlsplit(self.path).path
        self.asked.append((self.path, self.headers.get("Authorization"), self.headers.get("Range")))
        if kind.expired:
            kind.expired -= 1
            return self._answer(403, b"")
        data = (self.root / path.lstrip("/")).read_bytes()
        start, last = (int(n) for n in self.headers["Range"].removeprefix("bytes=").split("-"))
        part = data[start : last + 1]
        kind.sent += len(part)
        spans = f"bytes {start}-{start + len(part) - 1}/{len(data)}"
        return self._answer(206, part, ETag=str(len(self.asked)), **{"Content-Range": spans})


@contextlib.contextmanager
def serving(root: pathlib.Path) -> Iterator[tuple[str, type[Hub], type[Store]]]:
    """(the Hub's address, its class, that of its store): two servers, while they are needed."""
    store = type("FreshStore", (Store,), {"root": root, "asked": []})
    hub = type("FreshHub", (Hub,), {"root": root, "asked": [], "refs": {"main": FIRST, "refs/pr/1": SECOND}})
    servers = [http.server.ThreadingHTTPServer(("localhost", 0), kind) for kind in (hub, store)]
    here, there = (f"http://localhost:{s.server_address[1]}" for s in servers)
    hub.store = there
    for s in servers:
        threading.Thread(target=s.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield here, hub, store
    finally:
        for s in servers:
            s.shutdown()
            s.server_close()
