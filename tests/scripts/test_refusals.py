"""Bad flags end a script with one line and exit status 2; bugs keep their tracebacks."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import jaxmerge as jm
from scripts import generate
from scripts.refusals import refusals

ROOT = pathlib.Path(__file__).resolve().parents[2]


def check(x):
    jm.merge(jm.identity(3), x)  # refuses what is not 3 long


@pytest.mark.parametrize(
    "call, line",
    [
        (lambda: jm.tokens.margins(0), "error: margins: depth must be 1 or more, got 0."),
        (
            lambda: generate.generate(generate.Flags(pathlib.Path("x"), "", family="t5")),
            "error: generate: --family must be one of",
        ),
        (lambda: pathlib.Path("/nothing/here").read_text(), "error: /nothing/here: No such file or directory"),
        (lambda: generate.generate(generate.Flags(pathlib.Path("/nothing"), "", family="byt5")), "error: "),
    ],
)
def test_a_bad_flag_is_one_line(call, line, capsys):
    with pytest.raises(SystemExit) as left, refusals():
        call()
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.startswith(line) and said.count("\n") == 1


@pytest.mark.parametrize(
    "bug",
    [
        lambda: jax.jit(check)(jnp.ones(4)),
        lambda: jax.eval_shape(check, jnp.ones(4)),
        lambda: jnp.ones(3) + jnp.ones(4),
        lambda: int("seven"),
        lambda: "a b".index("c"),
    ],
)
def test_a_bug_keeps_its_traceback(bug):
    with pytest.raises((ValueError, TypeError)), refusals():
        bug()


def test_every_script_refuses_so():
    scripts = [p.read_text() for p in (ROOT / "scripts").rglob("*.py")]
    parse = [s.partition('if __name__ == "__main__":')[2] for s in scripts if re.search(r"tyro\.(cli|extras)", s)]
    assert len(parse) > 20 and all("with refusals():" in s for s in parse if s)


def test_a_script_started_from_the_shell():
    command = [sys.executable, "-m", "scripts.show_bytes"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: show_bytes: nothing to show; name a --checkpoint or a --splitter.\n")
