"""The commands that take files by their place: what each is called with, and from which file it comes."""

import dataclasses
import itertools
import pathlib
import sys
import types
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from jaxmerge._commands.extract import Extract, extract
from jaxmerge._commands.inspect import Inspect, inspect
from jaxmerge._commands.recipes import Merge, Plan, merge, plan
from jaxmerge._commands.verify import Verify, verify
from jaxmerge._commands.words import told

MERGEKIT = {
    "--out-shard-size": "write --max-shard-bytes",
    "--random-seed": "write seed: into the recipe",
    "--transformers-cache": "set HF_HUB_CACHE",
    "--lora-merge-cache": "leave it out, adapters are added as they are read",
    "--copy-tokenizer": "leave it out, the base's tokenizer is copied",
} | dict.fromkeys(
    (
        "--allow-crimes", "--async-write", "--clone-tensors", "--cuda", "--gpu-rich", "--lazy-unpickle", "--low-cpu-memory",
        "--multi-gpu", "--num-threads", "--read-to-gpu", "--safe-serialization", "--trust-remote-code", "--write-model-card",
    ),
    "leave it out",
)  # fmt: skip
"""Flags of mergekit's, and what is to be done instead."""
RECIPES = (".yml", ".yaml")
VERBS: dict[str, tuple[Callable[[Any, Any], int | None], type, dict[str, str], int]] = {
    "plan": (plan, Plan, {"recipe": "A YAML file."}, 1),
    "merge": (merge, Merge, {"recipe": "A YAML file.", "out": "Where the merged checkpoint appears."}, 2),
    "inspect": (inspect, Inspect, {"checkpoint": "What to show.", "other": "What to compare it with."}, 1),
    "verify": (verify, Verify, {"out": "What a merge has left."}, 1),
    "extract": (
        extract,
        Extract,
        {"model": "What was trained.", "base": "What it was trained from.", "out": "Where the adapter appears."},
        3,
    ),
}
"""What runs, its options, what is named and what it is, how many of these are needed."""


def takes(argv: Sequence[str]) -> bool:
    """Whether a command line is one of these rather than `plan METHOD` or `merge METHOD`."""
    if not argv or argv[0] not in VERBS:
        return False
    named = next((a for a in argv[1:] if a == "-" or not a.startswith("-")), "")
    if argv[0] not in ("plan", "merge") or named.endswith(RECIPES):
        return True
    from jaxmerge._methods import METHODS

    path = pathlib.Path(named)
    if named == "-":  # a recipe from standard input
        return True
    asks = named not in METHODS and not {"-h", "--help"}.isdisjoint(argv)
    return asks or (path.exists() and not path.is_dir())  # a pipe is a recipe too


def main(argv: Sequence[str]) -> int:
    """Run one of them; 0 when done, 1 when a merge is not what it says, 2 when the user must change something."""
    verb = argv[0]
    run, kind, names, needed = VERBS[verb]
    named = argv[1:]
    if needed <= len(named) <= len(names) and not any(word.startswith("-") and word != "-" for word in named):
        plain = dict(itertools.zip_longest(names, named))  # nothing to parse: tyro takes a tenth of a second to begin
        return _run(run, types.SimpleNamespace(**plain), kind())
    flags = [word.partition("=")[0] for word in named if verb in ("plan", "merge")]
    if flag := next((f for f in flags if f in MERGEKIT), None):
        print(f"jaxmerge: error: {flag} is a flag of mergekit; {MERGEKIT[flag]}.", file=sys.stderr)
        return 2
    import tyro

    fields: list[Any] = []
    for k, (name, what) in enumerate(names.items()):
        about = tyro.conf.arg(metavar=name.upper(), help=what)
        if k < needed:
            fields.append((name, Annotated[str, tyro.conf.Positional, about]))
        else:
            fields.append((name, Annotated[str | None, tyro.conf.Positional, about], dataclasses.field(default=None)))
    titled = Annotated[kind, tyro.conf.arg(name=verb)]
    command = dataclasses.make_dataclass("Command", [*fields, ("options", titled, dataclasses.field(default_factory=kind))])
    try:
        parsed = tyro.cli(
            command,
            prog=f"jaxmerge {verb}",
            description=kind.__doc__,
            args=list(argv[1:]),
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        )
    except SystemExit as e:  # --help, or an argument that tyro has explained
        return e.code if isinstance(e.code, int) else 2
    return _run(run, parsed, parsed.options)


def _run(run: Callable[[Any, Any], int | None], files: Any, options: Any) -> int:
    try:
        return run(files, options) or 0
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as e:
        print(f"jaxmerge: error: {told(e)}", file=sys.stderr)
        return 2
