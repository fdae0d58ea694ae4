"""A bucket of Google Cloud Storage as its JSON API shows it, in memory: what tensorstore asks of one, and no more."""

import contextlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator


class Bucket(http.server.BaseHTTPRequestHandler):
    """Objects by name, whatever the bucket is called; class attributes are those of one server."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, tuple[bytes, int]]
    lock: threading.Lock
    read = written = 0  # bytes

    def do_GET(self):
        path, asked = self._asked()
        _, _, key = path.partition("/o/")
        if not key:
            return self._list(asked)
        found = self.objects.get(urllib.parse.unquote(key))
        if found is None:
            return self._answer(404, b"{}")
        data, generation = found
        if asked.get("alt") != "media":
            return self._answer(200, json.dumps(self._describe(urllib.parse.unquote(key))).encode())
        first, stop = 0, len(data)
        if span := self.headers.get("Range"):
            a, _, b = span.removeprefix("bytes=").partition("-")
            first, stop = (int(a), min(int(b) + 1 if b else stop, stop)) if a else (max(stop - int(b), 0), stop)
            if first >= len(data):
                return self._answer(416, b"")
        type(self).read += stop - first
        more = {"x-goog-generation": str(generation), "Content-Range": f"bytes {first}-{stop - 1}/{len(data)}"}
        return self._answer(206 if span else 200, data[first:stop], more)

    def do_POST(self):
        path, asked = self._asked()
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        assert path.startswith("/upload/") and asked.get("uploadType") == "media", self.path
        with self.lock:
            generation = self.objects.get(asked["name"], (b"", 0))[1]
            if int(asked.get("ifGenerationMatch", generation)) != generation:
                return self._answer(412, b"{}")
            type(self).written += len(data)
            self.objects[asked["name"]] = data, generation + 1
        return self._answer(200, json.dumps(self._describe(asked["name"])).encode())

    def do_DELETE(self):
        path, _ = self._asked()
        there = self.objects.pop(urllib.parse.unquote(path.partition("/o/")[2]), None)
        self._answer(404 if there is None else 204, b"")

    def _list(self, asked: dict[str, str]) -> None:
        first, stop = asked.get("startOffset", ""), asked.get("endOffset", "\uffff")
        names = sorted(n for n in self.objects if n.startswith(asked.get("prefix", "")) and first <= n < stop)
        self._answer(200, json.dumps({"items": [self._describe(n) for n in names]}).encode())

    def _describe(self, name: str) -> dict[str, str]:
        data, generation = self.objects[name]
        return {"name": name, "size": str(len(data)), "generation": str(generation)}

    def _asked(self) -> tuple[str, dict[str, str]]:
        path, _, query = self.path.partition("?")
        return path, dict(urllib.parse.parse_qsl(query))

    def _answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, format, *args):
        pass


@contextlib.contextmanager
def serving() -> Iterator[tuple[str, type[Bucket]]]:
    """(its address, its class): a server, while it is needed."""
    kind = type("Fresh", (Bucket,), {"objects": {}, "lock": threading.Lock()})
    here = http.server.ThreadingHTTPServer(("localhost", 0), kind)
    threading.Thread(target=here.serve_forever, daemon=True).start()
    try:
        yield f"http://localhost:{here.server_address[1]}", kind
    finally:
        here.shutdown()
        here.server_close()
