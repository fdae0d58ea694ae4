"""Ranges of bytes over http and https: connections that break are taken up where they broke, servers without ranges refused."""

import hashlib
import http.client
import socket
import ssl
import time
import urllib.error
import urllib.request
from typing import Any, NamedTuple

TRIES = 5
"""How often a range is asked for before it is given up; without a single byte in between."""
PAUSE = 0.5
"""Seconds before the second try; twice as many before each that follows."""
TIMEOUT = 60
STEP = 1 << 20
GONE = (401, 403, 404, 410)
LATER = (408, 425, 429, 500, 502, 503, 504)


class File(NamedTuple):
    """What a server says of a file: its size, and a number that changes when it does (0: it does not say)."""

    size: int
    stamp: int


_KNOWN: dict[str, File] = {}


def file(url: str) -> File:
    """What is there now.

    Raises:
      FileNotFoundError: nothing that may be read. OSError: the server cannot be reached, or serves no ranges of bytes.
    """
    with _answer(url, 0, 1) as answer:
        if answer.status != 206:
            raise OSError(
                f"{url} is on a server that sends whole files only (it ignored the Range of a request); download the "
                "checkpoint, and name the folder where it lies."
            )
        size = answer.headers.get("Content-Range", "").rpartition("/")[2]
        if not size.isdigit():
            raise OSError(f"{url}: the server does not say how long the file is; download it.")
        _KNOWN[url] = File(int(size), _stamp(answer))
    return _KNOWN[url]


def exists(url: str) -> bool:
    """Whether a file is there that may be read."""
    try:
        _answer(url, 0, 1).close()
    except FileNotFoundError:
        return False
    return True


def whole(url: str) -> bytes:
    """A small file; no server refuses that."""
    with _answer(url, 0, None) as answer:
        return answer.read()


def read(url: str, offset: int, length: int) -> bytes:
    """So many bytes from the offset on; fewer where the file ends.

    Raises:
      OSError: the connection broke again and again, or the file is another than when it was asked for.
    """
    known = _KNOWN.get(url) or file(url)
    length = min(length, known.size - offset)
    room, got, broke = bytearray(max(length, 0)), 0, 0
    while got < length:
        before, reason = got, "it ended early"
        try:
            with _answer(url, offset + got, length - got) as answer:
                if answer.status != 206:
                    raise OSError(f"{url}: the server no longer serves ranges of bytes; download the checkpoint.")
                if known.stamp != _stamp(answer):
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


def _answer(url: str, offset: int, length: int | None) -> Any:
    """The answer to one request, redirections followed; refusals that pass are asked again.

    Raises:
      FileNotFoundError: it is not there, or not for us. OSError: anything else, in words.
    """
    headers = {"User-Agent": "jaxmerge", "Accept-Encoding": "identity"}
    if length is not None:
        headers["Range"] = f"bytes={offset}-{offset + length - 1}"
    request = urllib.request.Request(url, headers=headers)
    for n in range(TRIES):
        try:
            return urllib.request.urlopen(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as e:
            e.close()
            if e.code in GONE:
                raise FileNotFoundError(f"{url}: the server says {e.code} {e.reason}.") from None
            reason: Any = f"the server says {e.code} {e.reason}"
            if e.code not in LATER:
                break
        except (http.client.HTTPException, OSError) as e:  # URLError is an OSError
            reason = getattr(e, "reason", e)
            if isinstance(reason, socket.gaierror | ssl.SSLCertVerificationError):  # it will not pass
                break
        if n + 1 < TRIES:
            time.sleep(PAUSE * 2**n)
    raise OSError(f"{url} cannot be read: {reason}.")


def _stamp(answer: Any) -> int:
    """The file's version, as a number."""
    said = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
    return int.from_bytes(hashlib.sha256(said.encode()).digest()[:6], "big") if said else 0
