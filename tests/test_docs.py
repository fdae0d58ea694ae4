"""Every example in a docstring and in the README runs, and prints what it says."""

import doctest
import importlib
import inspect
import pathlib
import pkgutil
import re
import subprocess
import sys

import pytest

import jaxmerge
import models

ROOT = pathlib.Path(__file__).parent.parent
PUBLIC = [m.name for package in (jaxmerge, models) for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]


slowly = [pytest.param(n, marks=pytest.mark.slow) if n.startswith("models.reducers.") else n for n in PUBLIC]


@pytest.mark.parametrize("name", slowly)
def test_docstrings(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_public_functions_have_examples():
    """Every public function of the library says one sentence and shows one example."""
    bare = []
    for module in (jaxmerge, jaxmerge.attention, jaxmerge.tokens, jaxmerge.words, jaxmerge.params, jaxmerge.testing):
        for name, value in vars(module).items():
            documented = inspect.isfunction(value) and value.__module__.startswith("jaxmerge")
            if documented and not name.startswith("_") and ">>>" not in (value.__doc__ or ""):
                bare.append(f"{module.__name__}.{name}")
    assert not bare, f"no example in the docstring of {bare}"


def test_the_table_of_tokens_names_every_planner():
    """`help(jm.tokens)` lists whatever returns a plan, and the vectors that it names are there."""
    table, tools = jaxmerge.tokens.__doc__ or "", {"in_order", "keep_apart", "nearest_center", "representatives"}
    planners = {
        n for n, f in vars(jaxmerge.tokens).items() if inspect.isfunction(f) and "Plan" in str(f.__annotations__.get("return"))
    }
    missing = {name for name in planners - tools if not re.search(rf"\b{name}\b", table)}
    assert not missing, f"no row for {missing}"
    for golden in (ROOT / "tests/golden/tokens").glob("*_a.npz"):
        assert re.search(rf"\b{golden.stem.removesuffix('_a')}\b", table), f"{golden.name} is not named"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_readme_python_runs():
    names: dict = {}
    assert blocks("python"), "the README shows no Python"
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)


def test_readme_commands_exist():
    """Every `python -m ...`, `bash ...` and `jaxmerge ...` of the README names something that is there."""
    for line in "\n".join(blocks("bash")).splitlines():
        if found := re.search(r"python -m ((?:scripts|models)\.[\w.]+)", line):
            assert importlib.util.find_spec(found[1]), line
        elif found := re.match(r"bash (\S+)", line):
            assert (ROOT / found[1]).exists(), line
        elif found := re.match(r"jaxmerge (\w+) ([\w-]+)", line):
            command = [sys.executable, "-m", "jaxmerge.cli", *found.groups(), "--help"]
            assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0, line


def test_readme_tree_is_the_tree():
    """Each file that the README's tree names exists."""
    [tree] = [b for b in blocks("text") if "pyproject.toml" in b]
    folders: list[str] = []  # above this line, one per level of indentation
    for line in filter(str.strip, tree.splitlines()):
        name, level = line.split()[0], (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:level], name]
        assert ROOT.joinpath(*folders).exists(), "".join(folders)
