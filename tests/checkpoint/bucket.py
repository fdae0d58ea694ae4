"""A bucket of Google Cloud Storage as its JSON API shows it, in memory: what tensorstore asks of one, and no more."""

import contextlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator


class Bucket(http.server.BaseHTTPRequestHandler):
    """Objects by bucket and name; class attributes are those of one server."""

    protocol_version, wbufsize, disable_nagle_algorithm = "HTTP/1.1", -1, True
    objects: dict[tuple[str, str], tuple[bytes, int]]
    lock: threading.Lock
    read = 0  # bytes
    changes, limit = 0, 10**9  # objects written and removed; of how many it allows

    def do_GET(self):
        bucket, key, asked = self._asked()
        if not key:
            return self._list(bucket, asked)
        if (bucket, key) not in self.objects:
            return self._answer(404, b"{}")
        data, generation = self.objects[bucket, key]
        if asked.get("alt") != "media":
            return self._answer(200, json.dumps(self._describe(bucket, key)).encode())
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
        bucket, _, asked = self._asked()
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        assert asked.get("uploadType") == "media", self.path
        if self._refused():
            return self._answer(403, b"{}")
        at = bucket, asked["name"]
        with self.lock:
            generation = self.objects.get(at, (b"", 0))[1]
            if int(asked.get("ifGenerationMatch", generation)) != generation:
                return self._answer(412, b"{}")
            self.objects[at] = data, generation + 1
        return self._answer(200, json.dumps(self._describe(*at)).encode())

    def do_DELETE(self):
        bucket, key, _ = self._asked()
        if self._refused():
            return self._answer(403, b"{}")
        self._answer(404 if self.objects.pop((bucket, key), None) is None else 204, b"")

    def _list(self, bucket: str, asked: dict[str, str]) -> None:
        first, stop = asked.get("startOffset", ""), asked.get("endOffset", "\uffff")
        names = sorted(n for b, n in self.objects if b == bucket and first <= n < stop)
        self._answer(200, json.dumps({"items": [self._describe(bucket, n) for n in names]}).encode())

    def _refused(self) -> bool:
        with self.lock:
            type(self).changes += 1
            return self.changes > self.limit

    def _describe(self, bucket: str, name: str) -> dict[str, str]:
        data, generation = self.objects[bucket, name]
        return {"name": name, "size": str(len(data)), "generation": str(generation)}

    def _asked(self) -> tuple[str, str, dict[str, str]]:
        """(bucket, object or "", what else)."""
        path, _, query = self.path.partition("?")
        bucket, _, key = path.partition("/b/")[2].partition("/o")
        return bucket, urllib.parse.unquote(key.removeprefix("/")), dict(urllib.parse.parse_qsl(query))

    def _answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)
            self.wfile.flush()

    def log_message(self, format, *args):
        pass


@contextlib.contextmanager
def serving() -> Iterator[tuple[str, type[Bucket]]]:
    """(its address, its class): a server, while it is needed."""
    kind = type("Fresh", (Bucket,), {"objects": {}, "lock": threading.Lock()})
    server = type("Server", (http.server.ThreadingHTTPServer,), {"request_queue_size": 128})
    here = server(("localhost", 0), kind)
    threading.Thread(target=here.serve_forever, daemon=True).start()
    try:
        yield f"http://localhost:{here.server_address[1]}", kind
    finally:
        here.shutdown()
        here.server_close()
