"""`jaxmerge window`: the last checkpoints of a pre-training run become one, as if its learning rate had decayed.

jaxmerge window 'gs://bucket/run/checkpoints/{840000..880000}' --schedule 1-sqrt --out ckpt/merged
jaxmerge window run/800 run/900 run/1000 --schedule ema --beta 0.7 --dry-run
"""

import dataclasses
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from jaxmerge._commands import recipes
from jaxmerge._commands.words import near, told

DECAYS = {
    "mean": "linear",
    "linear": "linear",
    "cosine": "cosine",
    "1-sqrt": "minus_sqrt",
    "minus-sqrt": "minus_sqrt",
    "ema": "ema",
}
"""What schedules are called, here and by `params.window_average`."""


@dataclasses.dataclass(frozen=True)
class Window(recipes.Options):
    """Average checkpoints of one run, oldest first: weights as if the learning rate had decayed over the window (WSM)."""

    out: str | None = None
    """Where the merged checkpoint appears."""
    schedule: Literal["mean", "linear", "cosine", "1-sqrt", "minus-sqrt", "ema"] = "mean"
    """How the updates in the window count: linear decay is the mean; 1-sqrt and minus-sqrt are two names of one."""
    beta: float = 0.8
    """Of ema: what each checkpoint leaves of the average before it."""
    state: Literal["skip", "keep"] = "skip"
    """Of training states, merge the parameters alone, or the optimiser's state too (integers, such as the step, are the first
    checkpoint's)."""
    dry_run: bool = False
    """Print the weights and the plan, and write nothing."""
    overwrite: bool = False
    """Replace the output of an earlier merge."""
    resume: bool = True
    """Go on where the same merge was cut off."""


def main(argv: Sequence[str]) -> int:
    """Run the command; 0 when done, 2 when the user must change something."""
    import tyro

    named = tyro.conf.arg(metavar="CHECKPOINT", help="Oldest first; or 'run/{1000..2000}', in quotes: all steps between.")
    checkpoints = Annotated[tuple[str, ...], tyro.conf.Positional, named]
    titled = Annotated[Window, tyro.conf.arg(name="window")]
    fields: list[Any] = [("checkpoints", checkpoints), ("options", titled, dataclasses.field(default_factory=Window))]
    try:
        parsed = tyro.cli(
            dataclasses.make_dataclass("Command", fields),
            prog="jaxmerge window",
            description=Window.__doc__,
            args=list(argv),
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        )
    except SystemExit as e:  # --help, or an argument that tyro has explained
        return e.code if isinstance(e.code, int) else 2
    from jaxmerge.recipe import RecipeError

    try:
        _run(parsed.checkpoints, parsed.options)
    except BrokenPipeError:
        raise
    except RecipeError as e:  # the user wrote none: no line of it is named
        print("jaxmerge: error:", "\n  ".join(mistake.text for mistake in e.mistakes), file=sys.stderr)
        return 2
    except (ValueError, OSError) as e:
        print(f"jaxmerge: error: {told(e)}", file=sys.stderr)
        return 2
    return 0


def _run(patterns: Sequence[str], options: Window) -> None:
    from rich.console import Console

    from jaxmerge import recipe
    from jaxmerge.recipe._open import window

    if options.out is None and not options.dry_run:
        raise ValueError("say where the merged checkpoint appears, with --out; or look first, with --dry-run.")
    _are_there(patterns)
    paths = [path for pattern in patterns for path in window(pattern)]
    _in_order(paths, options.schedule)
    text = _recipe(paths, options)
    [plan] = recipe.plan(text, **recipes.engine(options))
    weights = plan.work.tx.match.steps[0].settings("", (len(paths),))["weight"]  # type: ignore[attr-defined]
    for path, weight in zip(paths, weights.tolist(), strict=True):
        print(f"{weight:.4f} {path}")
    if options.dry_run:
        recipes.show(Console(), plan._replace(notes=tuple(note._replace(mark=None) for note in plan.notes)))
        return
    recipes.carry_out(text, str(options.out), options)


def _are_there(patterns: Sequence[str]) -> None:
    """Refuse what is no window, and what a shell made of one without quotes: every number, of which few are checkpoints."""
    from jaxmerge.recipe._open import WINDOW

    for pattern in patterns:
        if "://" not in pattern and re.search(r"[{}]", WINDOW.sub("", pattern)) and not os.path.exists(pattern):
            text = "in braces stand the first number and the last, as in 'run/{1000..2000}'; name other checkpoints one by one."
            raise ValueError(f"there is nothing at {pattern!r}: {text}")
    missing = [p for p in patterns if "://" not in p and "{" not in p and not os.path.exists(p)]
    if len(patterns) > 1 and missing and re.search(r"\d", os.path.basename(missing[0])):
        some = f"{len(missing)} of the {len(patterns)} checkpoints are not there, such as {missing[0]}"
        raise ValueError(f"{some}; in quotes, 'run/{{1000..2000}}' means those that are.")
    for name in missing:
        if "/" not in name:
            raise ValueError(f"there is nothing at {name!r}{near(name, os.listdir())}")


def _in_order(paths: Sequence[str], schedule: str) -> None:
    numbers = [m and int(m[0]) for m in (re.search(r"\d+(?=/?[^\d/]*/?$|/items/?$)", p) for p in paths)]
    known = [n for n in numbers if n is not None]
    if DECAYS[schedule] != "linear" and len(known) == len(paths) and known != sorted(known):
        raise ValueError(f"{schedule} wants checkpoints oldest first; these are of steps {', '.join(map(str, known))}.")


def _recipe(paths: Sequence[str], options: Window) -> str:
    """The same as a recipe: it goes beside the output, and `jaxmerge verify` reads it."""
    lines = ["merge_method: window_average", "models:"]
    lines += [f"  - model: {json.dumps(path)}" for path in paths]
    beta = f", beta: {options.beta}" if options.schedule == "ema" else ""
    lines.append(f"parameters: {{decay: {DECAYS[options.schedule]}{beta}}}")
    if options.state == "keep":
        lines += ["state: keep", "integers: base"]
    return "\n".join(lines) + "\n"
