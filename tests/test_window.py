"""`jaxmerge window`: weights as the schedule says, steps between braces, training states without their optimiser."""

import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file, save_file

from jaxmerge import checkpoint, cli, recipe

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")
STEPS = (80, 100, 200, 300, 1200)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folders of safetensors, 80 to 1200, whose one weight is the step."""
    root = tmp_path_factory.mktemp("window") / "run"
    for step in STEPS:
        (root / str(step)).mkdir(parents=True)
        save_file({"w": np.full(4, step, np.float32)}, root / str(step) / "model.safetensors")
    return root


def merged(out):
    return float(load_file(out / "model.safetensors")["w"][0])


def ema(values, beta):
    """Its definition: what is there counts beta, what comes the rest."""
    average = values[0]
    for v in values[1:]:
        average = beta * average + (1 - beta) * v
    return average


def one_minus_sqrt(values):
    f = 1 - np.sqrt(np.arange(len(values) + 1) / len(values))
    return values[0] + sum(f[i] * (values[i] - values[i - 1]) for i in range(1, len(values)))


SCHEDULES = {
    "mean": ([], np.mean),
    "linear": ([], np.mean),
    "1-sqrt": ([], one_minus_sqrt),
    "minus-sqrt": ([], one_minus_sqrt),
    "ema": (["--beta", "0.3"], lambda values: ema(values, 0.3)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(run, tmp_path, capsys, name):
    flags, expected = SCHEDULES[name]
    command = ["window", f"{run}/{{100..300}}", f"{run}/1200", "--schedule", name, *flags, "--out", str(tmp_path / "out")]
    assert cli.main(command) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if str(run) in line and len(line.split()) == 2]
    assert [path.rsplit("/", 1)[-1] for _, path in lines] == ["100", "200", "300", "1200"]
    values = [100.0, 200.0, 300.0, 1200.0]
    assert merged(tmp_path / "out") == pytest.approx(expected(values), rel=1e-6)
    assert sum(float(w) * v for (w, _), v in zip(lines, values, strict=True)) == pytest.approx(expected(values), rel=1e-3)
    assert sum(float(w) for w, _ in lines) == pytest.approx(1, abs=2e-4)


def test_verified_and_looked_at_first(run, tmp_path, capsys):
    command = ["window", f"{run}/{{80..300..40}}", "--schedule", "ema"]
    assert cli.main([*command, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert [line.rsplit("/", 1)[-1] for line in printed.splitlines()[:2]] == ["80", "200"] and "0.8000" in printed
    assert not list(tmp_path.iterdir())
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 0
    assert cli.main(["verify", str(tmp_path / "out")]) == 0
    assert "bit for bit" in capsys.readouterr().out
    text = (tmp_path / "out/mergekit_config.yml").read_text()
    assert "decay: ema, beta: 0.8" in text and f'"{run}/200"' in text


def test_training_states(tmp_path, capsys):
    """Only parameters are merged, and it says so; or all of it, where it is asked for."""
    trees = {}
    for step in (8, 9):
        weights = {"params": {"w": jnp.full((4, 2), step, jnp.float32)}}
        trees[step] = {"params": weights, "opt_state": [{"mu": weights, "count": jnp.int32(step)}], "step": jnp.int32(step)}
        (tmp_path / f"run/{step}").mkdir(parents=True)
        ocp.save(tmp_path / f"run/{step}/items", trees[step])
    run = f"{tmp_path}/run/{{8..9}}/items"
    assert cli.main(["window", run, "--out", str(tmp_path / "out")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "is left out: opt_state, step (3 leaves, 40 B); state: keep (--state keep) merges it." in printed
    got = ocp.load(tmp_path / "out")
    assert list(got) == ["params"] and (np.asarray(got["params"]["params"]["w"]) == 8.5).all()
    assert cli.main(["window", run, "--state", "keep", "--out", str(tmp_path / "all")]) == 0
    got = ocp.load(tmp_path / "all")
    assert got["step"] == 8 and (np.asarray(got["opt_state"][0]["mu"]["params"]["w"]) == 8.5).all()
    text = f'merge_method: linear\nparameters: {{weight: 1}}\nmodels: [{{model: "{run}"}}]\n'
    assert [sorted(p.headers.out) for p in recipe.plan(text)] == [["params/params/w"]]
    with pytest.raises(recipe.RecipeError, match=r"4:8: state must be one of skip, keep, got 'kept'; did you mean 'keep'"):
        recipe.plan(text + "state: kept\n")
    assert checkpoint.receipt(tmp_path / "out")["versions"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["RUN/{80..300}"], "say where the merged checkpoint appears, with --out; or look first, with --dry-run"),
        ([f"RUN/{i}" for i in range(80, 120)], "38 of the 40 checkpoints are not there, such as RUN/81; in quotes"),
        (["RUN/{400..900}"], "no checkpoint lies in {400..900}; there are 80 to 1200"),
        (["RUN/300", "RUN/100", "--schedule", "1-sqrt"], "1-sqrt wants checkpoints oldest first; these are of steps 300, 100"),
        (
            ["RUN/100", "RUN/300", "--schedule", "ema", "--beta", "1.5"],
            "beta of window_average must be a number between 0",
        ),
        (["RUN"], "RUN"),
        (["{x,y}"], "error: there is nothing at '{x,y}': in braces stand the first number and the last, as in"),
        (["RUN/{100,300}"], "error: there is nothing at 'RUN/{100,300}': in braces"),
        (["tets"], "error: there is nothing at 'tets'"),
        (["RUN/100", "RUN/lsat"], "error: there is nothing at 'RUN/lsat'"),
        (["RUN/x", "RUN/y"], "error: there is nothing at 'RUN/x'; paths are relative to where you are.\n  there is"),
        (["RUN/100", "--memory", "lots"], "error: --memory='lots' is not a size"),
    ],
)
def test_refused(run, tmp_path, capsys, arguments, says):
    out = ["--out", str(tmp_path / "out")] if "look first" not in says else []
    assert cli.main(["window", *(a.replace("RUN", str(run)) for a in arguments), *out]) == 2
    error = capsys.readouterr().err
    assert says.replace("RUN", str(run)) in error and "recipe" not in error
    assert not (tmp_path / "out").exists()
