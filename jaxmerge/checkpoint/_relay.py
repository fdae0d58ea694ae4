"""Files of the Hub for tensorstore: it follows no redirections, and would write our token into its errors.

So it reads from a server of this process, on this machine alone, that hands out ranges of what `_http` reads. The address has a
word in it that nobody else knows, since what may be read here need not be read by all who share the machine.
"""

import contextlib
import functools
import http.server
import os
import re
import secrets
import threading
import urllib.parse

from jaxmerge.checkpoint import _http, _hub

HERE = "127.0.0.1"
RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_FOLDERS: dict[str, str] = {}
"""{word: the address of a commit's folder}"""
_FAILED: dict[str, str] = {}
"""{word: why the last read from it failed}"""


def folder(address: str) -> str:
    """Where a folder at a commit of the Hub is read on this machine; the address ends in "/"."""
    word = next((w for w, known in _FOLDERS.items() if known == address), None) or secrets.token_urlsafe(24)
    _FOLDERS[word] = address
    return f"http://{HERE}:{_port()}/{word}/"


def failure(address: str) -> str | None:
    """Why the last read from a folder failed, if one has."""
    return next((_FAILED[w] for w, known in _FOLDERS.items() if known.startswith(address) and w in _FAILED), None)


@functools.lru_cache(maxsize=1)
def _port() -> int:
    server = http.server.ThreadingHTTPServer((HERE, 0), _Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True, name="jaxmerge relay").start()
    for name in ("no_proxy", "NO_PROXY"):  # what lies here is not asked of a proxy
        if HERE not in (known := os.environ.get(name, "")) and (known or name == "no_proxy"):
            os.environ[name] = f"{known},{HERE}".lstrip(",")
    return server.server_address[1]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        word, _, inside = self.path.lstrip("/").partition("/")
        address, commit = _FOLDERS.get(word), None
        if address is not None:
            commit = _hub.at(address + urllib.parse.unquote(inside))
        if commit is None or commit.inside not in _hub.listing(*commit[:3]):
            return self._answer(404, b"")
        try:
            answer = _part(f"{address}{urllib.parse.quote(urllib.parse.unquote(inside))}", self.headers.get("Range"))
            _FAILED.pop(word, None)
        except OSError as e:
            _FAILED[word] = str(e)
            answer = 400, str(e).encode(), None  # asked again, it would be the same
        self._answer(*answer)

    def _answer(self, status: int, data: bytes, span: str | None = None) -> None:
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            if span is not None:
                self.send_header("Content-Range", span)
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _part(url: str, asked: str | None) -> tuple[int, bytes, str | None]:
    """A file, or the range that is asked for: from here to there, to the end, or the last so many bytes."""
    size = _http.file(url).size
    found = RANGE.fullmatch(asked or "")
    if found is None:
        return 200, _http.read(url, 0, size), None
    first, last = found[1], found[2]
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if start >= stop:
        return 416, b"", f"bytes */{size}"
    return 206, _http.read(url, start, stop - start), f"bytes {start}-{stop - 1}/{size}"
