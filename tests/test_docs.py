"""Every example in a docstring and in the README runs, and prints what it says."""

import doctest
import importlib
import inspect
import pathlib
import pkgutil
import re

import pytest

import jaxmerge.cli
import models

ROOT = pathlib.Path(__file__).parent.parent
PUBLIC = [m.name for package in (jaxmerge, models) for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]


slowly = [pytest.param(n, marks=pytest.mark.slow) if n.startswith("models.") else n for n in PUBLIC]


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


def test_the_table_of_merges_names_every_merge():
    """`help(jm.params)` lists whatever is offered and all recorded vectors; a peer that a docstring names is recorded."""
    table = jaxmerge.params.__doc__ or ""
    offered = {n: f for n, f in vars(jaxmerge.params).items() if inspect.isfunction(f)}
    missing = {name for name in offered if not re.search(rf"\b{name}\b", table)}
    assert not missing, f"no row for {missing}"
    golden = {g.stem.removesuffix("_a") for g in (ROOT / "tests/golden/params").glob("*_a.npz")}
    tested = "".join(p.read_text() for p in (ROOT / "tests/params").glob("test_*.py"))
    for name in golden:
        assert re.search(rf"\b{name}\b", table), f"{name} is not named"
        assert re.search(rf"\b{name.removeprefix('tokensurgeon_')}(_a)?\b", tested), f"{name} is not tested"
    for name, f in offered.items():
        source = (f.__doc__ or "").partition("Source:")[2]
        if (f.__annotations__.get("return")) is not jaxmerge.params.MergeTransform or name in ATOMS_AND_TOOLS:
            continue
        for peer in {p.lower() for p in re.findall(r"mergekit|fusion_bench|MergeLLM", source)}:
            assert any(g.startswith((f"{peer}_{name}", f"{peer}_{KIN.get(name, name)}")) for g in golden), f"{name}: {peer}"


KIN = {  # recorded under the name of a chain that contains it, or of its paper
    "adamerging": "adamerging_layerwise", "dare_linear": "dare", "elect_largest": "emr", "elect_sign": "ties", "trim": "ties",
    "trim_band": "breadcrumbs", "rank_mask": "della", "select_variance": "sce", "spherical": "slerp", "rescale": "dare",
}  # fmt: skip
ATOMS_AND_TOOLS = {"partition", "per_layer", "exclude", "keep_base", "select_layers", "passthrough", "widen"}  # no one method's


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
            assert code([*found.groups(), "--help"]) == 0, line


def code(argv):
    """What the process of a command would return."""
    try:
        return jaxmerge.cli.main(argv)
    except SystemExit as left:
        return left.code


def test_readme_tree_is_the_tree():
    """Each file that the README's tree names exists."""
    [tree] = [b for b in blocks("text") if "pyproject.toml" in b]
    folders: list[str] = []  # above this line, one per level of indentation
    for line in filter(str.strip, tree.splitlines()):
        name, level = line.split()[0], (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:level], name]
        assert ROOT.joinpath(*folders).exists(), "".join(folders)
