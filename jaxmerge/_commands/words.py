"""What commands say: errors, guesses at what was meant, speeds."""

from collections.abc import Collection
from typing import Any


def close(word: str, known: Collection[str]) -> list[str]:
    """The known word that is most like another, if any is."""
    import difflib

    return difflib.get_close_matches(word, known, 1)


def near(word: str, known: Collection[str]) -> str:
    """The end of a sentence about a word that is unknown: what may have been meant."""
    found = close(word, known)
    return f"; did you mean {found[0]!r}?" if found else "."


def told(error: Exception) -> str:
    """An error in one line: our own words, or what the system says of a file."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def memory(plan: Any) -> str:
    """What a merge takes of it, by its headers."""
    from jaxmerge.checkpoint._budget import show_size

    whole = show_size(plan.peak_bytes + plan.runtime_bytes)
    return f"peak memory about {whole}, {show_size(plan.runtime_bytes)} of it for Python and JAX"


def speed(size: int, seconds: float) -> str:
    """Bytes in a second, for people."""
    from jaxmerge.checkpoint._budget import show_size

    return f"{show_size(size / seconds)}/s"
