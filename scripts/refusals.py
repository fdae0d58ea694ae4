"""What the scripts say to a flag that cannot be: one line, and exit status 2."""

import contextlib
import linecache
import sys
import traceback
from collections.abc import Iterator

OURS = {"__main__", "jaxmerge", "models", "scripts"}
TRACERS = {"jax", "jaxlib", "flax"}


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Around a script's main function: bad flags, missing files and full disks end it with one line, everything else is a bug.

    A ValueError tells of a bad flag where a `raise` of our own made it and it came here straight. One of JAX, NumPy or Python,
    one that happens in an expression, and one out of a traced function keep their tracebacks.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as e:
        _leave(f"{e.filename}: {e.strerror}" if e.filename and e.strerror else str(e))
    except ValueError as e:
        if not _is_check(e):
            raise
        _leave(str(e))


def _is_check(error: ValueError) -> bool:
    frames = list(traceback.walk_tb(error.__traceback__))
    packages = [frame.f_globals.get("__name__", "").partition(".")[0] for frame, _ in frames]
    hidden = any("JAX" in note for note in getattr(error, "__notes__", ()))  # frames of its own, of which it leaves word
    straight = packages[-1] in OURS and TRACERS.isdisjoint(packages) and not hidden
    last, line = frames[-1]
    return straight and "raise" in linecache.getline(last.f_code.co_filename, line).split()


def _leave(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2) from None
