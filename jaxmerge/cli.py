"""`jaxmerge plan|merge|window|verify|inspect|extract|doctor|demo`: merge checkpoints as a recipe says, or by a method.

jaxmerge plan  recipe.yml
jaxmerge merge recipe.yml ckpt/merged
jaxmerge verify ckpt/merged
jaxmerge inspect ckpt/merged
jaxmerge merge ties --base ckpt/base --models ckpt/math ckpt/code --out ckpt/merged --density 0.2
jaxmerge plan  ties --base ckpt/base --models ckpt/math ckpt/code
jaxmerge merge fisher --models ckpt/math ckpt/code --statistics fisher/math fisher/code --out ckpt/merged
jaxmerge window 'run/{1000..2000}' --schedule 1-sqrt --out ckpt/merged
jaxmerge doctor ckpt/base gs://bucket/run --out gs://bucket/merged
jaxmerge demo

Where JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID are set, in one process on each host, `merge`
is one merge of all of them: each reads and writes its part.
"""

import contextlib
import ctypes
import gc
import importlib
import os
import pathlib
import sys
import textwrap

OWN = ("window", "doctor", "demo")
"""Commands that have a file of their own."""


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns:
      0 when done, 1 when a merge is not what it says, 2 when the user must change something, 130 when the user broke it off.
    """
    if argv is None:
        return _leave(_guarded(_settle(), alone="JAX_COORDINATOR_ADDRESS" not in os.environ))
    return _guarded(argv)


def _guarded(argv: list[str], *, alone: bool = True) -> int:
    try:
        return _main(argv) if alone or argv[:1] != ["merge"] else _together(argv)
    except BrokenPipeError:  # whoever reads has seen enough, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("jaxmerge: interrupted; a merge goes on from here when the same command is given again", file=sys.stderr)
        return 130


def _together(argv: list[str]) -> int:
    """Merge as one of several processes, each of which does its part; the first one tells."""
    from jaxmerge._roll_call import join

    try:
        party = join()
    except (OSError, ValueError) as e:
        print(f"jaxmerge: error: {e}", file=sys.stderr)
        return 2
    with contextlib.ExitStack() as stack:
        if party is not None and party.rank:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        return _main(argv)


def _settle() -> list[str]:
    """Make the process one that lives for a single command, and load what all commands need; its arguments."""
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # numpy's threads would turn for a while at first, with nothing to do
    gc.disable()  # what is loaded stays: to look through all of it takes a twentieth of a second each time
    import jaxmerge.params  # noqa: F401

    gc.freeze()
    gc.set_threshold(100_000)
    gc.enable()
    _keep_freed()
    _keep_compiled()
    return sys.argv[1:]


def _keep_freed() -> None:
    """Memory that is freed is used again, by whichever thread is next; glibc would hand it back to the kernel, to have it
    zeroed page by page anew, and keep a store of it for every thread."""
    trim, mapped, arenas = -1, -3, -8  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX of malloc.h
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(trim, 1 << 29)
        libc.mallopt(mapped, 1 << 25)
        libc.mallopt(arenas, 1)


def _leave(code: int) -> int:
    """End at once: to take down what is loaded, object by object, takes a tenth of a second."""
    import jax

    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    if not jax.distributed.is_initialized():  # several processes take leave of each other
        os._exit(code)
    return code


def _at_home(word: str) -> str:
    """A path below ~ where no shell has seen it: in quotes, or after the = of a flag."""
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{flag}{equals}{os.path.expanduser(value)}"


def _main(argv: list[str]) -> int:
    argv = [*map(_at_home, argv)]
    if argv in (["-h"], ["--help"]):
        print(f"{__doc__}\n{_usage()}")
        return 0
    if argv == ["--version"]:
        from jaxmerge import __version__

        print(f"jaxmerge {__version__}")
        return 0
    if argv and argv[0] in OWN:
        return importlib.import_module(f"jaxmerge._commands.{argv[0]}").main(argv[1:])
    from jaxmerge._commands import verbs

    if verbs.takes(argv):
        return verbs.main(argv)
    from jaxmerge._commands import by_method
    from jaxmerge._methods import METHODS

    if len(argv) < 2 or argv[0] not in by_method.VERBS or argv[1] not in METHODS:
        print(*(_not_understood(argv) or [_usage()]), sep="\n", file=sys.stderr)
        return 2
    return by_method.main(argv)


def _usage() -> str:
    from jaxmerge._commands.by_method import VERBS
    from jaxmerge._methods import METHODS

    methods = textwrap.fill(", ".join(METHODS), 78, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    return f"""usage: jaxmerge {{{"|".join(VERBS)}}} METHOD [--help]
       jaxmerge plan RECIPE.yml
       jaxmerge merge RECIPE.yml OUT
       jaxmerge verify OUT
       jaxmerge inspect CHECKPOINT [OTHER]
       jaxmerge extract MODEL BASE OUT
       jaxmerge window CHECKPOINT... --out OUT
       jaxmerge doctor [CHECKPOINT ...] [--out PLACE ...]
       jaxmerge demo [OUT]

methods:
{methods}"""


def _not_understood(argv: list[str]) -> list[str]:
    """What to say of the first word that means nothing."""
    from jaxmerge._commands import by_method, verbs
    from jaxmerge._commands.words import close, near
    from jaxmerge._methods import METHODS

    known = [*verbs.VERBS, *OWN]
    if argv and argv[0] not in known:
        here = near(argv[0], known) if close(argv[0], known) else f"; there are {', '.join(known)}."
        here = "; write jaxmerge merge RECIPE.yml OUT." if argv[0].startswith("mergekit") else here
        return [f"jaxmerge: error: there is no command {argv[0]!r}{here}"]
    if len(argv) > 1 and argv[0] in by_method.VERBS:
        told = near(argv[1], METHODS) if close(argv[1], METHODS) else "; `jaxmerge --help` lists the methods."
        return [f"jaxmerge: error: {argv[1]!r} is neither a recipe (a file) nor a method{told}"]
    return []


def _keep_compiled() -> None:
    """Programs that were compiled once are kept on disk, unless the user has said where."""
    import jax

    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "jaxmerge"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


if __name__ == "__main__":
    sys.exit(main())
