"""Who may read on the Hub: its address, the token and whom it is shown to, what a refusal means.

HF_ENDPOINT, HF_TOKEN, HF_TOKEN_PATH, HF_HOME, HF_HUB_CACHE and HF_HUB_OFFLINE mean what they mean to the Hub's own client.
Source: huggingface.co/docs/huggingface_hub/package_reference/environment_variables; X-Error-Code: its utils/_http.py.
"""

import os
import pathlib
import re
import urllib.parse
import urllib.request
from typing import Any

YES = ("1", "ON", "YES", "TRUE")
AT_HUB = re.compile(r"/(?:api/models/)?(?P<model>[^/]+/[^/]+)/(?:resolve|revision)/(?P<revision>[^/?]+)")


def endpoint() -> str:
    """Where the Hub is."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def offline() -> bool:
    """Whether the user wants no word said to the Hub."""
    said = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return said.upper() in YES


def home() -> pathlib.Path:
    """The folder of the Hub's client."""
    caches = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return _path(os.environ.get("HF_HOME", f"{caches}/huggingface"))


def cache() -> pathlib.Path:
    """The folder where it keeps models."""
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return _path(named) if named else home() / "hub"


def token() -> str | None:
    """HF_TOKEN, or what `hf auth login` has left, unless HF_HUB_DISABLE_IMPLICIT_TOKEN is set."""
    if os.environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "").upper() in YES:
        return None
    said = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
    kept = _path(os.environ["HF_TOKEN_PATH"]) if "HF_TOKEN_PATH" in os.environ else home() / "token"
    try:
        return (said or kept.read_text()).strip() or None
    except OSError:
        return None


def at_endpoint(url: str) -> bool:
    """Whether an address is of the Hub's own host."""
    return urllib.parse.urlsplit(url)[:2] == urllib.parse.urlsplit(endpoint())[:2]


def authorize(request: urllib.request.Request) -> None:
    """Show the token to the Hub, and to nobody that it sends us on to."""
    if at_endpoint(request.full_url) and (mine := token()):
        request.add_unredirected_header("Authorization", f"Bearer {mine}")


def refusal(url: str, code: int, reason: str, headers: Any) -> str:
    """What it means that a server does not give a file, and what can be done about it."""
    found = AT_HUB.search(url) if at_endpoint(url) else None
    why = headers.get("X-Error-Code")
    if found is None or why == "EntryNotFound":
        return f"{url}: the server says {code} {reason}."
    model, page = found["model"], f"{endpoint()}/{found['model']}"
    if why == "RevisionNotFound":
        revision = urllib.parse.unquote(found["revision"])
        return f"{model} has no revision {revision!r}; name a branch, a tag or a commit that {page} has."
    if why == "GatedRepo":
        known = "the account whose token is used has none yet" if token() else "then set HF_TOKEN to a token of yours"
        return f"{model} is gated: ask for access at {page}; {known}."
    if code in (401, 403, 404):
        known = "the token that is used does not open it" if token() else "set HF_TOKEN to a token that opens it"
        return f"{endpoint()} shows no model {model} ({code}): mind its spelling; if it is private, {known}."
    return f"{url}: the server says {code} {headers.get('X-Error-Message') or reason}."


def _path(text: str) -> pathlib.Path:
    return pathlib.Path(os.path.expandvars(text)).expanduser()
