"""Ranges of bytes over http and https: connections that break are taken up where they broke, servers without ranges refused."""

import functools
import hashlib
import http.client
import re
import socket
import ssl
import time
import urllib.error
import urllib.request
from typing import Any, NamedTuple

from jaxmerge.checkpoint import _access

TRIES = 5
"""How often a range is asked for before it is given up; without a single byte in between."""
PAUSE = 0.5
"""Seconds before the second try; twice as many before each that follows."""
TIMEOUT = 60.0
PATIENCE = 300.0
"""Seconds that are waited, at most, where a server says how long."""
FRESH = 300
"""Seconds for which the address is used again that a file at a commit was found at."""
STEP = 1 << 20
SMALL = 1 << 24
"""Bytes, at most, of a file at a commit that is taken whole where the server serves no ranges of it."""
GONE = (401, 403, 404, 410)
LATER = (408, 425, 429, 500, 502, 503, 504)


class File(NamedTuple):
    """What a server says of a file: its size, a number that changes when it does (0: it does not say), and whether it serves
    ranges of it."""

    size: int
    stamp: int
    ranges: bool = True


_KNOWN: dict[str, File] = {}
_MOVED: dict[str, tuple[str, float]] = {}
AT_COMMIT = re.compile(r"/resolve/[0-9a-f]{40}/")
"""What lies at a commit never changes."""


def file(url: str) -> File:
    """What is there now; of what lies at a commit, what was there.

    Raises:
      FileNotFoundError: nothing that may be read. OSError: the server cannot be reached, or serves no ranges of bytes.
    """
    if url in _KNOWN and AT_COMMIT.search(url):
        return _KNOWN[url]
    with _answer(url, 0, 1) as answer:
        said = answer.headers.get("Content-Length", "")
        if answer.status != 206 and AT_COMMIT.search(url) and said.isdigit() and int(said) <= SMALL:
            _KNOWN[url] = File(int(said), _stamp(url, answer), ranges=False)
            return _KNOWN[url]
        if answer.status != 206:
            raise OSError(
                f"{url} is on a server that sends whole files only (it ignored the Range of a request); download the "
                "checkpoint, and name the folder where it lies."
            )
        size = answer.headers.get("Content-Range", "").rpartition("/")[2]
        if not size.isdigit():
            raise OSError(f"{url}: the server does not say how long the file is; download it.")
        _KNOWN[url] = File(int(size), _stamp(url, answer))
    return _KNOWN[url]


def exists(url: str) -> bool:
    """Whether a file is there that may be read."""
    try:
        _answer(url, 0, 1).close()
    except FileNotFoundError:
        return False
    return True


def whole(url: str, timeout: float = TIMEOUT) -> bytes:
    """A small file; no server refuses that."""
    with _answer(url, 0, None, timeout) as answer:
        return answer.read()


def read(url: str, offset: int, length: int) -> bytes:
    """So many bytes from the offset on; fewer where the file ends.

    Raises:
      OSError: the connection broke again and again, or the file is another than when it was asked for.
    """
    known = _KNOWN.get(url) or file(url)
    length = min(length, known.size - offset)
    if not known.ranges:
        return _small(url)[offset : offset + max(length, 0)]
    room, got, broke = bytearray(max(length, 0)), 0, 0
    while got < length:
        before, reason = got, "it ended early"
        try:
            with _answer(url, offset + got, length - got) as answer:
                if answer.status != 206:
                    raise OSError(f"{url}: the server no longer serves ranges of bytes; download the checkpoint.")
                if known.stamp != _stamp(url, answer):
                    raise OSError(f"{url} has changed since its header was read; begin again.")
                while got < length and (n := answer.readinto(memoryview(room)[got : got + STEP])):
                    got += n
        except (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as e:
            reason = f"{type(e).__name__}: {e}"
        if got < length:
            broke = 1 if got > before else broke + 1
            if broke == TRIES:
                raise OSError(
                    f"{url}: the connection broke {TRIES} times at byte {offset + got} ({reason}); {got} of {length} bytes "
                    "arrived. The same command goes on where this one was."
                )
            time.sleep(PAUSE * 2 ** (broke - 1))
    return bytes(room)


@functools.lru_cache(maxsize=4)
def _small(url: str) -> bytes:
    return whole(url)


class _Redirect(urllib.request.HTTPRedirectHandler):
    """Redirections are followed; a token does not go along to other hosts."""

    def redirect_request(self, *answer: Any) -> Any:
        onward = super().redirect_request(*answer)
        if onward is not None:
            _access.authorize(onward)
        return onward


@functools.lru_cache(maxsize=1)
def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_Redirect)


def _answer(url: str, offset: int, length: int | None, timeout: float = TIMEOUT) -> Any:
    """The answer to one request, redirections followed; refusals that pass are asked again.

    Raises:
      FileNotFoundError: it is not there, or not for us. OSError: anything else, in words.
    """
    if _access.offline() and _access.at_endpoint(url):
        raise OSError(f"{url} is not read: HF_HUB_OFFLINE is set; unset it.")
    headers = {"User-Agent": "jaxmerge", "Accept-Encoding": "identity"}
    if length is not None:
        headers["Range"] = f"bytes={offset}-{offset + length - 1}"
    for n in range(TRIES):
        moved, since = _MOVED.get(url, (url, 0.0))
        at = moved if time.monotonic() < since + FRESH else url
        request, pause = urllib.request.Request(at, headers=headers), PAUSE * 2**n
        _access.authorize(request)
        try:
            answer = _opener().open(request, timeout=timeout)
            if at == url != answer.geturl() and AT_COMMIT.search(url):
                _MOVED[url] = answer.geturl(), time.monotonic()
            return answer
        except urllib.error.HTTPError as e:
            e.close()
            if at != url and e.code in GONE:  # a signed address has run out
                _MOVED.pop(url, None)
                continue
            if e.code in GONE:
                raise FileNotFoundError(_access.refusal(url, e.code, e.reason, e.headers)) from None
            reason: Any = f"the server says {e.code} {e.reason}"
            if e.code not in LATER:
                break
            pause = max(pause, _wanted(e.headers))
        except (http.client.HTTPException, OSError) as e:  # URLError is an OSError
            reason = getattr(e, "reason", e)
            if isinstance(reason, socket.gaierror | ssl.SSLCertVerificationError):  # it will not pass
                break
        if n + 1 < TRIES:
            time.sleep(pause)
    raise OSError(f"{url} cannot be read: {reason}.")


def _wanted(headers: Any) -> float:
    """How many seconds a server wants to be left alone: Retry-After, or what is left of the window that RateLimit names."""
    said = headers.get("Retry-After", "")
    left = re.search(r"\bt=(\d+)", headers.get("RateLimit", ""))
    return min(float(said if said.isdigit() else left[1] if left else 0), PATIENCE)


def _stamp(url: str, answer: Any) -> int:
    """The file's version, as a number."""
    said = url if AT_COMMIT.search(url) else answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
    return int.from_bytes(hashlib.sha256(said.encode()).digest()[:6], "big") if said else 0
